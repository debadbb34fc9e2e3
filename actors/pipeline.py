"""Calibration in stages: each worker holds some of the model's segments, and shards flow through.

One pool for each stage, all served by the driver's one thread. A shard goes from stage to stage;
what a stage leaves for the next lies in the store's place, so that it outlives whoever made it, and
only so many shards are under way at a time. Whatever is lost, a shard goes on from the last stage
whose boundary is still there. Stages whose records are in the store run again where the next one
needs what they hand on, but commit nothing.
"""

from __future__ import annotations

import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import partial
from types import TracebackType
from typing import Any

from actors.events import (
    Completed,
    Duplicated,
    Event,
    Failed,
    Retried,
    WorkerJoined,
    WorkerLost,
)
from actors.failures import all_lost
from actors.nodes import NodeFigures
from actors.pool import WorkerPool
from actors.session import ClusterSpec, count_places, node_resources
from actors.stage import StageWorker
from qdist.calibration import CalibrationJob, Work
from qdist.calibration.boundary import Boundaries
from qdist.calibration.stage import (
    Stage,
    StageAnswer,
    StagedShard,
    StageTask,
    staged,
    stages_of,
)
from qdist.calibration.work import coverage
from qdist.data.source import DataSource
from qdist.errors import ClusterError, StoreError
from qdist.store.protocol import CalibrationStore
from qdist.store.receipt import ShardReceipt

StagePool = WorkerPool[StageTask, StageAnswer]
StageEvent = Event[StageTask, StageAnswer]

_UNDER_WAY = 2
"""Shards under way for each worker: the one it runs, and one that waits behind or before it."""
_POLL_S = 0.2
_LOOK_S = 1.0
_MAX_LOST = 8
_SHORT_OF_WORKERS = ("QD802", "QD804")


@dataclass(frozen=True, slots=True, kw_only=True)
class PipelineProgress:
    """``n_left``: samples not through yet, of those that `Pipeline.measure` was last given."""

    n_left: int
    n_workers: int
    n_retried: int
    message: str
    nodes: tuple[NodeFigures, ...]


@dataclass(slots=True, kw_only=True, eq=False)
class _Track:
    """A shard under way. ``wanted``: by segment, what is still to be committed."""

    staged: StagedShard
    wanted: list[tuple[str, ...]] = field(init=False)
    n_lost: int = 0

    def __post_init__(self) -> None:
        self.wanted = list(self.staged.wanted)

    @property
    def shard_id(self) -> str:
        return self.staged.shard.id

    @property
    def n_batches(self) -> int:
        return len(self.staged.shard.batches)


