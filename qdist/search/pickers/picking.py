"""What a picker is given and gives; shares, thresholds and layers that must agree."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from qdist.model.groups import LayerGroup, raised_together
from qdist.plan.choice import LayerChoice

DEFAULT_LOW_SHARE = 0.5
"""Knight's ``auto-mix-ratio``: the share of layers that keep the lower precision."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PickSettings:
    """``low_share``: share of the layers that keep the lower precision; None: the picker's own way
    to end (its threshold). ``threshold``: from where on a layer is raised; None: the picker's own.
    ``high``: precision to raise to. ``high_saturation``: threshold method of raised layers; None
    keeps theirs. ``together``: whether what must agree is raised together."""

    high: str
    low_share: float | None = None
    threshold: float | None = None
    high_saturation: str | None = None
    together: bool = True

    def __post_init__(self) -> None:
        if self.low_share is not None and not 0 <= self.low_share <= 1:
            raise ValueError(f"low_share must be within 0..1, got {self.low_share}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Picked:
    """The layers to raise. ``scores``: what they were ranked by, where there is a number: the
    larger, the sooner a layer is raised. ``why``: of raised layers, in a few words."""

    raised: frozenset[str]
    scores: Mapping[str, float] = field(default_factory=dict)
    why: Mapping[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


def n_raised(n_layers: int, low_share: float) -> int:
    """How many of the layers are raised when a share of them keeps the lower precision."""
    return n_layers - round(low_share * n_layers)


def worst(scores: Mapping[str, float], n: int) -> tuple[str, ...]:
    """The ``n`` layers of the largest scores; the earlier one on ties."""
    order = {name: i for i, name in enumerate(scores)}
    return tuple(sorted(scores, key=lambda name: (-scores[name], order[name]))[:n])


def closed(
    picked: Picked,
    groups: Sequence[LayerGroup],
    layers: Sequence[str],
    more: Callable[[frozenset[str]], frozenset[str]] | None = None,
) -> Picked:
    """The pick with all layers that must agree with a raised one, directly or not. ``more``: a
    target's own closure of a set of raised layers."""
    raised = picked.raised
    while True:
        wider = raised_together(raised, groups, layers)
        wider = more(wider) if more is not None else wider
        if wider == raised:
            break
        raised = wider
    n_joined = len(raised) - len(picked.raised)
    joined = {name: "agrees with a raised layer" for name in layers if name in raised}
    notes = (f"{n_joined} more layers are raised, since they must agree",) if n_joined else ()
    return replace(
        picked,
        raised=frozenset(raised),
        why={**joined, **picked.why},
        notes=(*picked.notes, *notes),
    )


def raised_choices(
    choices: Mapping[str, LayerChoice], picked: Picked, settings: PickSettings
) -> dict[str, LayerChoice]:
    """The choices with the raised layers at the higher precision. Raises QD501, QD506."""
    changes = {"precision": settings.high}
    if settings.high_saturation is not None:
        changes["saturation"] = settings.high_saturation
    return {
        name: LayerChoice(**{**choice.to_json(), **changes}) if name in picked.raised else choice
        for name, choice in choices.items()
    }
