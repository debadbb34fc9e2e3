"""A pool of Ray actors, each around one plain worker; the driver owns the queue.

The driver hands out tasks, waits for the first answer and decides what to do about a failure
with `actors.retry`; Ray itself restarts and retries nothing. A task can therefore run more than
once, but is reported exactly once, as `Completed` or as `Failed`: what it writes has to be
idempotent.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import Any, Generic

import ray
from ray.exceptions import ActorUnavailableError, GetTimeoutError, RayError, RayTaskError

from actors.crew import FETCH_TIMEOUT_S, Crew
from actors.events import (
    Completed,
    Event,
    Failed,
    ResultT,
    Retried,
    TaskT,
    Worker,
    WorkerJoined,
    WorkerLost,
)
from actors.failures import all_lost, gave_up, last_line
from actors.job_queue import JobQueue
from actors.retry import GiveUp, Incident, Requeue, RetryPolicy
from actors.seat import Job, Seat
from actors.session import ClusterSpec, check_resources
from qdist.errors import QdistError

__all__ = [
    "Completed",
    "Event",
    "Failed",
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
    ) -> None:
        if prefetch < 0:
            raise ValueError(f"prefetch: got {prefetch}, expected 0 or more")
        self._spec = spec
        self._make_worker = make_worker
        self._name = name
        self._policy = policy or RetryPolicy(max_attempts=spec.max_attempts)
        self._todo: JobQueue[TaskT] = JobQueue(prefetch=prefetch)
        self._events: deque[Event[TaskT, ResultT]] = deque()
        self._crew: Crew[TaskT] = Crew(spec, name=name, queue=self._todo, events=self._events)
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
        now = time.monotonic()
        n_free = sum(not seat.jobs and seat.takes_jobs(now) for seat in self._crew.seats)
        return max(0, n_free - len(self._todo))

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
        none could be replaced within ``ready_timeout_s``.
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
        elif self._crew.is_retired or now - self._alive_at > self._spec.ready_timeout_s:
            raise all_lost(
                self._name, self._spec, n_pending=self._n_pending, last_loss=self._crew.last_loss
            )

    def _advance(self, timeout_s: float) -> None:
        """One round: replace, hand out, wait for one answer, take it, stop what overruns."""
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
                self._answered(seat, ref)
        self._stop_overrunning()
        self._todo.hand_out(self._crew.seats)

    def _next_alarm_s(self, now: float) -> float:
        """Seconds until something is due even if no worker answers."""
        alarms = [now + 1.0]
        for seat in self._crew.seats:
            if seat.jobs:
                alarms.append(seat.head_since + self._spec.task_timeout_s)
            if seat.resting_until > now:
                alarms.append(seat.resting_until)
        return max(min(alarms) - now, 0.0)

    # Answers

    def _answered(self, seat: Seat[TaskT], ref: Any) -> None:
        """Take the answer to the task behind ``ref``."""
        try:
            answer = ray.get(ref, timeout=FETCH_TIMEOUT_S)
        except RayTaskError as error:
            reason = f"{last_line(error)} in {seat.where}"
            self._went_wrong(seat.take(ref), seat, Incident.TASK_RAISED, reason)
        except ActorUnavailableError as error:
            job = seat.take(ref)
            self._went_wrong(job, seat, Incident.WORKER_UNAVAILABLE, last_line(error))
        except (RayError, GetTimeoutError) as error:
            self._died(seat, last_line(error))
        else:
            self._finished(seat.take(ref), seat, answer)

    def _finished(self, job: Job[TaskT], seat: Seat[TaskT], answer: Any) -> None:
        seat.n_unavailable = 0
        if isinstance(answer, QdistError):
            self._events.append(Failed(task=job.task, error=answer))
            return
        result, seconds = answer
        self._events.append(
            Completed(task=job.task, result=result, worker=seat.name, seconds=seconds)
        )

    def _died(self, seat: Seat[TaskT], reason: str) -> None:
        """The actor is dead: save the answers it gave before, then blame the first task left."""
        saved, _ = ray.wait(list(seat.jobs), num_returns=len(seat.jobs), timeout=1.0)
        for ref in saved:
            try:
                answer = ray.get(ref, timeout=FETCH_TIMEOUT_S)
            except (RayError, GetTimeoutError):
                continue
            self._finished(seat.take(ref), seat, answer)
        # After a time out of reach it was most likely dead before it got the task.
        was_away = seat.n_unavailable > 0
        self._blame_head(
            seat, Incident.WORKER_UNAVAILABLE if was_away else Incident.WORKER_DIED, reason
        )

    def _blame_head(self, seat: Seat[TaskT], incident: Incident, reason: str) -> None:
        """Lose the actor over the task that it was running."""
        culprit = seat.take_head()
        where = seat.where
        self._crew.lose(
            seat, reason
        )  # reported first: after a `Failed` the caller may stop listening
        if culprit is not None:
            self._went_wrong(culprit, seat, incident, f"{incident.value} ({reason}): {where}")

    def _stop_overrunning(self) -> None:
        now = time.monotonic()
        for seat in self._crew.seats:
            if seat.jobs and now - seat.head_since >= self._spec.task_timeout_s:
                if ray.wait([next(iter(seat.jobs))], timeout=0)[0]:
                    continue  # it is done; only the driver was away
                limit = f"longer than {self._spec.task_timeout_s:g} s"
                self._blame_head(seat, Incident.TASK_TIMED_OUT, limit)

    def _went_wrong(
        self, job: Job[TaskT], seat: Seat[TaskT], incident: Incident, reason: str
    ) -> None:
        """Ask the policy about ``job`` and do what it says."""
        is_resting = seat.resting_until > time.monotonic()
        if incident is Incident.WORKER_UNAVAILABLE and not is_resting:
            seat.n_unavailable += 1  # once, however many tasks were at the worker
        decision = self._policy.decide(
            incident,
            attempt=job.attempt,
            n_requeues=job.n_requeues,
            n_unavailable=seat.n_unavailable,
        )
        if isinstance(decision, GiveUp):
            self._events.append(Failed(task=job.task, error=gave_up(job.task, decision, reason)))
            return
        if isinstance(decision, Requeue):
            job.n_requeues += 1
            if seat.ready and not is_resting:
                seat.resting_until = time.monotonic() + decision.quarantine_s
        else:
            job.attempt = decision.attempt
            if seat.ready:
                job.avoid.add(seat.name)
        self._todo.put_first([job])
        self._events.append(Retried(task=job.task, reason=reason, attempt=job.attempt))
