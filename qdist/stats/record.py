"""Statistics of many tensors as one mergeable value.

Laws (tested in ``tests/laws``): merging is associative and commutative, `CalibrationRecord.empty`
is its identity, the record of a concatenation is the merge of the records, and a record measured
at once is the join of records of its columns. Equal statistics have equal digests, however they
were put together.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from qdist.digest import canonical_json, digest_arrays, digest_bytes
from qdist.stats import channels, entries, grid, groups, largest, layout, values
from qdist.stats.channels import NO_AXIS, ChannelColumns, Channels
from qdist.stats.entries import Entries
from qdist.stats.groups import GroupColumns, GroupHistograms
from qdist.stats.histogram import Exact, Histogram
from qdist.stats.largest import LargestColumns
from qdist.stats.layout import Columns
from qdist.stats.values import ValueColumns, ValueTable

ROW_SHIFT = 16
IDENTITY = -1
"""Limit of the columns of the identity, which merges with any others."""


@dataclass(frozen=True, kw_only=True)
class CalibrationRecord:
    """Statistics of ``n`` tensors over some samples.

    ``tensors``: names of the rows. ``histograms``: keys ``row << 16 | bin``. ``extrema``
    float32[n, 2]: exact finite minimum and maximum (``[inf, -inf]`` for a row without finite
    values). ``n_samples``: samples measured. The other columns: see their classes.
    """

    tensors: tuple[str, ...]
    histograms: Entries
    extrema: NDArray[np.float32]
    n_samples: int
    largest_values: LargestColumns
    values: ValueColumns
    channel_extrema: ChannelColumns
    grouped: GroupColumns
    _rows: dict[str, int] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        n = len(self.tensors)
        found = (
            self.extrema.shape,
            self.largest_values.offsets.shape,
            self.values.overflowed.shape,
            self.channel_extrema.sizes.shape,
        )
        if found != ((n, 2), (n + 1,), (n,), (n,)):
            raise ValueError(f"{n} tensors and columns of shapes {found} do not fit together")
        object.__setattr__(self, "_rows", {name: i for i, name in enumerate(self.tensors)})

    @classmethod
    def empty(cls, tensors: Iterable[str]) -> CalibrationRecord:
        """The record of no samples: the identity of `merge`, whatever the other gathered."""
        names = tuple(tensors)
        n = len(names)
        return cls(
            tensors=names,
            histograms=Entries.empty(),
            extrema=np.tile(np.array([np.inf, -np.inf], np.float32), (n, 1)),
            n_samples=0,
            largest_values=LargestColumns.empty(n, IDENTITY),
            values=ValueColumns.empty(n, IDENTITY),
            channel_extrema=ChannelColumns.empty(np.full(n, NO_AXIS, np.int64)),
            grouped=GroupColumns.empty(),
        )

    @classmethod
    def from_dense(
        cls,
        tensors: Iterable[str],
        tables: Iterable[NDArray[np.uint64]],
        extrema: NDArray[np.float32],
        n_samples: int,
    ) -> CalibrationRecord:
        """Histograms and extrema alone: one ``uint64[65536]`` table per tensor, in their order."""
        names = tuple(tensors)
        n = len(names)
        keys, counts = [np.zeros(0, np.int64)], [np.zeros(0, np.uint64)]
        for row, table in enumerate(tables):
            hit = np.flatnonzero(table)
            keys.append(hit.astype(np.int64) + (row << ROW_SHIFT))
            counts.append(table[hit])
        return cls(
            tensors=names,
            histograms=Entries(keys=np.concatenate(keys), counts=np.concatenate(counts)),
            extrema=extrema.astype(np.float32, copy=True),
            n_samples=n_samples,
            largest_values=LargestColumns.empty(n, 0),
            values=ValueColumns.empty(n, 0),
            channel_extrema=ChannelColumns.empty(np.full(n, NO_AXIS, np.int64)),
            grouped=GroupColumns.empty(),
        )

    @property
    def is_identity(self) -> bool:
        """Whether this is what `empty` makes."""
        return self.largest_values.limit == IDENTITY

    def merge(self, other: CalibrationRecord) -> CalibrationRecord:
        """The record of both sets of samples.

        Raises `ValueError` for other tensors, or where other statistics were gathered of them.
        """
        if self.tensors != other.tensors:
            raise ValueError("records of different tensors do not merge")
        if self.is_identity:
            return other
        if other.is_identity:
            return self
        return CalibrationRecord(
            tensors=self.tensors,
            histograms=self.histograms.merge(other.histograms),
            extrema=channels.wider(self.extrema, other.extrema),
            n_samples=self.n_samples + other.n_samples,
            largest_values=self.largest_values.merge(other.largest_values),
            values=self.values.merge(other.values),
            channel_extrema=self.channel_extrema.merge(other.channel_extrema),
            grouped=self.grouped.merge(other.grouped),
        )

    def select(self, tensors: Iterable[str]) -> CalibrationRecord:
        """Some of the tensors, in the order given. Raises `KeyError` for one that is not a row."""
        names = tuple(tensors)
        rows = [self._rows[name] for name in names]
        return CalibrationRecord(
            tensors=names,
            histograms=self.histograms.take(rows, len(self.tensors), ROW_SHIFT),
            extrema=self.extrema[np.asarray(rows, np.intp)],
            n_samples=self.n_samples,
            largest_values=self.largest_values.take(rows),
            values=self.values.take(rows),
            channel_extrema=self.channel_extrema.take(rows),
            grouped=self.grouped.take(rows),
        )

    @classmethod
    def join(
        cls, records: Iterable[CalibrationRecord], tensors: Iterable[str]
    ) -> CalibrationRecord:
        """``tensors``, in that order, each from the first of the records that has it.

        The records are of the same samples. Raises `ValueError` where their numbers of samples or
        their limits differ, or there is no record; `KeyError` for a tensor that none has.
        """
        parts, wanted = list(records), tuple(tensors)
        if not parts:
            raise ValueError("no records to join")
        if len({part.n_samples for part in parts}) != 1:
            raise ValueError("records of different numbers of samples do not join")
        row_of: dict[str, int] = {}
        first = 0
        for part in parts:
            for row, name in enumerate(part.tensors):
                row_of.setdefault(name, first + row)
            first += len(part.tensors)
        rows = [row_of[name] for name in wanted]
        n_rows = [len(part.tensors) for part in parts]
        sparse = ((part.histograms, n) for part, n in zip(parts, n_rows, strict=True))
        grouped = ((part.grouped, n) for part, n in zip(parts, n_rows, strict=True))
        return cls(
            tensors=wanted,
            histograms=entries.stacked(sparse, ROW_SHIFT).take(rows, first, ROW_SHIFT),
            extrema=np.concatenate([part.extrema for part in parts])[np.asarray(rows, np.intp)],
            n_samples=parts[0].n_samples,
            largest_values=largest.stacked([part.largest_values for part in parts]).take(rows),
            values=values.stacked([part.values for part in parts]).take(rows),
            channel_extrema=channels.stacked([part.channel_extrema for part in parts]).take(rows),
            grouped=groups.stacked(grouped).take(rows),
        )

    def __contains__(self, tensor: object) -> bool:
        return tensor in self._rows

    def histogram(self, tensor: str) -> Histogram:
        """The histogram of one row. Raises `KeyError` for a tensor that is not a row."""
        row = self._rows[tensor]
        found = self.histograms.row(row, ROW_SHIFT)
        table = self.values.row(row)
        if table is not None and table.values.size:
            exact = Exact.of_table(table.values, table.counts)
        else:
            exact = Exact.of_largest(self.largest(tensor), self.largest_values.limit)
        return Histogram(
            bins=found.keys.astype(np.uint16),
            counts=found.counts,
            minimum=float(self.extrema[row, 0]),
            maximum=float(self.extrema[row, 1]),
            exact=exact,
        )

    @cached_property
    def specials(self) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """How many NaNs, and how many infinities, every row counted: int64[n] each."""
        bins = (self.histograms.keys & ((1 << ROW_SHIFT) - 1)).astype(np.uint16)
        found = []
        for held in (grid.is_nan_bin(bins), grid.is_infinite_bin(bins)):
            rows = (self.histograms.keys[held] >> ROW_SHIFT).astype(np.int64)
            counts = np.zeros(len(self.tensors), np.int64)
            np.add.at(counts, rows, self.histograms.counts[held].astype(np.int64))
            found.append(counts)
        return found[0], found[1]

    def largest(self, tensor: str) -> NDArray[np.float32]:
        """The finite values of largest magnitude, signs kept, repeated ones repeated.

        float32[at most n_largest], by descending magnitude, of two equal ones the negative first.
        """
        return largest.values_of(self.largest_values.row(self._rows[tensor]))

    def value_table(self, tensor: str) -> ValueTable | None:
        """Every distinct value with its count; None when there were too many."""
        return self.values.row(self._rows[tensor])

    def channels(self, tensor: str) -> Channels | None:
        """Extrema per channel; None when not gathered, never seen, or the axis size varied."""
        row = self._rows[tensor]
        if self.channel_extrema.sizes[row] <= 0:
            return None
        found = self.channel_extrema.row(row)
        return Channels(minimum=found[:, 0], maximum=found[:, 1])

    def channel_axis(self, tensor: str) -> int | None:
        """The axis that `channels` counts, as asked for; None where none was."""
        axis = int(self.channel_extrema.axes[self._rows[tensor]])
        return None if axis == NO_AXIS else axis

    def groups(self, tensor: str) -> tuple[GroupHistograms, ...]:
        """Group histograms, one set for each request that the tensor matched."""
        return self.grouped.row(self._rows[tensor])

    def arrays(self) -> dict[str, NDArray[Any]]:
        """What a store writes: the six arrays of `qdist.stats.layout`."""
        return dict(self._packed)

    @cached_property
    def _packed(self) -> dict[str, NDArray[Any]]:
        # A record that is kept is packed for its digest first, and then to be written.
        return layout.pack(
            Columns(
                histograms=self.histograms,
                extrema=self.extrema,
                largest_values=self.largest_values,
                values=self.values,
                channel_extrema=self.channel_extrema,
                grouped=self.grouped,
            )
        )

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "_packed"}

    @classmethod
    def from_arrays(
        cls, tensors: Iterable[str], n_samples: int, arrays: Mapping[str, NDArray[Any]]
    ) -> CalibrationRecord:
        """From `arrays`. Raises `ValueError` when they are not a record of these tensors."""
        names = tuple(tensors)
        columns = layout.unpack(len(names), arrays)
        return cls(
            tensors=names,
            histograms=columns.histograms,
            extrema=columns.extrema,
            n_samples=n_samples,
            largest_values=columns.largest_values,
            values=columns.values,
            channel_extrema=columns.channel_extrema,
            grouped=columns.grouped,
        )

    def known_as(self, digest: str, encoded: Mapping[str, bytes]) -> Self:
        """This record, of which the digest is known and how a store encodes it: read from bytes
        that a checksum vouches for. Finding these out takes longer than reading does."""
        vars(self).update(digest=digest, encoded=encoded)
        return self

    @cached_property
    def encoded(self) -> Mapping[str, bytes]:
        """The arrays as the store has them that this was read from; empty for any other record."""
        return {}

    @cached_property
    def digest(self) -> str:
        """Hex SHA-256 over names, samples and all statistics: equal records, equal digest."""
        return digest_bytes(
            canonical_json(list(self.tensors)).encode(),
            str((grid.VERSION, self.n_samples)).encode(),
            digest_arrays(self.arrays().items()).encode(),
        )
