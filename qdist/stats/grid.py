"""The bins: a float32 belongs to the bin of its top 16 bits.

That is the value truncated to bfloat16: sign, 8 exponent bits, 7 mantissa bits. 65,536 counters
cover every float32 there is, so no range has to be known first, and merging is integer addition.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

N_BINS = 1 << 16
VERSION = 1
"""Version of the meaning of a bin; part of a calibration's identity."""

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
