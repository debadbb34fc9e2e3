"""The layers of a plan with ratios passed on, for targets that do so (`qdist.plan.passing`)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from qdist.plan.passing import Passing
from qdist.plan.plan import LayerPlan, QuantizedInput
from qdist.plan.quantizer import Quantizer

_Key = tuple[str, str]
"""Tensor and number type."""


def passed_on(
    layers: Sequence[LayerPlan],
    passing: Sequence[Passing],
    notes: list[str],
    *,
    several: bool,
) -> tuple[LayerPlan, ...]:
    """The layers with every tensor in the numbers that are passed on to it. ``several``: whether a
    tensor may have a scale for every channel. Appends to ``notes``."""
    known: dict[_Key, Quantizer] = {}
    for layer in layers:
        for entry in (*layer.outputs, *layer.activations):
            if _is_integer(entry):
                known.setdefault((entry.tensor, entry.quantizer.dtype), entry.quantizer)
    found, apart = _found(known, passing, several)
    if apart:
        shown = ", ".join(list(dict.fromkeys(apart))[:3])
        notes.append(f"ratios are not passed on to {len(set(apart))} tensors, such as {shown}")
    ruled = sorted(
        {
            entry.tensor
            for layer in layers
            for entry in (*layer.activations, *layer.outputs)
            if entry.provenance.rule
            and _key(entry) in found
            and found[_key(entry)].key != entry.quantizer.key
        }
    )
    if ruled:
        notes.append(
            f"rules about {len(ruled)} tensors have no effect, since their ratios are passed on: "
            + ", ".join(ruled[:3])
        )
    return tuple(_changed(layer, found) for layer in layers)


def _found(
    known: dict[_Key, Quantizer], passing: Sequence[Passing], several: bool
) -> tuple[dict[_Key, Quantizer], list[str]]:
    """What is passed on, and the tensors to which it is not though their sources are known."""
    dtypes = sorted({dtype for _, dtype in known})
    found: dict[_Key, Quantizer] = {}
    apart: list[str] = []
    for entry in passing:
        for dtype in dtypes:
            keys = [(source, dtype) for source in entry.sources]
            sources = [q for key in keys if (q := found.get(key, known.get(key))) is not None]
            if len(sources) < len(keys):
                continue
            passed = entry.passed(sources)
            if passed is not None and (passed.axis is None or several):
                found[entry.tensor, dtype] = passed
            elif (entry.tensor, dtype) in known:
                apart.append(entry.tensor)
    return found, apart


def _changed(layer: LayerPlan, found: dict[_Key, Quantizer]) -> LayerPlan:
    if not layer.is_quantized:
        return layer
    activations = tuple(_replaced(entry, found) for entry in layer.activations)
    outputs = tuple(_replaced(entry, found) for entry in layer.outputs)
    weights = layer.weights
    if layer.op_type == "Concat" and len(activations) == 1:
        # Constants beside one tensor take its ratio.
        like = activations[0].quantizer
        if like.axis is None and not like.is_float and not like.is_dynamic:
            weights = tuple(replace(e, quantizer=_as_constant(e.quantizer, like)) for e in weights)
    return replace(layer, activations=activations, outputs=outputs, weights=weights)


def _as_constant(constant: Quantizer, like: Quantizer) -> Quantizer:
    return replace(
        constant,
        bits=like.bits,
        low=like.low,
        high=like.high,
        scales=like.scales,
        zero_points=like.zero_points,
        storage=like.storage,
        axis=None,
        bounds=like.bounds,
        clipped_share=None,
        expected_mse=None,
    )


def _replaced(entry: QuantizedInput, found: dict[_Key, Quantizer]) -> QuantizedInput:
    passed = found.get(_key(entry))
    return entry if passed is None or not _is_integer(entry) else replace(entry, quantizer=passed)


def _key(entry: QuantizedInput) -> _Key:
    return entry.tensor, entry.quantizer.dtype


def _is_integer(entry: QuantizedInput) -> bool:
    return not entry.quantizer.is_float and not entry.quantizer.is_dynamic
