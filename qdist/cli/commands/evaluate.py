"""``qdist evaluate``."""

from __future__ import annotations

import math
from pathlib import Path

from rich.table import Table

from qdist.cli import domain
from qdist.cli.commands import steps
from qdist.cli.commands.scoring import make_scorer, note_overlap
from qdist.cli.context import Context
from qdist.cli.evaluation_words import evaluation_dump
from qdist.cli.schema import EvaluateSettings
from qdist.emit.qdq import MODE_KEY, MODES
from qdist.errors import ArtifactError
from qdist.evaluate.builtin import DatasetEvaluation
from qdist.evaluate.custom_metric import ClassEvaluation
from qdist.evaluate.dumped import score_dumped
from qdist.evaluate.report import EvalReport
from qdist.files import write_json
from qdist.model.loading import load_model, read_graph
from qdist.simulate.nodes import is_rounding


def run(context: Context[EvaluateSettings]) -> None:
    """Score the float model, then the artifact, with the same evaluation; or dumped outputs."""
    settings = context.settings
    evaluation = domain.evaluation(settings.evaluation, settings.data)
    if isinstance(evaluation, ClassEvaluation) and evaluation_dump(settings.evaluation):
        _score_dumped(context, evaluation, evaluation_dump(settings.evaluation))
        return
    artifact = domain.absolute(settings.artifact)
    if not artifact.is_file():
        raise ArtifactError(
            "QD604",
            where=str(artifact),
            got="no such file",
            expected="a quantized model",
            mend="run qdist quantize first, or give the file with artifact=FILE",
        )
    folder = context.make_folder()
    model = load_model(domain.absolute(settings.model.path))
    scorer = make_scorer(context, evaluation, model.path)
    with (
        context.tracked(params={"artifact": str(artifact)}, model_digest=model.digest) as tracked,
        scorer,
    ):
        note_overlap(context, evaluation, tracked)
        if isinstance(evaluation, DatasetEvaluation) and not _is_quantized(artifact):
            context.notes([f"{artifact} holds nothing quantized"])
        with context.working("scoring the float model"):
            before = scorer.score(model.path)
        with context.working("scoring the quantized model"):
            after = scorer.score(artifact)
        if isinstance(evaluation, DatasetEvaluation):
            context.notes(after.log.splitlines())
        write_json(
            folder / "evaluation.json", {"float": before.to_json(), "quantized": after.to_json()}
        )
        steps.save_config(context, context.config)
        tracked.log_params({"metric": after.metric})
        tracked.log_metrics({"score": after.score, "float_score": before.score, **after.metrics})
    context.console.print(_table(settings.model.name, before, after))
    context.say(f"{_mode(artifact)}, run as it is written: {artifact}")
    context.notes(steps.artifact_deployment(artifact, context.execution))


def _score_dumped(
    context: Context[EvaluateSettings], evaluation: ClassEvaluation, folder: str
) -> None:
    """Run the class by itself over the outputs of an earlier comparison; no model runs."""
    reports = score_dumped(evaluation, domain.absolute(folder))
    write_json(
        context.make_folder() / "evaluation.json",
        {name: report.to_json() for name, report in reports.items()},
    )
    table = Table(title=f"{evaluation.metric_cls} of {folder}", title_justify="left")
    table.add_column("outputs")
    metrics = list(dict.fromkeys(name for report in reports.values() for name in report.metrics))
    for name in metrics:
        table.add_column(name, justify="right")
    for place, report in reports.items():
        values = [report.metrics.get(name, math.nan) for name in metrics]
        table.add_row(place, *(f"{value:.4f}" for value in values))
    context.console.print(table)


def _table(name: str, before: EvalReport, after: EvalReport) -> Table:
    table = Table(title=f"Evaluation of {name}", title_justify="left")
    table.add_column("metric")
    table.add_column("float", justify="right")
    table.add_column("quantized", justify="right")
    for metric in after.metrics:
        values = (before.metrics.get(metric, math.nan), after.metrics[metric])
        beside = metric != after.metric and metric in ("agreement", "sqnr_db", "cosine")
        table.add_row(metric, "" if beside else f"{values[0]:.4f}", f"{values[1]:.4f}")
    if after.n_samples is not None:
        table.add_row("samples", str(before.n_samples), str(after.n_samples))
    table.add_row("seconds", f"{before.seconds:.2f}", f"{after.seconds:.2f}")
    return table


def _mode(path: Path) -> str:
    """Which of the two modes a model computes."""
    found = {entry.key: entry.value for entry in read_graph(path).metadata_props}
    return found.get(MODE_KEY, MODES[0])


def _is_quantized(path: Path) -> bool:
    nodes = read_graph(path).graph.node
    known = ("DequantizeLinear", "QLinearConv", "QGemm")
    return any(node.op_type in known or is_rounding(node) for node in nodes)
