"""The target-exact graph: what a chip computes in whole numbers.

Layers of an operator that has a scheme here, with integer inputs, are computed from integers to
integers: accumulators that never overflow, bias in accumulators, requantization to the numbers of
the output. Inputs may have several scales (`qdist.simulate.ratios`). Functions of one 16-bit tensor
are looked up where the target has tables (`qdist.simulate.tables`). Other layers compute in float32
and store their result in the numbers of their output, which for a function of 8 bits is what a full
table holds. What has no known output stays wide.

Two schemes. On a target with ``m * 2**-n`` scales it is Icraft's (seed of the vendor, section
"operators"): two cuts, bias in twice the bits, halves away from zero; where that document says
nothing - rounding of the first cut, products of two feature maps, whose cut is snapped here while
the vendor moves the output's scale - it is our reading. On every other target no document
specifies the requantization, and all of it is our reading: the multiplier is the float32 nearest
to ``s_x * s_w / s_y``, rounded once, half to even, with a bias in the accumulators' own scale.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray
from onnx import NodeProto

from qdist.model import rewrite
from qdist.model.freeze import FrozenModel
from qdist.model.graph import attribute
from qdist.numbers.cuts import (
    BIAS_FACTOR,
    matrix_cuts,
    vector_cuts,
    vector_grid,
)
from qdist.numbers.rounding import round_integer
from qdist.numbers.table import FUNCTIONS
from qdist.plan.plan import BiasAdd, LayerPlan
from qdist.plan.quantizer import Quantizer
from qdist.plan.target import ProjectedPlan
from qdist.simulate.assemble import (
    QuantizedGraph,
    finished,
    pair_nodes,
    raised,
    results_of,
    round_results,
)
from qdist.simulate.cut_numbers import folded_weight, norm_numbers
from qdist.simulate.layer_facts import NORM, SUMS, LayerFacts
from qdist.simulate.pairs import Pairs
from qdist.simulate.ratios import (
    CONVOLUTIONS,
    accumulator_scales,
    along,
    is_depthwise,
    kept_axis,
    ratios_of,
    shaped_scales,
)
from qdist.simulate.rows import (
    gains_of,
    normalized_wires,
    softmax_wires,
)
from qdist.simulate.split_bias import with_bias_apart, without_bias
from qdist.simulate.tables import looked_up, table_of
from qdist.simulate.wires import FLOAT, Wires

OUR_READING = "our reading: no document specifies this target's requantization"
CUT_READING = "Icraft's cuts; rounding of the first cut and products of activations: our reading"
_BIAS_BITS = {8: 32, 16: 48}
"""Bits of a bias by those of the activations: products of 16-bit numbers need wide accumulators."""


@dataclass(frozen=True, slots=True, kw_only=True)
class IntegerGraph:
    """``graph`` as `QuantizedGraph`. ``reading``: how far the arithmetic is documented.
    ``schemes``: layer -> the scheme that computes it, for those in whole numbers. ``in_float``:
    quantized layer -> why it is computed in float32. ``notes``: what saturates that should not."""

    graph: QuantizedGraph
    reading: str
    schemes: dict[str, str]
    in_float: dict[str, str]
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class _Folded:
    """``weight``: the tensor of whole numbers with ratios in them, float32. ``scales``: of the
    accumulators, on a target that cuts over that of the result; ``shift``: the first cut there."""

    weight: str
    scales: NDArray[np.float64]
    shift: int


def integer_graph(frozen: FrozenModel, projected: ProjectedPlan) -> IntegerGraph:
    """The frozen graph as the target's integer units compute it. Raises QD206."""
    return _Builder(frozen, projected).build()


