"""The named precisions that a layer can have."""

from __future__ import annotations

from dataclasses import dataclass

from qdist.errors import PlanError
from qdist.threshold.clip import Levels

_RANGES = {4: (-8, 7), 8: (-128, 127), 16: (-32768, 32767)}


@dataclass(frozen=True, slots=True, kw_only=True)
class Precision:
    """Bits of a layer's activations and weights; None means float."""

    name: str
    activation_bits: int | None
    weight_bits: int | None

    @property
    def is_float(self) -> bool:
        """Whether nothing is quantized."""
        return self.activation_bits is None and self.weight_bits is None

    @property
    def opset(self) -> int:
        """The lowest opset whose Q/DQ know these types."""
        return 13 if {self.activation_bits, self.weight_bits} <= {8, None} else 21


PRECISIONS: dict[str, Precision] = {
    p.name: p
    for p in (
        Precision(name="w4a8", activation_bits=8, weight_bits=4),
        Precision(name="int8", activation_bits=8, weight_bits=8),
        Precision(name="w4a16", activation_bits=16, weight_bits=4),
        Precision(name="w8a16", activation_bits=16, weight_bits=8),
        Precision(name="int16", activation_bits=16, weight_bits=16),
        Precision(name="float32", activation_bits=None, weight_bits=None),
    )
}
"""By name: ``w4a8`` is 4-bit weights with 8-bit activations; ``int8`` and ``int16`` are both."""


def precision(name: str) -> Precision:
    """A precision by name. Raises QD506."""
    if name not in PRECISIONS:
        raise PlanError(
            "QD506",
            where="quantization.precision",
            got=repr(name),
            expected=f"one of {', '.join(PRECISIONS)}",
            mend="choose one of these",
        )
    return PRECISIONS[name]


def activation_levels(bits: int, *, symmetric: bool) -> Levels:
    """The levels of a signed activation: all that the storage has, since ``QuantizeLinear``
    saturates there. When symmetric, the range of the scale is -(2^(b-1)-1) .. 2^(b-1)-1."""
    low, high = _RANGES[bits]
    return Levels(low=low, high=high, symmetric=symmetric)


def weight_levels(bits: int) -> Levels:
    """The levels of a signed, symmetric weight: -(2^(b-1)-1) .. 2^(b-1)-1."""
    high = _RANGES[bits][1]
    return Levels(low=-high, high=high, symmetric=True)
