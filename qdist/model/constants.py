"""What a graph computes from constants alone becomes a constant.

As in `rewrite`, each step mutates the model it is given and is deterministic.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Set
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import onnx.shape_inference
from numpy.typing import NDArray
from onnx import ModelProto, NodeProto, SparseTensorProto, TensorProto, helper, numpy_helper

from qdist.model.elements import find_elements
from qdist.model.half import widen_typed
from qdist.model.precision import HALF, mentions
from qdist.model.rewrite import RANDOM, names_read, set_nodes
from qdist.model.session import Execution, measuring_session, run
from qdist.model.weights import n_bytes_of

_NOT_FOLDABLE = RANDOM | frozenset(
    {
        "QuantizeLinear",
        "DequantizeLinear",
        "Constant",
        # What these make are no tensors, and an initializer has to be one.
        "Optional",
        "SequenceConstruct",
        "SequenceInsert",
        "SplitToSequence",
    }
)
FOLD_LIMIT_BYTES = 64 << 20
"""Folding one operator adds no more than this to the graph. What takes the place of weights that
are in the graph already adds nothing; copies of external ones do."""
FOLD_TOTAL_BYTES = 512 << 20
"""Nor do all of them together add more than this."""
_PROTOBUF_BYTES = 2000 << 20
"""One protobuf holds 2 GiB; some is left for what else changes."""
_SHAPE_BYTES = 4096
"""Initializers up to this size may hold shapes, and are shown to shape inference."""


def constants_to_initializers(model: ModelProto) -> None:
    """``Constant`` nodes and sparse initializers of the main graph become initializers."""
    for sparse in model.graph.sparse_initializer:
        model.graph.initializer.append(_dense(sparse, sparse.values.name))
    del model.graph.sparse_initializer[:]
    kept = []
    for node in model.graph.node:
        tensor = _constant_value(node) if node.op_type == "Constant" else None
        if tensor is None:
            kept.append(node)
        else:
            tensor.name = node.output[0]
            model.graph.initializer.append(tensor)
    set_nodes(model, kept)


def fold_constants(model: ModelProto, folder: Path, execution: Execution) -> str | None:
    """Nodes that depend on constants alone are computed once, by ONNX Runtime.

    Returns a note when something was left unfolded because of its size.
    """
    budget = _Budget(model)
    # Values of one round are the shapes of what another operator makes in the next.
    while True:
        known, unknown = _foldable(model, budget)
        if known:
            _replace_by_values(model, known, folder, execution)
        elif unknown:
            # Only computing them tells how large they are.
            _replace_by_values(model, unknown, folder, execution, budget)
        else:
            break
    n_left = len(budget.refused)
    return f"{n_left} constant operators on large tensors stay in the graph" if n_left else None


class _Budget:
    """How much constant folding may still add to the graph."""

    def __init__(self, model: ModelProto) -> None:
        self._left = min(FOLD_TOTAL_BYTES, max(0, _PROTOBUF_BYTES - model.ByteSize()))
        self._inline = {
            tensor.name: n_bytes_of(tensor)
            for tensor in model.graph.initializer
            if tensor.data_location != TensorProto.EXTERNAL
        }
        self._n_readers = Counter(n for node in model.graph.node for n in set(names_read(node)))
        self._n_readers.update(value.name for value in model.graph.output)
        self.refused: set[str] = set()
        """Names of nodes that are left where they are."""

    def allows(self, node: NodeProto, sizes: Mapping[str, int]) -> bool:
        """Whether the node may be folded into outputs of these sizes; if so, they are counted."""
        operands = set(names_read(node)) & set(self._inline)
        made = {name: sizes.get(name, 0) for name in node.output if name}
        n_made = sum(made.values())
        grown = n_made - sum(self._inline[n] for n in operands if self._n_readers[n] == 1)
        beyond = n_made - sum(self._inline[name] for name in operands)
        if beyond > FOLD_LIMIT_BYTES or grown > self._left:
            self.refused.add(node.name)
            return False
        # An operand gives its place to one result only, and stays where others read it.
        self._inline.update(dict.fromkeys(operands, 0))
        self._inline.update(made)
        self._left -= max(0, grown)
        return True


def _foldable(model: ModelProto, budget: _Budget) -> tuple[list[NodeProto], list[NodeProto]]:
    """Nodes on constants alone whose outputs are of known and small size; and those that could be
    computed now but whose outputs are of unknown size."""
    sizes = _output_sizes(model, _on_constants(model, set()))
    known: list[NodeProto] = []
    unknown: list[NodeProto] = []
    waiting: set[str] = set()
    for node in _on_constants(model, budget.refused):
        if not waiting.isdisjoint(names_read(node)):
            waiting.update(node.output)
        elif not all(name in sizes for name in node.output if name):
            unknown.append(node)
            waiting.update(node.output)
        elif budget.allows(node, sizes):
            known.append(node)
        else:
            waiting.update(node.output)
    return known, unknown


def _on_constants(model: ModelProto, refused: Set[str]) -> list[NodeProto]:
    """The nodes that depend on initializers alone, and on none of those refused."""
    constant = {tensor.name for tensor in model.graph.initializer}
    found = []
    for node in model.graph.node:
        reads = set(names_read(node))
        if node.op_type in _NOT_FOLDABLE or node.name in refused or not reads:
            continue
        if reads <= constant:
            found.append(node)
            constant.update(name for name in node.output if name)
    return found


def _output_sizes(model: ModelProto, nodes: list[NodeProto]) -> dict[str, int]:
    """Bytes of the nodes' outputs, where shape inference finds them."""
    needed = {name for node in nodes for name in names_read(node)}
    part = _shell(model)
    part.graph.node.extend(nodes)
    for tensor in model.graph.initializer:
        if tensor.name not in needed:
            continue
        inline = tensor.data_location != TensorProto.EXTERNAL
        if inline and n_bytes_of(tensor) <= _SHAPE_BYTES:
            part.graph.initializer.append(tensor)
        else:
            value = helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims)
            part.graph.input.append(value)
    try:
        inferred = onnx.shape_inference.infer_shapes(part, data_prop=True)
    except (onnx.shape_inference.InferenceError, RuntimeError, ValueError):
        return {}
    sizes = {}
    for value in inferred.graph.value_info:
        found = value.type.tensor_type
        if found.elem_type and found.HasField("shape"):
            dims = [d.dim_value if d.HasField("dim_value") else -1 for d in found.shape.dim]
            if -1 not in dims:
                sizes[value.name] = n_bytes_of(TensorProto(data_type=found.elem_type, dims=dims))
    return sizes


