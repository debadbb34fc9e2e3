"""Calibration over a pool: workers pull shards, measure them and commit the records."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from actors.pool import Completed, Failed, Retried, WorkerJoined, WorkerLost, WorkerPool
from actors.session import ClusterSpec, ray_session
from qdist.calibration import CalibrationJob, Merged, complete, recall, run_shard
from qdist.data.shards import Shard
from qdist.data.source import DataSource
from qdist.digest import canonical_json
from qdist.errors import StoreError
from qdist.model.session import fingerprint
from qdist.stats.observer import Observer
from qdist.store.receipt import ShardReceipt
from qdist.store.zarr_store import ZarrStore


@dataclass(frozen=True, slots=True, kw_only=True)
class CalibrationProgress:
    """Where a run stands. ``resumed``: samples that an earlier run had already measured.

    ``n_merged`` of ``n_records``: how far the merge is that follows the last sample; both 0 before.
    """

    done: int
    total: int
    resumed: int
    n_workers: int
    n_retried: int
    message: str = ""
    n_merged: int = 0
    n_records: int = 0


class CalibrationWorker:
    """Measures shards. A plain class: one process, one thread, one session kept between shards."""

    def __init__(self, job: CalibrationJob, source: DataSource, store: Path) -> None:
        self._job = job
        self._source = source
        self._store_path = store
        self._observer: Observer | None = None
        self._store: ZarrStore | None = None

    def setup(self) -> dict[str, Any]:
        """Load the tapped model and open the store; says under which fingerprint it runs."""
        self._observer = Observer(self._job.observer)
        self._store = ZarrStore.open(self._store_path)
        return {"fingerprint": fingerprint(self._job.observer.execution)}

    def run(self, task: Shard) -> ShardReceipt:
        """Measure one shard and commit its record. Safe to run twice."""
        if self._observer is None or self._store is None:
            raise RuntimeError("run() before setup()")
        return run_shard(task, self._observer, self._source, self._job.inputs, self._store)


def calibrate(
    job: CalibrationJob,
    source: DataSource,
    store: ZarrStore,
    cluster: ClusterSpec,
    *,
    on_progress: Callable[[CalibrationProgress], None] | None = None,
) -> Merged:
    """Measure what the store lacks and merge. Ray starts only if there is something to measure.

    Raises what a worker raises, QD407 for a pool of mixed fingerprints, QD801 to QD804.
    """
    total = len(job.manifest)
    state = CalibrationProgress(done=total, total=total, resumed=total, n_workers=0, n_retried=0)

    def report(now: CalibrationProgress) -> None:
        nonlocal state
        state = now
        if on_progress is not None:
            on_progress(now)

    def measure(shards: tuple[Shard, ...]) -> None:
        report(_before(shards, state))
        make_worker = partial(CalibrationWorker, job, source, store.path)
        with (
            ray_session(cluster),
            WorkerPool[Shard, ShardReceipt](cluster, make_worker, name="calibration") as pool,
        ):
            _refuse_mixed(job, pool.facts)
            report(replace(state, n_workers=pool.n_workers_alive, message=""))
            for shard in shards:
                pool.submit(shard)
            _collect(job, pool, state, report)

    def merging(done: int, n_records: int) -> None:
        report(replace(state, message="", n_merged=done, n_records=n_records))

    merged = recall(job, store)
    if merged is not None:
        report(state)
        return merged
    return complete(job, store, measure, on_merge=merging)


def _before(shards: tuple[Shard, ...], state: CalibrationProgress) -> CalibrationProgress:
    """Where a round starts that has ``shards`` to measure. The second one says why there is one."""
    left = sum(shard.n_samples for shard in shards)
    done = state.total - left
    return replace(
        state,
        done=done,
        resumed=min(state.resumed, done),
        message=f"{left} samples to measure again: their records are damaged or gone"
        if state.n_records
        else "",
        n_merged=0,
        n_records=0,
    )


def _collect(
    job: CalibrationJob,
    pool: WorkerPool[Shard, ShardReceipt],
    state: CalibrationProgress,
    report: Callable[[CalibrationProgress], None],
) -> None:
    done, n_retried = state.done, state.n_retried
    while pool.n_pending:
        event = pool.next_event(0.5)
        message = ""
        match event:
            case Completed():
                done += event.task.n_samples
            case Failed():
                raise event.error
            case Retried():
                n_retried += 1
                message = f"shard {event.task.index} goes to another worker: {event.reason}"
            case WorkerLost():
                message = f"worker {event.worker} is gone: {event.reason}"
            case WorkerJoined():
                _refuse_mixed(job, [event.facts])
                message = f"worker {event.worker} joins"
        report(
            replace(
                state,
                done=done,
                n_workers=pool.n_workers_alive,
                n_retried=n_retried,
                message=message,
            )
        )


def _refuse_mixed(job: CalibrationJob, facts: Any) -> None:
    """Every worker must run under the fingerprint that the store was made for."""
    wanted = canonical_json(job.identity.fingerprint)
    for fact in facts:
        found = canonical_json(fact["fingerprint"])
        if found != wanted:
            raise StoreError(
                "QD407",
                where=f"worker {fact.get('worker')} on node {fact.get('node_ip')}",
                got=found,
                expected=wanted,
                mend="use nodes of one kind with one ONNX Runtime, or start the driver on such a "
                "node, so that all results agree to the last bit",
            )
