"""Live bars on a terminal; plain lines every few seconds elsewhere."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    SpinnerColumn,
    Task,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.text import Text

PLAIN_EVERY_S = 5.0


class _Rate(ProgressColumn):
    """Units per second, of what this run did itself."""

    def __init__(self, unit: str) -> None:
        super().__init__()
        self._unit = unit

    def render(self, task: Task) -> Text:
        speed = task.finished_speed or task.speed
        return Text(f"{speed:.1f} {self._unit}/s" if speed else f"- {self._unit}/s")


class Bar:
    """One progress bar. `update` as often as you like; it draws as often as it needs."""

    def __init__(self, console: Console, label: str, unit: str) -> None:
        self._console = console
        self._label = label
        self._unit = unit
        self._begin = time.monotonic()
        self._last_line = self._begin
        self._first_done: int | None = None
        self._progress: Progress | None = None
        self._task = None
        if console.is_terminal:
            self._progress = Progress(
                SpinnerColumn(),
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                _Rate(unit),
                TimeElapsedColumn(),
                TimeRemainingColumn(),
                TextColumn("{task.fields[note]}"),
                console=console,
            )
            self._progress.start()
            self._task = self._progress.add_task(label, total=None, note="")

    def start_clock(self) -> None:
        """Count rates from now on: whatever came before was not the work itself."""
        self._begin = time.monotonic()
        self._first_done = None
        if self._progress is not None and self._task is not None:
            self._progress.reset(self._task, total=None)

    def update(self, done: int, total: int, note: str = "") -> None:
        """``done`` of ``total`` units; ``note`` stands at the end of the line."""
        if self._first_done is None:
            self._first_done = done
        if self._progress is not None and self._task is not None:
            self._progress.update(self._task, completed=done, total=total, note=note)
            return
        now = time.monotonic()
        if now - self._last_line >= PLAIN_EVERY_S and done < total:
            self._last_line = now
            self._console.print(self._line(done, total, now, note), highlight=False)

    def say(self, text: str) -> None:
        """A line of its own, above the bar."""
        self._console.print(text, highlight=False, markup=False, emoji=False, soft_wrap=True)

    def close(self, done: int, total: int, note: str = "") -> None:
        """Stop drawing and leave one line that says what was done."""
        if self._progress is not None:
            self._progress.stop()
            return
        self._console.print(self._line(done, total, time.monotonic(), note), highlight=False)

    def _line(self, done: int, total: int, now: float, note: str) -> str:
        seconds = max(now - self._begin, 1e-9)
        # Where a run stops early, it ends below what it once took to be done.
        own = max(0, done - (self._first_done or 0))
        rate = own / seconds
        text = f"{self._label}: {done}/{total} {self._unit}"
        if own == 0 and done == total:
            return f"{text}, all of it done before"
        text += f", {rate:.1f} {self._unit}/s"
        if rate > 0 and done < total:
            text += f", about {(total - done) / rate:.0f} s left"
        return f"{text}, {note}" if note else text


@contextmanager
def bar(console: Console, label: str, unit: str) -> Iterator[Bar]:
    """A bar for the block; stops drawing however the block ends."""
    made = Bar(console, label, unit)
    try:
        yield made
    finally:
        if made._progress is not None:
            made._progress.stop()
