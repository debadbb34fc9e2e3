"""``qdist tune``."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from qdist.cli import domain
from qdist.cli.commands import steps
from qdist.cli.commands.mixing import mix_of, mixed
from qdist.cli.commands.scoring import check_parts, make_scorer, note_overlap, score_unseen
from qdist.cli.context import Context
from qdist.cli.progress import bar
from qdist.cli.schema import TuneSettings
from qdist.cli.tracking import Run
from qdist.data.source import DataSource
from qdist.emit.qdq import Artifact, emit_qdq
from qdist.errors import EvaluationError, PlanError
from qdist.evaluate.builtin import DatasetEvaluation
from qdist.evaluate.compare import LayerComparison, compare_layers, sensitivity
from qdist.evaluate.report import EvalReport
from qdist.evaluate.scorer import Scorer
from qdist.files import write_json
from qdist.model.freeze import FrozenModel
from qdist.model.graph import Graph
from qdist.plan.choice import LayerChoice
from qdist.plan.plan import QuantizationPlan
from qdist.plan.planner import Planner
from qdist.plan.precision import PRECISIONS
from qdist.plan.target import ProjectedPlan, Target
from qdist.report.page import write_page
from qdist.report.tables import summary_table, trial_table
from qdist.report.values import Summary, TrialRow
from qdist.search.strategies import make_strategy
from qdist.search.trial import Trial, best_of


@dataclass(frozen=True, slots=True, kw_only=True)
class _Best:
    """What the search ended with, written and checked."""

    trial: Trial
    report: EvalReport
    projected: ProjectedPlan
    artifact: Artifact
    layers: tuple[LayerComparison, ...]


def run(context: Context[TuneSettings]) -> None:
    """Calibrate what is missing, search, and leave the best plan and artifact."""
    from actors.session import ray_session

    settings = context.settings
    target = domain.target(settings.target)
    evaluation = domain.evaluation(settings.evaluation, settings.data, "search")
    check_parts(settings)
    domain.default_choice(settings.quantization)
    domain.greedy(settings.search)
    mix_of(settings.quantization)
    _check_precisions(settings, target)
    context.make_folder()
    frozen = context.frozen_model()
    graph = Graph(frozen, context.execution)
    # MLflow comes first: that it cannot be reached is better known before the work than after it.
    # One Ray serves the calibration and the search.
    with (
        context.tracked(params=_params(settings), model_digest=frozen.digest) as run_,
        ray_session(domain.cluster(settings.cluster)),
    ):
        done = steps.calibrate(context, frozen, graph, settings)
        job, merged = done.job, done.merged
        run_.set_tags({"qdist.data_digest": job.manifest.digest})
        planner = Planner(
            graph, merged.record, job.taps, domain.plan_settings(settings.quantization)
        )
        chosen = steps.make_choices(planner, settings.quantization)
        planner = chosen.planner
        pinned = set(chosen.why)
        chosen = mixed(context, chosen, settings.quantization, target, done.source)
        context.notes(chosen.notes)
        note_overlap(context, evaluation, run_)
        with make_scorer(context, evaluation, frozen.source) as scorer:
            before = _float_score(context, scorer)
            trials = _search(context, frozen, chosen, pinned, target, scorer, run_, done)
        best = _keep_best(context, frozen, planner, target, trials)
        score_unseen(context, frozen.source, best.artifact.path)
        _report(context, frozen, before, best, trials, merged.notes, run_)


def _params(settings: TuneSettings) -> dict[str, Any]:
    return {
        "strategy": settings.search.strategy,
        "precision": settings.quantization.precision,
        "saturation": settings.quantization.saturation,
        "symmetric": settings.quantization.symmetric,
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


def _search(
    context: Context[TuneSettings],
    frozen: FrozenModel,
    chosen: steps.Chosen,
    pinned: set[str],
    target: Target,
    scorer: Scorer,
    parent: Run,
    calibrated: steps.Calibrated,
) -> list[Trial]:
    from actors.tune import TrialSetup, tune

    settings = context.settings
    planner, choices = chosen.planner, chosen.choices
    source = calibrated.source
    with context.working("measuring how sensitive each layer is"):
        errors = _sensitivities(context, frozen, planner, target, source, choices, pinned)
    strategy = make_strategy(
        settings.search.strategy,
        choices,
        errors,
        # What the target would refuse in every trial is not tried.
        replace(
            domain.greedy(settings.search), granularity="channel" if target.per_channel else None
        ),
        {layer.name: planner.weight_elements(layer) for layer in planner.choosable()},
    )
    setup = TrialSetup(
        frozen=frozen,
        record=calibrated.merged.record,
        taps=planner.taps,
        settings=planner.settings,
        target=target,
        evaluation=scorer.evaluation,
        execution=context.execution,
        scratch=scorer.scratch,
        reference=scorer.reference,
        scorer_options=domain.scorer_options(settings.evaluation),
    )
    folder = context.folder / "trials"
    _set_aside(folder)
    done: list[Trial] = []
    with bar(context.console, "searching", "trials") as drawing:

        def on_trial(trial: Trial) -> None:
            done.append(trial)
            _log_trial(parent, trial, folder, settings)
            best = best_of(done)
            score = f"best {best.report.score:.4f}" if best and best.report else "no score yet"
            drawing.update(len(done), settings.search.max_trials, score)
            drawing.say(_line(trial))

        return tune(
            strategy,
            setup,
            domain.cluster(settings.cluster),
            folder,
            on_trial=on_trial,
            on_message=drawing.say,
        )


def _set_aside(folder: Path) -> None:
    """Trials of an earlier search are kept under another name: trials-1, trials-2, ..."""
    if folder.exists():
        n = 1
        while (old := folder.with_name(f"{folder.name}-{n}")).exists():
            n += 1
        folder.rename(old)


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


def _sensitivities(
    context: Context[TuneSettings],
    frozen: FrozenModel,
    planner: Planner,
    target: Target,
    source: DataSource,
    choices: dict[str, LayerChoice],
    pinned: set[str],
) -> dict[str, dict[str, float]]:
    """Precision -> layer -> relative L2 error when that layer alone has it.

    ``pinned`` layers, which the user has a rule for, are left out, and so left alone.
    """
    search = context.settings.search
    base = context.settings.quantization.precision
    choosable = {layer.name for layer in planner.choosable()} - pinned
    found: dict[str, dict[str, float]] = {}
    for precision in dict.fromkeys(p for p in (base, search.low) if p is not None):
        tried = {
            name: LayerChoice(**{**choice.to_json(), "precision": precision})
            for name, choice in choices.items()
        }
        deviations = sensitivity(
            frozen,
            target.project(planner.plan(tried)),
            source,
            context.execution,
            batch=context.settings.compare.batch,
            n_samples=search.sensitivity_samples,
        )
        found[precision] = {
            name: deviation.relative_l2
            for name, deviation in deviations.items()
            if name in choosable
        }
    return found


def _line(trial: Trial) -> str:
    number = f"trial {trial.candidate.number:>3}"
    if trial.report is None:
        return f"{number}  failed   {trial.candidate.label}: {trial.reason}"
    size = f"{trial.n_bytes / 1e6:.3f} MB"
    return f"{number}  {trial.report.score:.4f}  {size}  {trial.candidate.label}"


def _log_trial(parent: Run, trial: Trial, folder: Path, settings: TuneSettings) -> None:
    from actors.tune import ARTIFACT, PLAN, trial_folder

    candidate = trial.candidate
    counts = trial.details.get("counts", {})
    params = {
        "model": settings.model.name,
        "label": candidate.label,
        "saturation": _common(choice.saturation for choice in candidate.choices.values()),
        "changed_layers": len(candidate.changed),
    }
    if isinstance(counts, dict):
        params.update({f"layers_{name}": counts.get(name, 0) for name in PRECISIONS})
    place = trial_folder(folder, candidate.number)
    with parent.start_child(
        f"trial-{candidate.number:03d} {candidate.label}", params=params, number=candidate.number
    ) as child:
        child.set_tags(
            {
                "qdist.status": "ok" if trial.report else "failed",
                "qdist.plan_digest": str(trial.details.get("plan_digest", "")),
            }
        )
        seconds = {k: v for k, v in trial.details.items() if isinstance(v, float)}
        child.log_metrics({"artifact_mb": trial.n_bytes / 1e6, **seconds})
        if trial.report is not None:
            child.log_metrics({"score": trial.report.score, **trial.report.metrics})
            if trial.report.log:
                child.log_text(trial.report.log, "evaluation.log")
        else:
            child.set_tags({"qdist.reason": trial.reason})
        child.log_table(
            [
                {"layer": name, **choice.to_json(), "changed": name in candidate.changed}
                for name, choice in candidate.choices.items()
            ],
            "layers.csv",
        )
        for path in sorted([*place.glob(PLAN), *place.glob(f"{ARTIFACT}*")]):
            child.log_artifact(path)


def _common(values: Any) -> str:
    kinds = sorted(set(values))
    return kinds[0] if len(kinds) == 1 else "mixed"


def _keep_best(
    context: Context[TuneSettings],
    frozen: FrozenModel,
    planner: Planner,
    target: Target,
    trials: list[Trial],
) -> _Best:
    trial = best_of(trials)
    if trial is None or trial.report is None:
        raise EvaluationError(
            "QD706",
            where=f"{len(trials)} trials",
            got=trials[0].reason if trials else "no trial",
            expected="at least one trial with a score",
            mend="mend the evaluation, then run the same command again",
        )
    plan = planner.plan(trial.candidate.choices, trial.candidate.why)
    projected = target.project(plan)
    path = context.folder / "model.onnx"
    with context.working("writing the best model"):
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
    return _Best(
        trial=trial,
        report=trial.report,
        projected=projected,
        artifact=artifact,
        layers=layers,
    )


def _report(
    context: Context[TuneSettings],
    frozen: FrozenModel,
    before: EvalReport,
    best: _Best,
    trials: list[Trial],
    notes: tuple[str, ...],
    parent: Run,
) -> None:
    folder = context.folder
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
        notes=(*notes, *plan.notes, *steps.plan_notes(plan)),
        seconds=context.seconds,
    )
    rows = [_row(trial, best.trial) for trial in trials]
    write_page(page, summary, best.layers, rows)
    write_json(folder / "layers.json", [row.to_json() for row in best.layers])
    steps.save_config(context, context.config)
    parent.log_metrics(
        {"best_score": best.report.score, "float_score": before.score, "trials": len(trials)}
    )
    parent.set_tags({"qdist.best_trial": str(best.trial.candidate.number)})
    parent.log_table([row.to_json() for row in best.layers], "layers.csv")
    for path in (page, folder / "plan.json"):
        parent.log_artifact(path)
    for artifact in (best.artifact.path, best.artifact.data_path):
        if artifact is not None:
            parent.log_artifact(artifact, best=True)
    context.console.print(trial_table(rows))
    # What is to be copied stands below the table, where nothing wraps it.
    context.console.print(summary_table(replace(summary, places=summary.places[:-1])))
    context.say(f"dashboard: {parent.url}")


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
    )