class Pipeline:
    """Workers that measure the shards of one job, stage by stage; a context manager.

    ``check`` is given the facts of workers that join and raises what is wrong with them; ``tell``
    hears of every event. Entering needs an initialised Ray; workers start with the first work.
    Raises as `WorkerPool`, `ConfigError` QD107 as `stages_of`, `StoreError` QD403 where what
    stages leave for each other keeps getting lost. Used from one thread.

    Where a node is gone, its workers are not waited for: the model is divided among those that the
    other nodes have room for.
    """

    def __init__(
        self,
        job: CalibrationJob,
        source: DataSource,
        store: CalibrationStore,
        cluster: ClusterSpec,
        *,
        check: Callable[[Iterable[Mapping[str, Any]]], None],
        tell: Callable[[PipelineProgress], None],
    ) -> None:
        self._source = source
        self._store = store
        self._cluster = cluster
        self._check = check
        self._tell = tell
        self._n_workers = cluster.n_workers
        self._stages = stages_of(job, self._n_workers)
        self._job = _in_small_shards(job) if all(s.holds for s in self._stages) else job
        self._boundaries = Boundaries(store.location, self._stages[0].plan)
        self._open_pools = ExitStack()
        self._pools: list[StagePool] = []
        self._left_nodes: list[NodeFigures] = []
        self._waiting: deque[_Track] = deque()
        self._under_way: dict[str, _Track] = {}
        self._receipts: list[ShardReceipt] = []
        self._there: Counter[str] = Counter()
        self._n_retried = 0
        self._has_worked = False
        self._looked_at = 0.0

    def __enter__(self) -> Pipeline:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._open_pools.__exit__(kind, error, traceback)
        self._pools = []
        if kind is None:
            # What is left after an error is for the run that goes on from here.
            self._boundaries.sweep()

    def measure(self, work: Work) -> list[ShardReceipt]:
        """All of ``work``; the receipts of what was committed."""
        self._waiting = deque(_Track(staged=one) for one in staged(self._job, work))
        self._under_way, self._receipts = {}, []
        while True:
            try:
                self._open()
                self._flow()
                return self._receipts
            except ClusterError as error:
                if error.code not in _SHORT_OF_WORKERS or not self._has_worked:
                    raise
                self._divide_anew(error)

    # Workers

    def _open(self) -> None:
        """Start the workers of all stages, and let them load."""
        if self._pools:
            return
        for stage, n_workers in zip(self._stages, self._shares(), strict=True):
            make_worker = partial(
                StageWorker,
                stage,
                self._job.inputs,
                self._source,
                self._store.location,
                self._job.decoder,
            )
            pool = StagePool(
                replace(self._cluster, n_workers=n_workers),
                make_worker,
                name=f"segments-{stage.first}-{stage.stop - 1}",
                duplicate=True,
            )
            self._pools.append(self._open_pools.enter_context(pool))
            self._check(pool.facts)
        # Not in their setup, which would make one stage wait for another's weights.
        for pool in self._pools:
            for _ in range(pool.n_workers_alive):
                pool.submit(StageTask(shard=None))
        self._report("")

    def _shares(self) -> list[int]:
        """Workers by stage: one each, and of more the heaviest stages have more."""
        shares = [1] * len(self._stages)
        for _ in range(self._n_workers - len(shares)):
            weights = [s.weight_bytes / n for s, n in zip(self._stages, shares, strict=True)]
            shares[weights.index(max(weights))] += 1
        return shares

    def _divide_anew(self, error: ClusterError) -> None:
        """Give the model to fewer workers. Raises ``error`` where there is no room for any."""
        self._left_nodes = self._nodes(alive=False)
        self._pools = []
        self._open_pools.close()
        n_places = count_places(self._cluster.needs, node_resources())
        self._n_workers = min(n_places, self._n_workers - 1)
        if self._n_workers < 1:
            raise error
        self._stages = stages_of(self._job, self._n_workers)
        self._forget_committed()
        self._report(
            f"the model is divided among {self._n_workers} workers from here on: {error.got}"
        )

    def _forget_committed(self) -> None:
        """Of shards under way, what was committed by a worker whose answer was lost."""
        receipts = self._store.receipts()
        missing = coverage(self._job, self._store).missing
        for track in list(self._under_way.values()):
            shard = track.staged.shard
            ids = {batch.ids for batch in shard.batches}
            lacking = {t for tensors, batches in missing if ids & set(batches) for t in tensors}
            track.wanted = [
                tuple(tensor for tensor in wanted if tensor in lacking) for wanted in track.wanted
            ]
            self._receipts += [receipt for receipt in receipts if receipt.shard_id == shard.id]
            if not any(track.wanted):
                del self._under_way[track.shard_id]

    # Shards

    def _flow(self) -> None:
        """Until every shard is through."""
        self._look()
        for track in list(self._under_way.values()):
            self._advance(track)
        while self._waiting or self._under_way:
            while self._waiting and len(self._under_way) < _UNDER_WAY * self._n_workers:
                track = self._waiting.popleft()
                self._under_way[track.shard_id] = track
                self._advance(track)
            found = self._next_event()
            self._report(self._take(*found) if found is not None else "")
            self._refuse_too_few()

    def _advance(self, track: _Track) -> None:
        """Give the shard to the stage from which it has to go on."""
        first = next(i for i, wanted in enumerate(track.wanted) if wanted)
        number = next(
            number
            for number, stage in reversed(list(enumerate(self._stages)))
            if stage.first <= first and (not number or self._is_there(track, stage.first))
        )
        stage = self._stages[number]
        task = StageTask(
            shard=track.staged.shard,
            wanted=tuple(t for part in track.wanted[stage.first : stage.stop] for t in part),
            sends=any(track.wanted[stage.stop :]),
        )
        self._pools[number].submit(task)

    def _next_event(self) -> tuple[Stage, StageEvent] | None:
        """The next event of any stage; None where there is none for a moment."""
        for wait_s in (0.0, _POLL_S / len(self._pools)):
            for stage, pool in zip(self._stages, self._pools, strict=True):
                event = pool.next_event(wait_s)
                if event is not None:
                    return stage, event
        return None

    def _take(self, stage: Stage, event: StageEvent) -> str:
        """Do what the event asks for; what to tell of it."""
        match event:
            case Completed():
                self._has_worked = True
                return self._completed(stage, event.task, event.result)
            case Failed():
                raise event.error
            case Retried():
                self._n_retried += 1
                return f"{_what(event.task, stage)} is tried again: {event.reason}"
            case Duplicated():
                return f"{_what(event.task, stage)} runs twice: {event.reason}"
            case WorkerLost():
                return f"worker {event.worker} is gone: {event.reason}"
            case WorkerJoined():
                self._check([event.facts])
                return f"worker {event.worker} joins"

    def _completed(self, stage: Stage, task: StageTask, answer: StageAnswer) -> str:
        if task.shard is None:
            return ""
        track = self._under_way[task.shard.id]
        if answer.is_lost:
            return self._lost(track, stage)
        if answer.receipt is not None:
            self._receipts.append(answer.receipt)
        track.wanted[stage.first : stage.stop] = [()] * (stage.stop - stage.first)
        if task.sends:
            self._there[self._boundaries.name(track.shard_id, stage.stop)] = track.n_batches
        if stage.first:
            self._drop(track, stage.first)
        if any(track.wanted):
            self._advance(track)
        else:
            del self._under_way[track.shard_id]
        return ""

    # Boundaries

    def _look(self) -> None:
        """Note what lies between the stages; nothing where the store cannot be reached now."""
        try:
            self._there = self._boundaries.counts()
        except StoreError:
            self._there = Counter()

    def _is_there(self, track: _Track, cut: int) -> bool:
        return self._there[self._boundaries.name(track.shard_id, cut)] == track.n_batches

    def _drop(self, track: _Track, cut: int) -> None:
        self._boundaries.drop(track.shard_id, cut, track.n_batches)
        self._there.pop(self._boundaries.name(track.shard_id, cut), None)

    def _lost(self, track: _Track, stage: Stage) -> str:
        """The stage lacks what the one before left for it: make it again."""
        track.n_lost += 1
        self._n_retried += 1
        if track.n_lost > _MAX_LOST:
            raise StoreError(
                "QD403",
                where=f"{self._store.location}, folder spool",
                got=f"shard {track.staged.shard.index} before segment {stage.first} lost or "
                f"damaged {track.n_lost} times",
                expected="what one stage leaves there to be there for the next",
                mend="see to the disk, let nothing else clean that folder, or set "
                "cluster.pipeline=false",
            )
        # Damaged ones go: they would be there, and be of no use.
        self._drop(track, stage.first)
        self._look()
        self._advance(track)
        return (
            f"shard {track.staged.shard.index} goes back: what was left before segment "
            f"{stage.first} is lost or damaged"
        )

    # Where it stands

    def _refuse_too_few(self) -> None:
        """Raise QD804 where a stage has nobody and a node is gone."""
        now = time.monotonic()
        starved = [pool for pool in self._pools if pool.n_pending and not pool.n_workers_alive]
        if not starved or now < self._looked_at + _LOOK_S:
            return
        self._looked_at = now
        n_places = count_places(self._cluster.needs, node_resources())
        if n_places < self._n_workers:
            raise all_lost(
                "pipeline",
                replace(self._cluster, n_workers=self._n_workers),
                n_pending=len(self._under_way) + len(self._waiting),
                last_loss=f"the nodes have room for {n_places}",
            )

    def _report(self, message: str) -> None:
        self._tell(
            PipelineProgress(
                n_left=sum(
                    track.staged.shard.n_samples
                    for tracks in (self._waiting, self._under_way.values())
                    for track in tracks
                ),
                n_workers=sum(pool.n_workers_alive for pool in self._pools),
                n_retried=self._n_retried,
                message=message,
                nodes=tuple(self._nodes()),
            )
        )

    def _nodes(self, *, alive: bool = True) -> list[NodeFigures]:
        """What every node has done in all stages, workers of earlier divisions included."""
        found: dict[str, NodeFigures] = {}
        for figures in (*self._left_nodes, *(f for pool in self._pools for f in pool.nodes())):
            before = found.get(figures.node_id)
            now = figures if alive else replace(figures, n_workers=0)
            found[figures.node_id] = now if before is None else _sum(before, now)
        return list(found.values())


def _sum(one: NodeFigures, other: NodeFigures) -> NodeFigures:
    return replace(
        one,
        n_workers=one.n_workers + other.n_workers,
        n_completed=one.n_completed + other.n_completed,
        busy_s=one.busy_s + other.busy_s,
    )


def _in_small_shards(job: CalibrationJob) -> CalibrationJob:
    """The job with shards as of a model in one piece: nobody reads weights again for each."""
    n = job.settings.samples_per_shard(job.n_samples) // job.identity.micro_batch
    return replace(job, n_per_shard=max(1, min(n, job.n_per_shard)))


def _what(task: StageTask, stage: Stage) -> str:
    segments = f"segments {stage.first} to {stage.stop - 1}"
    return (
        f"loading {segments}" if task.shard is None else f"shard {task.shard.index} in {segments}"
    )
