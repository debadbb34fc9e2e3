"""How much of one sample is turned into float64 at a time."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from qdist.evaluate.metrics.batch import Floats

BLOCK = 1 << 16
"""Elements of one sample that are turned into float64 at a time. The blocks of a sample do not
depend on its batch, so that neither do its sums."""


def blocks(n_rows: int, width: int) -> Iterator[slice]:
    """Slices that cut rows of ``width`` elements into blocks of about `BLOCK` elements."""
    step = max(1, BLOCK // max(1, width))
    return (slice(start, start + step) for start in range(0, n_rows, step))


def log_softmax(logits: Floats) -> Floats:
    """Of each row, float64 [n, width]."""
    shifted = logits - logits.max(axis=1, keepdims=True)
    result: Floats = shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))
    return result
