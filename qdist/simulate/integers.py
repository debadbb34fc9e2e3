"""The target-exact graph: what a chip computes in whole numbers.

Layers of an operator that has a scheme here, with integer inputs that have one scale each, are
computed from integers to integers: accumulators that never overflow, bias in accumulators,
requantization to the numbers of the output. Functions of one 16-bit tensor are looked up where the
target has tables (`qdist.simulate.tables`). Other layers compute in float32 and store their result
in the numbers of their output, which for a function of 8 bits is what a full table holds. What has
no known output stays wide.

Two schemes. On a target with ``m * 2**-n`` scales it is Icraft's (seed of the vendor, section
"operators"): two cuts, bias in twice the bits, halves away from zero; where that document says
nothing - rounding of the first cut, products of two feature maps, whose cut is snapped here while
the vendor moves the output's scale - it is our reading. On every other target no document
specifies the requantization, and all of it is our reading: the multiplier is the float32 nearest
to ``s_x * s_w / s_y``, rounded once, half to even, with a bias in the accumulators' own scale.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import onnx
import onnx.shape_inference
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
from qdist.numbers.table import FUNCTIONS, TABLE_OPERATORS
from qdist.plan.plan import LayerPlan
from qdist.plan.quantizer import Quantizer
from qdist.plan.target import CUT_GRID, ProjectedPlan
from qdist.simulate.assemble import (
    QuantizedGraph,
    finished,
    pair_nodes,
    raised,
    results_of,
    round_results,
)
from qdist.simulate.cut_numbers import folded_weight, norm_numbers
from qdist.simulate.pairs import Pairs
from qdist.simulate.rows import (
    LONGEST_ROW,
    gains_of,
    normalized_wires,
    softmax_wires,
)
from qdist.simulate.tables import looked_up, table_of
from qdist.simulate.wires import FLOAT, Wires

OUR_READING = "our reading: no document specifies this target's requantization"
CUT_READING = "Icraft's cuts; rounding of the first cut and products of activations: our reading"
_PRODUCTS = ("MatMul", "Gemm", "Conv", "ConvTranspose", "Mul")
_SUMS = ("Add", "Sub")
_NORM = "BatchNormalization"
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
        self._apart = {
            layer.fused_with
            for layer in self._layers.values()
            if layer.fused_with not in (None, *self._biases) and layer.op_type == "Add"
        }
        """Layers whose bias is added after a rounding of the model's own."""
        self._notes: list[str] = []
        self._shapes: dict[str, tuple[int, ...]] | None = None
        self._schemes: dict[str, str] = {}
        self._in_float: dict[str, str] = {}

    @property
    def _is_cut(self) -> bool:
        return self._target.scale_grid == CUT_GRID

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
            for part in (node,) if bias is None else (node, bias):
                after = round_results(part, results.get(part.name, {}), self._pairs)
                nodes.extend((part, *after))
        self._proto.producer_name = "qdist"
        return IntegerGraph(
            graph=finished(self._frozen, self._proto, nodes, self._pairs),
            reading=CUT_READING if self._is_cut else OUR_READING,
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
        reason = self._obstacle(node, layer)
        if reason is not None:
            self._in_float[layer.name] = reason
            return None
        wires = Wires(self._pairs, f"{layer.name}.integer")
        bias = self._biases.get(layer.name)
        target = bias.output[0] if bias is not None else node.output[0]
        if node.op_type == _NORM:
            self._norm(node, layer, wires, target)
        elif node.op_type == "Softmax":
            self._softmax(node, layer, wires, target)
        elif node.op_type == "LayerNormalization":
            self._layer_norm(node, layer, wires, target)
        elif node.op_type in FUNCTIONS:
            self._function(node, layer, wires, target)
        elif self._is_folded(node, layer):
            self._folded(node, layer, wires, target)
        elif node.op_type in _SUMS:
            self._sum(node, layer, wires, target)
        else:
            self._product(node, layer, wires, target)
        return wires.nodes

    def _obstacle(self, node: NodeProto, layer: LayerPlan) -> str | None:
        """Why the layer is not computed in whole numbers."""
        if node.op_type == _NORM:
            return self._no_norm(node, layer)
        if node.op_type not in (*_PRODUCTS, *_SUMS):
            return self._no_table(node, layer)
        entries = {e.index: e.quantizer for e in (*layer.activations, *layer.weights)}
        if set(entries) != {0, 1}:
            return "an input stays float"
        if any(q.is_float for q in entries.values()):
            return "its numbers are floating-point"
        if self._is_folded(node, layer):
            known = all(name in self._pairs.weights for name in self._bias_names(node))
            return None if known else "its bias is computed"
        if any(e.quantizer.is_dynamic or e.quantizer.axis is not None for e in layer.activations):
            return "an activation has several scales"
        if any(q.blocks is not None for q in entries.values()):
            return "a weight has a scale for every block"
        if node.op_type in _SUMS or node.op_type == "Mul":
            if any(q.axis is not None for q in entries.values()):
                return "a factor has several scales"
            return None if layer.outputs else "its output was not measured"
        if not all(name in self._pairs.weights for name in self._bias_names(node)):
            return "its bias is computed"
        return None

    def _is_folded(self, node: NodeProto, layer: LayerPlan) -> bool:
        """Whether the ratios of a convolution's input, one for each channel, go into its weight, as
        Icraft normalizes."""
        if not self._is_cut or node.op_type != "Conv" or attribute(node, "group", 1) != 1:
            return False
        if not len(layer.activations) == len(layer.weights) == len(layer.outputs) == 1:
            return False
        source, weight = layer.activations[0].quantizer, layer.weights[0].quantizer
        is_plain = weight.blocks is None and weight.axis in (None, 0) and not weight.is_float
        is_stored = layer.outputs[0].quantizer.axis is None and layer.name not in self._apart
        return source.axis == 1 and not any(source.zero_points) and is_plain and is_stored

    def _no_table(self, node: NodeProto, layer: LayerPlan) -> str | None:
        """Why the layer is not looked up in a table."""
        known = node.op_type in TABLE_OPERATORS and node.domain in ("", "ai.onnx")
        if not known or self._table_bits(layer) is None:
            return f"{node.op_type} is a function, or moves values"
        if not layer.activations or not layer.outputs:
            return "its input or output stays float"
        source = layer.activations[0].quantizer
        if source.is_float or source.is_dynamic or source.axis is not None:
            return "an activation has several scales, or floating-point numbers"
        if source.bits <= 8:
            # Its float result, stored, is what a table of all its levels holds.
            return "its table would hold every level"
        return self._no_row(node) if node.op_type == "LayerNormalization" else None

    def _table_bits(self, layer: LayerPlan) -> int | None:
        """The length of the layer's tables: its own, or the target's."""
        if self._target.table_bits is None:
            return None
        return layer.choice.table_bits or self._target.table_bits

    def _no_row(self, node: NodeProto) -> str | None:
        """Why a layer normalization is not computed from a table."""
        if not all(name in self._pairs.weights for name in node.input[1:] if name):
            return "its parameters are computed"
        if any(node.output[1:]):
            return "its statistics are read"
        shape, gain = self._shape(node.input[0]), self._pairs.weights.shape(node.input[1])
        n_axes = len(self._row_axes(node, len(shape)))
        if not shape or tuple(gain) != shape[len(shape) - n_axes :]:
            return "the length of its rows is not known"
        if int(np.prod(gain)) > LONGEST_ROW:
            return f"its rows are longer than {LONGEST_ROW} numbers"
        return None

    @staticmethod
    def _row_axes(node: NodeProto, rank: int) -> tuple[int, ...]:
        """The axes that a layer normalization works along, counted from the end."""
        axis = int(attribute(node, "axis", -1))
        return tuple(range(axis if axis < 0 else axis - rank, 0))

    def _no_norm(self, node: NodeProto, layer: LayerPlan) -> str | None:
        """Why a batch normalization is not computed in whole numbers."""
        if not self._is_cut:
            return f"{node.op_type} has no documented integer form here"
        if not layer.activations or not layer.outputs or layer.activations[0].quantizer.is_float:
            return "its input or output stays float"
        source = layer.activations[0].quantizer
        if source.is_dynamic or source.axis is not None:
            return "an activation has several scales"
        if not all(name in self._pairs.weights for name in node.input[1:5]):
            return "its parameters are computed"
        return None if self._rank(node.input[0]) >= 2 else "its rank is not known"

    def _rank(self, tensor: str) -> int:
        """How many axes a tensor has; 0 where nothing tells."""
        return len(self._shape(tensor))

    def _shape(self, tensor: str) -> tuple[int, ...]:
        """The axes of a tensor, 0 for a length that is not fixed; none where nothing tells."""
        if self._shapes is None:
            graph = onnx.shape_inference.infer_shapes(self._frozen.proto()).graph
            self._shapes = {
                value.name: tuple(dim.dim_value for dim in value.type.tensor_type.shape.dim)
                for value in (*graph.input, *graph.value_info)
            }
        return self._shapes.get(tensor, ())

    def _bias_names(self, node: NodeProto) -> list[str]:
        names = list(node.input[2:3])
        bias = self._biases.get(node.name)
        if bias is not None:
            names += [n for n in bias.input if n != node.output[0]]
        return [name for name in names if name]

    # --- products -------------------------------------------------------------------------------

    def _product(self, node: NodeProto, layer: LayerPlan, wires: Wires, target: str) -> None:
        first, second = self._factors(node, layer, wires)
        scales = _product_scales(node, layer)
        if node.op_type in ("Conv", "ConvTranspose") and scales.ndim:
            scales = scales.reshape(-1, *[1] * (len(self._kernel(node)) - 2))
        if node.op_type == "Mul":
            total = wires.add("Mul", first, second)
        elif node.op_type in ("Conv", "ConvTranspose"):
            total = self._convolution(node, layer, wires, first, second)
        else:
            total = _matrix_product(node, wires, first, second)
        output = layer.outputs[0].quantizer if layer.outputs else None
        if layer.name in self._apart:
            # The accumulators stay wide; the last node of the chain stores its result.
            output = None
        if self._is_cut and output is not None:
            self._schemes[layer.name] = "cuts"
            self._cut(node, layer, wires, (total, target), scales, output)
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

    def _factors(self, node: NodeProto, layer: LayerPlan, wires: Wires) -> tuple[str, str]:
        """Both inputs as whole numbers, less zero points: activations and pointwise constants in
        float64, weights of a convolution in float32."""
        rounding = self._target.rounding
        found: dict[int, str] = {}
        for entry in layer.activations:
            source = node.input[entry.index]
            found[entry.index] = wires.integers(source, entry.quantizer, rounding)
        for entry in layer.weights:
            name = wires.weight(entry.tensor, entry.quantizer)
            is_kernel = node.op_type in ("Conv", "ConvTranspose")
            found[entry.index] = name if is_kernel else wires.wide(name)
        return found[0], found[1]

    def _convolution(
        self, node: NodeProto, layer: LayerPlan, wires: Wires, first: str, second: str
    ) -> str:
        ranges = tuple(
            max(abs(q.low - q.zero_points[0]), abs(q.high - q.zero_points[0]))
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
        for name in self._bias_names(node):
            values = self._pairs.weights.read(name).astype(np.float64)
            if name in node.input and node.op_type == "Gemm":
                values = values * attribute(node, "beta", 1.0)
            elif name in node.input:
                values = values.reshape(-1, *[1] * (len(self._kernel(node)) - 2))
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

    def _kernel(self, node: NodeProto) -> tuple[int, ...]:
        return self._pairs.weights.shape(node.input[1])

    def _cut(
        self,
        node: NodeProto,
        layer: LayerPlan,
        wires: Wires,
        names: tuple[str, str],
        scales: NDArray[np.float64],
        output: Quantizer,
    ) -> None:
        """Icraft's requantization: first cut, bias in twice the bits, multiplication and shift."""
        total, target = names
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
        self._finish_cut(
            node, wires, (total, target), values.reshape(normalized.shape), shift, layer
        )

    def _folded(self, node: NodeProto, layer: LayerPlan, wires: Wires, target: str) -> None:
        """A convolution whose input has a ratio for every channel: these are multiplied into the
        weight, which then gets its own scales."""
        self._schemes[layer.name] = "cuts"
        (entry,), (source,) = layer.weights, layer.activations
        whole, values, shift = folded_weight(
            self._pairs.weights.read(entry.tensor), layer, source.quantizer, entry.quantizer
        )
        n_spatial = whole.ndim - 2
        scales = np.asarray(source.quantizer.scales, np.float32).reshape(-1, *[1] * n_spatial)
        ratio = wires.add("Div", node.input[0], wires.constant(scales, np.float32))
        x = wires.rounded(wires.wide(ratio), self._target.rounding)
        x = wires.clipped(x, source.quantizer.low, source.quantizer.high)
        ranges = max(-source.quantizer.low, source.quantizer.high), entry.quantizer.high
        attributes = {a.name: attribute(node, a.name) for a in node.attribute}
        weight = wires.constant(whole, np.float32)
        n_summed = int(np.prod(whole.shape[1:]))
        total = wires.convolution("Conv", x, weight, n_summed, ranges, **attributes)
        values = values.reshape(-1, *[1] * n_spatial) if values.size > 1 else values.reshape(())
        self._finish_cut(node, wires, (total, target), values, shift, layer)

    def _finish_cut(
        self,
        node: NodeProto,
        wires: Wires,
        names: tuple[str, str],
        values: NDArray[np.float64],
        shift: int,
        layer: LayerPlan,
    ) -> None:
        """First cut, bias, multiplication and shift. ``values``: of the scales, shaped to broadcast
        with the accumulators."""
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
        normalized = weight * source.scales[0] / output.scales[0]
        whole, offset, scales = norm_numbers(normalized, bias, source.bits)
        wide = BIAS_FACTOR * source.bits
        offset = self._within(layer.name, offset, float((1 << (wide - 1)) - 1), wide)
        along = [1, -1, *[1] * (self._rank(node.input[0]) - 2)]
        x = wires.integers(node.input[0], source, self._target.rounding)
        product = wires.add("Mul", x, wires.constant(whole.reshape(along)))
        total = wires.add("Add", product, wires.constant(offset.reshape(along)))
        stored = wires.requantized(total, scales.reshape(along), output, "half_away")
        wires.stored(stored, output, target)

    def _function(self, node: NodeProto, layer: LayerPlan, wires: Wires, target: str) -> None:
        self._schemes[layer.name] = "table"
        (entry,), (result,) = layer.activations, layer.outputs
        bits = self._table_bits(layer) or 0
        source, numbers = entry.quantizer, result.quantizer
        table = table_of(node, source, numbers, bits, rewrite.opset_of(self._proto))
        whole = wires.integers(node.input[0], source, self._target.rounding)
        wires.stored(looked_up(wires, whole, table, source, bits), numbers, target)

    def _softmax(self, node: NodeProto, layer: LayerPlan, wires: Wires, target: str) -> None:
        self._schemes[layer.name] = "table"
        (entry,), (result,) = layer.activations, layer.outputs
        source, numbers, bits = entry.quantizer, result.quantizer, self._table_bits(layer) or 0
        whole = wires.integers(node.input[0], source, self._target.rounding)
        axis = int(attribute(node, "axis", -1))
        stored = softmax_wires(wires, whole, axis, source, numbers, bits)
        wires.stored(stored, numbers, target)

    def _layer_norm(self, node: NodeProto, layer: LayerPlan, wires: Wires, target: str) -> None:
        self._schemes[layer.name] = "table"
        (entry,), (result,) = layer.activations, layer.outputs
        source, numbers, bits = entry.quantizer, result.quantizer, self._table_bits(layer) or 0
        gain, *bias = (self._pairs.weights.read(name) for name in node.input[1:] if name)
        epsilon = attribute(node, "epsilon", 1e-5)
        gains = gains_of(gain, bias[0] if bias else None, epsilon, source, numbers)
        if gains.n_beyond:
            self._notes.append(f"{layer.name}: {gains.n_beyond} biases saturate in 48 bits")
        whole = wires.integers(node.input[0], source, self._target.rounding)
        axes = self._row_axes(node, self._rank(node.input[0]))
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
        ratios = [quantizers[i].scales[0] / output.scales[0] for i in (0, 1)]
        operands = list(self._factors(node, layer, wires))
        if self._is_cut:
            self._schemes[layer.name] = "cuts"
            scale = vector_grid(output.bits).snap(max(ratios) / output.high).value
            factors = [float(np.trunc(ratio / scale + 0.5)) for ratio in ratios]
            multiplier, rounding = np.asarray(scale), "half_away"
        else:
            self._schemes[layer.name] = "sum"
            factors = [float(np.float32(ratio)) for ratio in ratios]
            multiplier, rounding = np.asarray(1.0), "half_even"
        terms = [
            wires.add("Mul", x, wires.constant(f)) for x, f in zip(operands, factors, strict=True)
        ]
        total = wires.add(node.op_type, *terms)
        whole = wires.requantized(total, multiplier, output, rounding)
        wires.stored(whole, output, target)


def _product_scales(node: NodeProto, layer: LayerPlan) -> NDArray[np.float64]:
    """The scale of the accumulators, shaped to broadcast with them."""
    scale = np.asarray(1.0)
    for entry in layer.activations:
        scale = scale * entry.quantizer.scales[0]
    for entry in layer.weights:
        quantizer = entry.quantizer
        values = np.asarray(quantizer.scales, np.float64)
        if quantizer.axis is None:
            scale = scale * values[0]
        elif node.op_type in ("Conv", "ConvTranspose"):
            scale = scale * values
        else:
            scale = scale * (values if entry.index == 1 else values[:, None])
    return np.asarray(scale * attribute(node, "alpha", 1.0) if node.op_type == "Gemm" else scale)


def _matrix_product(node: NodeProto, wires: Wires, first: str, second: str) -> str:
    if node.op_type == "Gemm":
        if attribute(node, "transA", 0):
            first = wires.add("Transpose", first, perm=[1, 0])
        if attribute(node, "transB", 0):
            second = wires.add("Transpose", second, perm=[1, 0])
    return wires.add("MatMul", first, second)
