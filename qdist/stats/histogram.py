"""The counts of one tensor, and what can be read off them."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache, cached_property

import numpy as np
from numpy.typing import NDArray

from qdist.stats import grid
from qdist.stats.density_kernels import (
    intervals_of,
    magnitudes_of,
    points_of,
    sum_of_squares,
)
from qdist.stats.kernels import mass_below

_NONE = np.zeros(0, np.float64)


@dataclass(frozen=True, slots=True, kw_only=True)
class Exact:
    """The finite values of the bins of largest magnitude, known exactly.

    ``values`` float64[n] ascending and unique, +0 and -0 as one; ``counts`` float64[n].
    ``first_bin``: they are all the values of the bins of this magnitude (a bin without its sign)
    and larger ones; with 0 they are all finite values.
    """

    values: NDArray[np.float64]
    counts: NDArray[np.float64]
    first_bin: int

    @classmethod
    def of_table(cls, values: NDArray[np.float32], counts: NDArray[np.uint64]) -> Exact:
        """From a value table, which has every value."""
        finite = np.isfinite(values)
        unique, place = np.unique(values[finite].astype(np.float64), return_inverse=True)
        # Adding up integers below 2^53 is exact in any order.
        summed = np.bincount(place, weights=counts[finite].astype(np.float64))
        return cls(values=unique, counts=summed.astype(np.float64), first_bin=0)

    @classmethod
    def of_largest(cls, largest: NDArray[np.float32], limit: int) -> Exact:
        """From the values of largest magnitude, descending, of which ``limit`` are kept at most.

        Of the bin of the least of them there may be more, so that bin is left out.
        """
        first_bin = 0
        if limit <= 0:
            first_bin = grid.POSITIVE_INFINITY
        elif largest.size >= limit:
            first_bin = int(grid.bin_of(largest[-1:])[0] & np.uint16(0x7FFF)) + 1
        # They descend, so those of lesser bins are the last.
        n_known = int(np.count_nonzero((grid.bin_of(largest) & np.uint16(0x7FFF)) >= first_bin))
        values, counts = points_of(largest, n_known)
        return cls(values=values, counts=counts, first_bin=first_bin)


@dataclass(frozen=True, kw_only=True)
class Histogram:
    """Sparse counts of one tensor over the grid's bins.

    ``bins`` uint16[n] ascending, ``counts`` uint64[n] > 0; ``minimum`` and ``maximum`` are the
    exact extrema of the finite values as float32 (``+inf``/``-inf`` when there are none).
    ``exact``: what is known of the values beyond their bins; None for nothing.
    """

    bins: NDArray[np.uint16]
    counts: NDArray[np.uint64]
    minimum: float
    maximum: float
    exact: Exact | None = None

    def __post_init__(self) -> None:
        if self.bins.shape != self.counts.shape or self.bins.ndim != 1:
            raise ValueError(f"{self.bins.shape} bins but {self.counts.shape} counts")

    @property
    def n_values(self) -> int:
        """How many values were counted, NaNs and infinities included."""
        return int(self.counts.sum())

    @property
    def n_nan(self) -> int:
        """How many of them were NaN."""
        return int(self.counts[grid.is_nan_bin(self.bins)].sum())

    @property
    def n_infinite(self) -> int:
        """How many of them were infinite."""
        return int(self.counts[grid.is_infinite_bin(self.bins)].sum())

    @property
    def n_zero(self) -> int:
        """How many of them were zero (or below 2^-133)."""
        return int(self.counts[(self.bins & np.uint16(0x7FFF)) == 0].sum())

    @cached_property
    def finite(self) -> Density:
        """The finite values as a density on intervals, ascending; exact ones as point masses."""
        first_bin, points, masses = int(grid.POSITIVE_INFINITY), _NONE, _NONE
        if self.exact is not None:
            first_bin, points = min(first_bin, self.exact.first_bin), self.exact.values
            masses = self.exact.counts
        edges = _magnitude_edges()
        lower, upper, counts = intervals_of(
            self.bins,
            self.counts,
            first_bin,
            (self.minimum, self.maximum),
            edges.lower,
            edges.upper,
            points,
            masses,
        )
        return Density(lower=lower, upper=upper, counts=counts)


@cache
def _magnitude_edges() -> grid.BinEdges:
    """The ends of all finite bins without a sign."""
    return grid.edges_of(np.arange(grid.POSITIVE_INFINITY, dtype=np.uint16))


@dataclass(frozen=True, kw_only=True)
class Density:
    """Finite values spread evenly over ascending, disjoint intervals.

    ``lower``, ``upper``, ``counts``: float64[n]. An interval of no width is a point mass.
    """

    lower: NDArray[np.float64]
    upper: NDArray[np.float64]
    counts: NDArray[np.float64]

    @property
    def total(self) -> float:
        """How many values there are."""
        return float(self.counts.sum())

    @property
    def is_empty(self) -> bool:
        """Whether there are none."""
        return self.counts.size == 0

    @property
    def minimum(self) -> float:
        """The smallest value; 0 when empty."""
        return float(self.lower[0]) if self.counts.size else 0.0

    @property
    def maximum(self) -> float:
        """The largest value; 0 when empty."""
        return float(self.upper[-1]) if self.counts.size else 0.0

    @cached_property
    def centers(self) -> NDArray[np.float64]:
        """The middle of each interval."""
        return (self.lower + self.upper) / 2

    @cached_property
    def second_moment(self) -> float:
        """Mean of x^2 over the density; 0 when empty."""
        if self.is_empty:
            return 0.0
        return sum_of_squares(self.lower, self.upper, self.counts) / self.total

    def magnitudes(self) -> Density:
        """The density of |x|. Where intervals of both signs overlap they become one."""
        if self.is_empty:
            return self
        lower, upper, counts = magnitudes_of(self.lower, self.upper, self.counts)
        return Density(lower=lower, upper=upper, counts=counts)

    def share_outside(self, low: float, high: float) -> float:
        """Share of the values below ``low`` or above ``high``."""
        if self.is_empty:
            return 0.0
        below = (mass_below(self.lower, self.upper, self.counts, x) for x in (high, low))
        inside = max(next(below) - next(below), 0.0)
        points = self.counts[(self.lower == self.upper) & (self.lower == low)].sum()
        return float(max(0.0, 1.0 - (inside + points) / self.total))
