"""A calibration store on Zarr v3, local paths.

Layout (schema 1)::

    zarr.json                     group; attributes: schema, identity, taps
    records/<shard id>/<write>/   group of arrays key int64[m], count uint64[m] and
                                  extrema float32[n, 2]
    receipts/<shard id>/          group; attributes: the receipt, and the folder of its record.
                                  Created last, only if absent
    merged/<name>/<write>/        group of the same three arrays
    finished/<name>/              group; attributes: what was merged, its digest and its folder
    head.json                     name of the last finished merge

Every write goes to a folder of its own, so that a committed record is never written again, and
only what nobody can want is deleted: a damaged record, and one that came second. Every chunk
carries a CRC-32C, and every record a SHA-256 in its receipt.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import zarr
from numpy.typing import NDArray
from zarr.codecs import Crc32cCodec, ZstdCodec
from zarr.core.buffer import Buffer, default_buffer_prototype
from zarr.core.sync import sync
from zarr.storage import LocalStore

from qdist.errors import StoreError
from qdist.model.taps import TapPoint, TapTable
from qdist.stats.record import CalibrationRecord
from qdist.store.identity import Identity
from qdist.store.receipt import ShardReceipt

SCHEMA = 1

_UNREADABLE = (
    ArithmeticError,
    AttributeError,
    KeyError,
    TypeError,
    ValueError,
    OSError,
    RuntimeError,
)
"""What Zarr, its codecs and our own parsing raise on damaged metadata and chunks."""


class ZarrStore:
    """`CalibrationStore` in a local folder. See the protocol for ownership and concurrency."""

    def __init__(self, path: Path, identity: Identity, taps: TapTable) -> None:
        self.path = path
        self._identity = identity
        self._taps = taps
        self._store = LocalStore(path)

    @classmethod
    def create(cls, path: Path, identity: Identity, taps: TapTable) -> ZarrStore:
        """Open the store at ``path`` for ``identity``, making it when there is none.

        Raises `StoreError`: QD401 made for another identity, QD404 cannot be written, QD405.
        """
        path = path.absolute()
        if not (path / "zarr.json").exists():
            _refuse_foreign_folder(path)
            with _writing(path):
                attributes = {
                    "qdist": {
                        "schema": SCHEMA,
                        "kind": "calibration",
                        "identity": identity.to_json(),
                        "taps": _taps_json(taps),
                    }
                }
                path.mkdir(parents=True, exist_ok=True)
                _create_group(LocalStore(path), "", attributes)
        store = cls.open(path)
        different = store.identity.differences(identity)
        if different:
            raise StoreError(
                "QD401",
                where=str(path),
                got="a store that differs in " + "; ".join(different),
                expected="a store of the same model, preprocessing, processor and settings",
                mend="choose another store.path, or remove the old store if it is not needed",
            )
        return store

    @classmethod
    def open(cls, path: Path) -> ZarrStore:
        """Open an existing store, whatever it was made for. Raises QD402, QD405."""
        path = path.absolute()
        if not (path / "zarr.json").is_file():
            raise StoreError(
                "QD402",
                where=str(path),
                got="no store",
                expected="a store that qdist calibrate has written",
                mend="run qdist calibrate with the same model and store.path first",
            )
        try:
            own = _attributes(LocalStore(path, read_only=True), "")["qdist"]
            schema = own["schema"]
        except _UNREADABLE as error:
            raise _bad_schema(path, "a Zarr group that qdist did not make") from error
        if schema != SCHEMA:
            raise _bad_schema(path, f"schema {schema}")
        try:
            return cls(path, Identity.from_json(own["identity"]), _taps_from_json(own["taps"]))
        except _UNREADABLE as error:
            raise _bad_schema(path, "incomplete attributes") from error

    @property
    def identity(self) -> Identity:
        """What the store was made for."""
        return self._identity

    @property
    def taps(self) -> TapTable:
        """The measured tensors."""
        return self._taps

    def commit(self, receipt: ShardReceipt, record: CalibrationRecord) -> bool:
        """Keep a shard's record; False when another process was first. Raises QD404.

        A receipt that cannot be read counts as absent here too, and is replaced.
        """
        key = f"receipts/{receipt.shard_id}"
        with _writing(self.path):
            # In this order: a receipt is there whole or not at all, so one that is there and cannot
            # be read is damaged, while one that cannot be read may have come a moment later.
            if sync(self._store.exists(f"{key}/zarr.json")):
                if self._receipt(receipt.shard_id) is not None:
                    return False
                sync(self._store.delete(f"{key}/zarr.json"))
            folder = self._write_record(f"records/{receipt.shard_id}", record)
            attributes = {"receipt": receipt.to_json(), "record": folder}
            is_first = _create_group(self._store, key, attributes)
            if not is_first:
                self._delete_record(folder)
            return is_first

    def receipts(self) -> list[ShardReceipt]:
        """All committed shards, sorted by id. Damaged receipts count as absent."""
        found = (self._receipt(name) for name in self._children("receipts"))
        return sorted(
            (receipt for receipt in found if receipt is not None), key=lambda r: r.shard_id
        )

    def read(self, receipt: ShardReceipt) -> CalibrationRecord:
        """The record of a committed shard. Raises QD403 when it is damaged or missing."""
        folder = receipt.kept_in or self._kept_in(receipt.shard_id)
        if not folder:
            raise _damaged(self.path, f"receipts/{receipt.shard_id}", "no receipt")
        record = self._read_record(folder, receipt.n_samples)
        if record.digest != receipt.record_digest:
            raise _damaged(self.path, folder, "another digest")
        return record

    def discard(self, receipt: ShardReceipt) -> None:
        """Forget a shard, so that it can be redone, unless it was redone meanwhile. Raises QD404.

        The receipt goes first: one without a record would only have others stumble.
        """
        kept_in = self._kept_in(receipt.shard_id)
        folder = receipt.kept_in or kept_in
        with _writing(self.path):
            if folder == kept_in:
                sync(self._store.delete(f"receipts/{receipt.shard_id}/zarr.json"))
            if folder:
                self._delete_record(folder)

    def finish(self, name: str, record: CalibrationRecord, about: dict[str, Any]) -> None:
        """Keep a merged record under ``name`` and make it the latest. Raises QD404.

        An earlier merge of this name stays where it is, for others may be reading it.
        """
        with _writing(self.path):
            folder = self._write_record(f"merged/{name}", record)
            attributes = {
                "about": about,
                "digest": record.digest,
                "n_samples": record.n_samples,
                "record": folder,
            }
            sync(self._store.set(f"finished/{name}/zarr.json", _group_document(attributes)))
        self.make_latest(name)

    def finished(self) -> list[str]:
        """Names of all finished merges, sorted."""
        return self._children("finished")

    def find(self, name: str) -> tuple[CalibrationRecord, dict[str, Any]] | None:
        """A finished merge and what was said about it; None where absent or damaged."""
        try:
            return self._finished(name)
        except StoreError:
            return None

    def make_latest(self, name: str) -> None:
        """Let `latest` give the merge ``name``. Raises QD404."""
        head = json.dumps({"finished": name}).encode()
        present = sync(self._store.get("head.json", default_buffer_prototype()))
        # A store that nobody may write any more can still be asked for what it holds.
        if present is None or present.to_bytes() != head:
            with _writing(self.path):
                sync(self._store.set("head.json", _buffer(head)))

    def latest(self) -> tuple[CalibrationRecord, dict[str, Any]]:
        """The last finished merge and what was said about it. Raises QD402, QD403."""
        head = sync(self._store.get("head.json", default_buffer_prototype()))
        if head is None:
            raise StoreError(
                "QD402",
                where=str(self.path),
                got=f"{len(self.receipts())} finished shards but no finished calibration",
                expected="a calibration that ran to its end",
                mend="run qdist calibrate again; it goes on where it stopped",
            )
        try:
            name = str(json.loads(head.to_bytes())["finished"])
        except (KeyError, TypeError, ValueError) as error:
            raise _damaged(self.path, "head.json", str(error)) from error
        return self._finished(name)

    def _finished(self, name: str) -> tuple[CalibrationRecord, dict[str, Any]]:
        """A merged record and what was said about it. Raises QD403."""
        key = f"finished/{name}"
        try:
            told = _attributes(self._store, key)
            n_samples, digest = int(told["n_samples"]), str(told["digest"])
            about, folder = dict(told["about"]), str(told["record"])
        except _UNREADABLE as error:
            raise _damaged(self.path, key, str(error)) from error
        record = self._read_record(folder, n_samples)
        if record.digest != digest:
            raise _damaged(self.path, folder, "another digest")
        return record, about

    def _receipt(self, shard_id: str) -> ShardReceipt | None:
        """A shard's receipt; None where absent or damaged."""
        try:
            told = _attributes(self._store, f"receipts/{shard_id}")
            receipt = ShardReceipt.from_json(told["receipt"])
            kept_in = str(told["record"])
        except _UNREADABLE:
            return None
        # The folder may be deleted one day, so nothing but a write of this very shard will do.
        parent, _, write = kept_in.rpartition("/")
        if receipt.shard_id != shard_id or parent != f"records/{shard_id}" or not write.isalnum():
            return None
        return replace(receipt, kept_in=kept_in)

    def _kept_in(self, shard_id: str) -> str:
        """The folder of the shard's record as of now; empty where there is no sound receipt."""
        receipt = self._receipt(shard_id)
        return receipt.kept_in if receipt is not None else ""

    def _children(self, folder: str) -> list[str]:
        async def names() -> list[str]:
            return [name async for name in self._store.list_dir(folder)]

        return sorted(name for name in sync(names()) if name != "zarr.json")

    def _write_record(self, parent: str, record: CalibrationRecord) -> str:
        """Write the arrays into a new folder below ``parent``, and return it."""
        folder = f"{parent}/{uuid.uuid4().hex}"
        group = zarr.create_group(self._store, path=folder)
        arrays: dict[str, NDArray[Any]] = {
            "key": record.keys,
            "count": record.counts,
            "extrema": record.extrema,
        }
        for name, values in arrays.items():
            array = group.create_array(
                name,
                shape=values.shape,
                dtype=values.dtype,
                chunks=tuple(max(1, n) for n in values.shape),
                compressors=(ZstdCodec(level=3), Crc32cCodec()),
                # Counts are never 0 and keys never -1, so a missing chunk cannot pass for data.
                fill_value=np.nan
                if values.dtype.kind == "f"
                else np.array(-1).astype(values.dtype),
                config={"write_empty_chunks": True},
            )
            array[...] = values
        return folder

    def _delete_record(self, folder: str) -> None:
        """Delete one write, perhaps at the same time as another process; it may leave leftovers."""
        with suppress(FileNotFoundError):
            sync(self._store.delete_dir(folder))

    def _read_record(self, folder: str, n_samples: int) -> CalibrationRecord:
        try:
            group = zarr.open_group(self._store, path=folder, mode="r")
            keys, counts, extrema = (
                np.asarray(cast(zarr.Array[Any], group[name])[...])
                for name in ("key", "count", "extrema")
            )
            return CalibrationRecord(
                tensors=self._taps.tensors,
                keys=keys.astype(np.int64, copy=False),
                counts=counts.astype(np.uint64, copy=False),
                extrema=extrema.astype(np.float32, copy=False),
                n_samples=n_samples,
            )
        except _UNREADABLE as error:
            raise _damaged(self.path, folder, str(error)) from error


