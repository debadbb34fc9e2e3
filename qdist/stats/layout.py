"""The columns of a record as six plain arrays: what a store writes and a digest covers.

========== =================== ==================================================================
key        int64[m]            differences of the ascending keys of three tables, one after the
                               other, told apart by their top bits: histograms, value tables, group
                               histograms. All but the first are positive.
count      uint64[m]           their counts, positive
extrema    float32[n + c, 2]   minimum and maximum of the ``n`` tensors, then of all channels
largest    float32[l]          the largest |x| of each tensor, one tensor after the other
layout     int64[1 + n, 4]     first the format's version, the limits plus one of the largest and
                               of the distinct values, and the number of groupings; then for each
                               tensor how many largest values it has, whether its value table
                               overflowed, its channel count plus one (0: varied, 1: unseen), and
                               its channel axis plus 128
grouping   int64[g, 6]         row, axis plus 128, group count and size (0: not given), mantissa
                               bits, and the size of the axis plus one
========== =================== ==================================================================

No integer is negative and no float is NaN, so a chunk that was never written shows.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qdist.stats import largest
from qdist.stats.channels import ChannelColumns
from qdist.stats.entries import Entries
from qdist.stats.groups import GroupColumns, Grouping
from qdist.stats.kernels import all_counted, ascend
from qdist.stats.largest import LargestColumns
from qdist.stats.values import ValueColumns

VERSION = 2
_TABLE_SHIFT = 60
_AXIS_ORIGIN = 128
_DTYPES = {
    "key": np.int64,
    "count": np.uint64,
    "extrema": np.float32,
    "largest": np.float32,
    "layout": np.int64,
    "grouping": np.int64,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Columns:
    """The columns of a `CalibrationRecord`, under its names for them."""

    histograms: Entries
    extrema: NDArray[np.float32]
    largest_values: LargestColumns
    values: ValueColumns
    channel_extrema: ChannelColumns
    grouped: GroupColumns


def pack(columns: Columns) -> dict[str, NDArray[Any]]:
    """The six arrays."""
    tables = (columns.histograms, columns.values.entries, columns.grouped.entries)
    keys = np.concatenate([t.keys + (i << _TABLE_SHIFT) for i, t in enumerate(tables)])
    extrema = np.concatenate([columns.extrema, columns.channel_extrema.extrema])
    head = (
        VERSION,
        columns.largest_values.limit + 1,
        columns.values.limit + 1,
        len(columns.grouped.groupings),
    )
    rows = np.stack(
        [
            np.diff(columns.largest_values.offsets),
            columns.values.overflowed.astype(np.int64),
            columns.channel_extrema.sizes + 1,
            columns.channel_extrema.axes + _AXIS_ORIGIN,
        ],
        axis=1,
    )
    return {
        "key": _steps(keys),
        "count": np.concatenate([table.counts for table in tables]),
        # Adding zero turns -0 into +0, so that bits agree whenever values do.
        "extrema": extrema + np.float32(0),
        "largest": largest.values_of(columns.largest_values.keys),
        "layout": np.concatenate([np.array([head], np.int64), rows]),
        "grouping": np.array(
            [_grouping_row(grouping) for grouping in columns.grouped.groupings], np.int64
        ).reshape(-1, 6),
    }


def _steps(keys: NDArray[np.int64]) -> NDArray[np.int64]:
    """What `numpy.cumsum` makes the keys of."""
    steps = keys.copy()
    np.subtract(keys[1:], keys[:-1], out=steps[1:])
    return steps


def unpack(n_tensors: int, arrays: Mapping[str, NDArray[Any]]) -> Columns:
    """From `pack`. Raises `ValueError` when the arrays do not fit each other or ``n_tensors``."""
    _check_arrays(arrays)
    layout = arrays["layout"]
    if layout.shape != (n_tensors + 1, 4) or layout.min() < 0:
        raise ValueError(f"layout {layout.shape} of {n_tensors} tensors is broken")
    version, n_largest, n_values, n_groupings = (int(word) for word in layout[0])
    if version != VERSION:
        raise ValueError(f"format version {version}, expected {VERSION}")
    rows = layout[1:]
    groupings = tuple(_grouping_of(row) for row in arrays["grouping"].tolist())
    tables = _tables(arrays["key"], arrays["count"], (n_tensors, n_tensors, n_groupings))
    kept = arrays["largest"]
    if len(groupings) != n_groupings or np.isnan(kept).any() or np.isnan(arrays["extrema"]).any():
        raise ValueError("the arrays are incomplete")
    offsets = np.concatenate([np.zeros(1, np.int64), np.cumsum(rows[:, 0])])
    return Columns(
        histograms=tables[0],
        extrema=arrays["extrema"][:n_tensors],
        largest_values=LargestColumns(
            limit=n_largest - 1, keys=largest.keys_of(kept), offsets=offsets
        ),
        values=ValueColumns(
            limit=n_values - 1, entries=tables[1], overflowed=rows[:, 1].astype(np.bool_)
        ),
        channel_extrema=ChannelColumns(
            axes=rows[:, 3] - _AXIS_ORIGIN,
            sizes=rows[:, 2] - 1,
            extrema=arrays["extrema"][n_tensors:],
        ),
        grouped=GroupColumns(groupings=groupings, entries=tables[2]),
    )


def _check_arrays(arrays: Mapping[str, NDArray[Any]]) -> None:
    if set(arrays) != set(_DTYPES):
        raise ValueError(f"arrays {sorted(arrays)}, expected {sorted(_DTYPES)}")
    for name, dtype in _DTYPES.items():
        if arrays[name].dtype != dtype:
            raise ValueError(f"array {name} of {arrays[name].dtype}, expected {np.dtype(dtype)}")
    shapes = {name: array.shape for name, array in arrays.items()}
    flat = all(len(shapes[name]) == 1 for name in ("key", "count", "largest"))
    wide = (shapes["extrema"][1:], shapes["layout"][1:], shapes["grouping"][1:])
    if not flat or wide != ((2,), (4,), (6,)) or shapes["key"] != shapes["count"]:
        raise ValueError(f"arrays of shapes {shapes} do not fit together")


def _tables(
    steps: NDArray[np.int64], counts: NDArray[np.uint64], n_rows: tuple[int, int, int]
) -> list[Entries]:
    keys = np.empty_like(steps)
    if not ascend(steps, keys):
        raise ValueError("keys do not ascend")
    if not all_counted(counts):
        raise ValueError("a count is missing")
    edges = np.searchsorted(keys, np.arange(4, dtype=np.int64) << _TABLE_SHIFT)
    if edges[3] != keys.size:
        raise ValueError("keys of no table")
    tables = []
    for i, (rows, shift) in enumerate(zip(n_rows, (16, 32, 40), strict=True)):
        part = slice(int(edges[i]), int(edges[i + 1]))
        own = keys[part] - (i << _TABLE_SHIFT) if i else keys[part]
        if own.size and own[-1] >> shift >= rows:
            raise ValueError("counts of rows that do not exist")
        tables.append(Entries(keys=own, counts=counts[part]))
    return tables


def _grouping_row(grouping: Grouping) -> tuple[int, ...]:
    return (
        grouping.row,
        grouping.axis + _AXIS_ORIGIN,
        grouping.group_count or 0,
        grouping.group_size or 0,
        grouping.mantissa_bits,
        grouping.n_channels + 1,
    )


def _grouping_of(row: list[int]) -> Grouping:
    if min(row) < 0:
        raise ValueError("a grouping is missing")
    return Grouping(
        row=row[0],
        axis=row[1] - _AXIS_ORIGIN,
        group_count=row[2] or None,
        group_size=row[3] or None,
        mantissa_bits=row[4],
        n_channels=row[5] - 1,
    )
