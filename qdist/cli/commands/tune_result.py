"""What ``qdist tune`` ends with: the best plan and artifact, the report, MLflow's parent run."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from qdist.cli import domain
from qdist.cli.commands import steps
from qdist.cli.commands.tune_search import Found
from qdist.cli.commands.unseen import UNSEEN, Unseen, row_numbers
from qdist.cli.context import Context
from qdist.cli.schema import TuneSettings
from qdist.cli.tracking import Run
from qdist.emit.qdq import Artifact, emit_qdq
from qdist.errors import EvaluationError
from qdist.evaluate.compare import LayerComparison, compare_layers
from qdist.evaluate.report import EvalReport
from qdist.files import write_json
from qdist.model.freeze import FrozenModel
from qdist.plan.plan import QuantizationPlan
from qdist.plan.planner import Planner
from qdist.plan.target import ProjectedPlan, Target
from qdist.report.front_page import write_front_page
from qdist.report.page import write_page
from qdist.report.tables import summary_table, trial_table, unseen_table
from qdist.report.values import Summary, TrialRow
from qdist.search.applied import planner_with
from qdist.search.front import front_of
from qdist.search.trial import Trial


@dataclass(frozen=True, slots=True, kw_only=True)
class Best:
    """What the search ended with, written and checked."""

    trial: Trial
    report: EvalReport
    projected: ProjectedPlan
    artifact: Artifact
    layers: tuple[LayerComparison, ...]


def keep_best(
    context: Context[TuneSettings],
    frozen: FrozenModel,
    planner: Planner,
    target: Target,
    found: Found,
) -> Best:
    """Write the best trial again, checked, and compare its layers. Raises QD706 if none scored."""
    trial, trials = found.answer, found.outcome.trials
    if trial is None or trial.report is None:
        raise EvaluationError(
            "QD706",
            where=f"{len(trials)} trials",
            got=trials[0].reason if trials else "no trial",
            expected="at least one trial with a score",
            mend="mend the evaluation, then run the same command again",
        )
    statistics = found.statistics
    own = planner_with(planner, trial.candidate.settings, statistics, statistics.factors)
    plan = own.plan(trial.candidate.choices, trial.candidate.why)
    projected = target.project(plan)
    path = context.folder / "model.onnx"
    with context.working("writing the best model"):
        frozen = own.graph.model
        artifact = emit_qdq(frozen, projected, path, execution=context.execution)
        projected.plan.save(context.folder / "plan.json")
        layers = compare_layers(
            frozen,
            projected,
            domain.evaluation_source(context.settings.data),
            context.execution,
            batch=context.settings.compare.batch,
            n_samples=context.settings.compare.samples,
        )
    return Best(
        trial=trial,
        report=trial.report,
        projected=projected,
        artifact=artifact,
        layers=layers,
    )


def report(
    context: Context[TuneSettings],
    frozen: FrozenModel,
    before: EvalReport,
    best: Best,
    found: Found,
    unseen: Unseen | None,
    notes: tuple[str, ...],
    parent: Run,
) -> None:
    """Write the report and MLflow's parent run, and print the tables."""
    folder, trials = context.folder, found.outcome.trials
    plan: QuantizationPlan = best.projected.plan
    page = folder / "report.html"
    summary = Summary(
        title=f"{context.settings.model.name}: trial {best.trial.candidate.number} of "
        f"{len(trials)} is the best ({best.trial.candidate.label})",
        model=context.settings.model.name,
        float_score=before.score,
        quantized_score=best.report.score,
        metric=best.report.metric,
        higher_is_better=best.report.higher_is_better,
        n_samples=best.report.n_samples,
        float_bytes=frozen.n_source_bytes,
        quantized_bytes=best.artifact.n_bytes,
        precision_counts=dict(plan.counts()),
        coverage=str(plan.coverage()),
        beside={k: v for k, v in best.report.metrics.items() if k != best.report.metric},
        worst_layers=best.layers[:3],
        places=(
            ("artifact", str(best.artifact.path)),
            ("plan", str(folder / "plan.json")),
            ("report", str(page)),
            ("dashboard", parent.url),
        ),
        notes=(
            *notes,
            *plan.notes,
            *steps.plan_notes(plan),
            *steps.deployment(plan, context.execution),
        ),
        seconds=context.seconds,
    )
    rows = [_row(trial, best.trial) for trial in trials]
    unseen_rows = () if unseen is None else unseen.rows
    write_page(page, summary, best.layers, rows, unseen_rows)
    write_json(folder / "layers.json", [row.to_json() for row in best.layers])
    steps.save_config(context, context.config)
    _log_parent(context, parent, before, best, found, rows, unseen)
    context.console.print(trial_table(rows))
    if unseen is not None and unseen_rows:
        context.console.print(unseen_table(unseen_rows, unseen.after.n_samples or 0))
    # What is to be copied stands below the table, where nothing wraps it.
    context.console.print(summary_table(replace(summary, places=summary.places[:-1])))
    context.say(f"dashboard: {parent.url}")


