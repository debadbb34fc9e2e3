"""What a plan comes to: the numbers that decide what is written, and nothing else."""

from __future__ import annotations

from typing import Any

from qdist.digest import digest_json
from qdist.plan.plan import LayerPlan, QuantizationPlan, QuantizedInput
from qdist.plan.quantizer import Quantizer

_SAYS_ONLY = ("method", "bounds", "clipped_share", "expected_mse")
"""Fields of a quantizer that tell where its numbers come from."""


def resolved_digest(plan: QuantizationPlan) -> str:
    """Hex SHA-256 of all that changes the artifact. Choices that come to the same numbers, such as
    two threshold methods that find one range, have one digest; what `QuantizationPlan.digest`
    covers beside the numbers (reasons, methods, where ranges come from) is left out."""
    return digest_json([plan.model_digest, plan.opset, [_layer(layer) for layer in plan.layers]])


def _layer(layer: LayerPlan) -> dict[str, Any]:
    return {
        "name": layer.name,
        # Of a layer that stays float, the precision that it was to have changes nothing.
        "precision": layer.choice.precision if layer.is_quantized else "float32",
        "fused_with": layer.fused_with,
        **({} if layer.bias_add is None else {"bias_add": [*map(_input, layer.bias_add.entries)]}),
        **{
            kind: [_input(entry) for entry in entries]
            for kind, entries in (
                ("activations", layer.activations),
                ("weights", layer.weights),
                ("outputs", layer.outputs),
            )
        },
    }


def _input(entry: QuantizedInput) -> list[Any]:
    return [entry.index, entry.tensor, _numbers(entry.quantizer)]


def _numbers(quantizer: Quantizer) -> dict[str, Any]:
    return {k: v for k, v in quantizer.to_json().items() if k not in _SAYS_ONLY}
