"""The range of least expected squared error (``mse``; Icraft's ``ems``).

The error is a smooth, nearly unimodal function of each bound, so a coarse scan over fractions of
the maximum and a golden-section refinement around its best find the minimum. The two bounds of an
asymmetric quantizer take turns.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import numpy as np

from qdist.stats.histogram import Density
from qdist.threshold.clip import Levels
from qdist.threshold.error import expected_mse

_SCAN = np.concatenate([np.geomspace(1 / 4096, 1 / 4, 21)[:-1], np.linspace(1 / 4, 1, 31)])
_GOLDEN = (5**0.5 - 1) / 2


def mse(density: Density, levels: Levels, *, rounds: int = 3) -> tuple[float, float]:
    """The bounds of least expected error; ``rounds`` of taking turns when asymmetric."""
    low, high = min(density.minimum, 0.0), max(density.maximum, 0.0)
    if density.is_empty or low == high:
        return low, high
    if levels.symmetric:
        top = max(-low, high)
        bound = _least(lambda t: expected_mse(density, -t, t, levels), top)
        return max(-bound, low), min(bound, high)
    if low == 0.0:
        return 0.0, _least(lambda t: expected_mse(density, 0.0, t, levels), high)
    if high == 0.0:
        return -_least(lambda t: expected_mse(density, -t, 0.0, levels), -low), 0.0
    # Both shrink together first: from the full range, moving one end alone gains little.
    together = _least(lambda t: expected_mse(density, low * t, high * t, levels), 1.0)
    best_low, best_high = low * together, high * together
    for _ in range(rounds):
        before = (best_low, best_high)
        best_high = _least(partial(expected_mse, density, best_low, levels=levels), high)
        best_low = -_least(partial(_with_low, density, best_high, levels), -low)
        if np.allclose(before, (best_low, best_high), rtol=1e-3):
            break
    return best_low, best_high


def _with_low(density: Density, high: float, levels: Levels, bound: float) -> float:
    return expected_mse(density, -bound, high, levels)


def _least(cost: Callable[[float], float], top: float) -> float:
    """The argument in (0, ``top``] of least cost. The top itself wins ties."""
    points = _SCAN * top
    costs = [cost(float(t)) for t in points]
    i = len(costs) - 1 - int(np.argmin(costs[::-1]))
    low = float(points[max(i - 1, 0)])
    high = float(points[min(i + 1, len(points) - 1)])
    best, best_cost = float(points[i]), costs[i]
    a, b = high - _GOLDEN * (high - low), low + _GOLDEN * (high - low)
    cost_a, cost_b = cost(a), cost(b)
    for _ in range(12):
        if cost_a < cost_b:
            high, b, cost_b = b, a, cost_a
            a = high - _GOLDEN * (high - low)
            cost_a = cost(a)
        else:
            low, a, cost_a = a, b, cost_b
            b = low + _GOLDEN * (high - low)
            cost_b = cost(b)
    if min(cost_a, cost_b) < best_cost:
        best = a if cost_a < cost_b else b
    return best
