"""One layer in whole numbers, in NumPy: what a chip computes.

Everything here is exact: accumulators are int64, multipliers are ``m * 2**-n`` with whole ``m``,
and a requantization is a multiplication, a shift and one rounding. The graphs of
`qdist.simulate.integers` are checked against it, bit for bit.

Where no document says how a chip requantizes, this is our reading: accumulators of at least 32 bits
that never overflow, and a multiplier that is the float32 nearest to ``s_x * s_w / s_y``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

Integers = NDArray[np.int64]


def fixed_point(multipliers: NDArray[np.float32]) -> tuple[Integers, Integers]:
    """``m`` (at most 24 bits) and ``n`` such that each multiplier is ``m * 2**-n``."""
    mantissa, exponent = np.frexp(multipliers.astype(np.float64))
    m = np.ldexp(mantissa, 24).astype(np.int64)
    return m, (24 - exponent).astype(np.int64)


def shifted(values: NDArray[Any], n: Any, rounding: str) -> NDArray[Any]:
    """``values / 2**n`` to the nearest whole number. ``values`` and ``n`` (not negative) are whole;
    objects (Python's integers) where int64 would overflow."""
    whole = values >> n
    rest = values - (whole << n)
    twice, one = rest * 2, np.ones_like(n) << n
    if rounding == "half_even":
        up = (twice > one) | ((twice == one) & (whole % 2 != 0))
    else:
        up = (twice > one) | ((twice == one) & (values >= 0))
    return np.asarray(whole + np.where(np.asarray(up, bool) & (n > 0), 1, 0))


def requantized(
    accumulators: Integers,
    m: NDArray[Any],
    n: NDArray[Any],
    zero: int,
    levels: tuple[int, int],
    rounding: str = "half_even",
) -> Integers:
    """``clip(round(accumulators * m * 2**-n) + zero)``; ``m`` and ``n`` broadcast."""
    product = accumulators.astype(object) * np.asarray(m, object)
    exponents = np.asarray(n, object)
    # A multiplier above 1 shifts to the left.
    left = np.maximum(-exponents, 0)
    found = shifted(product << left, np.maximum(exponents, 0), rounding)
    return np.clip(np.asarray(found + zero, np.int64), *levels)


def matrix_product(x: Integers, w: Integers) -> Integers:
    """Accumulators of MatMul and Gemm."""
    return np.matmul(x, w)


def convolution(
    x: Integers,
    w: Integers,
    *,
    strides: Sequence[int],
    pads: Sequence[int],
    dilations: Sequence[int],
    group: int = 1,
) -> Integers:
    """Accumulators of Conv: x int[N, C, *spatial], w int[M, C/group, *kernel], ONNX's attributes
    (``pads``: all beginnings, then all ends)."""
    rank = w.ndim - 2
    ends = list(zip(pads[:rank], pads[rank:], strict=True))
    padded = np.pad(x, [(0, 0), (0, 0), *ends])
    sizes = [
        (padded.shape[2 + i] - dilations[i] * (w.shape[2 + i] - 1) - 1) // strides[i] + 1
        for i in range(rank)
    ]
    n_out, per_group = w.shape[0] // group, w.shape[1]
    result = np.zeros((x.shape[0], w.shape[0], *sizes), np.int64)
    for place in np.ndindex(*w.shape[2:]):
        window = tuple(
            slice(
                at * dilations[i], at * dilations[i] + strides[i] * (sizes[i] - 1) + 1, strides[i]
            )
            for i, at in enumerate(place)
        )
        taken = padded[(slice(None), slice(None), *window)]
        kernel = w[(slice(None), slice(None), *place)]
        for g in range(group):
            outs = slice(g * n_out, (g + 1) * n_out)
            ins = taken[:, g * per_group : (g + 1) * per_group]
            result[:, outs] += np.einsum("oc,nc...->no...", kernel[outs], ins)
    return result


def cut_product(
    accumulators: Integers,
    bias: Integers | None,
    cuts: tuple[Any, Any, int],
    levels: tuple[int, int],
) -> Integers:
    """Icraft's two cuts: the accumulators are shifted by the first, the bias is added, and the sum
    is multiplied with ``m`` and shifted by what is left of ``n``. ``cuts``: (m, n, first cut), the
    first two as arrays that broadcast. Halves go away from zero."""
    m, n, first = cuts
    cut = shifted(accumulators, np.asarray(first, np.int64), "half_away").astype(np.int64)
    total = cut if bias is None else cut + bias
    return requantized(total, m, np.asarray(n) - first, 0, levels, "half_away")


def sum_of(
    first: Integers,
    second: Integers,
    multipliers: tuple[Any, Any],
    zero: int,
    levels: tuple[int, int],
) -> Integers:
    """Add: ``clip(round(first * m1 + second * m2) + zero)``, rounded once, half to even.
    ``multipliers``: float32, single ones or arrays that broadcast."""
    (m1, n1), (m2, n2) = (fixed_point(np.asarray(m, np.float32)) for m in multipliers)
    deepest = max(int(n1.max()), int(n2.max()), 0)
    product = first.astype(object) * (m1.astype(object) << (deepest - n1).astype(object))
    product = product + second.astype(object) * (m2.astype(object) << (deepest - n2).astype(object))
    found = shifted(product, np.asarray(deepest, object), "half_even")
    return np.clip(np.asarray(found + zero, np.int64), *levels)


def folded(
    weight: NDArray[np.float32],
    ratios: NDArray[np.float64],
    scales: NDArray[np.float64],
    top: int,
    rounding: str = "half_even",
) -> Integers:
    """A weight with the ratios of what it is multiplied with in it, in whole numbers of ``-top ..
    top``: ``clip(round(weight * ratio / scale))``; ``ratios`` and ``scales`` broadcast."""
    exact = weight.astype(np.float64) * ratios / scales
    away = np.sign(exact) * np.floor(np.abs(exact) + 0.5)
    whole = np.rint(exact) if rounding == "half_even" else away
    return np.clip(whole, -top, top).astype(np.int64)
