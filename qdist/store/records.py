"""Records as containers, and containers under names that say what is in them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from qdist.stats.record import CalibrationRecord
from qdist.store import failures
from qdist.store.container import Container, checksum
from qdist.store.layout import SCHEMA, write_key, written
from qdist.store.place import Place
from qdist.store.receipt import tap_set_digest


def pack_record(record: CalibrationRecord, documents: Mapping[str, Any] | None = None) -> bytes:
    """A record in one object. Its rows are named by their digest alone."""
    own = {
        "schema": SCHEMA,
        "tap_set": tap_set_digest(record.tensors),
        "n_samples": record.n_samples,
        "record_digest": record.digest,
    }
    encoded = record.encoded
    return Container(
        arrays={} if encoded else record.arrays(),
        attributes={"qdist": own},
        documents=documents or {},
        encoded=encoded,
    ).pack()


def unpack_record(container: Container, tensors: Sequence[str]) -> CalibrationRecord:
    """From `pack_record`, which says nothing of the names. Raises one of `UNREADABLE`.

    Its digest is for the caller to check: that of the bytes is cheaper, where it is known.
    """
    own = container.attributes["qdist"]
    if own["schema"] != SCHEMA or own["tap_set"] != tap_set_digest(tuple(tensors)):
        raise ValueError("a record of other tensors")
    return CalibrationRecord.from_arrays(tensors, int(own["n_samples"]), container.arrays)


def unpack_checked(container: Container, tensors: Sequence[str]) -> CalibrationRecord:
    """As `unpack_record`, and the record is as its digest says."""
    record = unpack_record(container, tensors)
    if record.digest != container.attributes["qdist"]["record_digest"]:
        raise ValueError("another digest")
    return record


def named(folder: str, name: str, data: bytes) -> tuple[str, bytes]:
    """A container with a new key for it, which carries its checksum."""
    return write_key(folder, name, checksum(data)), data


def read_container(place: Place, folder: str, key: str) -> bytes:
    """What `named` gave the key. Raises QD403 where it is not there, or not the same."""
    told, data = written(folder, key), place.get(key)
    where = f"{place.where}/{key}"
    if told is None or data is None:
        raise failures.damaged(where, "no such object")
    if checksum(data) != told[1]:
        raise failures.damaged(where, f"{len(data)} bytes of another checksum")
    return data
