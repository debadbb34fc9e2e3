"""One record in a file of its own, for processes that share a folder."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from qdist.files import replacing
from qdist.stats.record import CalibrationRecord
from qdist.store import failures
from qdist.store.container import UNREADABLE, Container
from qdist.store.records import pack_record, unpack_checked


def write_record(path: Path, record: CalibrationRecord) -> Path:
    """Write a record, whole or not at all. Raises QD603."""
    with replacing(path) as temporary:
        temporary.write_bytes(pack_record(record))
    return path


def read_record(path: Path, tensors: Sequence[str]) -> CalibrationRecord:
    """From `write_record`. Raises QD403 where it is missing, damaged, or of other tensors."""
    try:
        return unpack_checked(Container.unpack(path.read_bytes()), tensors)
    except UNREADABLE as error:
        raise failures.damaged(str(path), str(error)) from error
