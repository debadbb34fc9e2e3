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

It may be named by a decorator instead (`qdist.evaluate.register`). And it may yield the scores of
single samples, one number or an array at a time; their mean is the score, and what it returns
beside may only name further numbers. Then a model that has lost against the best one so far stops
early (`qdist.evaluate.early`): ``executor.early_stop_flag`` turns true and the function ends at
that yield.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from qdist.data.executor import Executor
from qdist.errors import QdistError
from qdist.evaluate.early import Incumbent, Race, check_range
from qdist.evaluate.register import load_function
from qdist.evaluate.report import SCORE, EvalReport, choose_score, named_numbers, unusable
from qdist.evaluate.user_code import code_failed


@dataclass(frozen=True, slots=True, kw_only=True)
class FunctionEvaluation:
    """A function that scores a model.

    target: "module:function" or "file.py:function" (see `qdist.targets.load_target`), or
        "file.py" alone where one function is registered there.
    higher_is_better: which way its score ranks.
    arguments: keyword arguments given to it after the executor.
    metric: which of several named numbers is the score; None when there is only one. The mean of
        yielded scores takes this name.
    sample_range: smallest and largest value of a yielded score; None: unknown, and no model stops
        early. A score outside of it is an error.
    stop_risk: of `Incumbent`.

    Raises `qdist.errors.ConfigError` QD104 for an empty range.
    """

    target: str
    higher_is_better: bool
    arguments: Mapping[str, Any] = field(default_factory=dict)
    metric: str | None = None
    sample_range: tuple[float, float] | None = None
    stop_risk: float = 0.01

    def __post_init__(self) -> None:
        object.__setattr__(self, "arguments", dict(self.arguments))
        if self.sample_range is not None:
            check_range(self.sample_range)

    def load(self) -> Callable[..., Any]:
        """The function. Raises `qdist.errors.ConfigError` QD108."""
        return load_function(self.target)

    def incumbent(self, best: EvalReport | None) -> Incumbent | None:
        """What a trial has to beat, from the report of the one that is best.

        None where that gave no per-sample scores to the end, or their range is not known.
        """
        if best is None or best.stopped_early or not best.per_sample or self.sample_range is None:
            return None
        return Incumbent(
            scores=best.per_sample,
            sample_range=self.sample_range,
            higher_is_better=self.higher_is_better,
            risk=self.stop_risk,
        )

    def run(self, executor: Executor, incumbent: Incumbent | None = None) -> EvalReport:
        """Call the function. ``incumbent``: what it has to beat; None: it runs to its end.

        Raises `qdist.errors.ConfigError` QD108 (it cannot be loaded) and
        `qdist.errors.EvaluationError` QD705 (it raised) or QD704 (what it returned or yielded is
        no usable metric). A `qdist.errors.QdistError` that it let through is raised as it is.
        """
        function = self.load()
        started = time.perf_counter()
        scores: list[float] = []
        is_stopped = False
        try:
            result = function(executor, **self.arguments)
            if is_generator := isinstance(result, Generator):
                result, is_stopped = self._drain(result, executor, incumbent, scores)
        except QdistError:
            raise
        except (Exception, SystemExit) as error:
            raise code_failed(error, self.target, function) from error
        report = self._report(
            self._with_mean(result, scores) if is_generator else result,
            time.perf_counter() - started,
        )
        if not is_generator:
            return report
        return replace(
            report, n_samples=len(scores), per_sample=tuple(scores), stopped_early=is_stopped
        )

    def _drain(
        self,
        running: Generator[Any, None, Any],
        executor: Executor,
        incumbent: Incumbent | None,
        scores: list[float],
    ) -> tuple[Any, bool]:
        """Collect what is yielded; what is returned, and whether the race was lost."""
        race = Race(incumbent) if incumbent is not None else None
        try:
            while True:
                try:
                    found = next(running)
                except StopIteration as end:
                    return end.value, False
                new = self._checked(found, len(scores))
                scores += new
                if race is not None and race.lost(new) is not None:
                    executor.early_stop_flag = True
                    return None, True
        finally:
            running.close()

    def _checked(self, found: Any, start: int) -> list[float]:
        try:
            new = np.atleast_1d(np.asarray(found)).astype(np.float64).ravel()
        except (TypeError, ValueError):
            new = np.array([np.nan])
        low, high = self.sample_range or (-np.inf, np.inf)
        wrong = ~np.isfinite(new) | (new < low) | (new > high)
        if wrong.any():
            within = "" if self.sample_range is None else f" in [{low:g}, {high:g}]"
            raise unusable(
                f"{self.target}, sample {start + int(wrong.argmax())}",
                got=f"{found!r:.200}",
                expected=f"a finite number for each sample{within}",
                mend="let the function yield scores of samples, or correct evaluation.sample_range",
            )
        return [float(score) for score in new]

    def _with_mean(self, result: Any, scores: list[float]) -> dict[str, float]:
        """The mean of the yielded scores, beside what the function returned."""
        name = self.metric or SCORE
        beside = {} if result is None else named_numbers(result)
        if not scores or name in beside or (result is not None and not beside):
            raise unusable(
                self.target,
                got="no yielded score" if not scores else f"{result!r:.200} beside yielded scores",
                expected=f"scores of samples, whose mean is {name!r}, and other names beside it",
                mend="yield a score for every sample, and return nothing or further named numbers",
            )
        return {name: float(np.mean(scores)), **beside}

    def _report(self, result: Any, seconds: float) -> EvalReport:
        numbers = named_numbers(result)
        if not numbers:
            raise unusable(
                self.target,
                got=f"{type(result).__name__} {result!r:.200}",
                expected="a number, or a dict of named numbers",
                mend="let the function return its metric",
            )
        metric = self.metric or (SCORE if SCORE in numbers else None)
        name, numbers = choose_score(numbers, metric, self.target)
        return EvalReport(
            score=numbers[name],
            metric=name,
            higher_is_better=self.higher_is_better,
            metrics=numbers,
            n_samples=None,
            seconds=seconds,
        )


__all__ = ["Executor", "FunctionEvaluation"]
