"""Softmax and LayerNormalization from tables, where a chip has them (target-exact mode).

Both are functions of a whole row with one nonlinear function of a single number inside: the
exponential, and the reciprocal root. That one is a table (`qdist.simulate.tables`); all else is
sums, differences and divisions of whole numbers.

Our reading: Knight's document gives the lengths of tables and no more.

Softmax. The distance of every number below the largest of its row is looked up in a table of
``exp(-distance)`` with `ONE` for 1. Entries are summed over the row, and each is divided by the sum
times the output's scale, rounded half up.

LayerNormalization. The mean has `MEAN_BITS` bits of fraction. The mean of the squared differences
from it, plus epsilon, is ``u * 4**k`` with ``1 <= u < 4``; ``u`` is kept in 16 bits and its
reciprocal root looked up, with `ONE` for 1. Normalized values have `NORM_BITS` bits of fraction;
they are multiplied with the gain in 16 bits, the bias is added in 48 bits, and the sum is
requantized as that of any product.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from onnx import TensorProto

from qdist.numbers.rounding import round_integer
from qdist.plan.quantizer import Quantizer
from qdist.simulate.reference import fixed_point
from qdist.simulate.tables import at_levels, interpolated_at
from qdist.simulate.wires import Wires

Integers = NDArray[np.int64]

BITS = 16
"""Bits of what is looked up."""
ONE = 1 << 15
MEAN_BITS, NORM_BITS = 2, 14
LONGEST_ROW = 1 << 15
"""Squares of longer rows would not sum exactly in float64."""
_ROOM = 1 << 50
_MOST_DOUBLINGS = 25
_BIAS_HIGH = (1 << 47) - 1


def exponentials(scale: float, bits: int) -> Integers:
    """``exp(-distance * scale)``, int64[2**bits + 1], at distances 2**(16 - bits) apart."""
    distances = np.arange((1 << bits) + 1, dtype=np.float64) * 2.0 ** (BITS - bits)
    return _half_up(np.exp(-distances * scale) * ONE)


def reciprocal_roots(bits: int) -> Integers:
    """``1 / sqrt(u)``, int64[2**bits + 1], for ``u`` in steps of ``4 / 2**bits``; below 1 that of
    1, since there is none."""
    u = np.arange((1 << bits) + 1, dtype=np.float64) * 4.0 / (1 << bits)
    return _half_up(ONE / np.sqrt(np.maximum(u, 1.0)))


# --- Softmax ------------------------------------------------------------------------------------


def softmax(x: Integers, axis: int, source: Quantizer, result: Quantizer, bits: int) -> Integers:
    """The definition: results (less the zero point) for whole numbers of the input."""
    table = exponentials(source.scales[0], bits)
    below = x.max(axis=axis, keepdims=True) - x
    powers = interpolated_at(below, table, BITS - bits)
    above, under = _share_factors(result)
    total = powers.sum(axis=axis, keepdims=True) * under
    found = (2 * powers * above + total) // (2 * total)
    zero = result.zero_points[0]
    return np.asarray(np.clip(found, result.low - zero, result.high - zero), np.int64)


def softmax_wires(
    wires: Wires, whole: str, axis: int, source: Quantizer, result: Quantizer, bits: int
) -> str:
    """`softmax` in a graph: float64 whole numbers in and out."""
    axes = wires.constant(np.array([axis]), np.int64)
    table = exponentials(source.scales[0], bits)
    below = wires.add("Sub", wires.add("ReduceMax", whole, axes), whole)
    powers = at_levels(wires, below, table, BITS - bits)
    above, under = _share_factors(result)
    total = wires.add("Mul", wires.add("ReduceSum", powers, axes), wires.constant(float(2 * under)))
    doubled = wires.add("Mul", powers, wires.constant(float(2 * above)))
    half = wires.add("Mul", total, wires.constant(0.5))
    found = floor_division(wires, wires.add("Add", doubled, half), total)
    zero = result.zero_points[0]
    return wires.clipped(found, result.low - zero, result.high - zero)


def _share_factors(result: Quantizer) -> tuple[int, int]:
    """Whole numbers whose ratio is the float32 next to ``1 / scale``."""
    m, n = fixed_point(np.asarray(1.0 / result.scales[0], np.float32))
    return int(m) << max(0, -int(n)), 1 << max(0, int(n))


# --- LayerNormalization -------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Gains:
    """What a layer normalization multiplies with and adds, as whole numbers: ``whole`` in 16 bits,
    ``bias`` in 48, the float32 ``multiplier`` of their sum, and ``epsilon`` as `spread` has it."""

    whole: NDArray[np.float64]
    bias: NDArray[np.float64]
    multiplier: float
    epsilon: int

    @property
    def n_beyond(self) -> int:
        """How many biases saturate."""
        return int(np.count_nonzero(np.abs(self.bias) >= _BIAS_HIGH))


def gains_of(
    gain: NDArray[np.float32],
    bias: NDArray[np.float32] | None,
    epsilon: float,
    source: Quantizer,
    result: Quantizer,
) -> Gains:
    """The whole numbers of a layer's gain and bias (None: zeros)."""
    widest = float(np.abs(gain).max(initial=0.0))
    scale = float(np.float32(widest / (ONE - 1))) if widest > 0 else 1.0
    step = scale * 2.0**-NORM_BITS
    offset = np.zeros(gain.shape) if bias is None else bias.astype(np.float64)
    per_square = source.scales[0] ** 2 / 4.0**MEAN_BITS
    return Gains(
        whole=round_integer(gain.astype(np.float64) / scale),
        bias=np.clip(round_integer(offset / step), -_BIAS_HIGH, _BIAS_HIGH),
        multiplier=float(np.float32(step / result.scales[0])),
        epsilon=int(min(np.floor(epsilon / per_square + 0.5), _ROOM)),
    )


