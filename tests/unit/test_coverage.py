"""Which parts of stored records answer for micro-batches and tensors, and how they make one."""

from __future__ import annotations

import zlib
from collections import Counter
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qdist.digest import digest_json
from qdist.stats.record import CalibrationRecord
from qdist.store.coverage import Coverage, Tensors, cover
from qdist.store.gathering import gather
from qdist.store.receipt import Batch, ShardReceipt
from tests.records import measured

GRID: tuple[Batch, ...] = tuple((f"s{2 * i}", f"s{2 * i + 1}") for i in range(8))
ELSEWHERE: Batch = ("s1", "s2")
"""A micro-batch of another grid: the same samples, cut elsewhere."""
TENSORS = ("a", "b", "c", "d")


def receipt(batches: Any, tensors: Any = TENSORS, made_by: int = 0) -> ShardReceipt:
    return ShardReceipt(
        shard_id=digest_json([list(batch) for batch in batches]),
        batches=tuple(batches),
        tensors=tuple(tensors),
        record_digest="",
        made_by={"n": made_by},
    )


def pairs(coverage: Coverage) -> Counter[tuple[Batch, str]]:
    """Every (micro-batch, tensor) that is answered or missing, as often as it is."""
    answered = [(batch, t) for r, own in coverage.parts for batch in r.batches for t in own]
    missing = [(batch, t) for own, batches in coverage.missing for batch in batches for t in own]
    return Counter([*answered, *missing])


def answerable(receipts: list[ShardReceipt]) -> set[tuple[Batch, str]]:
    """What sound receipts on the grid know at all."""
    return {
        (batch, tensor)
        for r in receipts
        if len(set(r.batches)) == len(r.batches) and set(r.batches) <= set(GRID)
        for batch in r.batches
        for tensor in r.tensors
    }


tap_sets = st.lists(st.sampled_from([*TENSORS, "e"]), min_size=1, unique=True).map(tuple)
any_batches = st.lists(st.sampled_from([*GRID, ELSEWHERE]), max_size=5)
any_receipts = st.lists(
    st.builds(receipt, any_batches, tap_sets), max_size=8, unique_by=lambda r: r.id
)
wanted = st.lists(st.sampled_from([*TENSORS, "new"]), max_size=5, unique=True).map(tuple)

nested = st.sampled_from([(i, n) for n in (1, 2, 4, 8) for i in range(0, 8, n)])
nested_receipts = st.lists(
    st.builds(lambda at, taps: receipt(GRID[at[0] : at[0] + at[1]], taps), nested, tap_sets),
    max_size=12,
    unique_by=lambda r: r.id,
)
"""Shards that nest or lie apart, of any tap sets."""


@given(any_receipts, wanted)
def test_parts_and_missing_make_the_grid_and_nothing_twice(
    given_receipts: Any, tensors: Any
) -> None:
    found = pairs(cover(GRID, tensors, given_receipts))
    assert found == Counter((batch, tensor) for batch in GRID for tensor in tensors)


@given(any_receipts, wanted)
def test_parts_take_only_what_their_receipts_hold(given_receipts: Any, tensors: Any) -> None:
    for part, own in cover(GRID, tensors, given_receipts).parts:
        assert own
        assert set(own) <= set(part.tensors)
        assert part in given_receipts


@given(nested_receipts, wanted)
def test_where_shards_nest_nothing_that_is_known_is_missing(
    given_receipts: Any, tensors: Any
) -> None:
    known = answerable(given_receipts)
    for own, batches in cover(GRID, tensors, given_receipts).missing:
        assert not {(batch, tensor) for batch in batches for tensor in own} & known


@given(any_receipts, wanted)
def test_no_receipt_that_still_fits_is_left_aside(given_receipts: Any, tensors: Any) -> None:
    missing = {
        t: set(batches)
        for own, batches in cover(GRID, tensors, given_receipts).missing
        for t in own
    }
    for other in given_receipts:
        batches = set(other.batches)
        if len(batches) == len(other.batches) > 0:
            assert not any(batches <= missing.get(tensor, set()) for tensor in other.tensors)


@given(any_receipts, wanted, st.randoms(use_true_random=False))
def test_the_order_of_the_receipts_does_not_matter(
    given_receipts: Any, tensors: Any, random: Any
) -> None:
    shuffled = list(given_receipts)
    random.shuffle(shuffled)
    assert cover(GRID, tensors, shuffled) == cover(GRID, tensors, given_receipts)


@given(any_receipts, wanted)
def test_missing_blocks_differ_in_their_batches_and_keep_both_orders(
    given_receipts: Any, tensors: Any
) -> None:
    missing = cover(GRID, tensors, given_receipts).missing
    assert len({batches for _, batches in missing}) == len(missing)
    for own, batches in missing:
        assert list(own) == [tensor for tensor in tensors if tensor in own]
        assert list(batches) == [batch for batch in GRID if batch in batches]


@given(nested_receipts, wanted)
def test_measuring_what_is_missing_leaves_nothing_missing(
    given_receipts: Any, tensors: Any
) -> None:
    first = cover(GRID, tensors, given_receipts)
    redone = [receipt(batches, own) for own, batches in first.missing]
    assert cover(GRID, tensors, [*given_receipts, *redone]).missing == ()


