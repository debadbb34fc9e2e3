"""A range to quantize into."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Levels:
    """The integers of a uniform quantizer: ``low .. high``, e.g. -128..127; ``symmetric`` pins
    the zero point to 0."""

    low: int
    high: int
    symmetric: bool

    def __post_init__(self) -> None:
        if not self.low < self.high or (self.symmetric and not self.low <= 0 < self.high):
            raise ValueError(f"no quantizer has the levels {self.low}..{self.high}")

    @property
    def n_steps(self) -> int:
        """Steps between the lowest and the highest level."""
        return self.high - self.low


@dataclass(frozen=True, slots=True, kw_only=True)
class Threshold:
    """A clipping range ``low .. high`` in units of the tensor, with zero inside.

    ``method``: how it was found. ``clipped_share``: share of the values outside.
    ``expected_mse``: mean squared error of quantizing into it, by the histogram. ``mean_square``:
    of the values themselves, by the histogram. ``note``: what else there is to say of it.
    """

    low: float
    high: float
    method: str
    clipped_share: float
    expected_mse: float
    mean_square: float = 0.0
    note: str = ""

    def __post_init__(self) -> None:
        if not self.low <= 0.0 <= self.high:
            raise ValueError(f"a range must hold zero, got {self.low}..{self.high}")

    @property
    def relative_error(self) -> float:
        """Expected squared error as a share of the mean square of the values; 0 without values."""
        return self.expected_mse / self.mean_square if self.mean_square > 0 else 0.0

    @property
    def sqnr_db(self) -> float:
        """Signal to quantization noise in decibels; ``inf`` without an error."""
        share = self.relative_error
        return -10.0 * math.log10(share) if share > 0 else math.inf


def scale_and_zero(low: float, high: float, levels: Levels) -> tuple[float, int]:
    """Scale and zero point of the quantizer that maps ``low .. high`` onto ``levels``.

    A range of no width gives scale 1, so that zero is still exact.
    """
    if levels.symmetric:
        bound = max(-low, high)
        return (bound / levels.high if bound > 0 else 1.0), 0
    if high <= low:
        return 1.0, 0
    scale = (high - low) / levels.n_steps
    zero = round(levels.low - low / scale)
    return scale, int(min(max(zero, levels.low), levels.high))
