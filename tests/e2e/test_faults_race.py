"""Two workers that commit the same shards at the same instants: the first of each counts."""

from __future__ import annotations

import multiprocessing
import os
from multiprocessing.queues import Queue
from multiprocessing.synchronize import Barrier
from pathlib import Path
from typing import Any

from qdist.calibration import (
    CalibrationJob,
    CalibrationSettings,
    calibrate_here,
    finish,
    open_shards,
    prepare,
    run_shard,
)
from qdist.data.arrays import ArraySource
from qdist.demo import demo_file
from qdist.model.freeze import freeze
from qdist.model.loading import load_model
from qdist.stats.observer import Observer
from qdist.stats.record import CalibrationRecord
from qdist.store.receipt import ShardReceipt
from qdist.store.zarr_store import ZarrStore, create_store, open_store
from tests.onnx_models import EXECUTION

SOURCE = ArraySource(path=demo_file("digits.npz"), inputs={"images": "calibration_images"})


def job() -> CalibrationJob:
    frozen = freeze(load_model(demo_file("digits_cnn.onnx")))
    settings = CalibrationSettings(micro_batch=2, shard_samples=4)
    return prepare(frozen, SOURCE, settings, EXECUTION)


class InStep:
    """A store that waits for the other worker before each commit, and notes who was first."""

    def __init__(self, store: ZarrStore, barrier: Barrier) -> None:
        self._store = store
        self._barrier = barrier
        self.was_first: list[bool] = []

    def commit(self, receipt: ShardReceipt, record: CalibrationRecord) -> bool:
        self._barrier.wait(60)
        self.was_first.append(self._store.commit(receipt, record))
        return self.was_first[-1]


def work(path: Path, barrier: Barrier, told: Queue[tuple[int, list[bool]]]) -> None:
    made = job()
    store: Any = InStep(open_store(path), barrier)
    observer = Observer(made.observer)
    for shard in open_shards(made, open_store(path)):
        run_shard(shard, observer, SOURCE, made.inputs, store)
    told.put((os.getpid(), store.was_first))


def test_of_two_commits_at_once_one_counts(tmp_path: Path) -> None:
    made = job()
    store = create_store(tmp_path / "raced", made.identity)
    context = multiprocessing.get_context("spawn")
    barrier, told = context.Barrier(2), context.Queue()
    workers = [
        context.Process(target=work, args=(tmp_path / "raced", barrier, told)) for _ in range(2)
    ]
    for worker in workers:
        worker.start()
    answers = dict(told.get(timeout=120) for _ in workers)
    for worker in workers:
        worker.join(60)
        assert worker.exitcode == 0

    first, second = answers.values()
    assert len(first) == len(second) == 40
    assert all(a != b for a, b in zip(first, second, strict=True)), "one of the two, each time"
    receipts = store.receipts()
    assert len(receipts) == 40
    for pid, was_first in answers.items():
        assert sum(receipt.made_by["pid"] == pid for receipt in receipts) == sum(was_first)
    for receipt in receipts:
        assert store.read(receipt).digest == receipt.record_digest
    assert list(tmp_path.rglob("*.partial")) == []

    alone = calibrate_here(made, SOURCE, create_store(tmp_path / "alone", made.identity))
    assert finish(made, store).record.digest == alone.record.digest
