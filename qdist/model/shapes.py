"""How large every tensor of a graph is for given inputs, found without its weights.

Shape inference with the inputs' dimensions fixed and small constants propagated; what it does not
know (contributed operators) ONNX Runtime is asked for. Large weights are declared, never read, so
a graph of a 100 GB model costs as little as its nodes do.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import onnx
import onnx.shape_inference
from onnx import ModelProto, TensorProto, TypeProto, ValueInfoProto, helper, numpy_helper

from qdist.errors import ModelError
from qdist.model.opset import raise_opset
from qdist.model.precision import mentions, with_element
from qdist.model.rewrite import opset_of
from qdist.model.session import Execution, measuring_session
from qdist.model.shape_values import Dims, compute_shapes, is_concrete
from qdist.model.weights import Weights, n_bytes_of

SMALL_BYTES = 4096
"""Initializers up to this size may hold shapes; they stay constants in a weightless graph."""

_RUNTIME_ELEMENTS = {
    f"tensor({name})": element
    for name, element in {
        "float": TensorProto.FLOAT,
        "float16": TensorProto.FLOAT16,
        "bfloat16": TensorProto.BFLOAT16,
        "double": TensorProto.DOUBLE,
        "int64": TensorProto.INT64,
        "int32": TensorProto.INT32,
        "int16": TensorProto.INT16,
        "int8": TensorProto.INT8,
        "uint64": TensorProto.UINT64,
        "uint32": TensorProto.UINT32,
        "uint16": TensorProto.UINT16,
        "uint8": TensorProto.UINT8,
        "int4": TensorProto.INT4,
        "uint4": TensorProto.UINT4,
        "bool": TensorProto.BOOL,
        "string": TensorProto.STRING,
    }.items()
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Shapes:
    """Element types and concrete dimensions of the tensors of one main graph.

    ``elements``: ONNX element type by tensor. ``dims``: shapes by tensor, numbers only.
    ``unknown``: tensors that operators make whose shape or type nothing tells before they run.
    """

    elements: Mapping[str, int]
    dims: Mapping[str, tuple[int, ...]]
    unknown: tuple[str, ...]

    def n_bytes(self, tensor: str) -> int | None:
        """Bytes of the tensor's values; None where its shape or type is unknown."""
        element, dims = self.elements.get(tensor), self.dims.get(tensor)
        if not element or dims is None:
            return None
        return n_bytes_of(TensorProto(data_type=element, dims=dims))

    def n_elements(self, tensor: str) -> int | None:
        """How many values the tensor holds; None where its shape is unknown."""
        dims = self.dims.get(tensor)
        if dims is None:
            return None
        count = 1
        for n in dims:
            count *= n
        return count


def concrete_shapes(
    model: ModelProto,
    inputs: Mapping[str, Iterable[int]],
    folder: Path | None = None,
    execution: Execution | None = None,
) -> Shapes:
    """Shapes and types of every tensor when the graph's inputs have the shapes ``inputs``.

    ``folder``: where external data lies; only constants of up to `SMALL_BYTES` are read from it.
    Inputs that are not named keep what the graph declares.
    """
    light = _propagating(weightless(model, folder))
    _fix_inputs(light, inputs)
    made = [name for node in light.graph.node for name in node.output if name]
    types = inferred_types(light)
    # What the runtime tells may let inference go on behind it, and the other way round.
    replaced: dict[str, tuple[int, Dims]] = {}
    for _ in range(_ROUNDS):
        lacking = [name for name in made if name not in types or not is_concrete(types[name][1])]
        if not lacking:
            break
        computed = compute_shapes(light, types, execution)
        if not computed and not _ask(light, lacking, types, execution):
            break
        replaced.update(computed)
        types = {**types, **inferred_types(light), **replaced}
    for tensor in model.graph.initializer:
        types[tensor.name] = (tensor.data_type, tuple(tensor.dims))
    dims = {
        name: tuple(int(n) for n in shape if isinstance(n, int))
        for name, (_, shape) in types.items()
        if shape is not None and is_concrete(shape)
    }
    elements = {name: element for name, (element, _) in types.items() if element}
    unknown = tuple(name for name in made if name not in dims or name not in elements)
    return Shapes(elements=elements, dims=dims, unknown=unknown)


def weightless(model: ModelProto, folder: Path | None = None) -> ModelProto:
    """The model without its weights: initializers above `SMALL_BYTES` become inputs of their type.

    Small external ones come into the graph. Good for questions about types and shapes only.
    """
    light = ModelProto(ir_version=model.ir_version)
    light.opset_import.extend(model.opset_import)
    light.functions.extend(model.functions)
    graph = light.graph
    graph.name = model.graph.name or "graph"
    graph.node.extend(model.graph.node)
    constant = {tensor.name for tensor in model.graph.initializer}
    graph.input.extend(value for value in model.graph.input if value.name not in constant)
    graph.output.extend(model.graph.output)
    weights = Weights(model.graph.initializer, folder)
    for tensor in model.graph.initializer:
        if n_bytes_of(tensor) > SMALL_BYTES:
            graph.input.append(
                helper.make_tensor_value_info(tensor.name, tensor.data_type, list(tensor.dims))
            )
        elif tensor.data_location == TensorProto.EXTERNAL:
            graph.initializer.append(
                numpy_helper.from_array(weights.read(tensor.name), tensor.name)
            )
        else:
            graph.initializer.append(tensor)
    return light


