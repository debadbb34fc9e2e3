"""Calibration over a pool: workers pull shards, measure them and commit the records.

Where there are many records, the same workers merge groups of them before the driver merges these.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from types import TracebackType
from typing import Any, TypeAlias

from actors.events import Completed, Duplicated, Failed, Retried, WorkerJoined, WorkerLost
from actors.fingerprints import refuse_mixed
from actors.merging import is_worth_a_pool
from actors.nodes import NodeFigures
from actors.pipeline import Pipeline, PipelineProgress
from actors.pool import WorkerPool
from actors.session import ClusterSpec, ray_session
from actors.worker import CalibrationWorker, MergeWorker, Result, Task
from qdist.calibration import (
    CalibrationJob,
    Merged,
    MergeNode,
    NodeAnswer,
    ShardTask,
    Work,
    complete,
    merge_node,
    recall,
)
from qdist.calibration.blockwise import merge_blocks
from qdist.calibration.converge import converge
from qdist.calibration.stage import stages_of
from qdist.data.source import DataSource
from qdist.stats.observer import ObserverSpec
from qdist.store.protocol import CalibrationStore
from qdist.store.receipt import ShardReceipt
from qdist.threshold.convergence import Convergence


@dataclass(frozen=True, slots=True, kw_only=True)
class CalibrationProgress:
    """Where a run stands. ``resumed``: samples that an earlier run had already measured.

    ``nodes``: what every node has measured so far. ``n_merged`` of ``n_records``: how far the merge
    is that follows the last sample; both 0 before.
    """

    done: int
    total: int
    resumed: int
    n_workers: int
    n_retried: int
    message: str = ""
    n_merged: int = 0
    n_records: int = 0
    nodes: tuple[NodeFigures, ...] = ()


OnProgress = Callable[[CalibrationProgress], None]
Pool: TypeAlias = WorkerPool[Task, Result]


def calibrate(
    job: CalibrationJob,
    source: DataSource,
    store: CalibrationStore,
    cluster: ClusterSpec,
    *,
    early_stop: Convergence | None = None,
    on_progress: OnProgress | None = None,
) -> Merged:
    """Measure what the store lacks and merge. Ray starts only if there is something to measure, or
    very much to merge.

    With ``early_stop`` it ends at the first complete prefix of the samples at which the thresholds
    have converged. Raises what a worker raises, QD407 for a pool of mixed fingerprints, QD801 to
    QD804, and QD107 for a pipeline of a model that cannot be divided.
    """
    if cluster.pipeline:
        stages_of(job, cluster.n_workers)
    with _Run(job, source, store, cluster, on_progress) as run:
        if early_stop is not None:
            return converge(
                job,
                store,
                run.measure,
                early_stop,
                spread=run.merge,
                on_merge=run.merging,
                on_decision=lambda reason: run.report(replace(run.state, message=reason)),
            )
        if job.settings.n_blocks > 1:
            merge_blocks(job, store, run.measure, spread=run.merge)
        merged = recall(job, store)
        if merged is not None:
            run.report(run.state)
            return merged
        return complete(job, store, run.measure, spread=run.merge, on_merge=run.merging)


class _Run:
    """One calibration over a pool, which starts with the first shard and lasts to the end."""

    def __init__(
        self,
        job: CalibrationJob,
        source: DataSource,
        store: CalibrationStore,
        cluster: ClusterSpec,
        on_progress: OnProgress | None,
    ) -> None:
        n = job.n_samples
        self.state = CalibrationProgress(done=n, total=n, resumed=n, n_workers=0, n_retried=0)
        self._job = job
        self._source = source
        self._store = store
        self._cluster = cluster
        self._on_progress = on_progress
        self._session = ExitStack()
        self._open_pool = ExitStack()
        self._has_ray = False
        self._pool: Pool | None = None
        self._observers: tuple[ObserverSpec, ...] = ()
        self._pipeline: Pipeline | None = None

    def __enter__(self) -> _Run:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        try:
            self._open_pool.__exit__(kind, error, traceback)
        finally:
            self._session.__exit__(kind, error, traceback)

    def report(self, now: CalibrationProgress) -> None:
        """Remember where the run stands, and tell the caller."""
        self.state = now
        if self._on_progress is not None:
            self._on_progress(now)

    def merging(self, done: int, n_records: int) -> None:
        """``done`` of ``n_records`` are read."""
        self.report(replace(self.state, message="", n_merged=done, n_records=n_records))

    def measure(self, work: Work) -> list[ShardReceipt]:
        """All of ``work``; the receipts of what was committed."""
        is_staged = self._cluster.pipeline and len(self._job.observer.segments) > 1
        left = work.n_open_samples if is_staged else work.n_samples
        self.report(_before(work, left, self.state))
        if is_staged:
            return self._staged().measure(work)
        pool = self._pool_for(work.observers)
        self.report(replace(self.state, n_workers=pool.n_workers_alive, message=""))
        for task in work.tasks:
            pool.submit(task)
        return self._collect(pool)

    def merge(self, nodes: Sequence[MergeNode]) -> Iterator[NodeAnswer]:
        """Make ``nodes``, over the pool if there is one, or if one is worth it."""
        if self._pool is None and is_worth_a_pool(nodes, self._cluster.n_workers):
            self._close_pools()
            self._start_ray()
            self._open(partial(MergeWorker, self._store.location), "merge")
        if self._pool is None:
            yield from (merge_node(node, self._store) for node in nodes)
            return
        for node in nodes:
            self._pool.submit(node)
        for event in self._completed(self._pool):
            if isinstance(event.result, NodeAnswer):
                yield event.result

    def _pool_for(self, observers: tuple[ObserverSpec, ...]) -> Pool:
        """The pool of the round before, where it measures the same taps."""
        wanted = [spec.taps.tensors for spec in observers]
        if self._pool is not None and [s.taps.tensors for s in self._observers] == wanted:
            return self._pool
        self._close_pools()
        self._start_ray()
        make_worker = partial(
            CalibrationWorker,
            observers,
            self._job.inputs,
            self._source,
            self._store.location,
            self._job.decoder,
        )
        pool = self._open(make_worker, "calibration")
        self._observers = observers
        refuse_mixed(self._job.identity.fingerprint, pool.facts)
        return pool

    def _open(self, make_worker: Callable[[], Any], name: str) -> Pool:
        pool = WorkerPool[Task, Result](self._cluster, make_worker, name=name, duplicate=True)
        self._pool = self._open_pool.enter_context(pool)
        return pool

    def _close_pools(self) -> None:
        """Make room for other workers."""
        self._open_pool.close()
        self._pool, self._observers, self._pipeline = None, (), None

    def _start_ray(self) -> None:
        """Once: it lasts to the end."""
        if self._has_ray:
            return
        self._has_ray = True
        session = self._session.enter_context(ray_session(self._cluster))
        for note in session.notes:
            self.report(replace(self.state, message=f"note: {note}"))
        if self._cluster.pipeline and len(self._job.observer.segments) == 1:
            note = "the whole model fits the memory budget, so that no pipeline is needed"
            self.report(replace(self.state, message=f"note: {note}"))

    def _staged(self) -> Pipeline:
        """The pipeline, which lasts until its workers have to make room."""
        if self._pipeline is None:
            self._close_pools()
            self._start_ray()
            pipeline = Pipeline(
                self._job,
                self._source,
                self._store,
                self._cluster,
                check=partial(refuse_mixed, self._job.identity.fingerprint),
                tell=self._told,
            )
            self._pipeline = self._open_pool.enter_context(pipeline)
        return self._pipeline

    def _told(self, now: PipelineProgress) -> None:
        self.report(
            replace(
                self.state,
                done=self.state.total - now.n_left,
                n_workers=now.n_workers,
                n_retried=now.n_retried,
                message=now.message,
                nodes=now.nodes,
            )
        )

    def _collect(self, pool: Pool) -> list[ShardReceipt]:
        receipts = []
        for event in self._completed(pool):
            if isinstance(event.task, ShardTask) and isinstance(event.result, ShardReceipt):
                receipts.append(event.result)
                done = self.state.done + event.task.shard.n_samples
                nodes = tuple(pool.nodes())
                self._saw(pool, replace(self.state, done=done, nodes=nodes))
        return receipts

    def _completed(self, pool: Pool) -> Iterator[Completed[Task, Result]]:
        """What the workers do until nothing is pending; all else that happens is told."""
        while pool.n_pending:
            event = pool.next_event(0.5)
            message = ""
            n_retried = self.state.n_retried
            match event:
                case Completed():
                    yield event
                    continue
                case Failed():
                    raise event.error
                case Retried():
                    n_retried += 1
                    message = f"{_named(event.task)} is tried again: {event.reason}"
                case Duplicated():
                    message = f"{_named(event.task)} runs twice: {event.reason}"
                case WorkerLost():
                    message = f"worker {event.worker} is gone: {event.reason}"
                case WorkerJoined():
                    if self._observers:
                        refuse_mixed(self._job.identity.fingerprint, [event.facts])
                    message = f"worker {event.worker} joins"
            self._saw(pool, replace(self.state, n_retried=n_retried), message)

    def _saw(self, pool: Pool, now: CalibrationProgress, message: str = "") -> None:
        self.report(replace(now, n_workers=pool.n_workers_alive, message=message))


def _named(task: Task) -> str:
    if isinstance(task, ShardTask):
        return f"shard {task.shard.index}"
    return f"a merge of {len(task.sources)} records"


def _before(work: Work, left: int, state: CalibrationProgress) -> CalibrationProgress:
    """Where a round starts that has ``work`` of ``left`` samples to do. The second one says why
    there is one."""
    done = max(0, work.n_wanted - left)
    return replace(
        state,
        done=done,
        total=done + left,
        resumed=min(state.resumed, done),
        message=f"{left} samples to measure again: their records are damaged or gone"
        if state.n_records and work.is_again
        else "",
        n_merged=0,
        n_records=0,
    )
