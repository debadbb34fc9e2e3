"""Which scales a chip can multiply with."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

import numpy as np

LEAST_SCALE = float(np.finfo(np.float32).tiny)
"""The smallest normal float32: a smaller scale is flushed to zero on many chips."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Snapped:
    """A scale on a grid. ``value`` is exact in float32; on an ``m * 2**-n`` grid it is that of
    ``m`` and ``n``. ``is_clamped``: the scale asked for lies beyond the grid's ends."""

    value: float
    m: int | None = None
    n: int | None = None
    is_clamped: bool = False


class ScaleGrid(Protocol):
    """A set of positive scales. `snap` is idempotent and monotone."""

    @property
    def name(self) -> str:
        """As configurations and plans call it."""
        ...

    def snap(self, scale: float) -> Snapped:
        """The scale that stands in for ``scale``, which is positive."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class FloatGrid:
    """Every normal float32: the nearest one."""

    name: str = "float"

    def snap(self, scale: float) -> Snapped:
        """The nearest float32, no less than `LEAST_SCALE`."""
        value = float(np.float32(max(scale, LEAST_SCALE)))
        return Snapped(value=value, is_clamped=scale < LEAST_SCALE)


@dataclass(frozen=True, slots=True, kw_only=True)
class PowerOfTwoGrid:
    """Powers of two. ``direction``: ``up`` to the next one, so that nothing more is clipped, or
    to the ``nearest`` (in value; up where two are equally near)."""

    direction: str = "up"
    name: str = "power_of_two"

    def __post_init__(self) -> None:
        if self.direction not in ("up", "nearest"):
            raise ValueError(f"direction must be up or nearest, got {self.direction!r}")

    def snap(self, scale: float) -> Snapped:
        """The power of two."""
        bounded = max(scale, LEAST_SCALE)
        mantissa, exponent = math.frexp(bounded)
        if self.direction == "nearest":
            power = exponent - 1 if mantissa < 0.75 else exponent
        else:
            # A power that was computed with an error of the last bits is that power.
            power = math.ceil(math.log2(bounded) - 1e-9)
        return Snapped(value=2.0**power, is_clamped=scale < LEAST_SCALE)


@dataclass(frozen=True, slots=True, kw_only=True)
class MultiplierGrid:
    """``m * 2**-n`` with whole ``m`` in ``m_low .. m_high`` and ``n`` in ``n_low .. n_high``.

    Icraft's hardware has ``m`` in 0..255 and ``n`` in bits..2*bits, to 2*bits+5 where two units cut
    (`qdist.numbers.cuts`). Scale 0 is no scale: `snap` starts from ``m`` = 1.
    """

    m_low: int = 0
    m_high: int = 255
    n_low: int
    n_high: int
    name: str = "m*2^-n"

    def __post_init__(self) -> None:
        if not 0 <= self.m_low <= self.m_high or self.m_high < 1 or not self.n_low <= self.n_high:
            raise ValueError(f"no scale has m {self.m_low}..{self.m_high}, n {self.n_range}")
        if self.m_high >= 1 << 24 or max(abs(self.n_low), abs(self.n_high)) > 100:
            raise ValueError("m * 2**-n must be exact in float32")

    @property
    def n_range(self) -> str:
        """The range of ``n``, as text."""
        return f"{self.n_low}..{self.n_high}"

    def snap(self, scale: float) -> Snapped:
        """The nearest value; the larger one of two equally near, with the least ``n`` of those
        that stand for the same value."""
        least = max(1, self.m_low)
        _, negative, n, m = min(
            (abs(math.ldexp(m, -n) - scale), -math.ldexp(m, -n), n, m)
            for n in range(self.n_low, self.n_high + 1)
            for m in _around(math.ldexp(scale, n), least, self.m_high)
        )
        ends = math.ldexp(least, -self.n_high), math.ldexp(self.m_high, -self.n_low)
        return Snapped(value=-negative, m=m, n=n, is_clamped=not ends[0] <= scale <= ends[1])


def _around(exact: float, low: int, high: int) -> set[int]:
    """The whole numbers of ``low .. high`` next to ``exact``."""
    bounded = min(max(exact, float(low)), float(high))
    return {math.floor(bounded), math.ceil(bounded)}
