from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from qdist.data.arrays import ArraySource
from qdist.data.manifest import SampleEntry, SampleManifest, Shapes
from qdist.data.shards import MicroBatch, Shard, cut_shards, equal_blocks, micro_batches, stack
from qdist.data.source import Feeds
from qdist.errors import ConfigError, DataError


def _manifest(*generations: list[int]) -> SampleManifest:
    """One sample per number, which is its length."""
    entries = []
    n = 0
    for lengths in generations:
        generation = []
        for length in lengths:
            shapes: Shapes = (("ids", (length,)),)
            generation.append(SampleEntry(id=f"{n:064x}", key=f"k{n}", shapes=shapes))
            n += 1
        entries.append(tuple(generation))
    return SampleManifest(preprocessing="{}", generations=tuple(entries))


def _keys(manifest: SampleManifest, size: int) -> list[tuple[str, ...]]:
    return [batch.keys for batch in micro_batches(manifest, size)]


def test_full_micro_batches_then_the_rest() -> None:
    assert _keys(_manifest([8] * 5), 2) == [("k0", "k1"), ("k2", "k3"), ("k4",)]


def test_a_change_of_shape_or_generation_ends_a_micro_batch() -> None:
    manifest = _manifest([8, 8, 8, 4, 4, 8], [8, 8])
    assert _keys(manifest, 2) == [("k0", "k1"), ("k2",), ("k3", "k4"), ("k5",), ("k6", "k7")]
    batches = micro_batches(manifest, 4)
    assert [batch.generation for batch in batches] == [0, 0, 0, 1]
    assert batches[1].shapes == (("ids", (4,)),)


def test_shards_end_with_their_generation_so_that_earlier_ones_stay() -> None:
    before = cut_shards(micro_batches(_manifest([8] * 5), 1), 2)
    after = cut_shards(micro_batches(_manifest([8] * 5, [8] * 3), 1), 2)
    assert [len(shard.batches) for shard in after] == [2, 2, 1, 2, 1]
    assert after[:3] == before
    assert [shard.index for shard in after] == [0, 1, 2, 3, 4]
    assert [shard.n_samples for shard in after] == [2, 2, 1, 2, 1]


def test_a_shard_is_named_by_its_samples_and_how_they_are_batched() -> None:
    manifest = _manifest([8] * 4)
    one, two = (cut_shards(micro_batches(manifest, size), 9)[0] for size in (1, 2))
    assert one.id != two.id
    assert Shard(index=7, batches=one.batches).id == one.id
    assert Shard(index=0, batches=one.batches[::-1]).id != one.id
    assert cut_shards((), 3) == ()


@pytest.mark.parametrize("bad", [0, -1])
def test_numbers_below_one(bad: int) -> None:
    manifest = _manifest([8])
    with pytest.raises(ConfigError, match="QD104"):
        micro_batches(manifest, bad)
    with pytest.raises(ConfigError, match="QD104"):
        cut_shards(micro_batches(manifest, 1), bad)


def test_broken_values_cannot_be_made() -> None:
    with pytest.raises(ValueError, match="0 ids"):
        MicroBatch(ids=(), keys=(), shapes=(), generation=0)
    with pytest.raises(ValueError, match="0 micro-batches"):
        Shard(index=0, batches=())


def test_stack_adds_a_leading_axis() -> None:
    samples: list[Feeds] = [
        {"x": np.full((2, 3), i, np.float32), "s": np.asarray(i, np.int64)} for i in range(4)
    ]
    stacked = stack(samples)
    assert stacked["x"].shape == (4, 2, 3)
    assert stacked["x"].dtype == np.float32
    np.testing.assert_array_equal(stacked["s"], np.arange(4), strict=True)
    np.testing.assert_array_equal(stacked["x"][3], samples[3]["x"], strict=True)


def test_samples_that_do_not_stack() -> None:
    x = np.zeros((2, 3), np.float32)
    with pytest.raises(DataError, match=r"QD303.*sample 1, input x.*\(3, 2\)"):
        stack([{"x": x}, {"x": x.T}])
    with pytest.raises(DataError, match=r"QD304.*float64"):
        stack([{"x": x}, {"x": x.astype(np.float64)}])
    with pytest.raises(DataError, match="QD307"):
        stack([{"x": x}, {"y": x}])
    with pytest.raises(ValueError, match="nothing"):
        stack([])


def test_a_micro_batch_loads_what_the_manifest_saw_or_fails(tmp_path: Path) -> None:
    rows = np.arange(6, dtype=np.float32).reshape(3, 2)
    np.save(tmp_path / "a.npy", rows)
    source = ArraySource(path=tmp_path / "a.npy", inputs={"x": ""})
    batch = micro_batches(SampleManifest.first(source), 3)[0]
    np.testing.assert_array_equal(stack(batch.load(source))["x"], rows, strict=True)
    np.save(tmp_path / "b.npy", rows + 1)
    with pytest.raises(DataError, match=r"QD306.*000000"):
        batch.load(ArraySource(path=tmp_path / "b.npy", inputs={"x": ""}))


def test_buckets_gather_equal_shapes_within_a_generation() -> None:
    manifest = _manifest([8, 4, 8, 4, 8], [4, 8])
    batches = micro_batches(manifest, 2, bucketed=True)
    assert [batch.keys for batch in batches] == [
        ("k0", "k2"),
        ("k4",),
        ("k1", "k3"),
        ("k5",),
        ("k6",),
    ]
    less = replace(manifest, absent=(manifest.ids[2],))
    assert [b.keys for b in micro_batches(less, 2, bucketed=True)][:2] == [("k0",), ("k4",)]


def test_equal_blocks_count_the_samples_in_use() -> None:
    manifest = _manifest([8] * 12)
    assert equal_blocks(manifest, 3) == (range(4), range(4, 8), range(8, 12))
    less = replace(manifest, absent=(manifest.ids[0],))
    assert len(equal_blocks(less, 11)) == 11
    with pytest.raises(DataError, match=r"QD311.*11 samples for 3.*use 1 or 11 blocks, or 9 or 12"):
        equal_blocks(less, 3)
    with pytest.raises(DataError, match=r"QD311.*3 samples for 4.*use 3 blocks, or 4 samples"):
        equal_blocks(3, 4)
    with pytest.raises(DataError, match="QD311"):
        equal_blocks(0, 2)
    with pytest.raises(ConfigError, match="QD104"):
        equal_blocks(4, 0)
