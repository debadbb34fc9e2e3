"""Micro-batches on the grid that the manifest fixes; shards of whole micro-batches; blocks."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from qdist.data.manifest import SampleEntry, SampleManifest, Shapes, check_unchanged
from qdist.data.source import DataSource, Feeds
from qdist.digest import digest_json
from qdist.errors import ConfigError, DataError


@dataclass(frozen=True, slots=True, kw_only=True)
class MicroBatch:
    """Samples that run through the model together, since all their shapes are equal.

    ``ids`` and ``keys`` are those of the manifest's entries; ``shapes`` are of one sample;
    ``generation`` is the manifest's that all of them belong to.
    """

    ids: tuple[str, ...]
    keys: tuple[str, ...]
    shapes: Shapes
    generation: int

    def __post_init__(self) -> None:
        if not self.ids or len(self.ids) != len(self.keys):
            raise ValueError(f"{len(self.ids)} ids and {len(self.keys)} keys: as many, at least 1")

    def __len__(self) -> int:
        return len(self.ids)

    def load(self, source: DataSource) -> list[Feeds]:
        """The samples' arrays, after proving that each still has its id's content.

        Raises QD306 where a sample changed since the manifest was made.
        """
        for id, key in zip(self.ids, self.keys, strict=True):
            check_unchanged(source, id=id, key=key)
        return [source.load(key) for key in self.keys]


@dataclass(frozen=True, slots=True, kw_only=True)
class Shard:
    """Consecutive micro-batches: the unit of work, and of what is committed to the store.

    ``index`` counts the shards of one cut; `id` says what is in it, whatever the index.
    """

    index: int
    batches: tuple[MicroBatch, ...]

    def __post_init__(self) -> None:
        if not self.batches or self.index < 0:
            raise ValueError(f"shard {self.index} of {len(self.batches)} micro-batches")

    @property
    def id(self) -> str:
        """Hex SHA-256 over the ordered sample ids, micro-batch by micro-batch."""
        return digest_json([batch.ids for batch in self.batches])

    @property
    def n_samples(self) -> int:
        """Samples in all micro-batches."""
        return sum(len(batch) for batch in self.batches)


def micro_batches(
    manifest: SampleManifest, size: int, *, bucketed: bool = False
) -> tuple[MicroBatch, ...]:
    """The grid: up to ``size`` samples of equal shapes within one generation.

    Consecutive samples, or with ``bucketed`` all of a generation that have the same shapes, in
    manifest order; shapes go by their first sample. Absent samples hold their places while the
    grid is laid and are then left out, so only the micro-batches that held them change.

    It depends on the manifest and the settings alone, and what a later generation adds comes
    after. Raises QD104 for a size below 1.
    """
    _check_positive("micro-batch size", size)
    absent = set(manifest.absent)
    batches: list[MicroBatch] = []
    for generation, entries in enumerate(manifest.generations):
        for run in _buckets(entries) if bucketed else _runs(entries):
            for start in range(0, len(run), size):
                part = [entry for entry in run[start : start + size] if entry.id not in absent]
                if part:
                    batches.append(_micro_batch(part, generation))
    return tuple(batches)


def cut_shards(batches: Sequence[MicroBatch], n_per_shard: int) -> tuple[Shard, ...]:
    """All ``batches`` in order, at most ``n_per_shard`` of them in each shard.

    A shard ends with its generation, so that extending the manifest leaves the earlier shards, and
    with them their stored results, as they are. Raises QD104 for a number below 1.
    """
    _check_positive("micro-batches per shard", n_per_shard)
    shards: list[Shard] = []
    held: list[MicroBatch] = []
    for batch in batches:
        if held and (len(held) == n_per_shard or held[-1].generation != batch.generation):
            shards.append(Shard(index=len(shards), batches=tuple(held)))
            held = []
        held.append(batch)
    if held:
        shards.append(Shard(index=len(shards), batches=tuple(held)))
    return tuple(shards)


def stack(samples: Sequence[Feeds]) -> Feeds:
    """The samples' arrays behind a new leading batch axis: n of [..] become one [n, ..].

    Raises QD307, QD303, QD304 where a sample's inputs, shapes or dtypes are not the first one's,
    and `ValueError` without samples.
    """
    if not samples:
        raise ValueError("nothing to stack")
    first = samples[0]
    for position, sample in enumerate(samples):
        if sample.keys() != first.keys():
            raise _unlike("QD307", position, str(sorted(sample)), str(sorted(first)))
        for name, array in sample.items():
            where = f"{position}, input {name}"
            if array.shape != first[name].shape:
                raise _unlike("QD303", where, str(array.shape), str(first[name].shape))
            if array.dtype != first[name].dtype:
                raise _unlike("QD304", where, str(array.dtype), str(first[name].dtype))
    return {name: np.stack([sample[name] for sample in samples]) for name in first}


def equal_blocks(samples: SampleManifest | int, n_blocks: int) -> tuple[range, ...]:
    """Positions of the samples in use, in order, divided into ``n_blocks`` equal blocks.

    ``samples`` is their number, or the manifest whose `SampleManifest.present` they are. Raises
    QD104 for a number of blocks below 1, and QD311 where it does not divide the samples.
    """
    _check_positive("number of blocks", n_blocks)
    n = samples if isinstance(samples, int) else len(samples.present)
    if n < 1 or n % n_blocks:
        fitting = _nearest_divisors(n, n_blocks)
        raise DataError(
            "QD311",
            where="the calibration samples",
            got=f"{n} samples for {n_blocks} equal blocks",
            expected=f"a number of samples that {n_blocks} divides",
            mend=f"use {' or '.join(map(str, fitting))} blocks, or "
            + " or ".join(str(count) for count in _nearest_multiples(n, n_blocks))
            + " samples",
        )
    length = n // n_blocks
    return tuple(range(start, start + length) for start in range(0, n, length))


def _nearest_divisors(n: int, wanted: int) -> list[int]:
    """The divisors of ``n`` next to ``wanted`` on either side; 1 where ``n`` has none."""
    divisors = [count for count in range(1, n + 1) if n % count == 0] or [1]
    below = [count for count in divisors if count <= wanted]
    above = [count for count in divisors if count > wanted]
    return below[-1:] + above[:1]


def _nearest_multiples(n: int, factor: int) -> list[int]:
    below = n // factor * factor
    return [count for count in (below, below + factor) if count]


def _micro_batch(entries: Sequence[SampleEntry], generation: int) -> MicroBatch:
    return MicroBatch(
        ids=tuple(entry.id for entry in entries),
        keys=tuple(entry.key for entry in entries),
        shapes=entries[0].shapes,
        generation=generation,
    )


def _buckets(entries: Sequence[SampleEntry]) -> Iterator[list[SampleEntry]]:
    """Entries of equal shapes, wherever they stand."""
    found: dict[Shapes, list[SampleEntry]] = {}
    for entry in entries:
        found.setdefault(entry.shapes, []).append(entry)
    yield from found.values()


def _runs(entries: Sequence[SampleEntry]) -> Iterator[list[SampleEntry]]:
    """Longest stretches of consecutive entries with equal shapes."""
    run: list[SampleEntry] = []
    for entry in entries:
        if run and run[-1].shapes != entry.shapes:
            yield run
            run = []
        run.append(entry)
    if run:
        yield run


def _check_positive(name: str, value: int) -> None:
    if value < 1:
        raise ConfigError(
            "QD104", where=name, got=str(value), expected="at least 1", mend=f"raise the {name}"
        )


def _unlike(code: str, where: int | str, got: str, expected: str) -> DataError:
    return DataError(
        code,
        where=f"micro-batch, sample {where}",
        got=got,
        expected=f"{expected}, as in the first sample",
        mend="resize or crop to one size, or use a micro-batch size of 1",
    )
