"""The search of ``qdist tune``: what it is given, and what is told while it runs."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qdist.cli import domain
from qdist.cli.commands import steps
from qdist.cli.commands.searching import search_problem
from qdist.cli.commands.trial_models import TrialModels
from qdist.cli.commands.tune_log import TrialLog
from qdist.cli.context import Context
from qdist.cli.progress import bar
from qdist.cli.schema import TuneSettings
from qdist.cli.tracking import Run
from qdist.digest import digest_json
from qdist.emit.qdq import emit_qdq
from qdist.errors import ConfigError
from qdist.evaluate.identity import evaluation_identity
from qdist.evaluate.report import EvalReport
from qdist.evaluate.scorer import Scorer
from qdist.files import write_json
from qdist.model.freeze import FrozenModel
from qdist.model.session import fingerprint
from qdist.plan.planner import Planner
from qdist.plan.target import Target
from qdist.search.candidates import CandidateTable
from qdist.search.costs import bit_operations
from qdist.search.front import answer_of
from qdist.search.problem import SearchProblem
from qdist.search.statistics import CandidateStatistics
from qdist.search.strategies import make_strategy
from qdist.search.trial import Choices, Trial, best_of

if TYPE_CHECKING:  # importing Ray costs half a second that --help should not pay
    from actors.outcome import Outcome
    from actors.trial_book import TrialBook
    from actors.trial_worker import LayerSamples

TRIALS = "trials"
_RUN = "tune.run.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """What the search left: its trials, their models and runs, what it knew before, and the
    trial that it ends with; None where none has a score. ``statistics``: those that candidates'
    settings ask for. ``book``: the trials' folder."""

    outcome: Outcome
    models: TrialModels
    log: TrialLog
    problem: SearchProblem
    answer: Trial | None
    statistics: CandidateStatistics
    book: TrialBook


def search(
    context: Context[TuneSettings],
    frozen: FrozenModel,
    chosen: steps.Chosen,
    pinned: set[str],
    target: Target,
    scorer: Scorer,
    parent: Run,
    calibrated: steps.Calibrated,
    before: EvalReport,
    statistics: CandidateStatistics,
) -> Found:
    """Run the strategy over the pool. ``pinned``: layers that the user has rules for; ``before``:
    the float model's score."""
    from actors.outcome import Hooks, Limits
    from actors.trial_book import open_book
    from actors.trial_worker import TrialSetup
    from actors.tune import tune

    settings = context.settings
    planner = chosen.planner
    with context.working("measuring how sensitive each layer is"):
        problem = search_problem(
            context, planner, target, calibrated, chosen.choices, pinned, before
        )
    wanted = domain.search_settings(
        settings.search, problem.cost(chosen.choices), per_channel=target.per_channel
    )
    setup = TrialSetup(
        frozen=frozen,
        record=planner.record,
        statistics=statistics,
        taps=planner.taps,
        settings=planner.settings,
        target=target,
        evaluation=scorer.evaluation,
        execution=context.execution,
        scratch=scorer.scratch,
        reference=scorer.reference,
        scorer_options=domain.scorer_options(settings.evaluation),
        layers=_layer_samples(settings),
    )

    folder = context.folder / TRIALS
    book = open_book(folder, _identity(context, frozen, planner, target, scorer))
    if book.n_known:
        context.say(f"note: {book.n_known} plans were tried before, and are not scored again")
    costs = _costs_of(problem)

    def write(plan: Path, model: Path) -> None:
        own, found = steps.load_plan_for(frozen, plan, context.execution)
        emit_qdq(own, target.project(found), model, check=False)

    models = TrialModels(folder=folder, write=write)
    log = TrialLog(parent, models, settings.model.name, settings.tracking.artifacts, costs)
    _remember_run(context, parent)
    done: list[Trial] = []
    with log, bar(context.console, "searching", "trials") as drawing:

        def on_trial(trial: Trial) -> None:
            done.append(trial)
            log.add(trial)
            best = best_of(done)
            score = f"best {best.report.score:.4f}" if best and best.report else "no score yet"
            drawing.update(len(done), settings.search.max_trials, score)
            drawing.say(_line(trial))

        outcome = tune(
            make_strategy(settings.search.strategy, problem, wanted),
            setup,
            domain.cluster(settings.cluster),
            book,
            Limits(
                max_trials=_most_trials(settings),
                time_s=settings.search.time_limit_s,
                target_score=settings.search.stop_score,
            ),
            Hooks(
                on_trial=on_trial,
                on_message=drawing.say,
                costs=costs,
                cost=problem.cost,
                plain_cost=problem.cost(problem.plain),
                harm=CandidateTable(problem).harm_of,
            ),
        )
    context.say(_ended(outcome, settings))
    return Found(
        outcome=outcome,
        models=models,
        log=log,
        problem=problem,
        answer=answer_of(outcome.trials, problem, target=wanted.target, budget=wanted.budget),
        statistics=statistics,
        book=book,
    )


