"""What ``evaluate`` and ``tune`` share about scoring."""

from __future__ import annotations

from pathlib import Path
from typing import get_args

from qdist.cli import domain, schema
from qdist.cli.context import Context
from qdist.cli.tracking import Run
from qdist.data.halves import Part, PartName
from qdist.data.source import DataSource
from qdist.errors import ConfigError, DataError
from qdist.evaluate.builtin import DatasetEvaluation
from qdist.evaluate.custom_metric import ClassEvaluation
from qdist.evaluate.overlap import overlap_text
from qdist.evaluate.scorer import Evaluation, Scorer
from qdist.memory import keep_freed


def make_scorer(
    context: Context[schema.EvaluateSettings] | Context[schema.TuneSettings],
    evaluation: Evaluation,
    float_model: Path,
) -> Scorer:
    """A scorer that works below the output folder. This process keeps freed memory from now on."""
    keep_freed()
    return Scorer(
        evaluation=evaluation,
        float_model=float_model,
        scratch=context.folder / "scratch",
        execution=context.execution,
        **domain.scorer_options(context.settings.evaluation),  # type: ignore[arg-type]
    )


def check_parts(settings: schema.TuneSettings) -> None:
    """Raise now what the report part, or dumped outputs, would raise after the search."""
    config = settings.evaluation
    if isinstance(config, schema.ClassConfig) and config.dumped:
        raise ConfigError(
            "QD107",
            where="evaluation.dumped",
            got="qdist tune",
            expected="a search scores models, not dumped outputs",
            mend="leave it out, or use qdist evaluate",
        )
    if isinstance(config, schema.MetricConfig | schema.ClassConfig) and config.search_share:
        source = domain.evaluation_source(settings.data)
        for part in get_args(PartName):
            domain.evaluation_part(config, source, part).keys()


def note_overlap(
    context: Context[schema.EvaluateSettings] | Context[schema.TuneSettings],
    evaluation: Evaluation,
    tracked: Run,
) -> None:
    """Say and record how many evaluation samples are calibration samples too, if any."""
    data = context.settings.data
    if data is None or not isinstance(evaluation, DatasetEvaluation | ClassEvaluation):
        return
    calibration = data.calibration
    if isinstance(calibration, schema.CapturedSamples | schema.RandomSamples):
        return
    try:
        text = overlap_text(_whole(evaluation.source), domain.source(calibration))
    except DataError:
        # Scoring does not need the calibration set, which may have stayed on another machine.
        return
    if text is not None:
        context.notes([f"{text} evaluation samples are calibration samples"])
        tracked.set_tags({"qdist.evaluation_overlap": text})


def _whole(source: DataSource) -> DataSource:
    """The set that a part is of, which compares with the calibration set."""
    return source.source if isinstance(source, Part) else source
