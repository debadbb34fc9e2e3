"""``qdist tune``."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from qdist.cli import domain
from qdist.cli.commands import smoothing, steps, tune_search
from qdist.cli.commands.mixing import mix_of, mixed
from qdist.cli.commands.scoring import check_parts, make_scorer, note_overlap
from qdist.cli.commands.tune_result import keep_best, report
from qdist.cli.commands.unseen import score_unseen
from qdist.cli.context import Context
from qdist.cli.schema import TuneSettings
from qdist.errors import PlanError
from qdist.evaluate.builtin import DatasetEvaluation
from qdist.evaluate.report import EvalReport
from qdist.evaluate.scorer import Scorer
from qdist.model.graph import Graph
from qdist.plan.planner import Planner
from qdist.plan.smoothing import find_smoothing
from qdist.plan.target import Target
from qdist.search.strategies import check_strategy


def run(context: Context[TuneSettings]) -> None:
    """Calibrate what is missing, search, and leave the best plan and artifact.

    Raises `KeyboardInterrupt` when Ctrl-C ended the search, or the scoring of what it did not see,
    after the best so far and the report are in place.
    """
    from actors.session import ray_session

    settings = context.settings
    target = domain.target(settings.target)
    evaluation = domain.evaluation(settings.evaluation, settings.data, "search")
    check_parts(settings)
    domain.default_choice(settings.quantization)
    check_strategy(settings.search.strategy)
    domain.search_settings(settings.search, 1.0)
    domain.space(settings.search, settings.quantization.precision, target, None)
    domain.latency(settings.search)
    mix_of(settings.quantization)
    is_smoothing_searched = smoothing.check_search(settings)
    _check_precisions(settings, target)
    context.make_folder()
    frozen = context.frozen_model()
    graph = Graph(frozen, context.execution)
    resumed = tune_search.unfinished_run(context)
    # MLflow comes first: that it cannot be reached is better known before the work than after it.
    # One Ray serves the calibration and the search.
    with (
        context.tracked(
            params=_params(settings), model_digest=frozen.digest, resume=resumed
        ) as run_,
        ray_session(domain.cluster(settings.cluster)),
    ):
        done = steps.calibrate(context, frozen, graph, settings)
        job, merged = done.job, done.merged
        run_.set_tags({"qdist.data_digest": job.manifest.digest})
        alphas = smoothing.strengths(settings.calibration.smoothing)
        smoothing.measure_all(context, graph, done, settings, alphas)
        smoother = smoothing.Smoother(context, graph, done)
        alpha, record = settings.quantization.smoothing, merged.record
        factors = None
        if is_smoothing_searched:
            factors = smoother.factors(settings)
            # Better known now than in every trial: there is something to smooth.
            find_smoothing(graph, factors, job.taps, 0.5)
        if alpha is not None:
            found_rows = smoother.smoothed(alpha, settings)
            graph, record, frozen = found_rows.graph, found_rows.record, found_rows.graph.model
        planner = Planner(graph, record, job.taps, domain.plan_settings(settings.quantization))
        chosen = steps.make_choices(planner, settings.quantization)
        planner = chosen.planner
        pinned = set(chosen.why)
        chosen = mixed(context, chosen, settings.quantization, target, done.source)
        context.notes(chosen.notes)
        note_overlap(context, evaluation, run_)
        with make_scorer(context, evaluation, frozen.source) as scorer:
            before = _float_score(context, scorer)
            found = tune_search.search(
                context,
                frozen,
                chosen,
                pinned,
                target,
                scorer,
                run_,
                done,
                before,
                smoother.candidates(alpha, factors),
            )
        if found.outcome.stopped == "interrupt" and not found.outcome.trials:
            raise KeyboardInterrupt
        best = keep_best(context, frozen, planner, target, found)
        unseen = None
        try:
            unseen = score_unseen(context, frozen.source, best.trial, best.artifact.path, found)
        except KeyboardInterrupt:
            found = replace(found, outcome=replace(found.outcome, stopped="interrupt"))
            context.say("stopped by Ctrl-C; the report leaves out what the search did not see")
        report(context, frozen, before, best, found, unseen, merged.notes, run_)
        if found.outcome.stopped == "interrupt":
            raise KeyboardInterrupt
        tune_search.forget_run(context)


def _params(settings: TuneSettings) -> dict[str, Any]:
    return {
        "strategy": settings.search.strategy,
        "precision": settings.quantization.precision,
        "saturation": settings.quantization.saturation,
        "symmetric": settings.quantization.symmetric,
        "smoothing": settings.quantization.smoothing,
        "scope": settings.quantization.scope,
        "target": settings.target.name,
        "max_trials": settings.search.max_trials,
    }


def _float_score(context: Context[TuneSettings], scorer: Scorer) -> EvalReport:
    with context.working("scoring the float model"):
        report = scorer.score(scorer.float_model)
    context.say(f"float model: {report.metric} {report.score:.4f}")
    if isinstance(scorer.evaluation, DatasetEvaluation):
        context.notes(report.log.splitlines())
    return report


def _check_precisions(settings: TuneSettings, target: Target) -> None:
    """Raise QD507 now for a precision that the target would refuse in every trial."""
    for key, name in (
        ("quantization.precision", settings.quantization.precision),
        ("search.low", settings.search.low),
        ("search.high", settings.search.high),
    ):
        if name is not None and name not in target.precisions:
            raise PlanError(
                "QD507",
                where=f"target {target.name}",
                got=f"{key}={name}",
                expected=", ".join(target.precisions),
                mend=f"choose one of these for {key}"
                + ("" if key.startswith("quant") else ", or null for none"),
            )
