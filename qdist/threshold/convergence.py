"""When enough has been measured: a policy on clipping ranges at growing prefixes of the samples.

Ranges are compared at prefixes of the manifest whose every micro-batch has been measured, and at
sizes that follow from their number alone. So the decision is the same for any number of workers
and any order in which their results arrive: what was measured beyond the prefix where the policy
stops is not used.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from qdist.errors import ConfigError
from qdist.stats.histogram import Histogram
from qdist.threshold.clip import Levels, Threshold
from qdist.threshold.registry import check_method, find_threshold
from qdist.threshold.sentinel import split_sentinels

_INT8 = Levels(low=-128, high=127, symmetric=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class Prefix:
    """The ranges of all tensors after the first ``n_batches`` micro-batches."""

    n_batches: int
    thresholds: Mapping[str, Threshold]


@dataclass(frozen=True, slots=True, kw_only=True)
class Decision:
    """``stop``: the ranges have converged. ``n_used``: micro-batches to use: of the prefix at which
    the policy stops, or of the longest one so far. ``worst``: up to five tensors with the largest
    change at that prefix, (name, change) from the largest. ``n_moving``: tensors that changed by
    more than the tolerance there. ``reason``: in words, for the report."""

    stop: bool
    n_used: int
    worst: tuple[tuple[str, float], ...]
    n_moving: int
    reason: str


def prefix_sizes(
    n_micro_batches: int, *, first: int = 8, growth: float = 2.0, every: int | None = None
) -> tuple[int, ...]:
    """Sizes of the prefixes to compare, ascending, in micro-batches; the last is all of them.

    From ``first`` on, each ``growth`` times the one before, rounded up; or with ``every`` its
    multiples. Raises `ValueError` for sizes below 1 or a growth of no more than 1.

    >>> prefix_sizes(100), prefix_sizes(50, every=20), prefix_sizes(5)
    ((8, 16, 32, 64, 100), (20, 40, 50), (5,))
    """
    if n_micro_batches < 1 or first < 1 or growth <= 1 or (every is not None and every < 1):
        raise ValueError(f"{n_micro_batches} micro-batches, {first=}, {growth=}, {every=}")
    sizes = []
    size = every or first
    while size < n_micro_batches:
        sizes.append(size)
        size = size + every if every else math.ceil(size * growth)
    return (*sizes, n_micro_batches)


@dataclass(frozen=True, slots=True, kw_only=True)
class Convergence:
    """Stop when ranges change by no more than ``tolerance`` at ``patience`` prefixes in a row.

    ``tolerance``  largest change that counts as none, > 0; see `change`.
    ``patience``   how many prefixes in a row, >= 1.
    ``method``, ``parameters``, ``levels``  how ranges are found, by `threshold.registry`.
    ``measure``    ``range``: change of the range; ``error``: of its expected squared error.
    ``exempt``     share of the tensors, 0 <= exempt < 1, that may change by more.

    Raises QD104, and QD501, QD502 for the method.
    """

    tolerance: float = 0.05
    patience: int = 2
    method: str = "mse"
    parameters: Mapping[str, Any] = field(default_factory=dict)
    levels: Levels = _INT8
    measure: Literal["range", "error"] = "range"
    exempt: float = 0.0

    def __post_init__(self) -> None:
        check_method(self.method, self.parameters)
        for name, fits, expected in (
            ("tolerance", 0 < self.tolerance < math.inf, "a number above 0"),
            ("patience", self.patience >= 1, "at least 1"),
            ("exempt", 0 <= self.exempt < 1, "a share from 0 to below 1"),
            ("measure", self.measure in ("range", "error"), "range or error"),
        ):
            if not fits:
                raise ConfigError(
                    "QD104",
                    where=f"calibration.early_stop.{name}",
                    got=repr(getattr(self, name)),
                    expected=expected,
                    mend="change it",
                )

    def measured(self, n_batches: int, histograms: Mapping[str, Histogram]) -> Prefix:
        """The ranges by the merged histograms of a complete prefix, by tensor."""
        return Prefix(
            n_batches=n_batches,
            thresholds={
                tensor: find_threshold(
                    split_sentinels(histogram.finite).body,
                    self.levels,
                    self.method,
                    self.parameters,
                )
                for tensor, histogram in histograms.items()
            },
        )

    def decide(self, history: Sequence[Prefix]) -> Decision:
        """Whether to stop, by the prefixes so far, ascending and of the same tensors.

        The first prefix that meets the condition decides, however many follow, so that running
        ahead changes nothing. Raises `ValueError` for no prefix, another order, other tensors.
        """
        _check(history)
        calm = 0
        changes: dict[str, float] = {}
        for before, after in itertools.pairwise(history):
            changes = {
                tensor: change(before.thresholds[tensor], found, self.measure)
                for tensor, found in after.thresholds.items()
            }
            calm = calm + 1 if self._n_moving(changes) <= self._n_exempt(changes) else 0
            if calm == self.patience:
                return self._decision(True, after, changes)
        return self._decision(False, history[-1], changes)

    def _n_moving(self, changes: Mapping[str, float]) -> int:
        return sum(each > self.tolerance for each in changes.values())

    def _n_exempt(self, changes: Mapping[str, float]) -> int:
        return math.floor(self.exempt * len(changes))

    def _decision(self, stop: bool, at: Prefix, changes: Mapping[str, float]) -> Decision:
        ranked = sorted(changes.items(), key=lambda item: (-item[1], item[0]))
        n_moving = self._n_moving(changes)
        if not changes:
            reason = "one prefix alone shows no change"
        else:
            tensor, most = ranked[0]
            reason = (
                f"{n_moving} of {len(changes)} tensors changed by more than {self.tolerance:.2%} "
                f"up to {at.n_batches} micro-batches, {tensor} the most with {most:.2%}"
            )
        return Decision(
            stop=stop,
            n_used=at.n_batches,
            worst=tuple(ranked[:5]),
            n_moving=n_moving,
            reason=reason,
        )


def change(before: Threshold, after: Threshold, measure: str = "range") -> float:
    """How much a range changed, 0 for not at all.

    ``range``: the larger move of a bound, as a share of the wider of the two ranges. ``error``:
    the change of the expected squared error, as a share of the larger of the two.
    """
    if measure == "error":
        return _share(
            abs(after.expected_mse - before.expected_mse),
            max(after.expected_mse, before.expected_mse),
        )
    return _share(
        max(abs(after.low - before.low), abs(after.high - before.high)),
        max(after.high - after.low, before.high - before.low),
    )


def _share(part: float, whole: float) -> float:
    return part / whole if whole > 0 else 0.0


def _check(history: Sequence[Prefix]) -> None:
    sizes = [prefix.n_batches for prefix in history]
    if not sizes or any(b <= a for a, b in itertools.pairwise(sizes)):
        raise ValueError(f"prefixes of {sizes} micro-batches, expected ascending sizes")
    if any(prefix.thresholds.keys() != history[0].thresholds.keys() for prefix in history):
        raise ValueError("prefixes of different tensors")
