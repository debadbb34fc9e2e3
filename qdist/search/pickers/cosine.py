"""Icraft's ``cosimilarity_strategy``: by how much a layer alone turns its output.

Each layer's output, quantized and fed by float activations, beside its float self; one pass for
all layers (`qdist.simulate.twins`).
"""

from __future__ import annotations

from collections.abc import Mapping

from qdist.evaluate.compare import Deviation
from qdist.search.pickers.picking import Picked, PickSettings, n_raised, worst

THRESHOLD = 0.97
"""Layers of a smaller cosine are raised: level 1 of the vendor's automatic tuning."""


def cosine(deviations: Mapping[str, Deviation], settings: PickSettings) -> Picked:
    """The layers whose cosine is below ``threshold`` (0.97), or, with ``low_share``, the worst.

    ``deviations``: of every layer alone, at the lower precision. Scores are 1 - cosine.
    """
    scores = {name: 1.0 - deviation.cosine for name, deviation in deviations.items()}
    if settings.low_share is not None:
        chosen = worst(scores, n_raised(len(scores), settings.low_share))
    else:
        limit = 1.0 - (THRESHOLD if settings.threshold is None else settings.threshold)
        chosen = tuple(name for name, score in scores.items() if score > limit)
    why = {name: f"cosine {1.0 - scores[name]:.5f} alone" for name in chosen}
    return Picked(raised=frozenset(chosen), scores=scores, why=why)
