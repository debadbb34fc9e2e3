"""Two models' scores on the same samples: how far they differ, and how sure that is.

A metric is one sum over samples over another (`qdist.evaluate.metrics`), so a difference is
resampled over the samples that both models have seen: the paired bootstrap (Efron and Tibshirani,
An Introduction to the Bootstrap, 1993, chapter 13). Of samples that are right or wrong as a whole,
McNemar's exact test (1947) says whether the few that tell two models apart may be chance.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.special import bdtr

from qdist.evaluate.metrics import Metric
from qdist.evaluate.metrics.batch import Parts

CONFIDENCE = 0.95
N_DRAWS = 2000
SEED = 20240501
_DRAWN_ELEMENTS = 1 << 22
"""Counts of samples in draws that are held at a time, 8 bytes each."""

Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True, kw_only=True)
class Difference:
    """One model's metric less another's; ``low .. high`` holds `CONFIDENCE` of it over draws of
    samples. NaN or infinite where the metric is not finite in some draw."""

    mean: float
    low: float
    high: float

    @property
    def is_sure(self) -> bool:
        """Whether the interval leaves 0 out."""
        return self.low > 0 or self.high < 0

    def turned(self) -> Difference:
        """The other model's metric less the one's."""
        return Difference(mean=-self.mean, low=-self.high, high=-self.low)


@dataclass(frozen=True, slots=True, kw_only=True)
class Discordant:
    """Of samples that are right or wrong as a whole: on how many only one of two models is right,
    and the exact two-sided p-value of McNemar's test that this is chance. Resampling finds too
    narrow an interval where these are few: it is sure of 4 to 0, which chance does in one of 8.
    """

    ours: int
    theirs: int
    p: float


class Resampled:
    """A metric of several models over the same draws of samples: float64[draws, models].

    ``parts``: of each model, numerators and denominators of the same samples in one order, float64
    [n] each. Equal parts give equal draws. Raises `ValueError` for other numbers of samples.
    """

    def __init__(self, metric: Metric, parts: Sequence[Parts]) -> None:
        sizes = {array.size for pair in parts for array in pair}
        if len(sizes) != 1 or not min(sizes):
            raise ValueError(f"parts of {sorted(sizes)} samples")
        above, below = (np.stack([pair[i] for pair in parts], axis=1) for i in (0, 1))
        with np.errstate(all="ignore"):
            self._whole: Floats = metric.finish(above.sum(axis=0) / below.sum(axis=0))
            drawn = [metric.finish(d @ above / (d @ below)) for d in _draws(sizes.pop())]
        self._drawn: Floats = np.concatenate(drawn)

    def difference(self, ours: int, theirs: int) -> Difference:
        """Of model number ``ours`` less number ``theirs``."""
        tail = 50 * (1 - CONFIDENCE)
        # A draw without its better samples may be infinite, as perplexities are.
        with np.errstate(all="ignore"):
            apart = self._drawn[:, ours] - self._drawn[:, theirs]
            low, high = np.percentile(apart, (tail, 100 - tail))
        mean = self._whole[ours] - self._whole[theirs]
        return Difference(mean=float(mean), low=float(low), high=float(high))


def paired(metric: Metric, ours: Parts, theirs: Parts) -> Difference:
    """The metric of one model less that of another. Raises `ValueError` as `Resampled`."""
    return Resampled(metric, (ours, theirs)).difference(0, 1)


def discordant(ours: Parts, theirs: Parts) -> Discordant | None:
    """None where a sample is more than right or wrong."""
    (a, n), (b, _) = ours, theirs
    if not (n == 1).all() or not np.isin(np.concatenate([a, b]), (0.0, 1.0)).all():
        return None
    only_a, only_b = int(np.sum(a > b)), int(np.sum(b > a))
    p = min(1.0, 2 * float(bdtr(min(only_a, only_b), only_a + only_b, 0.5)))
    return Discordant(ours=only_a, theirs=only_b, p=p)


def _draws(n: int) -> Iterator[Floats]:
    """float64[some, n]: how often each sample is in each of some draws; `N_DRAWS` in all."""
    rng = np.random.default_rng(SEED)
    shares = np.full(n, 1 / n)
    step = max(1, _DRAWN_ELEMENTS // n)
    for start in range(0, N_DRAWS, step):
        size = min(step, N_DRAWS - start)
        yield rng.multinomial(n, shares, size=size).astype(np.float64)
