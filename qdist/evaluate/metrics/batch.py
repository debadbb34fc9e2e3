"""What a metric measures, and what it says of arrays that it cannot measure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qdist.data.source import Feeds
from qdist.errors import DataError, EvaluationError
from qdist.evaluate.report import unusable

Floats = NDArray[np.float64]
Parts = tuple[Floats, Floats]
"""Numerators and denominators, each float64 [b]."""

ANOTHER = "choose a metric that fits this model"


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """What a metric measures: the arrays of b samples, axis 0 being the sample.

    outputs: the model's outputs in the graph's order. feeds: its inputs by name. labels: int64
    [b, ...] or None. reference: the float model's outputs, as ``outputs``, or None.
    token_input: the input that holds token ids, where the user named one.
    """

    metric: str
    outputs: Sequence[NDArray[Any]]
    feeds: Feeds
    labels: NDArray[Any] | None
    reference: Sequence[NDArray[Any]] | None
    token_input: str | None

    @property
    def n_samples(self) -> int:
        first = next(iter(self.feeds.values()), None)
        return len(self.outputs[0] if first is None else first)


def unfit(batch: Batch, *, got: str, expected: str, mend: str = ANOTHER) -> EvaluationError:
    """The QD704 error for outputs or inputs that the metric cannot be computed from."""
    return unusable(f"metric {batch.metric}", got=got, expected=expected, mend=mend)


def labels_do_not_fit(metric: str, *, got: str, expected: str) -> DataError:
    """The QD308 error."""
    return DataError(
        "QD308",
        where=f"metric {metric}",
        got=got,
        expected=expected,
        mend="correct the data set's labels, or choose a metric that needs none",
    )
