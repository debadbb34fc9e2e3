"""A finished calibration in one file: to keep, to send, and to go on from elsewhere."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qdist.digest import digest_json
from qdist.files import replacing
from qdist.store import failures
from qdist.store.container import UNREADABLE
from qdist.store.identity import Identity
from qdist.store.merges import pack_merge, unpack_merge
from qdist.store.protocol import CalibrationStore, FinishedMerge
from qdist.store.receipt import ShardReceipt
from qdist.store.zarr_store import create_store

FORMAT = "qdist statistics"
SCHEMA = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class StatisticsFile:
    """What an exported file holds: the merge, the identity that it was made for, and the documents
    of the store that go with it."""

    merge: FinishedMerge
    identity: Identity
    documents: dict[str, dict[str, Any]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Imported:
    """``is_new``: whether the store did not hold these samples and tensors in one shard before."""

    location: str
    name: str
    n_samples: int
    n_tensors: int
    is_new: bool


def export_statistics(
    store: CalibrationStore, path: Path, name: str | None = None, documents: Sequence[str] = ()
) -> Path:
    """Write a finished merge, by default the latest, to one file, whole or not at all.

    ``documents``: names of those of the store's that go with it, where it has them.

    The file is a ZIP archive that holds a Zarr v3 group, with the identity, the taps, the
    micro-batches and the manifest. Raises QD402 where there is none, QD403, QD408, QD603.
    """
    merge = store.latest() if name is None else store.find(name)
    if merge is None:
        known = ", ".join(store.finished()) or "none"
        raise failures.unfinished(store.location, f"no finished merge {name}; there are: {known}")
    identity = store.identity.to_json()
    told = {each: store.document(each) for each in documents}
    told = {each: value for each, value in told.items() if value is not None}
    own = {
        "format": FORMAT,
        "schema": SCHEMA,
        "identity": identity,
        "documents": told,
        "seal": _seal(merge, identity, told),
    }
    data = pack_merge(merge, {"export": own})
    with replacing(path) as temporary:
        temporary.write_bytes(data)
    return path


def read_statistics(path: Path) -> StatisticsFile:
    """Read an exported file. Raises QD409 for a damaged file, and for any other."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise failures.unusable_file(str(path), error.strerror or str(error)) from error
    try:
        merge, documents = unpack_merge(data)
        own = documents["export"]
        told = (own["format"], own["schema"])
        if told == (FORMAT, SCHEMA):
            identity = Identity.from_json(own["identity"])
            kept = dict(own["documents"])
            is_sound = own["seal"] == _seal(merge, identity.to_json(), kept)
    except UNREADABLE as error:
        raise failures.unusable_file(str(path), f"a damaged or other file ({error})") from error
    if told != (FORMAT, SCHEMA):
        raise failures.unusable_file(str(path), f"format {told[0]!r} of schema {told[1]!r}")
    if not is_sound:
        raise failures.unusable_file(str(path), "contents that were changed since the export")
    return StatisticsFile(merge=merge, identity=identity, documents=kept)


def import_statistics(path: Path, location: str | Path, identity: Identity | None) -> Imported:
    """Put an exported file into the store at ``location``, made where there is none.

    The merge counts there as one shard of all its micro-batches, so that a calibration with more
    samples goes on from it, and as the latest finished merge. ``identity``: what the caller would
    calibrate; None takes the file's. All is checked before anything is written, and importing
    again completes an import that was cut short. Raises QD401 where the file, or the store, is of
    another identity; QD409; what `create_store` raises.
    """
    found = read_statistics(path)
    mend = "export them from a calibration of this very model, data preparation and settings"
    if identity is not None:
        different = found.identity.differences(identity)
        if different:
            raise failures.other_identity(str(path), different, mend)
    merge = found.merge
    store = create_store(location, found.identity)
    is_new = bool(merge.batches) and store.commit(_receipt_of(path, merge), merge.record)
    for name, value in found.documents.items():
        if store.document(name) is None:
            store.put_document(name, value)
    known = store.find(merge.name)
    if known is not None and known.record.digest == merge.record.digest:
        store.make_latest(merge.name)
    else:
        store.finish(merge.name, merge.record, merge.about, merge.taps, merge.batches)
    return Imported(
        location=store.location,
        name=merge.name,
        n_samples=merge.record.n_samples,
        n_tensors=len(merge.record.tensors),
        is_new=is_new,
    )


def _receipt_of(path: Path, merge: FinishedMerge) -> ShardReceipt:
    return ShardReceipt(
        shard_id=digest_json(merge.batches),
        batches=merge.batches,
        tensors=merge.record.tensors,
        record_digest=merge.record.digest,
        made_by={"imported": path.name},
    )


def _seal(merge: FinishedMerge, identity: dict[str, Any], documents: dict[str, Any]) -> str:
    """Digest of all that a file says."""
    taps = [
        [[p.tensor, p.dtype, p.is_input] for p in merge.taps.points],
        merge.taps.aliases,
        merge.taps.untapped,
    ]
    return digest_json(
        [identity, merge.name, merge.about, taps, merge.batches, merge.record.digest, documents]
    )
