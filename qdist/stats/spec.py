"""Which statistics a calibration gathers: part of its identity."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from fnmatch import fnmatchcase
from typing import Any

from qdist.stats import grid

N_LARGEST = 1024
N_VALUES = 512


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupRequest:
    """Histograms per channel or per group of channels, for the tensors whose names match.

    ``match``: `fnmatch` pattern of tensor names, case matters. ``axis``: the channel axis, negative
    from the end. Either ``group_size`` channels in a row share a histogram (1: one per channel;
    the last group may be smaller), or the axis is split into ``group_count`` groups of one size
    (fewer where there are fewer channels). ``mantissa_bits`` 0..7: the bins are those of a float's
    top ``9 + mantissa_bits`` bits.
    """

    match: str
    axis: int
    group_count: int | None = None
    group_size: int | None = None
    mantissa_bits: int = 3

    def __post_init__(self) -> None:
        if (self.group_count is None) == (self.group_size is None):
            raise ValueError("give either group_count or group_size")
        if (self.group_count or self.group_size or 0) < 1:
            raise ValueError("group_count and group_size are at least 1")
        if not -64 <= self.axis < 64:
            raise ValueError(f"axis must lie in -64..63, got {self.axis}")
        grid.check_mantissa_bits(self.mantissa_bits)

    def matches(self, tensor: str) -> bool:
        """Whether the tensor of this name is asked for."""
        return fnmatchcase(tensor, self.match)

    def size_for(self, n_channels: int) -> int:
        """How many channels share a histogram, for an axis of ``n_channels`` > 0."""
        if self.group_size is not None:
            return self.group_size
        return -(-n_channels // (self.group_count or 1))

    def groups_for(self, n_channels: int) -> int:
        """How many groups an axis of ``n_channels`` > 0 has."""
        return -(-n_channels // self.size_for(n_channels))

    def to_json(self) -> dict[str, Any]:
        """As a JSON object."""
        return asdict(self)

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> GroupRequest:
        """From `to_json`. Raises `TypeError` on other keys."""
        return cls(**value)


@dataclass(frozen=True, slots=True, kw_only=True)
class StatisticsSpec:
    """What is gathered beside the histograms and extrema, which always are.

    ``n_largest``: how many of the largest |x| are kept exactly. ``n_values``: up to how many
    distinct values a tensor's value -> count table holds; 0 keeps none. ``groups``: histograms per
    channel or group.
    """

    n_largest: int = N_LARGEST
    n_values: int = N_VALUES
    groups: tuple[GroupRequest, ...] = ()

    def __post_init__(self) -> None:
        if not 0 <= self.n_largest <= 1 << 20:
            raise ValueError(f"n_largest must lie in 0..1048576, got {self.n_largest}")
        if not 0 <= self.n_values <= 1 << 16:
            raise ValueError(f"n_values must lie in 0..65536, got {self.n_values}")

    def requests_for(self, tensors: Iterable[str]) -> tuple[tuple[int, GroupRequest], ...]:
        """Pairs of a row and a request that it matches, by row, then in the order of requests.

        Requests that differ in their pattern alone count once.
        """
        pairs: dict[tuple[int, int, int | None, int | None, int], tuple[int, GroupRequest]] = {}
        for row, tensor in enumerate(tensors):
            for wanted in self.groups:
                if wanted.matches(tensor):
                    sizes = (wanted.axis, wanted.group_count, wanted.group_size)
                    pairs.setdefault((row, *sizes, wanted.mantissa_bits), (row, wanted))
        return tuple(pairs.values())

    def to_json(self) -> dict[str, Any]:
        """As a JSON object."""
        return {
            "n_largest": self.n_largest,
            "n_values": self.n_values,
            "groups": [wanted.to_json() for wanted in self.groups],
        }

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> StatisticsSpec:
        """From `to_json`. Raises `TypeError` on other keys, `ValueError` on bad values."""
        rest = dict(value)
        groups = tuple(GroupRequest.from_json(wanted) for wanted in rest.pop("groups", ()))
        return cls(groups=groups, **rest)
