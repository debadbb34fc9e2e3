"""Symmetric ranges of weights, per tensor or per output channel."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from qdist.plan.quantizer import Quantizer
from qdist.threshold.clip import Levels

_FRACTIONS = np.linspace(0.4, 1.0, 25)[::-1]
_BLOCK_ELEMENTS = 1 << 22


def weight_quantizer(
    weight: NDArray[Any], levels: Levels, bits: int, axis: int | None, method: str
) -> Quantizer:
    """The quantizer of a float weight of any shape, per index of ``axis`` (None: one range).

    ``method``: ``max`` takes the largest |w|; ``mse`` the fraction of it (0.4 .. 1 in 25 steps)
    with the least squared error, a channel at a time.
    """
    rows = _rows(weight, axis)
    bounds = np.empty(rows.shape[0], np.float64)
    clipped = 0
    error = 0.0
    for start, block in _blocks(rows):
        values = block.astype(np.float32, copy=False)
        top = np.abs(values).max(axis=1, initial=0.0).astype(np.float64)
        stop = start + block.shape[0]
        best = top if method == "max" else _least_error(values, top, levels)
        bounds[start:stop] = best
        clipped += int((np.abs(values) > best[:, None].astype(np.float32)).sum())
        error += float(_squared_error(values, best, levels).sum())
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
        clipped_share=clipped / max(1, rows.size),
        expected_mse=error / max(1, rows.size),
    )


def _rows(weight: NDArray[Any], axis: int | None) -> NDArray[Any]:
    """``[channels, rest]``; a view wherever the layout allows."""
    if axis is None:
        return weight.reshape(1, -1)
    return np.moveaxis(weight, axis, 0).reshape(weight.shape[axis], -1)


def _blocks(rows: NDArray[Any]) -> list[tuple[int, NDArray[Any]]]:
    """Whole channels at a time, so that temporary copies stay small."""
    step = max(1, _BLOCK_ELEMENTS // max(1, rows.shape[1]))
    return [(i, rows[i : i + step]) for i in range(0, rows.shape[0], step)]


def _squared_error(
    values: NDArray[np.float32], bounds: NDArray[np.float64], levels: Levels
) -> NDArray[np.float64]:
    """Summed squared error of each row."""
    # A float32 scale that underflows would divide 0 by 0; targets raise it likewise.
    least = np.finfo(np.float32).tiny
    scale = np.where(bounds > 0, np.maximum(bounds / levels.high, least), 1.0)
    scale = scale.astype(np.float32)[:, None]
    q = np.clip(np.rint(values / scale), levels.low, levels.high) * scale
    return np.asarray(np.square(values - q).sum(axis=1, dtype=np.float64))


def _least_error(
    values: NDArray[np.float32], top: NDArray[np.float64], levels: Levels
) -> NDArray[np.float64]:
    best, least = top, _squared_error(values, top, levels)
    for fraction in _FRACTIONS[1:]:
        error = _squared_error(values, top * fraction, levels)
        better = error < least
        best = np.where(better, top * fraction, best)
        least = np.where(better, error, least)
    return best
