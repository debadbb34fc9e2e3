"""When a trial that gives scores of single samples may end, because it has lost.

The trial's scores are paired with those that another one, which it has to beat, had for the same
samples. Two
rules, both deterministic, each looked at after every sample:

- *certain*: all scores lie in a known range, and even the best of them for every sample that is
  left cannot lift the trial's mean to the best one's. Needs no assumption.
- *confident*: the upper end of a confidence sequence for the mean paired difference is below 0.
  It is the predictable plug-in empirical Bernstein sequence of Waudby-Smith and Ramdas (Estimating
  means of bounded random variables by betting, 2024, theorem 2), one-sided. It holds at all sample
  numbers at once, so looking after every sample costs nothing: a trial whose true mean is not
  below the best one's is stopped with probability ``risk`` at most. "True" takes the samples for
  draws from one distribution: a set sorted by difficulty breaks that, so shuffle it once.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from qdist.errors import ConfigError


@dataclass(frozen=True, slots=True, kw_only=True)
class Incumbent:
    """What a trial has to beat: per-sample scores of the best trial, in order, all in
    ``sample_range``. ``risk``: chance of stopping one that would not have lost, in (0, 1).

    The search takes the best trial of the rounds before whose plan costs no more, so that where a
    trial stops does not depend on timing. Raises `qdist.errors.ConfigError` QD104.
    """

    scores: tuple[float, ...]
    sample_range: tuple[float, float]
    higher_is_better: bool = True
    risk: float = 0.01

    def __post_init__(self) -> None:
        low, high = check_range(self.sample_range)
        outside = [score for score in self.scores if not low <= score <= high]
        if outside or not 0 < self.risk < 1:
            raise ConfigError(
                "QD104",
                where="early stop",
                got=f"score {outside[0]}" if outside else f"risk {self.risk}",
                expected=f"scores in [{low:g}, {high:g}] and a risk above 0 and below 1",
                mend="correct evaluation.sample_range or evaluation.stop_risk",
            )

    @property
    def mean(self) -> float:
        """Mean of the scores."""
        return math.fsum(self.scores) / max(1, len(self.scores))

    def is_no_worse_than(self, mean: float) -> bool:
        """Whether what has lost against scores of that mean has lost against these too."""
        sign = 1.0 if self.higher_is_better else -1.0
        return sign * self.mean >= sign * mean


class Race:
    """One trial against an incumbent. Sample by sample; one thread."""

    def __init__(self, incumbent: Incumbent) -> None:
        self._incumbent = incumbent
        low, high = incumbent.sample_range
        self._width = high - low
        self._sign = 1.0 if incumbent.higher_is_better else -1.0
        self._log = math.log(1 / incumbent.risk)
        ours = [self._sign * score for score in incumbent.scores]
        best = high if incumbent.higher_is_better else -low
        # The most that samples i.. can win over the incumbent's, summed from the end.
        self._room = [0.0] * (len(ours) + 1)
        for i in range(len(ours) - 1, -1, -1):
            self._room[i] = self._room[i + 1] + best - ours[i]
        self._ours = ours
        self._n = 0
        self._lead = 0.0
        # Of the differences moved to [0, 1]: sums, weighted sums and what the bound adds up.
        self._sum = 0.0
        self._squares = 0.0
        self._weights = self._weighted = self._slack = 0.0

    def lost(self, scores: Sequence[float]) -> int | None:
        """Take the scores of the next samples; after how many of all the trial had lost, if so.

        Samples beyond the incumbent's are not looked at: nothing is known to compare them with.
        """
        for score in scores:
            if self._n >= len(self._ours):
                return None
            self._add(self._sign * score - self._ours[self._n])
            if self._is_lost():
                return self._n
        return None

    def _add(self, difference: float) -> None:
        self._lead += difference
        # From [-width, width] to [0, 1].
        x = (difference / self._width + 1) / 2
        mean = (0.5 + self._sum) / (self._n + 1)
        variance = (0.25 + self._squares) / (self._n + 1)
        t = self._n + 1
        weight = min(0.5, math.sqrt(2 * self._log / (variance * t * math.log(1 + t))))
        self._weights += weight
        self._weighted += weight * x
        self._slack += 4 * (x - mean) ** 2 * (-math.log1p(-weight) - weight) / 4
        self._n = t
        self._sum += x
        after = (0.5 + self._sum) / (t + 1)
        self._squares += (x - after) ** 2

    def _is_lost(self) -> bool:
        # Rounding must not turn a tie into a loss.
        tolerance = 1e-9 * self._width * max(1, len(self._ours))
        if self._lead + self._room[self._n] < -tolerance:
            return True
        upper = (self._weighted + self._log + self._slack) / self._weights
        return upper < 0.5


def check_range(sample_range: tuple[float, float]) -> tuple[float, float]:
    """The range. Raises `qdist.errors.ConfigError` QD104 unless it is finite and not empty."""
    low, high = sample_range
    if not (math.isfinite(low) and math.isfinite(high) and low < high):
        raise ConfigError(
            "QD104",
            where="evaluation.sample_range",
            got=f"[{low}, {high}]",
            expected="the smallest and the largest score of a sample",
            mend="give both, as in evaluation.sample_range=[0,1]",
        )
    return low, high
