"""SmoothQuant's factors, from stored statistics.

s_j = max|X_j|^alpha / max|W_j|^(1 - alpha) for channel j of an activation X and the rows j of all
weights that read it (Xiao et al. 2023, https://arxiv.org/abs/2211.10438). Here every s_j is rounded
to a power of two, in the logarithm, after division by the geometric mean of the tensor's factors,
which means nothing to the scales that are found later.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from qdist.errors import ModelError
from qdist.model.graph import Graph
from qdist.model.smooth_points import Fold, SmoothPoint, find_points
from qdist.model.smoothed import smoothed_model
from qdist.model.smoothing import Smoothing
from qdist.model.taps import TapTable
from qdist.stats import grid
from qdist.stats.record import CalibrationRecord

_MOST = 24
"""Largest exponent: a channel that is 2^24 times another one is not made its equal."""
_LEAST_NORMAL, _LARGEST = -125, 128
"""Exponents of the least normal and the largest float32, for a mantissa in 0.5..1 (`frexp`)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FoundSmoothing:
    """The factors, and the tensors that linear layers read but that stay as they are -> why."""

    smoothing: Smoothing
    left: dict[str, str]

    def notes(self) -> list[str]:
        """What stays as it is, by reason, in few lines."""
        reasons: dict[str, list[str]] = {}
        for tensor, reason in self.left.items():
            reasons.setdefault(reason, []).append(tensor)
        return [
            f"not smoothed ({reason}): {', '.join(names[:3])}"
            + (f" and {len(names) - 3} more" if len(names) > 3 else "")
            for reason, names in reasons.items()
        ]


def find_smoothing(
    graph: Graph, record: CalibrationRecord, taps: TapTable, alpha: float
) -> FoundSmoothing:
    """The factors of strength ``alpha`` (0..1) for the model of ``graph`` as it was measured.

    Raises `ModelError` QD212 where no tensor can be smoothed, `ValueError` for another alpha.
    """
    points = find_points(graph)
    left = dict(points.left)
    exponents: dict[str, tuple[int, ...]] = {}
    for point in points.points:
        found = _exponents(graph, record, taps, point, alpha)
        if isinstance(found, str):
            left[point.tensor] = found
        elif not found.any():
            left[point.tensor] = "its channels are even as they are"
        else:
            exponents[point.tensor] = tuple(int(e) for e in found)
    smoothing = Smoothing(alpha=alpha, exponents=exponents)
    if not exponents:
        reasons = "; ".join(list(dict.fromkeys(left.values()))[:3])
        raise ModelError(
            "QD212",
            where=str(graph.model.source),
            got=f"no tensor whose channels can be scaled ({reasons or 'no linear layers'})",
            expected="linear layers that read a normalization, or another linear layer",
            mend="leave out quantization.smoothing",
        )
    return FoundSmoothing(smoothing=smoothing, left=left)


def smoothed_graph(
    graph: Graph, record: CalibrationRecord, taps: TapTable, alpha: float
) -> tuple[Graph, FoundSmoothing]:
    """The graph of the model smoothed with strength ``alpha``, and what was found for that. Raises
    as `find_smoothing` and `smoothed_model`."""
    found = find_smoothing(graph, record, taps, alpha)
    return Graph(smoothed_model(graph, found.smoothing), graph.execution), found


def lacking_channels(graph: Graph, record: CalibrationRecord) -> dict[str, int]:
    """Measured tensors that could be smoothed, were extrema of their channels known -> the axis of
    these."""
    return {
        point.tensor: point.axis
        for point in find_points(graph).points
        if point.axis is not None
        and point.tensor in record
        and record.channel_axis(point.tensor) != point.axis
    }


def _exponents(
    graph: Graph, record: CalibrationRecord, taps: TapTable, point: SmoothPoint, alpha: float
) -> NDArray[np.int32] | str:
    """int32[channels], or why there are none."""
    if point.tensor not in record:
        return "it was not measured"
    channels = record.channels(point.tensor)
    if channels is None or point.axis is None:
        return "its statistics have no channels"
    if record.channel_axis(point.tensor) != point.axis:
        return "its statistics count channels along another axis"
    activation = channels.magnitude.astype(np.float64)
    weight = np.zeros(point.n_channels)
    for fold in point.weights:
        weight = np.maximum(weight, np.abs(_rows(graph, fold)).max(axis=1, initial=0.0))
    used = (activation > 0) & (weight > 0)
    if not used.any():
        return "it is zero wherever it is used"
    logarithm = alpha * np.log2(activation[used]) - (1 - alpha) * np.log2(weight[used])
    found = np.zeros(point.n_channels, np.int32)
    found[used] = np.clip(np.rint(logarithm - logarithm.mean()), -_MOST, _MOST)
    down, up = _room(graph, record, taps, point, activation)
    return np.asarray(np.clip(found, -up, down), np.int32)


def _room(
    graph: Graph,
    record: CalibrationRecord,
    taps: TapTable,
    point: SmoothPoint,
    activation: NDArray[np.float64],
) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
    """By how many powers of two every channel of the tensor may be scaled down, and up, with all
    numbers staying normal float32: int32[channels] each, none negative."""
    down, up = _bounds_of(activation[:, None])
    rows = {taps.row_of(name) for name in point.changed}
    down = np.minimum(down, _least_room(record, (row for row in rows if row in record)))
    for fold in (*point.weights, *point.makers):
        lower, higher = _bounds_of(_rows(graph, fold))
        if fold.sign < 0:
            down, up = np.minimum(down, lower), np.minimum(up, higher)
        else:
            down, up = np.minimum(down, higher), np.minimum(up, lower)
    return down.astype(np.int32), up.astype(np.int32)


def _bounds_of(rows: NDArray[np.float64]) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
    """By how many powers of two the values of each row may be scaled down and up."""
    magnitude = np.abs(rows)
    least = np.where(magnitude > 0, magnitude, np.inf).min(axis=1, initial=np.inf)
    largest = magnitude.max(axis=1, initial=0.0)
    seen = np.isfinite(least)
    lowest = np.frexp(np.where(seen, least, 1.0))[1]
    highest = np.frexp(np.where(seen, largest, 1.0))[1]
    return np.maximum(lowest - _LEAST_NORMAL, 0), np.maximum(_LARGEST - 1 - highest, 0)


def _least_room(record: CalibrationRecord, rows: Iterable[str]) -> int:
    """By how many powers of two the smallest measured magnitude of the rows may be scaled down. The
    lowest bin, of zeros and what is below 2^-133, is no normal number before either."""
    room = _MOST
    for row in rows:
        bins = record.histogram(row).bins & np.uint16(0x7FFF)
        bins = bins[(bins > 0) & (bins < grid.POSITIVE_INFINITY)]
        if bins.size:
            lower = grid.edges_of(bins.min(keepdims=True)).lower
            room = min(room, int(_bounds_of(lower[:, None])[0][0]))
    return room


def _rows(graph: Graph, fold: Fold) -> NDArray[np.float64]:
    """float64[channels, values]: a constant by channels."""
    name = graph.nodes[fold.node].input[fold.index]
    weight = np.moveaxis(np.asarray(graph.weights.read(name), np.float64), fold.axis, 0)
    return weight.reshape(weight.shape[0], -1)
