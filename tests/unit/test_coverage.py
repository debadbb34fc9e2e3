"""Which micro-batches finished shards already answer for."""

from __future__ import annotations

from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from qdist.store.coverage import Batch, cover
from qdist.store.receipt import ShardReceipt

GRID: tuple[Batch, ...] = tuple((f"s{2 * i}", f"s{2 * i + 1}") for i in range(8))
ELSEWHERE: Batch = ("s1", "s2")
"""A micro-batch of another grid: the same samples, cut elsewhere."""


def receipt(shard_id: str, batches: Any) -> ShardReceipt:
    return ShardReceipt(shard_id=shard_id, batches=tuple(batches), record_digest="")


batches_of_a_shard = st.lists(st.sampled_from([*GRID, ELSEWHERE]), max_size=5)
receipts = st.lists(batches_of_a_shard, max_size=8).map(
    lambda shards: [receipt(f"{i:02}", batches) for i, batches in enumerate(shards)]
)


@given(receipts)
def test_chosen_shards_never_overlap_and_lie_on_the_grid(given_receipts: Any) -> None:
    covered = [batch for r in cover(GRID, given_receipts).receipts for batch in r.batches]
    assert len(covered) == len(set(covered))
    assert set(covered) <= set(GRID)


@given(receipts)
def test_what_is_covered_and_what_is_missing_make_the_grid(given_receipts: Any) -> None:
    found = cover(GRID, given_receipts)
    covered = {batch for r in found.receipts for batch in r.batches}
    assert found.missing == tuple(batch for batch in GRID if batch not in covered)


@given(receipts, st.randoms(use_true_random=False))
def test_the_order_of_the_receipts_does_not_matter(given_receipts: Any, random: Any) -> None:
    shuffled = list(given_receipts)
    random.shuffle(shuffled)
    assert cover(GRID, shuffled) == cover(GRID, given_receipts)


@given(receipts)
def test_no_shard_that_still_fits_is_left_aside(given_receipts: Any) -> None:
    found = cover(GRID, given_receipts)
    missing = set(found.missing)
    for other in given_receipts:
        if other not in found.receipts and len(set(other.batches)) == len(other.batches) > 0:
            assert not set(other.batches) <= missing


def test_shards_of_another_size_count_as_far_as_they_fit() -> None:
    wide = receipt("b", GRID[:4])
    narrow = [receipt(f"c{i}", GRID[i : i + 2]) for i in (2, 4)]
    found = cover(GRID, [*narrow, wide])
    assert [r.shard_id for r in found.receipts] == ["b", "c4"]
    assert found.missing == GRID[6:]


def test_a_shard_with_one_batch_off_the_grid_does_not_count() -> None:
    found = cover(GRID, [receipt("a", [GRID[0], ELSEWHERE])])
    assert found.receipts == ()
    assert found.missing == GRID


def test_a_shard_without_batches_does_not_count() -> None:
    assert cover(GRID, [receipt("a", [])]).receipts == ()
    assert cover([], [receipt("a", [])]).receipts == ()


def test_a_receipt_that_names_a_batch_twice_does_not_count() -> None:
    assert cover(GRID, [receipt("a", [GRID[0], GRID[0]])]).missing == GRID


def test_a_grid_that_lost_samples_keeps_the_shards_that_still_lie_on_it() -> None:
    shards = [receipt(f"{i}", GRID[2 * i : 2 * i + 2]) for i in range(4)]
    found = cover(GRID[:6], shards)
    assert [r.shard_id for r in found.receipts] == ["0", "1", "2"]
    assert found.missing == ()
