"""When a search ends, who hears of it, and what it leaves."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal, TypeAlias

from qdist.evaluate.early import Incumbent
from qdist.evaluate.function import FunctionEvaluation
from qdist.evaluate.report import EvalReport
from qdist.evaluate.scorer import Evaluation
from qdist.search.trial import Choices, Trial

Stopped: TypeAlias = Literal["strategy", "trials", "target", "time", "interrupt"]
"""What ended a search: the strategy had nothing to ask, or a limit was reached, or Ctrl-C."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """When a search ends, whatever its strategy. ``max_trials`` and ``target_score`` are looked at
    between rounds, so that they give the same answer with any number of workers; ``time_s``, from
    the moment the workers are ready, ends trials where they are. ``layers_of``: the name of what
    layers are compared on; empty where none are. ``incumbent_of``: what a trial has to beat
    or may stop early, from the best report of the rounds before whose plan costs no more; None: all
    run to their end."""

    max_trials: int | None = None
    time_s: float | None = None
    target_score: float | None = None
    layers_of: str = ""
    incumbent_of: Callable[[EvalReport], Incumbent | None] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """All trials that finished, by number, and why there are no more. ``n_scored``: plans that
    workers scored now, those run ahead included; ``n_reused``: trials that needed no scoring;
    ``n_ahead``: candidates that were run before they were asked for.
    ``driver_s``: seconds of the driver's own work, all trials together; ``seconds``: of all."""

    trials: list[Trial]
    stopped: Stopped
    n_scored: int
    n_reused: int
    n_ahead: int
    driver_s: float
    seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Hooks:
    """``on_trial`` hears of every trial as it ends, ``on_message`` of retries and losses.
    ``costs``: what a plan costs, by name, to stand beside its trial. ``cost``: what it costs in the
    unit of the search, which tells equal scores apart; None: the bytes of artifacts do.
    ``plain_cost``: of the plain plan in that unit, below which none is the better for costing
    less. ``harm``: of a plan, by the layers' sensitivities."""

    on_trial: Callable[[Trial], None] | None = None
    on_message: Callable[[str], None] | None = None
    costs: Callable[[Choices], Mapping[str, float]] | None = None
    cost: Callable[[Choices], float] | None = None
    plain_cost: float | None = None
    harm: Callable[[Choices], float] | None = None


def incumbent_maker(
    evaluation: Evaluation,
) -> Callable[[EvalReport], Incumbent | None] | None:
    """What makes incumbents of reports, where the evaluation gives scores of single samples."""
    if isinstance(evaluation, FunctionEvaluation) and evaluation.sample_range is not None:
        return evaluation.incumbent
    return None
