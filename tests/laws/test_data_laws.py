"""Laws of samples, manifests, micro-batches and shards."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from qdist.data.manifest import SampleManifest
from qdist.data.positions import kept_positions
from qdist.data.sequence import Trimmed
from qdist.data.shards import cut_shards, equal_blocks, micro_batches
from qdist.data.source import DataSource, Feeds
from qdist.data.tokenizer import Tokenizer
from qdist.digest import digest_arrays
from qdist.errors import DataError


@dataclass
class Memory:
    """A source of arrays in memory: name -> (length, value), in the order of the dict."""

    samples: dict[str, tuple[int, int]]
    setting: int = 0

    def keys(self) -> list[str]:
        return list(self.samples)

    def content_digest(self, key: str) -> str:
        return digest_arrays([("x", self._array(key))])

    def preprocessing(self) -> dict[str, Any]:
        return {"setting": self.setting}

    def load(self, key: str) -> Feeds:
        return {"x": self._array(key)}

    def label(self, key: str) -> NDArray[np.int64] | None:
        return None

    def _array(self, key: str) -> NDArray[Any]:
        length, value = self.samples[key]
        return np.full(length, value)


@dataclass
class Fixed:
    """A source of one sample with these arrays."""

    arrays: Feeds

    def keys(self) -> list[str]:
        return ["a"]

    def content_digest(self, key: str) -> str:
        return digest_arrays(self.arrays.items())

    def preprocessing(self) -> dict[str, Any]:
        return {}

    def load(self, key: str) -> Feeds:
        return dict(self.arrays)

    def label(self, key: str) -> NDArray[np.int64] | None:
        return None


names = st.text("abcdef/", min_size=1, max_size=5)
contents = st.tuples(st.integers(1, 3), st.integers(0, 20))
sets = st.dictionaries(names, contents, min_size=1, max_size=25)
sizes = st.integers(1, 6)


@given(sets)
def test_the_sets_of_these_laws_are_data_sources(samples: dict[str, tuple[int, int]]) -> None:
    assert isinstance(Memory(samples), DataSource)


@given(sets)
def test_every_content_is_there_once_and_every_key_is_accounted_for(
    samples: dict[str, tuple[int, int]],
) -> None:
    manifest = SampleManifest.first(Memory(samples))
    assert len(manifest) == len(set(samples.values()))
    assert sorted([*(entry.key for entry in manifest), *manifest.duplicates]) == sorted(samples)


@given(sets, st.randoms(use_true_random=False), st.integers(0, 9))
def test_an_id_depends_on_content_and_preprocessing_alone(
    samples: dict[str, tuple[int, int]], random: Any, setting: int
) -> None:
    order = list(samples)
    random.shuffle(order)
    renamed = {f"{i}": samples[key] for i, key in enumerate(order)}
    before = SampleManifest.first(Memory(samples))
    after = SampleManifest.first(Memory(renamed))
    assert set(before.ids) == set(after.ids)
    other = SampleManifest.first(Memory(samples, setting=setting))
    assert (other.ids == before.ids) == (setting == 0)


@given(sets, sets, st.booleans())
def test_extending_changes_no_earlier_id_shape_or_place(
    samples: dict[str, tuple[int, int]], more: dict[str, tuple[int, int]], in_front: bool
) -> None:
    first = SampleManifest.first(Memory(samples))
    more = {f"new/{key}": value for key, value in more.items()}
    whole = {**more, **samples} if in_front else {**samples, **more}
    second = first.extend(Memory(whole))
    assert [entry.id for entry in second.generations[0]] == list(first.ids)
    assert [e.shapes for e in second.generations[0]] == [e.shapes for e in first.generations[0]]
    assert set(second.ids) == set(SampleManifest.first(Memory(whole)).ids)
    assert second.absent == ()
    held = {entry.key: whole[entry.key] for entry in second}
    assert len(set(held.values())) == len(second)
    assert second.extend(Memory(whole)) == second


@given(sets, sets)
def test_what_the_source_lost_is_named_absent(
    samples: dict[str, tuple[int, int]], later: dict[str, tuple[int, int]]
) -> None:
    first = SampleManifest.first(Memory(samples))
    second = first.extend(Memory(later))
    there = set(SampleManifest.first(Memory(later)).ids)
    assert set(second.absent) == set(first.ids) - there
    assert set(second.ids) == set(first.ids) | there


@given(sets, sets)
def test_a_manifest_survives_json(
    samples: dict[str, tuple[int, int]], more: dict[str, tuple[int, int]]
) -> None:
    manifest = SampleManifest.first(Memory(samples)).extend(Memory(more))
    again = SampleManifest.from_json(json.loads(json.dumps(manifest.to_json())))
    assert again == manifest
    assert again.digest == manifest.digest


@given(sets, sizes, sizes, sizes)
def test_the_grid_is_the_same_however_shards_are_cut(
    samples: dict[str, tuple[int, int]], size: int, one: int, other: int
) -> None:
    batches = micro_batches(SampleManifest.first(Memory(samples)), size)
    for n_per_shard in (one, other):
        shards = cut_shards(batches, n_per_shard)
        assert tuple(batch for shard in shards for batch in shard.batches) == batches
        assert [shard.index for shard in shards] == list(range(len(shards)))
        assert all(1 <= len(shard.batches) <= n_per_shard for shard in shards)
        assert all(len({batch.generation for batch in shard.batches}) == 1 for shard in shards)
        assert len({shard.id for shard in shards}) == len(shards)


@given(sets, sets, sizes)
def test_micro_batches_hold_every_sample_once_in_order_with_equal_shapes(
    samples: dict[str, tuple[int, int]], more: dict[str, tuple[int, int]], size: int
) -> None:
    manifest = SampleManifest.first(Memory(samples)).extend(Memory(more))
    batches = micro_batches(manifest, size)
    present = tuple(entry.id for entry in manifest.present)
    assert tuple(id for batch in batches for id in batch.ids) == present
    shapes = {entry.id: entry.shapes for entry in manifest}
    assert all(1 <= len(batch) <= size for batch in batches)
    assert all(shapes[id] == batch.shapes for batch in batches for id in batch.ids)


@given(sets, sets, sizes, sizes)
def test_a_new_generation_leaves_earlier_micro_batches_and_shards_as_they_are(
    samples: dict[str, tuple[int, int]],
    more: dict[str, tuple[int, int]],
    size: int,
    n_per_shard: int,
) -> None:
    first = SampleManifest.first(Memory(samples))
    second = first.extend(Memory({**more, **samples}))
    before, after = micro_batches(first, size), micro_batches(second, size)
    assert [batch.ids for batch in after[: len(before)]] == [batch.ids for batch in before]
    old, new = cut_shards(before, n_per_shard), cut_shards(after, n_per_shard)
    assert [shard.id for shard in new[: len(old)]] == [shard.id for shard in old]


@given(sets, sets, sizes, st.booleans())
def test_leaving_samples_out_changes_only_the_micro_batches_that_held_them(
    samples: dict[str, tuple[int, int]],
    more: dict[str, tuple[int, int]],
    size: int,
    bucketed: bool,
) -> None:
    whole = SampleManifest.first(Memory(samples))
    less = whole.extend(Memory(more))
    gone = set(less.absent)
    assert {entry.id for entry in less.present} == set(less.ids) - gone
    assert (less.digest == whole.digest) == (not gone and len(less) == len(whole))
    before = micro_batches(whole, size, bucketed=bucketed)
    after = micro_batches(less, size, bucketed=bucketed)
    expected = [tuple(id for id in batch.ids if id not in gone) for batch in before]
    kept = [batch.ids for batch in after if batch.generation == 0]
    assert kept == [ids for ids in expected if ids]
    # What comes back is used again at its old place.
    back = less.extend(Memory({**{f"back/{k}": v for k, v in samples.items()}, **more}))
    assert back.absent == ()
    again = micro_batches(back, size, bucketed=bucketed)
    assert [batch.ids for batch in again[: len(before)]] == [batch.ids for batch in before]


@given(sets, sets, sizes)
def test_bucketed_micro_batches_hold_every_sample_once_in_as_few_batches_as_shapes_allow(
    samples: dict[str, tuple[int, int]], more: dict[str, tuple[int, int]], size: int
) -> None:
    first = SampleManifest.first(Memory(samples))
    second = first.extend(Memory({**more, **samples}))
    batches = micro_batches(second, size, bucketed=True)
    ids = [id for batch in batches for id in batch.ids]
    assert sorted(ids) == sorted(second.ids)
    place = {id: position for position, id in enumerate(second.ids)}
    shapes = {entry.id: entry.shapes for entry in second}
    for batch in batches:
        assert all(shapes[id] == batch.shapes for id in batch.ids)
        assert [place[id] for id in batch.ids] == sorted(place[id] for id in batch.ids)
    for number, generation in enumerate(second.generations):
        n_of: dict[object, int] = {}
        for entry in generation:
            n_of[entry.shapes] = n_of.get(entry.shapes, 0) + 1
        n_batches = sum(-(-n // size) for n in n_of.values())
        assert sum(batch.generation == number for batch in batches) == n_batches
    before = micro_batches(first, size, bucketed=True)
    assert [batch.ids for batch in batches[: len(before)]] == [batch.ids for batch in before]


@given(st.integers(1, 200), st.integers(1, 60))
def test_equal_blocks_are_all_samples_in_order_or_none(n: int, n_blocks: int) -> None:
    if n % n_blocks == 0:
        blocks = equal_blocks(n, n_blocks)
        assert [position for block in blocks for position in block] == list(range(n))
        assert {len(block) for block in blocks} == {n // n_blocks}
        assert len(blocks) == n_blocks
        return
    with pytest.raises(DataError, match="QD311") as caught:
        equal_blocks(n, n_blocks)
    counts = [int(word) for word in caught.value.mend.replace(",", "").split() if word.isdecimal()]
    assert any(n % count == 0 for count in counts)
    assert any(count % n_blocks == 0 for count in counts)


@given(
    st.lists(st.integers(0, 1), min_size=1, max_size=12),
    st.integers(1, 3),
    st.booleans(),
)
def test_trimming_leaves_what_lies_between_the_first_and_the_last_one(
    mask: list[int], width: int, more: bool
) -> None:
    arrays: Feeds = {"mask": np.array(mask), "x": np.arange(len(mask) * width).reshape(-1, width)}
    if more:
        arrays["square"] = np.arange(len(mask) ** 2).reshape(len(mask), len(mask))
    axes = {"mask": (-1,), "x": (-2,), "square": (-2, -1)}
    source = Trimmed(source=Fixed(arrays), mask_input="mask", axes=axes)
    if not any(mask):
        with pytest.raises(DataError, match="QD306"):
            source.load("a")
        return
    first, last = mask.index(1), len(mask) - 1 - mask[::-1].index(1)
    cut = source.load("a")
    assert cut["mask"].tolist() == mask[first : last + 1]
    assert (cut["x"] == arrays["x"][first : last + 1]).all()
    if more:
        assert (cut["square"] == arrays["square"][first : last + 1, first : last + 1]).all()


@given(
    st.lists(st.lists(st.booleans(), min_size=5, max_size=5), min_size=2, max_size=3),
    st.sampled_from(["rows", "channels last", "scores", "heads", "flat"]),
)
def test_kept_positions_are_those_of_each_sample(rows: list[list[bool]], kind: str) -> None:
    mask = np.array(rows)
    n, length = mask.shape
    shapes: dict[str, tuple[int, ...]] = {
        "rows": (n, length),
        "channels last": (n, length, 7),
        "scores": (n, 4, length, length),
        "heads": (n * 4, length, length),
        "flat": (n * length, 7),
    }
    shape = shapes[kind]
    kept = kept_positions(mask, shape, tensor="t")
    if mask.all():
        assert kept is None
        return
    assert kept is not None
    assert kept.ndim == len(shape)
    whole = np.broadcast_to(kept, shape).reshape(n, -1)
    n_kept = mask.sum(axis=1)
    per_sample = {
        "rows": n_kept,
        "channels last": n_kept * 7,
        "scores": n_kept**2 * 4,
        "heads": n_kept**2 * 4,
        "flat": n_kept * 7,
    }
    assert (whole.sum(axis=1) == per_sample[kind]).all()


FIXED = (b"<unk>", b"\n<s>\n", b"\n</s>\n", *(f"<0x{b:02X}>".encode() for b in range(256)))


@given(
    st.lists(st.text("ab \n", min_size=2, max_size=4), max_size=12),
    st.lists(st.integers(-3, 0), min_size=12, max_size=12),
    st.booleans(),
    st.text("ab \né\U0001f600", max_size=40),
)
def test_encoding_is_lossless_and_the_same_line_by_line(
    merges: list[str], scores: list[int], newline: bool, text: str
) -> None:
    pieces = (*FIXED, *(m.encode() for m in merges), b"a", b" ", *([b"\n"] if newline else []))
    padded = [0.0] * len(FIXED) + [float(score) for score in scores[: len(merges)]]
    padded += [0.0] * (len(pieces) - len(padded))
    tokenizer = Tokenizer(pieces=pieces, scores=tuple(padded))
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    portions = tokenizer.encode_lines(iter(text.splitlines(keepends=True)))
    assert [token for portion in portions for token in portion] == ids
