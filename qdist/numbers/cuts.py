"""How an ``m * 2**-n`` scale is split over two units (Icraft, section "operators").

A vector unit (VPE) cuts once: after multiply and add it multiplies with ``m`` in 0..255 and shifts
right by ``n`` in bits..2*bits, so weight and bias share one scale. Before it, a matrix unit (MPE)
may cut too: it shifts its accumulators right by 0..5. The weight's scale is then
``m * 2**-(shift + n)``; the bias is added in between, after the first cut, so its scale is
``m * 2**-n`` with the same ``m``. All output channels of the matrix unit share one first cut.

Our reading: the document writes ``0 <= n - b <= 5`` for weight scale ``a * 2**-b`` and bias scale
``m * 2**-n``. Only ``b - n`` is a shift to the right, and only so does the total reach the
2*bits + 5 that the same document gives for two feature maps; that is what is built here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from qdist.numbers.grid import MultiplierGrid, Snapped

MOST_FIRST_CUT = 5
BIAS_FACTOR = 2
"""A bias is kept in 2 * bits bits."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Cuts:
    """The cuts of one layer. ``shift``: of the matrix unit, 0 where it has no part. ``scales``: of
    the weight, per channel or one; ``m`` and ``n`` are those of ``scales`` as a whole, so that the
    vector unit shifts by ``n - shift``."""

    shift: int
    scales: tuple[Snapped, ...]

    @property
    def bias_scales(self) -> tuple[float, ...]:
        """The scale of the bias for each of ``scales``: without the first cut."""
        return tuple(entry.value * 2**self.shift for entry in self.scales)


def vector_grid(bits: int) -> MultiplierGrid:
    """Scales of operators on the vector unit alone: BatchNorm, Multiply, Add, depthwise Conv."""
    return MultiplierGrid(n_low=bits, n_high=2 * bits)


def matrix_grid(bits: int) -> MultiplierGrid:
    """Scales of operators on both units, both cuts together: Conv, MatMul."""
    return MultiplierGrid(n_low=bits, n_high=2 * bits + MOST_FIRST_CUT)


def vector_cuts(scales: Sequence[float], bits: int, biases: Sequence[float] | None = None) -> Cuts:
    """One cut, each scale for itself, and for the bias too.

    A scale that is nearly zero (below half the least there is) gives way to that of the bias, as
    the vendor's document has it: the least under which the bias fits. ``biases``: as of
    `matrix_cuts`.
    """
    grid = vector_grid(bits)
    wanted = [
        shared_scale(scale, bias, bits)
        for scale, bias in zip(scales, biases or [0.0] * len(scales), strict=True)
    ]
    return Cuts(shift=0, scales=tuple(grid.snap(scale) for scale in wanted))


def shared_scale(scale: float, bias: float, bits: int) -> float:
    """The scale of a weight, or where that is nearly zero the bias's (0: there is none)."""
    least = 2.0 ** -vector_grid(bits).n_high
    if scale >= least / 2 or bias == 0.0:
        return scale
    # Snapping may take 1/256 off a scale, or half the least one.
    wide = (1 << (BIAS_FACTOR * bits - 1)) - 1
    return bias / wide * (1 + 2.0**-7) + least / 2


def matrix_cuts(scales: Sequence[float], bits: int, biases: Sequence[float] | None = None) -> Cuts:
    """Two cuts, the first one equal for all channels.

    ``scales``: of the normalized weight, one per channel or one in all. ``biases``: the largest
    magnitude of the normalized bias under each of them. Of the six first cuts the one is taken with
    which the fewest biases overflow their 2 * bits bits, then the scales move least (sum of
    squared relative changes), then the shortest.
    """
    return min(
        (_with_shift(scales, bits, shift) for shift in range(MOST_FIRST_CUT + 1)),
        key=lambda cuts: (_overflows(cuts, bits, biases), _moved(cuts, scales), cuts.shift),
    )


def _with_shift(scales: Sequence[float], bits: int, shift: int) -> Cuts:
    grid = MultiplierGrid(n_low=bits + shift, n_high=2 * bits + shift)
    return Cuts(shift=shift, scales=tuple(grid.snap(scale) for scale in scales))


def _overflows(cuts: Cuts, bits: int, biases: Sequence[float] | None) -> int:
    """How many biases do not fit."""
    if biases is None:
        return 0
    limit = (1 << (BIAS_FACTOR * bits - 1)) - 1
    return sum(b > limit * s for b, s in zip(biases, cuts.bias_scales, strict=True))


def _moved(cuts: Cuts, scales: Sequence[float]) -> float:
    return sum((s.value / scale - 1) ** 2 for s, scale in zip(cuts.scales, scales, strict=True))
