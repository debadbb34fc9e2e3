"""Exact finite minimum and maximum of every channel of every row.

A row is *unseen* (the identity), has ``n`` channels, or has *varied* (absorbing): two sizes of the
channel axis were met, so that channels cannot be told apart by their number.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

UNSEEN = 0
VARIED = -1
NO_AXIS = -128
"""Axis of a row for which no channels are gathered."""


def combine_sizes(one: NDArray[np.int64], other: NDArray[np.int64]) -> NDArray[np.int64]:
    """The state of a union, from those of its parts: associative, commutative."""
    agreed = np.where(one == UNSEEN, other, one)
    differ = (one != other) & (one != UNSEEN) & (other != UNSEEN)
    return np.where(differ, VARIED, agreed)


@dataclass(frozen=True, slots=True, kw_only=True)
class Channels:
    """``minimum`` and ``maximum`` float32[n] of the finite values of each channel.

    ``+inf`` and ``-inf`` for a channel without finite values.
    """

    minimum: NDArray[np.float32]
    maximum: NDArray[np.float32]

    @property
    def magnitude(self) -> NDArray[np.float32]:
        """max|x| of each channel; 0 for one without finite values."""
        return np.maximum(np.maximum(-self.minimum, self.maximum), np.float32(0))


@dataclass(frozen=True, slots=True, kw_only=True)
class ChannelColumns:
    """``axes`` int64[n], as asked for; ``sizes`` int64[n]: `UNSEEN`, channels, or `VARIED`.

    ``extrema`` float32[sum of positive sizes, 2]: minimum and maximum of each channel, row by row.
    """

    axes: NDArray[np.int64]
    sizes: NDArray[np.int64]
    extrema: NDArray[np.float32]

    def __post_init__(self) -> None:
        wanted = (int(self.sizes.clip(0).sum()), 2)
        if self.extrema.shape != wanted or self.axes.shape != self.sizes.shape:
            raise ValueError(f"channel extrema {self.extrema.shape}, expected {wanted}")

    @classmethod
    def empty(cls, axes: NDArray[np.int64]) -> ChannelColumns:
        """Rows of which nothing was seen."""
        extrema = np.zeros((0, 2), np.float32)
        return cls(axes=axes, sizes=np.zeros(axes.size, np.int64), extrema=extrema)

    @classmethod
    def of(
        cls, axes: NDArray[np.int64], sizes: NDArray[np.int64], parts: Sequence[NDArray[np.float32]]
    ) -> ChannelColumns:
        """From each row's float32[size, 2]; that of an unseen or varied row is not looked at."""
        kept = [part for part, size in zip(parts, sizes, strict=True) if size > 0]
        extrema = np.concatenate([np.zeros((0, 2), np.float32), *kept])
        return cls(axes=axes, sizes=sizes, extrema=extrema)

    def row(self, row: int) -> NDArray[np.float32]:
        """float32[channels, 2] of one row; no channels when unseen or varied."""
        first = int(self.sizes[:row].clip(0).sum())
        return self.extrema[first : first + max(int(self.sizes[row]), 0)]

    def _parts(self) -> list[NDArray[np.float32]]:
        return np.split(self.extrema, np.cumsum(self.sizes.clip(0))[:-1]) if self.sizes.size else []

    def merge(self, other: ChannelColumns) -> ChannelColumns:
        """Extrema of both, channel by channel."""
        if not np.array_equal(self.axes, other.axes):
            raise ValueError("channels along different axes do not merge")
        if np.array_equal(self.sizes, other.sizes):
            extrema = wider(self.extrema, other.extrema)
            return ChannelColumns(axes=self.axes, sizes=self.sizes, extrema=extrema)
        sizes = combine_sizes(self.sizes, other.sizes)
        parts = [
            wider(one, two) if len(one) == len(two) else (one if len(one) else two)
            for one, two in zip(self._parts(), other._parts(), strict=True)
        ]
        return ChannelColumns.of(self.axes, sizes, parts)

    def take(self, rows: Sequence[int]) -> ChannelColumns:
        """Some rows, in the order given."""
        index, parts = np.asarray(rows, np.intp), self._parts()
        return ChannelColumns.of(self.axes[index], self.sizes[index], [parts[row] for row in rows])


def wider(one: NDArray[np.float32], other: NDArray[np.float32]) -> NDArray[np.float32]:
    """Pairs of minimum and maximum, float32[n, 2], that cover both."""
    both = np.empty_like(one)
    np.minimum(one[:, 0], other[:, 0], out=both[:, 0])
    np.maximum(one[:, 1], other[:, 1], out=both[:, 1])
    return both


def stacked(parts: Sequence[ChannelColumns]) -> ChannelColumns:
    """One set of rows after the other."""
    return ChannelColumns(
        axes=np.concatenate([part.axes for part in parts]),
        sizes=np.concatenate([part.sizes for part in parts]),
        extrema=np.concatenate([part.extrema for part in parts]),
    )
