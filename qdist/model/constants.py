"""What a graph computes from constants alone becomes a constant.

As in `rewrite`, each step mutates the model it is given and is deterministic.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
from onnx import ModelProto, NodeProto, SparseTensorProto, TensorProto, helper, numpy_helper

from qdist.model.rewrite import names_read, set_nodes
from qdist.model.session import Execution, measuring_session, run
from qdist.model.weights import n_bytes_of

_NOT_FOLDABLE = frozenset(
    {
        "QuantizeLinear",
        "DequantizeLinear",
        "RandomNormal",
        "RandomNormalLike",
        "RandomUniform",
        "RandomUniformLike",
        "Bernoulli",
        "Multinomial",
        "Constant",
        # What these make are no tensors, and an initializer has to be one.
        "Optional",
        "SequenceConstruct",
        "SequenceInsert",
        "SplitToSequence",
    }
)
FOLD_LIMIT_BYTES = 64 << 20
"""External weights larger than this are not copied into the graph by constant folding."""
FOLD_TOTAL_BYTES = 512 << 20
"""Nor are those beyond this together: one protobuf holds 2 GiB."""


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
    constant = {tensor.name: n_bytes_of(tensor) for tensor in model.graph.initializer}
    external = {t.name for t in model.graph.initializer if t.data_location == TensorProto.EXTERNAL}
    heavy = {name for name in external if constant[name] > FOLD_LIMIT_BYTES}
    foldable: list[NodeProto] = []
    known = set(constant)
    n_heavy = n_copied = 0
    for node in model.graph.node:
        reads = list(names_read(node))
        if node.op_type in _NOT_FOLDABLE or not reads or not all(name in known for name in reads):
            continue
        n_bytes = sum(constant[name] for name in set(reads) & external)
        if any(name in heavy for name in reads) or n_copied + n_bytes > FOLD_TOTAL_BYTES:
            n_heavy += 1
            continue
        n_copied += n_bytes
        foldable.append(node)
        known.update(name for name in node.output if name)
    note = f"{n_heavy} constant operators on large external weights stay in the graph"
    if foldable:
        _replace_by_values(model, foldable, folder, execution)
    return note if n_heavy else None


def _replace_by_values(
    model: ModelProto, foldable: list[NodeProto], folder: Path, execution: Execution
) -> None:
    folded = {id(node) for node in foldable}
    made = {name for node in foldable for name in node.output if name}
    wanted = {
        name for node in model.graph.node if id(node) not in folded for name in names_read(node)
    }
    wanted.update(output.name for output in model.graph.output)
    outputs = sorted(made & wanted)
    if outputs:
        needed = {name for node in foldable for name in names_read(node)}
        part = onnx.ModelProto()
        part.CopyFrom(_shell(model))
        part.graph.node.extend(foldable)
        part.graph.initializer.extend(t for t in model.graph.initializer if t.name in needed)
        part.graph.output.extend(onnx.ValueInfoProto(name=name) for name in outputs)
        session = measuring_session(part.SerializeToString(), folder, execution)
        values = run(session, outputs, {})
        for name, value in zip(outputs, values, strict=True):
            model.graph.initializer.append(numpy_helper.from_array(np.asarray(value), name))
    set_nodes(model, [node for node in model.graph.node if id(node) not in folded])


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
