"""The workers that merge, as plain classes, and when they are started for it alone."""

from __future__ import annotations

from pathlib import Path

import pytest

from actors.merging import is_worth_a_pool
from actors.worker import MergeWorker
from qdist.calibration import MergeNode
from qdist.errors import StoreError
from qdist.stats.merger import merge_all
from qdist.store.receipt import ShardReceipt
from qdist.store.zarr_store import ZarrStore, create_store
from tests.records import BATCHES, IDENTITY, TAPS, receipt_of, record_of


@pytest.fixture
def store(tmp_path: Path) -> ZarrStore:
    return create_store(tmp_path / "store", IDENTITY)


def committed(store: ZarrStore, n: int = 3) -> MergeNode:
    for seed in range(n):
        record = record_of(seed)
        store.commit(receipt_of(record, BATCHES[seed]), record)
    return MergeNode.of(TAPS.tensors, store.receipts())


def test_a_worker_merges_a_group_and_keeps_it(store: ZarrStore) -> None:
    node = committed(store)
    worker = MergeWorker(store.location)
    with pytest.raises(RuntimeError, match="before setup"):
        worker.run(node)
    assert worker.setup() == {}
    for _ in range(2):
        answer = worker.run(node)
        assert (answer.n_records, answer.damaged) == (3, ())
    found = store.node(node.name, TAPS.tensors)
    assert found is not None
    expected = merge_all([record_of(seed) for seed in range(3)], TAPS.tensors)
    assert found.digest == expected.digest


def test_a_worker_says_which_records_are_damaged_and_keeps_nothing(store: ZarrStore) -> None:
    node = committed(store)
    for receipt in store.receipts()[:2]:
        store.place.put(receipt.kept_in, b"x")
    worker = MergeWorker(store.location)
    worker.setup()
    answer = worker.run(node)
    assert [error.code for error in answer.damaged] == ["QD403", "QD403"]
    assert len(store.receipts()) == 1
    assert store.nodes() == frozenset()


def test_a_store_that_is_away_is_said_to_be(store: ZarrStore) -> None:
    """So that the pool waits for it."""
    node = committed(store)
    worker = MergeWorker(store.location)
    worker.setup()
    Path(store.location).rename(f"{store.location}-away")
    with pytest.raises(StoreError) as caught:
        worker.run(node)
    assert caught.value.code == "QD408"


def test_workers_are_started_to_merge_much_and_only_if_there_are_several() -> None:
    def nodes(n_records: int, n_tensors: int) -> list[MergeNode]:
        tensors = tuple(f"t{i}" for i in range(n_tensors))
        sources = [
            ShardReceipt(shard_id=f"{i}", batches=((f"{i}",),), tensors=tensors, record_digest="")
            for i in range(16)
        ]
        return [MergeNode.of(tensors, sources)] * (n_records // 16)

    assert not is_worth_a_pool(nodes(512, 300), n_workers=8)
    assert is_worth_a_pool(nodes(512, 2800), n_workers=8)
    assert not is_worth_a_pool(nodes(512, 2800), n_workers=1)
    assert not is_worth_a_pool([], n_workers=8)
