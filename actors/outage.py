"""What a pool knows of a store that cannot be reached: when to try it again."""

from __future__ import annotations


class Outage:
    """Between the first task that could not reach the store and the next one that could.

    Meanwhile nothing is handed out but one task after each pause, to find out whether the store is
    back: all workers would only fail as that one does. Times are seconds of one monotonic clock,
    given by the caller.
    """

    def __init__(self) -> None:
        self.n_in_a_row = 0
        self._since = 0.0
        self._retry_at = 0.0
        self._pause_s = 0.0
        self._is_trying = False

    @property
    def is_on(self) -> bool:
        """Whether the store was out of reach when a task last needed it."""
        return self.n_in_a_row > 0

    @property
    def retry_at(self) -> float:
        """When the next task may try. Of use only while `is_on`."""
        return self._retry_at

    def lasted_s(self, now: float) -> float:
        """Seconds since the first task that could not reach the store; 0 while there is none."""
        return now - self._since if self.is_on else 0.0

    def failed(self, now: float, pause_s: float) -> None:
        """A task could not reach the store at ``now``; the next may try after ``pause_s``.

        Of tasks that were under way together, only the first makes the pause longer.
        """
        if self.is_on and not self._is_trying and now < self._retry_at:
            return
        if not self.is_on:
            self._since = now
        self.n_in_a_row += 1
        self._pause_s, self._retry_at, self._is_trying = pause_s, now + pause_s, False

    def may_try(self, now: float) -> bool:
        """Whether one task may be handed out at ``now``."""
        return now >= self._retry_at

    def tries(self, now: float) -> None:
        """One task was handed out; the next one goes a pause later even if that one hangs."""
        self._is_trying = True
        self._retry_at = now + self._pause_s

    def ended(self) -> None:
        """A task reached the store."""
        self.n_in_a_row, self._retry_at, self._is_trying = 0, 0.0, False
