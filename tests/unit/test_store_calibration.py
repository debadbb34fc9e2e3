"""A calibration on a store: what is measured, what is measured again, and what is refused."""

from __future__ import annotations

import json
import multiprocessing
import shutil
from multiprocessing.synchronize import Barrier
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from onnx import helper

from qdist.calibration import (
    CalibrationJob,
    Work,
    calibrate_here,
    complete,
    finish,
    input_specs,
    load_batch,
    open_shards,
    open_work,
    prepare,
    run_shard,
)
from qdist.calibration import CalibrationSettings as Settings
from qdist.data.shards import Shard
from qdist.data.source import Feeds
from qdist.errors import DataError, StoreError
from qdist.model.graph import Graph
from qdist.model.session import Execution
from qdist.stats.observer import Observer
from qdist.stats.record import CalibrationRecord
from qdist.stats.spec import StatisticsSpec
from qdist.store.identity import Identity
from qdist.store.receipt import ShardReceipt
from qdist.store.zarr_store import ZarrStore, create_store, open_store
from tests import onnx_models
from tests.onnx_models import EXECUTION, HeldSamples, samples_of
from tests.records import IDENTITY
from tests.store_contract import assert_same, code_of


def folder_of(store: ZarrStore) -> Path:
    return Path(store.location)


