"""Layers: the nodes whose precision a plan chooses.

A layer is a node of the main graph that computes on floating-point activations. Its *activations*
are the float inputs that depend on the model's inputs, its *weights* the constant ones that it
multiplies or adds; constants too large to be computed ahead of time are neither. Operators that
only move data (Reshape, Transpose ...) are not layers.
"""

from __future__ import annotations

from dataclasses import dataclass

from onnx import NodeProto

from qdist.model.graph import Graph, attribute
from qdist.model.views import VIEWS

__all__ = ["COMPUTE", "VIEWS", "Layer", "LayerInput", "find_layers"]

_MOVES = VIEWS | {
    "Slice",
    "Split",
    "Gather",
    "GatherElements",
    "GatherND",
    "Expand",
    "Tile",
    "Cast",
    "Shape",
    "Size",
    "ConstantOfShape",
    "Range",
    "QuantizeLinear",
    "DequantizeLinear",
}
COMPUTE = frozenset({"Conv", "ConvTranspose", "MatMul", "Gemm"})
"""Operators that multiply and accumulate and that have an integer form: where a chip spends its
time."""

_RECURRENT = (0, 1, 2, 5, 6)
"""Sequence, weights, recurrent weights and initial states. The state that is fed back is the
output."""
_MULTIPLIERS: dict[tuple[str, str], tuple[int, ...] | None] = {
    ("", "LSTM"): _RECURRENT,
    ("", "GRU"): _RECURRENT[:4],
    ("", "RNN"): _RECURRENT[:4],
    ("", "Attention"): (0, 1, 2, 4, 5),
    ("", "DeformConv"): (0, 1),
    ("", "Einsum"): None,
    ("com.microsoft", "Attention"): (0, 1, 4),
    ("com.microsoft", "PackedAttention"): (0, 1),
    ("com.microsoft", "LongformerAttention"): (0, 1, 4),
    ("com.microsoft", "DecoderMaskedSelfAttention"): (0, 1, 4),
    ("com.microsoft", "MultiHeadAttention"): (0, 1, 2, 6, 7),
    ("com.microsoft", "PackedMultiHeadAttention"): (0, 1, 2),
    ("com.microsoft", "DecoderMaskedMultiHeadAttention"): (0, 1, 2, 5, 6),
    ("com.microsoft", "GroupQueryAttention"): (0, 1, 2, 3, 4),
    ("com.microsoft", "SparseAttention"): (0, 1, 2, 3, 4),
    ("com.microsoft", "PagedAttention"): (0, 1, 2, 3, 4),
    ("com.microsoft", "FusedConv"): (0, 1),
    ("com.microsoft", "NhwcFusedConv"): (0, 1),
    ("com.microsoft", "FusedMatMul"): (0, 1),
    ("com.microsoft", "FusedMatMulActivation"): (0, 1),
    ("com.microsoft", "TransposeMatMul"): (0, 1),
    ("com.microsoft", "SparseToDenseMatMul"): (0, 1),
    ("com.microsoft", "FusedGemm"): (0, 1),
    ("com.microsoft", "GemmFastGelu"): (0, 1),
    # What these multiply with is stored in integers already.
    ("com.microsoft", "MatMulNBits"): (0,),
    ("com.microsoft", "MatMulBnb4"): (0,),
    ("com.microsoft", "DynamicQuantizeMatMul"): (0,),
    ("com.microsoft", "DynamicQuantizeLSTM"): _RECURRENT,
    ("com.microsoft", "QMoE"): (0,),
    ("com.microsoft", "MoE"): (0, 2, 4, 6),
}
"""Other operators that multiply and accumulate, by domain, and which inputs carry data."""

