"""Selection over a pool: workers sketch samples, the driver keeps the sketches and chooses."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from actors.fingerprints import refuse_mixed
from actors.pool import Completed, Failed, Retried, WorkerJoined, WorkerLost, WorkerPool
from actors.session import ClusterSpec, ray_session
from qdist.data.source import DataSource
from qdist.model.session import fingerprint
from qdist.selection import (
    Selection,
    SelectionJob,
    SketchTask,
    open_tasks,
    pick,
    sketch_samples,
)
from qdist.stats.sketch import Sketcher, SketchTable
from qdist.store.sketches import SketchStore


@dataclass(frozen=True, slots=True, kw_only=True)
class SelectionProgress:
    """Where a selection stands, in samples. ``resumed``: those that were sketched before."""

    done: int
    total: int
    resumed: int
    n_workers: int
    n_retried: int = 0
    message: str = ""


class SketchWorker:
    """Sketches samples. A plain class: one process, one thread, one session kept between tasks."""

    def __init__(self, job: SelectionJob, source: DataSource) -> None:
        self._job = job
        self._source = source
        self._sketcher: Sketcher | None = None

    def setup(self) -> dict[str, Any]:
        """Load the tapped model; says under which fingerprint it runs."""
        self._sketcher = Sketcher(self._job.sketch)
        return {"fingerprint": fingerprint(self._job.sketch.execution)}

    def run(self, task: SketchTask) -> SketchTable:
        """Sketch the samples of one task. Writes nothing, so it is safe to run twice."""
        if self._sketcher is None:
            raise RuntimeError("run() before setup()")
        return sketch_samples(task, self._sketcher, self._source, self._job)


def select(
    job: SelectionJob,
    source: DataSource,
    store: SketchStore,
    cluster: ClusterSpec,
    *,
    on_progress: Callable[[SelectionProgress], None] | None = None,
) -> Selection:
    """Sketch what ``store`` lacks and choose. Ray starts only if there is something to sketch.

    The store is the driver's own and need not be reachable from workers. Raises what a worker
    raises, QD407 for a pool of mixed fingerprints, QD603, QD801 to QD804.
    """
    tasks = open_tasks(job, store)
    left = sum(len(task.ids) for task in tasks)
    total = len(job.samples)
    state = SelectionProgress(done=total - left, total=total, resumed=total - left, n_workers=0)
    report = on_progress or (lambda now: None)
    report(state)
    if tasks:
        make_worker = partial(SketchWorker, job, source)
        with (
            ray_session(cluster),
            WorkerPool[SketchTask, SketchTable](cluster, make_worker, name="selection") as pool,
        ):
            refuse_mixed(job.identity["fingerprint"], pool.facts)
            for task in tasks:
                pool.submit(task)
            _collect(job, pool, store, replace(state, n_workers=pool.n_workers_alive), report)
    return pick(job, store)


def _collect(
    job: SelectionJob,
    pool: WorkerPool[SketchTask, SketchTable],
    store: SketchStore,
    state: SelectionProgress,
    report: Callable[[SelectionProgress], None],
) -> None:
    while pool.n_pending:
        event = pool.next_event(0.5)
        message = ""
        match event:
            case Completed():
                store.put(event.result)
                state = replace(state, done=state.done + len(event.task.ids))
            case Failed():
                raise event.error
            case Retried():
                state = replace(state, n_retried=state.n_retried + 1)
                message = f"{len(event.task.ids)} samples are tried again: {event.reason}"
            case WorkerLost():
                message = f"worker {event.worker} is gone: {event.reason}"
            case WorkerJoined():
                refuse_mixed(job.identity["fingerprint"], [event.facts])
                message = f"worker {event.worker} joins"
        report(replace(state, n_workers=pool.n_workers_alive, message=message))
