"""Statistics that candidates of a search ask for: of a smoothed model, of fewer samples, or both.

They are measured in parts, by any processes that share the store, then merged: nothing is measured
twice, and the result is that of one process (design law 1).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from qdist.calibration.feeds import load_phases
from qdist.calibration.here import calibrate_here, measure_here, statistics_here
from qdist.calibration.job import CalibrationJob
from qdist.calibration.prefix import prefix_of
from qdist.calibration.smoothed import (
    joined,
    on_batches,
    smoothed_job,
    smoothed_location,
    smoothed_rows,
)
from qdist.data.source import DataSource
from qdist.model.difference import rewriting_difference
from qdist.model.graph import Graph
from qdist.plan.smoothing import smoothed_graph
from qdist.search.trial import Settings
from qdist.stats.record import CalibrationRecord
from qdist.store.receipt import Batch
from qdist.store.zarr_store import ZarrStore, create_store, open_store

_CHECK = "smoothing"
"""Document of a smoothed model's store: that its outputs are those of the model before."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SmoothedRows:
    """The rows that smoothing changes. ``graph``: of the smoothed model; ``job``: measures them on
    all samples; ``whole``: on those of the calibration, which may have stopped early."""

    graph: Graph
    job: CalibrationJob
    whole: CalibrationJob
    store: ZarrStore
    notes: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class CandidateStatistics:
    """What measures for the candidates of one search. Picklable; used by one thread.

    ``job``: of the calibration, on all samples; ``location``: of its store; ``batches``: those that
    ``record`` was merged from. ``factors``: what factors of smoothing come from; None: the record.
    ``alpha``: the strength that the run itself has; candidates may have another only where it is
    None.
    """

    job: CalibrationJob
    source: DataSource
    location: str
    batches: tuple[Batch, ...]
    record: CalibrationRecord
    factors: CalibrationRecord | None = None
    alpha: float | None = None
    _smoothed: dict[float, SmoothedRows] = field(default_factory=dict, compare=False, repr=False)

    def __getstate__(self) -> Mapping[str, Any]:
        # Stores and models that were opened stay behind.
        return {**vars(self), "_smoothed": {}}

    def __call__(self, settings: Settings) -> CalibrationRecord:
        """The statistics; what the stores lack is measured in this process. Raises QD207, QD212,
        QD311."""
        alpha, n = self._wanted(settings)
        record = self.record
        if n is not None:
            record = statistics_here(self.job, self.source, self._store(), n).record
        if alpha is None:
            return record
        rows = self.smoothed(alpha)
        if n is None:
            return joined(record, calibrate_here(rows.whole, self.source, rows.store).record)
        return joined(record, statistics_here(rows.job, self.source, rows.store, n).record)

    def n_parts(self, settings: Settings, n_most: int) -> int:
        """Into how many parts, ``n_most`` at most, measuring can be cut: whole shards. Raises
        QD311."""
        if self.job.settings.n_blocks > 1:
            return 1
        n_batches = len(self._cut(self.job, self._wanted(settings)[1]).grid)
        return max(1, min(n_most, -(-n_batches // self.job.n_per_shard)))

    def measure(self, settings: Settings, part: int, n_parts: int) -> None:
        """Measure what the stores lack of one part of ``n_parts``, without merging. Raises as a
        call."""
        alpha, n = self._wanted(settings)
        wanted = [] if n is None else [(self._cut(self.job, n), self._store())]
        if alpha is not None:
            rows = self.smoothed(alpha)
            wanted.append((rows.whole if n is None else self._cut(rows.job, n), rows.store))
        for job, store in wanted:
            measure_here(_part(job, part, n_parts), self.source, store)

    def smoothed(self, alpha: float) -> SmoothedRows:
        """What measures the rows that strength ``alpha`` changes; the outputs are compared where
        that was not done. Raises QD207, QD212."""
        if alpha not in self._smoothed:
            self._smoothed[alpha] = self._find(alpha)
        return self._smoothed[alpha]

    def _find(self, alpha: float) -> SmoothedRows:
        job, before = self.job, self.job.measuring.graph
        graph, found = smoothed_graph(before, self.factors or self.record, job.taps, alpha)
        own = smoothed_job(job, graph, smoothed_rows(before, job.taps, found.smoothing))
        store = create_store(smoothed_location(self.location, graph.model), own.identity)
        checked = store.document(_CHECK)
        if checked is None:
            difference = rewriting_difference(
                before.model,
                graph.model,
                load_phases(own.grid[0], self.source, own.inputs, own.decoder)[0],
                before.execution,
                budget_bytes=own.settings.memory_budget_bytes,
            )
            checked = {"difference": difference}
            store.put_document(_CHECK, checked)
        notes = found.notes()
        if checked["difference"]:
            notes.append(f"smoothing moves the float result by {checked['difference']:.2g}")
        return SmoothedRows(
            graph=graph,
            job=own,
            whole=on_batches(own, self.batches),
            store=store,
            notes=tuple(notes),
        )

    def _wanted(self, settings: Settings) -> tuple[float | None, int | None]:
        alpha = float(settings["smoothing"]) if "smoothing" in settings else self.alpha
        return alpha, int(settings["n_samples"]) if "n_samples" in settings else None

    def _cut(self, job: CalibrationJob, n_samples: int | None) -> CalibrationJob:
        return job if n_samples is None else prefix_of(job, n_samples)

    def _store(self) -> ZarrStore:
        return open_store(self.location)


def _part(job: CalibrationJob, part: int, n_parts: int) -> CalibrationJob:
    """Whole shards of a job, ``n_parts`` times about as many; ``part`` from 0."""
    n_shards = -(-len(job.grid) // job.n_per_shard)
    start, stop = (n_shards * i // n_parts * job.n_per_shard for i in (part, part + 1))
    return job.part(job.grid[start:stop])
