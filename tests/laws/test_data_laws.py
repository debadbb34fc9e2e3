"""Laws of samples, manifests, micro-batches and shards."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from qdist.data.manifest import SampleManifest
from qdist.data.shards import cut_shards, micro_batches
from qdist.data.source import DataSource, Feeds
from qdist.data.tokenizer import Tokenizer
from qdist.digest import digest_arrays


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
    assert tuple(id for batch in batches for id in batch.ids) == manifest.ids
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
