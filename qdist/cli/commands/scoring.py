"""What ``evaluate`` and ``tune`` share about scoring."""

from __future__ import annotations

from pathlib import Path

from qdist.cli import domain, schema
from qdist.cli.context import Context
from qdist.cli.tracking import Run
from qdist.errors import DataError
from qdist.evaluate.builtin import DatasetEvaluation
from qdist.evaluate.overlap import overlap_text
from qdist.evaluate.scorer import Evaluation, Scorer


def make_scorer(
    context: Context[schema.EvaluateSettings] | Context[schema.TuneSettings],
    evaluation: Evaluation,
    float_model: Path,
) -> Scorer:
    """A scorer that works below the output folder."""
    return Scorer(
        evaluation=evaluation,
        float_model=float_model,
        scratch=context.folder / "scratch",
        execution=context.execution,
        **domain.scorer_options(context.settings.evaluation),  # type: ignore[arg-type]
    )


def note_overlap(
    context: Context[schema.EvaluateSettings] | Context[schema.TuneSettings],
    evaluation: Evaluation,
    tracked: Run,
) -> None:
    """Say and record how many evaluation samples are calibration samples too, if any."""
    data = context.settings.data
    if data is None or not isinstance(evaluation, DatasetEvaluation):
        return
    calibration = data.calibration
    if isinstance(calibration, schema.CapturedSamples | schema.RandomSamples):
        return
    try:
        text = overlap_text(evaluation.source, domain.source(calibration))
    except DataError:
        # Scoring does not need the calibration set, which may have stayed on another machine.
        return
    if text is not None:
        context.notes([f"{text} evaluation samples are calibration samples"])
        tracked.set_tags({"qdist.evaluation_overlap": text})
