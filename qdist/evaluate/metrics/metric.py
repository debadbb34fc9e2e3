"""What a metric is, and a running measurement of one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qdist.data.source import Feeds
from qdist.evaluate.metrics.batch import Batch, Floats, Parts, labels_do_not_fit


def _same(quotient: Floats) -> Floats:
    return quotient


@dataclass(frozen=True, slots=True, kw_only=True)
class Metric:
    """A named metric. ``make()`` starts a measurement.

    needs_labels, needs_reference: whether ``update`` must be given labels, or the float model's
    outputs. measure: a batch -> the parts of its samples. finish: quotients -> values of the
    metric, element by element.
    """

    name: str
    higher_is_better: bool
    description: str
    measure: Callable[[Batch], Parts]
    finish: Callable[[Floats], Floats] = _same
    needs_labels: bool = False
    needs_reference: bool = False

    def make(self, *, token_input: str | None = None) -> Accumulator:
        """A new measurement. ``token_input`` names the input of token ids, for text metrics."""
        return Accumulator(metric=self, token_input=token_input)


@dataclass(slots=True, kw_only=True)
class Accumulator:
    """A running measurement of one metric on one model. Used by one thread.

    Law: the result is the same for every partition of the same samples into batches. Memory is
    16 bytes per sample.
    """

    metric: Metric
    token_input: str | None = None
    _parts: list[Parts] = field(default_factory=list)

    def update(
        self,
        outputs: Sequence[NDArray[Any]],
        feeds: Feeds,
        labels: NDArray[Any] | None = None,
        reference: Sequence[NDArray[Any]] | None = None,
    ) -> None:
        """Add a batch; see `Batch` for the arrays.

        Raises `qdist.errors.DataError` QD308 (labels missing, or not fitting the outputs),
        `qdist.errors.EvaluationError` QD704 (outputs this metric cannot be computed from) and
        `ValueError` (a reference is needed, and was not given). After an error nothing was added.
        """
        if self.metric.needs_labels and labels is None:
            raise labels_do_not_fit(
                self.metric.name, got="samples without labels", expected="one label per sample"
            )
        if self.metric.needs_reference and reference is None:
            raise ValueError(f"{self.metric.name} needs the float model's outputs")
        batch = Batch(
            metric=self.metric.name,
            outputs=outputs,
            feeds=feeds,
            labels=labels,
            reference=reference,
            token_input=self.token_input,
        )
        with np.errstate(invalid="ignore", over="ignore"):
            self._parts.append(self.metric.measure(batch))

    @property
    def n_samples(self) -> int:
        """How many samples were added."""
        return sum(len(numerators) for numerators, _ in self._parts)

    def parts(self) -> Parts:
        """Numerators and denominators of every sample, float64 [n_samples] each, in order."""
        if not self._parts:
            return np.empty(0), np.empty(0)
        numerators, denominators = zip(*self._parts, strict=True)
        return np.concatenate(numerators), np.concatenate(denominators)

    def per_sample(self) -> Floats:
        """The metric of each sample by itself, float64 [n_samples], in the order of updates.

        NaN where a sample has nothing to measure (a text of one token) or holds NaN.
        """
        return self._finish(*self.parts())

    def result(self) -> float:
        """The metric over all samples. NaN when there are none, or when any output is NaN."""
        numerators, denominators = self.parts()
        return float(self._finish(np.sum(numerators), np.sum(denominators)))

    def _finish(self, numerators: Any, denominators: Any) -> Any:
        with np.errstate(all="ignore"):
            return self.metric.finish(np.divide(numerators, denominators))
