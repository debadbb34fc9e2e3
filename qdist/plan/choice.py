"""What is chosen for one layer."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

from qdist.errors import PlanError
from qdist.numbers.dtype import IntegerType
from qdist.numbers.table import TABLE_BITS
from qdist.plan.granularity import (
    ACTIVATION_FORMS,
    ACTIVATION_KINDS,
    WEIGHT_FORMS,
    WEIGHT_KINDS,
    Granularity,
    parse_granularity,
)
from qdist.plan.precision import Precision, precision
from qdist.threshold.registry import check_method, resolve

WEIGHT_AUTO = "auto"
"""``mse`` for 4-bit weights, else ``max``. What the method of this name does for activations, it
does by the layers that read them, and nothing reads a weight but its own layer."""
_MODERN_OPSET = 21
"""Blocks, and scales found while the model runs, need this opset."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerChoice:
    """A layer's number types, what shares a scale, and how ranges are found.

    ``granularity``: of the weights; ``activation_granularity``: of the activations, as in
    `qdist.plan.granularity`. ``saturation``: threshold method of the activations that the layer
    reads. ``weight_saturation``: that of the weights, or ``auto`` (``mse`` for 4-bit weights, else
    ``max``). ``weight_range_bits`` and ``activation_range_bits``: how many of an integer's bits are
    used (Icraft's ``value_range``); None: all. ``th_scale``: factor on the ranges of its
    activations, once found. ``threshold``: their largest magnitude, in place of what would be
    found. What rules say about a tensor goes before either. ``table_bits``: length of the layer's
    table, ``2**table_bits`` intervals, where it has one and 16-bit activations (Knight's
    ``lut-len``); None: the target's. ``split_bias``: the bias of an int16 convolution is added by
    an Add of its own (Icraft's Buyi). It means nothing beside a floating-point precision.
    """

    precision: str = "int8"
    granularity: str = "channel"
    saturation: str = "mse"
    weight_saturation: str = "auto"
    activation_granularity: str = "tensor"
    weight_range_bits: int | None = None
    activation_range_bits: int | None = None
    th_scale: float = 1.0
    threshold: float | None = None
    table_bits: int | None = None
    split_bias: bool = False

    def __post_init__(self) -> None:
        bits = precision(self.precision)
        check_method(self.saturation)
        if self.weight_saturation != WEIGHT_AUTO:
            check_method(self.weight_saturation, where="quantization.weight_saturation")
        weight, activation = (
            parse_granularity(text) for text in (self.granularity, self.activation_granularity)
        )
        if weight is None or weight.kind not in WEIGHT_KINDS:
            raise _refused("granularity", repr(self.granularity), WEIGHT_FORMS)
        if activation is None or activation.kind not in ACTIVATION_KINDS:
            raise _refused(
                "activation_granularity", repr(self.activation_granularity), ACTIVATION_FORMS
            )
        if activation.kind == "token" and not _has_token_scales(bits):
            got = f"token with {self.precision}"
            raise _refused("activation_granularity", got, "a precision with signed integers")
        for key, value, kind in (
            ("weight_range_bits", self.weight_range_bits, bits.weight_type),
            ("activation_range_bits", self.activation_range_bits, bits.activation_type),
        ):
            # A float type has no levels to leave out; a rule may still turn such a layer float.
            most = kind.bits if isinstance(kind, IntegerType) else 16
            if value is not None and not 2 <= value <= most:
                raise _refused(key, repr(value), f"2 to {most} bits with {self.precision}")
        if self.table_bits is not None and self.table_bits not in TABLE_BITS:
            known = ", ".join(map(str, TABLE_BITS))
            raise _refused("table_bits", repr(self.table_bits), f"one of {known}")
        if self.split_bias and self.precision != "int16" and not _is_floating(bits):
            raise _refused("split_bias", f"true with {self.precision}", "precision int16")
        for key, number in (("th_scale", self.th_scale), ("threshold", self.threshold)):
            if number is not None and not (0 < number < math.inf):
                raise PlanError(
                    "QD507",
                    where=f"quantization.rules, {key}",
                    got=repr(number),
                    expected="a positive number",
                    mend="correct it, or leave it out",
                )

    @property
    def bits(self) -> Precision:
        """The precision itself."""
        return precision(self.precision)

    @property
    def splits_bias(self) -> bool:
        """Whether the bias becomes an Add of its own."""
        return self.split_bias and not _is_floating(self.bits)

    @property
    def weight_grain(self) -> Granularity:
        """What shares a scale in weights."""
        return parse_granularity(self.granularity) or Granularity(kind="channel")

    @property
    def opset(self) -> int:
        """The lowest opset that knows the types and the granularities."""
        blocks = self.bits.weight is not None and self.weight_grain.kind == "block"
        token = self.bits.activation is not None and self.activation_granularity == "token"
        return max(self.bits.opset, _MODERN_OPSET if blocks or token else 0)

    @property
    def weight_method(self) -> str:
        """The method's own name, with ``auto`` resolved."""
        if self.weight_saturation != WEIGHT_AUTO:
            return resolve(self.weight_saturation)[0]
        return "mse" if self.bits.weight_bits == 4 else "max"

    @property
    def weight_parameters(self) -> dict[str, Any]:
        """The parameters of `weight_method`, where any are said."""
        if self.weight_saturation == WEIGHT_AUTO:
            return {}
        return resolve(self.weight_saturation)[1]

    def to_json(self) -> dict[str, Any]:
        """As a JSON object. What few layers have is left out where it is absent."""
        found = asdict(self)
        return found if self.split_bias else {k: v for k, v in found.items() if k != "split_bias"}


def _is_floating(bits: Precision) -> bool:
    return bits.is_float or bits.rounds is not None


def _has_token_scales(bits: Precision) -> bool:
    """Whether a scale per token can be had, or none is needed."""
    kind = bits.activation_type
    if kind is None or bits.rounds is not None:
        return True
    return isinstance(kind, IntegerType) and kind.signed


def _refused(key: str, got: str, expected: str) -> PlanError:
    return PlanError(
        "QD507",
        where=f"quantization.{key}",
        got=got,
        expected=expected,
        mend="choose one of these",
    )
