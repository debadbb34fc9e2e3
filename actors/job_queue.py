"""The queue of a pool: which job goes to which worker next."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterable, Sequence
from typing import Generic

from actors.events import TaskT
from actors.outage import Outage
from actors.seat import Job, Seat


class JobQueue(Generic[TaskT]):
    """Jobs that wait for a worker. Used by one thread, the pool's.

    While there is an ``outage``, one job at a time tries whether it has ended.
    """

    def __init__(self, *, prefetch: int) -> None:
        """``prefetch``: how many jobs may wait at a worker behind the one that it runs."""
        self.outage = Outage()
        self._prefetch = prefetch
        self._jobs: deque[Job[TaskT]] = deque()

    def __len__(self) -> int:
        return len(self._jobs)

    def add(self, task: TaskT) -> None:
        """Add a task at the end."""
        self._jobs.append(Job(task=task))

    def put_first(self, jobs: Iterable[Job[TaskT]]) -> None:
        """Put jobs back before all others, in the order given; not those that need no worker."""
        self._jobs.extendleft(reversed([job for job in jobs if job.needs_worker]))

    def hand_out(self, seats: Sequence[Seat[TaskT]]) -> None:
        """Give jobs to ``seats``, to the least loaded workers first."""
        now = time.monotonic()
        ready = [seat for seat in seats if seat.takes_jobs(now)]
        everyone = {seat.name for seat in seats if seat.ready}
        if self.outage.is_on:
            self._try_one(ready, everyone, now)
            return
        for n_before in range(1 + self._prefetch):
            for seat in ready:
                # Near the end nothing waits behind a running task: another may be free sooner.
                if n_before and len(self._jobs) <= len(everyone):
                    return
                if len(seat.jobs) == n_before:
                    self._give(seat, everyone)

    def _try_one(self, ready: Sequence[Seat[TaskT]], everyone: set[str], now: float) -> None:
        if self.outage.may_try(now) and any(
            self._give(seat, everyone) for seat in ready if not seat.jobs
        ):
            self.outage.tries(now)

    def _give(self, seat: Seat[TaskT], everyone: set[str]) -> bool:
        """Give ``seat`` the first job that it may run; whether there was one."""
        for job in self._jobs:
            if seat.name not in job.avoid or everyone <= job.avoid:
                self._jobs.remove(job)
                seat.give(job)
                return True
        return False
