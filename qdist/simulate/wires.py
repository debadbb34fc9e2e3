"""Whole numbers in a graph: arithmetic in float64, whose values are integers.

ONNX Runtime's own integer kernels saturate on some processors, and none is wide enough. Float64
holds every integer up to 2**53: products of 16-bit numbers, summed a million times.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnx import NodeProto, TensorProto, helper

from qdist.plan.quantizer import Quantizer
from qdist.simulate.pairs import Pairs
from qdist.simulate.ratios import along

FLOAT, DOUBLE = TensorProto.FLOAT, TensorProto.DOUBLE
_EXACT_IN_FLOAT32 = 24


class Wires:
    """Collects nodes; every method adds some and returns the name of the result."""

    def __init__(self, pairs: Pairs, stem: str) -> None:
        self.nodes: list[NodeProto] = []
        self._pairs = pairs
        self._stem = stem

    def add(self, op_type: str, *inputs: str, target: str = "", **attributes: Any) -> str:
        """One node."""
        name = self._pairs.free(f"{self._stem}.{op_type.lower()}")
        result = target or name
        node = helper.make_node(op_type, list(inputs), [result], f"{name}.node", **attributes)
        self.nodes.append(node)
        return result

    def constant(self, value: Any, dtype: Any = np.float64) -> str:
        """A constant."""
        return self._pairs.constant(value, dtype)

    def wide(self, tensor: str) -> str:
        """The tensor in float64."""
        return self.add("Cast", tensor, to=DOUBLE)

    def rounded(self, tensor: str, rounding: str) -> str:
        """A float64 tensor to whole numbers."""
        if rounding == "half_even":
            return self.add("Round", tensor)
        up = self.add("Floor", self.add("Add", self.add("Abs", tensor), self.constant(0.5)))
        return self.add("Mul", up, self.add("Sign", tensor))

    def clipped(self, tensor: str, low: float, high: float) -> str:
        """A float64 tensor within bounds."""
        return self.add("Clip", tensor, self.constant(low), self.constant(high))

    def integers(self, tensor: str, quantizer: Quantizer, rounding: str, rank: int = 0) -> str:
        """What a quantizer makes of a float32 activation, less its zero point: float64.

        The division is in float32, as ``QuantizeLinear`` has it. ``rank``: of the tensor, where it
        has several scales.
        """
        if quantizer.axis is not None:
            return self._integers_along(tensor, quantizer, rounding, quantizer.axis - rank)
        (scale,), (zero,) = quantizer.scales, quantizer.zero_points
        ratio = self.add("Div", tensor, self.constant(scale, np.float32))
        whole = self.rounded(self.wide(ratio), rounding)
        return self.clipped(whole, quantizer.low - zero, quantizer.high - zero)

    def _integers_along(self, tensor: str, quantizer: Quantizer, rounding: str, axis: int) -> str:
        """The same with a scale and a zero point for every index of an axis, from the end."""
        scales = self.constant(along(quantizer.scales, axis, np.float32), np.float32)
        whole = self.rounded(self.wide(self.add("Div", tensor, scales)), rounding)
        if not any(quantizer.zero_points):
            return self.clipped(whole, quantizer.low, quantizer.high)
        # Clip takes single bounds, so those of the stored numbers.
        zeros = self.constant(along(quantizer.zero_points, axis))
        stored = self.clipped(self.add("Add", whole, zeros), quantizer.low, quantizer.high)
        return self.add("Sub", stored, zeros)

    def weight(
        self, tensor: str, quantizer: Quantizer, shape: tuple[int, ...] | None = None
    ) -> str:
        """The integers of a stored weight, less the zero point: float32. ``shape`` as for
        `Pairs.weight`."""
        name = self._pairs.stored(tensor, quantizer, shape)
        one = self.constant(1.0, np.float32)
        whole = self.add("DequantizeLinear", name, one)
        zero = quantizer.zero_points[0]
        return self.add("Sub", whole, self.constant(zero, np.float32)) if zero else whole

    def stored(self, whole: str, quantizer: Quantizer, target: str) -> str:
        """The float32 values of integers (less the zero point) of a per-tensor quantizer."""
        single = self.add("Cast", whole, to=FLOAT)
        scale = self.constant(quantizer.scales[0], np.float32)
        return self.add("Mul", single, scale, target=target)

    def requantized(
        self, accumulators: str, multipliers: NDArray[Any], quantizer: Quantizer, rounding: str
    ) -> str:
        """Accumulators times multipliers, rounded once and clipped to the levels of ``quantizer``,
        less its zero point."""
        product = self.add("Mul", accumulators, self.constant(multipliers))
        zero = quantizer.zero_points[0]
        whole = self.rounded(product, rounding)
        return self.clipped(whole, quantizer.low - zero, quantizer.high - zero)

    def convolution(
        self,
        op_type: str,
        x: str,
        w: str,
        n_summed: int,
        ranges: tuple[int, int],
        **attributes: Any,
    ) -> str:
        """The accumulators of a convolution of whole numbers, float64.

        ONNX Runtime convolves in float32, which is exact below 2**24. So both factors are split
        into digits that keep every sum of ``n_summed`` products below that, and what the digits
        give is added in float64. ``ranges``: the largest magnitudes of ``x`` and ``w``.
        """
        room = _EXACT_IN_FLOAT32 - int(np.ceil(np.log2(n_summed)))
        x_bits, w_bits = (int(r).bit_length() for r in ranges)
        w_digit = min(w_bits, max(1, room // 2))
        x_digit = min(x_bits, max(1, room - w_digit))
        parts = []
        for i, left in enumerate(self._digits(x, x_bits, x_digit)):
            for j, right in enumerate(self._digits(self.wide(w), w_bits, w_digit)):
                found = self.add(
                    op_type, *(self.add("Cast", t, to=FLOAT) for t in (left, right)), **attributes
                )
                factor = self.constant(2.0 ** (i * x_digit + j * w_digit))
                parts.append(self.add("Mul", self.wide(found), factor))
        return parts[0] if len(parts) == 1 else self.add("Sum", *parts)

    def _digits(self, tensor: str, n_bits: int, size: int) -> list[str]:
        """Digits of ``size`` bits, the lowest first, each with the sign of the number."""
        digits, rest = [], tensor
        for _ in range(-(-n_bits // size) - 1):
            # Towards zero, so that no digit is larger than its bits.
            quotient = self.add("Mul", rest, self.constant(2.0**-size))
            higher = self.add(
                "Mul", self.add("Floor", self.add("Abs", quotient)), self.add("Sign", quotient)
            )
            shifted = self.add("Mul", higher, self.constant(2.0**size))
            digits.append(self.add("Sub", rest, shifted))
            rest = higher
        return [*digits, rest]
