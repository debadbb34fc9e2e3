"""The bins: a float32 belongs to the bin of its top 16 bits.

That is the value truncated to bfloat16: sign, 8 exponent bits, 7 mantissa bits. 65,536 counters
cover every float32 there is, so no range has to be known first, and merging is integer addition.

Coarser grids keep fewer mantissa bits: with ``m`` of them, a bin is the top ``9 + m`` bits, and its
count is exactly the sum of those of the ``2 ** (7 - m)`` finer bins that it covers. With fewer than
7 mantissa bits a value's NaNs stay apart from its infinities only by the mantissa's top bit, which
every quiet NaN has; with none, infinities and NaNs of one sign share a bin.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

N_BINS = 1 << 16
VERSION = 2
"""Version of the meaning of a bin; part of a calibration's identity."""

MANTISSA_BITS = 7
"""Mantissa bits of the grid's own bins."""

POSITIVE_INFINITY = 0x7F80
NEGATIVE_INFINITY = 0xFF80


def bin_of(values: NDArray[np.float32]) -> NDArray[np.uint16]:
    """The bin of each float32: any shape in, same shape out.

    >>> bin_of(np.array([0.0, 1.0, -1.0], np.float32)).tolist()
    [0, 16256, 49024]
    """
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    return (bits >> np.uint32(16)).astype(np.uint16)


def is_nan_bin(bins: NDArray[np.uint16]) -> NDArray[np.bool_]:
    """Whether a bin holds NaNs. NaNs whose payload lies in the low 16 bits alone fall into the
    bins of infinity; the counting kernel moves them to the quiet-NaN bin of their sign."""
    magnitude = bins & np.uint16(0x7FFF)
    return magnitude > POSITIVE_INFINITY


def is_infinite_bin(bins: NDArray[np.uint16]) -> NDArray[np.bool_]:
    """Whether a bin holds an infinity."""
    return (bins & np.uint16(0x7FFF)) == POSITIVE_INFINITY


def check_mantissa_bits(mantissa_bits: int) -> None:
    """Raise `ValueError` unless 0..7."""
    if not 0 <= mantissa_bits <= MANTISSA_BITS:
        raise ValueError(f"mantissa_bits must lie in 0..{MANTISSA_BITS}, got {mantissa_bits}")


def n_bins(mantissa_bits: int) -> int:
    """How many bins the grid of so many mantissa bits has."""
    check_mantissa_bits(mantissa_bits)
    return 1 << (9 + mantissa_bits)


def coarsen(
    bins: NDArray[np.uint16],
    counts: NDArray[np.uint64],
    mantissa_bits: int,
    *,
    from_bits: int = MANTISSA_BITS,
) -> tuple[NDArray[np.uint16], NDArray[np.uint64]]:
    """Sparse counts on the grid of ``mantissa_bits``, from those of ``from_bits``: exact sums.

    ``bins`` ascending and unique; so are the bins returned. Raises `ValueError` when asked for more
    mantissa bits than there are.

    >>> bins, counts = np.array([0x3F80, 0x3F81], np.uint16), np.array([2, 3], np.uint64)
    >>> [part.tolist() for part in coarsen(bins, counts, 3)]
    [[1016], [5]]
    """
    check_mantissa_bits(mantissa_bits)
    check_mantissa_bits(from_bits)
    if mantissa_bits > from_bits:
        raise ValueError(f"bins of {from_bits} mantissa bits cannot be split into {mantissa_bits}")
    if bins.size == 0:
        return bins.astype(np.uint16), counts.astype(np.uint64)
    coarse = bins >> np.uint16(from_bits - mantissa_bits)
    first = np.flatnonzero(np.append(True, coarse[1:] != coarse[:-1]))
    return coarse[first], np.add.reduceat(counts, first)


def leading(bins: NDArray[np.uint16], mantissa_bits: int) -> NDArray[np.uint16]:
    """The first bin of the full grid that each coarser bin covers."""
    check_mantissa_bits(mantissa_bits)
    return (bins << np.uint16(MANTISSA_BITS - mantissa_bits)).astype(np.uint16)


@dataclass(frozen=True, slots=True, kw_only=True)
class BinEdges:
    """Bins as intervals of the real line, float64 arrays of one length, ascending.

    A bin holds the values between ``lower`` and ``upper``; ``lower < upper`` but for zero.
    """

    lower: NDArray[np.float64]
    upper: NDArray[np.float64]


def edges_of(bins: NDArray[np.uint16]) -> BinEdges:
    """The intervals of finite bins, in the order given.

    The bins of +0 and -0 hold what is smaller than 2^-133 too; they count as the point zero.
    """
    magnitude = (bins & np.uint16(0x7FFF)).astype(np.uint32)
    near = (magnitude << np.uint32(16)).view(np.float32).astype(np.float64)
    above = (magnitude + np.uint32(1)) << np.uint32(16)
    # The bin below infinity ends at the largest float32, not at infinity.
    above = np.minimum(above, np.uint32(0x7F7FFFFF))
    far = above.view(np.float32).astype(np.float64)
    zero = magnitude == 0
    near = np.where(zero, 0.0, near)
    far = np.where(zero, 0.0, far)
    negative = (bins & np.uint16(0x8000)) != 0
    return BinEdges(lower=np.where(negative, -far, near), upper=np.where(negative, -near, far))


def ascending(bins: NDArray[np.uint16]) -> NDArray[np.intp]:
    """The order that sorts finite bins by value: from the most negative to the most positive."""
    signed = bins.astype(np.int32)
    key = np.where(signed >= 0x8000, 0x7FFF - signed, signed)
    return np.argsort(key, kind="stable")
