"""What a chip's numbers look like: the one place where numbers are snapped.

Simulation and emitters accept nothing but a `ProjectedPlan`, so what is scored is what ships.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from qdist.errors import PlanError
from qdist.numbers.cuts import Cuts, matrix_cuts, vector_cuts
from qdist.numbers.dtype import INTEGERS
from qdist.numbers.grid import LEAST_SCALE, FloatGrid, PowerOfTwoGrid, ScaleGrid
from qdist.numbers.rounding import ROUNDINGS
from qdist.numbers.table import TABLE_OPERATORS
from qdist.plan.passing_on import passed_on
from qdist.plan.plan import BiasAdd, LayerPlan, QuantizationPlan, QuantizedInput
from qdist.plan.quantizer import BlockScales, Quantizer

CUT_GRID = "m*2^-n"
SCALE_GRIDS = ("float", "power_of_two", CUT_GRID)
_TABLE_TYPES = (INTEGERS["int16"], INTEGERS["uint16"])
_GRIDS: dict[str, ScaleGrid] = {
    "float": FloatGrid(),
    "power_of_two": PowerOfTwoGrid(),
    # Feature maps are normalized by any float32; the grid is that of the cuts.
    CUT_GRID: FloatGrid(),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """What a toolchain accepts.

    ``precisions``: names it supports. ``symmetric_only``: activations must have zero point 0.
    ``per_channel``: whether weights may have a scale per output channel, but for those of
    ``per_tensor_operators``; ``blocks``: whether they may have one for every so many values,
    ``block_sizes``: how many (empty: any). ``tokens`` and ``activation_channels``: whether
    activations may have a scale per token, and per channel.

    ``scale_grid``: ``float`` (float32), ``power_of_two`` (rounded up, so that nothing more is
    clipped) or ``m*2^-n``: Icraft's, where the weight's scale over those of input and output is
    split into the cuts of `qdist.numbers.cuts`. ``rounding``: of weights, ``half_even`` or
    ``half_away``. ``table_bits``: functions of 16-bit tensors are tables of ``2**table_bits``
    intervals (target-exact mode alone) unless a layer's choice says another length; None: no
    tables. ``split_bias``: whether a convolution's bias may be an Add of its own.
    """

    name: str
    precisions: tuple[str, ...]
    symmetric_only: bool = False
    per_channel: bool = True
    per_tensor_operators: tuple[str, ...] = ()
    blocks: bool = True
    block_sizes: tuple[int, ...] = ()
    tokens: bool = True
    activation_channels: bool = True
    scale_grid: str = "float"
    rounding: str = "half_even"
    table_bits: int | None = None
    split_bias: bool = False

    def __post_init__(self) -> None:
        if self.scale_grid not in SCALE_GRIDS:
            raise ValueError(f"scale_grid must be one of {SCALE_GRIDS}, got {self.scale_grid!r}")
        if self.rounding not in ROUNDINGS:
            raise ValueError(f"rounding must be one of {ROUNDINGS}, got {self.rounding!r}")
        if self.table_bits is not None and not 4 <= self.table_bits <= 16:
            raise ValueError(f"table_bits must be within 4..16, got {self.table_bits}")

    def project(self, plan: QuantizationPlan) -> ProjectedPlan:
        """The plan with every number as the target stores it. Projecting twice changes nothing.

        Raises QD507 when the plan asks for what the target lacks.
        """
        notes: list[str] = []
        layers = tuple(self._layer(layer, notes) for layer in plan.layers)
        if self.scale_grid == CUT_GRID:
            several = self.activation_channels
            layers = passed_on(layers, plan.passing, notes, several=several)
            layers = tuple(_cut(layer, notes) for layer in layers)
        idle = [layer.name for layer in layers if _has_idle_table(layer)]
        if idle:
            notes.append(
                f"table_bits means nothing to {len(idle)} layers, such as {idle[0]}: tables are "
                "for functions of 16-bit activations"
            )
        kept = tuple(dict.fromkeys((*plan.notes, *notes)))
        return ProjectedPlan(plan=replace(plan, layers=layers, notes=kept), target=self)

    def _layer(self, layer: LayerPlan, notes: list[str]) -> LayerPlan:
        if not layer.is_quantized:
            return layer
        if layer.choice.precision not in self.precisions:
            raise self._refusal(layer, layer.choice.precision, ", ".join(self.precisions))
        if layer.choice.table_bits is not None and self.table_bits is None:
            got = f"table_bits {layer.choice.table_bits}"
            raise self._refusal(layer, got, "no table_bits: the target has no tables")
        if layer.bias_add is not None and not self.split_bias:
            raise self._refusal(layer, "split_bias", "the bias in the convolution")
        for entry in layer.weights:
            self._check_weight(layer, entry.quantizer)
        for entry in (*layer.activations, *layer.outputs):
            self._check_activation(layer, entry)
        return replace(
            layer,
            activations=tuple(self._input(layer, entry, notes) for entry in layer.activations),
            weights=tuple(self._rounded(self._input(layer, e, notes)) for e in layer.weights),
            outputs=tuple(self._input(layer, entry, []) for entry in layer.outputs),
            bias_add=None if layer.bias_add is None else self._bias_add(layer, layer.bias_add),
        )

    def _bias_add(self, layer: LayerPlan, add: BiasAdd) -> BiasAdd:
        self._check_activation(layer, add.result)
        self._check_weight(layer, add.bias.quantizer)
        return replace(
            add,
            result=self._input(layer, add.result, []),
            bias=self._rounded(self._input(layer, add.bias, [])),
        )

    def _check_weight(self, layer: LayerPlan, quantizer: Quantizer) -> None:
        if self.symmetric_only and any(quantizer.zero_points):
            got = f"weights of {quantizer.dtype}, with a zero point"
            raise self._refusal(layer, got, "a precision with signed weights, such as w4 or w4a8")
        several = quantizer.axis is not None or quantizer.blocks is not None
        if not self.per_channel and several:
            raise self._refusal(layer, "scales per channel", "quantization.granularity=tensor")
        if layer.op_type in self.per_tensor_operators and several:
            rule = f'{{match: "op:{layer.op_type}", granularity: tensor}}'
            raise self._refusal(layer, f"{layer.op_type} with scales per channel", f"a rule {rule}")
        if quantizer.blocks is None:
            return
        size = quantizer.blocks.size
        if not self.blocks:
            raise self._refusal(layer, "scales for blocks", "quantization.granularity=channel")
        if self.block_sizes and size not in self.block_sizes:
            known = ", ".join(map(str, self.block_sizes))
            raise self._refusal(layer, f"blocks of {size}", f"blocks of {known}")

    def _check_activation(self, layer: LayerPlan, entry: QuantizedInput) -> None:
        quantizer = entry.quantizer
        if self.symmetric_only and any(quantizer.zero_points):
            raise self._refusal(
                layer, f"a zero point for {entry.tensor}", "quantization.symmetric=true"
            )
        for is_there, allowed, what in (
            (quantizer.is_dynamic, self.tokens, "token"),
            (quantizer.axis is not None, self.activation_channels, "channel"),
        ):
            if is_there and not allowed:
                got = f"a scale per {what} for {entry.tensor}"
                raise self._refusal(layer, got, "quantization.activation_granularity=tensor")

    def _input(self, layer: LayerPlan, entry: QuantizedInput, notes: list[str]) -> QuantizedInput:
        quantizer = entry.quantizer
        grid = _GRIDS[self.scale_grid]
        snapped = [grid.snap(scale) for scale in quantizer.scales]
        n_clamped = sum(entry.is_clamped for entry in snapped)
        if n_clamped:
            notes.append(
                f"{layer.name}: {n_clamped} scales of {entry.tensor} raised to {LEAST_SCALE:.3g}"
            )
        scales = tuple(entry.value for entry in snapped)
        found = self._snapped(quantizer, scales)
        if quantizer.blocks is not None and self.scale_grid != "float":
            found = replace(found, blocks=_snapped_blocks(quantizer.blocks, grid))
        return replace(entry, quantizer=found)

    def _rounded(self, entry: QuantizedInput) -> QuantizedInput:
        return replace(entry, quantizer=replace(entry.quantizer, rounding=self.rounding))

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


def _has_idle_table(layer: LayerPlan) -> bool:
    """Whether the layer has a length of table, and no table."""
    if layer.choice.table_bits is None:
        return False
    is_16_bit = layer.choice.bits.activation_type in _TABLE_TYPES
    return layer.op_type not in TABLE_OPERATORS or not (is_16_bit and layer.is_quantized)


def _snapped_blocks(blocks: BlockScales, grid: ScaleGrid) -> BlockScales:
    values = blocks.values.copy()
    values.ravel()[:] = [grid.snap(float(scale)).value for scale in values.ravel()]
    return BlockScales.of(values, blocks.axis, blocks.size)


def _cut(layer: LayerPlan, notes: list[str]) -> LayerPlan:
    """The layer with its weight's scale such that over the scales of input and output it is what
    the hardware multiplies with.

    Products of two activations have no weight to adjust: their cut is snapped where it is made
    (`qdist.simulate.integers`). So is that of a layer whose output nobody has measured.
    """
    # What is multiplied and summed is stored before a bias that is split off is added.
    results = (layer.bias_add.result,) if layer.bias_add is not None else layer.outputs
    is_one = len(layer.weights) == len(layer.activations) == len(results) == 1
    if not is_one or layer.weights[0].quantizer.is_float or layer.op_type not in _CUT_OPERATORS:
        return layer
    (entry,), (source,), (result,) = layer.weights, layer.activations, results
    if source.quantizer.axis is not None or result.quantizer.axis is not None:
        return layer
    ratio = source.quantizer.scales[0] / result.quantizer.scales[0]
    normalized = [scale * ratio for scale in entry.quantizer.scales]
    biases = [bound / result.quantizer.scales[0] for bound in layer.bias_bounds]
    cuts = cuts_of(layer, normalized, biases)
    found = [scale.value / ratio for scale in cuts.scales]
    # What was clamped once lies on the grid's end, but for the last bit of a float32.
    n_clamped = sum(
        s.is_clamped and not math.isclose(s.value, scale, rel_tol=1e-6)
        for s, scale in zip(cuts.scales, normalized, strict=True)
    )
    if n_clamped:
        notes.append(
            f"{layer.name}: {n_clamped} scales of {entry.tensor} lie beyond what the cuts reach"
        )
    quantizer = replace(
        entry.quantizer,
        scales=tuple(FloatGrid().snap(scale).value for scale in found),
        cuts=tuple((s.m or 0, s.n or 0, cuts.shift) for s in cuts.scales),
    )
    return replace(layer, weights=(replace(entry, quantizer=quantizer),))


_CUT_OPERATORS = ("Conv", "ConvTranspose", "MatMul", "Gemm", "Mul")


def cuts_of(layer: LayerPlan, scales: list[float], biases: list[float]) -> Cuts:
    """The cuts for these normalized scales: on the vector unit alone for depthwise convolutions and
    products, else on both. ``biases``: normalized, one for each scale, one in all or none; or more,
    under one scale."""
    bits = layer.activations[0].quantizer.bits
    if len(scales) == 1 and biases:
        biases = [max(biases)]
    elif len(biases) == 1:
        biases = biases * len(scales)
    known = biases if len(biases) == len(scales) else None
    if layer.op_type == "Mul" or layer.is_depthwise:
        return vector_cuts(scales, bits, known)
    return matrix_cuts(scales, bits, known)


@dataclass(frozen=True, slots=True, kw_only=True)
class ProjectedPlan:
    """A plan in a target's own numbers. Made by `Target.project` alone."""

    plan: QuantizationPlan
    target: Target
