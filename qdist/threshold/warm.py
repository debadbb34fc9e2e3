"""Compiling what finds ranges before there is anything to find.

Numba compiles a loop when it is first called, some fifteen seconds for all of them, and keeps the
result on disk for the next process. ``python -m qdist.threshold.warm`` does so ahead of the first
run.
"""

from __future__ import annotations

import numpy as np

from qdist.numbers.dtype import FLOATS
from qdist.stats.histogram import Density
from qdist.threshold.clip import Levels
from qdist.threshold.float_error import float_threshold
from qdist.threshold.pinning import pinning
from qdist.threshold.registry import METHODS, find_threshold

_INT8 = Levels(low=-128, high=127, symmetric=False)


def warm() -> None:
    """Compile, or load from Numba's cache, the loops of all methods."""
    edges = np.linspace(-1.0, 2.0, 301)
    density = Density(lower=edges[:-1], upper=edges[1:], counts=np.ones(300))
    for method in METHODS:
        find_threshold(density, _INT8, method)
    pinning(density, _INT8, "kl", placements=1)
    pinning(density, _INT8, "improved_mse", placements=1)
    float_threshold(density, FLOATS["fp8_e4m3"], "mse")


if __name__ == "__main__":
    warm()
