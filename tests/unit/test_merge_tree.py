"""Many records merged as a tree: what the store keeps of it, and what is made again."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial, reduce
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from onnx import helper

from qdist.calibration import (
    CalibrationJob,
    MergeNode,
    NodeAnswer,
    calibrate_here,
    complete,
    finish,
    load_phases,
    merge_node,
    open_shards,
    open_work,
    prepare,
    run_shard,
)
from qdist.calibration import CalibrationSettings as Settings
from qdist.calibration.blockwise import block_records
from qdist.calibration.merge import read_and_merge
from qdist.calibration.tree import nodes_of, plan
from qdist.calibration.work import Work
from qdist.model.freeze import FrozenModel
from qdist.stats.merger import Merger
from qdist.stats.observer import Observer
from qdist.stats.record import CalibrationRecord
from qdist.store.coverage import cover
from qdist.store.layout import nodes_document
from qdist.store.portable import export_statistics, import_statistics
from qdist.store.receipt import ShardReceipt
from qdist.store.sweep import sweep
from qdist.store.zarr_store import ZarrStore, create_store, open_store
from qdist.threshold.convergence import Convergence
from tests.onnx_models import EXECUTION, HeldSamples, frozen_from, model, samples_of, value
from tests.records import record_of
from tests.store_contract import code_of

N = 72
"""Samples, each a shard of its own: more than are merged at once."""
SOURCE = samples_of("x", 3, n=N + 4)


@pytest.fixture(scope="module")
def frozen(tmp_path_factory: pytest.TempPathFactory) -> FrozenModel:
    nodes = [helper.make_node("Relu", ["x"], ["y"], name="relu")]
    proto = model(nodes, [value("x", ["n", 3])], [value("y", ["n", 3])])
    return frozen_from(proto, tmp_path_factory.mktemp("m") / "model.onnx")


@pytest.fixture(scope="module")
def made(frozen: FrozenModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store with all records and no merge."""
    job = job_of(frozen)
    store = create_store(tmp_path_factory.mktemp("s") / "store", job.identity)
    observer = Observer(job.observer)
    for shard in open_shards(job, store):
        run_shard(shard, observer, SOURCE, job.inputs, store)
    assert len(store.receipts()) == N
    return Path(store.location)


@pytest.fixture
def store(made: Path, tmp_path: Path) -> ZarrStore:
    shutil.copytree(made, tmp_path / "store")
    return open_store(tmp_path / "store")


def source_of(n: int = N) -> HeldSamples:
    return HeldSamples(samples=SOURCE.samples[:n])


def job_of(
    frozen: FrozenModel, n: int = N, earlier: CalibrationJob | None = None, **settings: Any
) -> CalibrationJob:
    wanted = Settings(micro_batch=1, **{"shard_samples": 1, **settings})
    manifest = None if earlier is None else earlier.manifest
    return prepare(frozen, source_of(n), wanted, EXECUTION, earlier=manifest)


def at_once(job: CalibrationJob) -> str:
    """The digest of all samples measured in one go, without a store."""
    batches = [(batch.keys, partial(load_phases, batch, SOURCE, job.inputs)) for batch in job.grid]
    return Observer(job.observer).observe(batches).digest


class Watched:
    """Makes nodes here, in the opposite order, and notes which."""

    def __init__(self, store: ZarrStore) -> None:
        self.store = store
        self.levels: list[list[str]] = []

    def __call__(self, nodes: Sequence[MergeNode]) -> Iterator[NodeAnswer]:
        self.levels.append([node.name for node in nodes])
        return (merge_node(node, self.store) for node in reversed(nodes))

    @property
    def names(self) -> set[str]:
        return {name for level in self.levels for name in level}


def completed(job: CalibrationJob, store: ZarrStore, spread: Watched | None = None) -> str:
    """The digest of the job's statistics, with what is missing measured here."""

    def measure(work: Work) -> list[ShardReceipt]:
        return [
            run_shard(task.shard, Observer(work.observers[task.tap_set]), SOURCE, job.inputs, store)
            for task in work.tasks
        ]

    return complete(job, store, measure, spread=spread).record.digest


def forget_merges(store: ZarrStore) -> None:
    for folder in ("finished", "merges"):
        shutil.rmtree(Path(store.location) / folder)


def files(store: ZarrStore, folder: str) -> list[Path]:
    return sorted((Path(store.location) / folder).iterdir())


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(bytes(content))


def test_a_tree_gives_the_same_bits_and_is_kept(frozen: FrozenModel, store: ZarrStore) -> None:
    job = job_of(frozen)
    spread = Watched(store)
    seen: list[tuple[int, int]] = []
    merged = finish(job, store, spread=spread, on_progress=lambda *at: seen.append(at))
    assert merged.record.digest == at_once(job)
    assert (merged.n_shards, merged.record.n_samples) == (N, N)
    # 64 of the 72 are in four groups of sixteen, the others in one.
    assert [len(level) for level in spread.levels] == [5]
    assert store.nodes() == spread.names
    assert sorted(done for done, _ in seen) == [done for done, _ in seen]
    assert seen[-1] == (N, N)
    assert {total for _, total in seen} == {N}
    # All is in the nodes: another merge reads no record.
    forget_merges(store)
    shutil.rmtree(Path(store.location) / "records")
    again = Watched(store)
    assert completed(job, store, again) == merged.record.digest
    assert again.levels == []


