"""What makes two calibrations the same one: everything that can change a count."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from qdist.digest import canonical_json, digest_json
from qdist.stats import grid


@dataclass(frozen=True, slots=True, kw_only=True)
class Identity:
    """The inputs of the pure function that a shard's record is, but for the samples themselves.

    ``model_digest``: of the frozen graph, external data included. ``preprocessing`` and
    ``fingerprint``: JSON. ``micro_batch``: samples per run of the model. ``taps``: digest of the
    names of the measured tensors.
    """

    model_digest: str
    preprocessing: dict[str, Any]
    fingerprint: dict[str, Any]
    micro_batch: int
    taps: str
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
            f"{_TITLES[key]} (stored {_short(mine[key])}, now {_short(theirs[key])})"
            for key in mine
            if canonical_json(mine[key]) != canonical_json(theirs[key])
        )


_TITLES = {
    "model_digest": "the model",
    "preprocessing": "the preprocessing",
    "fingerprint": "the execution fingerprint",
    "micro_batch": "calibration.micro_batch",
    "taps": "the measured tensors",
    "grid_version": "the histogram grid",
}


def _short(value: Any) -> str:
    text = value if isinstance(value, str) else canonical_json(value)
    if isinstance(value, str) and len(value) == 64:
        return value[:12]
    return text if len(text) <= 160 else text[:157] + "..."
