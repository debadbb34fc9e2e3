"""Which tensors are measured.

A tap is one extra output of the frozen graph. Operators that only rearrange values share their
source's distribution, so the source is tapped once and the alias table says so. Tensors inside the
bodies of control flow are brought out where that is possible; what cannot be measured is named.
"""

from __future__ import annotations

import difflib
import fnmatch
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import onnx
from onnx import ModelProto, NodeProto, TensorProto

from qdist.errors import ModelError
from qdist.model.bodies import Body, body_attributes, find_bodies, node_labels, path_of
from qdist.model.graph import FLOAT_TYPES, Graph
from qdist.model.half import carried, widen
from qdist.model.hoist import hoist
from qdist.model.layers import data_inputs, is_multiplier
from qdist.model.origins import Origins
from qdist.model.rewrite import names_read
from qdist.model.views import Scope

MODES = ("all", "compute")

_INTERNALS = {
    "LSTM": "gates and states of the single steps",
    "GRU": "gates and states of the single steps",
    "RNN": "states of the single steps",
    "DynamicQuantizeLSTM": "gates and states of the single steps",
    "Attention": "attention scores",
    "MultiHeadAttention": "attention scores",
    "GroupQueryAttention": "attention scores",
    "SparseAttention": "attention scores",
    "PagedAttention": "attention scores",
    "PackedAttention": "attention scores",
    "PackedMultiHeadAttention": "attention scores",
    "LongformerAttention": "attention scores",
    "DecoderMaskedSelfAttention": "attention scores",
    "DecoderMaskedMultiHeadAttention": "attention scores",
    "LinearAttention": "states of the single steps",
    "MoE": "what the experts compute and how many tokens each one saw",
    "QMoE": "what the experts compute and how many tokens each one saw",
}
"""Operators that compute what no output shows."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TapPoint:
    """One measured tensor: its name, its source dtype, and whether it is a model input.

    A tensor inside a body is named by its path and handed out as float32.
    """

    tensor: str
    dtype: str
    is_input: bool

    @property
    def output(self) -> str:
        """The tapped graph's output that holds the values. NumPy has no bfloat16 to hand out, so
        those leave as float32, which is exact."""
        return self.tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class TapTable:
    """The measured tensors in graph order, and which other tensors they stand for.

    ``aliases`` maps a tensor to the tapped one that holds the same values (a tensor inside a branch
    of ``If``: whenever the branch runs); ``untapped`` names what could not be measured (tensors, or
    nodes that compute something inside) and why.
    """

    points: tuple[TapPoint, ...]
    aliases: dict[str, str]
    untapped: dict[str, str]

    @property
    def tensors(self) -> tuple[str, ...]:
        """Names of the measured tensors: the rows of every record."""
        return tuple(point.tensor for point in self.points)

    def row_of(self, tensor: str) -> str:
        """The measured tensor that answers for ``tensor``."""
        return self.aliases.get(tensor, tensor)


def find_taps(graph: Graph, mode: str | Sequence[str] = "all") -> TapTable:
    """The taps of a model.

    ``mode``: ``all`` distinct float activations; what ``compute`` layers read and the model's
    outputs; or names of tensors and of layers (what they read and write) and `fnmatch` patterns of
    either. Raises `ModelError` QD209 when the model has none, QD208 for a name or pattern that
    fits no activation.
    """
    if isinstance(mode, str) and mode not in MODES:
        raise ValueError(f"taps must be one of {MODES} or a list of names, got {mode!r}")
    found = _Activations(graph)
    if not found.dtypes:
        raise ModelError(
            "QD209",
            where=str(graph.model.source),
            got="no floating-point activation",
            expected="a float model",
            mend="give the float model, not one that is already quantized to integers",
        )
    if mode == "all":
        wanted = set(found.dtypes)
    elif mode == "compute":
        wanted = found.read_by_multipliers | set(graph.output_names)
    else:
        wanted = _chosen(found, mode)
    wanted = {found.aliases.get(name, name) for name in wanted} & set(found.dtypes)
    points = [
        TapPoint(tensor=name, dtype=dtype, is_input=name in graph.input_names)
        for name, dtype in found.dtypes.items()
        if name in wanted and name not in found.aliases
    ]
    return TapTable(
        points=tuple(points),
        aliases={name: source for name, source in found.aliases.items() if source in wanted},
        untapped=found.untapped,
    )


def tapped_graph(graph: Graph, taps: TapTable) -> bytes:
    """The frozen graph with the taps' `TapPoint.output` as its only outputs, serialized."""
    proto = graph.model.proto()
    del proto.graph.output[:]
    expose(proto, graph, taps.points)
    return proto.SerializeToString()


