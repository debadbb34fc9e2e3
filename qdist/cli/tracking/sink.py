"""Where records go: the protocol, and the sink that drops them."""

from __future__ import annotations

from typing import Any, Literal, Protocol

Kind = Literal["create", "batch", "text", "file", "end"]
"""What a record does to its run."""


class Sink(Protocol):
    """Takes records in order, from one thread. Never raises because MLflow does not answer."""

    @property
    def n_spooled(self) -> int: ...

    def create(self, payload: dict[str, Any]) -> str:
        """Create a run and return its id."""

    def deliver(self, run: str, kind: Kind, payload: dict[str, Any]) -> None: ...

    def url(self, run: str) -> str:
        """The page of one run; empty if it has none."""


class NullSink:
    """Tracking that is switched off."""

    n_spooled = 0

    def create(self, payload: dict[str, Any]) -> str:
        return "off"

    def deliver(self, run: str, kind: Kind, payload: dict[str, Any]) -> None:
        return

    def url(self, run: str) -> str:
        return ""
