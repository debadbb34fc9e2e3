"""Where records go: the protocol, and the sink that drops them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, Protocol

Kind = Literal["create", "batch", "text", "file", "end"]
"""What a record does to its run."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RunState:
    """A run that is there already: its id, its status (``FINISHED``, ``RUNNING``), its tags."""

    run: str
    status: str
    tags: Mapping[str, str]


class Sink(Protocol):
    """Takes records in order, from one thread at a time. Never raises because MLflow does not
    answer."""

    @property
    def n_spooled(self) -> int: ...

    def create(self, payload: dict[str, Any]) -> str:
        """Create a run and return its id."""

    def deliver(self, run: str, kind: Kind, payload: dict[str, Any]) -> None: ...

    def reopen(self, run: str) -> bool:
        """Let a run that was left go on; whether it is there."""

    def children(self, run: str) -> dict[int, RunState]:
        """The children with a number, by it; none where MLflow does not answer."""

    def catch_up(self) -> int:
        """Send what waits; how many records went."""

    def url(self, run: str) -> str:
        """The page of one run; empty if it has none."""


class NullSink:
    """Tracking that is switched off."""

    n_spooled = 0

    def create(self, payload: dict[str, Any]) -> str:
        return "off"

    def deliver(self, run: str, kind: Kind, payload: dict[str, Any]) -> None:
        return

    def reopen(self, run: str) -> bool:
        return False

    def children(self, run: str) -> dict[int, RunState]:
        return {}

    def catch_up(self) -> int:
        return 0

    def url(self, run: str) -> str:
        return ""
