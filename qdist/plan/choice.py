"""What is chosen for one layer."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

from qdist.errors import PlanError
from qdist.plan.precision import Precision, precision
from qdist.threshold.registry import check_method

GRANULARITIES = ("tensor", "channel")
WEIGHT_METHODS = ("auto", "max", "mse")


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerChoice:
    """A layer's precision, the granularity of its weights, and how ranges are found.

    ``saturation``: threshold method of the activations that the layer reads. ``weight_saturation``:
    ``max``, ``mse`` or ``auto`` (``mse`` for 4-bit weights, else ``max``). ``th_scale``: factor on
    the ranges of its activations, once found. ``threshold``: their largest magnitude, in place of
    what would be found. What rules say about a tensor goes before either.
    """

    precision: str = "int8"
    granularity: str = "channel"
    saturation: str = "mse"
    weight_saturation: str = "auto"
    th_scale: float = 1.0
    threshold: float | None = None

    def __post_init__(self) -> None:
        precision(self.precision)
        check_method(self.saturation)
        for key, value, known in (
            ("granularity", self.granularity, GRANULARITIES),
            ("weight_saturation", self.weight_saturation, WEIGHT_METHODS),
        ):
            if value not in known:
                raise PlanError(
                    "QD507",
                    where=f"quantization.{key}",
                    got=repr(value),
                    expected=f"one of {', '.join(known)}",
                    mend="choose one of these",
                )
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
    def weight_method(self) -> str:
        """``max`` or ``mse``, with ``auto`` resolved."""
        if self.weight_saturation != "auto":
            return self.weight_saturation
        return "mse" if self.bits.weight_bits == 4 else "max"

    def to_json(self) -> dict[str, Any]:
        """As a JSON object."""
        return asdict(self)
