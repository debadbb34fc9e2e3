"""How the run of one evaluation went, whether or not it gave a score."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

LOG_CHARACTERS = 4000
"""How much of an evaluation's output reports and errors keep, from its end."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EvaluationRun:
    """Immutable; pickles, and round-trips through JSON.

    exit_status: of a command that ended by itself: its exit status, or minus the signal that killed
        it. None for one that ran out of time or did not start, and for what is no command.
    seconds: wall-clock time.
    output_tail: the end of what it printed, at most `LOG_CHARACTERS`, stderr after stdout.
    """

    exit_status: int | None
    seconds: float
    output_tail: str = ""

    def __post_init__(self) -> None:
        if not self.seconds >= 0:
            raise ValueError(f"seconds {self.seconds} < 0")
        object.__setattr__(self, "output_tail", self.output_tail[-LOG_CHARACTERS:])

    def to_json(self) -> dict[str, Any]:
        """A JSON object."""
        return {
            "exit_status": self.exit_status,
            "seconds": self.seconds,
            "output_tail": self.output_tail,
        }

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Self:
        """What `to_json` wrote. Raises `TypeError` for missing or unknown fields."""
        return cls(**value)
