"""Number types by name.

Integers are two's complement. Floating-point types have one sign bit and round half to even: IEEE
754 for ``fp16``; ``bf16`` and ``tf32`` are float32 with 7 and 10 bits of mantissa; ``fp8_e4m3`` is
ONNX's ``FLOAT8E4M3FN`` (no infinity, one NaN, so that its last binade reaches 448) and
``fp8_e5m2`` its ``FLOAT8E5M2`` (Micikevicius et al. 2022, "FP8 formats for deep learning").
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class IntegerType:
    """An integer of ``bits`` bits."""

    name: str
    bits: int
    signed: bool

    @property
    def low(self) -> int:
        """The least value."""
        return -(1 << (self.bits - 1)) if self.signed else 0

    @property
    def high(self) -> int:
        """The largest value."""
        return (1 << (self.bits - 1)) - 1 if self.signed else (1 << self.bits) - 1

    def range(self, range_bits: int | None = None, *, balanced: bool = False) -> tuple[int, int]:
        """The least and largest value in use when the numbers are kept to ``range_bits`` bits
        (Icraft's ``value_range_bits``; None: all of them). ``balanced`` leaves out the value that
        has no opposite. Raises `ValueError` for less than 2 bits or more than there are, and for
        balanced unsigned numbers.
        """
        bits = self.bits if range_bits is None else range_bits
        if not 2 <= bits <= self.bits:
            raise ValueError(f"{self.name} has 2 to {self.bits} bits, not {bits}")
        if not self.signed:
            if balanced:
                raise ValueError(f"{self.name} has no negative values")
            return 0, (1 << bits) - 1
        high = (1 << (bits - 1)) - 1
        return (-high if balanced else -high - 1), high


@dataclass(frozen=True, slots=True, kw_only=True)
class FloatType:
    """A binary floating-point type.

    ``bits``: storage; ``mantissa_bits`` without the implicit one; ``least_exponent``: of the
    smallest normal number (subnormal ones follow); ``largest``: the largest finite value.
    ``has_infinity``: what is larger rounds to infinity, else to NaN.
    """

    name: str
    bits: int
    mantissa_bits: int
    least_exponent: int
    largest: float
    has_infinity: bool = True

    @property
    def smallest(self) -> float:
        """The smallest positive (subnormal) value."""
        return 2.0 ** (self.least_exponent - self.mantissa_bits)

    @property
    def is_wide(self) -> bool:
        """Whether it reaches as far as float32, so that no scale is needed."""
        return self.least_exponent == -126


DType = IntegerType | FloatType


def _largest(exponent: int, mantissa_bits: int) -> float:
    return (2.0 - 2.0**-mantissa_bits) * 2.0**exponent


INTEGERS: dict[str, IntegerType] = {
    f"{'' if signed else 'u'}int{bits}": IntegerType(
        name=f"{'' if signed else 'u'}int{bits}", bits=bits, signed=signed
    )
    for bits in (4, 8, 16)
    for signed in (True, False)
}
FLOATS: dict[str, FloatType] = {
    t.name: t
    for t in (
        FloatType(
            name="fp8_e4m3",
            bits=8,
            mantissa_bits=3,
            least_exponent=-6,
            largest=448.0,
            has_infinity=False,
        ),
        FloatType(
            name="fp8_e5m2", bits=8, mantissa_bits=2, least_exponent=-14, largest=_largest(15, 2)
        ),
        FloatType(
            name="fp16", bits=16, mantissa_bits=10, least_exponent=-14, largest=_largest(15, 10)
        ),
        FloatType(
            name="bf16", bits=16, mantissa_bits=7, least_exponent=-126, largest=_largest(127, 7)
        ),
        # 19 bits, which chips keep in 32.
        FloatType(
            name="tf32", bits=32, mantissa_bits=10, least_exponent=-126, largest=_largest(127, 10)
        ),
        FloatType(
            name="fp32", bits=32, mantissa_bits=23, least_exponent=-126, largest=_largest(127, 23)
        ),
    )
}
DTYPES: dict[str, DType] = {**INTEGERS, **FLOATS}
"""All number types by name."""
