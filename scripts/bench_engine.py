"""Everything of qdist that the calibration benchmark calls, in one place.

The benchmark measures what users get, so it goes through the library's public functions: load,
freeze, `prepare`, `run_shard`, `finish` and, over Ray, `actors.calibrate.calibrate`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
from bench_models import Case
from numpy.typing import NDArray

from qdist.calibration import (
    CalibrationJob,
    CalibrationSettings,
    Merged,
    finish,
    open_shards,
    prepare,
    run_shard,
)
from qdist.calibration.merge import read_and_merge
from qdist.calibration.reading import Spread
from qdist.calibration.tree import plan
from qdist.data.arrays import ArraySource
from qdist.data.preprocess import Preprocess
from qdist.data.shards import Shard, stack
from qdist.data.source import DataSource, Feeds
from qdist.model.freeze import FrozenModel, freeze
from qdist.model.graph import Graph
from qdist.model.loading import load_model
from qdist.model.session import Execution, measuring_session
from qdist.model.taps import TapTable, find_taps, tapped_graph
from qdist.stats.accumulator import Accumulator
from qdist.stats.merger import merge_all
from qdist.stats.observer import Observer
from qdist.stats.record import CalibrationRecord
from qdist.stats.spec import StatisticsSpec
from qdist.store.identity import Identity
from qdist.store.receipt import ShardReceipt
from qdist.store.zarr_store import ZarrStore, create_store, open_store
from qdist.threshold.clip import Levels
from qdist.threshold.registry import find_threshold

EXECUTION = Execution()
"""One thread on the CPU."""

Floats = NDArray[np.float32]


class Subject:
    """A case that is loaded and frozen, with the samples that are to be measured."""

    def __init__(self, case: Case, n_samples: int) -> None:
        self.case = case
        self.source = open_source(case, n_samples)
        self.frozen: FrozenModel = freeze(load_model(case.model), EXECUTION)
        self.graph = Graph(self.frozen, EXECUTION)

    def job(self, taps: str, budget_bytes: int | None = None, n_workers: int = 1) -> CalibrationJob:
        """Everything that is fixed before the first sample runs; the settings are the defaults,
        but for a memory budget. ``n_workers``: by how many the shards are to be shared."""
        settings = CalibrationSettings(
            micro_batch=self.case.micro_batch,
            taps=taps,
            memory_budget_bytes=budget_bytes,
            n_workers=n_workers,
        )
        return prepare(self.frozen, self.source, settings, EXECUTION, graph=self.graph)

    def taps(self) -> TapTable:
        """All distinct activations."""
        return find_taps(self.graph, "all")

    def frozen_session(self) -> ort.InferenceSession:
        """The frozen graph as the engine runs it, without a tap."""
        return measuring_session(self.frozen.graph_bytes, self.frozen.data_folder, EXECUTION)

    def tapped_session(self, *, optimized: bool) -> ort.InferenceSession:
        """The frozen graph that returns every tap, as the engine runs it or with the defaults."""
        tapped = tapped_graph(self.graph, self.taps())
        if not optimized:
            return measuring_session(tapped, self.frozen.data_folder, EXECUTION)
        return ort.InferenceSession(
            tapped, _user_options(self.frozen.data_folder), [EXECUTION.provider]
        )

    def batches(self, size: int | None = None) -> list[list[str]]:
        """The keys of the samples, in micro-batches."""
        keys, size = self.source.keys(), size or self.case.micro_batch
        return [keys[start : start + size] for start in range(0, len(keys), size)]

    def feeds(self, keys: Sequence[str]) -> Feeds:
        """One micro-batch, read and preprocessed."""
        return stack([self.source.load(key) for key in keys])


def open_source(case: Case, n_samples: int) -> DataSource:
    """The first samples of a case, as `qdist calibrate data=arrays` would read them."""
    path = Path(case.samples)
    if case.scale is None:
        preprocess = Preprocess(dtype="keep")
    else:
        preprocess = Preprocess(scale=case.scale, mean=case.mean, std=case.std)
    return ArraySource(
        path=path,
        inputs={case.input_name: "" if path.is_dir() else "x"},
        preprocess=preprocess,
        limit=n_samples,
    )


def user_session(case: Case) -> ort.InferenceSession:
    """What a user has: the given file under ONNX Runtime's defaults, with one thread."""
    return plain_session(case.model)


def plain_session(model: str | bytes) -> ort.InferenceSession:
    """A file or a serialized model under ONNX Runtime's defaults, with one thread."""
    return ort.InferenceSession(model, _user_options(), [EXECUTION.provider])


def _user_options(data_folder: Path | None = None) -> ort.SessionOptions:
    options = ort.SessionOptions()
    options.intra_op_num_threads = EXECUTION.n_threads
    options.log_severity_level = 3
    if data_folder is not None:
        options.add_session_config_entry(
            "session.model_external_initializers_file_folder_path", str(data_folder)
        )
    return options


# --- a calibration in this process ----------------------------------------------------------


class ClockedStore:
    """A store that knows how long its commits took. Everything else is the store's own."""

    def __init__(self, store: ZarrStore) -> None:
        self._store = store
        self.commit_s = 0.0
        self.n_commits = 0

    def commit(self, receipt: ShardReceipt, record: CalibrationRecord) -> bool:
        begin = time.perf_counter()
        try:
            return self._store.commit(receipt, record)
        finally:
            self.commit_s += time.perf_counter() - begin
            self.n_commits += 1

    def __getattr__(self, name: str) -> Any:
        return getattr(self._store, name)