def test_one_process_keeps_the_same_tree(frozen: FrozenModel, store: ZarrStore) -> None:
    job = job_of(frozen)
    spread = Watched(store)
    finish(job, store, spread=spread)
    shutil.rmtree(Path(store.location) / "nodes")
    forget_merges(store)
    merged = calibrate_here(job, source_of(), store)
    assert merged.record.digest == at_once(job)
    assert store.nodes() == spread.names


def test_few_records_keep_no_nodes(frozen: FrozenModel, store: ZarrStore) -> None:
    spread = Watched(store)
    assert completed(job_of(frozen, 32), store, spread) == at_once(job_of(frozen, 32))
    assert (spread.levels, store.nodes()) == ([], frozenset())
    assert store.document(nodes_document(store.finished()[0])) is None


def test_more_and_fewer_samples_change_few_nodes(frozen: FrozenModel, store: ZarrStore) -> None:
    job = job_of(frozen)
    first = Watched(store)
    assert completed(job, store, first) == at_once(job)
    more = job_of(frozen, N + 1, earlier=job)
    second = Watched(store)
    assert completed(more, store, second) == at_once(more)
    assert [len(level) for level in second.levels] == [1]
    # Without sample 3; the others keep their places.
    less = replace(more, grid=(*more.grid[:3], *more.grid[4:]))
    third = Watched(store)
    assert completed(less, store, third) == at_once(less)
    assert [len(level) for level in third.levels] == [1]
    assert not first.names & second.names
    assert not (first.names | second.names) & third.names


def test_a_damaged_node_is_made_again(frozen: FrozenModel, store: ZarrStore) -> None:
    job = job_of(frozen)
    finish(job, store)
    names = store.nodes()
    flip(files(store, "inner")[0])
    files(store, "inner")[1].unlink()
    files(store, "nodes")[2].write_bytes(b"{")
    forget_merges(store)
    assert completed(job, store) == at_once(job)
    assert store.nodes() == names
    kept = {path: path.read_bytes() for path in files(store, "inner")}
    forget_merges(store)
    assert completed(job, store) == at_once(job)
    assert {path: path.read_bytes() for path in files(store, "inner")} == kept


def test_a_damaged_record_is_measured_again_and_found_with_all_others(
    frozen: FrozenModel, store: ZarrStore
) -> None:
    job = job_of(frozen)
    by_place = sorted(store.receipts(), key=lambda r: [b.ids for b in job.grid].index(r.batches[0]))
    # Two of one group, one of another.
    damaged = [by_place[i] for i in (0, 3, 40)]
    for receipt in damaged:
        flip(Path(store.location) / receipt.kept_in)
    assert code_of(lambda: finish(job, store, spread=Watched(store))) == "QD403"
    assert {shard.id for shard in open_shards(job, store)} == {r.shard_id for r in damaged}
    assert len(store.nodes()) == 3
    again = Watched(store)
    assert completed(job, store, again) == at_once(job)
    assert [len(level) for level in again.levels] == [2]
    assert len(store.receipts()) == N


@pytest.mark.parametrize("fan_in", [2, 5])
def test_trees_of_several_levels_are_mended_at_any_of_them(
    fan_in: int, frozen: FrozenModel, store: ZarrStore
) -> None:
    job = job_of(frozen)
    tensors = job.taps.tensors
    covered = cover([batch.ids for batch in job.grid], tensors, store.receipts())
    places = {id: place for place, id in enumerate(job.manifest.ids)}
    parts = plan(covered.parts, places, fan_in=fan_in, few=4)
    spread = Watched(store)
    assert read_and_merge(parts, store, tensors, spread).digest == at_once(job)
    assert len(spread.levels) == {2: 6, 5: 2}[fan_in]
    assert store.nodes() == set(nodes_of(parts)) == spread.names
    # One of each level: what is above a sound node is not looked at, what is below a lost one is.
    for level in spread.levels:
        (Path(store.location) / "nodes" / f"{level[0]}.json").unlink()
    again = Watched(store)
    assert read_and_merge(parts, store, tensors, again).digest == at_once(job)
    assert spread.levels[-1][0] in again.names <= {level[0] for level in spread.levels}
    for file in files(store, "inner"):
        flip(file)
    nothing_missing = Watched(store)
    assert read_and_merge(parts, store, tensors, nothing_missing).digest == at_once(job)
    assert nothing_missing.levels == []


def test_a_worker_that_dies_before_its_node_is_whole(frozen: FrozenModel, store: ZarrStore) -> None:
    """What it leaves counts for nothing, and is swept away."""
    job = job_of(frozen)
    finish(job, store)
    lost = files(store, "nodes")[0]
    lost.unlink()
    (Path(store.location) / "inner" / "0123.partial").write_bytes(b"half")
    forget_merges(store)
    spread = Watched(store)
    assert completed(job, store, spread) == at_once(job)
    assert spread.levels == [[lost.stem]]
    removed = sweep(store, older_than_s=0).removed
    assert [key.split(".")[0] for key in removed] == ["inner/0123", f"inner/{lost.stem}"]