def normalized(x: Integers, axes: tuple[int, ...], epsilon: int, bits: int) -> Integers:
    """The definition: ``(x - mean) / sqrt(variance + epsilon)`` with `NORM_BITS` bits of
    fraction."""
    n = int(np.prod([x.shape[axis] for axis in axes]))
    total = x.sum(axis=axes, keepdims=True) << (MEAN_BITS + 1)
    apart = (x << MEAN_BITS) - (total + n) // (2 * n)
    squares = (2 * (apart * apart).sum(axis=axes, keepdims=True) + n) // (2 * n)
    spread = np.maximum(squares + epsilon, 1)
    k = sum((spread >= 4**j).astype(np.int64) for j in range(1, _MOST_DOUBLINGS + 1))
    mantissa = (spread << (BITS - 2)) >> (2 * np.asarray(k))
    roots = interpolated_at(mantissa, reciprocal_roots(bits), BITS - bits)
    shift = 15 - NORM_BITS + np.asarray(k)
    return np.asarray((2 * apart * roots + (1 << shift)) >> (shift + 1), np.int64)


def normalized_wires(
    wires: Wires, whole: str, axes: tuple[int, ...], n: int, epsilon: int, bits: int
) -> str:
    """`normalized` in a graph. ``n``: how many numbers a row has, at most `LONGEST_ROW`."""
    along = wires.constant(np.array(axes), np.int64)
    length, twice = wires.constant(float(n)), wires.constant(float(2 * n))
    total = wires.add("ReduceSum", whole, along)
    total = wires.add("Mul", total, wires.constant(2.0 ** (MEAN_BITS + 1)))
    mean = floor_division(wires, wires.add("Add", total, length), twice)
    apart = wires.add("Sub", wires.add("Mul", whole, wires.constant(2.0**MEAN_BITS)), mean)
    squares = wires.add("ReduceSum", wires.add("Mul", apart, apart), along)
    squares = wires.add("Mul", squares, wires.constant(2.0))
    variance = floor_division(wires, wires.add("Add", squares, length), twice)
    spread = wires.add("Add", variance, wires.constant(float(epsilon)))
    spread = wires.add("Max", spread, wires.constant(1.0))
    # One power of four after the other, since a logarithm may be off where it matters.
    powers = np.arange(1, _MOST_DOUBLINGS + 1, dtype=np.float64)
    reached = wires.add(
        "GreaterOrEqual",
        wires.add("Unsqueeze", spread, wires.constant(np.array([-1]), np.int64)),
        wires.constant(4.0**powers),
    )
    k = wires.add(
        "ReduceSum",
        wires.add("Cast", reached, to=TensorProto.INT64),
        wires.constant(np.array([-1]), np.int64),
        keepdims=0,
    )
    halves = 2.0 ** -np.arange(_MOST_DOUBLINGS + 1, dtype=np.float64)
    down = wires.add("Gather", wires.constant(2.0 ** (BITS - 2) * halves**2), k)
    mantissa = wires.add("Floor", wires.add("Mul", spread, down))
    roots = at_levels(wires, mantissa, reciprocal_roots(bits), BITS - bits)
    products = wires.add("Mul", apart, roots)
    scaled = wires.add(
        "Mul", products, wires.add("Gather", wires.constant(2.0 ** (NORM_BITS - 15) * halves), k)
    )
    return wires.add("Floor", wires.add("Add", scaled, wires.constant(0.5)))


def floor_division(wires: Wires, above: str, under: str) -> str:
    """``above // under`` of whole numbers below 2**53 in float64: a quotient that rounding has
    carried to the next whole number is put right by the remainder, which is exact."""
    quotient = wires.add("Floor", wires.add("Div", above, under))
    rest = wires.add("Sub", above, wires.add("Mul", quotient, under))
    return wires.add("Add", quotient, wires.add("Floor", wires.add("Div", rest, under)))


def _half_up(values: NDArray[np.float64]) -> Integers:
    return np.floor(values + 0.5).astype(np.int64)
