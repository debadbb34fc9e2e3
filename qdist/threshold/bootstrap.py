"""How well a calibration set pins a range down: a bootstrap over fixed blocks of its samples.

B. Efron, "Bootstrap methods: another look at the jackknife" (1979), over blocks, as D. Politis and
J. Romano do for dependent data ("The stationary bootstrap", 1994): the values of one sample hang
together, so whole blocks of samples are drawn, not values. As many blocks as there are are drawn
with replacement, their histograms are added up, and the method finds its range again; the middle
share of the ranges so found is the interval. Histograms add exactly, so no sample is needed.

Not for the maximum: a resample's largest value is the set's own largest two times in three,
whatever the tail is like, so the bootstrap of an extreme does not tell how far the next samples
would go.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qdist.errors import ConfigError
from qdist.stats import grid
from qdist.stats.histogram import Density, Histogram
from qdist.threshold.blocks import merged
from qdist.threshold.clip import Levels, Threshold
from qdist.threshold.registry import find_threshold, find_thresholds, resolve
from qdist.threshold.sentinel import split_sentinels

RESAMPLES = 100
CONFIDENCE = 0.9
SEED = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Interval:
    """Where the range of another calibration set of this size would lie.

    ``threshold``: of all blocks together. ``low`` and ``high``: the interval of either bound, in
    units of the tensor, ascending. ``confidence``: the share of the resampled bounds inside.
    ``n_blocks`` with values in this tensor, ``n_samples`` in all of them.
    """

    threshold: Threshold
    low: tuple[float, float]
    high: tuple[float, float]
    confidence: float
    n_blocks: int
    n_samples: int

    @property
    def relative_width(self) -> float:
        """The wider of the two intervals, as a share of the width of the range; 0 without one."""
        width = self.threshold.high - self.threshold.low
        widest = max(self.low[1] - self.low[0], self.high[1] - self.high[0])
        return widest / width if width > 0 else 0.0

    def more_samples_for(self, relative_width: float) -> int:
        """How many more samples would bring `relative_width` to this, > 0.

        The interval narrows with the root of the number of samples, so this is an estimate that
        is worth as much as the interval. 0 where it is narrow enough.
        """
        if not relative_width > 0:
            raise ValueError(f"a width above 0, got {relative_width}")
        needed = self.n_samples * (self.relative_width / relative_width) ** 2
        return max(0, math.ceil(needed * (1 - 1e-12)) - self.n_samples)


def bootstrap(
    blocks: Sequence[Histogram],
    levels: Levels,
    method: str,
    parameters: Mapping[str, Any] | None = None,
    *,
    n_samples: int,
    resamples: int = RESAMPLES,
    confidence: float = CONFIDENCE,
    seed: int = SEED,
) -> Interval:
    """The interval of the range that ``method`` finds, over one tensor's histograms of ``blocks``.

    The same blocks, in the same order, and the same seed give the same interval. Sentinels count
    for nothing (`split_sentinels` on all blocks together). Raises QD107 for ``max`` and for a
    percentile of all values, QD501, QD502, QD104, and `ValueError` for fewer than two blocks, no
    resamples, or a confidence outside 0..1.
    """
    _check(blocks, resamples, confidence)
    refuse_extremes(method, parameters)
    table = _Table.of(blocks)
    whole = table.density(np.ones(len(blocks)))
    rng = np.random.default_rng(seed)
    weights = rng.multinomial(len(blocks), np.full(len(blocks), 1 / len(blocks)), size=resamples)
    found = find_thresholds(
        [table.density(row.astype(np.float64)) for row in weights], levels, method, parameters
    )
    tail = (1 - confidence) / 2 * 100
    low = np.percentile([each.low for each in found], [tail, 100 - tail])
    high = np.percentile([each.high for each in found], [tail, 100 - tail])
    return Interval(
        threshold=find_threshold(whole, levels, method, parameters),
        low=(float(low[0]), float(low[1])),
        high=(float(high[0]), float(high[1])),
        confidence=confidence,
        n_blocks=int((table.counts.sum(axis=1) > 0).sum()),
        n_samples=n_samples,
    )


def refuse_extremes(method: str, parameters: Mapping[str, Any] | None = None) -> None:
    """Raise QD107 for a method whose range is an extreme of the values, or given."""
    name, given = resolve(method, parameters)
    is_extreme = name == "max" or (name == "percentile" and given.get("percent") == 100)
    if is_extreme or "threshold" in given:
        raise ConfigError(
            "QD107",
            where=f"the interval of method {method}",
            got="a range that is given" if "threshold" in given else "an extreme of the values",
            expected="a method whose range moves with the whole distribution",
            mend="ask for the interval of mse, percentile, kl or another method",
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Table:
    """Counts of all blocks over the bins of any, ascending by value and without sentinels.

    ``lower``, ``upper`` float64[n]; ``counts`` float64[blocks, n]; ``extrema`` float64[blocks, 2].
    """

    lower: NDArray[np.float64]
    upper: NDArray[np.float64]
    counts: NDArray[np.float64]
    extrema: NDArray[np.float64]

    @classmethod
    def of(cls, blocks: Sequence[Histogram]) -> _Table:
        whole = merged(blocks)
        body = split_sentinels(whole.finite).body
        bins = whole.bins[(whole.bins & np.uint16(0x7FFF)) < grid.POSITIVE_INFINITY]
        bins = bins[grid.ascending(bins)]
        bins = bins[bins.size - body.counts.size :]
        edges = grid.edges_of(bins)
        place = np.full(grid.N_BINS, -1, np.int64)
        place[bins] = np.arange(bins.size)
        counts = np.zeros((len(blocks), bins.size))
        for row, block in zip(counts, blocks, strict=True):
            to = place[block.bins]
            row[to[to >= 0]] = block.counts[to >= 0]
        return cls(
            lower=edges.lower,
            upper=edges.upper,
            counts=counts,
            extrema=np.array([(block.minimum, block.maximum) for block in blocks]),
        )

    def density(self, weights: NDArray[np.float64]) -> Density:
        """All blocks together, each counted as often as its weight says."""
        summed = weights @ self.counts
        some = summed > 0
        drawn = self.extrema[weights > 0]
        low, high = float(drawn[:, 0].min()), float(drawn[:, 1].max())
        return Density(
            lower=np.clip(self.lower[some], low, high),
            upper=np.clip(self.upper[some], low, high),
            counts=summed[some],
        )


def _check(blocks: Sequence[Histogram], resamples: int, confidence: float) -> None:
    if len(blocks) < 2 or resamples < 1 or not 0 < confidence < 1:
        raise ValueError(
            f"{len(blocks)} blocks, {resamples} resamples, a confidence of {confidence}"
        )
