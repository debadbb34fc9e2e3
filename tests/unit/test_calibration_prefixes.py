"""Early stopping and equal blocks: both decided by the samples alone."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from onnx import helper

from qdist.calibration import (
    CalibrationJob,
    CalibrationSettings,
    calibrate_here,
    open_shards,
    prepare,
    run_shard,
)
from qdist.calibration.blockwise import block_records
from qdist.calibration.here import statistics_here
from qdist.calibration.prefix import merge_first, prefix_of
from qdist.calibration.work import Work
from qdist.errors import ConfigError, DataError, StoreError
from qdist.model.graph import Graph
from qdist.plan.choice import LayerChoice
from qdist.plan.planner import Planner, PlanSettings
from qdist.stats.observer import Observer
from qdist.store.layout import HEAD
from qdist.store.place import Place
from qdist.store.receipt import ShardReceipt
from qdist.store.zarr_store import ZarrStore, create_store
from qdist.threshold.clip import Levels
from qdist.threshold.convergence import Convergence
from qdist.threshold.registry import find_threshold
from tests.onnx_models import EXECUTION, HeldSamples, frozen_from, model, normal, samples_of, value

N = 48


@pytest.fixture(scope="module")
def graph(tmp_path_factory: pytest.TempPathFactory) -> Graph:
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["h"], "matmul"),
        helper.make_node("Relu", ["h"], ["y"], "relu"),
    ]
    shape: list[int | str | None] = ["n", 3, 16]
    proto = model(nodes, [value("x", shape)], [value("y", shape)], {"w": normal(16, 16, seed=3)})
    return Graph(frozen_from(proto, tmp_path_factory.mktemp("m") / "model.onnx"), EXECUTION)


def settings_of(**more: object) -> CalibrationSettings:
    return CalibrationSettings(**{"micro_batch": 1, "shard_samples": 4, **more})  # type: ignore[arg-type]


def job_of(graph: Graph, source: HeldSamples, **more: object) -> CalibrationJob:
    return prepare(graph.model, source, settings_of(**more), EXECUTION, graph=graph)


SOURCE = samples_of("x", 3, 16, n=N)
EASY = Convergence(tolerance=0.5, patience=1)


def first(n: int) -> HeldSamples:
    return HeldSamples(samples=SOURCE.samples[:n])


@pytest.mark.parametrize("shard_samples", [1, 3, 8, 40])
def test_it_stops_at_the_same_prefix_for_shards_of_any_size(
    graph: Graph, shard_samples: int, tmp_path: Path
) -> None:
    job = job_of(graph, SOURCE, shard_samples=shard_samples)
    store = create_store(tmp_path / "s", job.identity)
    heard: list[str] = []
    merged = calibrate_here(job, SOURCE, store, early_stop=EASY, on_decision=heard.append)
    assert merged.record.n_samples == 16
    assert len(heard) == 2
    assert f"stopped early after 16 of {N} samples: {heard[-1]}" in merged.notes
    # What was not used was not measured.
    assert sum(receipt.n_samples for receipt in store.receipts()) == 16
    whole = job_of(graph, first(16))
    alone = calibrate_here(whole, first(16), create_store(tmp_path / "alone", whole.identity))
    assert merged.record.digest == alone.record.digest
    assert store.latest().record.digest == merged.record.digest


def test_what_was_measured_beyond_or_before_changes_nothing(graph: Graph, tmp_path: Path) -> None:
    """After an interruption that left the last shards, and after a whole calibration."""
    job = job_of(graph, SOURCE)
    expected = calibrate_here(
        job, SOURCE, create_store(tmp_path / "e", job.identity), early_stop=EASY
    )
    store = create_store(tmp_path / "s", job.identity)
    observer = Observer(job.observer)
    for shard in open_shards(job, store)[-5:]:
        run_shard(shard, observer, SOURCE, job.inputs, store)
    stopped = calibrate_here(job, SOURCE, store, early_stop=EASY)
    assert stopped.record.digest == expected.record.digest
    assert stopped.notes == expected.notes
    whole = calibrate_here(job, SOURCE, store)
    assert whole.record.n_samples == N
    n_receipts = len(store.receipts())
    again = calibrate_here(job, SOURCE, store, early_stop=EASY)
    assert again.record.digest == expected.record.digest
    assert store.latest().record.n_samples == 16
    assert len(store.receipts()) == n_receipts == N // 4


def test_what_never_converges_uses_all(graph: Graph, tmp_path: Path) -> None:
    job = job_of(graph, SOURCE)
    never = Convergence(tolerance=1e-9, patience=2, method="max")
    store = create_store(tmp_path / "s", job.identity)
    merged = calibrate_here(job, SOURCE, store, early_stop=never)
    assert merged.record.n_samples == N
    (note,) = (note for note in merged.notes if "converge" in note)
    assert note.startswith(f"did not converge before the {N} samples ended: ")
    plain = calibrate_here(job, SOURCE, create_store(tmp_path / "p", job.identity))
    assert merged.record.digest == plain.record.digest


def test_convergence_at_the_very_end_is_not_called_early(graph: Graph, tmp_path: Path) -> None:
    source = first(16)
    job = job_of(graph, source)
    store = create_store(tmp_path / "s", job.identity)
    merged = calibrate_here(job, source, store, early_stop=EASY)
    assert merged.record.n_samples == 16
    assert any(note.startswith("converged with all 16 samples") for note in merged.notes)


def test_too_few_samples_to_judge(graph: Graph, tmp_path: Path) -> None:
    source = first(3)
    job = job_of(graph, source)
    store = create_store(tmp_path / "s", job.identity)
    merged = calibrate_here(job, source, store, early_stop=EASY)
    assert merged.record.n_samples == 3
    assert any("one prefix alone shows no change" in note for note in merged.notes)


def test_early_stopping_and_blocks_contradict_each_other(graph: Graph, tmp_path: Path) -> None:
    job = job_of(graph, SOURCE, n_blocks=2)
    store = create_store(tmp_path / "s", job.identity)
    with pytest.raises(ConfigError) as caught:
        calibrate_here(job, SOURCE, store, early_stop=EASY)
    assert caught.value.code == "QD107"


@pytest.mark.parametrize(("n", "n_used"), [(1, 3), (3, 3), (10, 12), (N, N)])
def test_first_samples_are_a_calibration_of_their_own(
    graph: Graph, n: int, n_used: int, tmp_path: Path
) -> None:
    """From shards of any size, and with nothing measured that was measured before."""
    job = job_of(graph, SOURCE, micro_batch=3)
    store = create_store(tmp_path / "s", job.identity)
    whole = calibrate_here(job, SOURCE, store)
    n_receipts = len(store.receipts())
    observer = Observer(job.observer)

    def measure(work: Work) -> list[ShardReceipt]:
        return [run_shard(t.shard, observer, SOURCE, job.inputs, store) for t in work.tasks]

    found = [merge_first(job, store, measure, n) for _ in range(2)]
    alone = job_of(graph, first(n_used), micro_batch=3)
    expected = calibrate_here(alone, first(n_used), create_store(tmp_path / "a", alone.identity))
    assert {merged.record.digest for merged in found} == {expected.record.digest}
    assert store.latest().record.digest == whole.record.digest
    # A prefix that ends within a shard measures what of it is its own, once.
    assert len(store.receipts()) <= n_receipts + 1


class Watched:
    """A place that notes which objects are written."""

    def __init__(self, place: Place) -> None:
        self._place = place
        self.written: list[str] = []

    def put(self, key: str, data: bytes) -> None:
        self.written.append(key)
        self._place.put(key, data)

    def create(self, key: str, data: bytes) -> bool:
        self.written.append(key)
        return self._place.create(key, data)

    def put_in_order(
        self, objects: Sequence[tuple[str, bytes]], *, create_last: bool = False
    ) -> bool:
        self.written += [key for key, _ in objects]
        return self._place.put_in_order(objects, create_last=create_last)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._place, name)


def test_first_samples_leave_the_latest_merge_at_every_moment(graph: Graph, tmp_path: Path) -> None:
    """Also where the calibration stopped early, so that there is no merge of the whole job; and
    whatever moment a process that merges is killed at."""
    job = job_of(graph, SOURCE)
    store = create_store(tmp_path / "s", job.identity)
    stopped = calibrate_here(job, SOURCE, store, early_stop=EASY)
    assert stopped.record.n_samples < N
    watched: Any = Watched(store.place)
    found = [statistics_here(job, SOURCE, ZarrStore(watched), 5).record for _ in range(2)]
    assert {record.n_samples for record in found} == {5}
    assert watched.written
    assert HEAD not in watched.written
    assert store.latest().record.digest == stopped.record.digest


def test_first_samples_are_the_latest_merge_where_there_is_none(
    graph: Graph, tmp_path: Path
) -> None:
    job = job_of(graph, SOURCE)
    store = create_store(tmp_path / "s", job.identity)
    found = statistics_here(job, SOURCE, store, 4)
    assert store.latest().record.digest == found.record.digest


@pytest.mark.parametrize("n", [0, N + 1])
def test_a_prefix_has_at_least_one_sample_and_at_most_all(graph: Graph, n: int) -> None:
    with pytest.raises(DataError) as caught:
        prefix_of(job_of(graph, SOURCE), n)
    assert caught.value.code == "QD311"


@pytest.mark.parametrize(("n_samples", "n_blocks"), [(12, 4), (12, 3), (14, 7), (5, 5)])
def test_blocks_are_the_statistics_of_their_samples(
    graph: Graph, n_samples: int, n_blocks: int, tmp_path: Path
) -> None:
    source = first(n_samples)
    job = job_of(graph, source, n_blocks=n_blocks)
    store = create_store(tmp_path / "s", job.identity)
    merged = calibrate_here(job, source, store)
    plain = job_of(graph, source)
    whole = calibrate_here(plain, source, create_store(tmp_path / "w", plain.identity))
    assert merged.record.digest == whole.record.digest
    latest = store.latest()
    assert latest.record.digest == whole.record.digest
    found = block_records(store, latest.name)
    size = n_samples // n_blocks
    assert [record.n_samples for record in found] == [size] * n_blocks
    for i, record in enumerate(found):
        values = np.stack([f["x"] for f in SOURCE.samples[i * size : (i + 1) * size]])
        histogram = record.histogram("x")
        assert (histogram.minimum, histogram.maximum) == (values.min(), values.max())
        assert histogram.n_values == values.size
    assert sum(receipt.n_samples for receipt in store.receipts()) == n_samples


def test_ranges_are_the_means_of_the_blocks_ranges(graph: Graph, tmp_path: Path) -> None:
    source = first(12)
    job = job_of(graph, source, n_blocks=3)
    store = create_store(tmp_path / "s", job.identity)
    calibrate_here(job, source, store)
    latest = store.latest()
    blocks = block_records(store, latest.name)
    planner = Planner(graph, latest.record, latest.taps, PlanSettings(), blocks)
    choice = LayerChoice(precision="int8", saturation="mse")
    plan = planner.plan({layer.name: choice for layer in planner.layers})
    levels = Levels(low=-128, high=127, symmetric=False)
    each = [find_threshold(b.histogram("x").finite, levels, "mse") for b in blocks]
    (layer,) = (layer for layer in plan.layers if layer.name == "matmul")
    (found,) = (entry for entry in layer.activations if entry.tensor == "x")
    width = np.mean([t.high for t in each]) - np.mean([t.low for t in each])
    assert found.quantizer.scales[0] == pytest.approx(width / 255)
    whole = find_threshold(latest.record.histogram("x").finite, levels, "mse")
    assert found.quantizer.scales[0] != pytest.approx((whole.high - whole.low) / 255)


def test_blocks_after_a_calibration_without_them(graph: Graph, tmp_path: Path) -> None:
    """Shards across a border are of no use to a block; those inside are."""
    source = first(12)
    plain = job_of(graph, source, shard_samples=4)
    store = create_store(tmp_path / "s", plain.identity)
    whole = calibrate_here(plain, source, store)
    with pytest.raises(StoreError) as caught:
        block_records(store, store.latest().name)
    assert caught.value.code == "QD402"
    assert "calibration.blocks" in str(caught.value)
    job = job_of(graph, source, shard_samples=4, n_blocks=2)
    merged = calibrate_here(job, source, store)
    assert merged.record.digest == whole.record.digest
    found = block_records(store, store.latest().name)
    assert [record.n_samples for record in found] == [6, 6]
    other = job_of(graph, source, shard_samples=4, n_blocks=3)
    calibrate_here(other, source, store)
    assert [r.n_samples for r in block_records(store, store.latest().name)] == [4, 4, 4]


def test_samples_that_do_not_divide_are_refused_before_anything_runs(
    graph: Graph, tmp_path: Path
) -> None:
    job = job_of(graph, first(10), n_blocks=4)
    store = create_store(tmp_path / "s", job.identity)
    with pytest.raises(DataError) as caught:
        calibrate_here(job, first(10), store)
    assert caught.value.code == "QD311"
    # 12 samples in blocks of 3, but micro-batches of 2.
    job = job_of(graph, first(12), n_blocks=4, micro_batch=2)
    other = create_store(tmp_path / "o", job.identity)
    with pytest.raises(DataError) as caught:
        calibrate_here(job, first(12), other)
    assert caught.value.code == "QD311"
    assert "micro_batch" in str(caught.value)
    assert store.receipts() == other.receipts() == []
