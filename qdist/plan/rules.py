"""Choices by name, pattern or operator type, applied in order: the last match wins."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from typing import Any

from qdist.errors import PlanError
from qdist.model.layers import Layer
from qdist.plan.choice import LayerChoice


@dataclass(frozen=True, slots=True, kw_only=True)
class Rule:
    """Settings for the layers that ``match``: a layer's name, a pattern with ``*`` and ``?``, or
    ``op:TYPE`` for an operator type. ``settings`` are fields of `LayerChoice`."""

    match: str
    settings: dict[str, Any] = field(default_factory=dict)

    def matches(self, layer: Layer) -> bool:
        """Whether the rule concerns the layer."""
        if self.match.startswith("op:"):
            return fnmatchcase(layer.op_type, self.match[3:])
        return layer.name == self.match or fnmatchcase(layer.name, self.match)


def apply_rules(
    layers: Sequence[Layer], default: LayerChoice, rules: Iterable[Rule]
) -> dict[str, LayerChoice]:
    """The choice of every layer, by name. Raises QD503 for a rule that matches nothing."""
    choices = {layer.name: default for layer in layers}
    for rule in rules:
        hit = [layer.name for layer in layers if rule.matches(layer)]
        if not hit:
            raise PlanError(
                "QD503",
                where=f"rule {rule.match!r}",
                got=f"no match among {len(layers)} layers",
                expected=_nearby(rule.match, layers),
                mend="correct the rule; qdist show lists the layers",
            )
        choices.update({name: replace(choices[name], **rule.settings) for name in hit})
    return choices


def _nearby(match: str, layers: Sequence[Layer]) -> str:
    if match.startswith("op:"):
        return "an operator type of the model: " + ", ".join(
            sorted({layer.op_type for layer in layers})
        )
    names = [layer.name for layer in layers]
    near = difflib.get_close_matches(match.strip("*"), names, n=3, cutoff=0.3) or names[:3]
    return "a layer such as " + ", ".join(near)
