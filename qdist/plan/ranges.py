"""Quantizers of activations that are no plain per-tensor integers."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np

from qdist.model.graph import TensorType
from qdist.numbers.dtype import FloatType, IntegerType
from qdist.numbers.grid import LEAST_SCALE
from qdist.plan.quantizer import Quantizer, rounding_to
from qdist.stats.channels import Channels
from qdist.stats.histogram import Density
from qdist.threshold.clip import Levels, Threshold, scale_and_zero


def rounded(kind: FloatType, values: Density | None) -> Quantizer:
    """The rounding to ``kind`` of a tensor with these finite values (None: not measured). What was
    seen beyond the type's largest, such as a mask, saturates."""
    beyond = values is not None and max(-values.minimum, values.maximum) > kind.largest
    return rounding_to(kind, saturates=beyond)


def scaled_float(kind: FloatType, threshold: Threshold) -> Quantizer:
    """The quantizer into a narrow floating-point type whose largest value is the threshold."""
    bound = max(-threshold.low, threshold.high)
    is_known = not math.isnan(threshold.expected_mse)
    return Quantizer(
        bits=kind.bits,
        low=0,
        high=0,
        scales=(bound / kind.largest if bound > 0 else 1.0,),
        zero_points=(0,),
        axis=None,
        method=threshold.method,
        bounds=(-bound, bound),
        clipped_share=threshold.clipped_share if is_known else None,
        expected_mse=threshold.expected_mse if is_known else None,
        storage=kind.name,
        saturates=True,
    )


def per_token(
    kind: IntegerType, range_bits: int | None, found: TensorType | None, values: Density
) -> Quantizer | None:
    """A scale for every row of the last axis, found while the model runs; symmetric. None where the
    length of that axis is not known."""
    shape = None if found is None else found.shape
    length = shape[-1] if shape else None
    if not isinstance(length, int) or length < 1:
        return None
    low, high = kind.range(range_bits, balanced=True)
    widest = max(-values.minimum, values.maximum, 0.0)
    return Quantizer(
        bits=kind.bits,
        low=low,
        high=high,
        scales=(1.0,),
        zero_points=(0,),
        axis=None,
        method="dynamic",
        bounds=(-widest, widest),
        clipped_share=0.0,
        token_length=length,
    )


def per_channel(
    bits: int,
    levels: Levels,
    channels: Channels | None,
    axis: int | None,
    n_groups: int | None = None,
) -> Quantizer | None:
    """A scale for every channel, or the same for the channels of each of so many groups of
    neighbours, from exact extrema; None where these are not known."""
    if channels is None or axis is None:
        return None
    if n_groups is not None:
        channels = _grouped(channels, n_groups)
    pairs = [
        scale_and_zero(min(float(low), 0.0), max(float(high), 0.0), levels)
        # A channel that never held a finite value has infinite extrema the wrong way round.
        for low, high in zip(channels.minimum, channels.maximum, strict=True)
    ]
    return Quantizer(
        bits=bits,
        low=levels.low,
        high=levels.high,
        scales=tuple(max(scale, LEAST_SCALE) for scale, _ in pairs),
        zero_points=tuple(zero for _, zero in pairs),
        axis=axis,
        method="max",
        bounds=(
            float(np.minimum(channels.minimum, 0).min()),
            float(np.maximum(channels.maximum, 0).max()),
        ),
        clipped_share=0.0,
    )


def _grouped(channels: Channels, n_groups: int) -> Channels:
    """Every channel with the extrema of its group."""
    n = channels.minimum.size
    parts = np.array_split(np.arange(n), min(n_groups, n))
    lowest = [np.full(p.size, channels.minimum[p].min(), np.float32) for p in parts]
    highest = [np.full(p.size, channels.maximum[p].max(), np.float32) for p in parts]
    return Channels(minimum=np.concatenate(lowest), maximum=np.concatenate(highest))


def stored_as(quantizer: Quantizer, kind: IntegerType) -> Quantizer:
    """A signed quantizer in the integers of ``kind``: an unsigned one has all levels shifted."""
    if kind.signed:
        return quantizer
    shift = -quantizer.low
    return replace(
        quantizer,
        low=quantizer.low + shift,
        high=quantizer.high + shift,
        zero_points=tuple(zero + shift for zero in quantizer.zero_points),
        storage=kind.name,
    )
