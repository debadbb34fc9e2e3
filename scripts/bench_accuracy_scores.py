"""Scores of a model file beside the float model's, sample by sample, and paired intervals.

Every metric is a sum over samples over another sum (`qdist.evaluate.metrics`), so a model is kept
as these parts, and a difference of two models is resampled over the samples that both have seen.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from bench_accuracy_cases import AccuracyCase
from numpy.typing import NDArray
from scipy.stats import binomtest

from qdist.evaluate.builtin import Outputs, Runner, batches
from qdist.evaluate.metrics import find_metric
from qdist.model.session import Execution

EXECUTION = Execution()
"""One thread on the CPU; graphs run as they are written."""
BESIDE = ("agreement", "sqnr_db")
N_DRAWS = 2000
SEED = 20240501

Parts = tuple[NDArray[np.float64], NDArray[np.float64]]


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


@dataclass(frozen=True, slots=True, kw_only=True)
class Difference:
    """One model's metric less another's; ``low .. high`` holds 95 % of it over draws of samples."""

    mean: float
    low: float
    high: float


def paired(ours: Scores, theirs: Scores, metric: str) -> Difference:
    """The paired bootstrap over samples of ``ours - theirs``; percentiles 2.5 and 97.5."""
    a, b = ours.parts[metric], theirs.parts[metric]
    n = a[0].size
    rng = np.random.default_rng(SEED)
    draws = rng.multinomial(n, np.full(n, 1 / n), size=N_DRAWS).astype(np.float64)
    finish = find_metric(metric).finish
    one, other = (_quotients(finish, parts, draws) for parts in (a, b))
    low, high = np.percentile(one - other, (2.5, 97.5))
    mean = ours.value(metric) - theirs.value(metric)
    return Difference(mean=mean, low=float(low), high=float(high))


@dataclass(frozen=True, slots=True, kw_only=True)
class Discordant:
    """Of samples that are right or wrong as a whole: on how many only one of two models is right,
    and the exact two-sided p-value of McNemar's test that this is chance. Resampling finds too
    narrow an interval where these are few: it is sure of 4 to 0, which chance does in one of 8.
    """

    ours: int
    theirs: int
    p: float


def discordant(ours: Scores, theirs: Scores, metric: str) -> Discordant | None:
    """None where a sample is more than right or wrong."""
    (a, n), (b, _) = ours.parts[metric], theirs.parts[metric]
    if not (n == 1).all() or not np.isin(np.concatenate([a, b]), (0.0, 1.0)).all():
        return None
    only_a, only_b = int(np.sum(a > b)), int(np.sum(b > a))
    total = only_a + only_b
    p = float(binomtest(only_a, total).pvalue) if total else 1.0
    return Discordant(ours=only_a, theirs=only_b, p=p)


def _quotients(
    finish: Callable[[NDArray[np.float64]], NDArray[np.float64]],
    parts: Parts,
    draws: NDArray[np.float64],
) -> NDArray[np.float64]:
    with np.errstate(all="ignore"):
        return finish(draws @ parts[0] / (draws @ parts[1]))


def _finished(metric: str, numerator: float, denominator: float) -> float:
    with np.errstate(all="ignore"):
        return float(find_metric(metric).finish(np.divide(numerator, denominator)))
