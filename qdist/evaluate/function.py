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

import sys
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qdist.errors import DataError, EvaluationError, QdistError
from qdist.evaluate.report import EvalReport, choose_score, named_numbers
from qdist.targets import load_target


@dataclass(slots=True, kw_only=True)
class Executor:
    """The model under evaluation, as the user's function sees it. Used by one thread.

    run: feeds by input name -> the outputs in the order of ``output_nodes``.
    input_nodes, output_nodes: names in the graph's order.
    model_path: the artifact that is run.
    iteration: how many batches the user asked for; None for all there are.
    batch_size: how many samples the user wants in one batch.
    dataset: the user's own name or path of the data set; None if not set.
    early_stop_flag: Knight's functions leave their loop when it turns true. A score must not
        depend on when that happens, so it stays false.
    """

    run: Callable[[dict[str, NDArray[Any]]], list[NDArray[Any]]]
    input_nodes: list[str]
    output_nodes: list[str]
    model_path: Path
    iteration: int | None = None
    batch_size: int = 1
    dataset: str | None = None
    early_stop_flag: bool = False

    def forward(self, *inputs: NDArray[Any]) -> list[NDArray[Any]]:
        """Run the model once. One array per input, in the order of ``input_nodes``.

        Raises `qdist.errors.DataError` QD307 for another number of arrays, and what ``run``
        raises for arrays that the model does not take.
        """
        if len(inputs) != len(self.input_nodes):
            raise DataError(
                "QD307",
                where="executor.forward",
                got=f"{len(inputs)} arrays",
                expected=f"{len(self.input_nodes)}: {', '.join(self.input_nodes)}",
                mend="give one array per input of the model, in this order",
            )
        arrays = (np.asarray(array) for array in inputs)
        return self.run(dict(zip(self.input_nodes, arrays, strict=True)))


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
                where=_place(error, function),
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


def _place(error: BaseException, function: Callable[..., Any]) -> str:
    """File and line of the innermost frame in the user's own file.

    Where that file has no frame: of the innermost one below the call, or of nothing when the call
    itself failed, because the function does not take these arguments.
    """
    frames = traceback.extract_tb(error.__traceback__)[1:]
    module = sys.modules.get(getattr(function, "__module__", None) or "")
    file = getattr(module, "__file__", None)
    own = [frame for frame in frames if frame.filename == file] or frames
    return f"{own[-1].filename}:{own[-1].lineno}" if own else f"the call of {function!r}"
