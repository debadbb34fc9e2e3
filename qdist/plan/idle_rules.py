"""Rules without effect, which are mistakes."""

from __future__ import annotations

from collections.abc import Iterable

from qdist.errors import PlanError
from qdist.model.taps import TapTable
from qdist.plan.layer_index import LayerIndex
from qdist.plan.rules import Rule
from qdist.plan.selector import select_layers, select_tensors


def check_rules(rules: Iterable[Rule], index: LayerIndex, taps: TapTable) -> None:
    """Raise QD503 for a rule without effect: every layer that it matches is computed with
    another, or stays float though the rule asks for more; or no layer that can be quantized
    reads any of its tensors."""
    read = {
        taps.row_of(name)
        for layer in index.choosable
        for entry in (*layer.activations, *layer.weights)
        for name in (entry.tensor, *index.moved_from(entry.tensor))
    }
    for rule in rules:
        if rule.is_of_tensors:
            _check_tensor_rule(rule, index, taps, read)
        else:
            _check_layer_rule(rule, index)


def _check_layer_rule(rule: Rule, index: LayerIndex) -> None:
    matched = select_layers(rule.match, index)
    idle = {
        layer.name: reason
        for layer in matched
        if (reason := _idle(layer.name, rule, index)) is not None
    }
    if not idle or len(idle) < len(matched):
        return
    name, reason = next(iter(idle.items()))
    host = index.fused.get(name)
    raise PlanError(
        "QD503",
        where=rule.place,
        got=f"no effect on the {len(idle)} layers that match, such as {name}",
        expected=f"{name} is {reason}; write the rule for {host}"
        if host is not None
        else f"a layer that is quantized; {name} stays float: {reason}",
        mend="correct or remove the rule; qdist show lists the layers",
    )


def _check_tensor_rule(rule: Rule, index: LayerIndex, taps: TapTable, read: set[str]) -> None:
    names = select_tensors(rule.match, index)
    if names and not any(taps.row_of(name) in read for name in names):
        raise PlanError(
            "QD503",
            where=rule.place,
            got=f"no effect on the {len(names)} tensors that match, such as {names[0]}",
            expected="a tensor that a quantized layer reads",
            mend="write the rule for such a tensor, or remove it",
        )


def _idle(name: str, rule: Rule, index: LayerIndex) -> str | None:
    """Why the rule means nothing to the layer, or None."""
    asked = rule.settings.get("precision")
    if asked == "float32" and name not in index.fused:
        return None
    return index.why_float(name, asked)
