"""Choices for layers and settings for tensors, by rules in order: the last match wins.

A rule takes layers or tensors by a selector (`qdist.plan.selector`) and says what holds for them,
field by field. Rules of the configuration and of vendors' files are the same thing; those of a
file carry the place that they were read from.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any

from qdist.errors import PlanError
from qdist.plan.choice import LayerChoice
from qdist.plan.layer_index import LayerIndex
from qdist.plan.selector import is_of_tensors, nearby, select_layers, select_tensors
from qdist.plan.tensor_settings import TensorSettings

LAYER_SETTINGS = tuple(entry.name for entry in fields(LayerChoice))
TENSOR_SETTINGS = tuple(entry.name for entry in fields(TensorSettings) if entry.name != "why")


@dataclass(frozen=True, slots=True, kw_only=True)
class Rule:
    """Settings for what ``match`` takes. ``settings`` are fields of `LayerChoice` for
    layers, of `TensorSettings` for tensors. ``origin``: file and line, or empty for the
    configuration."""

    match: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    origin: str = ""

    def __post_init__(self) -> None:
        known = TENSOR_SETTINGS if self.is_of_tensors else LAYER_SETTINGS
        for name in self.settings:
            if name not in known:
                raise PlanError(
                    "QD507",
                    where=self.place,
                    got=f"a setting {name!r}",
                    expected=f"of a {'tensor' if self.is_of_tensors else 'layer'}: "
                    + ", ".join(known),
                    mend="remove it, or write the rule for "
                    + ("the layers" if self.is_of_tensors else "output:LAYER or tensor:NAME"),
                )

    @property
    def is_of_tensors(self) -> bool:
        """Whether the rule is about tensors, not layers."""
        return is_of_tensors(self.match)

    @property
    def why(self) -> str:
        """What a plan says of a choice that comes from this rule."""
        return f"rule {self.match}" + (f" ({self.origin})" if self.origin else "")

    @property
    def place(self) -> str:
        """Where the rule stands, for errors."""
        return f"rule {self.match!r}" + (f" ({self.origin})" if self.origin else "")


@dataclass(frozen=True, slots=True, kw_only=True)
class Assignment:
    """What rules come to: the choice of every layer, the settings of some tensors, and for layers
    that a rule was about, which."""

    choices: dict[str, LayerChoice]
    tensors: dict[str, TensorSettings] = field(default_factory=dict)
    why: dict[str, str] = field(default_factory=dict)


def apply_rules(
    index: LayerIndex,
    default: LayerChoice | Mapping[str, LayerChoice],
    rules: Iterable[Rule],
) -> Assignment:
    """The choices by layer, and the settings by tensor, over ``default``.

    Raises QD503 for a rule that matches nothing, QD501, QD506 and QD507 for settings that cannot
    be.
    """
    choices = (
        {layer.name: default for layer in index.layers}
        if isinstance(default, LayerChoice)
        else dict(default)
    )
    found = Assignment(choices=choices)
    for rule in rules:
        if rule.is_of_tensors:
            _set_tensors(found, rule, index)
        else:
            _set_layers(found, rule, index)
    return found


def _set_layers(found: Assignment, rule: Rule, index: LayerIndex) -> None:
    layers = select_layers(rule.match, index)
    if not layers:
        raise _no_match(rule, index, f"{len(index.layers)} layers")
    for layer in layers:
        found.choices[layer.name] = _changed(found.choices[layer.name], rule)
        found.why[layer.name] = rule.why


def _changed(choice: LayerChoice, rule: Rule) -> LayerChoice:
    try:
        changed = replace(choice, **rule.settings)
    except PlanError as error:
        raise _placed(error, rule) from error
    if choice.weight_saturation == "auto" and changed.weight_saturation == changed.weight_method:
        # What auto comes to anyway is no choice of its own.
        auto = replace(changed, weight_saturation="auto")
        return auto if auto.weight_method == changed.weight_method else changed
    return changed


def _set_tensors(found: Assignment, rule: Rule, index: LayerIndex) -> None:
    names = select_tensors(rule.match, index)
    if not names:
        raise _no_match(rule, index, f"{len(index.tensors)} tensors")
    try:
        settings = TensorSettings(**rule.settings, why=rule.why)
    except PlanError as error:
        raise _placed(error, rule) from error
    except ValueError as error:
        raise PlanError(
            "QD507",
            where=rule.place,
            got=", ".join(f"{name}={value}" for name, value in rule.settings.items()),
            expected=str(error),
            mend="correct the rule",
        ) from error
    for name in names:
        found.tensors[name] = settings.over(found.tensors.get(name, TensorSettings()))


def _placed(error: PlanError, rule: Rule) -> PlanError:
    """The error of a setting, at the place of its rule."""
    return PlanError(
        error.code, where=rule.place, got=error.got, expected=error.expected, mend=error.mend
    )


def _no_match(rule: Rule, index: LayerIndex, what: str) -> PlanError:
    return PlanError(
        "QD503",
        where=rule.place,
        got=f"no match among {what}",
        expected=nearby(rule.match, index),
        mend="correct the rule; qdist show lists the layers",
    )
