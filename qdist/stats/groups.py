"""Histograms per channel or group of channels, for the rows that a `GroupRequest` asks for."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from qdist.stats import entries as sparse
from qdist.stats import grid
from qdist.stats.channels import UNSEEN, VARIED
from qdist.stats.counters import PAGE_BINS
from qdist.stats.entries import Entries
from qdist.stats.spec import GroupRequest, StatisticsSpec

GROUP_SHIFT = 16
GROUPING_SHIFT = 40
MAX_CHANNELS = 1 << (GROUPING_SHIFT - GROUP_SHIFT)


@dataclass(frozen=True, slots=True, kw_only=True)
class Grouping:
    """How one row is grouped. ``n_channels``: size of the axis, `UNSEEN` or `VARIED`.

    The other fields are those of the `GroupRequest`.
    """

    row: int
    axis: int
    group_count: int | None
    group_size: int | None
    mantissa_bits: int
    n_channels: int = UNSEEN

    @classmethod
    def of(cls, row: int, wanted: GroupRequest) -> Grouping:
        """A request's, for a row that it matches."""
        return cls(
            row=row,
            axis=wanted.axis,
            group_count=wanted.group_count,
            group_size=wanted.group_size,
            mantissa_bits=wanted.mantissa_bits,
        )

    @property
    def request(self) -> GroupRequest:
        """What was asked for, for any tensor."""
        return GroupRequest(
            match="*",
            axis=self.axis,
            group_count=self.group_count,
            group_size=self.group_size,
            mantissa_bits=self.mantissa_bits,
        )

    def merge(self, other: Grouping) -> Grouping:
        """With the sizes of the axis combined. Raises `ValueError` for another grouping."""
        if replace(self, n_channels=0) != replace(other, n_channels=0):
            raise ValueError("records with different group histograms do not merge")
        if self.n_channels == UNSEEN or self.n_channels == other.n_channels:
            return other
        return self if other.n_channels == UNSEEN else replace(self, n_channels=VARIED)


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupHistograms:
    """The histograms of one tensor's groups. ``axis``: as asked for.

    ``n_channels``: size of the axis; None when it varied, and then there are no counts.
    ``group_size``: channels to a group. ``keys`` int64[m]: ``group << 16 | bin``, on the grid of
    ``mantissa_bits``; ``counts`` uint64[m] > 0.
    """

    axis: int
    n_channels: int | None
    group_size: int
    mantissa_bits: int
    keys: NDArray[np.int64]
    counts: NDArray[np.uint64]

    @property
    def n_groups(self) -> int:
        """How many groups there are; 0 when the axis varied or was never seen."""
        return -(-self.n_channels // self.group_size) if self.n_channels else 0

    def group(self, index: int) -> tuple[NDArray[np.uint16], NDArray[np.uint64]]:
        """Bins (ascending, on the grid of ``mantissa_bits``) and counts of one group."""
        if not 0 <= index < self.n_groups:
            raise IndexError(f"group {index} of {self.n_groups}")
        edges = np.array([index, index + 1], np.int64) << GROUP_SHIFT
        first, last = np.searchsorted(self.keys, edges)
        bins = (self.keys[first:last] & 0xFFFF).astype(np.uint16)
        return bins, self.counts[first:last]


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupColumns:
    """``groupings`` by row; ``entries``: keys ``grouping << 40 | group << 16 | bin``."""

    groupings: tuple[Grouping, ...]
    entries: Entries

    def __post_init__(self) -> None:
        rows = [grouping.row for grouping in self.groupings]
        if rows != sorted(rows):
            raise ValueError("groupings are not in the order of their rows")

    @classmethod
    def empty(cls, groupings: tuple[Grouping, ...] = ()) -> GroupColumns:
        """Of which nothing was seen."""
        return cls(groupings=groupings, entries=Entries.empty())

    def row(self, row: int) -> tuple[GroupHistograms, ...]:
        """The group histograms of one row, one for each request that it matched."""
        return tuple(
            self._histograms(index)
            for index, grouping in enumerate(self.groupings)
            if grouping.row == row
        )

    def _histograms(self, index: int) -> GroupHistograms:
        grouping = self.groupings[index]
        found = self.entries.row(index, GROUPING_SHIFT)
        n_channels = grouping.n_channels
        return GroupHistograms(
            axis=grouping.axis,
            n_channels=None if n_channels == VARIED else n_channels,
            group_size=grouping.request.size_for(max(n_channels, 1)),
            mantissa_bits=grouping.mantissa_bits,
            keys=found.keys,
            counts=found.counts,
        )

    def merge(self, other: GroupColumns) -> GroupColumns:
        """Counts added; a grouping whose axis varied loses its counts for good."""
        if len(self.groupings) != len(other.groupings):
            raise ValueError("records with different group histograms do not merge")
        pairs = zip(self.groupings, other.groupings, strict=True)
        groupings = tuple(one.merge(two) for one, two in pairs)
        entries = self.entries.merge(other.entries)
        varied = np.array([grouping.n_channels == VARIED for grouping in groupings], np.bool_)
        return GroupColumns(groupings=groupings, entries=entries.keep_rows(~varied, GROUPING_SHIFT))

    def take(self, rows: Sequence[int]) -> GroupColumns:
        """Those of some rows, in the order given, the rows numbered anew."""
        of_row: dict[int, list[int]] = {}
        for index, grouping in enumerate(self.groupings):
            of_row.setdefault(grouping.row, []).append(index)
        picked = [(new, index) for new, old in enumerate(rows) for index in of_row.get(old, ())]
        entries = self.entries.take(
            [index for _, index in picked], len(self.groupings), GROUPING_SHIFT
        )
        groupings = tuple(replace(self.groupings[index], row=new) for new, index in picked)
        return GroupColumns(groupings=groupings, entries=entries)


def stacked(parts: Iterable[tuple[GroupColumns, int]]) -> GroupColumns:
    """Those of several sets of rows, one after the other; each comes with its row count."""
    parts = list(parts)
    groupings: list[Grouping] = []
    first = 0
    for columns, n_rows in parts:
        groupings.extend(replace(one, row=one.row + first) for one in columns.groupings)
        first += n_rows
    sets = ((columns.entries, len(columns.groupings)) for columns, _ in parts)
    entries = sparse.stacked(sets, GROUPING_SHIFT)
    return GroupColumns(groupings=tuple(groupings), entries=entries)


def stack_groupings(groupings: tuple[Grouping, ...], parts: Sequence[Entries]) -> GroupColumns:
    """From each grouping's entries, keys ``group << 16 | bin``."""
    entries = sparse.stacked(((part, 1) for part in parts), GROUPING_SHIFT)
    return GroupColumns(groupings=groupings, entries=entries)


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupEstimate:
    """What group histograms will take. Bytes are for typical activations, and at the very most.

    ``n_groups``: histograms in all. ``memory_bytes``: of the counters of each worker.
    ``stored_bytes``: of one stored record before compression. ``most_bytes``: of the counters if
    every bin of every group were hit. ``largest``: the tensor with the greatest share, None if no
    request matches.
    """

    n_groups: int
    memory_bytes: int
    stored_bytes: int
    most_bytes: int
    largest: str | None


TYPICAL_EXPONENTS = 16
"""Powers of two, of either sign, that a group's values are taken to spread over."""


def estimate_bytes(spec: StatisticsSpec, shapes: Mapping[str, Sequence[int]]) -> GroupEstimate:
    """What the group histograms of tensors of these shapes will take.

    A tensor that lacks a request's axis takes nothing.
    """
    names = list(shapes)
    n_groups = memory = stored = most = 0
    share: dict[str, int] = {}
    for row, wanted in spec.requests_for(names):
        shape = shapes[names[row]]
        if not -len(shape) <= wanted.axis < len(shape) or not shape[wanted.axis]:
            continue
        groups = wanted.groups_for(shape[wanted.axis])
        bins = grid.n_bins(wanted.mantissa_bits)
        hit = min(bins, 2 * TYPICAL_EXPONENTS << wanted.mantissa_bits)
        # Pages are hit in part, and two words of a page table stand for each.
        counters = groups * (min(bins, 2 * hit) * 8 + bins // PAGE_BINS * 4)
        n_groups += groups
        memory += counters
        stored += groups * hit * 16
        most += groups * (bins * 8 + bins // PAGE_BINS * 4)
        share[names[row]] = share.get(names[row], 0) + counters
    largest = max(share, key=lambda name: share[name]) if share else None
    return GroupEstimate(
        n_groups=n_groups,
        memory_bytes=memory,
        stored_bytes=stored,
        most_bytes=most,
        largest=largest,
    )
