"""What makes two calibrations the same one: everything that can change a count."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from qdist.digest import canonical_json, digest_json
from qdist.stats import grid


@dataclass(frozen=True, slots=True, kw_only=True)
class Identity:
    """The inputs of the pure function that a shard's record is, but for samples and taps.

    Which tensors are measured is no part of it: a tap changes no other tensor's bits, so records of
    several tap sets belong to one calibration. ``model_digest``: of the frozen graph, external data
    included. ``preprocessing``, ``fingerprint`` and ``statistics`` (a `StatisticsSpec`): JSON.
    ``micro_batch``: samples per run of the model.
    """

    model_digest: str
    preprocessing: dict[str, Any]
    fingerprint: dict[str, Any]
    micro_batch: int
    statistics: dict[str, Any]
    grid_version: int = grid.VERSION

    def to_json(self) -> dict[str, Any]:
        """As a JSON object."""
        return asdict(self)

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> Identity:
        """From `to_json`. Raises `TypeError` on other keys."""
        return cls(**value)

    @property
    def digest(self) -> str:
        """Hex SHA-256 of the canonical JSON."""
        return digest_json(self.to_json())

    def differences(self, other: Identity) -> tuple[str, ...]:
        """In words, what differs between ``self`` (stored) and ``other`` (wanted)."""
        mine, theirs = self.to_json(), other.to_json()
        return tuple(
            f"{_TITLES[key]} ({_change(mine[key], theirs[key])})"
            for key in mine
            if not _same(mine[key], theirs[key])
        )


_TITLES = {
    "model_digest": "the model",
    "preprocessing": "the preprocessing",
    "fingerprint": "the execution fingerprint",
    "micro_batch": "calibration.micro_batch",
    "statistics": "the statistics gathered",
    "grid_version": "the histogram grid",
}
_LENGTH = 160
"""Characters of one value that are shown, at most."""


def _same(one: Any, other: Any) -> bool:
    return canonical_json(one) == canonical_json(other)


def _change(stored: Any, now: Any) -> str:
    """``stored A, now B``; of two objects, the keys that differ alone."""
    if not isinstance(stored, dict) or not isinstance(now, dict):
        return f"stored {_short(stored)}, now {_short(now)}"
    changes = []
    for key in sorted(stored.keys() | now.keys()):
        if key not in now:
            changes.append(f"{key} stored {_short(stored[key])}, now absent")
        elif key not in stored:
            changes.append(f"{key} now {_short(now[key])}, stored without")
        elif not _same(stored[key], now[key]):
            changes.append(f"{key} {_change(stored[key], now[key])}")
    return ", ".join(changes)


def _short(value: Any) -> str:
    text = value if isinstance(value, str) else canonical_json(value)
    if isinstance(value, str) and len(value) == 64:
        return value[:12]
    return text if len(text) <= _LENGTH else text[: _LENGTH - 3] + "..."
