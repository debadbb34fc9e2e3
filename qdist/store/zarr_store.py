"""The calibration store: Zarr v3 records in a folder or an object store. See `layout`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

from qdist.errors import StoreError
from qdist.model.taps import TapTable
from qdist.stats.record import CalibrationRecord
from qdist.store import failures, layout
from qdist.store.container import UNREADABLE, Container
from qdist.store.identity import Identity
from qdist.store.layout import json_key, sealed, unsealed
from qdist.store.location import open_place
from qdist.store.merges import Merges
from qdist.store.nodes import Nodes
from qdist.store.place import PARTIAL, Entry, Place
from qdist.store.protocol import FinishedMerge
from qdist.store.receipt import Batch, ShardReceipt, tap_set_digest
from qdist.store.records import named, pack_record, read_container, unpack_record

_T = TypeVar("_T")


def create_store(location: str | Path, identity: Identity) -> ZarrStore:
    """Open the store at ``location`` for ``identity``, making it when there is none.

    Raises `StoreError`: QD401 made for another identity, QD404 cannot be written, QD405 something
    else, QD408 cannot be reached; `ConfigError` QD104 for a location that names no place.
    """
    place = open_place(location)
    if place.get(layout.ROOT) is None:
        place.make()
        place.create(layout.ROOT, layout.root_document(identity))
    store = ZarrStore(place)
    different = store.identity.differences(identity)
    if different:
        raise failures.other_identity(
            store.location,
            different,
            "choose another store.path, or remove the old store if it is not needed",
        )
    return store


def open_store(location: str | Path) -> ZarrStore:
    """Open an existing store, whatever it was made for.

    Raises `StoreError`: QD402 none there, QD404 not permitted, QD405 something else or another
    schema, QD408 cannot be reached; `ConfigError` QD104 for a location that names no place.
    """
    return ZarrStore(open_place(location))


class ZarrStore:
    """`CalibrationStore` on any `Place`. See the protocol for ownership and concurrency."""

    def __init__(self, place: Place) -> None:
        """Open the store at ``place``; see `open_store`."""
        root = place.get(layout.ROOT)
        if root is None:
            raise failures.no_store(place.where)
        self._identity = _identity_of(root, place.where)
        self.place = place
        self._root = root
        self._merges = Merges(place)
        self._nodes = Nodes(place)
        self._tap_sets: dict[str, tuple[str, ...]] = {}
        self._receipts: dict[tuple[str, str], ShardReceipt] = {}

    @property
    def location(self) -> str:
        """Absolute path or URL: what `open_store` takes, in any process."""
        return self.place.where

    @property
    def identity(self) -> Identity:
        """What the store was made for."""
        return self._identity

    def commit(self, receipt: ShardReceipt, record: CalibrationRecord) -> bool:
        """Keep a shard's record; False when another process was first. Raises QD404, QD408.

        A receipt that cannot be read counts as absent here too, and is replaced.
        """
        mine = (record.tensors, record.n_samples, record.digest)
        if mine != (receipt.tensors, receipt.n_samples, receipt.record_digest):
            raise ValueError("the receipt is of another record")
        self._require_root()
        key = json_key(layout.RECEIPTS, receipt.id)
        tap_set = self._new_tap_set(receipt)
        # In this order: a receipt is there whole or not at all, so one that is there and cannot be
        # read is damaged, while one that cannot be read may have come a moment later.
        if self.place.get(key) is not None:
            # A receipt is read by its tap set, which is mended first.
            self.place.put_in_order(tap_set)
            self._tap_sets[receipt.tap_set] = receipt.tensors
            tap_set = []
            if self._receipt(receipt.id) is not None:
                return False
            self.place.delete(key)
        kept_in, packed = named(layout.RECORDS, receipt.id, pack_record(record))
        written = sealed({"receipt": receipt.to_json(), "record": kept_in})
        try:
            is_first = self.place.put_in_order(
                [*tap_set, (kept_in, packed), (key, written)], create_last=True
            )
        except StoreError as error:
            # Where no answer came, the receipt may yet be there, and it needs its record.
            if error.code != "QD408":
                self._delete_if_possible(kept_in)
            raise
        self._tap_sets[receipt.tap_set] = receipt.tensors
        if not is_first:
            self._delete_if_possible(kept_in)
        return is_first

    def receipts(self) -> list[ShardReceipt]:
        """All committed shards, sorted by id. Damaged receipts count as absent. Raises QD408."""
        found = []
        for entry in self._entries(layout.RECEIPTS):
            receipt = self._listed(entry)
            if receipt is not None:
                found.append(receipt)
        return sorted(found, key=lambda receipt: receipt.id)

    def read(
        self, receipt: ShardReceipt, tensors: Sequence[str] | None = None
    ) -> CalibrationRecord:
        """The record of a committed shard, or those rows of it, in that order.

        Raises QD403 when it is damaged or missing, QD408, `KeyError` for a tensor that it lacks.
        """
        kept_in = receipt.kept_in or self._kept_in(receipt.id)
        where = f"{self.location}/{kept_in or json_key(layout.RECEIPTS, receipt.id)}"
        if not kept_in:
            self._require_root()
            raise failures.damaged(where, "no receipt")
        data = self._missed(lambda: read_container(self.place, layout.RECORDS, kept_in))
        try:
            container = Container.unpack(data)
            record = unpack_record(container, receipt.tensors)
            digest = container.attributes["qdist"]["record_digest"]
        except UNREADABLE as error:
            raise failures.damaged(where, str(error)) from error
        if (digest, record.n_samples) != (receipt.record_digest, receipt.n_samples):
            raise failures.damaged(where, "another record than the receipt says")
        if tensors is None or tuple(tensors) == record.tensors:
            return record.known_as(digest, container.encoded)
        return record.select(tensors)

    def discard(self, receipt: ShardReceipt) -> None:
        """Forget a shard, so that it can be redone, unless it was redone meanwhile.

        The receipt goes first: one without a record would only have others stumble. Raises QD404,
        QD408.
        """
        now = self._kept_in(receipt.id)
        kept_in = receipt.kept_in or now
        if kept_in == now:
            self.place.delete(json_key(layout.RECEIPTS, receipt.id))
        if layout.written(layout.RECORDS, kept_in) is not None:
            self.place.delete(kept_in)

    def nodes(self) -> frozenset[str]:
        """Names of the inner nodes that are kept. Raises QD408."""
        return self._nodes.names() or self._missed(frozenset)

    def keep_node(self, name: str, record: CalibrationRecord) -> bool:
        """Keep an inner node; False when another process was first. Raises QD404, QD408."""
        self._require_root()
        return self._nodes.keep(name, record)

    def node(self, name: str, tensors: Sequence[str]) -> CalibrationRecord | None:
        """An inner node; None where absent or damaged. Raises QD404, QD408."""
        found = self._nodes.find(name, tensors)
        if found is None:
            self._require_root()
        return found

    def finish(
        self,
        name: str,
        record: CalibrationRecord,
        about: dict[str, Any],
        taps: TapTable,
        batches: Sequence[Batch],
        *,
        make_latest: bool = True,
    ) -> None:
        """Keep a merged record under ``name`` and make it the latest: without ``make_latest`` only
        where there is none. Raises QD404, QD408."""
        self._require_root()
        self._merges.finish(name, record, about, taps, batches, make_latest=make_latest)

    def finished(self) -> list[str]:
        """Names of all finished merges, sorted. Raises QD408."""
        return self._merges.finished() or self._missed(list)

    def find(self, name: str) -> FinishedMerge | None:
        """A finished merge; None where absent or damaged. Raises QD408."""
        found = self._merges.find(name)
        if found is None:
            self._require_root()
        return found

    def make_latest(self, name: str) -> None:
        """Let `latest` give the merge ``name``. Raises QD404, QD408."""
        self._require_root()
        self._merges.make_latest(name)

    def latest(self) -> FinishedMerge:
        """The last finished merge. Raises QD402, QD403, QD408."""
        latest = self._missed(self._merges.latest)
        if latest is None:
            got = f"{len(self.receipts())} finished shards but no finished calibration"
            raise failures.unfinished(self.location, got)
        return latest

    def document(self, name: str) -> dict[str, Any] | None:
        """A small JSON object that was put here; None where absent or damaged. Raises QD408."""
        value = unsealed(self.place.get(json_key(layout.DOCUMENTS, name)))
        if value is None:
            self._require_root()
        return value if isinstance(value, dict) else None

    def put_document(self, name: str, value: dict[str, Any]) -> None:
        """Keep a small JSON object, in place of any other of that name. Raises QD404, QD408."""
        self._require_root()
        self.place.put(json_key(layout.DOCUMENTS, name), sealed(value))

    def head(self) -> str | None:
        """Name of the latest merge; None where there is none. Raises QD408."""
        return self._merges.head()

    def merge_kept_in(self, name: str) -> str | None:
        """Key of the object that holds a finished merge; None where absent or damaged."""
        return self._merges.kept_in(name)

    def node_kept_in(self, name: str) -> str | None:
        """Key of the object that holds an inner node; None where absent or damaged."""
        return self._nodes.kept_in(name)

    def _require_root(self) -> None:
        """The store must still be the one that was opened. Raises QD401, QD408."""
        root = self.place.get(layout.ROOT)
        if root is None:
            raise failures.unreachable(self.location, "no store any more")
        if root != self._root:
            raise failures.other_identity(
                self.location,
                ("that it was replaced since it was opened",),
                "run the same command again",
            )

    def _missed(self, action: Callable[[], _T]) -> _T:
        """``action()``, where finding nothing or damage may mean that the whole store is gone."""
        try:
            found = action()
        except StoreError:
            self._require_root()
            raise
        if not found:
            self._require_root()
        return found

    def _entries(self, folder: str) -> list[Entry]:
        return self._missed(lambda: self.place.entries(folder))

    def _listed(self, entry: Entry) -> ShardReceipt | None:
        """The receipt of a listed object; asked for once where its version is known."""
        if entry.name.endswith(PARTIAL):
            return None
        known = self._receipts.get((entry.name, entry.version)) if entry.version else None
        receipt = known or self._receipt(entry.name.removesuffix(".json"))
        if receipt is not None and entry.version:
            self._receipts[entry.name, entry.version] = receipt
        return receipt

    def _receipt(self, id: str) -> ShardReceipt | None:
        """A shard's receipt; None where absent or damaged."""
        try:
            told = unsealed(self.place.get(json_key(layout.RECEIPTS, id)))
            tensors = self._tap_set(told["receipt"]["tap_set"])
            receipt = ShardReceipt.from_json(told["receipt"], tensors)
            kept_in = str(told["record"])
        except StoreError as error:
            if error.code != "QD403":
                raise
            return None
        except UNREADABLE:
            return None
        # The object may be deleted one day, so nothing but a write of this very shard will do.
        name = layout.written(layout.RECORDS, kept_in)
        if receipt.id != id or name is None or name[0] != id:
            return None
        return replace(receipt, kept_in=kept_in)

    def _kept_in(self, id: str) -> str:
        """Key of the shard's record as of now; empty where there is no sound receipt."""
        receipt = self._receipt(id)
        return receipt.kept_in if receipt is not None else ""

    def _new_tap_set(self, receipt: ShardReceipt) -> list[tuple[str, bytes]]:
        """The object to write, once per instance: the same bytes whoever writes them, so a damaged
        one is mended."""
        if receipt.tap_set in self._tap_sets:
            return []
        data = sealed(list(receipt.tensors))
        key = json_key(layout.TAP_SETS, receipt.tap_set)
        return [] if self.place.get(key) == data else [(key, data)]

    def _tap_set(self, digest: str) -> tuple[str, ...]:
        """The tensors of a stored tap set. Raises one of `UNREADABLE` where absent or damaged."""
        if digest not in self._tap_sets:
            told = unsealed(self.place.get(json_key(layout.TAP_SETS, str(digest))))
            tensors = tuple(str(tensor) for tensor in told)
            if tap_set_digest(tensors) != digest:
                raise ValueError("another tap set")
            self._tap_sets[digest] = tensors
        return self._tap_sets[digest]

    def _delete_if_possible(self, key: str) -> None:
        """Of what nobody refers to; where it cannot be removed now, `sweep` will."""
        with suppress(StoreError):
            self.place.delete(key)


def _identity_of(root: bytes, where: str) -> Identity:
    """What the root says. Raises QD405 where it is not the root of a store of this schema."""
    told = layout.root_attributes(root)
    if told is None or told.get("kind") != "calibration":
        raise failures.other_schema(where, "a Zarr group that qdist did not make", layout.SCHEMA)
    if told.get("schema") != layout.SCHEMA:
        raise failures.other_schema(where, f"schema {told.get('schema')}", layout.SCHEMA)
    try:
        return Identity.from_json(told["identity"])
    except UNREADABLE as error:
        raise failures.other_schema(where, "incomplete attributes", layout.SCHEMA) from error