def test_making_a_node_twice_keeps_the_first(frozen: FrozenModel, store: ZarrStore) -> None:
    job = job_of(frozen)

    def twice(nodes: Sequence[MergeNode]) -> Iterator[NodeAnswer]:
        for node in nodes:
            merge_node(node, store)
            yield merge_node(node, open_store(store.location))

    assert finish(job, store, spread=twice).record.digest == at_once(job)
    assert len(files(store, "inner")) == len(files(store, "nodes")) == 5


def test_taps_that_come_later_have_a_tree_of_their_own(frozen: FrozenModel, tmp_path: Path) -> None:
    job = job_of(frozen)
    store = create_store(tmp_path / "s", job.identity)
    few = job_of(frozen, taps=("x",))
    first = Watched(store)
    completed(few, store, first)
    second = Watched(store)
    assert {task.shard.n_samples for task in open_work(job, store).tasks} == {1}
    assert completed(job, store, second) == at_once(job)
    assert [len(level) for level in second.levels] == [5]
    assert not first.names & second.names


def test_tap_sets_that_overlap_in_part_make_one_calibration(
    frozen: FrozenModel, tmp_path: Path
) -> None:
    """x and y of 40 samples, of the others x alone and then y alone."""
    job = job_of(frozen)
    store = create_store(tmp_path / "s", job.identity)
    completed(job.prefix(40), store)
    completed(job_of(frozen, taps=("x",)), store)
    assert completed(job, store) == at_once(job)
    assert sum(receipt.n_samples for receipt in store.receipts()) == 40 + 2 * 32


def test_prefixes_and_blocks_share_their_nodes(frozen: FrozenModel, store: ZarrStore) -> None:
    job = job_of(frozen)
    never = Convergence(tolerance=1e-9, patience=2, method="max")
    assert calibrate_here(job, SOURCE, store, early_stop=never).record.digest == at_once(job)
    # Prefixes of 8, 16 and 32 have no tree; that of 64 has four nodes, which the whole has too.
    assert len(store.nodes()) == 5
    in_blocks = job_of(frozen, n_blocks=2)
    merged = calibrate_here(in_blocks, SOURCE, store)
    assert merged.record.digest == at_once(job)
    blocks = block_records(store, store.latest().name)
    assert [record.digest for record in blocks] == [
        at_once(job.prefix(36)),
        at_once(job.part(job.grid[36:])),
    ]


def test_sweeping_removes_nodes_of_merges_that_are_gone(
    frozen: FrozenModel, store: ZarrStore
) -> None:
    job = job_of(frozen)
    completed(job, store)
    old = store.nodes()
    more = job_of(frozen, N + 1, earlier=job)
    completed(more, store)
    every = store.nodes()
    assert sweep(store).removed == (), "all of it is new"
    assert sweep(store, older_than_s=0).removed == (), "both merges are kept"
    swept = sweep(store, older_than_s=0, keep_merges=1)
    (last,) = store.finished()
    told = store.document(nodes_document(last))
    assert told is not None
    assert store.nodes() == set(told["nodes"])
    gone = old - store.nodes()
    assert every - store.nodes() == gone
    assert len(gone) == 1
    removed = [key.split(".")[0] for key in swept.removed]
    for name in gone:
        assert {f"nodes/{name}", f"inner/{name}"} <= set(removed)
    assert sum(key.startswith("documents/nodes-") for key in removed) == 1
    assert sweep(store, older_than_s=0, keep_merges=1).removed == ()
    # What was swept is made again where it is wanted.
    assert completed(job, store) == at_once(job)
    assert store.nodes() >= gone


def test_an_exported_merge_needs_no_nodes(
    frozen: FrozenModel, store: ZarrStore, tmp_path: Path
) -> None:
    job = job_of(frozen)
    completed(job, store)
    file = export_statistics(store, tmp_path / "statistics.zip")
    other = open_store(import_statistics(file, tmp_path / "other", job.identity).location)
    assert other.latest().record.digest == at_once(job)
    assert other.nodes() == frozenset()
    more = job_of(frozen, N + 2, earlier=job)
    assert completed(more, other) == at_once(more)


def test_records_of_all_kinds_merge_as_if_one_after_the_other() -> None:
    rng = np.random.default_rng(0)
    records = [record_of(int(seed)) for seed in rng.integers(0, 99, 7)]
    expected = reduce(CalibrationRecord.merge, records)
    merger = Merger(expected.tensors)
    for index, record in enumerate(records):
        merger.add(record)
        assert (
            merger.record().digest == reduce(CalibrationRecord.merge, records[: index + 1]).digest
        )
    with pytest.raises(ValueError, match="different tensors"):
        merger.add(record_of(1, tensors=("x", "z")))
    assert merger.record().digest == expected.digest
