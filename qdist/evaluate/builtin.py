"""Runs a model over a data set and measures metrics."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qdist.data.checks import InputSpec, check_sample, fixed_batch, stackable
from qdist.data.shards import stack
from qdist.data.source import DataSource, Feeds
from qdist.evaluate.metrics import Accumulator, find_metric
from qdist.evaluate.report import EvalReport
from qdist.model.session import Execution, run, scoring_session

Outputs = list[NDArray[Any]]

BESIDE = ("agreement", "sqnr_db", "cosine")
"""Label-free metrics against the float model that every report carries."""

_ORT_DTYPES = {
    "tensor(float)": "float32",
    "tensor(float16)": "float16",
    "tensor(double)": "float64",
    "tensor(int64)": "int64",
    "tensor(int32)": "int32",
    "tensor(int16)": "int16",
    "tensor(int8)": "int8",
    "tensor(uint8)": "uint8",
    "tensor(uint16)": "uint16",
    "tensor(bool)": "bool",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class DatasetEvaluation:
    """A metric over a data set: ``metric`` a key of `metrics.METRICS`, ``batch`` samples a run.

    ``token_input``: the input that holds token ids, for text metrics.
    """

    source: DataSource
    metric: str
    batch: int = 32
    token_input: str | None = None

    def __post_init__(self) -> None:
        find_metric(self.metric)
        if self.batch < 1:
            raise ValueError(f"batch must be at least 1, got {self.batch}")


@dataclass(frozen=True, slots=True, kw_only=True)
class EvalBatch:
    """One run's worth of samples: keys, feeds, labels ``[b, ...]`` or None."""

    keys: tuple[str, ...]
    feeds: Feeds
    labels: NDArray[np.int64] | None


class Runner:
    """One model, loaded as it is written. One thread at a time."""

    def __init__(self, path: Path, execution: Execution) -> None:
        self.path = path
        self._session = scoring_session(path, execution)
        self.output_names = [value.name for value in self._session.get_outputs()]
        self.inputs = tuple(
            InputSpec(
                name=value.name,
                dtype=_ORT_DTYPES.get(value.type, "float32"),
                shape=tuple(value.shape),
            )
            for value in self._session.get_inputs()
        )

    def run(self, feeds: Feeds) -> Outputs:
        """All outputs, in the graph's order. Raises QD205."""
        return run(self._session, self.output_names, feeds)


def batches(source: DataSource, inputs: tuple[InputSpec, ...], size: int) -> Iterator[EvalBatch]:
    """The data set in order, in runs of up to ``size`` consecutive samples of equal shapes.

    Raises `DataError`.
    """
    held: list[tuple[str, Feeds]] = []
    limit = fixed_batch(inputs) or size
    for key in source.keys():  # noqa: SIM118  (a method of the protocol, not a mapping)
        feeds = source.load(key)
        check_sample(key, feeds, inputs)
        if held and not _alike(held[0][1], feeds):
            yield _joined(held, source, inputs)
            held = []
        held.append((key, feeds))
        if len(held) == (limit if stackable(feeds, inputs) else 1):
            yield _joined(held, source, inputs)
            held = []
    if held:
        yield _joined(held, source, inputs)


def float_outputs(runner: Runner, evaluation: DatasetEvaluation) -> list[Outputs]:
    """The float model's outputs for every run of the data set, to compare others with."""
    return [
        runner.run(batch.feeds)
        for batch in batches(evaluation.source, runner.inputs, evaluation.batch)
    ]


def evaluate_on(
    runner: Runner,
    evaluation: DatasetEvaluation,
    reference: list[Outputs] | None = None,
    *,
    on_progress: Callable[[int], None] | None = None,
) -> EvalReport:
    """Measure the metric, and with a reference the label-free ones beside it.

    ``on_progress(n)``: samples done so far. Raises `DataError`, QD205, QD704.
    """
    begin = time.perf_counter()
    metric = find_metric(evaluation.metric)
    names = [evaluation.metric]
    if reference is not None:
        names += [name for name in BESIDE if name != evaluation.metric]
    accumulators: dict[str, Accumulator] = {
        name: find_metric(name).make(token_input=evaluation.token_input) for name in names
    }
    n = 0
    for i, batch in enumerate(batches(evaluation.source, runner.inputs, evaluation.batch)):
        outputs = runner.run(batch.feeds)
        for accumulator in accumulators.values():
            accumulator.update(
                outputs, batch.feeds, batch.labels, reference[i] if reference else None
            )
        n += len(batch.keys)
        if on_progress is not None:
            on_progress(n)
    results = {name: accumulator.result() for name, accumulator in accumulators.items()}
    return EvalReport(
        score=results[evaluation.metric],
        metric=evaluation.metric,
        higher_is_better=metric.higher_is_better,
        metrics=results,
        n_samples=n,
        seconds=time.perf_counter() - begin,
    )


def _alike(a: Feeds, b: Feeds) -> bool:
    return all(a[name].shape == b[name].shape for name in a)


def _joined(
    held: list[tuple[str, Feeds]], source: DataSource, inputs: tuple[InputSpec, ...]
) -> EvalBatch:
    feeds = [sample for _, sample in held]
    labels = [source.label(key) for key, _ in held]
    present = [label for label in labels if label is not None]
    stacked = stackable(feeds[0], inputs)
    return EvalBatch(
        keys=tuple(key for key, _ in held),
        feeds=stack(feeds) if stacked else feeds[0],
        labels=np.stack(present) if len(present) == len(held) else None,
    )
