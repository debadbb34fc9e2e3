"""Calibration over a pool: workers pull shards, measure them and commit the records."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from types import TracebackType
from typing import Any

from actors.events import Completed, Duplicated, Failed, Retried, WorkerJoined, WorkerLost
from actors.fingerprints import refuse_mixed
from actors.nodes import NodeFigures
from actors.pipeline import Pipeline, PipelineProgress
from actors.pool import WorkerPool
from actors.session import ClusterSpec, ray_session
from qdist.calibration import CalibrationJob, Merged, ShardTask, Work, complete, recall, run_shard
from qdist.calibration.blockwise import merge_blocks
from qdist.calibration.converge import converge
from qdist.calibration.stage import stages_of
from qdist.data.checks import InputSpec
from qdist.data.decoder import Decoder
from qdist.data.source import DataSource
from qdist.model.session import fingerprint
from qdist.stats.observer import Observer, ObserverSpec
from qdist.stats.warm import warm
from qdist.store.protocol import CalibrationStore
from qdist.store.receipt import ShardReceipt
from qdist.store.zarr_store import open_store
from qdist.threshold.convergence import Convergence


@dataclass(frozen=True, slots=True, kw_only=True)
class CalibrationProgress:
    """Where a run stands. ``resumed``: samples that an earlier run had already measured.

    ``nodes``: what every node has done so far. ``n_merged`` of ``n_records``: how far the merge is
    that follows the last sample; both 0 before.
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


class CalibrationWorker:
    """Measures shards. A plain class: one process, one thread, one session kept between shards."""

    def __init__(
        self,
        observers: tuple[ObserverSpec, ...],
        inputs: tuple[InputSpec, ...],
        source: DataSource,
        store: str,
        decoder: Decoder | None = None,
    ) -> None:
        self._specs = observers
        self._inputs = inputs
        self._source = source
        self._location = store
        self._decoder = decoder
        self._observer: tuple[int, Observer] | None = None
        self._store: CalibrationStore | None = None

    def setup(self) -> dict[str, Any]:
        """Load the tapped model and open the store; says under which fingerprint it runs."""
        warm()
        self._observe_with(0)
        self._store = open_store(self._location)
        return {"fingerprint": fingerprint(self._specs[0].execution)}

    def run(self, task: ShardTask) -> ShardReceipt:
        """Measure one shard and commit its record. Safe to run twice."""
        if self._store is None:
            raise RuntimeError("run() before setup()")
        observer = self._observe_with(task.tap_set)
        return run_shard(
            task.shard, observer, self._source, self._inputs, self._store, self._decoder
        )

    def _observe_with(self, tap_set: int) -> Observer:
        """The observer of a tap set; one is held at a time, since each holds the weights."""
        if self._observer is None or self._observer[0] != tap_set:
            self._observer = None
            self._observer = (tap_set, Observer(self._specs[tap_set]))
        return self._observer[1]


def calibrate(
    job: CalibrationJob,
    source: DataSource,
    store: CalibrationStore,
    cluster: ClusterSpec,
    *,
    early_stop: Convergence | None = None,
    on_progress: OnProgress | None = None,
) -> Merged:
    """Measure what the store lacks and merge. Ray starts only if there is something to measure.

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
                on_merge=run.merging,
                on_decision=lambda reason: run.report(replace(run.state, message=reason)),
            )
        if job.settings.n_blocks > 1:
            merge_blocks(job, store, run.measure)
        merged = recall(job, store)
        if merged is not None:
            run.report(run.state)
            return merged
        return complete(job, store, run.measure, on_merge=run.merging)


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
        self._pool: WorkerPool[ShardTask, ShardReceipt] | None = None
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

    def _pool_for(self, observers: tuple[ObserverSpec, ...]) -> WorkerPool[ShardTask, ShardReceipt]:
        """The pool of the round before, where it measures the same taps."""
        wanted = [spec.taps.tensors for spec in observers]
        if self._pool is not None and [s.taps.tensors for s in self._observers] == wanted:
            return self._pool
        self._open_pool.close()
        if self._pool is None:
            self._start_ray()
        make_worker = partial(
            CalibrationWorker,
            observers,
            self._job.inputs,
            self._source,
            self._store.location,
            self._job.decoder,
        )
        pool = WorkerPool[ShardTask, ShardReceipt](
            self._cluster, make_worker, name="calibration", duplicate=True
        )
        self._pool = self._open_pool.enter_context(pool)
        self._observers = observers
        refuse_mixed(self._job.identity.fingerprint, pool.facts)
        return pool

    def _start_ray(self) -> None:
        session = self._session.enter_context(ray_session(self._cluster))
        for note in session.notes:
            self.report(replace(self.state, message=f"note: {note}"))
        if self._cluster.pipeline and len(self._job.observer.segments) == 1:
            note = "the whole model fits the memory budget, so that no pipeline is needed"
            self.report(replace(self.state, message=f"note: {note}"))

    def _staged(self) -> Pipeline:
        """The pipeline, which lasts to the end."""
        if self._pipeline is None:
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

    def _collect(self, pool: WorkerPool[ShardTask, ShardReceipt]) -> list[ShardReceipt]:
        receipts = []
        done, n_retried = self.state.done, self.state.n_retried
        while pool.n_pending:
            event = pool.next_event(0.5)
            message = ""
            match event:
                case Completed():
                    receipts.append(event.result)
                    done += event.task.shard.n_samples
                case Failed():
                    raise event.error
                case Retried():
                    n_retried += 1
                    index = event.task.shard.index
                    message = f"shard {index} is tried again: {event.reason}"
                case Duplicated():
                    message = f"shard {event.task.shard.index} runs twice: {event.reason}"
                case WorkerLost():
                    message = f"worker {event.worker} is gone: {event.reason}"
                case WorkerJoined():
                    refuse_mixed(self._job.identity.fingerprint, [event.facts])
                    message = f"worker {event.worker} joins"
            self.report(
                replace(
                    self.state,
                    done=done,
                    n_workers=pool.n_workers_alive,
                    n_retried=n_retried,
                    message=message,
                    nodes=tuple(pool.nodes()),
                )
            )
        return receipts


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
