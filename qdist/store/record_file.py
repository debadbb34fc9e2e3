"""One record in a file of its own, for processes that share a folder."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from qdist.files import replacing
from qdist.stats.record import CalibrationRecord
from qdist.store import failures
from qdist.store.container import UNREADABLE, Container
from qdist.store.records import pack_record, unpack_record


def write_record(path: Path, record: CalibrationRecord) -> Path:
    """Write a record, whole or not at all. Raises QD603."""
    with replacing(path) as temporary:
        temporary.write_bytes(pack_record(record))
    return path


def read_record(path: Path, tensors: Sequence[str]) -> CalibrationRecord:
    """From `write_record`. Raises QD403 where it is missing, damaged, or of other tensors."""
    try:
        container = Container.unpack(path.read_bytes())
        record = unpack_record(container, tensors)
        if record.digest != container.attributes["qdist"]["record_digest"]:
            raise ValueError("another digest")
    except UNREADABLE as error:
        raise failures.damaged(str(path), str(error)) from error
    return record
