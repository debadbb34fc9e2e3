"""Removing what nothing refers to any more, beside running writers and readers."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from qdist.store import layout
from qdist.store.container import UNREADABLE
from qdist.store.layout import json_key, unsealed
from qdist.store.place import PARTIAL, Entry, Place
from qdist.store.zarr_store import ZarrStore

DAY_S = 86_400.0
_FOLDERS = (
    "",
    layout.TAP_SETS,
    layout.RECORDS,
    layout.RECEIPTS,
    layout.INNER,
    layout.NODES,
    layout.MERGES,
    layout.FINISHED,
    layout.DOCUMENTS,
    layout.SPOOL,
    layout.SENSITIVITIES,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Swept:
    """``removed``: keys of the removed objects, sorted. ``n_bytes``: what they took."""

    removed: tuple[str, ...]
    n_bytes: int


def sweep(store: ZarrStore, *, older_than_s: float = DAY_S, keep_merges: int = 3) -> Swept:
    """Remove leftovers of dead processes, and merges that newer ones have superseded, with the
    inner nodes that only these were made of.

    Only objects written more than ``older_than_s`` ago, by the clock of the place: unfinished
    files, what pipelines left, records without a receipt, merges that their name no longer means,
    and finished merges but the ``keep_merges`` newest, the latest, and those that a document lists
    under the key ``merges``. The age must exceed what a writer takes between a record and its
    receipt, and a reader for one merge: both take seconds. Records that receipts refer to are never
    touched. Raises QD404, QD408; then what was removed stays removed, and sweeping again goes on.
    """
    if older_than_s < 0 or keep_merges < 0:
        raise ValueError("older_than_s and keep_merges are not negative")
    sweeper = _Sweeper(place=store.place, before_s=store.place.now_s() - older_than_s)
    for folder in _FOLDERS:
        names = (e for e in store.place.entries(folder) if e.name.endswith(PARTIAL))
        sweeper.remove(folder, names)
    # A pipeline that misses what it left runs the stage before again.
    sweeper.remove(layout.SPOOL, _whole(store.place, layout.SPOOL))
    _sweep_merges(store, sweeper, keep_merges)
    _sweep_nodes(store, sweeper)
    _sweep_records(store, sweeper)
    return Swept(removed=tuple(sorted(sweeper.removed)), n_bytes=sweeper.n_bytes)


@dataclass(slots=True, kw_only=True)
class _Sweeper:
    """Removes old objects and counts them."""

    place: Place
    before_s: float
    removed: list[str] = field(default_factory=list)
    n_bytes: int = 0

    def is_old(self, entry: Entry) -> bool:
        return entry.modified_s <= self.before_s

    def remove(self, folder: str, entries: Iterable[Entry]) -> None:
        for entry in entries:
            if self.is_old(entry):
                key = f"{folder}/{entry.name}" if folder else entry.name
                self.place.delete(key)
                self.removed.append(key)
                self.n_bytes += entry.n_bytes


def _sweep_merges(store: ZarrStore, sweeper: _Sweeper, keep: int) -> None:
    place = store.place
    # Before the names that refer to them: one that comes meanwhile is not in the list.
    kept_merges = _whole(place, layout.MERGES)
    pointers = sorted(
        _whole(place, layout.FINISHED), key=lambda e: (e.modified_s, e.name), reverse=True
    )
    listed = _listed(store)
    for entry in pointers[keep:]:
        key, name = f"{layout.FINISHED}/{entry.name}", entry.name.removesuffix(".json")
        data = place.get(key)
        if data is None or name in listed or store.head() == name or not sweeper.is_old(entry):
            continue
        place.delete(key)
        if store.head() == name:
            # Somebody has just made it the latest.
            place.create(key, data)
            continue
        sweeper.removed.append(key)
        sweeper.n_bytes += entry.n_bytes
    names = (entry.name.removesuffix(".json") for entry in _whole(place, layout.FINISHED))
    used = {store.merge_kept_in(name) for name in names}
    sweeper.remove(
        layout.MERGES, (e for e in kept_merges if f"{layout.MERGES}/{e.name}" not in used)
    )


def _listed(store: ZarrStore) -> set[str]:
    """Merges that documents refer to."""
    names: set[str] = set()
    for entry in _whole(store.place, layout.DOCUMENTS):
        told = store.document(entry.name.removesuffix(".json"))
        merges = None if told is None else told.get("merges")
        if isinstance(merges, list):
            names.update(str(name) for name in merges)
    return names


def _sweep_nodes(store: ZarrStore, sweeper: _Sweeper) -> None:
    place = store.place
    # Before the names that refer to them, as with merges.
    kept_nodes = _whole(place, layout.INNER)
    pointers = _whole(place, layout.NODES)
    finished = set(store.finished())
    used: set[str] = set()
    for entry in _whole(place, layout.DOCUMENTS):
        merge = layout.merge_of_nodes(entry.name.removesuffix(".json"))
        if merge in finished:
            told = store.document(layout.nodes_document(merge)) or {}
            used.update(str(name) for name in told.get("nodes", ()))
        elif merge is not None:
            sweeper.remove(layout.DOCUMENTS, [entry])
    sweeper.remove(layout.NODES, (e for e in pointers if e.name.removesuffix(".json") not in used))
    names = (entry.name.removesuffix(".json") for entry in _whole(place, layout.NODES))
    referred = {store.node_kept_in(name) for name in names}
    sweeper.remove(
        layout.INNER, (e for e in kept_nodes if f"{layout.INNER}/{e.name}" not in referred)
    )


def _sweep_records(store: ZarrStore, sweeper: _Sweeper) -> None:
    place = store.place
    # Before the receipts: a record that is in the list and old has its receipt by now, or never.
    records = _whole(place, layout.RECORDS)
    if not any(sweeper.is_old(entry) for entry in records):
        return
    used = set()
    for entry in _whole(place, layout.RECEIPTS):
        told = unsealed(place.get(json_key(layout.RECEIPTS, entry.name.removesuffix(".json"))))
        try:
            used.add(str(told["record"]))
        except UNREADABLE:
            continue
    sweeper.remove(layout.RECORDS, (e for e in records if f"{layout.RECORDS}/{e.name}" not in used))


def _whole(place: Place, folder: str) -> list[Entry]:
    return [entry for entry in place.entries(folder) if not entry.name.endswith(PARTIAL)]
