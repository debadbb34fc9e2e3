"""Clipping ranges as the mean over equal blocks of the samples (Icraft's ``batch``).

Icraft measures the calibration set in equal parts when memory is short and takes the mean of the
parts' measurements. Here memory is no reason, since histograms merge exactly, but the mean differs
from the range of the merged histogram and can be wanted: to do as Icraft does, and because a rare
extreme moves the mean of N maxima by one Nth of what it moves the maximum.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from qdist.stats.histogram import Density, Histogram
from qdist.threshold.clip import Levels, Threshold
from qdist.threshold.error import measured
from qdist.threshold.registry import find_threshold
from qdist.threshold.sentinel import split_sentinels


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockThreshold:
    """``threshold``: the mean of the blocks' ranges. ``n_used`` blocks of ``n_blocks`` had one.

    ``relative_spread``: standard deviation of the width of the blocks' ranges (with one degree of
    freedom less than blocks), as a share of the mean width; 0 for fewer than two. ``notes``: what
    the mean leaves out.
    """

    threshold: Threshold
    n_used: int
    n_blocks: int
    relative_spread: float
    notes: tuple[str, ...]

    @property
    def relative_error(self) -> float:
        """Standard error of the mean width, as a share of it: how far off another draw of as many
        samples may well be."""
        return self.relative_spread / self.n_used**0.5 if self.n_used else 0.0


def mean_threshold(
    histograms: Sequence[Histogram],
    levels: Levels,
    method: str,
    parameters: Mapping[str, Any] | None = None,
) -> BlockThreshold:
    """The mean of the ranges that ``method`` chooses for every block's histogram of one tensor.

    Lower and upper bounds are averaged apart, so zero stays inside, and a tensor of one sign in
    all blocks keeps its zero bound. A block where the tensor held no value but zero (or but
    sentinels, `split_sentinels`) says nothing of a range and is left out, with a note; if all are,
    the range is 0 .. 0. The clipped share and the expected error are those of the mean range over
    all blocks together. Raises `ValueError` without blocks, QD501, QD502, QD104.
    """
    if not histograms:
        raise ValueError("a mean over no blocks")
    bodies = [split_sentinels(histogram.finite).body for histogram in histograms]
    used = [body for body in bodies if body.minimum < 0.0 or body.maximum > 0.0]
    found = [find_threshold(body, levels, method, parameters) for body in used]
    whole = split_sentinels(merged(histograms).finite).body
    if not found:
        threshold = find_threshold(whole, levels, method, parameters)
    else:
        low = float(np.mean([each.low for each in found]))
        high = float(np.mean([each.high for each in found]))
        threshold = measured(whole, low, high, levels, method=found[0].method, note=found[0].note)
    return BlockThreshold(
        threshold=threshold,
        n_used=len(used),
        n_blocks=len(histograms),
        relative_spread=_relative_spread(found),
        notes=_notes(bodies, used),
    )


def merged(histograms: Sequence[Histogram]) -> Histogram:
    """The histogram of all values of all of them. At least one."""
    bins, place = np.unique(np.concatenate([h.bins for h in histograms]), return_inverse=True)
    counts = np.zeros(bins.size, np.uint64)
    np.add.at(counts, place, np.concatenate([h.counts for h in histograms]))
    return Histogram(
        bins=bins,
        counts=counts,
        minimum=min(h.minimum for h in histograms),
        maximum=max(h.maximum for h in histograms),
    )


def _relative_spread(found: Sequence[Threshold]) -> float:
    widths = np.array([each.high - each.low for each in found])
    if widths.size < 2 or not widths.mean() > 0:
        return 0.0
    return float(widths.std(ddof=1) / widths.mean())


def _notes(bodies: Sequence[Density], used: Sequence[Density]) -> tuple[str, ...]:
    n_left = len(bodies) - len(used)
    if not n_left:
        return ()
    return (f"{n_left} of {len(bodies)} blocks held nothing but zeros and count for nothing",)
