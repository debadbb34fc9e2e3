"""What holds for a whole plan."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from qdist.plan.tensor_settings import TensorSettings

MASKED = ("float", "quantize")


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanSettings:
    """What holds for the whole model: the scope (`scope.SCOPES`), whether activations are
    symmetric, parameters of the threshold method, what rules say about single tensors, and for
    layers that a rule is about, which (unless a plan is told otherwise).

    ``masked``: what becomes of scores of which some are masked: they stay ``float``, or what only a
    Softmax reads is quantized (``quantize``), with a range that leaves masked ones no weight."""

    scope: str = "all"
    symmetric: bool = False
    saturation_parameters: Mapping[str, Any] = field(default_factory=dict)
    tensors: Mapping[str, TensorSettings] = field(default_factory=dict)
    why: Mapping[str, str] = field(default_factory=dict)
    masked: str = "float"

    def __post_init__(self) -> None:
        if self.masked not in MASKED:
            raise ValueError(f"masked must be one of {MASKED}, got {self.masked!r}")
