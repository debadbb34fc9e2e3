"""A whole calibration, in one process: what the Ray actors run is made of the same parts.

``prepare`` turns a model and a data source into a job; ``run_shard`` measures one shard of it and
commits the result; ``finish`` merges what was committed; ``recall`` gives what was merged before;
``complete`` measures and merges until nothing is missing.
"""

from __future__ import annotations

import math
import os
import platform
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from onnx import helper

from qdist.data.checks import InputSpec, check_sample, fixed_batch, stackable
from qdist.data.manifest import SampleManifest
from qdist.data.shards import MicroBatch, Shard, cut_shards, micro_batches, stack
from qdist.data.source import DataSource, Feeds
from qdist.digest import digest_json
from qdist.errors import DataError, StoreError
from qdist.model.freeze import FrozenModel
from qdist.model.graph import Graph
from qdist.model.session import Execution, fingerprint
from qdist.model.taps import TapTable, find_taps, tapped_graph
from qdist.stats.observer import Observer, ObserverSpec
from qdist.stats.record import CalibrationRecord, merge_all
from qdist.store.coverage import Coverage, cover
from qdist.store.identity import Identity
from qdist.store.protocol import CalibrationStore
from qdist.store.receipt import ShardReceipt


@dataclass(frozen=True, slots=True, kw_only=True)
class CalibrationSettings:
    """``micro_batch``: samples per run of the model, at most. ``shard_samples``: samples per shard
    (a shard is whole micro-batches); None lets `samples_per_shard` choose. ``taps``: ``all`` or
    ``compute``. ``on_nan``: ``error`` or ``report``."""

    micro_batch: int = 4
    shard_samples: int | None = None
    taps: str = "all"
    on_nan: str = "error"

    def __post_init__(self) -> None:
        if self.micro_batch < 1 or (self.shard_samples is not None and self.shard_samples < 1):
            raise ValueError("micro_batch and shard_samples must be at least 1")

    def samples_per_shard(self, n_samples: int) -> int:
        """Samples per shard of ``n_samples`` in all. It changes no result, only the speed.

        Left to us: 16, few enough that no worker waits long for the last one, but never so few that
        there are more than 512 records to write and to merge.
        """
        return self.shard_samples or max(16, math.ceil(n_samples / 512))


@dataclass(frozen=True, slots=True, kw_only=True)
class CalibrationJob:
    """Everything that is fixed before the first sample runs.

    ``grid``: all micro-batches, in order. ``n_per_shard``: micro-batches per shard.
    """

    identity: Identity
    taps: TapTable
    observer: ObserverSpec
    inputs: tuple[InputSpec, ...]
    manifest: SampleManifest
    grid: tuple[MicroBatch, ...]
    n_per_shard: int
    notes: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Merged:
    """A finished calibration: the record, and how many shards it was merged from."""

    record: CalibrationRecord
    n_shards: int
    notes: tuple[str, ...]


def input_specs(graph: Graph) -> tuple[InputSpec, ...]:
    """The model's inputs as the data checks want them."""
    specs = []
    for name in graph.input_names:
        found = graph.type_of(name)
        element = found.element if found is not None else 1
        dtype = np.dtype(helper.tensor_dtype_to_np_dtype(element)).name
        shape = found.shape if found is not None else None
        specs.append(InputSpec(name=name, dtype=dtype, shape=shape))
    return tuple(specs)


def load_batch(batch: MicroBatch, source: DataSource, inputs: tuple[InputSpec, ...]) -> Feeds:
    """The model's feeds for one micro-batch, checked. Raises `DataError` QD303 to QD307."""
    return _joined(batch.keys, batch.load(source), inputs)


def first_feeds(source: DataSource, inputs: tuple[InputSpec, ...], n: int = 1) -> Feeds:
    """Feeds of the first ``n`` samples, checked, without a manifest."""
    keys = source.keys()[:n]
    return _joined(keys, [source.load(key) for key in keys], inputs)


def batch_size_for(source: DataSource, inputs: tuple[InputSpec, ...], wanted: int) -> int:
    """Samples per run: ``wanted``, unless the model fixes its batch or samples carry their own."""
    key = source.keys()[0]
    feeds = source.load(key)
    check_sample(key, feeds, inputs)
    if not stackable(feeds, inputs):
        return 1
    return fixed_batch(inputs) or wanted


