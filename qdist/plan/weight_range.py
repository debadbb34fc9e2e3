"""Symmetric ranges of weights: per tensor, output channel, group of channels, or block."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qdist.numbers.dtype import FloatType, IntegerType
from qdist.numbers.grid import LEAST_SCALE
from qdist.plan.quantizer import BlockScales, Quantizer
from qdist.threshold.clip import Levels
from qdist.threshold.float_error import FLOAT_METHODS, float_threshold
from qdist.threshold.registry import find_thresholds
from qdist.threshold.sources import array_densities

Parameters = Mapping[str, Any]
"""Of a threshold method."""
_FRACTIONS = np.linspace(0.4, 1.0, 25)[::-1]
_BLOCK_ELEMENTS = 1 << 22


def weight_quantizer(
    weight: NDArray[Any],
    levels: Levels,
    bits: int,
    axis: int | None,
    method: str,
    parameters: Parameters | None = None,
) -> Quantizer:
    """The quantizer of a float weight of any shape, per index of ``axis`` (None: one range).

    ``method``: ``max`` takes the largest |w|; ``mse`` the fraction of it (0.4 .. 1 in 25 steps)
    with the least squared error, a channel at a time; any other finds its range on the histogram of
    each channel (`qdist.threshold.sources`), and so do these two with ``parameters``.
    """
    n_channels = 1 if axis is None else weight.shape[axis]
    bounds = np.empty(n_channels, np.float64)
    clipped = 0
    error = 0.0
    for start, block in _blocks(weight, axis):
        top = _largest(block)
        best = _bounds(block, top, levels, method, parameters or {})
        bounds[start : start + best.size] = best
        for values in _pieces(block):
            clipped += int((np.abs(values) > best[:, None].astype(np.float32)).sum())
        error += float(_squared_error(block, best, levels).sum())
    scales = np.where(bounds > 0, bounds / levels.high, 1.0)
    widest = float(bounds.max(initial=0.0))
    return Quantizer(
        bits=bits,
        low=levels.low,
        high=levels.high,
        scales=tuple(float(s) for s in scales),
        zero_points=(0,) * scales.size,
        axis=axis,
        method=method,
        bounds=(-widest, widest),
        clipped_share=clipped / max(1, weight.size),
        expected_mse=error / max(1, weight.size),
    )


def _bounds(
    block: NDArray[Any],
    top: NDArray[np.float64],
    levels: Levels,
    method: str,
    parameters: Parameters,
) -> NDArray[np.float64]:
    """The bound of each row, whose largest magnitude is ``top``."""
    if method == "max" and not parameters:
        return top
    if method == "mse" and not parameters:
        return _least_error(block, top, levels)
    found = find_thresholds(array_densities(block, 0), levels, method, parameters)
    return np.array([max(-each.low, each.high) for each in found])


def group_quantizer(
    weight: NDArray[Any],
    levels: Levels,
    bits: int,
    axis: int,
    n_groups: int,
    method: str,
    parameters: Parameters | None = None,
) -> Quantizer:
    """As `weight_quantizer`, with one range for each of ``n_groups`` groups of neighbouring
    channels (Icraft's ``group=n``), which differ by one channel where they do not come out even.
    There are no more groups than channels.
    """
    n_channels = weight.shape[axis]
    moved = np.moveaxis(weight, axis, 0)
    parts = np.array_split(np.arange(n_channels), min(n_groups, n_channels))
    found = [
        weight_quantizer(moved[p[0] : p[-1] + 1], levels, bits, None, method, parameters)
        for p in parts
    ]
    sizes = [part.size * weight.size // n_channels for part in parts]
    scales = [q.scales[0] for q, part in zip(found, parts, strict=True) for _ in part]
    widest = max(q.bounds[1] for q in found)
    return replace(
        found[0],
        scales=tuple(scales),
        zero_points=(0,) * n_channels,
        axis=axis,
        bounds=(-widest, widest),
        clipped_share=float(np.average([q.clipped_share or 0.0 for q in found], weights=sizes)),
        expected_mse=float(np.average([q.expected_mse or 0.0 for q in found], weights=sizes)),
    )


def block_quantizer(
    weight: NDArray[Any],
    levels: Levels,
    bits: int,
    axis: int,
    size: int,
    method: str,
    parameters: Parameters | None = None,
) -> Quantizer:
    """As `weight_quantizer`, with one range for every ``size`` values along ``axis``, at each index
    of the other axes. The last block may be shorter."""
    length = weight.shape[axis]
    n_blocks = -(-length // size)
    moved = np.moveaxis(weight, axis, -1)
    rest = moved.shape[:-1]
    # Zeros at the end change no range and add no error.
    padded = np.zeros((*rest, n_blocks * size), np.float32)
    padded[..., :length] = moved
    rows = padded.reshape(-1, size)
    whole = weight_quantizer(rows, levels, bits, 0, method, parameters)
    scales = np.maximum(np.asarray(whole.scales, np.float32), np.float32(LEAST_SCALE))
    shaped = np.moveaxis(scales.reshape(*rest, n_blocks), -1, axis)
    more = rows.size / max(1, weight.size)
    return replace(
        whole,
        scales=(float(scales.max()),),
        zero_points=(0,),
        axis=None,
        blocks=BlockScales.of(shaped, axis % weight.ndim, size),
        clipped_share=(whole.clipped_share or 0.0) * more,
        expected_mse=(whole.expected_mse or 0.0) * more,
    )


def unsigned(found: Quantizer, kind: IntegerType) -> Quantizer:
    """A weight's quantizer in the integers of ``kind``: in unsigned ones all levels are moved by
    half of them, so that the values stay what they are."""
    if kind.signed:
        return found
    shift = 1 << (kind.bits - 1)
    return replace(
        found,
        low=found.low + shift,
        high=found.high + shift,
        zero_points=(shift,) * len(found.zero_points),
        storage=kind.name,
    )


def float_quantizer(
    weight: NDArray[Any],
    kind: FloatType,
    axis: int | None,
    method: str = "max",
    parameters: Parameters | None = None,
) -> Quantizer:
    """The quantizer of a weight into a narrow floating-point type, whose largest value the bound
    becomes. ``method``: of `FLOAT_METHODS`; any other is ``max``, which needs no search."""
    n_channels = 1 if axis is None else weight.shape[axis]
    method = method if method in FLOAT_METHODS else "max"
    bounds = np.empty(n_channels, np.float64)
    clipped = error = 0.0
    for start, block in _blocks(weight, axis):
        found = [
            float_threshold(density, kind, method, parameters)
            for density in array_densities(block, 0)
        ]
        bounds[start : start + len(found)] = [max(-each.low, each.high) for each in found]
        clipped += sum(each.clipped_share for each in found) * block.shape[1]
        error += sum(each.expected_mse for each in found) * block.shape[1]
    scales = np.where(bounds > 0, bounds / kind.largest, 1.0)
    widest = float(bounds.max(initial=0.0))
    return Quantizer(
        bits=kind.bits,
        low=0,
        high=0,
        scales=tuple(float(s) for s in scales),
        zero_points=(0,) * n_channels,
        axis=axis,
        method=method,
        bounds=(-widest, widest),
        clipped_share=clipped / max(1, weight.size),
        expected_mse=error / max(1, weight.size),
        storage=kind.name,
        saturates=True,
    )


def _blocks(weight: NDArray[Any], axis: int | None) -> Iterator[tuple[int, NDArray[Any]]]:
    """Whole channels at a time as ``[channels, rest]``, each with the index of its first; a view
    wherever the layout allows, and a small copy elsewhere."""
    if axis is None:
        yield 0, weight.reshape(1, weight.size)
        return
    moved = np.moveaxis(weight, axis, 0)
    n_channels = moved.shape[0]
    n_rest = weight.size // max(1, n_channels)
    step = max(1, _BLOCK_ELEMENTS // max(1, n_rest))
    for i in range(0, n_channels, step):
        part = moved[i : i + step]
        yield i, part.reshape(part.shape[0], n_rest)


def _pieces(block: NDArray[Any]) -> Iterator[NDArray[np.float32]]:
    """The block's columns, so many at a time that temporary copies stay small."""
    step = max(1, _BLOCK_ELEMENTS // block.shape[0])
    for i in range(0, block.shape[1], step):
        yield block[:, i : i + step].astype(np.float32, copy=False)


def _largest(block: NDArray[Any]) -> NDArray[np.float64]:
    """The largest magnitude of each row."""
    top = np.zeros(block.shape[0], np.float64)
    for values in _pieces(block):
        top = np.maximum(top, np.abs(values).max(axis=1, initial=0.0))
    return top


def _squared_error(
    block: NDArray[Any], bounds: NDArray[np.float64], levels: Levels
) -> NDArray[np.float64]:
    """Summed squared error of each row."""
    # A float32 scale that underflows would divide 0 by 0; targets raise it likewise.
    least = np.finfo(np.float32).tiny
    scale = np.where(bounds > 0, np.maximum(bounds / levels.high, least), 1.0)
    scale = scale.astype(np.float32)[:, None]
    total = np.zeros(block.shape[0], np.float64)
    for values in _pieces(block):
        q = np.clip(np.rint(values / scale), levels.low, levels.high) * scale
        total += np.square(values - q).sum(axis=1, dtype=np.float64)
    return total


def _least_error(
    block: NDArray[Any], top: NDArray[np.float64], levels: Levels
) -> NDArray[np.float64]:
    best, least = top, _squared_error(block, top, levels)
    for fraction in _FRACTIONS[1:]:
        error = _squared_error(block, top * fraction, levels)
        better = error < least
        best = np.where(better, top * fraction, best)
        least = np.where(better, error, least)
    return best
