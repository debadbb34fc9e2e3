"""What the front of a search is worth on samples that the search did not see."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qdist.cli import domain, schema
from qdist.cli.commands.scoring import make_scorer
from qdist.cli.commands.trial_models import MODEL, TrialModels
from qdist.cli.commands.tune_search import Found
from qdist.cli.context import Context
from qdist.errors import QdistError
from qdist.evaluate.metrics import find_metric
from qdist.evaluate.metrics.batch import Parts
from qdist.evaluate.paired import Difference, Resampled, discordant
from qdist.evaluate.report import EvalReport
from qdist.evaluate.scorer import Scorer
from qdist.files import write_json
from qdist.report.values import UnseenRow
from qdist.search.front import front_of
from qdist.search.problem import SearchProblem
from qdist.search.trial import Trial

if TYPE_CHECKING:  # importing Ray costs half a second that --help should not pay
    from actors.outcome import Outcome

UNSEEN = "unseen.json"
MOST_P = 0.05
"""Where few samples are right under one model alone, the bootstrap is too sure: there a difference
counts only if McNemar's test has less than this for chance."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Unseen:
    """Scores on the samples that the search did not see. ``before``, ``after``: of the float model
    and the best one. ``rows``: the plain plan, then the front by rising cost, then the best one
    where it is not on the front; empty where the evaluation gives no scores of single samples."""

    before: EvalReport
    after: EvalReport
    rows: tuple[UnseenRow, ...] = ()

    @property
    def metrics(self) -> dict[str, float]:
        """For the search's run."""
        found = {"unseen_score": self.after.score, "unseen_float_score": self.before.score}
        for row in self.rows:
            if row.is_best:
                found |= row_numbers(row)
        return found

    def to_json(self) -> dict[str, Any]:
        """As a JSON object."""
        rows = [
            {
                "trial": row.number,
                "label": row.label,
                "best": row.is_best,
                "score": row.score,
                "over_plain": _json(row.over_plain, row.sure_plain),
                "over_float": _json(row.over_float, row.sure_float),
            }
            for row in self.rows
        ]
        return {"float": self.before.to_json(), "quantized": self.after.to_json(), "trials": rows}


def score_unseen(
    context: Context[schema.TuneSettings], float_model: Path, best: Trial, model: Path, found: Found
) -> Unseen | None:
    """Score the float model and the best one, and where the evaluation gives scores of single
    samples the plain plan and the front too, on the samples that the search did not see. Says it,
    and writes `UNSEEN`; None where there are no such samples. ``model``: of the best trial."""
    config = context.settings.evaluation
    # Of an earlier answer, where the search went on in this folder.
    (context.folder / UNSEEN).unlink(missing_ok=True)
    if not isinstance(config, schema.MetricConfig | schema.ClassConfig) or not config.search_share:
        return None
    evaluation = domain.evaluation(config, context.settings.data, "report")
    with (
        make_scorer(context, evaluation, float_model) as scorer,
        context.working("scoring what the search did not see"),
    ):
        before, float_parts = scorer.score_samples(float_model)
        after, best_parts = scorer.score_samples(model)
        rows: list[UnseenRow] = []
        if float_parts is not None and best_parts is not None:
            scored = ScoredTrials(
                scorer,
                found.outcome,
                found.problem,
                found.models,
                best,
                (after, best_parts),
                context.say,
            )
            rows = scored.rows(float_parts)
    unseen = Unseen(before=before, after=after, rows=tuple(rows))
    write_json(context.folder / UNSEEN, unseen.to_json())
    context.say(
        f"{after.n_samples} samples that the search did not see: {after.metric} {after.score:.4f}, "
        f"float model {before.score:.4f}"
    )
    return unseen


