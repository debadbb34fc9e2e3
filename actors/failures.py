"""The errors of a pool: each says what was lost, and how to mend it."""

from __future__ import annotations

from collections.abc import Mapping

from ray.exceptions import RayTaskError

from actors.retry import GiveUp
from actors.session import ClusterSpec
from qdist.errors import CODES, ClusterError, QdistError

_LOGS = "Ray's logs in /tmp/ray/session_latest/logs"


def not_ready(
    pool: str, spec: ClusterSpec, *, n_ready: int, free: Mapping[str, float], last_loss: str | None
) -> ClusterError:
    """QD802: workers missing after ``ready_timeout_s``. ``free`` is what the cluster has left."""
    last = "" if last_loss is None else f"; last loss: {last_loss}"
    return ClusterError(
        "QD802",
        where=f"pool {pool}",
        got=f"{n_ready} of {spec.n_workers} workers ready after "
        f"{spec.ready_timeout_s:g} s; still free in the cluster: {free}{last}",
        expected=f"{spec.n_workers} workers that take {spec.needs} each",
        mend="wait until other jobs leave the cluster, ask for fewer workers with "
        "cluster.workers, or raise cluster.ready_timeout_s",
    )


def never_started(worker: str, error: BaseException, *, n_starts: int) -> ClusterError:
    """QD803 (its setup raised) or QD804 (it died): no start of ``worker`` succeeded."""
    raised = isinstance(error, RayTaskError)
    return ClusterError(
        "QD803" if raised else "QD804",
        where=f"setup of worker {worker}",
        got=f"{last_line(error)} on each of {n_starts} starts",
        expected="workers that start",
        mend=f"report this exception with {_LOGS}"
        if raised
        else "give the workers more memory with cluster.memory_bytes_per_worker, use fewer "
        f"workers per machine, and see {_LOGS}",
    )


def all_lost(pool: str, spec: ClusterSpec, *, n_pending: int, last_loss: str) -> ClusterError:
    """QD804: no worker is left, and none could be replaced."""
    return ClusterError(
        "QD804",
        where=f"pool {pool}",
        got=f"none of {spec.n_workers} workers alive, {n_pending} tasks left; "
        f"last loss: {last_loss}",
        expected=f"a worker to take over within {spec.ready_timeout_s:g} s",
        mend="look for nodes out of memory or out of reach; finished work is kept, so "
        "start the same command again",
    )


def gave_up(task: object, decision: GiveUp, reason: str) -> ClusterError:
    """QD803: ``task`` failed once more than it may; ``reason`` is the last failure."""
    text = repr(task)
    return ClusterError(
        "QD803",
        where=f"task {text if len(text) <= 120 else text[:116] + ' ...'}",
        got=f"{decision.n_attempts} failed attempts, the last: {reason}",
        expected="the task to finish on one of them",
        mend="if workers die or run out of time, give them more memory or time "
        "(cluster.memory_bytes_per_worker, cluster.task_timeout_s); else report the exception",
    )


def postponed(error: QdistError, where: str, *, pause_s: float, left_s: float) -> str:
    """Why a task waits: the transient ``error``, met at ``where``, and when it is tried again."""
    return (
        f"{error.code} {CODES[error.code]} ({error.where}: {error.got}) from {where}; "
        f"next try in {pause_s:.1f} s, given up in {left_s:.0f} s"
    )


def last_line(error: BaseException, limit: int = 300) -> str:
    """The last line of a message that says something; of a traceback, the exception."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    line = lines[-1] if lines else type(error).__name__
    line = line.partition(" Some common causes include")[0]  # advice by Ray, the same every time
    return line if len(line) <= limit else f"{line[: limit - 4]} ..."
