"""Statistics that candidates ask for, measured by the pool that runs the trials.

Some tasks measure a part each; then one merges them into a file, which the tasks of trials read.
Whoever asks for the same statistics waits for the same file, while all other trials go on.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qdist.search.applied import OF_STATISTICS, needs_statistics
from qdist.search.trial import Candidate, Settings
from qdist.store.record_file import write_record

if TYPE_CHECKING:  # what it imports takes time that few searches need
    from qdist.search.statistics import CandidateStatistics

Waiting = tuple[str, Candidate]
"""Key and candidate of a trial that waits."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StatisticsTask:
    """Measure part number ``part`` of ``n_parts`` of the statistics for ``settings``; with None
    merge them, measure what lacks, and write ``path``. Hashable, so that it can travel."""

    settings: tuple[tuple[str, int | float | str], ...]
    path: Path
    part: int | None
    n_parts: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """The answer to a `StatisticsTask`."""


def run_statistics(task: StatisticsTask, statistics: CandidateStatistics) -> Measured:
    """Do a task. Safe to run twice. Raises as `CandidateStatistics`, QD603."""
    settings = dict(task.settings)
    if task.part is None:
        write_record(task.path, statistics(settings))
    else:
        statistics.measure(settings, task.part, task.n_parts)
    return Measured()


@dataclass(slots=True)
class _Order:
    """Statistics under way: tasks that still run, and who waits."""

    n_open: int
    merge: StatisticsTask
    waiting: list[Waiting] = field(default_factory=list)


class Orders:
    """Which statistics are there and which are under way; who waits for them. Owned by the driver
    of a search. ``folder``: for the files, which workers see too. ``statistics``: what measures
    them; None: what is not in the folder cannot be had."""

    def __init__(
        self, folder: Path, statistics: CandidateStatistics | None, n_workers: int
    ) -> None:
        self._folder = folder
        self._statistics = statistics
        self._n_workers = n_workers
        self._orders: dict[Path, _Order] = {}

    def path_of(self, settings: Settings) -> Path | None:
        """The file of the statistics that these settings ask for; None for the run's own."""
        if not needs_statistics(settings):
            return None
        name = "-".join(f"{key}-{value}" for key, value in _own(settings).items())
        return self._folder / f"{name}.zarr.zip"

    @property
    def fingerprint(self) -> dict[str, Any] | None:
        """What workers have to run under, so that what they measure fits."""
        statistics = self._statistics
        return None if statistics is None else dict(statistics.job.identity.fingerprint)

    def wait(self, path: Path, waiting: Waiting) -> list[StatisticsTask]:
        """Let a trial wait for a file that is not there; the tasks to run for it, if it is the
        first that asks. Raises QD311, and `RuntimeError` where nothing measures."""
        if path in self._orders:
            self._orders[path].waiting.append(waiting)
            return []
        if self._statistics is None:
            raise RuntimeError(f"nothing measures {path.name}")
        own = _own(waiting[1].settings)
        n = self._statistics.n_parts(own, self._n_workers)
        merge, *parts = (
            StatisticsTask(settings=tuple(own.items()), path=path, part=part, n_parts=n)
            for part in (None, *range(n))
        )
        # One part needs no merge of its own.
        first = parts if n > 1 else [merge]
        self._orders[path] = _Order(n_open=len(first), merge=merge, waiting=[waiting])
        return first

    def done(self, task: StatisticsTask) -> tuple[list[StatisticsTask], list[Waiting]]:
        """A task has ended: the tasks that come next, and the trials that need not wait longer."""
        order = self._orders.get(task.path)
        if order is None:
            return [], []
        order.n_open -= 1
        if order.n_open:
            return [], []
        if task.part is None:
            del self._orders[task.path]
            return [], order.waiting
        order.n_open = 1
        return [order.merge], []

    def failed(self, task: StatisticsTask) -> Iterable[Waiting]:
        """A task has failed for good: the trials that waited in vain."""
        order = self._orders.pop(task.path, None)
        return () if order is None else order.waiting


def _own(settings: Settings) -> dict[str, int | float | str]:
    return {key: settings[key] for key in OF_STATISTICS if key in settings}
