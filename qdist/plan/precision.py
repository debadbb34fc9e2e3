"""The named precisions that a layer can have."""

from __future__ import annotations

from dataclasses import dataclass

from qdist.errors import PlanError
from qdist.numbers.dtype import DTYPES, INTEGERS, DType, FloatType, IntegerType
from qdist.threshold.clip import Levels


@dataclass(frozen=True, slots=True, kw_only=True)
class Precision:
    """The number types of a layer's activations and weights; None means float32.

    ``activation`` and ``weight`` are names of `qdist.numbers.dtype.DTYPES`. Weights that are
    integers are symmetric; unsigned ones have their zero in the middle.
    """

    name: str
    activation: str | None
    weight: str | None

    @property
    def activation_type(self) -> DType | None:
        """The type of the activations."""
        return None if self.activation is None else DTYPES[self.activation]

    @property
    def weight_type(self) -> DType | None:
        """The type of the weights."""
        return None if self.weight is None else DTYPES[self.weight]

    @property
    def activation_bits(self) -> int | None:
        """Storage bits of the activations; None for float32."""
        return None if self.activation is None else DTYPES[self.activation].bits

    @property
    def weight_bits(self) -> int | None:
        """Storage bits of the weights; None for float32."""
        return None if self.weight is None else DTYPES[self.weight].bits

    @property
    def is_float(self) -> bool:
        """Whether nothing is quantized or rounded."""
        return self.activation is None and self.weight is None

    @property
    def is_weight_only(self) -> bool:
        """Whether activations stay float32 and weights do not."""
        return self.activation is None and self.weight is not None

    @property
    def rounds(self) -> FloatType | None:
        """The floating-point type that every result is rounded to, without a scale: bf16, fp16,
        tf32."""
        kind = self.activation_type
        return kind if isinstance(kind, FloatType) and kind.bits > 8 else None

    @property
    def opset(self) -> int:
        """The lowest opset whose operators know these types."""
        kinds = [kind for kind in (self.activation_type, self.weight_type) if kind is not None]
        if any(isinstance(kind, IntegerType) and kind.bits != 8 for kind in kinds):
            return 21
        # FLOAT8 is younger than Q/DQ per channel.
        return 19 if any(isinstance(kind, FloatType) and kind.bits == 8 for kind in kinds) else 13


def _precision(name: str, activation: str | None, weight: str | None) -> Precision:
    return Precision(name=name, activation=activation, weight=weight)


PRECISIONS: dict[str, Precision] = {
    p.name: p
    for p in (
        _precision("w4", None, "int4"),
        _precision("w4a8", "int8", "int4"),
        _precision("u4", None, "uint4"),
        _precision("u4a8", "int8", "uint4"),
        _precision("int4", "int4", "int4"),
        _precision("uint4", "uint4", "int4"),
        _precision("w8", None, "int8"),
        _precision("int8", "int8", "int8"),
        _precision("uint8", "uint8", "int8"),
        _precision("fp8_e4m3", "fp8_e4m3", "fp8_e4m3"),
        _precision("fp8_e5m2", "fp8_e5m2", "fp8_e5m2"),
        _precision("w4a16", "int16", "int4"),
        _precision("w8a16", "int16", "int8"),
        _precision("int16", "int16", "int16"),
        _precision("uint16", "uint16", "int16"),
        _precision("bf16", "bf16", "bf16"),
        _precision("fp16", "fp16", "fp16"),
        _precision("tf32", "tf32", "tf32"),
        _precision("float32", None, None),
    )
}
"""By name. ``w4a8`` is 4-bit weights with 8-bit activations, ``w4`` and ``w8`` are weights alone;
``u4`` and ``u4a8`` have unsigned weights; ``uint4``, ``uint8`` and ``uint16`` have unsigned
activations and signed weights; any other name is both."""


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


def activation_levels(bits: int, *, symmetric: bool, range_bits: int | None = None) -> Levels:
    """The levels of a signed activation: all that ``range_bits`` (the storage where None) hold.
    When symmetric, the range of the scale is -(2^(b-1)-1) .. 2^(b-1)-1."""
    low, high = INTEGERS[f"int{bits}"].range(range_bits)
    return Levels(low=low, high=high, symmetric=symmetric)


def weight_levels(bits: int, range_bits: int | None = None) -> Levels:
    """The levels of a signed, symmetric weight: -(2^(b-1)-1) .. 2^(b-1)-1."""
    low, high = INTEGERS[f"int{bits}"].range(range_bits, balanced=True)
    return Levels(low=low, high=high, symmetric=True)