def files_of(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def small_job(
    tmp_path: Path, shard_samples: int = 4, name: str = "model.onnx"
) -> tuple[CalibrationJob, HeldSamples]:
    node = helper.make_node("Relu", ["x"], ["y"], name="relu")
    proto = onnx_models.model(
        [node], [onnx_models.value("x", ["n", 3])], [onnx_models.value("y", ["n", 3])]
    )
    frozen = onnx_models.frozen_from(proto, tmp_path / name)
    source = samples_of("x", 3, n=12)
    settings = Settings(micro_batch=2, shard_samples=shard_samples)
    return prepare(frozen, source, settings, EXECUTION), source


def test_only_the_damaged_shard_is_measured_anew(tmp_path: Path) -> None:
    """Damaged before the merge, by a flipped bit in a stored chunk."""
    job, source = small_job(tmp_path)
    sound = calibrate_here(job, source, create_store(tmp_path / "s", job.identity))
    assert sound.n_shards == 3
    store = create_store(tmp_path / "store", job.identity)
    observer = Observer(job.observer)
    for shard in open_shards(job, store):
        run_shard(shard, observer, source, job.inputs, store)
    assert open_shards(job, store) == ()
    damaged = store.receipts()[1]
    file = folder_of(store) / damaged.kept_in
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(bytes(content))
    before = {p: p.stat().st_mtime_ns for p in files_of(folder_of(store) / "records")}
    seen: list[tuple[int, int]] = []
    assert code_of(lambda: finish(job, store, on_progress=lambda *at: seen.append(at))) == "QD403"
    assert seen == [(1, 3), (2, 3), (3, 3)]
    (shard,) = open_shards(job, store)
    assert shard.id == damaged.shard_id
    assert len(store.receipts()) == 2
    merged = calibrate_here(job, source, store)
    assert merged.record.digest == sound.record.digest
    assert_same(store.latest().record, sound.record)
    kept = {p: t for p, t in before.items() if p != file}
    assert {p: p.stat().st_mtime_ns for p in kept} == kept


def test_a_calibration_measures_again_what_it_finds_damaged(tmp_path: Path) -> None:
    """All in one call: the merge is lost, and so is a record that its receipt vouches for."""
    job, source = small_job(tmp_path)
    store = create_store(tmp_path / "store", job.identity)
    merged = calibrate_here(job, source, store)
    shutil.rmtree(folder_of(store) / "merges")
    (folder_of(store) / store.receipts()[0].kept_in).unlink()
    loaded: list[str] = []

    class Watched(HeldSamples):
        def load(self, key: str) -> Feeds:
            loaded.append(key)
            return HeldSamples.load(self, key)

    again = calibrate_here(job, Watched(samples=source.samples), store)
    assert again.record.digest == merged.record.digest
    assert len(loaded) == 4


def test_shards_of_another_driver_that_do_not_fit_are_passed_over(tmp_path: Path) -> None:
    """While this one measures 0-1, 2-3 and 4-5, another commits 1-3, larger, and then dies."""
    job, source = small_job(tmp_path)
    store = create_store(tmp_path / "store", job.identity)
    observer = Observer(job.observer)
    rounds = []

    def measure(work: Work) -> list[ShardReceipt]:
        rounds.append(len(work.tasks))
        other = Shard(index=0, batches=job.grid[1:4])
        shards = [task.shard for task in work.tasks]
        return [
            run_shard(shard, observer, source, job.inputs, store) for shard in (*shards, other)
        ][:-1]

    merged = complete(job, store, measure)
    assert rounds == [3]
    assert (merged.n_shards, merged.record.n_samples) == (3, 12)
    assert len(open_shards(job, store)) == 1, "by size alone, it would not have been enough"


def test_shards_of_several_tap_sets_make_one_calibration(tmp_path: Path) -> None:
    """Samples 0-5 with both tensors, 6-11 with x alone, 6-9 with y alone: 10-11 lack y."""
    job, source = small_job(tmp_path)
    expected = calibrate_here(job, source, create_store(tmp_path / "s", job.identity))
    store = create_store(tmp_path / "store", job.identity)
    for tensors, batches in (
        (("x", "y"), job.grid[:3]),
        (("x",), job.grid[3:]),
        (("y",), job.grid[3:5]),
    ):
        observer = Observer(job.observer_for(tensors))
        run_shard(Shard(index=0, batches=batches), observer, source, job.inputs, store)
    (task,) = open_work(job, store).tasks
    assert task.shard.n_samples == 2
    merged = calibrate_here(job, source, store)
    assert merged.n_shards == 4
    assert_same(merged.record, expected.record)


def test_a_finished_calibration_is_recalled_without_its_shards(tmp_path: Path) -> None:
    job, source = small_job(tmp_path)
    store = create_store(tmp_path / "store", job.identity)
    merged = calibrate_here(job, source, store)
    about = store.latest().about
    assert about["n_samples"] == 12
    assert about["manifest_digest"] == job.manifest.digest
    store.finish("another", CalibrationRecord.empty(job.taps.tensors), {}, job.taps, ())
    shutil.rmtree(folder_of(store) / "records")
    shutil.rmtree(folder_of(store) / "receipts")
    again = calibrate_here(job, HeldSamples(samples=[]), store)
    assert again.record.digest == merged.record.digest
    assert (again.n_shards, again.notes) == (3, merged.notes)
    assert_same(store.latest().record, merged.record)


def test_what_nothing_can_mend_ends(tmp_path: Path) -> None:
    """A store that loses every record: measured a few times, then the damage is reported."""
    job, source = small_job(tmp_path)

    class Losing(ZarrStore):
        def commit(self, receipt: ShardReceipt, record: CalibrationRecord) -> bool:
            first = ZarrStore.commit(self, receipt, record)
            shutil.rmtree(folder_of(self) / "records")
            return first

    store = Losing(create_store(tmp_path / "store", job.identity).place)
    assert code_of(lambda: calibrate_here(job, source, store)) == "QD403"


def test_two_drivers_on_damaged_stores_both_come_to_the_end(tmp_path: Path) -> None:
    """They find it, discard it, measure with shards of two sizes, and merge, at the same time."""
    job, source = small_job(tmp_path)
    n_rounds = 4
    for i in range(n_rounds):
        store = create_store(tmp_path / str(i), job.identity)
        expected = calibrate_here(job, source, store).record.digest
        for folder in ("records", "merges"):
            for path in files_of(folder_of(store) / folder):
                path.write_bytes(b"x")
    context = multiprocessing.get_context("spawn")
    barrier, results = context.Barrier(2), context.SimpleQueue()
    drivers = [
        context.Process(target=_drive, args=(tmp_path, n_rounds, n_samples, barrier, results))
        for n_samples in (4, 6)
    ]
    for driver in drivers:
        driver.start()
    for driver in drivers:
        driver.join(timeout=60)
        assert driver.exitcode == 0
    assert [results.get() for _ in drivers] == [[expected] * n_rounds] * 2


def _drive(folder: Path, n_rounds: int, n_samples: int, barrier: Barrier, results: Any) -> None:
    job, source = small_job(folder, n_samples, name=f"{n_samples}.onnx")
    digests = []
    for i in range(n_rounds):
        store = open_store(folder / str(i))
        barrier.wait(timeout=60)
        digests.append(calibrate_here(job, source, store).record.digest)
    results.put(digests)


# --- samples and shards ----------------------------------------------------------------------


def test_samples_that_differ_in_the_batch_axis_are_not_dropped(tmp_path: Path) -> None:
    """Of several that carry it, in one micro-batch, only the first used to be measured."""
    proto = onnx_models.model(
        [helper.make_node("Relu", ["x"], ["y"], name="relu")],
        [onnx_models.value("x", ["n", 3])],
        [onnx_models.value("y", ["n", 3])],
    )
    frozen = onnx_models.frozen_from(proto, tmp_path / "model.onnx")
    arrays = [feeds["x"] for feeds in samples_of("x", 3, n=4).samples]
    mixed = HeldSamples(samples=[{"x": a if i < 2 else a[None]} for i, a in enumerate(arrays)])
    job = prepare(frozen, mixed, Settings(micro_batch=2), EXECUTION)
    with pytest.raises(DataError, match=r"QD303.*batch axis of its own") as caught:
        load_batch(job.grid[1], mixed, job.inputs)
    assert job.grid[1].keys[0] in caught.value.where
    assert "calibration.micro_batch=1" in caught.value.mend
    alone = prepare(frozen, mixed, Settings(micro_batch=1), EXECUTION)
    store = create_store(tmp_path / "store", alone.identity)
    assert calibrate_here(alone, mixed, store).record.histogram("x").n_values == 4 * 3


def test_an_input_of_unknown_rank_takes_any_sample(tmp_path: Path) -> None:
    proto = onnx_models.model(
        [helper.make_node("Relu", ["x"], ["y"], name="relu")],
        [onnx_models.value("x", None)],
        [onnx_models.value("y", None)],
    )
    frozen = onnx_models.frozen_from(proto, tmp_path / "model.onnx")
    (spec,) = input_specs(Graph(frozen, EXECUTION))
    assert spec.shape is None
    source = samples_of("x", 3, 5, n=6)
    job = prepare(frozen, source, Settings(micro_batch=4), EXECUTION)
    store = create_store(tmp_path / "store", job.identity)
    assert calibrate_here(job, source, store).record.histogram("y").n_values == 6 * 15
    assert load_batch(job.grid[0], source, job.inputs)["x"].shape == (4, 3, 5)


def test_shards_are_sized_by_the_number_of_samples() -> None:
    auto = Settings()
    assert [auto.samples_per_shard(n) for n in (1, 8192, 8193, 100_000)] == [16, 16, 17, 196]
    assert Settings(shard_samples=5).samples_per_shard(100_000) == 5
    assert auto.samples_per_shard(512, n_segments=5) == 64
    assert [auto.samples_per_shard(512, weight_bytes=n) for n in (1 << 20, 1 << 30)] == [64, 16]
    pair = Settings(n_workers=2)
    assert [pair.samples_per_shard(n, weight_bytes=1) for n in (6, 64, 256, 1000)] == [
        3,
        32,
        32,
        64,
    ]
    assert pair.samples_per_shard(64, weight_bytes=1 << 30) == 16
    many = Settings(n_workers=64)
    assert [many.samples_per_shard(n, n_segments=5) for n in (64, 512, 100_000)] == [1, 8, 196]
    with pytest.raises(ValueError, match="at least 1"):
        Settings(shard_samples=0)


def test_finishing_early_says_how_much_is_missing(tmp_path: Path) -> None:
    job, _ = small_job(tmp_path)
    store = create_store(tmp_path / "store", job.identity)
    with pytest.raises(StoreError) as caught:
        finish(job, store)
    assert caught.value.code == "QD402"
    assert "6 of 6 micro-batches missing" in caught.value.got


def test_everything_that_can_change_a_count_changes_the_identity(tmp_path: Path) -> None:
    nodes = [
        helper.make_node("Relu", ["x"], ["y"], name="relu"),
        helper.make_node("MatMul", ["y", "w"], ["z"], name="mm"),
        helper.make_node("Sigmoid", ["z"], ["out"], name="s"),
    ]

    def frozen_with(weight: float) -> Any:
        proto = onnx_models.model(
            nodes,
            [onnx_models.value("x", ["n", 3])],
            [onnx_models.value("out", ["n", 2])],
            {"w": np.full((3, 2), weight, np.float32)},
        )
        return onnx_models.frozen_from(proto, tmp_path / f"{weight}.onnx")

    class Other(HeldSamples):
        def preprocessing(self) -> dict[str, Any]:
            return {"kind": "held", "scale": 2}

    source = samples_of("x", 3, n=8)

    def identity(
        weight: float = 1.0,
        data: HeldSamples = source,
        execution: Execution = EXECUTION,
        **settings: Any,
    ) -> str:
        frozen = frozen_with(weight)
        graph = Graph(frozen, execution)
        job = prepare(frozen, data, Settings(**settings), execution, graph=graph)
        return job.identity.digest

    base = identity()
    assert identity() == base
    assert identity(shard_samples=4) == base
    # Records of several tap sets live in one store: a tap changes no other tensor's bits.
    assert identity(taps="compute") == base
    # The policy decides what is refused, not what is counted.
    assert identity(on_nan="report") == base
    assert identity(data=HeldSamples(samples=source.samples[:5])) == base
    changed = [
        identity(weight=1.5),
        identity(data=Other(samples=source.samples)),
        identity(execution=Execution(n_threads=2)),
        identity(micro_batch=2),
        identity(statistics=StatisticsSpec(n_largest=4)),
    ]
    assert len({base, *changed}) == 1 + len(changed)
    assert Identity.from_json(json.loads(json.dumps(IDENTITY.to_json()))) == IDENTITY
    with pytest.raises(TypeError):
        Identity.from_json({**IDENTITY.to_json(), "later": 1})
