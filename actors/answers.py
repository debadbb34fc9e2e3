"""What the workers of a pool answer, and what becomes of each task then."""

from __future__ import annotations

import time
from collections import deque
from typing import Any, Generic

import ray
from ray.exceptions import ActorUnavailableError, GetTimeoutError, RayError, RayTaskError

from actors.crew import FETCH_TIMEOUT_S, Crew
from actors.events import Completed, Event, Failed, ResultT, Retried, TaskT
from actors.failures import gave_up, last_line, postponed
from actors.job_queue import JobQueue
from actors.nodes import NodeLedger
from actors.retry import GiveUp, Incident, Postpone, Requeue, RetryPolicy
from actors.seat import Job, Seat
from qdist.errors import QdistError

_N_KEPT = 1024
"""How many times of completed tasks are remembered."""


class Answers(Generic[TaskT, ResultT]):
    """Takes the workers' answers and reports every task once. Used by one thread, the pool's.

    What the caller is to hear is appended to ``events``; ``policy`` decides which jobs go back
    into ``queue``. ``recent_s`` are the seconds that the last completed tasks took.
    """

    def __init__(
        self,
        *,
        policy: RetryPolicy,
        queue: JobQueue[TaskT],
        crew: Crew[TaskT],
        ledger: NodeLedger,
        events: deque[Event[TaskT, ResultT]],
    ) -> None:
        self.recent_s: deque[float] = deque(maxlen=_N_KEPT)
        self._policy = policy
        self._queue = queue
        self._crew = crew
        self._ledger = ledger
        self._events = events

    def take(self, seat: Seat[TaskT], ref: Any) -> None:
        """Take the answer to the job behind ``ref``, which is there."""
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
            self._answered(seat.take(ref), seat, answer)

    def overran(self, seat: Seat[TaskT], limit: str) -> None:
        """The worker ran its task for longer than the ``limit``: it goes."""
        self._blame_head(seat, Incident.TASK_TIMED_OUT, limit)

    def _answered(self, job: Job[TaskT], seat: Seat[TaskT], answer: Any) -> None:
        seat.n_unavailable = 0
        if isinstance(answer, QdistError):
            self._refused(job, seat, answer)
            return
        result, seconds = answer
        self._queue.outage.ended()
        self._ledger.answered(seat.node_id, seconds, counts=not job.settled)
        if job.settled:
            return
        job.settled = True
        self.recent_s.append(seconds)
        self._events.append(
            Completed(task=job.task, result=result, worker=seat.name, seconds=seconds)
        )

    def _refused(self, job: Job[TaskT], seat: Seat[TaskT], error: QdistError) -> None:
        """The worker raised ``error``: the answer, unless the policy takes it for transient."""
        if job.settled:
            return
        now, outage = time.monotonic(), self._queue.outage
        job.waits_since = now if job.waits_since is None else job.waits_since
        # The task's own clock as well: others may reach the store where it does not.
        waited_s = max(now - job.waits_since, outage.lasted_s(now))
        is_transient = error.code in self._policy.transient_codes
        decision = self._policy.decide_error(
            error.code, waited_s=waited_s, n_in_a_row=outage.n_in_a_row + 1
        )
        if isinstance(decision, Postpone):
            outage.failed(now, decision.pause_s)
            left_s = self._policy.patience_s - waited_s
            reason = postponed(error, seat.where, pause_s=outage.retry_at - now, left_s=left_s)
            self._back(job, reason)
            return
        if is_transient:
            outage.failed(now, 0.0)  # whoever is next need not wait to learn the same
            if job.n_out:
                return  # its copy may still make it
        job.settled = True
        self._events.append(Failed(task=job.task, error=error))

    def _died(self, seat: Seat[TaskT], reason: str) -> None:
        """The actor is dead: save the answers it gave before, then blame the first task left."""
        saved, _ = ray.wait(list(seat.jobs), num_returns=len(seat.jobs), timeout=1.0)
        for ref in saved:
            try:
                answer = ray.get(ref, timeout=FETCH_TIMEOUT_S)
            except (RayError, GetTimeoutError):
                continue
            self._answered(seat.take(ref), seat, answer)
        # After a time out of reach it was most likely dead before it got the task.
        was_away = seat.n_unavailable > 0
        self._blame_head(
            seat, Incident.WORKER_UNAVAILABLE if was_away else Incident.WORKER_DIED, reason
        )

    def _blame_head(self, seat: Seat[TaskT], incident: Incident, reason: str) -> None:
        """Lose the actor over the task that it was running."""
        culprit = seat.take_head()
        where = seat.where
        # Reported first: after a `Failed` the caller may stop listening.
        self._crew.lose(seat, reason)
        if culprit is not None:
            self._went_wrong(culprit, seat, incident, f"{incident.value} ({reason}): {where}")

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
        if isinstance(decision, Requeue):
            job.n_requeues += 1
            if seat.ready and not is_resting:
                seat.resting_until = time.monotonic() + decision.quarantine_s
        if job.settled:
            return
        if isinstance(decision, GiveUp):
            if job.n_out:
                return  # its copy may still make it
            job.settled = True
            self._events.append(Failed(task=job.task, error=gave_up(job.task, decision, reason)))
            return
        if not isinstance(decision, Requeue):
            job.attempt = decision.attempt
            if seat.ready:
                job.avoid.add(seat.name)
        self._back(job, reason)

    def _back(self, job: Job[TaskT], reason: str) -> None:
        """Put ``job`` back into the queue, unless another worker has it as well."""
        if job.n_out:
            reason += "; its copy goes on"
        self._queue.put_first([job])
        self._events.append(Retried(task=job.task, reason=reason, attempt=job.attempt))