def expose(proto: ModelProto, graph: Graph, points: Iterable[TapPoint]) -> None:
    """Add the taps that ``proto`` (the graph's model, or a part of it with whole nodes) can give
    to its outputs, and write out the rounding of half precision, so that no tap changes another.
    """
    widen(proto, graph.model.data_folder, graph.execution, partial(_known, graph))
    points = [point for point in points if not point.is_input]
    inner = {point.tensor for point in points if point.tensor not in graph.maker}
    hoist(proto.graph, inner)
    for point in points:
        is_inner = point.tensor in inner
        element = TensorProto.FLOAT if is_inner else carried(_ELEMENTS[point.dtype])
        proto.graph.output.append(onnx.helper.make_tensor_value_info(point.output, element, None))


_ELEMENTS = {name: element for element, name in FLOAT_TYPES.items()}


def _known(graph: Graph, tensor: str) -> int:
    found = graph.type_of(tensor)
    return found.element if found is not None else TensorProto.UNDEFINED


class _Activations:
    """Every float activation of a model, in graph order, those in bodies by their paths.

    ``dtypes``: name -> source dtype, aliases included. ``touched``: layer -> the activations that
    it reads and writes.
    """

    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self.dtypes: dict[str, str] = {}
        self.aliases: dict[str, str] = {}
        self.untapped: dict[str, str] = {}
        self.read_by_multipliers: set[str] = set()
        self.touched: dict[str, set[str]] = {}
        self._bodies = {body.path: body for body in find_bodies(graph)}
        self._origins = Origins(graph, self._bodies.values())
        for name in graph.input_names:
            if graph.is_float(name):
                self.dtypes[name] = _dtype(graph, name)
        self._add(graph, graph.proto.graph, "")

    def _add(self, scope: Graph | Body, proto: onnx.GraphProto, prefix: str) -> None:
        for node, label in zip(proto.node, node_labels(proto), strict=True):
            layer = f"{prefix}{label}"
            if node.op_type in _INTERNALS:
                what = _INTERNALS[node.op_type]
                self.untapped[layer] = (
                    f"internal to {layer} ({node.op_type}): not measured ({what})"
                )
            self._add_outputs(scope, node, prefix)
            for attribute, _ in body_attributes(node):
                path = f"{layer}/{attribute}"
                self._add(self._bodies[path], self._bodies[path].proto, f"{path}/")
            reads = {path_of(scope, name) for name in names_read(node)}
            writes = {f"{prefix}{name}" for name in node.output if name}
            inside = {name for name in self.dtypes if name.startswith(f"{layer}/")}
            self.touched[layer] = (reads | writes | inside) & set(self.dtypes)
            if is_multiplier(node):
                self.read_by_multipliers |= {path_of(scope, n) for n in data_inputs(node)}

    def _add_outputs(self, scope: Graph | Body, node: NodeProto, prefix: str) -> None:
        for name in node.output:
            if not name or not scope.is_float(name) or not scope.is_activation(name):
                continue
            path = f"{prefix}{name}"
            if isinstance(scope, Body) and scope.blocked is not None:
                self.untapped[path] = scope.blocked
                continue
            source = self._origins.of(scope, name)
            self.dtypes[path] = _dtype(scope, name)
            if source != path:
                self.aliases[path] = source


def _dtype(scope: Scope, name: str) -> str:
    found = scope.type_of(name)
    return FLOAT_TYPES[found.element] if found is not None else "float32"


def _chosen(found: _Activations, entries: Sequence[str]) -> set[str]:
    wanted: set[str] = set()
    for entry in entries:
        if entry in found.dtypes:
            wanted.add(entry)
        elif entry in found.touched:
            wanted |= _not_empty(entry, found, found.touched[entry])
        else:
            wanted |= _not_empty(entry, found, set(_matching(entry, found)))
    if not entries:
        raise ValueError("taps must name at least one tensor or layer")
    return wanted


def _matching(pattern: str, found: _Activations) -> Iterator[str]:
    yield from (name for name in found.dtypes if fnmatch.fnmatchcase(name, pattern))
    for layer, tensors in found.touched.items():
        if fnmatch.fnmatchcase(layer, pattern):
            yield from tensors


def _not_empty(entry: str, found: _Activations, tensors: set[str]) -> set[str]:
    if tensors:
        return tensors
    known = [*found.dtypes, *found.touched]
    close = difflib.get_close_matches(entry, dict.fromkeys(known), n=3, cutoff=0.5)
    raise ModelError(
        "QD208",
        where=f"taps entry {entry!r} of {found.graph.model.source}",
        got=_instead(entry, found),
        expected="a float activation, a layer that reads or writes one, or a pattern of either",
        mend=f"did you mean {' or '.join(close)}?" if close else "qdist show lists the layers",
    )


def _instead(entry: str, found: _Activations) -> str:
    graph = found.graph
    if entry in found.untapped:
        return f"something that cannot be measured: {found.untapped[entry]}"
    if entry in graph.constants or (entry in graph.maker and not graph.is_activation(entry)):
        return "a constant, which is the same for every sample"
    if entry in graph.maker or entry in graph.input_names:
        return "a tensor that does not hold floating-point numbers"
    if entry in found.touched:
        return "a layer that neither reads nor writes a float activation"
    return "nothing of that name"