_DATA_INPUTS = _MULTIPLIERS | {
    ("", "Conv"): (0, 1),
    ("", "ConvTranspose"): (0, 1),
    ("", "Gemm"): (0, 1),
    ("", "MatMul"): (0, 1),
    ("", "Where"): (1, 2),
    ("", "Add"): (0, 1),
    ("", "Sub"): (0, 1),
    ("", "Mul"): (0, 1),
    ("", "Div"): (0, 1),
    ("", "Pow"): (0,),
    ("", "Min"): None,
    ("", "Max"): None,
    ("", "Sum"): None,
    ("", "Mean"): None,
    ("", "Concat"): None,
    ("com.microsoft", "SkipLayerNormalization"): (0, 1),
    ("com.microsoft", "SkipSimplifiedLayerNormalization"): (0, 1),
    ("com.microsoft", "SkipGroupNorm"): (0, 3),
    ("com.microsoft", "BiasAdd"): (0, 2),
}
"""Which inputs carry data (None: all). Any other operator: the first."""

_MULTIPLYING_OPERATORS = COMPUTE | {op_type for _, op_type in _MULTIPLIERS}


def is_multiplier(node: NodeProto) -> bool:
    """Whether a node multiplies and accumulates."""
    domain = _domain(node)
    return (domain, node.op_type) in _MULTIPLIERS or (domain == "" and node.op_type in COMPUTE)


def data_inputs(node: NodeProto) -> tuple[str, ...]:
    """What a node computes on: the names of the inputs that carry data, constants included."""
    positions = _DATA_INPUTS.get((_domain(node), node.op_type), (0,))
    return tuple(
        name for i, name in enumerate(node.input) if name and (positions is None or i in positions)
    )


def _domain(node: NodeProto) -> str:
    return "" if node.domain == "ai.onnx" else node.domain


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerInput:
    """One input of a layer: position and tensor; the output-channel axis where it is a weight."""

    index: int
    tensor: str
    channel_axis: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Layer:
    """A node whose precision can be chosen. ``unfolded``: inputs that operators in the graph make
    of constants alone."""

    name: str
    op_type: str
    activations: tuple[LayerInput, ...]
    weights: tuple[LayerInput, ...]
    outputs: tuple[str, ...]
    is_statistics: bool = False
    unfolded: tuple[LayerInput, ...] = ()

    @property
    def is_compute(self) -> bool:
        """Whether the layer multiplies and accumulates."""
        return self.op_type in _MULTIPLYING_OPERATORS


def find_layers(graph: Graph) -> tuple[Layer, ...]:
    """All layers, in graph order (which is topological)."""
    statistics = _statistics_tensors(graph)
    layers = []
    for node in graph.proto.graph.node:
        if node.op_type in _MOVES or not any(graph.is_float(name) for name in node.output):
            continue
        activations, weights, unfolded = _data_inputs(graph, node)
        if not activations:
            continue
        layers.append(
            Layer(
                name=node.name,
                op_type=node.op_type,
                activations=activations,
                weights=weights,
                outputs=tuple(name for name in node.output if name),
                is_statistics=node.output[0] in statistics
                or (
                    node.op_type in ("Sub", "Mul", "Div")
                    and any(entry.tensor in statistics for entry in activations)
                ),
                unfolded=unfolded,
            )
        )
    return tuple(layers)


def _data_inputs(graph: Graph, node: NodeProto) -> tuple[tuple[LayerInput, ...], ...]:
    """Activations, weights, and what is neither: constants that were left unfolded."""
    positions = _DATA_INPUTS.get((_domain(node), node.op_type), (0,))
    activations, weights, unfolded = [], [], []
    for i, name in enumerate(node.input):
        if not name or (positions is not None and i not in positions) or not graph.is_float(name):
            continue
        if graph.is_activation(name):
            activations.append(LayerInput(index=i, tensor=name))
        elif name in graph.constants:
            axis = _channel_axis(graph, node, i, name)
            weights.append(LayerInput(index=i, tensor=name, channel_axis=axis))
        else:
            unfolded.append(LayerInput(index=i, tensor=name))
    return tuple(activations), tuple(weights), tuple(unfolded)