def _log_parent(
    context: Context[TuneSettings],
    parent: Run,
    before: EvalReport,
    best: Best,
    found: Found,
    rows: list[TrialRow],
    unseen: Unseen | None,
) -> None:
    """The parent run's numbers, tables, charts and files."""
    folder, outcome = context.folder, found.outcome
    parent.log(
        metrics={
            "best_score": best.report.score,
            "float_score": before.score,
            "trials": len(outcome.trials),
            "plans_scored": outcome.n_scored,
            "driver_s": outcome.driver_s,
            "logging_s": found.log.seconds,
            **({} if unseen is None else unseen.metrics),
        },
        params={},
        tags={
            "qdist.best_trial": str(best.trial.candidate.number),
            "qdist.stopped": outcome.stopped,
        },
    )
    on_front = front_of(outcome.trials, lambda trial: found.problem.cost(trial.candidate.choices))
    numbers = {trial.candidate.number for trial in on_front}
    # Of equal scores the front has the cheapest; the answer may be another.
    kept = {"best": {best.trial.candidate.number}}
    kept["front"] = numbers | kept["best"]
    front = [row for row in rows if row.number in kept["front"]]
    apart = {} if unseen is None else {row.number: row_numbers(row) for row in unseen.rows}
    parent.log_table(
        [{**_front_row(row), **apart.get(row.number, {})} for row in front], "front.csv"
    )
    if unseen is not None:
        parent.log_json(unseen.to_json(), UNSEEN)
    page = write_front_page(folder / "front.html", rows, numbers, best.report, before.score)
    parent.log_table(
        [
            {"layer": name, **choice.to_json(), "relative_l2": error}
            for name, errors in found.problem.sensitivity.items()
            for choice, error in errors.items()
        ],
        "sensitivities.csv",
    )
    parent.log_table([row.to_json() for row in best.layers], "layers.csv")
    for path in (folder / "report.html", page, folder / "plan.json"):
        parent.log_artifact(path)
    for artifact in (best.artifact.path, best.artifact.data_path):
        if artifact is not None:
            parent.log_artifact(artifact, best=True)
    if context.settings.tracking.artifacts == "front":
        found.log.send_models(t for t in outcome.trials if t.candidate.number in kept["front"])
    # Only now: what MLflow is to get is read from there.
    if (policy := context.settings.search.artifacts) != "all":
        found.book.prune(kept[policy])


def _front_row(row: TrialRow) -> dict[str, Any]:
    return {
        "trial": row.number,
        "score": row.score,
        "bytes": row.n_bytes,
        "label": row.label,
        "best": row.is_best,
        "changed_layers": len(row.changed),
        **{f"layers_{name}": n for name, n in row.counts.items()},
        **{name: value for name, value in row.metrics.items() if value != row.score},
    }


def _row(trial: Trial, best: Trial) -> TrialRow:
    counts = trial.details.get("counts", {})
    return TrialRow(
        number=trial.candidate.number,
        label=trial.candidate.label,
        score=trial.report.score if trial.report else None,
        metrics=dict(trial.report.metrics) if trial.report else {},
        n_bytes=trial.n_bytes,
        counts=dict(counts) if isinstance(counts, dict) else {},
        changed=trial.candidate.changed,
        status="ok" if trial.report else "failed",
        reason=trial.reason,
        seconds=sum(v for v in trial.details.values() if isinstance(v, float)),
        is_best=trial is best,
        is_baseline=trial.candidate.number == 0,
        evaluation=trial.evaluation,
    )