@dataclass(frozen=True, slots=True, kw_only=True)
class Spent:
    """Seconds of one calibration: all of it, of which in commits and in the merge at the end."""

    total_s: float
    commit_s: float
    finish_s: float
    n_shards: int
    merged: Merged


def new_store(path: Path, job: CalibrationJob) -> ZarrStore:
    """An empty store for the job."""
    return create_store(path, job.identity)


def calibrate_once(
    job: CalibrationJob, observer: Observer, source: DataSource, path: Path
) -> Spent:
    """Measure every shard, commit and merge, with an observer that is warm, into a new store."""
    store = ClockedStore(new_store(path, job))
    begin = time.perf_counter()
    for shard in open_shards(job, store):
        run_shard(shard, observer, source, job.inputs, store)
    measured = time.perf_counter()
    merged = finish(job, store)
    end = time.perf_counter()
    return Spent(
        total_s=end - begin,
        commit_s=store.commit_s,
        finish_s=end - measured,
        n_shards=store.n_commits,
        merged=merged,
    )


def shards_of(job: CalibrationJob, path: Path) -> tuple[Shard, ...]:
    """All shards of a job, by a new store at ``path``."""
    return open_shards(job, new_store(path, job))


def run_shards(
    shards: Sequence[Shard],
    job: CalibrationJob,
    observer: Observer,
    source: DataSource,
    location: str,
) -> None:
    """Measure some shards and commit them to the store at ``location``."""
    store = open_store(location)
    for shard in shards:
        run_shard(shard, observer, source, job.inputs, store)


def merge_at(job: CalibrationJob, path: Path) -> Merged:
    """Merge what others have committed."""
    return finish(job, open_store(path))


def merging_s(path: Path, n_times: int) -> float:
    """Seconds to read and merge one record of the store at ``path``, in a merge of ``n_times``
    as many as it holds."""
    store = open_store(path)
    receipts = store.receipts()
    begin = time.perf_counter()
    merge_all((store.read(one) for one in receipts * n_times), receipts[0].tensors)
    return (time.perf_counter() - begin) / len(receipts) / n_times


def store_bytes(path: Path) -> int:
    """Bytes of all files of a store."""
    return sum(file.stat().st_size for file in path.rglob("*") if file.is_file())


def new_observer(job: CalibrationJob) -> Observer:
    """A worker's observer, its session loaded."""
    return Observer(job.observer)


def find_thresholds(
    record: CalibrationRecord, method: str, parameters: Mapping[str, Any] | None = None
) -> int:
    """Find the int8 range of every measured tensor by ``method``; how many there are."""
    symmetric = Levels(low=-127, high=127, symmetric=True)
    for tensor in record.tensors:
        find_threshold(record.histogram(tensor).finite, symmetric, method, parameters)
    return len(record.tensors)


def counter(arrays: Sequence[Floats], *, channels: bool) -> Callable[[], None]:
    """A function that counts every array into statistics of its own: histogram, extrema, largest
    values, value table, and the extrema of its channels where wanted."""
    names = [f"tensor{index}" for index in range(len(arrays))]
    accumulator = Accumulator(names, channel_axes=dict.fromkeys(names, -1) if channels else None)

    def count() -> None:
        for index, array in enumerate(arrays):
            accumulator.add(index, array)

    return count


# --- merging --------------------------------------------------------------------------------


class StoredRecords:
    """Records of made-up activations in a store, counted, committed and read as the engine does."""

    def __init__(self, path: Path, tensors: Sequence[str]) -> None:
        identity = Identity(
            model_digest="0" * 64,
            preprocessing={},
            fingerprint={},
            micro_batch=1,
            statistics=StatisticsSpec().to_json(),
        )
        self._path = path
        self._tensors = tuple(tensors)
        self._store = create_store(path, identity)
        self._receipts: list[ShardReceipt] = []

    def add(self, arrays: Sequence[Floats], n_samples: int) -> None:
        """Count one array per tensor and commit the record as a shard of ``n_samples``."""
        accumulator = Accumulator(self._tensors, channel_axes=dict.fromkeys(self._tensors, -1))
        for index, array in enumerate(arrays):
            accumulator.add(index, array)
        accumulator.add_samples(n_samples)
        record = accumulator.record()
        shard = len(self._receipts)
        receipt = ShardReceipt(
            shard_id=f"{shard:064x}",
            batches=tuple((f"{shard}.{index}",) for index in range(n_samples)),
            tensors=record.tensors,
            record_digest=record.digest,
        )
        self._store.commit(receipt, record)
        self._receipts.append(receipt)

    def read(self, index: int) -> CalibrationRecord:
        """One of the records, from the disk."""
        return self._store.read(self._receipts[index])

    def merge(self, records: Iterable[CalibrationRecord]) -> CalibrationRecord:
        """All of them in one."""
        return merge_all(records, self._tensors)

    def merge_as_tree(self, n_records: int, spread: Spread) -> CalibrationRecord:
        """As a calibration merges ``n_records``, each of which is one of these again and again."""
        kept = self._store.receipts()
        parts = [
            (
                # Other samples, and yet the record that is there.
                replace(one, shard_id=f"{index:064x}", batches=((f"{index}",),) * one.n_samples),
                self._tensors,
            )
            for index, one in ((index, kept[index % len(kept)]) for index in range(n_records))
        ]
        places = {f"{index}": index for index in range(n_records)}
        return read_and_merge(plan(parts, places), self._store, self._tensors, spread)

    @property
    def location(self) -> str:
        """What `open_store` takes."""
        return self._store.location

    def bytes_per_record(self) -> int:
        """Bytes on the disk."""
        return store_bytes(self._path) // len(self._receipts)