def record_for(one: ShardReceipt, tensors: Tensors) -> CalibrationRecord:
    """What the model would give: it depends on the micro-batch and the tensor alone."""
    merged = CalibrationRecord.empty(tensors)
    for batch in one.batches:
        arrays = {
            t: np.random.default_rng(zlib.crc32(f"{batch}{t}".encode())).normal(size=40)
            for t in tensors
        }
        merged = merged.merge(measured(arrays, len(batch)))
    return merged


@settings(max_examples=50)
@given(nested_receipts, wanted.filter(lambda tensors: len(tensors) > 0))
def test_gathered_parts_equal_one_run_over_everything(given_receipts: Any, tensors: Any) -> None:
    coverage = cover(GRID, tensors, given_receipts)
    redone = tuple((receipt(batches, own), own) for own, batches in coverage.missing)
    merged = gather([*coverage.parts, *redone], tensors, record_for)
    expected = record_for(receipt(GRID, tensors), tensors)
    assert merged is not None
    assert merged.tensors == expected.tensors
    assert merged.digest == expected.digest


def test_gathering_reads_everything_once_even_where_something_is_lost() -> None:
    receipts = [receipt(GRID[i : i + 2]) for i in range(0, 8, 2)]
    seen = []

    def read(one: ShardReceipt, own: Tensors) -> CalibrationRecord | None:
        seen.append(one.id)
        return None if one == receipts[1] else record_for(one, own)

    coverage = cover(GRID, TENSORS, receipts)
    assert gather(coverage.parts, TENSORS, read) is None
    assert sorted(seen) == sorted(r.id for r in receipts)


def test_nothing_gathered_is_the_empty_record() -> None:
    merged = gather((), ("a",), record_for)
    assert merged is not None
    assert (merged.tensors, merged.n_samples) == (("a",), 0)


def test_parts_of_other_samples_are_refused() -> None:
    parts = [(receipt(GRID[:2], ["a"]), ("a",)), (receipt(GRID[:3], ["b"]), ("b",))]
    with pytest.raises(ValueError, match="samples"):
        gather(parts, ("a", "b"), record_for)


def test_a_tensor_that_came_later_is_run_alone() -> None:
    """What an older run of fewer taps left is not measured again."""
    shards = [receipt(GRID[i : i + 4], ["a", "b"]) for i in (0, 4)]
    found = cover(GRID, ("a", "c", "b"), shards)
    assert {r.id: own for r, own in found.parts} == {r.id: ("a", "b") for r in shards}
    assert found.missing == ((("c",), GRID),)
    assert found.n_missing_batches == 8


def test_missing_blocks_of_the_same_batches_are_run_together() -> None:
    shards = [receipt(GRID[:4], ["a"]), receipt(GRID[:4], ["b", "c"]), receipt(GRID[:6], ["d"])]
    found = cover(GRID, TENSORS, shards)
    assert found.missing == ((("a", "b", "c"), GRID[4:]), (("d",), GRID[6:]))


def test_the_receipt_that_answers_for_more_tensors_is_read_for_all_of_them() -> None:
    wide, narrow = receipt(GRID, TENSORS), receipt(GRID, ["b"])
    assert cover(GRID, TENSORS, [narrow, wide]).parts == ((wide, TENSORS),)
    assert cover(GRID, ("b",), [narrow, wide]).missing == ()


def test_tap_sets_of_one_shard_complete_each_other() -> None:
    shards = [receipt(GRID, ["b", "a"]), receipt(GRID, ["b", "d"]), receipt(GRID, ["c"])]
    found = cover(GRID, TENSORS, shards)
    assert found.missing == ()
    assert sorted(own for _, own in found.parts if "b" not in own) in (
        [("a",), ("c",)],
        [("c",), ("d",)],
    )


def test_shards_of_another_size_count_as_far_as_they_fit() -> None:
    wide = receipt(GRID[:4])
    narrow = [receipt(GRID[i : i + 2]) for i in (2, 4)]
    found = cover(GRID, TENSORS, [*narrow, wide])
    assert {r.id for r, _ in found.parts} == {wide.id, narrow[1].id}
    assert found.missing == ((TENSORS, GRID[6:]),)


def test_a_shard_with_one_batch_off_the_grid_does_not_count() -> None:
    found = cover(GRID, TENSORS, [receipt([GRID[0], ELSEWHERE])])
    assert found.parts == ()
    assert found.missing == ((TENSORS, GRID),)


def test_a_shard_without_batches_does_not_count() -> None:
    assert cover(GRID, TENSORS, [receipt([])]).parts == ()
    assert cover([], TENSORS, [receipt([])]) == Coverage(parts=(), missing=())


def test_a_receipt_that_names_a_batch_twice_does_not_count() -> None:
    assert cover(GRID, TENSORS, [receipt([GRID[0], GRID[0]])]).parts == ()


def test_a_grid_that_lost_samples_keeps_the_shards_that_still_lie_on_it() -> None:
    shards = [receipt(GRID[2 * i : 2 * i + 2]) for i in range(4)]
    found = cover(GRID[:6], TENSORS, shards)
    assert {r.id for r, _ in found.parts} == {r.id for r in shards[:3]}
    assert found.missing == ()


def test_receipts_of_one_shard_and_other_taps_have_other_ids() -> None:
    one, other = receipt(GRID[:2], ["a", "b"]), receipt(GRID[:2], ["b", "a"])
    assert one.shard_id == other.shard_id
    assert one.id != other.id
    told = one.to_json()
    assert "tensors" not in told
    assert ShardReceipt.from_json(told, ["a", "b"]) == one
    with pytest.raises(ValueError, match="other tensors"):
        ShardReceipt.from_json(told, ["b", "a"])
