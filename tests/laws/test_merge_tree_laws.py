"""A merge as a tree, of any shape: the same parts, each once, and the same bits (law 1)."""

from __future__ import annotations

import zlib
from collections import Counter
from functools import cache
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qdist.calibration.tree import (
    MergeNode,
    Part,
    Source,
    clusters,
    missing,
    nodes_of,
    plan,
    receipts_of,
)
from qdist.digest import digest_json
from qdist.stats.merger import merge_all
from qdist.stats.record import CalibrationRecord
from qdist.store.coverage import Tensors, cover
from qdist.store.gathering import gather
from qdist.store.receipt import ShardReceipt
from tests.records import measured

TENSORS = ("a", "b", "c")
GRID = tuple((f"s{i}",) for i in range(48))
PLACES = {f"s{i}": i for i in range(48)}


@cache
def receipt(first: int, n: int = 1, tensors: Tensors = TENSORS) -> ShardReceipt:
    batches = GRID[first : first + n]
    return ShardReceipt(
        shard_id=digest_json([list(batch) for batch in batches]),
        batches=batches,
        tensors=tensors,
        record_digest=f"{first}-{n}",
    )


@cache
def values(batch: tuple[str, ...], tensor: str) -> CalibrationRecord:
    """What the model would give: it depends on the micro-batch and the tensor alone."""
    rng = np.random.default_rng(zlib.crc32(f"{batch}{tensor}".encode()))
    return measured({tensor: rng.normal(size=24)}, 1)


def record_of(source: ShardReceipt, tensors: Tensors) -> CalibrationRecord:
    columns = [merge_all([values(b, t) for b in source.batches], (t,)) for t in tensors]
    return CalibrationRecord.join(columns, tensors)


def evaluated(source: Source, tensors: Tensors) -> CalibrationRecord:
    """As a tree is merged, without a store."""
    if isinstance(source, ShardReceipt):
        return record_of(source, tensors)
    assert tensors == source.tensors
    return merge_all([evaluated(each, tensors) for each in source.sources], tensors)


def leaves(parts: Any) -> Counter[tuple[str, str]]:
    """Every (record, tensor) that is read, as often as it is."""
    return Counter(
        (one.id, tensor) for source, own in parts for one in receipts_of(source) for tensor in own
    )


shards = st.lists(st.integers(1, 5), min_size=1, max_size=24).map(
    lambda sizes: [
        (start, min(n, 48 - start))
        for start, n in zip(np.cumsum([0, *sizes]).tolist(), sizes, strict=False)
        if start < 48
    ]
)
tap_sets = st.sampled_from([(TENSORS,), (("a", "b"), ("c",)), (("c",), ("b", "a"))])
shapes = st.fixed_dictionaries({"fan_in": st.integers(2, 6), "few": st.integers(1, 8)})


@st.composite
def covered(draw: Any) -> tuple[tuple[ShardReceipt, Tensors], ...]:
    """What covers a grid: shards of any sizes, some of them measured with two tap sets."""
    receipts = [
        receipt(first, n, tensors) for first, n in draw(shards) for tensors in draw(tap_sets)
    ]
    grid = [batch for one in receipts for batch in one.batches]
    found = cover(list(dict.fromkeys(grid)), TENSORS, receipts)
    assert not found.missing
    return found.parts


@given(covered(), shapes)
def test_a_plan_reads_every_part_once(parts: Any, shape: dict[str, int]) -> None:
    assert leaves(plan(parts, PLACES, **shape)) == leaves(parts)


@given(covered(), shapes)
@settings(max_examples=40)
def test_a_tree_of_any_shape_gives_the_bits_of_one_merge(parts: Any, shape: dict[str, int]) -> None:
    whole = gather(parts, TENSORS, record_of)
    tree = gather(plan(parts, PLACES, **shape), TENSORS, evaluated)
    assert whole is not None
    assert tree is not None
    assert tree.digest == whole.digest


@given(covered(), shapes, st.randoms(use_true_random=False))
def test_the_order_of_the_parts_does_not_matter(
    parts: Any, shape: dict[str, int], random: Any
) -> None:
    shuffled = list(parts)
    random.shuffle(shuffled)
    assert nodes_of(plan(shuffled, PLACES, **shape)) == nodes_of(plan(parts, PLACES, **shape))


@given(covered(), shapes, st.randoms(use_true_random=False))
def test_what_is_missing_is_made_from_below(parts: Any, shape: dict[str, int], random: Any) -> None:
    planned = plan(parts, PLACES, **shape)
    kept = {name for name in nodes_of(planned) if random.random() < 0.5}
    there = set(kept)
    for level in missing(planned, kept):
        for node in level:
            assert node.name not in there
            below = [one for one in node.sources if isinstance(one, MergeNode)]
            assert {one.name for one in below} <= there
        there |= {node.name for node in level}
    assert {source.name for source, _ in planned if isinstance(source, MergeNode)} <= there
    assert missing(planned, nodes_of(planned)) == []


@given(st.lists(st.integers(0, 500), max_size=60), st.integers(1, 9))
def test_clusters_are_runs_of_places(places: list[int], limit: int) -> None:
    places.sort()
    found = list(clusters(places, limit))
    assert [i for group in found for i in group] == list(range(len(places)))
    for group in found:
        assert len(group) <= limit or len({places[i] for i in group}) == 1
    for one, other in pairwise(found):
        assert places[one[-1]] < places[other[0]]


def many(n: int, *, but: frozenset[int] = frozenset()) -> tuple[Part, ...]:
    made = [
        ShardReceipt(shard_id=f"{i}", batches=((f"s{i}",),), tensors=TENSORS, record_digest=f"{i}")
        for i in range(n)
        if i not in but
    ]
    places = {f"s{i}": i for i in range(n)}
    return plan([(one, TENSORS) for one in made], places)


@pytest.mark.parametrize("n", [33, 100, 500, 1000])
def test_few_nodes_change_with_what_is_added_or_left_out(n: int) -> None:
    before = set(nodes_of(many(n)))
    assert n // 16 <= len(before) <= n / 4
    n_levels = 1 + (n > 256)
    for after in (many(n + 1), many(n, but=frozenset({n // 3}))):
        assert len(set(nodes_of(after)) - before) <= n_levels


def test_few_records_have_no_nodes_and_many_few_at_the_top() -> None:
    assert nodes_of(many(32)) == []
    assert len(many(1000)) <= 16
    with pytest.raises(ValueError, match="2 or more"):
        plan((), {}, fan_in=1)
    with pytest.raises(ValueError, match="without sources"):
        MergeNode.of(TENSORS, ())
