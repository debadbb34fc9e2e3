"""The place of one worker in a pool, and the jobs that wait there."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Generic

import ray

from actors.events import TaskT
from qdist.errors import QdistError


@dataclass(slots=True, kw_only=True, eq=False)
class Job(Generic[TaskT]):
    """A task in the queue or at workers, and what happened to it so far.

    ``n_out``: how many workers have it; ``duplicated``: it was given to a second one because it
    was late; ``settled``: it was answered, and any further answer counts for nothing;
    ``waits_since``: when it first met a transient error (seconds, monotonic clock).
    """

    task: TaskT
    attempt: int = 1
    n_requeues: int = 0
    n_out: int = 0
    duplicated: bool = False
    settled: bool = False
    waits_since: float | None = None
    avoid: set[str] = field(default_factory=set)

    @property
    def needs_worker(self) -> bool:
        """Whether nobody has it, and nobody has answered it."""
        return not self.settled and not self.n_out


@dataclass(slots=True, kw_only=True, eq=False)
class Seat(Generic[TaskT]):
    """The place of one worker: its actor, which is replaced when it dies, and its jobs.

    ``jobs`` maps the reference of every job at the actor to it, in the order in which the actor
    runs them; ``head_since`` is when the first of them began (seconds, monotonic clock).
    ``waits_for`` is the transient error that keeps the worker from starting since
    ``waits_since``, ``n_waits`` times in a row.
    """

    pool: str
    index: int
    generation: int = 0
    actor: Any = None
    start_ref: Any = None
    ready: bool = False
    where: str = ""
    node_id: str = ""
    n_failed_starts: int = 0
    n_unavailable: int = 0
    waits_for: QdistError | None = None
    waits_since: float = 0.0
    n_waits: int = 0
    resting_until: float = 0.0
    retired: bool = False
    jobs: dict[Any, Job[TaskT]] = field(default_factory=dict)
    head_since: float = 0.0

    @property
    def name(self) -> str:
        """The worker's name; a replacement has another."""
        suffix = f".{self.generation}" if self.generation else ""
        return f"{self.pool}-{self.index}{suffix}"

    @property
    def head(self) -> Any:
        """The reference of the job that the worker is running, if any."""
        return next(iter(self.jobs), None)

    def takes_jobs(self, now: float) -> bool:
        """Whether a job may be given to the worker at ``now`` (monotonic clock)."""
        # Behind a job that was answered elsewhere because it is late here, others would be too.
        is_behind = any(job.settled for job in self.jobs.values())
        return self.ready and self.resting_until <= now and not is_behind

    def is_idle(self, now: float) -> bool:
        """Whether a job given to the worker at ``now`` would start at once."""
        return not self.jobs and self.takes_jobs(now)

    def start(self, actor_class: Any, make_ref: Any) -> None:
        """Start an actor, and its worker from the reference to what makes one."""
        self.actor = actor_class.remote()
        self.start_ref = self.actor.start.remote(make_ref)

    def joined(self, answer: Mapping[str, Any]) -> dict[str, Any]:
        """Note that the worker is ready; its facts, from the ``answer`` of `actors.host.Host`."""
        facts = {**answer, "worker": self.name}
        self.ready = True
        self.where = f"{self.name} (node {facts['node_ip']}, pid {facts['pid']})"
        self.node_id = str(facts["node_id"])
        self.n_failed_starts = 0
        self.waits_for, self.n_waits = None, 0
        return facts

    def waits(self, error: QdistError, now: float) -> None:
        """Note that a transient ``error`` kept the worker from starting at ``now``."""
        if self.waits_for is None:
            self.waits_since = now
        self.waits_for = error
        self.n_waits += 1

    def give(self, job: Job[TaskT]) -> None:
        """Send ``job`` to the actor."""
        if not self.jobs:
            self.head_since = time.monotonic()
        job.n_out += 1
        self.jobs[self.actor.run.remote(job.task)] = job

    def take(self, ref: Any) -> Job[TaskT]:
        """Take a job off its worker; the clock of the next one begins."""
        self.head_since = time.monotonic()
        job = self.jobs.pop(ref)
        job.n_out -= 1
        return job

    def take_head(self) -> Job[TaskT] | None:
        """Take the job that the worker is running, if any."""
        return self.take(self.head) if self.jobs else None

    def vacate(self) -> list[Job[TaskT]]:
        """Kill the actor and make room for the next; the jobs it had, in their order."""
        jobs = list(self.jobs.values())
        self.clear()
        self.generation += 1
        self.n_unavailable = 0
        self.resting_until = 0.0
        return jobs

    def clear(self) -> None:
        """Kill the actor for good and forget its jobs."""
        # Ray may be gone already when the driver is being interrupted.
        if self.actor is not None and ray.is_initialized():
            ray.kill(self.actor, no_restart=True)
        self.actor, self.start_ref, self.ready = None, None, False
        for job in self.jobs.values():
            job.n_out -= 1
        self.jobs.clear()
