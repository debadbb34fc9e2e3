"""Where a plan does otherwise than was asked, and what ``auto`` chose."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

from qdist.model.smoothing import Smoothing
from qdist.model.taps import TapTable
from qdist.plan.plan import LayerPlan
from qdist.plan.range_rule import FIXED
from qdist.threshold.auto import Reader
from qdist.threshold.pinning import DIVERGENCES, Pinning
from qdist.threshold.registry import resolve


def plan_notes(
    layers: Sequence[LayerPlan], taps: TapTable, consumers: Mapping[str, Sequence[Reader]]
) -> tuple[str, ...]:
    """The notes of the layers of one plan. ``consumers``: measured tensor -> the layers that the
    method ``auto`` judged its range by."""
    return (
        *_method_notes(layers),
        *_auto_notes(layers, taps, consumers),
        *_fusion_notes(layers),
        *_bias_notes(layers),
    )


def smoothing_notes(smoothing: Smoothing | None) -> tuple[str, ...]:
    """Which tensors were smoothed, if any."""
    if smoothing is None:
        return ()
    names = list(smoothing.exponents)
    shown = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
    return (
        f"{len(names)} tensors smoothed with alpha {smoothing.alpha:g}, factors "
        f"{smoothing.digest[:12]}: {shown}",
    )


def pinning_notes(
    layers: Sequence[LayerPlan], taps: TapTable, pinnings: Mapping[tuple[str, str], Pinning]
) -> tuple[str, ...]:
    """Which ranges found on linear bins depend on how values lie within the stored ones."""
    found = {
        (entry.quantizer.method, taps.row_of(entry.tensor))
        for layer in layers
        for entry in layer.activations
    }
    notes = []
    for method in sorted({name for name, _ in found}):
        known = {
            row: pinnings[row, method]
            for name, row in sorted(found)
            if name == method and (row, method) in pinnings
        }
        loose = {row: pinned for row, pinned in known.items() if not pinned.is_pinned}
        if not loose:
            continue
        shown = ", ".join(
            f"{row} {pinned.bound:.4g} ({pinned.least:.4g}..{pinned.most:.4g})"
            for row, pinned in list(loose.items())[:3]
        )
        more = ", ..." if len(loose) > 3 else ""
        criterion = "divergence" if method in DIVERGENCES else "squared error"
        notes.append(
            f"{method}: its {criterion} is so flat for {len(loose)} of {len(known)} tensors that "
            f"a linear histogram may have another bound by more than 1 %: {shown}{more}"
        )
    return tuple(notes)


def _method_notes(layers: Sequence[LayerPlan]) -> list[str]:
    """Where another threshold method was used than the one chosen."""
    pairs = {
        (resolve(layer.choice.saturation)[0], entry.quantizer.method, entry.quantizer.bits)
        for layer in layers
        for entry in layer.activations
        if not entry.quantizer.is_float and entry.quantizer.axis is None
    }
    floats = {
        (resolve(layer.choice.saturation)[0], entry.quantizer.method, layer.choice.precision)
        for layer in layers
        for entry in layer.activations
        if entry.quantizer.is_float and layer.choice.bits.rounds is None
    } | {
        (layer.choice.weight_method, entry.quantizer.method, f"the weights of {precision}")
        for layer in layers
        for entry in layer.weights
        for precision in (layer.choice.precision,)
        if entry.quantizer.is_float and layer.choice.bits.rounds is None
    }
    single = [
        layer.name
        for layer in layers
        if layer.choice.activation_granularity != "tensor" and layer.choice.bits.rounds is None
        for entry in layer.activations
        if entry.quantizer.axis is None and not entry.quantizer.is_dynamic
    ]
    return [
        *_single_notes(single),
        *(
            f"{asked} needs more bins than levels: {used} is used for {bits}-bit layers"
            for asked, used, bits in sorted(pairs)
            if asked not in (used, "auto") and used not in (FIXED, "dynamic")
        ),
        *(
            f"{asked} is for evenly spaced levels: {used} is used for {name} layers"
            for asked, used, name in sorted(floats)
            if asked not in (used, "auto") and used != FIXED
        ),
    ]


def _single_notes(names: Sequence[str]) -> list[str]:
    if not names:
        return []
    shown = ", ".join(list(dict.fromkeys(names))[:3])
    return [
        f"{len(names)} activations have one scale all the same, since channels were not measured "
        f"along their axes, or rows are not what is summed over: {shown}"
        + (", ..." if len(set(names)) > 3 else "")
    ]


def _auto_notes(
    layers: Sequence[LayerPlan], taps: TapTable, consumers: Mapping[str, Sequence[Reader]]
) -> list[str]:
    """What ``auto`` chose, and for how many tensors it knew no layer that reads them."""
    chosen = {
        taps.row_of(entry.tensor): entry.quantizer.method
        for layer in layers
        if resolve(layer.choice.saturation)[0] == "auto"
        for entry in layer.activations
        if entry.quantizer.method != FIXED
    }
    if not chosen:
        return []
    counts = ", ".join(f"{n} {name}" for name, n in Counter(chosen.values()).most_common())
    n_alone = sum(not consumers.get(row) for row in chosen)
    alone = f"; {n_alone} by the error in the tensor alone" if n_alone else ""
    return [f"auto chose, by the layers that read the tensors: {counts}{alone}"]


def _fusion_notes(layers: Sequence[LayerPlan]) -> list[str]:
    """Rules for layers that another rule, or the default, decides about."""
    by_name = {layer.name: layer for layer in layers}
    notes = []
    for layer in by_name.values():
        host = by_name.get(layer.fused_with or "")
        if host is not None and layer.why.startswith("rule ") and layer.choice != host.choice:
            notes.append(f"{layer.why} has no effect on {layer.name}: computed with {host.name}")
    return notes


def _bias_notes(layers: Sequence[LayerPlan]) -> list[str]:
    """Biases that are Adds of their own, and those that were to be."""
    split = [layer.name for layer in layers if layer.bias_add is not None]
    idle = [
        layer.name
        for layer in layers
        if layer.choice.split_bias and layer.bias_add is None and layer.fused_with is None
    ]
    notes = []
    if split:
        shown = ", ".join(split[:3]) + (", ..." if len(split) > 3 else "")
        notes.append(f"the bias is an Add of its own in {len(split)} layers: {shown}")
    if idle:
        shown = ", ".join(idle[:3]) + (", ..." if len(idle) > 3 else "")
        notes.append(f"split_bias means nothing to {len(idle)} layers without int16: {shown}")
    return notes
