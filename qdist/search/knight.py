"""Knight's sweep: several threshold methods with several numbers of calibration samples.

``-qm kl min_max -i 5 10 -bs 10`` of the vendor's guide quantizes once for every pair and lists them
by ``Quantization Loss``, the smallest first, with Fail for what did not work.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace

from qdist.errors import ConfigError
from qdist.search.problem import SearchProblem
from qdist.search.proposals import Proposals
from qdist.search.trial import Candidate, Settings, Trial

QUANT_MODES: dict[str, str] = {
    "kl": "kl",
    "min_max": "max",
    "mse": "mse",
    "percentile": "percentile",
    "kl_v2": "kl_v2",
}
"""The vendor's quant-mode -> our method; ``all`` is all of them."""
LOSS = "relative_l2"
"""What the loss is, where the report has it; our reading."""


@dataclass(frozen=True, slots=True, kw_only=True)
class KnightSettings:
    """``modes``: of `QUANT_MODES`, or ``all``. ``iterations`` x ``batch_size`` calibration samples
    give a candidate's ranges. ``percent``: share in 0..1 that ``percentile`` keeps, as the vendor
    has it. ``max_trials``: how many pairs at most."""

    modes: tuple[str, ...] = ("all",)
    iterations: tuple[int, ...] = (1,)
    batch_size: int = 1
    percent: float = 0.99999
    max_trials: int = 1000

    def __post_init__(self) -> None:
        for mode in self.modes:
            if mode != "all" and mode not in QUANT_MODES:
                raise ConfigError(
                    "QD104",
                    where="search.modes",
                    got=repr(mode),
                    expected=f"some of all, {', '.join(QUANT_MODES)}",
                    mend="choose some of these",
                )
        is_positive = all(n >= 1 for n in (*self.iterations, self.batch_size, self.max_trials))
        if not self.modes or not self.iterations or not is_positive or not 0 < self.percent <= 1:
            raise ConfigError(
                "QD104",
                where="search",
                got=f"modes {self.modes}, iterations {self.iterations}, batch size "
                f"{self.batch_size}, percent {self.percent}",
                expected="at least one of each, of at least 1, and a percent in 0..1",
                mend="correct these",
            )

    @property
    def pairs(self) -> tuple[tuple[str, int], ...]:
        """Every mode with every number of iterations, each once, in the order given."""
        modes = [m for mode in self.modes for m in (QUANT_MODES if mode == "all" else (mode,))]
        return tuple(
            (mode, n) for mode in dict.fromkeys(modes) for n in dict.fromkeys(self.iterations)
        )


class Sweep:
    """The strategy: one round of all pairs. Every layer that may change gets the method."""

    def __init__(self, problem: SearchProblem, settings: KnightSettings) -> None:
        self._problem = problem
        self._settings = settings
        self._proposals = Proposals(problem, settings.max_trials)

    def ask(self) -> list[Candidate]:
        """All pairs, then nothing."""
        self._proposals.next_round()
        if self._proposals.round > 0:
            return []
        found = [self._candidate(mode, n) for mode, n in self._settings.pairs]
        return [candidate for candidate in found if candidate is not None]

    def tell(self, trials: Iterable[Trial]) -> None:
        """Nothing depends on the trials."""

    def _candidate(self, mode: str, iterations: int) -> Candidate | None:
        method = QUANT_MODES[mode]
        choices = dict(self._problem.plain)
        for layer in self._problem.layers:
            choices[layer.name] = replace(choices[layer.name], saturation=method)
        n_samples = iterations * self._settings.batch_size
        settings: Settings = {"n_samples": n_samples}
        if method == "percentile":
            settings = {**settings, "percent": round(100 * self._settings.percent, 9)}
        return self._proposals.make(f"{mode}, {n_samples} samples", choices, settings=settings)


@dataclass(frozen=True, slots=True, kw_only=True)
class Ranked:
    """A line of the sweep's table. ``loss``: None where the trial failed (``Fail``)."""

    trial: Trial
    loss: float | None


def ranked(trials: Iterable[Trial]) -> tuple[Ranked, ...]:
    """The trials by loss, the smallest first, failed ones last; the earlier one on ties."""
    rows = [Ranked(trial=trial, loss=quantization_loss(trial)) for trial in trials]
    return tuple(sorted(rows, key=lambda row: (_order(row.loss), row.trial.candidate.number)))


def quantization_loss(trial: Trial) -> float | None:
    """Knight's ``Quantization Loss``, by our reading: the relative L2 distance of the outputs from
    the float model's; where the report lacks it, from their SQNR (10^(-dB/20), the same number);
    else the score, as a loss (negated where larger is better). None for a failed trial."""
    report = trial.report
    if report is None:
        return None
    if LOSS in report.metrics:
        return report.metrics[LOSS]
    if "sqnr_db" in report.metrics:
        return float(10 ** (-report.metrics["sqnr_db"] / 20))
    return -report.score if report.higher_is_better else report.score


def _order(loss: float | None) -> float:
    return math.inf if loss is None or math.isnan(loss) else loss
