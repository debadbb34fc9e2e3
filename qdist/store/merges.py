"""The merges that a store keeps: each whole or absent, and which of them is the latest."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from qdist.errors import StoreError
from qdist.model.taps import TapPoint, TapTable
from qdist.stats.record import CalibrationRecord
from qdist.store import failures
from qdist.store.container import UNREADABLE, Container
from qdist.store.layout import FINISHED, HEAD, MERGES, json_key, sealed, unsealed
from qdist.store.place import PARTIAL, Place
from qdist.store.protocol import FinishedMerge
from qdist.store.receipt import Batch
from qdist.store.records import named, pack_record, read_container, unpack_checked


def pack_merge(merge: FinishedMerge, documents: dict[str, Any] | None = None) -> bytes:
    """A merge in one object. ``documents``: more JSON to go with it."""
    own = {
        "name": merge.name,
        "about": merge.about,
        "taps": _taps_json(merge.taps),
        "batches": [list(batch) for batch in merge.batches],
    }
    return pack_record(merge.record, {"merge": own, **(documents or {})})


def unpack_merge(data: bytes) -> tuple[FinishedMerge, dict[str, Any]]:
    """From `pack_merge`: the merge and all documents. Raises one of `UNREADABLE`.

    The record is as its digest says.
    """
    container = Container.unpack(data)
    own = container.documents["merge"]
    taps = _taps_from_json(own["taps"])
    record = unpack_checked(container, taps.tensors)
    merge = FinishedMerge(
        name=str(own["name"]),
        record=record,
        taps=taps,
        batches=tuple(tuple(str(i) for i in batch) for batch in own["batches"]),
        about=dict(own["about"]),
    )
    return merge, dict(container.documents)


class Merges:
    """The merges of the store at ``place``. Raises as the `CalibrationStore` that it belongs to."""

    def __init__(self, place: Place) -> None:
        self._place = place

    def finish(
        self,
        name: str,
        record: CalibrationRecord,
        about: dict[str, Any],
        taps: TapTable,
        batches: Sequence[Batch],
        *,
        make_latest: bool,
    ) -> None:
        """Keep a merge, and make it the latest: without ``make_latest`` only where there is none.
        An earlier one of this name stays, for others may be reading it."""
        pointer = json_key(FINISHED, name)
        merge = FinishedMerge(
            name=name, record=record, taps=taps, batches=tuple(batches), about=about
        )
        key, packed = named(MERGES, name, pack_merge(merge))
        written = (pointer, sealed({"merge": key}))
        head = self._new_head(name) if make_latest or self.head() is None else []
        self._place.put_in_order([(key, packed), written, *head])

    def finished(self) -> list[str]:
        """Names of all, sorted."""
        names = (entry.name for entry in self._place.entries(FINISHED))
        return sorted(n.removesuffix(".json") for n in names if not n.endswith(PARTIAL))

    def find(self, name: str) -> FinishedMerge | None:
        """One by name; None where absent or damaged."""
        try:
            return self._read(name)
        except StoreError as error:
            if error.code != "QD403":
                raise
            return None

    def make_latest(self, name: str) -> None:
        """Let `latest` give this one. Writes nothing where it does already."""
        json_key(FINISHED, name)
        self._place.put_in_order(self._new_head(name))

    def head(self) -> str | None:
        """Name of the latest; None where there is none, or its name is damaged."""
        told = unsealed(self._place.get(HEAD))
        return str(told["finished"]) if isinstance(told, dict) and "finished" in told else None

    def _new_head(self, name: str) -> list[tuple[str, bytes]]:
        # A store that nobody may write any more can still be asked for what it holds.
        return [] if self.head() == name else [(HEAD, sealed({"finished": name}))]

    def latest(self) -> FinishedMerge | None:
        """The latest; None where nothing was finished yet. Raises QD403."""
        if self._place.get(HEAD) is None:
            return None
        name = self.head()
        if name is None:
            raise failures.damaged(f"{self._place.where}/{HEAD}", "no name of a merge")
        return self._read(name)

    def kept_in(self, name: str) -> str | None:
        """Key of the merge of this name; None where absent or damaged."""
        told = unsealed(self._place.get(json_key(FINISHED, name)))
        return str(told["merge"]) if isinstance(told, dict) and "merge" in told else None

    def _read(self, name: str) -> FinishedMerge:
        """One by name. Raises QD403."""
        key = self.kept_in(name)
        if key is None:
            where = f"{self._place.where}/{json_key(FINISHED, name)}"
            raise failures.damaged(where, "no finished merge")
        data = read_container(self._place, MERGES, key)
        try:
            merge, _ = unpack_merge(data)
        except UNREADABLE as error:
            raise failures.damaged(f"{self._place.where}/{key}", str(error)) from error
        if merge.name != name:
            raise failures.damaged(f"{self._place.where}/{key}", f"the merge {merge.name}")
        return merge


def _taps_json(taps: TapTable) -> dict[str, Any]:
    return {
        "points": [[p.tensor, p.dtype, p.is_input] for p in taps.points],
        "aliases": taps.aliases,
        "untapped": taps.untapped,
    }


def _taps_from_json(value: dict[str, Any]) -> TapTable:
    points = (TapPoint(tensor=t, dtype=d, is_input=i) for t, d, i in value["points"])
    return TapTable(points=tuple(points), aliases=value["aliases"], untapped=value["untapped"])
