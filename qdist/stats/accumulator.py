"""Gathers the statistics of many tensors, micro-batch by micro-batch.

A tensor is counted by value for as long as its distinct values fit a table; its histogram and its
largest values then follow from the table. The first value too many spills the table into the
paged counters, and from there on the tensor is counted by bin.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
from numpy.typing import NDArray

from qdist.stats import sweep
from qdist.stats.channels import NO_AXIS, UNSEEN, VARIED, ChannelColumns
from qdist.stats.counters import ROW_SLOTS, PagedCounters
from qdist.stats.entries import Entries
from qdist.stats.group_counts import GroupCounts
from qdist.stats.lanes import LaneExtrema
from qdist.stats.largest import FIRST_SPECIAL, LargestColumns
from qdist.stats.record import ROW_SHIFT, CalibrationRecord
from qdist.stats.spec import StatisticsSpec
from qdist.stats.value_counts import ValueCounts
from qdist.stats.values import ValueColumns

_LEAST_SPARE = 256
"""Candidates that gather beside the largest values before the least of them are dropped."""
_FEW_LANES = 64
"""Fewer lanes are repeated until there are so many: lane ``i`` is then of channel ``i % n``."""
_SHORT_RUN = 32
"""Shorter runs of one channel are treated as lanes."""
_ALL = np.zeros(0, np.bool_)
_NO_KEYS = np.zeros(0, np.int32)

_Ready = tuple[NDArray[np.int64], NDArray[np.int64], list[tuple[int, NDArray[Any]]]]
"""Arguments of `Accumulator._add_like`."""


class Accumulator:
    """Statistics of ``tensors``, in their order. One thread at a time.

    ``channel_axes``: the channel axis (negative from the end) of the tensors whose extrema are
    wanted per channel. Memory depends on the tensors' contents, at some 50 kB each for typical
    ones, and never on how much was added.
    """

    def __init__(
        self,
        tensors: Iterable[str],
        spec: StatisticsSpec | None = None,
        channel_axes: Mapping[str, int] | None = None,
    ) -> None:
        self._tensors = tuple(tensors)
        self._spec = spec or StatisticsSpec()
        n, axes = len(self._tensors), channel_axes or {}
        self._axes = [axes.get(tensor, NO_AXIS) for tensor in self._tensors]
        self._counters = PagedCounters(n)
        self._scratch = sweep.new_scratch()
        self._clean = np.empty(sweep.BLOCK, np.uint32)
        # Memory that is never written to is never taken.
        limit = self._spec.n_largest
        width = limit + max(limit, _LEAST_SPARE) if limit else 0
        self._tops = np.empty((n, width), np.uint32)
        self._values = ValueCounts(n, self._spec.n_values)
        self._groups = GroupCounts(self._spec.requests_for(self._tensors))
        self._lanes = LaneExtrema(n)
        # How a tensor of the shape that was seen last is swept, where that is all there is to do.
        self._shapes: list[tuple[int, ...] | None] = [None] * n
        self._layouts = np.zeros((n, sweep.N_LAYOUT), np.int64)
        # Of the tensors of one source: rows and addresses of those of such shapes; the others.
        self._ready: WeakKeyDictionary[object, _Ready] = WeakKeyDictionary()
        self.reset()

    def reset(self) -> None:
        """Forget all that was added."""
        n = len(self._tensors)
        self._n_samples = 0
        self._counters.clear()
        self._values.clear()
        self._groups.clear()
        self._state = sweep.new_state(n)
        self._sizes = [UNSEEN] * n
        self._lanes.clear()
        self._shapes = [None] * n
        self._ready.clear()

    def add_samples(self, n: int) -> None:
        """Say that ``n`` more samples were measured."""
        self._n_samples += n

    def n_nan(self, index: int) -> int:
        """How many NaNs were counted in a tensor."""
        return int(self._state[index, sweep.NAN])

    @property
    def has_nan(self) -> bool:
        """Whether a NaN was counted in any tensor."""
        return bool(self._state[:, sweep.NAN].any())

    @property
    def n_bytes(self) -> int:
        """Bytes of the counters in use, those of groups included."""
        return self._counters.n_bytes + self._groups.n_bytes

    def add(self, index: int, array: NDArray[Any], keep: NDArray[np.bool_] | None = None) -> None:
        """Count a tensor: ``index`` is its place among the tensors.

        ``array``: any shape, any float type, taken as float32. ``keep``: bool, broadcastable to
        the array's shape; elements that it leaves out count nowhere, and a channel of which none
        is left has no extrema. Raises `ValueError` when ``keep`` does not broadcast.
        """
        values = np.ascontiguousarray(array, np.float32).reshape(array.shape)
        if not values.size:
            return
        n_channels = self._n_channels(index, values.shape)
        if keep is None:
            bits, inner = sweep.bits_of(values), self._inner(index, values.shape)
            self._add_bits(index, bits, n_channels, inner)
            self._groups.add(index, bits, values.shape, _ALL)
            self._settle(index, values.shape, n_channels, inner)
        else:
            self._add_kept(index, values, np.asarray(keep, np.bool_), n_channels)

    def add_again(self, source: object) -> bool:
        """As the last `add_all` from this ``source``; False, and nothing is added, where there was
        none or the shapes of its tensors are not the last ones any more."""
        ready = self._ready.get(source)
        if ready is None:
            return False
        self._add_like(*ready)
        return True

    def add_all(
        self,
        indices: Sequence[int],
        arrays: Sequence[NDArray[Any]],
        source: object | None = None,
    ) -> None:
        """As `add` for each index and its tensor, but in one compiled call for all those of which
        the like was counted before: a call takes as long as some 20,000 elements do.

        ``source``: what stands for these very arrays, and keeps them alive (`add_again`).
        """
        alike: list[int] = []
        places: list[int] = []
        others: list[tuple[int, NDArray[Any]]] = []
        for index, array in zip(indices, arrays, strict=True):
            is_plain = array.dtype == np.float32 and array.flags.carray
            if is_plain and self._shapes[index] == array.shape:
                alike.append(index)
                places.append(array.__array_interface__["data"][0])
            else:
                others.append((index, array))
        ready = np.array(alike, np.int64), np.array(places, np.int64), others
        if source is not None:
            self._ready[source] = ready
        self._add_like(*ready)

    def _add_like(
        self,
        rows: NDArray[np.int64],
        addresses: NDArray[np.int64],
        others: Sequence[tuple[int, NDArray[Any]]],
    ) -> None:
        """Count tensors at addresses, of which the like was counted before, and others."""
        for index, array in others:
            self.add(index, array)
        counters, done = self._counters, 0
        while done < rows.size:
            counters.reserve(max(2, min(rows.size - done, 8)) * ROW_SLOTS)
            done = sweep.sweep_many(
                addresses,
                rows,
                done,
                self._layouts,
                self._lanes.starts,
                self._lanes.low,
                self._lanes.high,
                *self._gathered(),
            )

    def _settle(self, index: int, shape: tuple[int, ...], n_channels: int, inner: int) -> None:
        """Note how the next tensor of this shape is to be swept."""
        is_open = self._values.is_open(index) or self._groups.wants(index)
        is_short = n_channels != VARIED and 1 < inner < _SHORT_RUN
        known = None if is_open or is_short else shape
        if self._shapes[index] != known:
            self._shapes[index] = known
            self._ready.clear()
        if known is not None:
            self._layouts[index] = (math.prod(shape), *self._layout(index, n_channels, inner))

    def _add_bits(self, index: int, bits: NDArray[np.uint32], n_channels: int, inner: int) -> None:
        """Count flat values of which ``inner`` side by side are of one channel."""
        lows, highs = self._lanes.of(index)
        if n_channels == VARIED or not bits.size:
            self._sweep(index, bits, sweep.NO_CHANNELS, 1, _NO_KEYS, _NO_KEYS)
        elif not 1 < inner < _SHORT_RUN:
            layout, inner, n = self._layout(index, n_channels, inner)
            self._sweep(index, bits, layout, inner, lows[:n], highs[:n])
        else:
            lanes = -(-_FEW_LANES // (n_channels * inner)), n_channels, inner
            low = np.full(math.prod(lanes), sweep.NO_LOW, np.int32)
            high = np.full(math.prod(lanes), sweep.NO_HIGH, np.int32)
            self._sweep(index, bits, sweep.LANES, 1, low, high)
            low, high = low.reshape(lanes).min(axis=(0, 2)), high.reshape(lanes).max(axis=(0, 2))
            np.minimum(lows[:n_channels], low, out=lows[:n_channels])
            np.maximum(highs[:n_channels], high, out=highs[:n_channels])

    def _add_kept(
        self, index: int, values: NDArray[np.float32], keep: NDArray[np.bool_], n_channels: int
    ) -> None:
        shape = values.shape
        chosen = np.broadcast_to(keep, shape)
        mine = (1,) * (len(shape) - keep.ndim) + keep.shape
        last = len(shape)
        while last and mine[last - 1] == 1:
            last -= 1
        # The mask is constant in each stretch along the axes from ``last`` on.
        stretches = values.reshape(-1, math.prod(shape[last:]))
        which = np.broadcast_to(keep.reshape(mine[:last]), shape[:last]).reshape(-1)
        bits = sweep.bits_of(stretches[which])
        inner = self._inner(index, shape)
        whole_stretches = n_channels == VARIED or self._axes[index] % len(shape) >= last
        self._add_bits(index, bits, n_channels if whole_stretches else VARIED, inner)
        if whole_stretches and not self._groups.wants(index):
            return
        flat, everything = np.ascontiguousarray(chosen).reshape(-1), sweep.bits_of(values)
        if not whole_stretches:
            lows, highs = self._lanes.of(index)
            sweep.widen_kept(everything, flat, inner, lows[:n_channels], highs[:n_channels])
        self._groups.add(index, everything, shape, flat)

    def _inner(self, index: int, shape: tuple[int, ...]) -> int:
        """Elements side by side that are of one channel."""
        return math.prod(shape[self._axes[index] % len(shape) + 1 :]) if shape else 1

    def _sweep(
        self,
        index: int,
        bits: NDArray[np.uint32],
        layout: int,
        inner: int,
        lows: NDArray[np.int32],
        highs: NDArray[np.int32],
    ) -> None:
        counters = self._counters
        counters.reserve(2 * ROW_SLOTS)
        first = self._values.add(index, bits)
        if first < bits.size:
            self._values.spill(index, self._state, self._tops, self._spec.n_largest, counters)
        if layout == sweep.LANES and first == 0 and sweep.is_rows(bits.size, lows.size):
            sweep.sweep_rows(bits, lows, highs, index, *self._gathered())
        else:
            sweep.sweep(bits, first, layout, inner, lows, highs, index, *self._gathered())

    def _gathered(self) -> tuple[Any, ...]:
        """What loops gather into, and work with: the same for all tensors."""
        counters = self._counters
        return (
            self._state,
            self._tops,
            self._spec.n_largest,
            counters.page_of,
            counters.pool,
            counters.used,
            self._scratch,
            self._clean,
        )

    def _layout(self, index: int, n_channels: int, inner: int) -> tuple[int, int, int]:
        """How a tensor whose runs of one channel are not short is swept: layout, ``inner``, and how
        many lanes or channels."""
        if n_channels == VARIED:
            return sweep.NO_CHANNELS, 1, 0
        if inner == 1:
            return sweep.LANES, 1, self._lanes.size(index)
        return sweep.RUNS, inner, n_channels

    def _n_channels(self, index: int, shape: tuple[int, ...]) -> int:
        """Channels of this tensor, whose extrema there is then room for; or `VARIED`."""
        axis, known = self._axes[index], self._sizes[index]
        if axis == NO_AXIS or known == VARIED:
            return VARIED
        n = shape[axis] if -len(shape) <= axis < len(shape) else VARIED
        if known == n:
            return n
        self._sizes[index] = n = n if known == UNSEEN else VARIED
        # Tensors of the shape that was seen last have other lanes now.
        self._shapes[index] = None
        self._ready.clear()
        self._lanes.make(index, n * -(-_FEW_LANES // n) if n > 0 else 0)
        return n

    def record(self) -> CalibrationRecord:
        """All that was added so far, as a value of its own."""
        n, spec = len(self._tensors), self._spec
        counted = self._counters.entries(0, n * ROW_SLOTS)
        values = self._values.columns()
        return CalibrationRecord(
            tensors=self._tensors,
            histograms=counted.merge(_histograms_of(values)),
            extrema=_extrema_of(self._state[:, sweep.LOW], self._state[:, sweep.HIGH]),
            n_samples=self._n_samples,
            largest_values=LargestColumns.of(
                [self._largest(row, values) for row in range(n)], spec.n_largest
            ),
            values=values,
            channel_extrema=self._channel_columns(),
            grouped=self._groups.columns(),
        )

    def _largest(self, row: int, values: ValueColumns) -> NDArray[np.uint32]:
        limit = self._spec.n_largest
        if self._values.is_open(row):
            return _largest_of(values.entries.row(row, 32), limit)
        keys = np.sort(self._tops[row, : self._state[row, sweep.KEPT]])
        return keys[::-1][:limit]

    def _channel_columns(self) -> ChannelColumns:
        lows, highs = [np.zeros(0, np.int32)], [np.zeros(0, np.int32)]
        for row, size in enumerate(self._sizes):
            if size > 0:
                low, high = self._lanes.of(row)
                lows.append(low.reshape(-1, size).min(axis=0))
                highs.append(high.reshape(-1, size).max(axis=0))
        extrema = _extrema_of(np.concatenate(lows), np.concatenate(highs))
        axes, sizes = np.array(self._axes, np.int64), np.array(self._sizes, np.int64)
        return ChannelColumns(axes=axes, sizes=sizes, extrema=extrema)


def _extrema_of(lows: NDArray[Any], highs: NDArray[Any]) -> NDArray[np.float32]:
    """float32[n, 2] of extreme order keys."""
    low = sweep.floats_of(lows.astype(np.int64), np.inf)
    return np.stack([low, sweep.floats_of(highs.astype(np.int64), -np.inf)], axis=1)


def _histograms_of(values: ValueColumns) -> Entries:
    """The histograms of the rows that are counted by value."""
    if not values.entries.keys.size:
        return Entries.empty()
    bins = values.entries.keys >> (32 - ROW_SHIFT)
    first = np.flatnonzero(np.append(True, bins[1:] != bins[:-1]))
    return Entries(keys=bins[first], counts=np.add.reduceat(values.entries.counts, first))


def _largest_of(table: Entries, limit: int) -> NDArray[np.uint32]:
    """Keys of the largest |x| of a value table."""
    bits = table.keys.astype(np.uint32)
    keys = (bits << np.uint32(1)) | (bits >> np.uint32(31))
    order = np.argsort(keys)[::-1]
    order = order[keys[order] < FIRST_SPECIAL]
    counts = np.minimum(table.counts[order], np.uint64(limit)).astype(np.int64)
    return np.repeat(keys[order], counts)[:limit]
