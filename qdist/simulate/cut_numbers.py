"""Weights and biases in whole numbers where ratios, as Icraft normalizes, go into them."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from qdist.numbers.cuts import shared_scale, vector_grid
from qdist.numbers.rounding import round_integer
from qdist.plan.plan import LayerPlan
from qdist.plan.target import cuts_of


def folded_weight(
    weight: NDArray[np.float32],
    layer: LayerPlan,
    ratios: NDArray[np.float64],
    output: float | None,
    scales: NDArray[np.float64] | None = None,
) -> tuple[NDArray[np.float64], NDArray[np.float64], int]:
    """A weight times the ratios of what it is multiplied with, in whole numbers of its own bits;
    the scales of the accumulators (one, or one for each index of the quantizer's axis), over
    ``output`` where that is given; and the first cut.

    ``ratios`` broadcast with the weight. ``output``: the scale of the result on a target that cuts,
    where the scales are those of `qdist.numbers.cuts`; None: any number is a scale, and there is no
    cut. ``scales``: float64[first axis], those wanted of a depthwise convolution; else the widest
    value has the highest number.
    """
    numbers = layer.weights[0].quantizer
    zero = numbers.zero_points[0]
    low, high = numbers.low - zero, numbers.high - zero
    moved = weight.astype(np.float64) * ratios
    axis = numbers.axis if scales is None else 0
    if scales is None:
        axes = tuple(i for i in range(weight.ndim) if i != axis)
        scales = np.atleast_1d(np.abs(moved).max(axis=axes)) / high
    if output is None:
        # Where all is 0 the scale is that of the bias alone: no coarser than its neighbours'.
        found, shift = np.where(scales > 0, scales, scales.max() or 2.0**-16), 0
    else:
        moved = moved / output
        wanted = [float(scale) if scale > 0 else 1.0 for scale in scales / output]
        cuts = cuts_of(layer, wanted, [bound / output for bound in layer.bias_bounds])
        found, shift = np.array([scale.value for scale in cuts.scales]), cuts.shift
    shape = [1] * weight.ndim
    if axis is not None:
        shape[axis] = -1
    whole = round_integer(moved / found.reshape(shape), numbers.rounding)
    return np.clip(whole, low, high), found, shift


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
