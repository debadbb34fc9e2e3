"""What is known of a plan that was scored, as it is kept between trials and between searches."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Self

from qdist.evaluate.early import Incumbent
from qdist.evaluate.report import EvalReport
from qdist.evaluate.sums import Deviation

LOST_TO = "lost_to"
"""Among the details of a trial that was stopped early: mean score of what it had to beat."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanResult:
    """``digest``: `qdist.plan.resolved.resolved_digest` of the plan as the target takes it; empty
    where there was none. ``report``, ``n_bytes``, ``reason``, ``details`` and ``layers``: as in
    `qdist.search.trial.Trial`. ``layers_of``: what ``layers`` were measured on; empty for none.
    ``reused``: whether another trial, or an earlier search, scored the plan."""

    digest: str
    report: EvalReport | None
    n_bytes: int
    reason: str = ""
    details: Mapping[str, object] = field(default_factory=dict)
    layers: Mapping[str, Deviation] = field(default_factory=dict)
    layers_of: str = ""
    reused: bool = False

    def to_json(self) -> dict[str, Any]:
        """As a JSON object; ``reused`` is left out."""
        return {
            "digest": self.digest,
            "report": None if self.report is None else self.report.to_json(),
            "n_bytes": self.n_bytes,
            "reason": self.reason,
            "details": dict(self.details),
            "layers": {name: found.to_json() for name, found in self.layers.items()},
            "layers_of": self.layers_of,
        }

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Self:
        """From `to_json`. Raises `KeyError`, `TypeError` or `ValueError` on anything else."""
        report = value["report"]
        return cls(
            digest=str(value["digest"]),
            report=None if report is None else EvalReport.from_json(report),
            n_bytes=int(value["n_bytes"]),
            reason=str(value["reason"]),
            details=dict(value["details"]),
            layers={name: Deviation.from_json(d) for name, d in value["layers"].items()},
            layers_of=str(value["layers_of"]),
        )

    def holds_against(self, incumbent: Incumbent | None) -> bool:
        """Whether the score stands for a trial that has this to beat: that of a plan that was
        scored to its end does, one stopped early only where it would be stopped now too."""
        if self.report is None or not self.report.stopped_early:
            return True
        lost_to = self.details.get(LOST_TO)
        return (
            incumbent is not None
            and isinstance(lost_to, int | float)
            and incumbent.is_no_worse_than(float(lost_to))
        )

    def has_layers(self, layers_of: str) -> bool:
        """Whether layers were compared on ``layers_of``."""
        return bool(self.layers_of) and self.layers_of == layers_of
