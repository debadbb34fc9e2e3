"""What a layer makes of an error in the tensor that it reads.

The layer is taken as linear, ``y = W x``. The error ``e = Q(x) - x`` is split into what goes along
with the signal and what does not, by regression on x: ``e = b - a (x - mean) + r``.

The rest ``r``, which is most of rounding, is about independent from value to value, so it reaches
an output with the energy of its weights, ``G E[r^2]`` with ``G`` the sum of their squares. The
other two parts add up over all inputs instead of averaging out. Clipped values are too small, all
of them, so the whole output shrinks: ``a^2`` of its variance. And where most values are small and
of one sign, rounding them to zero is an offset: ``b^2`` times the square of the sum of the weights.
Where inputs of a sum agree in sign, as the outputs of ReLUs under positive weights do, the output's
variance is far above ``G E[x^2]``, and clipping costs more than the error in the tensor tells.

Clipping also falls on the channels that reach beyond the range, and on no others, so their weights
count for its part of ``r``: a channel of large values and small weights, as after a normalization
with uneven gains, may be clipped where the mean over channels would forbid it.

This is the second-order, layer-wise error of M. Nagel et al., "Up or down? Adaptive rounding for
post-training quantization" (ICML 2020) and of Y. Choukroun et al., "Low-bit quantization of neural
networks for efficient inference" (2019), with what histograms know in place of samples.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from qdist.stats.histogram import Density
from qdist.threshold.clip import Levels, scale_and_zero
from qdist.threshold.error import mean_squared_error
from qdist.threshold.kernels import sum_codes


@dataclass(frozen=True, slots=True, kw_only=True)
class Consumer:
    """A layer that reads a tensor.

    ``gains`` float64[c] >= 0: per input channel the squared weights of one output, summed over
    whatever else an output sums over (the window of a convolution), mean over outputs; one entry
    where channels cannot be told apart. ``minimum``, ``maximum`` float64[c]: exact extrema of the
    channels, where known. ``output_square``: mean y^2 without bias, where it was measured.
    ``mean_gain`` >= 0: mean over outputs of the square of the sum of their weights.
    """

    name: str
    gains: NDArray[np.float64]
    minimum: NDArray[np.float64] | None = None
    maximum: NDArray[np.float64] | None = None
    output_square: float | None = None
    mean_gain: float = 0.0

    def __post_init__(self) -> None:
        n = self.gains.size
        if self.gains.ndim != 1 or not n or not (self.gains >= 0).all():
            raise ValueError(f"{self.name}: gains of shape {self.gains.shape}, or negative ones")
        for found in (self.minimum, self.maximum):
            if found is not None and found.shape != (n,):
                raise ValueError(f"{self.name}: {found.shape} extrema of {n} channels")

    @classmethod
    def of_weight(
        cls,
        name: str,
        weight: NDArray[np.floating],
        input_axis: int,
        output_axis: int,
        *,
        groups: int = 1,
        minimum: NDArray[np.floating] | None = None,
        maximum: NDArray[np.floating] | None = None,
        output_square: float | None = None,
    ) -> Consumer:
        """From a weight whose axes are inputs, outputs and what else an output sums over.

        ``groups``: of a convolution, whose input axis then holds the channels of one group.
        """
        square = np.square(weight, dtype=np.float64)
        others = tuple(
            i
            for i in range(weight.ndim)
            if i not in (input_axis % weight.ndim, output_axis % weight.ndim)
        )
        table = np.moveaxis(square, (output_axis, input_axis), (0, 1)).sum(
            axis=tuple(range(2, 2 + len(others)))
        )
        n_out, n_in = table.shape
        over = tuple(i for i in range(weight.ndim) if i != output_axis % weight.ndim)
        # Each group of outputs reads its own channels; the others have no weight for them.
        per_group = table.reshape(groups, n_out // groups, n_in).sum(axis=1)
        return cls(
            name=name,
            gains=per_group.ravel() / n_out,
            minimum=None if minimum is None else np.asarray(minimum, np.float64),
            maximum=None if maximum is None else np.asarray(maximum, np.float64),
            output_square=output_square,
            mean_gain=float(np.mean(np.sum(weight, axis=over, dtype=np.float64) ** 2)),
        )

    def gain(self) -> float:
        """The sum of the squared weights of an output."""
        return float(self.gains.sum())

    def gain_beyond(self, low: float, high: float) -> float:
        """The same if every channel weighed what those that leave ``low .. high`` weigh on average;
        `gain` where the extrema are not known, or where none leaves."""
        if self.minimum is None or self.maximum is None:
            return self.gain()
        beyond = (self.minimum < low) | (self.maximum > high)
        if not beyond.any():
            return self.gain()
        return float(self.gains[beyond].mean() * self.gains.size)


def output_error(
    density: Density, low: float, high: float, levels: Levels, consumer: Consumer
) -> float:
    """Expected squared error of an output of ``consumer`` as a share of its mean square.

    0 for a tensor of nothing but zeros, and for a layer of nothing but zeros.
    """
    square = density.second_moment
    gain = consumer.gain()
    if square <= 0.0 or gain <= 0.0:
        return 0.0
    signal = consumer.output_square if consumer.output_square else gain * square
    scale, zero = scale_and_zero(low, high, levels)
    first, last = levels.low - zero, levels.high - zero
    error = mean_squared_error(density, scale, zero, levels)
    clipped = min(clipping(density, first * scale, last * scale), error)
    mean = float(np.dot(density.counts, density.centers)) / density.total
    codes, products = sum_codes(density.lower, density.upper, density.counts, scale, first, last)
    bias = codes * scale / density.total - mean
    variance = max(square - mean * mean, 0.0)
    covariance = products * scale / density.total - square - bias * mean
    slope = covariance / variance if variance > 1e-9 * square else 0.0
    explained = min(bias * bias + slope * slope * variance, error)
    rest = (error - explained) / error if error > 0 else 0.0
    spread = gain * (error - clipped) + consumer.gain_beyond(low, high) * clipped
    return (
        rest * spread
        + consumer.mean_gain * bias * bias
        + slope * slope * max(signal - consumer.mean_gain * mean * mean, 0.0)
    ) / signal


def clipping(density: Density, bottom: float, top: float) -> float:
    """Mean of ``(clip(x, bottom, top) - x)^2`` over the density."""
    above = int(np.searchsorted(density.upper, top, side="right"))
    below = int(np.searchsorted(density.lower, bottom, side="left"))
    lower, upper = density.lower[above:], density.upper[above:]
    squares = _beyond(np.maximum(lower, top), upper, upper - lower, density.counts[above:], top)
    lower, upper = density.lower[:below], density.upper[:below]
    squares += _beyond(
        lower, np.minimum(upper, bottom), upper - lower, density.counts[:below], bottom
    )
    return squares / density.total


def _beyond(
    lower: NDArray[np.float64],
    upper: NDArray[np.float64],
    width: NDArray[np.float64],
    counts: NDArray[np.float64],
    bound: float,
) -> float:
    """Sum of ``(x - bound)^2`` over parts of intervals that are ``width`` wide and hold ``counts``;
    an interval of no width is there as a whole."""
    share = np.where(width > 0, (upper - lower) / np.where(width > 0, width, 1.0), 1.0)
    a, b = lower - bound, upper - bound
    return float(np.dot(counts * share, (a * a + a * b + b * b) / 3))