def prepare(
    frozen: FrozenModel,
    source: DataSource,
    settings: CalibrationSettings,
    execution: Execution,
    *,
    graph: Graph | None = None,
    on_progress: Callable[[int, int], None] | None = None,
) -> CalibrationJob:
    """Fix the taps, the manifest and the grid. ``on_progress(done, total)`` counts samples named.

    Raises `DataError` and `ModelError`.
    """
    graph = graph or Graph(frozen, execution)
    inputs = input_specs(graph)
    taps = find_taps(graph, settings.taps)
    size = batch_size_for(source, inputs, settings.micro_batch)
    manifest = SampleManifest.first(source, on_progress=on_progress)
    grid = micro_batches(manifest, size)
    short = [batch for batch in grid if len(batch) != size]
    # Samples that carry their own batch axis run alone, whatever batch the inputs name.
    if short and size > 1 and fixed_batch(inputs) == size:
        raise DataError(
            "QD303",
            where=f"the micro-batch from sample {short[0].keys[0]}",
            got=f"{len(short[0])} samples of {len(manifest)}",
            expected=f"a multiple of {size}, the model's fixed batch",
            mend=f"use a number of samples that {size} divides, or export a dynamic batch axis",
        )
    notes = list(frozen.notes)
    if size != settings.micro_batch:
        notes.append(f"micro-batches of {size}: the model or its samples fix the batch")
    notes.extend(f"sample {key} repeats another and counts once" for key in manifest.duplicates)
    return CalibrationJob(
        identity=Identity(
            model_digest=frozen.digest,
            preprocessing=source.preprocessing(),
            fingerprint=fingerprint(execution),
            micro_batch=size,
            taps=digest_json(list(taps.tensors)),
        ),
        taps=taps,
        observer=ObserverSpec(
            tapped_bytes=tapped_graph(graph, taps),
            data_folder=frozen.data_folder,
            taps=taps,
            execution=execution,
            on_nan=settings.on_nan,
        ),
        inputs=inputs,
        manifest=manifest,
        grid=grid,
        n_per_shard=max(1, settings.samples_per_shard(len(manifest)) // size),
        notes=tuple(notes),
    )


def open_shards(job: CalibrationJob, store: CalibrationStore) -> tuple[Shard, ...]:
    """The shards still to be measured, by the receipts alone: `finish` reads the records."""
    return _left(job, cover([batch.ids for batch in job.grid], store.receipts()))


def run_shard(
    shard: Shard,
    observer: Observer,
    source: DataSource,
    inputs: tuple[InputSpec, ...],
    store: CalibrationStore,
) -> ShardReceipt:
    """Measure one shard and commit its record; the receipt says what was measured.

    Raises `DataError`, `ModelError` and `StoreError`.
    """
    begin = time.perf_counter()
    record = observer.observe(
        [(batch.keys, partial(load_batch, batch, source, inputs)) for batch in shard.batches]
    )
    receipt = ShardReceipt(
        shard_id=shard.id,
        batches=tuple(batch.ids for batch in shard.batches),
        record_digest=record.digest,
        made_by={
            "node": platform.node(),
            "pid": os.getpid(),
            "seconds": round(time.perf_counter() - begin, 4),
        },
    )
    store.commit(receipt, record)
    return receipt


def finish(
    job: CalibrationJob,
    store: CalibrationStore,
    about: dict[str, Any] | None = None,
    *,
    among: Collection[str] | None = None,
    on_progress: Callable[[int, int], None] | None = None,
) -> Merged:
    """Merge everything that covers the job's manifest and make it the store's latest.

    ``among``: ids of the only shards to use. ``on_progress(done, total)`` counts records read.
    Raises QD402 when micro-batches are missing, QD403 when records are damaged, with all of those
    discarded so that `open_shards` names them, QD309 for NaN unless ``on_nan`` is ``report``.
    """
    receipts = [r for r in store.receipts() if among is None or r.shard_id in among]
    covered = cover([batch.ids for batch in job.grid], receipts)
    if covered.missing:
        raise StoreError(
            "QD402",
            where="the calibration store",
            got=f"{len(covered.missing)} of {len(job.grid)} micro-batches missing",
            expected="all of them",
            mend="run qdist calibrate again; it goes on where it stopped",
        )
    damaged: list[StoreError] = []
    records = _sound_records(covered.receipts, store, damaged, on_progress)
    record = merge_all(records, job.taps.tensors)
    if damaged:
        raise damaged[0]
    merged = _merged(job, record, len(covered.receipts))
    details = {
        "manifest": job.manifest.to_json(),
        "manifest_digest": job.manifest.digest,
        "n_samples": record.n_samples,
        "n_shards": merged.n_shards,
        "notes": list(merged.notes),
        **(about or {}),
    }
    store.finish(_merge_name(job), record, details)
    return merged


def recall(job: CalibrationJob, store: CalibrationStore) -> Merged | None:
    """The merge of exactly this job's micro-batches, where the store has it undamaged.

    Makes it the latest and reads no shard's record. Raises QD309 as `finish` does.
    """
    name = _merge_name(job)
    found = store.find(name)
    if found is None:
        return None
    record, about = found
    merged = _merged(job, record, int(about.get("n_shards", 0)))
    store.make_latest(name)
    return merged


def complete(
    job: CalibrationJob,
    store: CalibrationStore,
    measure: Callable[[tuple[Shard, ...]], None],
    *,
    on_merge: Callable[[int, int], None] | None = None,
) -> Merged:
    """``measure`` what the store lacks and merge; again where something was lost on the way.

    A second round has to measure what turned out damaged, here or to another driver. Raises what
    ``measure`` and `finish` raise.
    """
    grid = [batch.ids for batch in job.grid]
    n_rounds = 0
    while True:
        n_rounds += 1
        covered = cover(grid, store.receipts())
        shards = _left(job, covered)
        if shards:
            measure(shards)
        # These fit together. Another driver's, of another size, may not fit with all of them.
        ours = {*(receipt.shard_id for receipt in covered.receipts), *(s.id for s in shards)}
        try:
            return finish(job, store, among=ours, on_progress=on_merge)
        except StoreError as error:
            if error.code not in ("QD402", "QD403") or n_rounds == _ROUNDS:
                raise


def calibrate_here(job: CalibrationJob, source: DataSource, store: CalibrationStore) -> Merged:
    """The whole calibration in this process, without Ray."""

    def measure(shards: tuple[Shard, ...]) -> None:
        observer = Observer(job.observer)
        for shard in shards:
            run_shard(shard, observer, source, job.inputs, store)

    return recall(job, store) or complete(job, store, measure)


_ROUNDS = 3
"""How often `complete` measures. Two do, unless the disk keeps losing what it is given."""


def _left(job: CalibrationJob, covered: Coverage) -> tuple[Shard, ...]:
    missing = set(covered.missing)
    return cut_shards([batch for batch in job.grid if batch.ids in missing], job.n_per_shard)


def _merge_name(job: CalibrationJob) -> str:
    return digest_json([list(batch.ids) for batch in job.grid])


def _merged(job: CalibrationJob, record: CalibrationRecord, n_shards: int) -> Merged:
    """With the notes. Raises QD309."""
    if job.observer.on_nan == "error":
        _refuse_nan(record)
    return Merged(record=record, n_shards=n_shards, notes=(*job.notes, *_nan_notes(record)))


def _sound_records(
    receipts: Sequence[ShardReceipt],
    store: CalibrationStore,
    damaged: list[StoreError],
    on_progress: Callable[[int, int], None] | None,
) -> Iterator[CalibrationRecord]:
    """The records one at a time; damaged ones are discarded, their errors put in ``damaged``."""
    for done, receipt in enumerate(receipts, start=1):
        try:
            yield store.read(receipt)
        except StoreError as error:
            if error.code != "QD403":
                raise
            store.discard(receipt)
            damaged.append(error)
        if on_progress is not None:
            on_progress(done, len(receipts))


def _joined(keys: Sequence[str], samples: Sequence[Feeds], inputs: Sequence[InputSpec]) -> Feeds:
    """Checked samples behind one batch axis; one that carries its own is taken as it is."""
    for key, feeds in zip(keys, samples, strict=True):
        check_sample(key, feeds, inputs)
    lacking = [stackable(feeds, inputs) for feeds in samples]
    if all(lacking):
        return stack(samples)
    if len(samples) > 1:
        raise DataError(
            "QD303",
            where=f"sample {keys[lacking.index(False)]}",
            got=f"a batch axis of its own, in a micro-batch of {len(samples)} samples",
            expected="no batch axis, as in the first sample of the data",
            mend="give all samples without the batch axis, or set calibration.micro_batch=1",
        )
    return samples[0]


def _refuse_nan(record: CalibrationRecord) -> None:
    """Shards that were measured under ``report`` may hold what ``error`` must not pass over."""
    for tensor in record.tensors:
        n_nan = record.histogram(tensor).n_nan
        if n_nan:
            raise DataError(
                "QD309",
                where=f"tensor {tensor}, in samples measured before",
                got=f"{n_nan} NaN",
                expected="finite activations from the float model",
                mend="set calibration.on_nan=report again, or calibrate into another store",
            )


def _nan_notes(record: CalibrationRecord) -> list[str]:
    notes = []
    for tensor in record.tensors:
        histogram = record.histogram(tensor)
        if histogram.n_nan:
            notes.append(f"tensor {tensor} held {histogram.n_nan} NaN, which count for nothing")
        if histogram.n_infinite:
            notes.append(f"tensor {tensor} held {histogram.n_infinite} infinities")
    return notes