def _replace_by_values(
    model: ModelProto,
    foldable: list[NodeProto],
    folder: Path,
    execution: Execution,
    budget: _Budget | None = None,
) -> None:
    """Compute the nodes and put the values in their place; with a budget, where it allows."""
    folding = {node.name for node in foldable}
    wanted = {n for node in model.graph.node if node.name not in folding for n in names_read(node)}
    wanted.update(output.name for output in model.graph.output)
    outputs = sorted(wanted & {name for node in foldable for name in node.output})
    values = _values(model, foldable, outputs, folder, execution) if outputs else {}
    if budget is not None:
        sizes = {name: value.nbytes for name, value in values.items()}
        foldable = [node for node in foldable if budget.allows(node, sizes)]
    folded = {node.name for node in foldable}
    made = {name for node in foldable for name in node.output}
    for name in outputs:
        if name in made:
            model.graph.initializer.append(numpy_helper.from_array(values[name], name))
    set_nodes(model, [node for node in model.graph.node if node.name not in folded])


def _values(
    model: ModelProto,
    nodes: list[NodeProto],
    outputs: list[str],
    folder: Path,
    execution: Execution,
) -> dict[str, NDArray[Any]]:
    needed = {name for node in nodes for name in names_read(node)}
    part = _shell(model)
    part.graph.node.extend(nodes)
    part.graph.initializer.extend(t for t in model.graph.initializer if t.name in needed)
    part.graph.output.extend(onnx.ValueInfoProto(name=name) for name in outputs)
    narrow: set[str] = set()
    if mentions(part, HALF):
        elements = find_elements(part, folder, execution)
        narrow = {name for name in outputs if elements.of(name) == TensorProto.BFLOAT16}
        widen_typed(part, elements)
    session = measuring_session(part.SerializeToString(), folder, execution)
    values = dict(zip(outputs, map(np.asarray, run(session, outputs, {})), strict=True))
    # Rounded already: no bit is lost.
    return values | {name: values[name].astype(ml_dtypes.bfloat16) for name in narrow}


def _shell(model: ModelProto) -> ModelProto:
    shell = onnx.ModelProto(ir_version=model.ir_version, producer_name="qdist")
    shell.opset_import.extend(model.opset_import)
    shell.functions.extend(model.functions)
    shell.graph.name = "constants"
    return shell


def _constant_value(node: NodeProto) -> TensorProto | None:
    for attribute in node.attribute:
        if attribute.name == "value":
            return TensorProto.FromString(attribute.t.SerializeToString())
        if attribute.name == "value_float":
            return numpy_helper.from_array(np.float32(attribute.f))
        if attribute.name == "value_floats":
            return numpy_helper.from_array(np.array(attribute.floats, np.float32))
        if attribute.name == "value_int":
            return numpy_helper.from_array(np.int64(attribute.i))
        if attribute.name == "value_ints":
            return numpy_helper.from_array(np.array(attribute.ints, np.int64))
        if attribute.name == "value_string":
            return helper.make_tensor("", TensorProto.STRING, [], [attribute.s])
        if attribute.name == "value_strings":
            shape = [len(attribute.strings)]
            return helper.make_tensor("", TensorProto.STRING, shape, list(attribute.strings))
        if attribute.name == "sparse_value":
            return _dense(attribute.sparse_tensor, "")
    return None


def _dense(sparse: SparseTensorProto, name: str) -> TensorProto:
    values = numpy_helper.to_array(sparse.values)
    indices = numpy_helper.to_array(sparse.indices)
    dense = np.zeros(tuple(sparse.dims), values.dtype)
    if indices.ndim == 2:
        dense[tuple(indices.T)] = values
    else:
        dense.reshape(-1)[indices] = values
    return numpy_helper.from_array(dense, name)
