"""What a chip's numbers look like: the one place where numbers are snapped.

Simulation and emitters accept nothing but a `ProjectedPlan`, so what is scored is what ships.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np

from qdist.errors import PlanError
from qdist.plan.plan import LayerPlan, QuantizationPlan, QuantizedInput
from qdist.plan.quantizer import Quantizer

SCALE_GRIDS = ("float", "power_of_two")
_LEAST_SCALE = float(np.finfo(np.float32).tiny)


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """What a toolchain accepts.

    ``precisions``: names it supports. ``symmetric_only``: activations must have zero point 0.
    ``per_channel``: whether weights may have a scale per output channel. ``scale_grid``: ``float``
    (float32) or ``power_of_two`` (rounded up, so that nothing more is clipped).
    """

    name: str
    precisions: tuple[str, ...]
    symmetric_only: bool = False
    per_channel: bool = True
    scale_grid: str = "float"

    def __post_init__(self) -> None:
        if self.scale_grid not in SCALE_GRIDS:
            raise ValueError(f"scale_grid must be one of {SCALE_GRIDS}, got {self.scale_grid!r}")

    def project(self, plan: QuantizationPlan) -> ProjectedPlan:
        """The plan with every number as the target stores it. Projecting twice changes nothing.

        Raises QD507 when the plan asks for what the target lacks.
        """
        notes: list[str] = []
        layers = tuple(self._layer(layer, notes) for layer in plan.layers)
        kept = tuple(dict.fromkeys((*plan.notes, *notes)))
        return ProjectedPlan(plan=replace(plan, layers=layers, notes=kept), target=self)

    def _layer(self, layer: LayerPlan, notes: list[str]) -> LayerPlan:
        if not layer.is_quantized:
            return layer
        if layer.choice.precision not in self.precisions:
            raise self._refusal(layer, layer.choice.precision, ", ".join(self.precisions))
        return replace(
            layer,
            activations=tuple(self._input(layer, entry, notes) for entry in layer.activations),
            weights=tuple(self._input(layer, entry, notes) for entry in layer.weights),
        )

    def _input(self, layer: LayerPlan, entry: QuantizedInput, notes: list[str]) -> QuantizedInput:
        quantizer = entry.quantizer
        if self.symmetric_only and any(quantizer.zero_points):
            raise self._refusal(
                layer, f"a zero point for {entry.tensor}", "quantization.symmetric=true"
            )
        if not self.per_channel and quantizer.axis is not None:
            raise self._refusal(layer, "scales per channel", "quantization.granularity=tensor")
        scales = tuple(self._scale(scale) for scale in quantizer.scales)
        n_clamped = sum(scale < _LEAST_SCALE for scale in quantizer.scales)
        if n_clamped:
            notes.append(
                f"{layer.name}: {n_clamped} scales of {entry.tensor} raised to {_LEAST_SCALE:.3g}"
            )
        return replace(entry, quantizer=self._snapped(quantizer, scales))

    def _scale(self, scale: float) -> float:
        scale = max(scale, _LEAST_SCALE)
        if self.scale_grid == "power_of_two":
            scale = 2.0 ** math.ceil(math.log2(scale) - 1e-9)
        return float(np.float32(scale))

    @staticmethod
    def _snapped(quantizer: Quantizer, scales: tuple[float, ...]) -> Quantizer:
        zeros = tuple(
            z if s == t else min(max(round(z * s / t) if z else 0, quantizer.low), quantizer.high)
            for z, s, t in zip(quantizer.zero_points, quantizer.scales, scales, strict=True)
        )
        # Rounding to float32 moves a scale by 6e-8; only a real change of grid moves zero points.
        close = all(
            math.isclose(s, t, rel_tol=1e-6) for s, t in zip(quantizer.scales, scales, strict=True)
        )
        return replace(
            quantizer, scales=scales, zero_points=quantizer.zero_points if close else zeros
        )

    def _refusal(self, layer: LayerPlan, got: str, expected: str) -> PlanError:
        return PlanError(
            "QD507",
            where=f"layer {layer.name} on target {self.name}",
            got=got,
            expected=expected,
            mend="run qdist quantize with other settings (quantization.symmetric=true, "
            "quantization.granularity=tensor), change the layer's rule, or choose another target",
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class ProjectedPlan:
    """A plan in a target's own numbers. Made by `Target.project` alone."""

    plan: QuantizationPlan
    target: Target