def runtime_types(
    model: ModelProto,
    tensors: Iterable[str],
    folder: Path | None = None,
    execution: Execution | None = None,
) -> dict[str, tuple[int, Dims | None]]:
    """Element type (0: no tensor) and dimensions that ONNX Runtime infers, by tensor.

    The session is opened over the weightless graph. Raises QD205 where the runtime refuses that.
    """
    return session_types(weightless(model, folder), tensors, folder, execution)


def session_types(
    model: ModelProto,
    tensors: Iterable[str],
    folder: Path | None = None,
    execution: Execution | None = None,
) -> dict[str, tuple[int, Dims | None]]:
    """As `runtime_types`, from a session over the model as it is, weights included."""
    # There are hardly any kernels for bfloat16; every type is found as with float16 in its place.
    swapped = mentions(model, {_BFLOAT16}) and not mentions(model, {_FLOAT16})
    asking = with_element(model, _BFLOAT16, _FLOAT16 if swapped else _BFLOAT16)
    del asking.graph.output[:]
    asking.graph.output.extend(ValueInfoProto(name=name) for name in tensors)
    session = measuring_session(asking.SerializeToString(), folder, execution or Execution())
    return {
        value.name: (
            _runtime_element(value.type, swapped=swapped),
            # An unknown rank is given as no dimension at all, as a scalar's is.
            tuple(value.shape) or None,
        )
        for value in session.get_outputs()
    }


def _runtime_element(kind: str, *, swapped: bool) -> int:
    element = _RUNTIME_ELEMENTS.get(kind, TensorProto.UNDEFINED)
    return _BFLOAT16 if swapped and element == _FLOAT16 else element


_FLOAT16, _BFLOAT16 = TensorProto.FLOAT16, TensorProto.BFLOAT16
_ROUNDS = 6
"""How often shape inference and the runtime take turns. Each turn passes one kind of operator."""


_PROPAGATING_OPSET = 17
"""From this opset on, inference follows shapes through all operators that compute with them."""
_COMPATIBLE_OPSET = 13
"""Operators from this opset on are well formed at the one above too, and give the same shapes."""


def _propagating(model: ModelProto) -> ModelProto:
    """The model at an opset at which shapes are followed, where it can be put there."""
    version = opset_of(model)
    if version >= _PROPAGATING_OPSET:
        return model
    if version < _COMPATIBLE_OPSET:
        try:
            return raise_opset(model, _PROPAGATING_OPSET)
        except ModelError:
            return model
    for entry in model.opset_import:
        if entry.domain in ("", "ai.onnx"):
            entry.version = _PROPAGATING_OPSET
    return model


def _fix_inputs(model: ModelProto, inputs: Mapping[str, Iterable[int]]) -> None:
    """Give the inputs the shapes wanted, and forget shapes that were declared for others."""
    for value in model.graph.input:
        if value.name in inputs:
            tensor = value.type.tensor_type
            tensor.ClearField("shape")
            tensor.shape.dim.extend(
                onnx.TensorShapeProto.Dimension(dim_value=int(n)) for n in inputs[value.name]
            )
    for value in model.graph.output:
        if value.type.HasField("tensor_type"):
            value.type.tensor_type.ClearField("shape")


def inferred_types(model: ModelProto) -> dict[str, tuple[int, Dims | None]]:
    """Element types and dimensions that ONNX infers, by tensor, for the inputs as declared."""
    inferred = onnx.shape_inference.infer_shapes(
        model, check_type=False, strict_mode=False, data_prop=True
    ).graph
    types: dict[str, tuple[int, Dims | None]] = {}
    for value in (*inferred.input, *inferred.output, *inferred.value_info):
        tensor = value.type.tensor_type
        if tensor.elem_type:
            types[value.name] = (tensor.elem_type, _dims(tensor))
    return types


def _ask(
    model: ModelProto,
    lacking: list[str],
    types: dict[str, tuple[int, Dims | None]],
    execution: Execution | None,
) -> bool:
    """Put what the runtime knows of ``lacking`` into ``types`` and the model. False: nothing."""
    try:
        found = runtime_types(model, lacking, None, execution)
    except ModelError:
        # Some kernel needs its weight as a constant; what is unknown stays so.
        return False
    news = False
    declared = {value.name for value in model.graph.output}
    for name, (element, shape) in found.items():
        before = types.get(name)
        if not element or (before is not None and not is_concrete(shape)):
            continue
        types[name] = (element, shape)
        news = True
        if name not in declared:
            dims = list(shape) if shape is not None and is_concrete(shape) else None
            model.graph.value_info.append(helper.make_tensor_value_info(name, element, dims))
    return news


def _dims(tensor: TypeProto.Tensor) -> Dims | None:
    if not tensor.HasField("shape"):
        return None
    return tuple(
        d.dim_value if d.HasField("dim_value") else (d.dim_param or None) for d in tensor.shape.dim
    )
