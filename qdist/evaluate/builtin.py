"""Runs a model over a data set and measures metrics."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from qdist.data.checks import InputSpec, check_sample, fixed_batch, stackable
from qdist.data.shards import stack
from qdist.data.source import DataSource, Feeds
from qdist.errors import DataError, EvaluationError
from qdist.evaluate.metrics import Accumulator, find_metric
from qdist.evaluate.metrics.batch import Parts
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
    "tensor(uint32)": "uint32",
    "tensor(uint64)": "uint64",
    "tensor(bfloat16)": "bfloat16",
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
        self.inputs = session_inputs(self._session)

    def run(self, feeds: Feeds) -> Outputs:
        """All outputs, in the graph's order. Raises QD205."""
        return run(self._session, self.output_names, feeds)


def session_inputs(session: ort.InferenceSession) -> tuple[InputSpec, ...]:
    """The inputs of a loaded model as the data checks want them."""
    return tuple(
        InputSpec(
            name=value.name,
            dtype=_ORT_DTYPES.get(value.type, "float32"),
            # ONNX Runtime gives [] for an unknown rank too, which is far commoner than a scalar.
            shape=tuple(value.shape) or None,
        )
        for value in session.get_inputs()
    )


def batches(
    source: DataSource,
    inputs: tuple[InputSpec, ...],
    size: int,
    *,
    n_samples: int | None = None,
) -> Iterator[EvalBatch]:
    """The data set in order, in runs of up to ``size`` consecutive samples of equal shapes.

    ``n_samples``: stop after so many, or at the end of that run where the model's batch is fixed.
    Raises `DataError`, QD303 also where a model of fixed batch is left with too few.
    """
    held: list[tuple[str, Feeds]] = []
    for i, key in enumerate(source.keys()):
        if n_samples is not None and i >= n_samples and not (held and fixed_batch(inputs)):
            break
        feeds = source.load(key)
        check_sample(key, feeds, inputs)
        if held and not _alike(held[0][1], feeds):
            yield _joined(held, source, inputs)
            held = []
        held.append((key, feeds))
        if len(held) == (fixed_batch(inputs) or size if stackable(feeds, inputs) else 1):
            yield _joined(held, source, inputs)
            held = []
    if held:
        yield _joined(held, source, inputs)


def float_outputs(runner: Runner, evaluation: DatasetEvaluation) -> Iterator[Outputs]:
    """The float model's outputs for every run of the data set, to compare others with."""
    for batch in batches(evaluation.source, runner.inputs, evaluation.batch):
        yield runner.run(batch.feeds)


def evaluate_on(
    runner: Runner,
    evaluation: DatasetEvaluation,
    reference: Iterable[Outputs] | None = None,
    *,
    keep: Callable[[Outputs], None] | None = None,
    on_progress: Callable[[int], None] | None = None,
    on_parts: Callable[[Parts], None] | None = None,
) -> EvalReport:
    """Measure the metric, and with a reference the label-free ones beside it.

    ``reference``: the float model's outputs, run by run. ``keep``: says that this is the float
    model, whose outputs are their own reference, and takes those of each run. ``on_progress(n)``:
    samples done so far. ``on_parts`` takes the score's parts, sample by sample. A metric beside the
    score that does not fit the model is left out, with a line in the report's log. Raises
    `DataError`, QD205, QD704.
    """
    begin = time.perf_counter()
    metric = find_metric(evaluation.metric)
    has_reference = reference is not None or keep is not None
    score = metric.make(token_input=evaluation.token_input)
    beside = _Beside(evaluation) if has_reference else None
    others = None if reference is None else iter(reference)
    n = 0
    for batch in batches(evaluation.source, runner.inputs, evaluation.batch):
        outputs = runner.run(batch.feeds)
        if keep is not None:
            keep(outputs)
        expected = outputs if keep is not None else _next(others, batch)
        score.update(outputs, batch.feeds, batch.labels, expected)
        if beside is not None:
            beside.update(outputs, batch, expected)
        n += len(batch.keys)
        if on_progress is not None:
            on_progress(n)
    if on_parts is not None:
        on_parts(score.parts())
    results = {evaluation.metric: score.result(), **(beside.results() if beside else {})}
    return EvalReport(
        score=results[evaluation.metric],
        metric=evaluation.metric,
        higher_is_better=metric.higher_is_better,
        metrics=results,
        n_samples=n,
        seconds=time.perf_counter() - begin,
        log="\n".join(beside.notes) if beside else "",
    )


class _Beside:
    """The label-free metrics beside the score. One that does not fit the model's outputs, as
    where they have no sample axis, must not cost the score: it is dropped, with a note."""

    def __init__(self, evaluation: DatasetEvaluation) -> None:
        self._accumulators: dict[str, Accumulator] = {
            name: find_metric(name).make(token_input=evaluation.token_input)
            for name in BESIDE
            if name != evaluation.metric
        }
        self.notes: list[str] = []

    def update(self, outputs: Outputs, batch: EvalBatch, expected: Outputs | None) -> None:
        for name, accumulator in list(self._accumulators.items()):
            try:
                accumulator.update(outputs, batch.feeds, batch.labels, expected)
            except (EvaluationError, ValueError) as error:
                del self._accumulators[name]
                self.notes.append(f"{name} is left out: {error}")

    def results(self) -> dict[str, float]:
        return {name: accumulator.result() for name, accumulator in self._accumulators.items()}


def _next(reference: Iterator[Outputs] | None, batch: EvalBatch) -> Outputs | None:
    if reference is None:
        return None
    found = next(reference, None)
    if found is None:
        raise DataError(
            "QD306",
            where=f"samples {batch.keys[0]} to {batch.keys[-1]}",
            got="samples that were not there when the float model ran",
            expected="the same samples for every model",
            mend="leave the evaluation data as it is until the command ends",
        )
    return found


def _alike(a: Feeds, b: Feeds) -> bool:
    return all(a[name].shape == b[name].shape for name in a)


def _joined(
    held: list[tuple[str, Feeds]], source: DataSource, inputs: tuple[InputSpec, ...]
) -> EvalBatch:
    keys = tuple(key for key, _ in held)
    feeds = [sample for _, sample in held]
    stacked = stackable(feeds[0], inputs)
    needed = fixed_batch(inputs) if stacked else None
    if needed is not None and len(held) != needed:
        raise DataError(
            "QD303",
            where=f"samples {keys[0]} to {keys[-1]}",
            got=f"{len(held)} samples left for a run",
            expected=f"{needed}, the model's fixed batch",
            mend=f"use a number of samples that {needed} divides, or export a dynamic batch axis",
        )
    return EvalBatch(
        keys=keys,
        feeds=stack(feeds) if stacked else feeds[0],
        labels=_joined_labels(keys, [source.label(key) for key in keys]),
    )


def _joined_labels(
    keys: tuple[str, ...], labels: list[NDArray[np.int64] | None]
) -> NDArray[np.int64] | None:
    present = [label for label in labels if label is not None]
    if len(present) != len(keys):
        return None
    shapes = {label.shape for label in present}
    if len(shapes) > 1:
        raise DataError(
            "QD308",
            where=f"samples {keys[0]} to {keys[-1]}",
            got="labels of shapes " + " and ".join(str(list(shape)) for shape in sorted(shapes)),
            expected="labels of one shape for samples of one shape",
            mend="pad the labels to one shape, or set evaluation.batch=1",
        )
    return np.stack(present)
