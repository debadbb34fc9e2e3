"""The strategies by name."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from qdist.search.greedy import Greedy, GreedySettings
from qdist.search.trial import Choices, Strategy

STRATEGIES: dict[str, Callable[..., Strategy]] = {"greedy": Greedy}
"""Name -> a function of (plain choices, sensitivities, settings, weights per layer)."""


def make_strategy(
    name: str,
    plain: Choices,
    sensitivity: Mapping[str, Mapping[str, float]],
    settings: GreedySettings,
    n_weights: Mapping[str, int],
) -> Strategy:
    """A strategy by name. Raises `KeyError` for an unknown one; the command line checks first."""
    return STRATEGIES[name](plain, sensitivity, settings, n_weights)
