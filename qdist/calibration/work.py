"""What a store lacks for a job."""

from __future__ import annotations

from dataclasses import dataclass

from qdist.calibration.job import CalibrationJob
from qdist.data.shards import MicroBatch, Shard, cut_shards, equal_blocks
from qdist.errors import DataError
from qdist.stats.observer import ObserverSpec
from qdist.store.coverage import Coverage, cover
from qdist.store.protocol import CalibrationStore


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardTask:
    """One shard to measure, with the observer of number ``tap_set``."""

    shard: Shard
    tap_set: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """``tasks`` in the order of the grid; ``observers``: one for each set of taps that is missing
    somewhere. ``receipt_ids``: the finished shards that the tasks complete. ``n_wanted``: samples
    of the job, finished ones included. ``is_again``: a round before has measured all of it, and
    some was lost."""

    observers: tuple[ObserverSpec, ...]
    tasks: tuple[ShardTask, ...]
    receipt_ids: frozenset[str]
    n_wanted: int
    is_again: bool = False

    @property
    def n_samples(self) -> int:
        """Samples in all tasks; one that two tap sets miss counts twice."""
        return sum(task.shard.n_samples for task in self.tasks)

    @property
    def n_open_samples(self) -> int:
        """Samples that miss anything."""
        batches = {batch.ids for task in self.tasks for batch in task.shard.batches}
        return sum(map(len, batches))


def coverage(job: CalibrationJob, store: CalibrationStore) -> Coverage:
    """What the store's receipts answer for; the records are not read."""
    return cover([batch.ids for batch in job.grid], job.taps.tensors, store.receipts())


def open_work(job: CalibrationJob, store: CalibrationStore) -> Work:
    """The shards still to be measured, each with the taps it lacks."""
    covered = coverage(job, store)
    observers: list[ObserverSpec] = []
    tasks: list[ShardTask] = []
    for tensors, batches in covered.missing:
        wanted = set(batches)
        shards = cut(job, [batch for batch in job.grid if batch.ids in wanted])
        tasks.extend(ShardTask(shard=shard, tap_set=len(observers)) for shard in shards)
        observers.append(job.observer_for(tensors))
    return Work(
        observers=tuple(observers),
        tasks=tuple(tasks),
        receipt_ids=frozenset(receipt.id for receipt, _ in covered.parts),
        n_wanted=job.n_samples,
    )


def open_shards(job: CalibrationJob, store: CalibrationStore) -> tuple[Shard, ...]:
    """The shards still to be measured, whatever they lack."""
    return tuple(task.shard for task in open_work(job, store).tasks)


def cut(job: CalibrationJob, batches: list[MicroBatch]) -> tuple[Shard, ...]:
    """Shards of ``batches``, none across the border of two blocks."""
    shards: list[Shard] = []
    for block in _by_block(job, batches):
        for shard in cut_shards(block, job.n_per_shard):
            shards.append(Shard(index=len(shards), batches=shard.batches))
    return tuple(shards)


def blocks(job: CalibrationJob) -> tuple[tuple[MicroBatch, ...], ...]:
    """The grid in ``n_blocks`` blocks of equally many samples.

    Raises QD311 where the samples, or the micro-batches, do not divide.
    """
    ranges = equal_blocks(job.n_samples, job.settings.n_blocks)
    size = len(ranges[0])
    found: list[tuple[MicroBatch, ...]] = []
    held: list[MicroBatch] = []
    for batch in job.grid:
        held.append(batch)
        n_held = sum(map(len, held))
        if n_held > size:
            raise DataError(
                "QD311",
                where=f"the micro-batch from sample {batch.keys[0]}",
                got=f"{len(batch)} samples across the end of a block of {size}",
                expected="blocks of whole micro-batches",
                mend="choose a calibration.micro_batch that divides the block, such as 1",
            )
        if n_held == size:
            found.append(tuple(held))
            held = []
    return tuple(found)


def _by_block(job: CalibrationJob, batches: list[MicroBatch]) -> list[list[MicroBatch]]:
    if job.settings.n_blocks == 1:
        return [batches] if batches else []
    found = []
    for block in blocks(job):
        ids = {batch.ids for batch in block}
        inside = [batch for batch in batches if batch.ids in ids]
        if inside:
            found.append(inside)
    return found
