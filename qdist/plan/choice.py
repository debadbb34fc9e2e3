"""What is chosen for one layer."""

from __future__ import annotations

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

    ``saturation``: threshold method of the activations. ``weight_saturation``: ``max``, ``mse``
    or ``auto`` (``mse`` for 4-bit weights, else ``max``).
    """

    precision: str = "int8"
    granularity: str = "channel"
    saturation: str = "mse"
    weight_saturation: str = "auto"

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
