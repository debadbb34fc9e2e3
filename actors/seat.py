"""The place of one worker in a pool, and the jobs that wait there."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Generic

import ray

from actors.events import TaskT


@dataclass(slots=True, kw_only=True, eq=False)
class Job(Generic[TaskT]):
    """A task in the queue or at a worker, and what happened to it so far."""

    task: TaskT
    attempt: int = 1
    n_requeues: int = 0
    avoid: set[str] = field(default_factory=set)


@dataclass(slots=True, kw_only=True, eq=False)
class Seat(Generic[TaskT]):
    """The place of one worker: its actor, which is replaced when it dies, and its jobs.

    ``jobs`` maps the reference of every job at the actor to it, in the order in which the actor
    runs them; ``head_since`` is when the first of them began (seconds, monotonic clock).
    """

    pool: str
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
    jobs: dict[Any, Job[TaskT]] = field(default_factory=dict)
    head_since: float = 0.0

    @property
    def name(self) -> str:
        """The worker's name; a replacement has another."""
        suffix = f".{self.generation}" if self.generation else ""
        return f"{self.pool}-{self.index}{suffix}"

    def takes_jobs(self, now: float) -> bool:
        """Whether a job may be given to the worker at ``now`` (monotonic clock)."""
        return self.ready and self.resting_until <= now

    def start(self, actor_class: Any, make_ref: Any) -> None:
        """Start an actor, and its worker from the reference to what makes one."""
        self.actor = actor_class.remote()
        self.start_ref = self.actor.start.remote(make_ref)

    def joined(self, answer: Mapping[str, Any]) -> dict[str, Any]:
        """Note that the worker is ready; its facts, from the ``answer`` of `actors.host.Host`."""
        facts = {**answer, "worker": self.name}
        self.ready = True
        self.where = f"{self.name} (node {facts['node_ip']}, pid {facts['pid']})"
        self.n_failed_starts = 0
        return facts

    def give(self, job: Job[TaskT]) -> None:
        """Send ``job`` to the actor."""
        if not self.jobs:
            self.head_since = time.monotonic()
        self.jobs[self.actor.run.remote(job.task)] = job

    def take(self, ref: Any) -> Job[TaskT]:
        """Take a job off its worker; the clock of the next one begins."""
        self.head_since = time.monotonic()
        return self.jobs.pop(ref)

    def take_head(self) -> Job[TaskT] | None:
        """Take the job that the worker is running, if any."""
        return self.take(next(iter(self.jobs))) if self.jobs else None

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
        self.jobs.clear()
