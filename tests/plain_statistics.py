"""The statistics of tensors in plain NumPy: the definition that the compiled kernels must equal."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qdist.stats import grid
from qdist.stats.record import CalibrationRecord
from qdist.stats.spec import GroupRequest, StatisticsSpec

Batch = tuple[NDArray[np.float32], NDArray[np.bool_] | None]
"""A tensor, and which of its elements count (None: all)."""

SPECIAL_BITS = (
    *(0x00000000, 0x80000000),  # +0, -0
    *(0x00000001, 0x80000001, 0x007FFFFF, 0x807FFFFF),  # denormals
    *(0x00800000, 0x80800000),  # the smallest normal numbers
    *(0x7F7FFFFF, 0xFF7FFFFF),  # the largest numbers
    *(0x7F800000, 0xFF800000),  # infinities
    *(0x7F800001, 0xFF800001, 0x7F80FFFF, 0xFF80FFFF),  # NaNs that the top 16 bits do not show
    *(0x7FC00000, 0xFFC00000, 0x7FFFFFFF, 0x7F810000),  # other NaNs
)


def counted_plainly(values: NDArray[np.float32]) -> tuple[NDArray[np.uint64], NDArray[np.float32]]:
    """Histogram and extrema of one flat tensor."""
    bits = values.view(np.uint32)
    bins = (bits >> 16).astype(np.int64)
    nan = np.isnan(values)
    bins[nan & (bits < 0x80000000)] = 0x7FC0
    bins[nan & (bits >= 0x80000000)] = 0xFFC0
    counts = np.bincount(bins, minlength=grid.N_BINS).astype(np.uint64)
    return counts, _extrema(values)


def assert_measured(
    record: CalibrationRecord,
    batches: dict[str, list[Batch]],
    spec: StatisticsSpec,
    axes: dict[str, int],
) -> None:
    """That a record holds what plain NumPy finds in ``batches``, bit for bit."""
    for name, parts in batches.items():
        flat = [
            array.reshape(-1) if keep is None else array[_whole(keep, array)]
            for array, keep in parts
        ]
        values = np.concatenate([np.zeros(0, np.float32), *flat])
        counts, extrema = counted_plainly(values)
        histogram = record.histogram(name)
        assert np.array_equal(histogram.bins, np.flatnonzero(counts))
        assert np.array_equal(histogram.counts, counts[counts > 0])
        found = np.array([histogram.minimum, histogram.maximum], np.float32)
        assert found.tobytes() == extrema.tobytes()
        assert record.largest(name).tobytes() == _largest(values, spec.n_largest).tobytes()
        _assert_table(record, name, values, spec.n_values)
        if name in axes:
            _assert_channels(record, name, parts, axes[name])
        else:
            assert record.channels(name) is None
        wanted = [request for request in spec.groups if request.matches(name)]
        groups = record.groups(name)
        assert len(groups) == len(wanted)
        for request, group in zip(wanted, groups, strict=True):
            _assert_groups(group, parts, request)


def _whole(keep: NDArray[np.bool_], array: NDArray[Any]) -> NDArray[np.bool_]:
    return np.broadcast_to(keep, array.shape)


def _extrema(values: NDArray[np.float32]) -> NDArray[np.float32]:
    finite = values[np.isfinite(values)].astype(np.float64)
    if finite.size == 0:
        return np.array([np.inf, -np.inf], np.float32)
    return np.array([finite.min() + 0.0, finite.max() + 0.0], np.float32)


def _largest(values: NDArray[np.float32], limit: int) -> NDArray[np.float32]:
    finite = values[np.isfinite(values)]
    order = np.lexsort((~np.signbit(finite), -np.abs(finite.astype(np.float64))))
    return finite[order][:limit]


def _assert_table(
    record: CalibrationRecord, name: str, values: NDArray[np.float32], limit: int
) -> None:
    expected = Counter(
        (0xFFC00000 if bits >> 31 else 0x7FC00000) if np.isnan(value) else bits
        for bits, value in zip(values.view(np.uint32).tolist(), values, strict=True)
    )
    table = record.value_table(name)
    if limit == 0 or len(expected) > limit:
        assert table is None
        return
    assert table is not None
    found = dict(zip(table.values.view(np.uint32).tolist(), table.counts.tolist(), strict=True))
    assert found == expected
    assert list(found) == sorted(found)


def _sizes(parts: Sequence[Batch], axis: int) -> set[int | None]:
    return {
        array.shape[axis] if -array.ndim <= axis < array.ndim else None
        for array, _ in parts
        if array.size
    }


def _by_channel(parts: Sequence[Batch], axis: int, n: int) -> list[NDArray[np.float32]]:
    """What each channel's elements are, over all batches."""
    found: list[list[NDArray[np.float32]]] = [[] for _ in range(n)]
    for array, keep in parts:
        if not array.size:
            continue
        chosen = np.ones(array.shape, np.bool_) if keep is None else _whole(keep, array)
        for channel in range(n):
            part = np.take(array, channel, axis)
            found[channel].append(part[np.take(chosen, channel, axis)].reshape(-1))
    return [np.concatenate([np.zeros(0, np.float32), *channel]) for channel in found]


def _assert_channels(
    record: CalibrationRecord, name: str, parts: Sequence[Batch], axis: int
) -> None:
    sizes, channels = _sizes(parts, axis), record.channels(name)
    if len(sizes) != 1 or None in sizes:
        assert channels is None
        return
    (size,) = sizes
    assert size is not None
    assert channels is not None
    assert channels.minimum.shape == channels.maximum.shape == (size,)
    for channel, values in enumerate(_by_channel(parts, axis, size)):
        low, high = _extrema(values)
        assert channels.minimum[channel].tobytes() == low.tobytes()
        assert channels.maximum[channel].tobytes() == high.tobytes()
        finite = np.abs(values[np.isfinite(values)])
        assert channels.magnitude[channel] == (finite.max() if finite.size else 0)


def _assert_groups(group: Any, parts: Sequence[Batch], request: GroupRequest) -> None:
    sizes = _sizes(parts, request.axis)
    if not sizes:
        assert (group.n_channels, group.n_groups, group.keys.size) == (0, 0, 0)
        return
    if len(sizes) != 1 or None in sizes:
        assert (group.n_channels, group.n_groups, group.keys.size) == (None, 0, 0)
        return
    (size,) = sizes
    assert size is not None
    assert group.n_channels == size
    by_channel = _by_channel(parts, request.axis, size)
    width = request.group_size or -(-size // (request.group_count or 1))
    assert group.n_groups == -(-size // width)
    for index in range(group.n_groups):
        values = np.concatenate(by_channel[index * width : (index + 1) * width])
        fine = counted_plainly(values)[0]
        coarse = fine.reshape(-1, 1 << (7 - request.mantissa_bits)).sum(axis=1)
        bins, counts = group.group(index)
        assert np.array_equal(bins, np.flatnonzero(coarse))
        assert np.array_equal(counts, coarse[coarse > 0])
