"""Where a deployed ONNX Runtime would not compute what was scored.

A score is that of the graph as it is written. ONNX Runtime's default session replaces Q/DQ pairs by
integer kernels. On x86 processors without VNNI these add two products in 16 bits that saturate: a
per-channel DS-CNN fell from 91.1 % to 8.6 % there. 7 bits of the weights' 8 leave room enough. And
it replaces 4- and 8-bit weights behind a matmul by a kernel that rounds activations to 8 bits too.
"""

from __future__ import annotations

from collections.abc import Collection

from qdist.model.layers import COMPUTE
from qdist.plan.plan import LayerPlan, QuantizationPlan

_SAFE_WEIGHT = 64
"""Two products of 255 with this stay within 16 bits."""


def deployment_notes(plan: QuantizationPlan, machine: str, cpu_flags: Collection[str]) -> list[str]:
    """What a user should know before the artifact runs under ONNX Runtime's defaults on a processor
    of this kind (`platform.machine()` and its flags in Linux's names)."""
    notes = []
    names = [layer.name for layer in plan.layers if _saturates(layer)]
    if names and machine in ("x86_64", "AMD64") and not any("vnni" in f for f in cpu_flags):
        notes.append(
            f"WARNING: this processor has no VNNI. ONNX Runtime's fused 8-bit kernels saturate "
            f"16-bit sums on it, in {_listed(names)}: with its defaults the model would score "
            "differently, perhaps far lower, than as it is written. Deploy with "
            "session.x64quantprecision=1, or quantize with quantization.weight_range_bits=7"
        )
    alone = [layer.name for layer in plan.layers if _is_weight_only(layer)]
    if alone:
        notes.append(
            f"ONNX Runtime computes {_listed(alone)} with activations rounded to 8 bits by "
            "default; session.qdq_matmulnbits_accuracy_level=1 keeps them float32, as scored"
        )
    return notes


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