def _most_trials(settings: TuneSettings) -> int:
    """Of all strategies together: the greedy search's own come on top."""
    search = settings.search
    return search.max_trials * (2 if search.include_greedy else 1)


def _costs_of(problem: SearchProblem) -> Callable[[Choices], dict[str, float]]:
    """What a plan costs, by name: bit operations of the layers that may change, for one sample, and
    the search's own cost."""

    def costs(choices: Choices) -> dict[str, float]:
        found = {f"cost_{problem.costs.unit}": problem.cost(choices)}
        pairs = [(choices[layer.name], layer.n_multiplies) for layer in problem.layers]
        if any(n for _, n in pairs):
            found["bit_operations"] = sum(bit_operations(choice, n) for choice, n in pairs)
        return found

    return costs


def _layer_samples(settings: TuneSettings) -> LayerSamples | None:
    """What trials that compare layers do it on; None where there are no samples for it."""
    from actors.trial_worker import LayerSamples

    try:
        source = domain.evaluation_source(settings.data)
    except ConfigError:
        return None
    compare = settings.compare
    return LayerSamples(source=source, n_samples=compare.samples, batch=compare.batch)


def _identity(
    context: Context[TuneSettings],
    frozen: FrozenModel,
    planner: Planner,
    target: Target,
    scorer: Scorer,
) -> dict[str, Any]:
    """What may not change if a plan's score is to be used again. Plans say for themselves which
    statistics and settings they come from."""
    with context.working("naming the evaluation's samples"):
        evaluation = evaluation_identity(
            scorer.evaluation, domain.scorer_options(context.settings.evaluation)
        )
    found = {
        "model": frozen.digest,
        "statistics": planner.record.digest,
        "settings": digest_json(_plain(asdict(planner.settings))),
        "target": _plain(asdict(target)),
        "execution": fingerprint(context.execution),
        "evaluation": evaluation,
    }
    return dict(json.loads(json.dumps(found)))


def _plain(value: Any) -> Any:
    return json.loads(json.dumps(value, default=str, sort_keys=True))


def unfinished_run(context: Context[TuneSettings]) -> str | None:
    """The MLflow run of a search of the same configuration that did not end, to go on with."""
    try:
        value: Mapping[str, str] = json.loads((context.folder / _RUN).read_text(encoding="utf-8"))
        return str(value["run"]) if value["config"] == _config(context) else None
    except (OSError, KeyError, TypeError, ValueError):
        return None


def _remember_run(context: Context[TuneSettings], run: Run) -> None:
    write_json(context.folder / _RUN, {"run": run.id, "config": _config(context)})


def forget_run(context: Context[TuneSettings]) -> None:
    """The search has ended as it should, so that the next one is another."""
    (context.folder / _RUN).unlink(missing_ok=True)


def _config(context: Context[TuneSettings]) -> str:
    return digest_json(_plain(dict(context.config)))


def _line(trial: Trial) -> str:
    number = f"trial {trial.candidate.number:>3}"
    if trial.report is None:
        return f"{number}  failed   {trial.candidate.label}: {trial.reason}"
    size = f"{trial.n_bytes / 1e6:.3f} MB"
    return f"{number}  {trial.report.score:.4f}  {size}  {trial.candidate.label}"


def _ended(outcome: Outcome, settings: TuneSettings) -> str:
    n = len(outcome.trials)
    why = {
        "strategy": "the strategy has nothing more to try",
        "trials": f"search.max_trials={settings.search.max_trials} is reached",
        "target": f"search.stop_score={settings.search.stop_score} is reached",
        "time": f"search.time_limit_s={settings.search.time_limit_s:g} is over"
        if settings.search.time_limit_s
        else "",
        "interrupt": "stopped by Ctrl-C",
    }[outcome.stopped]
    reused = f", {outcome.n_reused} of them known before" if outcome.n_reused else ""
    return f"search ended after {n} trials{reused}: {why}"
