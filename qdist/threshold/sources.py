"""Densities of groups of channels and of arrays, for any method to work on.

A stored calibration has histograms per channel or group where they were asked for
(`qdist.stats.groups`); a weight is an array. Both become one `Density` a row, so that a threshold
per tensor, per channel or per group is found in the same way for activations and weights.
"""

from __future__ import annotations

import itertools

import numpy as np
from numpy.typing import NDArray

from qdist.stats import grid
from qdist.stats.channels import Channels
from qdist.stats.groups import GROUP_SHIFT, GroupHistograms
from qdist.stats.histogram import Density, Histogram

N_EXACT = 4096
"""Up to so many values of an array are kept as they are: about as many as a row has bins."""
_PIECE_ELEMENTS = 1 << 22
_SIGNED = 1 << 17
"""More than there are bins, so that rows and bins share one sortable key."""


def group_densities(
    found: GroupHistograms, channels: Channels | None = None
) -> tuple[Density, ...]:
    """The finite values of every group, in the order of groups; empty for one without.

    ``channels``: exact extrema of the channels along the same axis; they cut the outermost bins.
    """
    n = found.n_groups
    rows = (found.keys >> GROUP_SHIFT).astype(np.int64)
    fine = grid.leading((found.keys & 0xFFFF).astype(np.uint16), found.mantissa_bits)
    # Without a mantissa, infinities and NaNs share the last bin; both are left out.
    finite = (fine & np.uint16(0x7FFF)) < grid.POSITIVE_INFINITY
    minimum, maximum = np.full(n, -np.inf), np.full(n, np.inf)
    if channels is not None and channels.minimum.size == found.n_channels:
        starts = np.arange(0, channels.minimum.size, found.group_size)
        minimum = np.minimum.reduceat(channels.minimum, starts).astype(np.float64)
        maximum = np.maximum.reduceat(channels.maximum, starts).astype(np.float64)
    return _rows(
        n,
        rows[finite],
        fine[finite],
        found.counts[finite].astype(np.float64),
        np.uint16(1 << (grid.MANTISSA_BITS - found.mantissa_bits)),
        minimum,
        maximum,
    )


def array_densities(
    values: NDArray[np.floating], axis: int | None = None, *, group_size: int = 1
) -> tuple[Density, ...]:
    """The finite values of an array of any shape, per index of ``axis``; with None of all of it.

    ``group_size`` indices in a row share a density; the last group may be smaller. Raises
    `ValueError` for a size below 1.
    """
    if group_size < 1:
        raise ValueError(f"a group has at least 1 channel, got {group_size}")
    moved = values.reshape(1, -1) if axis is None else np.moveaxis(values, axis, 0)
    flat = moved.reshape(moved.shape[0], values.size // max(1, moved.shape[0]))
    return tuple(
        _density(flat[first : first + group_size]) for first in range(0, flat.shape[0], group_size)
    )


def _density(values: NDArray[np.floating]) -> Density:
    """Of float[channels, n]: every value as a point where they are few, else the grid's bins."""
    if values.size <= N_EXACT:
        finite = values[np.isfinite(values)].astype(np.float64)
        points, times = np.unique(finite, return_counts=True)
        return Density(lower=points, upper=points, counts=times.astype(np.float64))
    counts = np.zeros(grid.N_BINS, np.int64)
    minimum, maximum = np.inf, -np.inf
    step = max(1, _PIECE_ELEMENTS // values.shape[0])
    for i in range(0, values.shape[1], step):
        piece = values[:, i : i + step].astype(np.float32, copy=False)
        finite = piece[np.isfinite(piece)]
        minimum = min(minimum, float(finite.min(initial=np.inf)))
        maximum = max(maximum, float(finite.max(initial=-np.inf)))
        counts += np.bincount(grid.bin_of(finite), minlength=grid.N_BINS)
    hit = np.flatnonzero(counts)
    return Histogram(
        bins=hit.astype(np.uint16),
        counts=counts[hit].astype(np.uint64),
        minimum=minimum,
        maximum=maximum,
    ).finite


def _rows(
    n: int,
    rows: NDArray[np.int64],
    bins: NDArray[np.uint16],
    counts: NDArray[np.float64],
    n_fine: np.uint16,
    minimum: NDArray[np.float64],
    maximum: NDArray[np.float64],
) -> tuple[Density, ...]:
    """One density a row, of bins that begin at ``bins`` of the full grid and cover ``n_fine``."""
    signed = bins.astype(np.int64)
    signed = np.where(signed >= 0x8000, 0x7FFF - signed, signed)
    order = np.argsort(rows * _SIGNED + signed, kind="stable")
    rows, bins, counts = rows[order], bins[order], counts[order]
    near = grid.edges_of(bins)
    far = grid.edges_of(bins + np.uint16(n_fine - 1))
    negative = (bins & np.uint16(0x8000)) != 0
    lower = np.where(negative, far.lower, near.lower)
    upper = np.where(negative, near.upper, far.upper)
    # What a coarse bin holds next to zero is below 2^-126: a point, as on the full grid.
    zero = (bins & np.uint16(0x7FFF)) == 0
    lower, upper = np.where(zero, 0.0, lower), np.where(zero, 0.0, upper)
    lower = np.clip(lower, minimum[rows], maximum[rows])
    upper = np.clip(upper, minimum[rows], maximum[rows])
    ends = np.searchsorted(rows, np.arange(n + 1))
    return tuple(
        Density(lower=lower[a:b], upper=upper[a:b], counts=counts[a:b])
        for a, b in itertools.pairwise(ends)
    )
