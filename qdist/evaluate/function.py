"""Scoring by a Python function of the user's own, after the contract of Tsingmicro's Knight.

The function gets an `Executor`, feeds it batches with ``executor.forward(...)``, and returns its
metric: a number, or a dict of named numbers::

    def accuracy(executor):
        images, labels = load(executor.dataset)
        hits = 0
        for i in range(executor.iteration):
            batch = slice(i * executor.batch_size, (i + 1) * executor.batch_size)
            logits = executor.forward(images[batch])[0]
            hits += (logits.argmax(axis=1) == labels[batch]).sum()
        return hits / (executor.iteration * executor.batch_size)
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from qdist.data.executor import Executor, place_of
from qdist.errors import EvaluationError, QdistError
from qdist.evaluate.report import EvalReport, choose_score, named_numbers
from qdist.targets import load_target


@dataclass(frozen=True, slots=True, kw_only=True)
class FunctionEvaluation:
    """A function that scores a model.

    target: "module:function" or "file.py:function"; see `qdist.targets.load_target`.
    higher_is_better: which way its score ranks.
    arguments: keyword arguments given to it after the executor.
    metric: which of several named numbers is the score; None when there is only one.
    """

    target: str
    higher_is_better: bool
    arguments: Mapping[str, Any] = field(default_factory=dict)
    metric: str | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "arguments", dict(self.arguments))

    def load(self) -> Callable[..., Any]:
        """The function. Raises `qdist.errors.ConfigError` QD108."""
        return load_target(self.target)

    def run(self, executor: Executor) -> EvalReport:
        """Call the function.

        Raises `qdist.errors.ConfigError` QD108 (it cannot be loaded) and
        `qdist.errors.EvaluationError` QD705 (it raised) or QD704 (what it returned is no usable
        metric). A `qdist.errors.QdistError` that it let through is raised as it is.
        """
        function = self.load()
        started = time.perf_counter()
        try:
            result = function(executor, **self.arguments)
        except QdistError:
            raise
        except (Exception, SystemExit) as error:
            raise EvaluationError(
                "QD705",
                where=place_of(error, function),
                got=f"{type(error).__name__}: {error}",
                expected=f"{self.target} to return its metric",
                mend="correct the function there",
            ) from error
        seconds = time.perf_counter() - started
        numbers = named_numbers(result)
        if not numbers:
            raise EvaluationError(
                "QD704",
                where=self.target,
                got=f"{type(result).__name__} {result!r:.200}",
                expected="a number, or a dict of named numbers",
                mend="let the function return its metric",
            )
        name, numbers = choose_score(numbers, self.metric, self.target)
        return EvalReport(
            score=numbers[name],
            metric=name,
            higher_is_better=self.higher_is_better,
            metrics=numbers,
            n_samples=None,
            seconds=seconds,
        )


__all__ = ["Executor", "FunctionEvaluation"]