class _Builder:
    def __init__(self, frozen: FrozenModel, projected: ProjectedPlan) -> None:
        self._frozen = frozen
        self._target = projected.target
        self._layers = {layer.name: layer for layer in projected.plan.layers}
        # float64 Clip and Cast are older than any opset a plan asks for; int4 and int16 are not.
        self._proto = raised(frozen, max(projected.plan.opset, 13))
        self._pairs = Pairs(frozen.weights(), rewrite.tensor_names(self._proto))
        self._biases = self._fused_biases()
        self._facts = LayerFacts(frozen, self._target, self._pairs.weights, self._biases)
        self._apart = {
            layer.fused_with
            for layer in self._layers.values()
            if layer.fused_with not in (None, *self._biases) and layer.op_type == "Add"
        }
        """Layers whose bias is added after a rounding of the model's own."""
        self._notes: list[str] = []
        self._schemes: dict[str, str] = {}
        self._in_float: dict[str, str] = {}

    def build(self) -> IntegerGraph:
        """All nodes, one layer after the other."""
        nodes: list[NodeProto] = []
        placed: set[str] = set()
        results = results_of(self._layers.values())
        merged = {bias.name for bias in self._biases.values()}
        for node in self._proto.graph.node:
            if node.name in merged:
                continue
            layer = self._layers.get(node.name)
            made = self._in_integers(node, layer) if layer and layer.is_quantized else None
            if made is not None:
                nodes.extend(made)
                continue
            if layer is not None and layer.is_quantized:
                nodes.extend(pair_nodes(node, layer, self._pairs, placed))
            bias = self._biases.get(node.name)
            apart = layer if layer is not None and layer.is_quantized else None
            *before, last = with_bias_apart(node, apart, self._pairs, placed)
            nodes.extend(before)
            parts = [(last, node.name), *([] if bias is None else [(bias, bias.name)])]
            for part, name in parts:
                after = round_results(part, results.get(name, {}), self._pairs)
                nodes.extend((part, *after))
        self._proto.producer_name = "qdist"
        return IntegerGraph(
            graph=finished(self._frozen, self._proto, nodes, self._pairs),
            reading=CUT_READING if self._facts.is_cut else OUR_READING,
            schemes=self._schemes,
            in_float=self._in_float,
            notes=tuple(self._notes),
        )

    def _fused_biases(self) -> dict[str, NodeProto]:
        """Layer -> the Add of a constant that is computed together with it, right behind it."""
        found = {}
        made = {node.name: node.output[0] for node in self._proto.graph.node}
        for node in self._proto.graph.node:
            layer = self._layers.get(node.name)
            host = None if layer is None else layer.fused_with
            if host is not None and node.op_type == "Add" and made[host] in node.input:
                found[host] = node
        return found

    def _in_integers(self, node: NodeProto, layer: LayerPlan) -> list[NodeProto] | None:
        """The layer in whole numbers; None where it is computed in float32."""
        reason = self._facts.obstacle(node, layer)
        if reason is not None:
            self._in_float[layer.name] = reason
            return None
        wires = Wires(self._pairs, f"{layer.name}.integer")
        bias = self._biases.get(layer.name)
        target = bias.output[0] if bias is not None else node.output[0]
        if node.op_type == NORM:
            self._norm(node, layer, wires, target)
        elif node.op_type == "Softmax":
            self._softmax(node, layer, wires, target)
        elif node.op_type == "LayerNormalization":
            self._layer_norm(node, layer, wires, target)
        elif node.op_type in FUNCTIONS:
            self._function(node, layer, wires, target)
        elif node.op_type in SUMS:
            self._sum(node, layer, wires, target)
        elif layer.bias_add is not None:
            self._product_and_bias(node, layer, layer.bias_add, wires)
        else:
            self._product(node, layer, wires, target)
        return wires.nodes

    # --- products -------------------------------------------------------------------------------

    def _product(self, node: NodeProto, layer: LayerPlan, wires: Wires, target: str) -> None:
        output = layer.outputs[0].quantizer if layer.outputs else None
        if layer.name in self._apart:
            # The accumulators stay wide; the last node of the chain stores its result.
            output = None
        is_cut = self._facts.is_cut and output is not None
        folded = self._folded(node, layer, wires, is_cut=is_cut)
        first, second = self._factors(node, layer, wires, folded.weight if folded else None)
        if node.op_type == "Mul":
            total = wires.add("Mul", first, second)
        elif node.op_type in CONVOLUTIONS:
            total = self._convolution(node, layer, wires, first, second)
        else:
            total = _matrix_product(node, wires, first, second)
        scales = folded.scales if folded else self._scales(node, layer)
        if self._facts.is_cut and output is not None:
            self._schemes[layer.name] = "cuts"
            values, shift = (
                (scales, folded.shift) if folded else self._cut(node, layer, scales, output)
            )
            self._finish_cut(node, wires, (total, target), values, shift, layer)
            return
        self._schemes[layer.name] = "product"
        bias_bits = _BIAS_BITS.get(layer.activations[0].quantizer.bits, 32)
        for bias in self._biases_in(node, scales, bias_bits):
            total = wires.add("Add", total, wires.constant(bias))
        if output is None:
            single = wires.add("Mul", total, wires.constant(scales))
            wires.add("Cast", single, to=FLOAT, target=target)
            return
        multipliers = np.asarray(scales / output.scales[0], np.float32).astype(np.float64)
        whole = wires.requantized(total, multipliers, output, "half_even")
        wires.stored(whole, output, target)

    def _product_and_bias(
        self, node: NodeProto, layer: LayerPlan, add: BiasAdd, wires: Wires
    ) -> None:
        """A convolution whose result is stored, and the bias added to that."""
        before = self._pairs.free(add.result.tensor)
        bare = replace(layer, outputs=(add.result,), bias_add=None)
        self._product(without_bias(node, before), bare, wires, before)
        stored, constant = (entry.quantizer for entry in add.entries)
        output = layer.outputs[0].quantizer
        operands = (
            wires.integers(before, stored, self._target.rounding),
            wires.wide(wires.weight(add.bias.tensor, constant, add.shape)),
        )
        ratios = [np.asarray(q.scales[0] / output.scales[0]) for q in (stored, constant)]
        self._added("Add", operands, ratios, output, wires, node.output[0])

    def _scales(self, node: NodeProto, layer: LayerPlan) -> NDArray[np.float64]:
        """The scale of the accumulators of weights as they are, shaped to broadcast with them."""
        ratios = self._ratios(node, layer)
        if ratios is None:
            return accumulator_scales(node, layer, self._facts.ranks(node))
        # A depthwise convolution: the ratio of the one channel that each result reads.
        scales = ratios.ravel() * np.asarray(layer.weights[0].quantizer.scales)
        return scales.reshape(-1, *[1] * (len(self._facts.kernel(node)) - 2))

    def _ratios(self, node: NodeProto, layer: LayerPlan) -> NDArray[np.float64] | None:
        """Those that lie along what is summed, see `ratios_of`."""
        return ratios_of(node, layer, self._facts.weight_shape(layer), self._facts.ranks(node))

    def _folded(
        self, node: NodeProto, layer: LayerPlan, wires: Wires, *, is_cut: bool
    ) -> _Folded | None:
        """The weight with the ratios of the other factor in it; None where it stays as it is."""
        ratios = self._ratios(node, layer)
        is_single = ratios is not None and is_depthwise(node, self._facts.weight_shape(layer))
        # Without cuts any scale of a depthwise convolution's results is one.
        if ratios is None or (is_single and not is_cut):
            return None
        entry, rank = layer.weights[0], ratios.ndim
        output = layer.outputs[0].quantizer.scales[0] if is_cut else None
        if node.op_type == "Gemm":
            ratios = ratios * attribute(node, "alpha", 1.0)
        wanted = ratios.ravel() * np.asarray(entry.quantizer.scales) if is_single else None
        values = self._pairs.weights.read(entry.tensor)
        whole, scales, shift = folded_weight(values, layer, ratios, output, wanted)
        if node.op_type in CONVOLUTIONS:
            scales = scales.reshape(-1, *[1] * (rank - 2))
        elif entry.quantizer.axis is not None:
            axis = kept_axis(node, entry.index, entry.quantizer.axis - values.ndim)
            scales = along(scales.tolist(), -1 if axis is None else axis)
        if scales.size == 1:
            scales = scales.reshape(())
        return _Folded(weight=wires.constant(whole, np.float32), scales=scales, shift=shift)

    def _factors(
        self, node: NodeProto, layer: LayerPlan, wires: Wires, weight: str | None = None
    ) -> tuple[str, str]:
        """Both inputs as whole numbers, less zero points: activations and pointwise constants in
        float64, weights of a convolution in float32. ``weight``: the numbers of the weight, where
        they are not those of the plan."""
        rounding, ranks = self._target.rounding, self._facts.ranks(node)
        found: dict[int, str] = {}
        for entry in layer.activations:
            source = node.input[entry.index]
            found[entry.index] = wires.integers(
                source, entry.quantizer, rounding, ranks[entry.index]
            )
        for entry in layer.weights:
            name = weight or wires.weight(entry.tensor, entry.quantizer)
            is_kernel = node.op_type in CONVOLUTIONS
            found[entry.index] = name if is_kernel else wires.wide(name)
        return found[0], found[1]

    def _convolution(
        self, node: NodeProto, layer: LayerPlan, wires: Wires, first: str, second: str
    ) -> str:
        ranges = tuple(
            max(max(q.high - zero, zero - q.low) for zero in set(q.zero_points))
            for q in (layer.activations[0].quantizer, layer.weights[0].quantizer)
        )
        shape = self._pairs.weights.shape(node.input[1])
        per_output = int(np.prod(shape[2:])) * (
            shape[1] if node.op_type == "Conv" else shape[0] // attribute(node, "group", 1)
        )
        attributes = {a.name: attribute(node, a.name) for a in node.attribute}
        return wires.convolution(
            node.op_type, first, second, per_output, (ranges[0], ranges[1]), **attributes
        )

    def _biases_in(
        self, node: NodeProto, scales: NDArray[np.float64], bits: int
    ) -> Iterable[NDArray[np.float64]]:
        """The constants that are added, as whole numbers of these scales."""
        high = float((1 << (bits - 1)) - 1)
        for name in self._facts.bias_names(node):
            values = self._pairs.weights.read(name).astype(np.float64)
            if name in node.input and node.op_type == "Gemm":
                values = values * attribute(node, "beta", 1.0)
            elif name in node.input:
                values = values.reshape(-1, *[1] * (len(self._facts.kernel(node)) - 2))
            whole = round_integer(values / scales, self._target.rounding)
            yield self._within(node.name, whole, high, bits)

    def _within(
        self, layer: str, biases: NDArray[np.float64], high: float, bits: int
    ) -> NDArray[np.float64]:
        """Biases kept to what their bits hold, with a note where that changes any."""
        n_beyond = int(np.count_nonzero(np.abs(biases) > high))
        if n_beyond:
            self._notes.append(f"{layer}: {n_beyond} biases saturate in {bits} bits")
        return np.clip(biases, -high, high)

    def _cut(
        self, node: NodeProto, layer: LayerPlan, scales: NDArray[np.float64], output: Quantizer
    ) -> tuple[NDArray[np.float64], int]:
        """The values of the scales of a weight as it is, shaped as they are, and the first cut."""
        bits = layer.activations[0].quantizer.bits
        normalized = scales / output.scales[0]
        plain = node.op_type != "Gemm" or attribute(node, "alpha", 1.0) == 1.0
        if layer.weights and layer.weights[0].quantizer.cuts and plain:
            cuts = layer.weights[0].quantizer.cuts
            values = np.array([np.ldexp(m, -n) for m, n, _ in cuts])
            shift = cuts[0][2]
        else:
            split = vector_cuts if node.op_type == "Mul" else matrix_cuts
            found = split([float(s) for s in normalized.ravel()], bits)
            values, shift = np.array([s.value for s in found.scales]), found.shift
        return values.reshape(normalized.shape), shift

    def _finish_cut(
        self,
        node: NodeProto,
        wires: Wires,
        names: tuple[str, str],
        values: NDArray[np.float64],
        shift: int,
        layer: LayerPlan,
    ) -> None:
        """Icraft's requantization: first cut, bias in twice the bits, multiplication and shift.
        ``values``: of the scales, shaped to broadcast with the accumulators."""
        total, target = names
        bits, output = layer.activations[0].quantizer.bits, layer.outputs[0].quantizer
        second = values * 2.0**shift
        first = wires.add("Mul", total, wires.constant(2.0**-shift))
        total = wires.rounded(first, "half_away")
        for bias in self._biases_in(node, second * output.scales[0], BIAS_FACTOR * bits):
            total = wires.add("Add", total, wires.constant(bias))
        stored = wires.requantized(total, second, output, "half_away")
        wires.stored(stored, output, target)

    # --- normalizations and functions -----------------------------------------------------------

    def _norm(self, node: NodeProto, layer: LayerPlan, wires: Wires, target: str) -> None:
        """Always per channel: weight in the bits of the input, bias in twice as many, one scale for
        both, on the vector unit."""
        self._schemes[layer.name] = "cuts"
        (entry,), (result,) = layer.activations, layer.outputs
        source, output = entry.quantizer, result.quantizer
        gamma, beta, mean, variance = (
            self._pairs.weights.read(name).astype(np.float64) for name in node.input[1:5]
        )
        weight = gamma / np.sqrt(variance + attribute(node, "epsilon", 1e-5))
        bias = (beta - mean * weight) / output.scales[0]
        normalized = weight * np.asarray(source.scales) / output.scales[0]
        whole, offset, scales = norm_numbers(normalized, bias, source.bits)
        wide = BIAS_FACTOR * source.bits
        offset = self._within(layer.name, offset, float((1 << (wide - 1)) - 1), wide)
        rank = self._facts.rank(node.input[0])
        shape = [1, -1, *[1] * (rank - 2)]
        x = wires.integers(node.input[0], source, self._target.rounding, rank)
        product = wires.add("Mul", x, wires.constant(whole.reshape(shape)))
        total = wires.add("Add", product, wires.constant(offset.reshape(shape)))
        stored = wires.requantized(total, scales.reshape(shape), output, "half_away")
        wires.stored(stored, output, target)

    def _function(self, node: NodeProto, layer: LayerPlan, wires: Wires, target: str) -> None:
        self._schemes[layer.name] = "table"
        (entry,), (result,) = layer.activations, layer.outputs
        bits = self._facts.table_bits(layer) or 0
        source, numbers = entry.quantizer, result.quantizer
        table = table_of(node, source, numbers, bits, rewrite.opset_of(self._proto))
        whole = wires.integers(node.input[0], source, self._target.rounding)
        wires.stored(looked_up(wires, whole, table, source, bits), numbers, target)

    def _softmax(self, node: NodeProto, layer: LayerPlan, wires: Wires, target: str) -> None:
        self._schemes[layer.name] = "table"
        (entry,), (result,) = layer.activations, layer.outputs
        source, numbers, bits = (
            entry.quantizer,
            result.quantizer,
            self._facts.table_bits(layer) or 0,
        )
        whole = wires.integers(node.input[0], source, self._target.rounding)
        axis = int(attribute(node, "axis", -1))
        stored = softmax_wires(wires, whole, axis, source, numbers, bits)
        wires.stored(stored, numbers, target)

    def _layer_norm(self, node: NodeProto, layer: LayerPlan, wires: Wires, target: str) -> None:
        self._schemes[layer.name] = "table"
        (entry,), (result,) = layer.activations, layer.outputs
        source, numbers, bits = (
            entry.quantizer,
            result.quantizer,
            self._facts.table_bits(layer) or 0,
        )
        gain, *bias = (self._pairs.weights.read(name) for name in node.input[1:] if name)
        epsilon = attribute(node, "epsilon", 1e-5)
        gains = gains_of(gain, bias[0] if bias else None, epsilon, source, numbers)
        if gains.n_beyond:
            self._notes.append(f"{layer.name}: {gains.n_beyond} biases saturate in 48 bits")
        whole = wires.integers(node.input[0], source, self._target.rounding)
        axes = self._facts.row_axes(node, self._facts.rank(node.input[0]))
        centred = normalized_wires(wires, whole, axes, gain.size, gains.epsilon, bits)
        product = wires.add("Mul", centred, wires.constant(gains.whole))
        total = wires.add("Add", product, wires.constant(gains.bias))
        multiplier = np.asarray(gains.multiplier)
        stored = wires.requantized(total, multiplier, numbers, "half_even")
        wires.stored(stored, numbers, target)

    # --- sums -----------------------------------------------------------------------------------

    def _sum(self, node: NodeProto, layer: LayerPlan, wires: Wires, target: str) -> None:
        output = layer.outputs[0].quantizer
        quantizers = {e.index: e.quantizer for e in (*layer.activations, *layer.weights)}
        ratios = [
            shaped_scales(quantizers[i], rank) / output.scales[0]
            for i, rank in enumerate(self._facts.ranks(node))
        ]
        self._schemes[layer.name] = "cuts" if self._facts.is_cut else "sum"
        operands = self._factors(node, layer, wires)
        self._added(node.op_type, operands, ratios, output, wires, target)

    def _added(
        self,
        op_type: str,
        operands: tuple[str, str],
        ratios: list[NDArray[np.float64]],
        output: Quantizer,
        wires: Wires,
        target: str,
    ) -> None:
        """The sum or difference of whole numbers. ``ratios``: of their scales to the output's."""
        if self._facts.is_cut:
            grid, largest = vector_grid(output.bits), np.maximum(*ratios)
            snapped = [grid.snap(float(ratio) / output.high).value for ratio in largest.ravel()]
            multiplier = np.asarray(snapped).reshape(largest.shape)
            factors = [np.trunc(ratio / multiplier + 0.5) for ratio in ratios]
            rounding = "half_away"
        else:
            factors = [np.asarray(ratio, np.float32).astype(np.float64) for ratio in ratios]
            multiplier, rounding = np.asarray(1.0), "half_even"
        terms = [
            wires.add("Mul", x, wires.constant(f)) for x, f in zip(operands, factors, strict=True)
        ]
        total = wires.add(op_type, *terms)
        whole = wires.requantized(total, multiplier, output, rounding)
        wires.stored(whole, output, target)


def _matrix_product(node: NodeProto, wires: Wires, first: str, second: str) -> str:
    if node.op_type == "Gemm":
        if attribute(node, "transA", 0):
            first = wires.add("Transpose", first, perm=[1, 0])
        if attribute(node, "transB", 0):
            second = wires.add("Transpose", second, perm=[1, 0])
    return wires.add("MatMul", first, second)