def _channel_axis(graph: Graph, node: NodeProto, index: int, weight: str) -> int | None:
    """The axis of a weight along which output channels lie, or None for no such axis."""
    rank = len(graph.constants[weight].dims)
    if node.op_type in _OUT_CHANNELS_FIRST and index == 1:
        return 0
    if node.op_type in _OUT_CHANNELS_SECOND and rank >= 2:
        return 1
    if node.op_type == "ConvTranspose" and index == 1:
        return 1
    if node.op_type in ("Gemm", "FusedGemm") and rank == 2:
        if index == 1:
            return 0 if attribute(node, "transB", 0) else 1
        return 1 if attribute(node, "transA", 0) else 0
    if node.op_type in ("MatMul", "FusedMatMul") and rank >= 2:
        if attribute(node, f"transBatch{'AB'[index]}", 0):
            return None
        turned = bool(attribute(node, f"trans{'AB'[index]}", 0))
        return rank - 1 if (index == 1) != turned else rank - 2
    return None


_OUT_CHANNELS_FIRST = ("Conv", "FusedConv", "NhwcFusedConv", "DeformConv")
_OUT_CHANNELS_SECOND = ("LSTM", "GRU", "RNN", "Attention", "PackedAttention", "MoE")
"""Weights of these are [directions, gates, inputs], [inputs, q k v] and [experts, outputs, inputs].
"""

_REDUCTIONS = ("ReduceMean", "ReduceSum", "ReduceSumSquare", "ReduceL2")
_POINTWISE = ("Add", "Sub", "Sqrt", "Reciprocal", "Mul", "Div", "Max", "Clip", "Pow")
_BEFORE_ROOT = ("Add", "Mul", "Div", "Max", "Clip")


def _statistics_tensors(graph: Graph) -> set[str]:
    """Tensors inside a written-out normalization: means, variances and what is made of them alone.

    Chips compute these inside one normalization operator, at high precision.
    """
    found: set[str] = set()
    for node in graph.proto.graph.node:
        inputs = _activations_read(graph, node)
        if (
            (node.op_type in _POINTWISE and inputs and inputs <= found)
            or _is_variance(graph, node)
            or _is_square(graph, node)
            or _is_mean(graph, node)
        ):
            found.update(name for name in node.output if name)
    return found


def _activations_read(graph: Graph, node: NodeProto) -> set[str]:
    return {name for name in node.input if name and graph.is_activation(name)}


def _is_variance(graph: Graph, node: NodeProto) -> bool:
    """A reduction whose root or reciprocal is taken, with nothing but constants in between."""
    if node.op_type not in _REDUCTIONS:
        return False
    front = [node.output[0]]
    for _ in range(4):
        following = [reader for name in front for reader in graph.readers.get(name, ())]
        if any(_is_root(graph, reader) for reader in following):
            return True
        front = [
            reader.output[0]
            for reader in following
            if reader.op_type in _BEFORE_ROOT and len(_activations_read(graph, reader)) == 1
        ]
    return False


def _is_root(graph: Graph, node: NodeProto) -> bool:
    if node.op_type == "Pow" and node.input[1] in graph.constants:
        return bool((graph.weights.read(node.input[1]) < 0).all())
    return node.op_type in ("Sqrt", "Reciprocal")


def _is_square(graph: Graph, node: NodeProto) -> bool:
    """The squares that a variance is the mean of."""
    squares = node.op_type == "Pow" or (node.op_type == "Mul" and node.input[0] == node.input[1])
    return squares and any(_is_variance(graph, r) for r in graph.readers.get(node.output[0], ()))


def _is_mean(graph: Graph, node: NodeProto) -> bool:
    """The mean of a tensor that is taken off that very tensor before it is squared."""
    return node.op_type == "ReduceMean" and any(
        centred.op_type == "Sub"
        and list(centred.input) == [node.input[0], node.output[0]]
        and any(_is_square(graph, r) for r in graph.readers.get(centred.output[0], ()))
        for centred in graph.readers.get(node.output[0], ())
    )
