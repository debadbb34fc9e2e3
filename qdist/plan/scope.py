"""Which layers are quantized at all."""

from __future__ import annotations

from collections.abc import Sequence

from qdist.model.layers import COMPUTE, Layer

SCOPES = ("all", "compute")

QUANTIZED = COMPUTE | {
    "Add",
    "Sub",
    "Mul",
    "Div",
    "Min",
    "Max",
    "Sum",
    "Mean",
    "Relu",
    "LeakyRelu",
    "PRelu",
    "Elu",
    "Clip",
    "Sigmoid",
    "HardSigmoid",
    "HardSwish",
    "Tanh",
    "Erf",
    "Gelu",
    "Mish",
    "Softplus",
    "Softmax",
    "LayerNormalization",
    "RMSNormalization",
    "BatchNormalization",
    "InstanceNormalization",
    "GroupNormalization",
    "MaxPool",
    "AveragePool",
    "GlobalAveragePool",
    "GlobalMaxPool",
    "ReduceMean",
    "ReduceMax",
    "Concat",
    "Resize",
    "Pad",
}
"""Operators that integer units compute. The others stay float, and the plan says so."""


NO_INTEGER_FORM = "has no integer form"


def left_out(layers: Sequence[Layer], scope: str) -> dict[str, str]:
    """Layer -> why ``scope`` leaves it float. ``all`` takes every operator in `QUANTIZED`, but for
    the inside of written-out normalizations; ``compute`` only matmul- and conv-like ones. Layers
    whose reason ends in `NO_INTEGER_FORM` can still be rounded to a floating-point type."""
    if scope not in SCOPES:
        raise ValueError(f"scope must be one of {SCOPES}, got {scope!r}")
    reasons = {}
    for layer in layers:
        if layer.is_statistics:
            reasons[layer.name] = "inside a normalization"
        elif layer.op_type not in QUANTIZED:
            reasons[layer.name] = f"{layer.op_type} {NO_INTEGER_FORM}"
        elif scope == "compute" and not layer.is_compute:
            reasons[layer.name] = "quantization.scope=compute"
    return reasons
