"""Where a deployed ONNX Runtime would not compute what was scored.

A score is that of the graph as it is written. ONNX Runtime's default session replaces Q/DQ pairs by
integer kernels. On x86 processors without VNNI these add two products in 16 bits that saturate: a
per-channel DS-CNN fell from 91.1 % to 8.6 % there. 7 bits of the weights' 8 leave room enough. And
it replaces 4- and 8-bit weights behind a matmul by a kernel that rounds activations to 8 bits too.
"""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

from onnx import NodeProto, TensorProto, numpy_helper

from qdist.model.layers import COMPUTE, VIEWS
from qdist.model.loading import read_graph
from qdist.plan.plan import LayerPlan, QuantizationPlan

_SAFE_WEIGHT = 64
"""Two products of 255 with this stay within 16 bits."""


def deployment_notes(plan: QuantizationPlan, machine: str, cpu_flags: Collection[str]) -> list[str]:
    """What a user should know before the artifact runs under ONNX Runtime's defaults on a processor
    of this kind (`platform.machine()` and its flags in Linux's names)."""
    names = [layer.name for layer in plan.layers if _saturates(layer)]
    notes = _saturation_notes(names, machine, cpu_flags)
    alone = [layer.name for layer in plan.layers if _is_weight_only(layer)]
    if alone:
        notes.append(
            f"ONNX Runtime computes {_listed(alone)} with activations rounded to 8 bits by "
            "default; session.qdq_matmulnbits_accuracy_level=1 keeps them float32, as scored"
        )
    return notes


def artifact_notes(path: Path, machine: str, cpu_flags: Collection[str]) -> list[str]:
    """The same of a Q/DQ model file, whoever wrote it, as far as the file tells."""
    model = read_graph(path)
    maker = {name: node for node in model.graph.node for name in node.output}
    constants = {tensor.name: tensor for tensor in model.graph.initializer}

    def stored(name: str) -> NodeProto | None:
        """The DequantizeLinear that a tensor comes from."""
        node = maker.get(name)
        while node is not None and node.op_type in VIEWS:
            node = maker.get(node.input[0])
        return node if node is not None and node.op_type == "DequantizeLinear" else None

    names = []
    for node in model.graph.node:
        pairs = [stored(name) for name in node.input[:2]] if node.op_type in COMPUTE else []
        read = [pair for pair in pairs if pair is not None]
        weights = [constants[pair.input[0]] for pair in read if pair.input[0] in constants]
        activations = [pair for pair in read if pair.input[0] not in constants]
        if any(_is_wide(tensor, path.parent) for tensor in weights) and any(
            _bytes_of(pair, constants) for pair in activations
        ):
            names.append(node.name or node.output[0])
    return _saturation_notes(names, machine, cpu_flags)


def _saturation_notes(names: list[str], machine: str, cpu_flags: Collection[str]) -> list[str]:
    if not names or machine not in ("x86_64", "AMD64") or any("vnni" in f for f in cpu_flags):
        return []
    return [
        f"WARNING: this processor has no VNNI. ONNX Runtime's fused 8-bit kernels saturate "
        f"16-bit sums on it, in {_listed(names)}: with its defaults the model would score "
        "differently, perhaps far lower, than as it is written. Deploy with "
        "session.x64quantprecision=1, or quantize with quantization.weight_range_bits=7"
    ]


def _is_wide(weight: TensorProto, folder: Path) -> bool:
    """Whether it is of signed 8 bits, in full range."""
    if weight.data_type != TensorProto.INT8:
        return False
    values = numpy_helper.to_array(weight, str(folder))
    return bool(values.size) and int(values.max()) > _SAFE_WEIGHT


def _bytes_of(pair: NodeProto, constants: dict[str, TensorProto]) -> bool:
    """Whether a DequantizeLinear reads 8 bits; without a zero point these are unsigned."""
    zero = constants.get(pair.input[2]) if len(pair.input) > 2 and pair.input[2] else None
    return zero is None or zero.data_type in (TensorProto.INT8, TensorProto.UINT8)


def _saturates(layer: LayerPlan) -> bool:
    """Whether full-range signed 8-bit weights meet 8-bit activations."""
    if layer.op_type not in COMPUTE:
        return False
    activations = [e.quantizer for e in layer.activations]
    weights = [e.quantizer for e in layer.weights]
    return any(q.dtype in ("int8", "uint8") for q in activations) and any(
        q.dtype == "int8" and q.high > _SAFE_WEIGHT for q in weights
    )


def _is_weight_only(layer: LayerPlan) -> bool:
    return (
        layer.op_type == "MatMul"
        and not layer.activations
        and any(e.quantizer.blocks is not None for e in layer.weights)
    )


def _listed(names: list[str]) -> str:
    shown = ", ".join(names[:3])
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return f"{len(names)} layers ({shown}{more})"
