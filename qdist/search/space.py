"""What every layer may become: the choices that the target takes, out of what the user lists."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import product
from typing import TypeVar

from qdist.errors import PlanError
from qdist.model.layers import Layer
from qdist.plan.choice import LayerChoice
from qdist.plan.granularity import parse_granularity
from qdist.plan.layer_index import LayerIndex
from qdist.plan.precision import precision
from qdist.plan.target import Target

T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class SpaceSettings:
    """Values that are tried in place of the plain choice's own; empty: only that. ``precisions``,
    ``granularities`` (of weights), ``activation_granularities``, ``saturations``,
    ``weight_range_bits`` and ``activation_range_bits`` (None: all bits). ``max_opset``: what the
    model can be raised to; None: anything. ``split_bias``: whether int16 convolutions may have
    their bias split off too, where the target takes that."""

    precisions: tuple[str, ...] = ()
    granularities: tuple[str, ...] = ()
    activation_granularities: tuple[str, ...] = ()
    saturations: tuple[str, ...] = ()
    weight_range_bits: tuple[int | None, ...] = ()
    activation_range_bits: tuple[int | None, ...] = ()
    max_opset: int | None = None
    split_bias: bool = False


def options_of(
    layer: Layer,
    plain: LayerChoice,
    index: LayerIndex,
    target: Target,
    settings: SpaceSettings,
    *,
    can_split_bias: bool = False,
) -> tuple[LayerChoice, ...]:
    """The choices of one layer, the plain one first, each once. What changes nothing about a layer
    (scales of weights where it has none) is not varied, and what the target refuses left out.
    ``can_split_bias``: whether the layer is a convolution that can have its bias split off."""
    found = {plain: None}
    for choice in _products(layer, plain, settings):
        if choice not in found and _fits(choice, layer, index, target, settings):
            found[choice] = None
    if can_split_bias and settings.split_bias and target.split_bias:
        wide = [choice for choice in found if choice.precision == "int16"]
        found |= {replace(choice, split_bias=True): None for choice in wide}
    return tuple(found)


def _products(layer: Layer, plain: LayerChoice, settings: SpaceSettings) -> Iterator[LayerChoice]:
    has_weights = bool(layer.weights)
    for name in dict.fromkeys((plain.precision, *settings.precisions)):
        bits = precision(name)
        if bits.is_float:
            yield replace(plain, precision=name)
            continue
        # Ranges that the precision does not have fall back on all bits, and on scales per tensor.
        weighted = has_weights and bits.weight is not None and bits.rounds is None
        active = bits.activation is not None and bits.rounds is None
        for grain, active_grain, saturation, weight_bits, active_bits in product(
            _values(plain.granularity, settings.granularities, varies=weighted),
            _values(plain.activation_granularity, settings.activation_granularities, varies=active),
            _values(plain.saturation, settings.saturations, varies=active),
            _values(plain.weight_range_bits, settings.weight_range_bits, varies=weighted),
            _values(plain.activation_range_bits, settings.activation_range_bits, varies=active),
        ):
            try:
                yield replace(
                    plain,
                    precision=name,
                    granularity=grain,
                    activation_granularity=active_grain,
                    saturation=saturation,
                    weight_range_bits=weight_bits,
                    activation_range_bits=active_bits,
                )
            except PlanError:
                # A combination that no layer can have, such as 8 range bits of a 4-bit weight.
                continue


def _values(own: T, others: tuple[T, ...], *, varies: bool) -> tuple[T, ...]:
    return tuple(dict.fromkeys((own, *others))) if varies else (own,)


def _fits(
    choice: LayerChoice,
    layer: Layer,
    index: LayerIndex,
    target: Target,
    settings: SpaceSettings,
) -> bool:
    """Whether the target and the model take the choice for this layer."""
    if choice.precision not in target.precisions:
        return False
    if index.why_float(layer.name, choice.precision) is not None:
        return False
    if settings.max_opset is not None and choice.opset > settings.max_opset:
        return False
    bits = choice.bits
    if bits.is_float or bits.rounds is not None:
        return True
    return _weights_fit(choice, layer, target) and _activations_fit(choice, target)


def _weights_fit(choice: LayerChoice, layer: Layer, target: Target) -> bool:
    if not layer.weights or choice.bits.weight is None:
        return True
    grain = choice.weight_grain
    if grain.kind == "tensor":
        return True
    if not target.per_channel or layer.op_type in target.per_tensor_operators:
        return False
    if grain.kind != "block":
        return True
    return target.blocks and (not target.block_sizes or grain.size in target.block_sizes)


def _activations_fit(choice: LayerChoice, target: Target) -> bool:
    grain = parse_granularity(choice.activation_granularity)
    if grain is None or grain.kind == "tensor" or choice.bits.activation is None:
        return True
    return target.tokens if grain.kind == "token" else target.activation_channels
