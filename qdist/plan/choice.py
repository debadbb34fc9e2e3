"""What is chosen for one layer."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from qdist.errors import PlanError
from qdist.plan.precision import Precision, precision
from qdist.threshold.registry import check_method, resolve

GRANULARITIES = ("tensor", "channel")
WEIGHT_AUTO = "auto"
"""``mse`` for 4-bit weights, else ``max``. What the method of this name does for activations, it
does by the layers that read them, and nothing reads a weight but its own layer."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerChoice:
    """A layer's precision, the granularity of its weights, and how ranges are found.

    ``saturation``: threshold method of the activations. ``weight_saturation``: that of the
    weights, or ``auto`` (``mse`` for 4-bit weights, else ``max``).
    """

    precision: str = "int8"
    granularity: str = "channel"
    saturation: str = "mse"
    weight_saturation: str = "auto"

    def __post_init__(self) -> None:
        precision(self.precision)
        check_method(self.saturation)
        if self.weight_saturation != WEIGHT_AUTO:
            check_method(self.weight_saturation, where="quantization.weight_saturation")
        if self.granularity not in GRANULARITIES:
            raise PlanError(
                "QD507",
                where="quantization.granularity",
                got=repr(self.granularity),
                expected=f"one of {', '.join(GRANULARITIES)}",
                mend="choose one of these",
            )

    @property
    def bits(self) -> Precision:
        """The precision itself."""
        return precision(self.precision)

    @property
    def weight_method(self) -> str:
        """The method's own name, with ``auto`` resolved."""
        if self.weight_saturation != WEIGHT_AUTO:
            return resolve(self.weight_saturation)[0]
        return "mse" if self.bits.weight_bits == 4 else "max"

    def to_json(self) -> dict[str, Any]:
        """As a JSON object."""
        return asdict(self)
