"""A pool of Ray actors, each around one plain worker; the driver owns the queue.

The driver hands out tasks, waits for the first answer and decides what to do about a failure
with `actors.retry`; Ray itself restarts and retries nothing. A task can therefore run more than
once, but is reported exactly once, as `Completed` or as `Failed`: what it writes has to be
idempotent. With ``duplicate`` it may even run twice at the same time.
"""

from __future__ import annotations

import statistics
import time
from collections import deque
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import Any, Generic

import ray

from actors.answers import Answers
from actors.crew import Crew
from actors.events import (
    Completed,
    Duplicated,
    Event,
    Failed,
    ResultT,
    Retried,
    TaskT,
    Worker,
    WorkerJoined,
    WorkerLost,
)
from actors.failures import all_lost
from actors.job_queue import JobQueue
from actors.nodes import NodeFigures, NodeLedger
from actors.retry import RetryPolicy
from actors.seat import Seat
from actors.session import ClusterSpec, check_resources
from actors.stragglers import StragglerPolicy

__all__ = [
    "Completed",
    "Duplicated",
    "Event",
    "Failed",
    "NodeFigures",
    "Retried",
    "Worker",
    "WorkerJoined",
    "WorkerLost",
    "WorkerPool",
]


class WorkerPool(Generic[TaskT, ResultT]):
    """Actors that run tasks; a context manager, used from one thread.

    ``make_worker`` is a picklable callable without arguments; it is put into the object store
    once, however much it holds, and called once in every actor. While a worker runs one task, up
    to ``prefetch`` more wait at it, as long as the queue is longer than the pool is wide; use 0
    for long tasks. A task that was merely waiting at a worker that died goes back into the queue
    without an attempt counted and without an event.

    ``duplicate``: when the queue is empty, an idle worker also runs a task that is late at another
    by `actors.stragglers` (True: by its defaults), once per task; the first answer is reported and
    the other dropped, so use it only where two workers may do the same task at once.

    While a store cannot be reached (`actors.retry.TRANSIENT_CODES`), tasks wait for it, each for
    up to ``spec.store_patience_s``; then the error is reported as it is.

        with WorkerPool(spec, partial(MyWorker, model), name="calibration") as pool:
            for shard in shards:
                pool.submit(shard)
            while pool.n_pending:
                event = pool.next_event(1.0)

    Entering needs an initialised Ray (`actors.session.ray_session`) and raises QD802 when not
    all workers are ready in time, QD803 or QD804 when a worker fails or dies on every start, or
    the `QdistError` of a worker's setup. Leaving kills all actors, however the block ends.
    """

    def __init__(
        self,
        spec: ClusterSpec,
        make_worker: Callable[[], Worker[TaskT, ResultT]],
        *,
        name: str,
        prefetch: int = 1,
        policy: RetryPolicy | None = None,
        duplicate: bool | StragglerPolicy = False,
    ) -> None:
        if prefetch < 0:
            raise ValueError(f"prefetch: got {prefetch}, expected 0 or more")
        self._spec = spec
        self._make_worker = make_worker
        self._name = name
        self._policy = policy or RetryPolicy(
            max_attempts=spec.max_attempts, patience_s=spec.store_patience_s
        )
        self._stragglers = StragglerPolicy() if duplicate is True else duplicate or None
        self._todo: JobQueue[TaskT] = JobQueue(prefetch=prefetch)
        self._events: deque[Event[TaskT, ResultT]] = deque()
        self._ledger = NodeLedger()
        self._crew: Crew[TaskT] = Crew(
            spec,
            name=name,
            policy=self._policy,
            queue=self._todo,
            ledger=self._ledger,
            events=self._events,
        )
        self._answers: Answers[TaskT, ResultT] = Answers(
            policy=self._policy,
            queue=self._todo,
            crew=self._crew,
            ledger=self._ledger,
            events=self._events,
        )
        self._n_pending = 0
        self._entered = False
        self._alive_at = 0.0

    # The caller's side

    @property
    def facts(self) -> list[Mapping[str, Any]]:
        """What every worker's setup said, with ``worker``, ``node_id``, ``node_ip`` and ``pid``.

        In the order of joining; replacements are appended, and lost workers stay.
        """
        return list(self._crew.facts)

    @property
    def n_pending(self) -> int:
        """Tasks submitted whose `Completed` or `Failed` has not been returned yet."""
        return self._n_pending

    @property
    def n_workers_alive(self) -> int:
        """Workers that are ready, idle or busy."""
        return self._crew.n_alive

    @property
    def n_idle(self) -> int:
        """How many more tasks would start at once if they were submitted now."""
        if self._todo.outage.is_on:
            return 0
        now = time.monotonic()
        n_free = sum(seat.is_idle(now) for seat in self._crew.seats)
        return max(0, n_free - len(self._todo))

    def nodes(self) -> list[NodeFigures]:
        """What every node that ever had a worker has done so far, in the order of joining."""
        return self._ledger.figures(seat.node_id for seat in self._crew.seats if seat.ready)

    def submit(self, task: TaskT) -> None:
        """Add ``task`` to the end of the queue. Raises `RuntimeError` outside of the block."""
        if not self._entered:
            raise RuntimeError("submit() outside of 'with pool:'")
        self._todo.add(task)
        self._n_pending += 1
        self._todo.hand_out(self._crew.seats)

    def next_event(self, timeout_s: float) -> Event[TaskT, ResultT] | None:
        """The next event, or None if there is none within ``timeout_s`` seconds.

        Returns None at once when nothing is pending. Raises QD804 when no worker is left and
        none could be replaced within ``ready_timeout_s``, or the error of a worker's setup that all
        of them waited for in vain.
        """
        deadline = time.monotonic() + timeout_s
        while not self._events and self._n_pending:
            left_s = deadline - time.monotonic()
            self._advance(max(left_s, 0.0))
            self._check_alive()
            if left_s <= 0:
                break
        if not self._events:
            return None
        event = self._events.popleft()
        if isinstance(event, Completed | Failed):
            self._n_pending -= 1
        return event

    def __enter__(self) -> WorkerPool[TaskT, ResultT]:
        if self._crew.is_engaged:
            raise RuntimeError("a pool can be entered only once")
        check_resources(self._spec)
        self._crew.engage(self._make_worker)
        try:
            self._wait_until_ready()
        except BaseException:
            self._crew.dismiss()
            raise
        self._entered = True
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._entered = False
        self._crew.dismiss()

    # Rounds

    def _wait_until_ready(self) -> None:
        deadline = time.monotonic() + self._spec.ready_timeout_s
        while self.n_workers_alive < self._spec.n_workers:
            left_s = deadline - time.monotonic()
            if left_s <= 0:
                raise self._crew.not_ready()
            self._advance(left_s)
        # Joining is news only for replacements; a worker lost on the way is news always.
        news = [event for event in self._events if not isinstance(event, WorkerJoined)]
        self._events.clear()
        self._events.extend(news)
        self._alive_at = time.monotonic()

    def _check_alive(self) -> None:
        now = time.monotonic()
        if self.n_workers_alive:
            self._alive_at = now
        elif self._events:
            pass  # the caller first hears of what was lost
        elif self._crew.is_retired or now - self._alive_at > self._time_to_recover_s:
            raise self._crew.waits_for or all_lost(
                self._name, self._spec, n_pending=self._n_pending, last_loss=self._crew.last_loss
            )

    @property
    def _time_to_recover_s(self) -> float:
        """How long the pool may be without any worker."""
        patience_s = self._policy.patience_s if self._crew.waits_for is not None else 0.0
        return self._spec.ready_timeout_s + patience_s

    def _advance(self, timeout_s: float) -> None:
        """One round: replace, hand out, wait for one answer, take it, see to what takes long."""
        now = time.monotonic()
        self._crew.fill(now)
        self._todo.hand_out(self._crew.seats)
        owners = {ref: seat for seat in self._crew.seats for ref in (seat.start_ref, *seat.jobs)}
        owners.pop(None, None)
        wait_s = min(timeout_s, self._next_alarm_s(now))
        if not owners:
            time.sleep(wait_s)
            return
        done, _ = ray.wait(list(owners), num_returns=1, timeout=wait_s)
        for ref in done:
            seat = owners[ref]
            if ref == seat.start_ref:
                self._crew.started(seat, at_work=self._entered)
            else:
                self._answers.take(seat, ref)
        self._stop_overrunning()
        self._todo.hand_out(self._crew.seats)
        self._duplicate_late()

    def _next_alarm_s(self, now: float) -> float:
        """Seconds until something is due even if no worker answers."""
        alarms = [now + 1.0]
        for seat in self._crew.seats:
            if seat.jobs:
                alarms.append(seat.head_since + self._spec.task_timeout_s)
            if seat.resting_until > now:
                alarms.append(seat.resting_until)
        if self._todo.outage.is_on and len(self._todo):
            alarms.append(self._todo.outage.retry_at)
        return max(min(alarms) - now, 0.0)

    def _stop_overrunning(self) -> None:
        now = time.monotonic()
        for seat in self._crew.seats:
            # What is done is not late; only the driver was away.
            if self._has_run(seat, self._spec.task_timeout_s, now) and not _is_done(seat.head):
                self._answers.overran(seat, f"longer than {self._spec.task_timeout_s:g} s")

    def _duplicate_late(self) -> None:
        """Let idle workers run what is late, if there is nothing else to do."""
        if self._stragglers is None or len(self._todo) or self._todo.outage.is_on:
            return
        now = time.monotonic()
        idle = [seat for seat in self._crew.seats if seat.is_idle(now)]
        limit_s = self._stragglers.limit_s(self._answers.recent_s) if idle else None
        if limit_s is None:
            return
        for seat in self._crew.seats:
            if self._has_run(seat, limit_s, now) and not _is_done(seat.head):
                self._duplicate(seat, idle, now)

    def _duplicate(self, late: Seat[TaskT], idle: list[Seat[TaskT]], now: float) -> None:
        """Give what ``late`` runs, and what waits behind, to workers taken off ``idle`` as well."""
        for job in [job for job in late.jobs.values() if not (job.settled or job.duplicated)]:
            if not idle:
                return
            # If it is the node that is slow, another worker there is no help.
            other = min(idle, key=lambda seat: (seat.node_id == late.node_id, seat.index))
            idle.remove(other)
            job.duplicated = True
            other.give(job)
            median_s = statistics.median(self._answers.recent_s)
            reason = (
                f"{late.where} has been busy for {now - late.head_since:.1f} s, "
                f"where half of all tasks took {median_s:.1f} s or less"
            )
            self._events.append(Duplicated(task=job.task, worker=other.name, reason=reason))

    @staticmethod
    def _has_run(seat: Seat[TaskT], limit_s: float, now: float) -> bool:
        return bool(seat.jobs) and now - seat.head_since >= limit_s


def _is_done(ref: Any) -> bool:
    return bool(ray.wait([ref], timeout=0)[0])
