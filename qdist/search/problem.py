"""What a strategy is given: the layers that may change, what each may become, and what is known."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from qdist.plan.choice import LayerChoice
from qdist.search.costs import Costs
from qdist.search.trial import Choices


@dataclass(frozen=True, slots=True, kw_only=True)
class SearchLayer:
    """A layer that may change. ``position``: its place in topological order. ``n_weights``: its
    constant elements. ``n_multiplies``: multiply-accumulates for one sample, 0 where it has none.
    ``sources``: the layers whose outputs it reads."""

    name: str
    op_type: str
    position: int
    n_weights: int = 0
    n_multiplies: int = 0
    sources: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Interaction:
    """How much more two groups harm together than each does alone, in the measure of
    ``SearchProblem.divergence``; negative where their errors cancel. ``layers`` and ``choices``:
    the first layer of each group, and what it has."""

    layers: tuple[str, str]
    choices: tuple[LayerChoice, LayerChoice]
    value: float


@dataclass(frozen=True, slots=True, kw_only=True)
class SearchProblem:
    """``plain``: the choice of every layer in the plain plan, also of those that may not change.
    ``layers``: those that may, in topological order. ``groups``: a partition of their names; the
    layers of a group change together. ``options``: layer -> the choices that the target takes, the
    plain one first. ``sensitivity``: layer -> choice -> relative L2 error of its output when it
    alone has that choice and reads the float model's activations; choices that were not measured
    are absent. ``divergence``: first layer of a group -> choice of that layer -> how far the
    model's outputs move when the group alone is quantized, its precision that of the choice
    (squared relative L2, or KL on logits); may be empty, or lack groups and choices.
    ``interactions``: of pairs of groups. ``implied``: (layer, other layer): where the one has more
    activation bits than in the plain plan, so must the other. ``costs``: of every option.
    ``float_score``: of the float model, by the evaluation of the search."""

    plain: Choices
    layers: tuple[SearchLayer, ...]
    groups: tuple[tuple[str, ...], ...]
    options: Mapping[str, tuple[LayerChoice, ...]]
    sensitivity: Mapping[str, Mapping[LayerChoice, float]] = field(default_factory=dict)
    divergence: Mapping[str, Mapping[LayerChoice, float]] = field(default_factory=dict)
    interactions: tuple[Interaction, ...] = ()
    implied: tuple[tuple[str, str], ...] = ()
    costs: Costs = field(default_factory=Costs)
    float_score: float | None = None
    higher_is_better: bool = True

    def is_raised(self, name: str, choice: LayerChoice) -> bool:
        """Whether a layer's activations have more bits than in the plain plan."""
        plain = self.plain[name]
        return (choice.bits.activation_bits or 32) > (plain.bits.activation_bits or 32)

    def cost(self, choices: Choices) -> float:
        """What a plan costs, in the unit of ``costs``."""
        return self.costs.total(choices)
