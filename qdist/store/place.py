"""Where a store keeps its bytes: what a folder and an object store have in common."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

PARTIAL = ".partial"
"""How the names of unfinished files end: never part of a store, left over where a process died."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """One object: its name in its folder, its size, and when it was written (``modified_s``,
    seconds since 1970 by the clock of the place). ``version`` changes whenever the content does;
    empty where the place cannot tell."""

    name: str
    n_bytes: int
    modified_s: float
    version: str = ""


class Place(Protocol):
    """Whole objects under keys ``folder/name`` or ``name``.

    Every write is complete or absent, for any number of processes at once. All methods raise
    `StoreError`: QD408 where the place cannot be reached in bounded time, QD404 where it refuses.
    """

    @property
    def where(self) -> str:
        """The location, for messages and for `open_place`."""
        ...

    def make(self) -> None:
        """Make the place itself where it is absent. Raises QD405 for one that is something else."""
        ...

    def get(self, key: str) -> bytes | None:
        """The object; None where there is none. Raises QD403 where it cannot be read."""
        ...

    def put(self, key: str, data: bytes) -> None:
        """Write the object, in place of any other."""
        ...

    def create(self, key: str, data: bytes) -> bool:
        """Write the object only if there is none. Of many callers, exactly one gets True."""
        ...

    def put_in_order(
        self, objects: Sequence[tuple[str, bytes]], *, create_last: bool = False
    ) -> bool:
        """Write objects so that whoever finds one finds those before it.

        With ``create_last`` the last is written only if there is none: False where there was.
        Where this raises, any number of the first of them may be there.
        """
        ...

    def delete(self, key: str) -> None:
        """Remove the object, if there is one."""
        ...

    def entries(self, folder: str) -> list[Entry]:
        """All objects of a folder, in no order; none where there is no such folder.

        Folders hold no folders. ``""`` gives the objects beside the folders.
        """
        ...

    def now_s(self) -> float:
        """What the place's clock shows: the one that stamps `Entry.modified_s`."""
        ...
