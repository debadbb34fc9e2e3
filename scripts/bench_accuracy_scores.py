"""Scores of a model file beside the float model's, sample by sample, and paired intervals.

Every metric is a sum over samples over another sum (`qdist.evaluate.metrics`), so a model is kept
as these parts, and a difference of two models is resampled over the samples that both have seen.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from bench_accuracy_cases import AccuracyCase

from qdist.evaluate.builtin import Outputs, Runner, batches
from qdist.evaluate.metrics import find_metric
from qdist.evaluate.metrics.batch import Parts
from qdist.evaluate.paired import Difference, Discordant
from qdist.evaluate.paired import discordant as parts_discordant
from qdist.evaluate.paired import paired as parts_paired
from qdist.model.session import Execution

EXECUTION = Execution()
"""One thread on the CPU; graphs run as they are written."""
BESIDE = ("agreement", "sqnr_db")


@dataclass(frozen=True, slots=True, kw_only=True)
class Scores:
    """Metric -> numerators and denominators of every sample, float64 [n] each."""

    parts: Mapping[str, Parts]

    def value(self, metric: str) -> float:
        """The metric over all samples."""
        numerators, denominators = self.parts[metric]
        return _finished(metric, numerators.sum(), denominators.sum())

    def values(self) -> dict[str, float]:
        """All metrics."""
        return {name: self.value(name) for name in self.parts}


def score(case: AccuracyCase, model: Path, reference: list[Outputs] | None) -> Scores:
    """Run a model over the evaluation samples. ``reference``: the float model's outputs, run by
    run; None where this is the float model itself, whose score alone is wanted."""
    wanted = (case.metric, *(name for name in BESIDE if name != case.metric))
    if reference is None:
        wanted = () if find_metric(case.metric).needs_reference else (case.metric,)
    found = {name: find_metric(name).make() for name in wanted}
    runner = Runner(model, EXECUTION)
    for i, batch in enumerate(batches(case.evaluation, runner.inputs, case.batch)):
        outputs = runner.run(batch.feeds)
        expected = outputs if reference is None else reference[i]
        for name, accumulator in found.items():
            pair = outputs, expected
            if name == "agreement":
                pair = case.decision(outputs), case.decision(expected)
            accumulator.update(pair[0], batch.feeds, batch.labels, pair[1])
    return Scores(parts={name: accumulator.parts() for name, accumulator in found.items()})


def float_outputs(case: AccuracyCase) -> list[Outputs]:
    """The float model's outputs on the evaluation samples, run by run."""
    runner = Runner(case.model, EXECUTION)
    return [runner.run(b.feeds) for b in batches(case.evaluation, runner.inputs, case.batch)]


def paired(ours: Scores, theirs: Scores, metric: str) -> Difference:
    """The paired bootstrap over samples of ``ours - theirs``."""
    return parts_paired(find_metric(metric), ours.parts[metric], theirs.parts[metric])


def discordant(ours: Scores, theirs: Scores, metric: str) -> Discordant | None:
    """None where a sample is more than right or wrong."""
    return parts_discordant(ours.parts[metric], theirs.parts[metric])


def _finished(metric: str, numerator: float, denominator: float) -> float:
    with np.errstate(all="ignore"):
        return float(find_metric(metric).finish(np.divide(numerator, denominator)))