def _create_group(store: LocalStore, path: str, attributes: dict[str, Any]) -> bool:
    """Write a group's metadata only if there is none; whether this call was the one."""
    key = f"{path}/zarr.json" if path else "zarr.json"
    data = _group_document(attributes)
    if sync(store.exists(key)):
        return False
    sync(store.set_if_not_exists(key, data))
    written = sync(store.get(key, default_buffer_prototype()))
    return written is not None and written.to_bytes() == data.to_bytes()


def _group_document(attributes: dict[str, Any]) -> Buffer:
    document = {"zarr_format": 3, "node_type": "group", "attributes": attributes}
    return _buffer(json.dumps(document).encode())


def _buffer(data: bytes) -> Buffer:
    return default_buffer_prototype().buffer.from_bytes(data)


def _attributes(store: LocalStore, path: str) -> dict[str, Any]:
    """A group's attributes. Raises one of `_UNREADABLE` where there is no sound group."""
    return cast(dict[str, Any], dict(zarr.open_group(store, path=path, mode="r").attrs))


def _taps_json(taps: TapTable) -> dict[str, Any]:
    return {
        "points": [[p.tensor, p.dtype, p.is_input] for p in taps.points],
        "aliases": taps.aliases,
        "untapped": taps.untapped,
    }


def _taps_from_json(value: dict[str, Any]) -> TapTable:
    points = (TapPoint(tensor=t, dtype=d, is_input=i) for t, d, i in value["points"])
    return TapTable(points=tuple(points), aliases=value["aliases"], untapped=value["untapped"])


@contextmanager
def _writing(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if isinstance(error, StoreError):
            raise
        raise StoreError(
            "QD404",
            where=str(path),
            got=error.strerror or str(error),
            expected="a folder that every worker can write",
            mend="free some space, change its permissions, or choose another store.path",
        ) from error


def _refuse_foreign_folder(path: Path) -> None:
    if path.is_file():
        raise _bad_schema(path, "a file")
    # What Zarr leaves where a process died while it made the store, or makes it right now.
    own = (".partial", "zarr.json")
    if path.is_dir() and any(not entry.name.endswith(own) for entry in path.iterdir()):
        raise _bad_schema(path, "a folder with other files in it")


def _bad_schema(path: Path, got: str) -> StoreError:
    return StoreError(
        "QD405",
        where=str(path),
        got=got,
        expected=f"a qdist calibration store of schema {SCHEMA}",
        mend="choose another store.path, or calibrate again with this version",
    )


def _damaged(path: Path, name: str, reason: str) -> StoreError:
    return StoreError(
        "QD403",
        where=f"{path}/{name}",
        got=reason,
        expected="the record as it was written",
        mend="run qdist calibrate again; it measures damaged shards anew",
    )
