"""Candidates, finished trials, and how trials are ranked."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Protocol

from qdist.digest import digest_json
from qdist.evaluate.compare import Deviation
from qdist.evaluate.evaluation_run import EvaluationRun
from qdist.evaluate.report import EvalReport
from qdist.plan.choice import LayerChoice

Choices = Mapping[str, LayerChoice]
"""Layer name -> its choice."""

Rank = tuple[float, float, float, float, float, float, float]

Settings = Mapping[str, int | float | str]
"""Name of `SETTINGS` -> value."""

SETTINGS: dict[str, str] = {
    "n_samples": "ranges come from the first so many calibration samples, in whole micro-batches",
    "percent": "parameter of the threshold method, where it takes it",
    "bins": "parameter of the threshold method, where it takes it",
    "smoothing": "SmoothQuant's strength, 0..1; without it nothing is smoothed",
}
"""What a candidate may change for the whole plan."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """A plan to try. ``number`` counts from 0, the plain plan; ``label`` says in a few words what
    is different; ``changed`` names the layers that differ from the plain plan. ``round``: the
    numbered round that proposed it. ``predicted``: what the strategy expects of it, in its own
    measure. ``wants_layers``: whether the trial is to compare every layer in place. ``settings``:
    what is different for the whole plan, by the names of `SETTINGS`; empty for the run's own."""

    number: int
    label: str
    choices: Choices
    changed: tuple[str, ...] = ()
    round: int = 0
    predicted: float | None = None
    wants_layers: bool = False
    settings: Settings = field(default_factory=dict)

    @property
    def key(self) -> str:
        """Equal keys mean equal plans."""
        return plan_key(self.choices, self.settings)

    @property
    def why(self) -> dict[str, str]:
        """For every changed layer, where its choice comes from: this trial."""
        return dict.fromkeys(self.changed, f"trial {self.number}")


EVALUATION = "evaluation"
"""Among the details of a trial whose evaluation failed: its `EvaluationRun`, as JSON."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Trial:
    """A finished candidate: its report, or the reason why there is none.

    ``n_bytes``: size of its artifact; 0 when none was written. ``cost``: of its plan, in the unit
    of the search; None where nobody says, and bytes stand in. ``plain_cost``: of the plain plan, in
    that unit; None where nobody says. ``harm``: of its plan, by the layers' sensitivities, in one
    measure for all trials of a search; None where nobody says. ``layers``: layer -> deviation of
    its output in place, in the whole quantized model; empty unless the candidate asked for it.
    """

    candidate: Candidate
    report: EvalReport | None
    n_bytes: int
    reason: str = ""
    details: Mapping[str, object] = field(default_factory=dict)
    layers: Mapping[str, Deviation] = field(default_factory=dict)
    cost: float | None = None
    plain_cost: float | None = None
    harm: float | None = None

    @property
    def evaluation(self) -> EvaluationRun | None:
        """How its evaluation went, finished or failed; None where the trial did not get so far."""
        if self.report is not None:
            return self.report.run
        failed = self.details.get(EVALUATION)
        return EvaluationRun.from_json(failed) if isinstance(failed, Mapping) else None

    @property
    def rank(self) -> Rank:
        """By which the answer of a search is chosen; larger is better: scored to the end, the
        score, the lower cost beyond the plain plan's, the nearer to float (output SQNR, else the
        lesser harm), the lower cost, the smaller artifact.

        Few samples give plans of unlike harm the same score. What is cheaper than the plain plan
        is then no better for that: of plans that cost no more, the least harmful is the answer.
        """
        return self._rank(self.plain_cost)

    @property
    def rank_by_cost(self) -> Rank:
        """By which a search goes on: as `rank`, but of equal scores the lower cost always wins."""
        return self._rank(None)

    def _rank(self, enough: float | None) -> Rank:
        """``enough``: the cost below which nothing is gained."""
        if self.report is None:
            return (float("-inf"),) * 7
        sign = 1.0 if self.report.higher_is_better else -1.0
        closeness = self.report.metrics.get("sqnr_db", 0.0)
        whole = 0.0 if self.report.stopped_early else 1.0
        n_bytes = float(self.n_bytes)
        cost = n_bytes if self.cost is None else self.cost
        return (
            whole,
            sign * self.report.score,
            -cost if enough is None else -max(cost, enough),
            closeness,
            0.0 if self.harm is None else -self.harm,
            -cost,
            -n_bytes,
        )


class Strategy(Protocol):
    """Proposes rounds of candidates. What it proposes depends on the trials of finished rounds
    alone, never on timing, so any number of workers finds the same answer."""

    def ask(self) -> list[Candidate]:
        """The next round; empty when the search is over."""
        ...

    def tell(self, trials: Iterable[Trial]) -> None:
        """All trials of the last round, in any order."""
        ...


def choices_key(choices: Choices) -> str:
    """A digest of a whole assignment."""
    return digest_json({name: choice.to_json() for name, choice in sorted(choices.items())})


def best_of(trials: Iterable[Trial]) -> Trial | None:
    """The best trial; the earlier one on ties; None when none succeeded."""
    best: Trial | None = None
    for trial in sorted(trials, key=lambda t: t.candidate.number):
        if trial.report is not None and (best is None or trial.rank > best.rank):
            best = trial
    return best


def plan_key(choices: Choices, settings: Settings) -> str:
    """A digest of a whole assignment with what is different for the whole plan; without that it is
    `choices_key`."""
    key = choices_key(choices)
    return digest_json([key, dict(settings)]) if settings else key
