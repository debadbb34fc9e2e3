"""Icraft's ``variance_strategy``, Buyi's default: by the variance of the feature maps.

The vendor gives no formula. Our reading: the variance of an activation as a share of the square
of its range. Rounding to n levels makes noise of (range/n)^2 / 12, so the ratio of noise to signal
grows as this share falls: a map whose values huddle in a small part of its range is the one that
few levels serve badly. No run of the model; all of it comes from stored statistics.
"""

from __future__ import annotations

import numpy as np

from qdist.errors import PlanError
from qdist.plan.plan import QuantizationPlan
from qdist.search.pickers.picking import Picked, PickSettings, n_raised, worst
from qdist.stats.histogram import Density

LOW_SHARE = 0.8
"""Of the layers that stay low, unless a share or a threshold is given."""


def variance(
    plan: QuantizationPlan, densities: dict[str, Density], settings: PickSettings
) -> Picked:
    """The layers whose inputs have the least variance within their ranges.

    ``plan``: the one at the lower precision. ``densities``: of the tensors that its layers read.
    ``threshold``: layers below this share of variance (0..1) are raised; else ``low_share`` of them
    stay low. Scores are the shares, negated. Raises QD507 for tf32, above which there is nothing.
    """
    if any(layer.choice.precision == "tf32" for layer in plan.layers):
        raise PlanError(
            "QD507",
            where="mixed precision by variance",
            got="layers in tf32",
            expected="a precision below the highest",
            mend="choose int8, bf16 or fp16, or another strategy",
        )
    scores: dict[str, float] = {}
    for layer in plan.layers:
        shares = [
            _share(densities[entry.tensor], entry.quantizer.bounds)
            for entry in layer.activations
            if entry.tensor in densities
        ]
        if shares and layer.fused_with is None:
            scores[layer.name] = -min(shares)
    if settings.threshold is not None:
        chosen = tuple(name for name, score in scores.items() if -score < settings.threshold)
    else:
        share = LOW_SHARE if settings.low_share is None else settings.low_share
        chosen = worst(scores, n_raised(len(scores), share))
    why = {name: f"variance {-scores[name]:.2g} of its range squared" for name in chosen}
    return Picked(raised=frozenset(chosen), scores=scores, why=why)


def _share(density: Density, bounds: tuple[float, float]) -> float:
    """Variance of the values, clipped to the range, over the square of its width; 1/4 at most."""
    low, high = bounds
    if density.is_empty or not high > low:
        return 0.25
    values = np.clip(density.centers, low, high)
    mean = float(np.dot(density.counts, values)) / density.total
    return float(np.dot(density.counts, (values - mean) ** 2)) / density.total / (high - low) ** 2
