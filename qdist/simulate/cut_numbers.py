"""Weights and biases in whole numbers where Icraft's normalization goes into them."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from qdist.numbers.cuts import shared_scale, vector_grid
from qdist.numbers.rounding import round_integer
from qdist.plan.plan import LayerPlan
from qdist.plan.quantizer import Quantizer
from qdist.plan.target import cuts_of


def folded_weight(
    weight: NDArray[np.float32], layer: LayerPlan, source: Quantizer, numbers: Quantizer
) -> tuple[NDArray[np.float64], NDArray[np.float64], int]:
    """A convolution's weight times the ratios of its input's channels, in whole numbers; the values
    of its normalized scales (one, or one an output channel), and the first cut."""
    along = np.asarray(source.scales, np.float64).reshape(-1, *[1] * (weight.ndim - 2))
    output = layer.outputs[0].quantizer.scales[0]
    normalized = weight.astype(np.float64) * along / output
    axes = tuple(range(weight.ndim))[0 if numbers.axis is None else 1 :]
    widest = np.abs(normalized).max(axis=axes).ravel()
    wanted = [float(w) / numbers.high if w > 0 else 1.0 for w in widest]
    cuts = cuts_of(layer, wanted, [bound / output for bound in layer.bias_bounds])
    values = np.array([scale.value for scale in cuts.scales])
    scales = values.reshape(-1, *[1] * (weight.ndim - 1))
    whole = round_integer(normalized / scales, numbers.rounding)
    return np.clip(whole, numbers.low, numbers.high), values, cuts.shift


def norm_numbers(
    weight: NDArray[np.float64], bias: NDArray[np.float64], bits: int
) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
    """Whole weights and biases of a batch normalization, and the scale that both share, for each
    channel. ``weight`` and ``bias`` are normalized. The scale is the weight's, where that is not
    nearly zero, else the bias's, else 1. Biases may be beyond what their bits hold.
    """
    high, grid = (1 << (bits - 1)) - 1, vector_grid(bits)
    least = 2.0**-grid.n_high
    wanted = [
        shared_scale(w, b, bits) if w >= least / 2 or b else 1.0
        for w, b in zip(np.abs(weight) / high, np.abs(bias), strict=True)
    ]
    scales = np.array([grid.snap(float(scale)).value for scale in wanted])
    whole = np.clip(round_integer(weight / scales, "half_away"), -high, high)
    return whole, round_integer(bias / scales, "half_away"), scales