class ScoredTrials:
    """Trials of a search on other samples, each plan once."""

    def __init__(
        self,
        scorer: Scorer,
        outcome: Outcome,
        problem: SearchProblem,
        models: TrialModels,
        best: Trial,
        of_best: tuple[EvalReport, Parts],
        say: Callable[[str], None],
    ) -> None:
        """``of_best``: what scoring the best one gave. ``say`` hears of trials that are left out
        because they cannot be scored on these samples."""
        self._scorer = scorer
        self._outcome = outcome
        self._problem = problem
        self._models = models
        self._best = best
        self._say = say
        self._known: dict[str, tuple[EvalReport, Parts] | None] = {_plan(best): of_best}

    def rows(self, float_parts: Parts) -> list[UnseenRow]:
        """The plain plan where it was tried, and the front."""
        plain, trials = self._plain(), self._wanted()
        scores = [self._score(trial) for trial in trials]
        kept = [(t, *score) for t, score in zip(trials, scores, strict=True) if score is not None]
        if not kept:
            return []
        metric = find_metric(kept[0][1].metric)
        parts = [float_parts, *(own for _, _, own in kept)]
        resampled = Resampled(metric, parts)
        places = {trial.candidate.number: i for i, (trial, _, _) in enumerate(kept, 1)}
        plain_at = None if plain is None else places.get(plain.candidate.number)

        def over(i: int, other: int | None) -> tuple[Difference | None, bool]:
            if other is None or other == i:
                return None, False
            difference = resampled.difference(i, other)
            apart = discordant(parts[i], parts[other])
            is_sure = difference.is_sure and (apart is None or apart.p <= MOST_P)
            return difference if metric.higher_is_better else difference.turned(), is_sure

        rows = []
        for i, (trial, report, _) in enumerate(kept, 1):
            (over_plain, sure_plain), (over_float, sure_float) = over(i, plain_at), over(i, 0)
            rows.append(
                UnseenRow(
                    number=trial.candidate.number,
                    label=trial.candidate.label,
                    score=report.score,
                    over_plain=over_plain,
                    over_float=over_float,
                    sure_plain=sure_plain,
                    sure_float=sure_float,
                    is_best=trial is self._best,
                )
            )
        return rows

    def _plain(self) -> Trial | None:
        """The trial of the plain plan; a vendor's strategy may have none."""
        plain = dict(self._problem.plain)
        alike = (
            trial
            for trial in self._outcome.trials
            if trial.report is not None
            and not trial.candidate.settings
            and dict(trial.candidate.choices) == plain
        )
        return next(alike, None)

    def _wanted(self) -> list[Trial]:
        """The plain plan, the front by rising cost, and the best one, each once. After Ctrl-C there
        is no time for the front."""
        outcome, problem = self._outcome, self._problem
        front: Iterable[Trial] = ()
        if outcome.stopped != "interrupt":
            front = front_of(outcome.trials, lambda trial: problem.cost(trial.candidate.choices))
        wanted = (self._plain(), *front, self._best)
        return list({trial.candidate.number: trial for trial in wanted if trial}.values())

    def _score(self, trial: Trial) -> tuple[EvalReport, Parts] | None:
        plan = _plan(trial)
        if plan not in self._known:
            self._known[plan] = self._scored(trial)
        return self._known[plan]

    def _scored(self, trial: Trial) -> tuple[EvalReport, Parts] | None:
        try:
            with self._models.at(trial.candidate.number) as place:
                if place is None:
                    return None
                report, parts = self._scorer.score_samples(place / MODEL)
        except QdistError as error:
            # The search has its answer, whatever a plan beside it does on these samples.
            self._say(
                f"note: trial {trial.candidate.number} has no score on the samples that the search "
                f"did not see: {error}"
            )
            return None
        return None if parts is None else (report, parts)


def row_numbers(row: UnseenRow) -> dict[str, float]:
    """A row's numbers by name, as tables and metrics have them."""
    found = {"unseen_score": row.score}
    for name, difference in (("plain", row.over_plain), ("float", row.over_float)):
        if difference is not None:
            found |= {
                f"unseen_over_{name}": difference.mean,
                f"unseen_over_{name}_low": difference.low,
                f"unseen_over_{name}_high": difference.high,
            }
    return found


def _plan(trial: Trial) -> str:
    return str(trial.details.get("plan_digest", trial.candidate.number))


def _json(difference: Difference | None, is_sure: bool) -> dict[str, Any] | None:
    if difference is None:
        return None
    numbers = {"mean": difference.mean, "low": difference.low, "high": difference.high}
    known = {name: value if math.isfinite(value) else None for name, value in numbers.items()}
    return {**known, "counts": is_sure}
