"""Values that mean "masked" rather than a magnitude.

Attention masks add -3.4e38, -1e9, -65504 or -10000 to the scores that must not count. Seen as
magnitudes they would set the range and flatten every real value to one level. Taken off, they are
clipped to the low end of whatever range the others get; `keep_masked` lowers that end until a
Softmax gives them no weight.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from qdist.stats.histogram import Density
from qdist.threshold.clip import Levels, Threshold
from qdist.threshold.error import measured

LEAST_MAGNITUDE = 1e3
"""Sentinels in use start at 1e4; adding a score to them keeps them far below this."""
LEAST_GAP = 16.0
"""How many times larger than the largest ordinary magnitude a sentinel has to be."""
KNOWN = (65504.0, 1e9, 3.4028234663852886e38)
"""Magnitudes that hardly anything but a mask has: float16's and float32's largest, and -1e9."""
LEAST_GAP_OF_KNOWN = 4.0
"""The same for values that lie where a score is added to one of them."""
MASKED_PROBABILITY = 1e-6
"""What a Softmax may give a masked position at most."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Split:
    """A density without its sentinels, and how many values those were."""

    body: Density
    n_sentinels: float


def split_sentinels(density: Density) -> Split:
    """Take off large negative values that lie beyond an empty gap from all the others.

    Where nothing else was seen there is no telling, and nothing is taken off.
    """
    if density.is_empty or density.minimum > -LEAST_MAGNITUDE:
        return Split(body=density, n_sentinels=0.0)
    # Ascending: each interval's successors are all of smaller magnitude, or positive.
    body_bound = np.maximum(-density.lower, density.maximum)[1:]
    near = -density.upper[:-1]
    far = -density.lower[:-1]
    known = np.zeros(near.size, np.bool_)
    for value in KNOWN:
        # A bin of the grid is 2^-7 wide, and the score that was added is part of the others.
        room = body_bound + value / 64
        known |= (near >= value - room) & (far <= value + room)
    gap = np.where(known, LEAST_GAP_OF_KNOWN, LEAST_GAP)
    beyond = (near >= LEAST_MAGNITUDE) & (near >= gap * body_bound)
    n = int(np.flatnonzero(beyond)[-1]) + 1 if beyond.any() else 0
    body = Density(lower=density.lower[n:], upper=density.upper[n:], counts=density.counts[n:])
    return Split(body=body, n_sentinels=float(density.counts[:n].sum()))


def masked_floor(body: Density, probability: float = MASKED_PROBABILITY) -> float:
    """How low a masked score has to be for a Softmax to give it at most ``probability``.

    A row's largest score is at least the smallest that was seen, and its weight is at least
    ``e^(score)``; so this much below the smallest is enough in every row. Raises `ValueError` for a
    probability outside 0..1.
    """
    if not 0 < probability < 1:
        raise ValueError(f"a probability lies between 0 and 1, got {probability}")
    return body.minimum + math.log(probability)


def keep_masked(
    found: Threshold,
    body: Density,
    levels: Levels,
    *,
    probability: float = MASKED_PROBABILITY,
) -> Threshold:
    """The range with its low end where masked scores, clipped to it, keep their meaning.

    ``body``: the scores without their sentinels. Rounding may raise the masked ones and lower the
    others by half a step each, and move the zero point by as much, so one and a half steps are
    added to `masked_floor`. The high end stays; a range that is low enough is returned as it is.
    """
    floor = min(masked_floor(body, probability), found.high + math.log(probability))
    if levels.symmetric:
        needed = -floor / (1.0 - min(1.5 / levels.high, 0.75))
        low = found.low if max(-found.low, found.high) >= needed else -needed
    else:
        share = min(1.5 / levels.n_steps, 0.75)
        low = min(found.low, (floor - share * found.high) / (1.0 - share))
    if low == found.low:
        return found
    note = f"reaches down to {low:.4g}, so that masked scores stay masked"
    return measured(body, low, found.high, levels, method=found.method, note=note)
