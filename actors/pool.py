"""A pool of Ray actors, each around one plain worker; the driver owns the queue.

The driver hands out tasks, waits for the first answer and decides what to do about a failure
with `actors.retry`; Ray itself restarts and retries nothing. A task can therefore run more than
once, but is reported exactly once, as `Completed` or as `Failed`: what it writes has to be
idempotent.
"""

from __future__ import annotations

import os
import time
from collections import deque
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Generic, Protocol, TypeAlias, TypeVar

import ray
from ray.exceptions import ActorUnavailableError, GetTimeoutError, RayError, RayTaskError

from actors.retry import GiveUp, Incident, Requeue, RetryPolicy
from actors.session import ClusterSpec, check_resources, worker_runtime_env
from qdist.errors import ClusterError, QdistError

TaskT = TypeVar("TaskT", bound=Hashable)
ResultT = TypeVar("ResultT")
TaskT_contra = TypeVar("TaskT_contra", contravariant=True)
ResultT_co = TypeVar("ResultT_co", covariant=True)

_FETCH_TIMEOUT_S = 300.0
_REST_AFTER_FAILED_START_S = 0.5


class Worker(Protocol[TaskT_contra, ResultT_co]):
    """What an actor wraps: a plain class that lives in one process and is used by one thread.

    Both methods may raise a `QdistError` for bad input; it reaches the driver as it is and is
    not retried. Any other exception is.
    """

    def setup(self) -> dict[str, Any]:
        """Get ready; called once, before any task. Returns JSON facts about the worker."""

    def run(self, task: TaskT_contra) -> ResultT_co:
        """Do one task. May be called again for a task that failed here or elsewhere."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Completed(Generic[TaskT, ResultT]):
    """``task`` gave ``result`` on ``worker`` after ``seconds`` of work there."""

    task: TaskT
    result: ResultT
    worker: str
    seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Failed(Generic[TaskT]):
    """``task`` will not be tried again: bad input, or QD803 after the last attempt."""

    task: TaskT
    error: QdistError


@dataclass(frozen=True, slots=True, kw_only=True)
class Retried(Generic[TaskT]):
    """``task`` goes back into the queue as attempt number ``attempt``."""

    task: TaskT
    reason: str
    attempt: int


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerLost:
    """``worker`` is gone; another takes its place under another name, unless that fails too."""

    worker: str
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerJoined:
    """A replacement is ready; it gets tasks from now on. ``facts`` as in `WorkerPool.facts`."""

    worker: str
    facts: Mapping[str, Any]


Event: TypeAlias = (
    Completed[TaskT, ResultT] | Failed[TaskT] | Retried[TaskT] | WorkerLost | WorkerJoined
)


class _Host:
    """The Ray actor: holds one worker and turns a `QdistError` into a value."""

    def __init__(self) -> None:
        self._worker: Worker[Any, Any] | None = None

    def start(self, make_worker: Callable[[], Worker[Any, Any]]) -> dict[str, Any] | QdistError:
        try:
            self._worker = make_worker()
            facts = dict(self._worker.setup())
        except QdistError as error:
            return error
        return facts | {
            "node_id": ray.get_runtime_context().get_node_id(),
            "node_ip": ray.util.get_node_ip_address(),
            "pid": os.getpid(),
        }

    def run(self, task: Any) -> tuple[Any, float] | QdistError:
        if self._worker is None:
            raise RuntimeError("run() before start()")
        begin = time.perf_counter()
        try:
            result = self._worker.run(task)
        except QdistError as error:
            return error
        return result, time.perf_counter() - begin


@dataclass(slots=True, kw_only=True, eq=False)
class _Job(Generic[TaskT]):
    """A task in the queue or at a worker, and what happened to it so far."""

    task: TaskT
    attempt: int = 1
    n_requeues: int = 0
    avoid: set[str] = field(default_factory=set)


@dataclass(slots=True, kw_only=True, eq=False)
class _Seat(Generic[TaskT]):
    """The place of one worker: its actor, which is replaced when it dies, and its jobs.

    ``jobs`` maps the reference of every job at the actor to it, in the order in which the actor
    runs them; ``head_since`` is when the first of them began (seconds, monotonic clock).
    """

    index: int
    generation: int = 0
    actor: Any = None
    start_ref: Any = None
    ready: bool = False
    where: str = ""
    n_failed_starts: int = 0
    n_unavailable: int = 0
    resting_until: float = 0.0
    retired: bool = False
    jobs: dict[Any, _Job[TaskT]] = field(default_factory=dict)
    head_since: float = 0.0


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
        self._prefetch = prefetch
        self._policy = policy or RetryPolicy(max_attempts=spec.max_attempts)
        self._seats: list[_Seat[TaskT]] = [_Seat(index=i) for i in range(spec.n_workers)]
        self._todo: deque[_Job[TaskT]] = deque()
        self._events: deque[Event[TaskT, ResultT]] = deque()
        self._facts: list[Mapping[str, Any]] = []
        self._n_pending = 0
        self._entered = False
        self._alive_at = 0.0
        self._last_loss = "no worker ever started"
        self._make_ref: Any = None
        self._actor_class: Any = None

    # The caller's side

    @property
    def facts(self) -> list[Mapping[str, Any]]:
        """What every worker's setup said, with ``worker``, ``node_id``, ``node_ip`` and ``pid``.

        In the order of joining; replacements are appended, and lost workers stay.
        """
        return list(self._facts)

    @property
    def n_pending(self) -> int:
        """Tasks submitted whose `Completed` or `Failed` has not been returned yet."""
        return self._n_pending

    @property
    def n_workers_alive(self) -> int:
        """Workers that are ready, idle or busy."""
        return sum(seat.ready for seat in self._seats)

    @property
    def n_idle(self) -> int:
        """How many more tasks would start at once if they were submitted now."""
        now = time.monotonic()
        n_free = sum(
            seat.ready and not seat.jobs and seat.resting_until <= now for seat in self._seats
        )
        return max(0, n_free - len(self._todo))

    def submit(self, task: TaskT) -> None:
        """Add ``task`` to the end of the queue. Raises `RuntimeError` outside of the block."""
        if not self._entered:
            raise RuntimeError("submit() outside of 'with pool:'")
        self._todo.append(_Job(task=task))
        self._n_pending += 1
        self._dispatch()

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
        if self._make_ref is not None:
            raise RuntimeError("a pool can be entered only once")
        check_resources(self._spec)
        self._make_ref = ray.put(self._make_worker)
        self._actor_class = ray.remote(_Host).options(
            num_cpus=self._spec.cpus_per_worker,
            num_gpus=self._spec.gpus_per_worker,
            memory=self._spec.memory_bytes_per_worker,
            max_restarts=0,
            max_task_retries=0,
            scheduling_strategy="SPREAD",
            runtime_env=worker_runtime_env(self._spec),
        )
        try:
            self._wait_until_ready()
        except BaseException:
            self._kill_all()
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
        self._kill_all()

    # Workers

    def _name_of(self, seat: _Seat[TaskT]) -> str:
        suffix = f".{seat.generation}" if seat.generation else ""
        return f"{self._name}-{seat.index}{suffix}"

    def _start(self, seat: _Seat[TaskT]) -> None:
        seat.actor = self._actor_class.remote()
        seat.start_ref = seat.actor.start.remote(self._make_ref)

    def _wait_until_ready(self) -> None:
        deadline = time.monotonic() + self._spec.ready_timeout_s
        while self.n_workers_alive < self._spec.n_workers:
            left_s = deadline - time.monotonic()
            if left_s <= 0:
                raise self._not_ready()
            self._advance(left_s)
        # Joining is news only for replacements; a worker lost on the way is news always.
        self._events = deque(e for e in self._events if not isinstance(e, WorkerJoined))
        self._alive_at = time.monotonic()

    def _not_ready(self) -> ClusterError:
        free = {k: ray.available_resources().get(k, 0.0) for k in self._spec.needs}
        last = f"; last loss: {self._last_loss}" if any(s.generation for s in self._seats) else ""
        return ClusterError(
            "QD802",
            where=f"pool {self._name}",
            got=f"{self.n_workers_alive} of {self._spec.n_workers} workers ready after "
            f"{self._spec.ready_timeout_s:g} s; still free in the cluster: {free}{last}",
            expected=f"{self._spec.n_workers} workers that take {self._spec.needs} each",
            mend="wait until other jobs leave the cluster, ask for fewer workers with "
            "cluster.n_workers, or raise cluster.ready_timeout_s",
        )

    def _started(self, seat: _Seat[TaskT]) -> None:
        """Take the answer to `_Host.start`."""
        ref, seat.start_ref = seat.start_ref, None
        try:
            answer = ray.get(ref, timeout=_FETCH_TIMEOUT_S)
        except (RayError, GetTimeoutError) as error:
            self._start_failed(seat, error)
            return
        if isinstance(answer, QdistError):
            self._start_failed(seat, answer)
            return
        name = self._name_of(seat)
        facts = {**answer, "worker": name}
        seat.ready = True
        seat.where = f"{name} (node {facts['node_ip']}, pid {facts['pid']})"
        seat.n_failed_starts = 0
        self._facts.append(facts)
        self._events.append(WorkerJoined(worker=name, facts=facts))

    def _start_failed(self, seat: _Seat[TaskT], error: BaseException) -> None:
        """Try again after a rest; give up at once on bad input, and after ``max_attempts``."""
        seat.n_failed_starts += 1
        is_final = isinstance(error, QdistError) or (
            seat.n_failed_starts >= self._spec.max_attempts
        )
        if is_final and not self._entered:
            if isinstance(error, QdistError):
                raise error
            raise self._never_started(seat, error) from error
        # Once others are at work, one node that cannot start a worker does not stop them.
        seat.retired = is_final
        self._lose(seat, f"it did not start: {_last_line(error)}")
        seat.resting_until = time.monotonic() + _REST_AFTER_FAILED_START_S * seat.n_failed_starts

    def _never_started(self, seat: _Seat[TaskT], error: BaseException) -> ClusterError:
        raised = isinstance(error, RayTaskError)
        return ClusterError(
            "QD803" if raised else "QD804",
            where=f"setup of worker {self._name_of(seat)}",
            got=f"{_last_line(error)} on each of {seat.n_failed_starts} starts",
            expected="workers that start",
            mend="report this exception with Ray's logs in /tmp/ray/session_latest/logs"
            if raised
            else "give the workers more memory with cluster.memory_bytes_per_worker, use fewer "
            "workers per machine, and see Ray's logs in /tmp/ray/session_latest/logs",
        )

    def _lose(self, seat: _Seat[TaskT], reason: str) -> None:
        """Kill the actor of ``seat`` for good; `_replace` starts the next one."""
        self._events.append(WorkerLost(worker=self._name_of(seat), reason=reason))
        self._last_loss = f"{self._name_of(seat)}: {reason}"
        _kill(seat.actor)
        seat.actor, seat.start_ref, seat.ready = None, None, False
        seat.generation += 1
        seat.n_unavailable = 0
        seat.resting_until = 0.0
        # What was waiting behind the culprit never began: first in the queue, nothing counted.
        self._todo.extendleft(reversed(seat.jobs.values()))
        seat.jobs.clear()

    def _kill_all(self) -> None:
        for seat in self._seats:
            _kill(seat.actor)
            seat.actor, seat.start_ref, seat.ready = None, None, False
            seat.jobs.clear()
        self._make_ref = None

    def _check_alive(self) -> None:
        now = time.monotonic()
        if self.n_workers_alive:
            self._alive_at = now
        elif self._events:
            pass  # the caller first hears of what was lost
        elif (
            all(seat.retired for seat in self._seats)
            or now - self._alive_at > self._spec.ready_timeout_s
        ):
            raise ClusterError(
                "QD804",
                where=f"pool {self._name}",
                got=f"none of {self._spec.n_workers} workers alive, {self._n_pending} tasks left; "
                f"last loss: {self._last_loss}",
                expected=f"a worker to take over within {self._spec.ready_timeout_s:g} s",
                mend="look for nodes out of memory or out of reach; finished work is kept, so "
                "start the same command again",
            )

    # Tasks

    def _advance(self, timeout_s: float) -> None:
        """One round: replace, hand out, wait for one answer, take it, stop what overruns."""
        now = time.monotonic()
        for seat in self._seats:
            if seat.actor is None and not seat.retired and seat.resting_until <= now:
                self._start(seat)
        self._dispatch()
        owners = {ref: seat for seat in self._seats for ref in (seat.start_ref, *seat.jobs)}
        owners.pop(None, None)
        wait_s = min(timeout_s, self._next_alarm_s(now))
        if not owners:
            time.sleep(wait_s)
            return
        done, _ = ray.wait(list(owners), num_returns=1, timeout=wait_s)
        for ref in done:
            seat = owners[ref]
            if ref == seat.start_ref:
                self._started(seat)
            else:
                self._answered(seat, ref)
        self._stop_overrunning()
        self._dispatch()

    def _next_alarm_s(self, now: float) -> float:
        """Seconds until something is due even if no worker answers."""
        alarms = [now + 1.0]
        for seat in self._seats:
            if seat.jobs:
                alarms.append(seat.head_since + self._spec.task_timeout_s)
            if seat.resting_until > now:
                alarms.append(seat.resting_until)
        return max(min(alarms) - now, 0.0)

    def _dispatch(self) -> None:
        """Hand out tasks, to the least loaded workers first."""
        now = time.monotonic()
        ready = [seat for seat in self._seats if seat.ready and seat.resting_until <= now]
        everyone = {self._name_of(seat) for seat in self._seats if seat.ready}
        for n_before in range(1 + self._prefetch):
            for seat in ready:
                # Near the end nothing waits behind a running task: another may be free sooner.
                if n_before and len(self._todo) <= len(everyone):
                    return
                if len(seat.jobs) == n_before:
                    self._hand_out(seat, everyone)

    def _hand_out(self, seat: _Seat[TaskT], everyone: set[str]) -> None:
        """Give ``seat`` the first task that it may run, if any."""
        name = self._name_of(seat)
        for job in self._todo:
            if name not in job.avoid or everyone <= job.avoid:
                self._todo.remove(job)
                if not seat.jobs:
                    seat.head_since = time.monotonic()
                seat.jobs[seat.actor.run.remote(job.task)] = job
                return

    def _answered(self, seat: _Seat[TaskT], ref: Any) -> None:
        """Take the answer to the task behind ``ref``."""
        try:
            answer = ray.get(ref, timeout=_FETCH_TIMEOUT_S)
        except RayTaskError as error:
            reason = f"{_last_line(error)} in {seat.where}"
            self._went_wrong(self._take(seat, ref), seat, Incident.TASK_RAISED, reason)
        except ActorUnavailableError as error:
            job = self._take(seat, ref)
            self._went_wrong(job, seat, Incident.WORKER_UNAVAILABLE, _last_line(error))
        except (RayError, GetTimeoutError) as error:
            self._died(seat, _last_line(error))
        else:
            self._finished(self._take(seat, ref), seat, answer)

    def _finished(self, job: _Job[TaskT], seat: _Seat[TaskT], answer: Any) -> None:
        seat.n_unavailable = 0
        if isinstance(answer, QdistError):
            self._events.append(Failed(task=job.task, error=answer))
            return
        result, seconds = answer
        self._events.append(
            Completed(task=job.task, result=result, worker=self._name_of(seat), seconds=seconds)
        )

    def _take(self, seat: _Seat[TaskT], ref: Any) -> _Job[TaskT]:
        """Take a job off its worker; the clock of the next one begins."""
        seat.head_since = time.monotonic()
        return seat.jobs.pop(ref)

    def _died(self, seat: _Seat[TaskT], reason: str) -> None:
        """The actor is dead: save the answers it gave before, then blame the first task left."""
        saved, _ = ray.wait(list(seat.jobs), num_returns=len(seat.jobs), timeout=1.0)
        for ref in saved:
            try:
                answer = ray.get(ref, timeout=_FETCH_TIMEOUT_S)
            except (RayError, GetTimeoutError):
                continue
            self._finished(self._take(seat, ref), seat, answer)
        # After a time out of reach it was most likely dead before it got the task.
        was_away = seat.n_unavailable > 0
        self._blame_head(
            seat, Incident.WORKER_UNAVAILABLE if was_away else Incident.WORKER_DIED, reason
        )

    def _blame_head(self, seat: _Seat[TaskT], incident: Incident, reason: str) -> None:
        """Lose the actor over the task that it was running."""
        culprit = self._take(seat, next(iter(seat.jobs))) if seat.jobs else None
        where = seat.where
        self._lose(seat, reason)  # reported first: after a `Failed` the caller may stop listening
        if culprit is not None:
            self._went_wrong(culprit, seat, incident, f"{incident.value} ({reason}): {where}")

    def _stop_overrunning(self) -> None:
        now = time.monotonic()
        for seat in self._seats:
            if seat.jobs and now - seat.head_since >= self._spec.task_timeout_s:
                if ray.wait([next(iter(seat.jobs))], timeout=0)[0]:
                    continue  # it is done; only the driver was away
                limit = f"longer than {self._spec.task_timeout_s:g} s"
                self._blame_head(seat, Incident.TASK_TIMED_OUT, limit)

    def _went_wrong(
        self, job: _Job[TaskT], seat: _Seat[TaskT], incident: Incident, reason: str
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
            self._events.append(Failed(task=job.task, error=_gave_up(job.task, decision, reason)))
            return
        if isinstance(decision, Requeue):
            job.n_requeues += 1
            if seat.ready and not is_resting:
                seat.resting_until = time.monotonic() + decision.quarantine_s
        else:
            job.attempt = decision.attempt
            if seat.ready:
                job.avoid.add(self._name_of(seat))
        self._todo.appendleft(job)
        self._events.append(Retried(task=job.task, reason=reason, attempt=job.attempt))


def _gave_up(task: object, decision: GiveUp, reason: str) -> ClusterError:
    text = repr(task)
    return ClusterError(
        "QD803",
        where=f"task {text if len(text) <= 120 else text[:116] + ' ...'}",
        got=f"{decision.n_attempts} failed attempts, the last: {reason}",
        expected="the task to finish on one of them",
        mend="if workers die or run out of time, give them more memory or time "
        "(cluster.memory_bytes_per_worker, cluster.task_timeout_s); else report the exception",
    )


def _kill(actor: Any) -> None:
    # Ray may be gone already when the driver is being interrupted.
    if actor is not None and ray.is_initialized():
        ray.kill(actor, no_restart=True)


def _last_line(error: BaseException, limit: int = 300) -> str:
    """The last line of a message that says something; of a traceback, the exception."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    line = lines[-1] if lines else type(error).__name__
    line = line.partition(" Some common causes include")[0]  # advice by Ray, the same every time
    return line if len(line) <= limit else f"{line[: limit - 4]} ..."
