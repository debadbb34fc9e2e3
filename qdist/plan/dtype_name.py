"""The number formats that rules and vendors' files can name, in one place.

A file may name any of these, and is read whole; whether this version can plan for one is the
planner's to say (`qdist.plan.precision.PRECISIONS`).
"""

from __future__ import annotations

from enum import StrEnum


class DtypeName(StrEnum):
    """A number format. The value is the name that configuration and plans use."""

    INT4 = "int4"
    UINT4 = "uint4"
    INT8 = "int8"
    UINT8 = "uint8"
    INT16 = "int16"
    BF16 = "bf16"
    FP16 = "fp16"
    TF32 = "tf32"
    FP32 = "fp32"
    FP8_E4M3 = "fp8_e4m3"
    FP8_E5M2 = "fp8_e5m2"

    @property
    def bits(self) -> int:
        """Bits of storage; tf32 is stored in 32."""
        return _BITS[self]

    @property
    def is_integer(self) -> bool:
        """Whether values lie on a uniform grid with a scale."""
        return self in (self.INT4, self.UINT4, self.INT8, self.UINT8, self.INT16)

    @property
    def precision(self) -> str:
        """The precision of a layer whose weights and activations have this format."""
        return "float32" if self is DtypeName.FP32 else self.value


_BITS = {
    DtypeName.INT4: 4,
    DtypeName.UINT4: 4,
    DtypeName.INT8: 8,
    DtypeName.UINT8: 8,
    DtypeName.INT16: 16,
    DtypeName.BF16: 16,
    DtypeName.FP16: 16,
    DtypeName.TF32: 32,
    DtypeName.FP32: 32,
    DtypeName.FP8_E4M3: 8,
    DtypeName.FP8_E5M2: 8,
}
_OTHER_NAMES = {
    "float32": DtypeName.FP32,
    "float": DtypeName.FP32,
    "float16": DtypeName.FP16,
    "bfloat16": DtypeName.BF16,
    "s8": DtypeName.INT8,
    "s16": DtypeName.INT16,
    "u8": DtypeName.UINT8,
}


def dtype_name(text: str) -> DtypeName | None:
    """The format of that name in any case (``INT8``, ``FLOAT32``, ``s16``), or None."""
    key = text.strip().lower()
    if key in _OTHER_NAMES:
        return _OTHER_NAMES[key]
    return DtypeName(key) if key in set(DtypeName) else None
