"""The workers of a pool: started, replaced when they are lost, retired when that is no use."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Mapping
from typing import Any, Generic

import ray
from ray.exceptions import GetTimeoutError, RayError

from actors.events import Event, TaskT, Worker, WorkerJoined, WorkerLost
from actors.failures import last_line, never_started, not_ready, postponed
from actors.host import Host
from actors.job_queue import JobQueue
from actors.nodes import NodeLedger
from actors.retry import Postpone, RetryPolicy
from actors.seat import Seat
from actors.session import ClusterSpec, worker_runtime_env
from qdist.errors import QdistError

FETCH_TIMEOUT_S = 300.0
"""Seconds for an answer that is ready to reach the driver."""

_REST_AFTER_FAILED_START_S = 0.5


class Crew(Generic[TaskT]):
    """The seats of a pool, and what becomes of their actors. Used by one thread, the pool's.

    Who joins and who is lost is appended to ``events``, who joins goes into ``ledger`` too; the
    jobs of a lost worker go back into ``queue``. ``policy`` says which errors of a worker's setup
    may pass. ``facts`` are those of every worker that joined, in that order.
    """

    def __init__(
        self,
        spec: ClusterSpec,
        *,
        name: str,
        policy: RetryPolicy,
        queue: JobQueue[TaskT],
        ledger: NodeLedger,
        events: deque[Event[Any, Any]],
    ) -> None:
        self.seats: list[Seat[TaskT]] = [
            Seat(pool=name, index=index) for index in range(spec.n_workers)
        ]
        self.facts: list[Mapping[str, Any]] = []
        self.last_loss = "no worker ever started"
        self._spec = spec
        self._name = name
        self._policy = policy
        self._queue = queue
        self._ledger = ledger
        self._events = events
        self._make_ref: Any = None
        self._actor_class: Any = None

    @property
    def is_engaged(self) -> bool:
        """Whether `engage` was called, and `dismiss` was not."""
        return self._make_ref is not None

    @property
    def n_alive(self) -> int:
        """Workers that are ready, idle or busy."""
        return sum(seat.ready for seat in self.seats)

    @property
    def waits_for(self) -> QdistError | None:
        """The transient error that keeps a worker from starting, if there is such a worker."""
        return next((seat.waits_for for seat in self.seats if seat.waits_for is not None), None)

    @property
    def is_retired(self) -> bool:
        """Whether no seat will get a worker again."""
        return all(seat.retired for seat in self.seats)

    def engage(self, make_worker: Callable[[], Worker[Any, Any]]) -> None:
        """Prepare the actors; `fill` starts them. ``make_worker`` goes to the object store."""
        self._make_ref = ray.put(make_worker)
        self._actor_class = ray.remote(Host).options(
            num_cpus=self._spec.cpus_per_worker,
            num_gpus=self._spec.gpus_per_worker,
            memory=self._spec.memory_bytes_per_worker,
            max_restarts=0,
            max_task_retries=0,
            scheduling_strategy="SPREAD",
            runtime_env=worker_runtime_env(self._spec),
        )

    def dismiss(self) -> None:
        """Kill all actors."""
        for seat in self.seats:
            seat.clear()
        self._make_ref = None

    def fill(self, now: float) -> None:
        """Start an actor on every seat that lacks one and is due for it."""
        for seat in self.seats:
            if seat.actor is None and not seat.retired and seat.resting_until <= now:
                seat.start(self._actor_class, self._make_ref)

    def started(self, seat: Seat[TaskT], *, at_work: bool) -> None:
        """Take the answer to `actors.host.Host.start`.

        Until the pool is ``at_work``, raises what a worker's setup raised, and QD803 or QD804
        after ``max_attempts``; from then on such a seat is retired. What the policy takes for
        transient is waited for, by either.
        """
        ref, seat.start_ref = seat.start_ref, None
        try:
            answer = ray.get(ref, timeout=FETCH_TIMEOUT_S)
        except (RayError, GetTimeoutError) as error:
            self._start_failed(seat, error, at_work=at_work)
            return
        if isinstance(answer, QdistError):
            self._start_failed(seat, answer, at_work=at_work)
            return
        facts = seat.joined(answer)
        self.facts.append(facts)
        self._ledger.joined(facts)
        self._events.append(WorkerJoined(worker=seat.name, facts=facts))

    def _start_failed(self, seat: Seat[TaskT], error: BaseException, *, at_work: bool) -> None:
        """Try again after a rest; give up at once on bad input, and after ``max_attempts``."""
        if isinstance(error, QdistError) and self._waits(seat, error):
            return
        seat.n_failed_starts += 1
        is_final = isinstance(error, QdistError) or (
            seat.n_failed_starts >= self._spec.max_attempts
        )
        if is_final and not at_work:
            if isinstance(error, QdistError):
                raise error
            raise never_started(seat.name, error, n_starts=seat.n_failed_starts) from error
        # Once others are at work, one node that cannot start a worker does not stop them.
        seat.retired = is_final
        self.lose(seat, f"it did not start: {last_line(error)}")
        seat.resting_until = time.monotonic() + _REST_AFTER_FAILED_START_S * seat.n_failed_starts

    def _waits(self, seat: Seat[TaskT], error: QdistError) -> bool:
        """Whether ``error`` is transient; the next start of the worker then comes after a pause."""
        now = time.monotonic()
        waited_s = 0.0 if seat.waits_for is None else now - seat.waits_since
        decision = self._policy.decide_error(
            error.code, waited_s=waited_s, n_in_a_row=seat.n_waits + 1
        )
        if not isinstance(decision, Postpone):
            return False
        seat.waits(error, now)
        left_s = self._policy.patience_s - waited_s
        self.lose(
            seat,
            "it did not start: "
            + postponed(error, "its setup", pause_s=decision.pause_s, left_s=left_s),
        )
        seat.resting_until = now + decision.pause_s
        return True

    def lose(self, seat: Seat[TaskT], reason: str) -> None:
        """Kill the actor of ``seat`` for good; `fill` starts the next one."""
        self._events.append(WorkerLost(worker=seat.name, reason=reason))
        self.last_loss = f"{seat.name}: {reason}"
        # What was waiting behind the culprit never began: first in the queue, nothing counted.
        self._queue.put_first(seat.vacate())

    def not_ready(self) -> QdistError:
        """The error that says who or what is missing after ``ready_timeout_s``."""
        return self.waits_for or not_ready(
            self._name,
            self._spec,
            n_ready=self.n_alive,
            free={k: ray.available_resources().get(k, 0.0) for k in self._spec.needs},
            last_loss=self.last_loss if any(seat.generation for seat in self.seats) else None,
        )
