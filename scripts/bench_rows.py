"""Activation rows of real models for the benchmark of threshold methods.

A row is one tensor over one block of samples. Beside its histogram as a calibration stores it, a
row keeps what only the raw values can tell: true linear histograms, made in two passes, and the
histogram that ONNX Runtime's collector would have.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from bench_engine import Subject
from bench_models import CASES, Case
from numpy.typing import NDArray

from qdist.demo import demo_file
from qdist.model.channels import channel_axes
from qdist.model.session import as_float32, run
from qdist.stats.accumulator import Accumulator
from qdist.stats.histogram import Density
from qdist.stats.spec import GroupRequest, StatisticsSpec
from qdist.threshold.sentinel import split_sentinels
from qdist.threshold.sources import group_densities

LINEAR_BINS = (2048, 4096)
BLOCK_SAMPLES = 8
DEMOS = ("digits_cnn", "digits_vit")

OrtHistogram = tuple[Any, Any, Any, Any, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """``density``: as a plan sees it. ``channels``: the same per channel, as far as there are.
    ``linear``: number of bins -> counts of |x| over 0..max|x|; ``halved``: the same of every other
    value; ``signed``: of all x between zero or the extrema. ``ort``: counts, edges, minimum,
    maximum and threshold over 2,048 bins of both signs. ``n_values``: in the row."""

    name: str
    density: Density
    channels: tuple[Density, ...]
    linear: dict[int, NDArray[np.float64]]
    halved: dict[int, NDArray[np.float64]]
    signed: dict[int, NDArray[np.float64]]
    ort: OrtHistogram
    n_values: int


def collect_rows(assets: Path, folder: Path, n_rows: int, say: Callable[[str], None]) -> list[Row]:
    """``n_rows`` rows, of all models in turn and one block of samples after the other."""
    subjects = []
    for case in _cases(assets, folder, say):
        subjects.append((case.name, Subject(case, _n_samples(case))))
        say(f"loaded {case.name}")
    rows: list[Row] = []
    block = 0
    while len(rows) < n_rows:
        before = len(rows)
        for name, subject in subjects:
            keys = subject.source.keys()
            part = keys[block * BLOCK_SAMPLES : (block + 1) * BLOCK_SAMPLES]
            if part:
                rows += _rows(f"{name}, block {block}", subject, part)
        block += 1
        say(f"{min(len(rows), n_rows)} of {n_rows} rows")
        if len(rows) == before:
            break
    return rows[:n_rows]


def _n_samples(case: Case) -> int:
    return 96 if case.name in DEMOS else 32


def _cases(assets: Path, folder: Path, say: Callable[[str], None]) -> Iterator[Case]:
    for name, make in CASES.items():
        case = make(assets, folder, 32)
        if case is None:
            say(f"{name} is absent: rows of the others take its place")
        else:
            yield case
    images = np.load(demo_file("digits.npz"))["calibration_images"]
    samples = folder / "digits_x.npz"
    np.savez(samples, x=images)
    for name in DEMOS:
        yield Case(
            name=name,
            model=str(demo_file(f"{name}.onnx")),
            samples=str(samples),
            input_name="images",
            scale=1 / 16,
            mean=(0.3,),
            std=(0.37,),
        )


def _rows(label: str, subject: Subject, keys: list[str]) -> Iterator[Row]:
    """The rows of one block: every tensor that held more than one value."""
    taps = subject.taps()
    axes = channel_axes(subject.graph, taps)
    session = subject.tapped_session(optimized=False)
    names = [point.output for point in taps.points if not point.is_input]
    values: dict[str, list[NDArray[np.float32]]] = {tensor: [] for tensor in taps.tensors}
    size = subject.case.micro_batch
    for start in range(0, len(keys), size):
        feeds = subject.feeds(keys[start : start + size])
        made = dict(zip(names, run(session, names, feeds), strict=True))
        for point in taps.points:
            found = feeds[point.tensor] if point.is_input else made[point.output]
            values[point.tensor].append(as_float32(found))
    requests = tuple(
        GroupRequest(match=tensor, axis=axis, group_size=1) for tensor, axis in axes.items()
    )
    accumulator = Accumulator(taps.tensors, StatisticsSpec(groups=requests), axes)
    for index, tensor in enumerate(taps.tensors):
        for part in values[tensor]:
            accumulator.add(index, part)
    accumulator.add_samples(len(keys))
    record = accumulator.record()
    for tensor in taps.tensors:
        body = split_sentinels(record.histogram(tensor).finite).body
        raw = np.concatenate([part.ravel() for part in values.pop(tensor)])
        raw = raw[np.isfinite(raw) & (raw >= body.minimum) & (raw <= body.maximum)]
        if body.counts.size < 2 or not raw.size:
            continue
        groups = record.groups(tensor)
        yield Row(
            name=f"{label}, {tensor}",
            density=body,
            channels=group_densities(groups[0], record.channels(tensor)) if groups else (),
            linear=_linear(np.abs(raw), 0.0, float(np.abs(raw).max())),
            halved=_linear(np.abs(raw[::2]), 0.0, float(np.abs(raw).max())),
            signed=_linear(raw, min(float(raw.min()), 0.0), max(float(raw.max()), 0.0)),
            ort=_ort(raw),
            n_values=raw.size,
        )


def _linear(raw: NDArray[np.float32], low: float, high: float) -> dict[int, NDArray[np.float64]]:
    """True linear histograms over ``low..high``, which an earlier pass found: counts by bins."""
    places = (raw.astype(np.float64) - low) / (high - low)
    return {
        n: np.bincount(np.minimum((places * n).astype(np.int64), n - 1), minlength=n).astype(
            np.float64
        )
        for n in LINEAR_BINS
    }


def _ort(raw: NDArray[np.float32]) -> OrtHistogram:
    """What `HistogramCollector.collect_value` makes of one array, with 2,048 bins."""
    threshold = max(abs(float(raw.min())), abs(float(raw.max())))
    counts, edges = np.histogram(raw, 2048, range=(-threshold, threshold))
    return counts, edges.astype(np.float32), raw.min(), raw.max(), np.float32(threshold)
