"""Knight's ``initial``, which raises nothing, and ``IOhigh``, which raises both ends."""

from __future__ import annotations

from qdist.plan.layer_index import LayerIndex
from qdist.search.pickers.picking import (
    DEFAULT_LOW_SHARE,
    Picked,
    PickSettings,
    n_raised,
    worst,
)


def initial(index: LayerIndex, settings: PickSettings) -> Picked:
    """Every layer as the configuration has it."""
    return Picked(raised=frozenset())


def io_high(index: LayerIndex, settings: PickSettings) -> Picked:
    """The layers nearest to the inputs and the outputs, in the order of the graph, by turns.

    The share of layers that stay low is ``low_share`` (0.5 unless given).
    """
    names = [layer.name for layer in index.choosable]
    share = DEFAULT_LOW_SHARE if settings.low_share is None else settings.low_share
    n = len(names)
    scores = {name: -float(min(i, n - 1 - i)) for i, name in enumerate(names)}
    chosen = worst(scores, n_raised(n, share))
    middle = n / 2
    why = {
        name: "near the inputs" if names.index(name) < middle else "near the outputs"
        for name in chosen
    }
    return Picked(raised=frozenset(chosen), scores=scores, why=why)
