"""The inner nodes of merges that a store keeps: each whole or absent, and made again if need be.

A node is the merge of some shards' records for some tensors, under a name that says which. It is
worth no more than the time that it took: nothing is lost where one is damaged or swept away.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress

from qdist.errors import StoreError
from qdist.stats.record import CalibrationRecord
from qdist.store.container import UNREADABLE, Container
from qdist.store.layout import INNER, NODES, json_key, sealed, unsealed, written
from qdist.store.place import PARTIAL, Place
from qdist.store.records import named, pack_record, read_container, unpack_record


class Nodes:
    """The nodes of the store at ``place``. Raises as the `CalibrationStore` that it belongs to."""

    def __init__(self, place: Place) -> None:
        self._place = place

    def names(self) -> frozenset[str]:
        """Names of all, damaged ones included."""
        names = (entry.name for entry in self._place.entries(NODES))
        return frozenset(n.removesuffix(".json") for n in names if not n.endswith(PARTIAL))

    def keep(self, name: str, record: CalibrationRecord) -> bool:
        """Keep a node; False when another process was first."""
        pointer = json_key(NODES, name)
        key, packed = named(INNER, name, pack_record(record))
        written = sealed({"node": key})
        is_first = self._place.put_in_order([(key, packed), (pointer, written)], create_last=True)
        if not is_first:
            # Nobody refers to it; where it cannot be removed now, `sweep` will.
            with suppress(StoreError):
                self._place.delete(key)
        return is_first

    def find(self, name: str, tensors: Sequence[str]) -> CalibrationRecord | None:
        """One by name, with these rows; None where absent. A damaged one is removed first."""
        pointer = json_key(NODES, name)
        if self._place.get(pointer) is None:
            return None
        key = self.kept_in(name)
        if key is not None:
            try:
                container = Container.unpack(read_container(self._place, INNER, key))
                return unpack_record(container, tensors)
            except StoreError as error:
                if error.code != "QD403":
                    raise
            except UNREADABLE:
                pass
        # In this order: a name without a node would only have others stumble.
        self._place.delete(pointer)
        if key is not None:
            self._place.delete(key)
        return None

    def kept_in(self, name: str) -> str | None:
        """Key of the node of this name; None where absent or damaged."""
        told = unsealed(self._place.get(json_key(NODES, name)))
        key = str(told["node"]) if isinstance(told, dict) and "node" in told else ""
        # The object may be deleted one day, so nothing but a write of this very node will do.
        named = written(INNER, key)
        return key if named is not None and named[0] == name else None
