"""SmoothQuant for commands: factors, the smoothed model, and statistics that fit it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from qdist.calibration.feeds import load_phases
from qdist.calibration.here import calibrate_here, statistics_here
from qdist.calibration.job import CalibrationJob
from qdist.calibration.smoothed import (
    channels_job,
    channels_location,
    joined,
    joined_blocks,
    on_batches,
    smoothed_job,
    smoothed_location,
    smoothed_rows,
    stored_channels,
    stored_rows,
)
from qdist.cli import schema
from qdist.cli.commands import steps
from qdist.cli.context import Context
from qdist.errors import ConfigError
from qdist.model.difference import rewriting_difference
from qdist.model.graph import Graph
from qdist.plan.smoothing import lacking_channels, smoothed_graph
from qdist.search.trial import Settings
from qdist.stats.record import CalibrationRecord
from qdist.store.protocol import FinishedMerge
from qdist.store.zarr_store import ZarrStore, create_store

_CHECK = "smoothing"
"""Document of a smoothed model's store: that its outputs are those of the model before."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Smoothed:
    """A smoothed model, and statistics of all its tensors."""

    graph: Graph
    record: CalibrationRecord
    notes: tuple[str, ...]
    blocks: tuple[CalibrationRecord, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class _Measuring:
    """``job``: measures the rows of a smoothed model on all samples; ``whole``: on those of the
    calibration, which may have stopped early."""

    job: CalibrationJob
    whole: CalibrationJob
    store: ZarrStore
    notes: tuple[str, ...]


def stored(
    graph: Graph,
    store: ZarrStore,
    merge: FinishedMerge,
    alpha: float,
    blocks: Sequence[CalibrationRecord] = (),
) -> Smoothed:
    """The model smoothed with ``alpha``, with statistics that were measured before. ``blocks``: of
    the model as it is. Raises QD212, and QD402 where they were not measured."""
    factors = stored_channels(store.location, merge, lacking_channels(graph, merge.record))
    smoothed, found = smoothed_graph(graph, factors, merge.taps, alpha)
    rows = smoothed_rows(graph, merge.taps, found.smoothing)
    own, rows_merge = stored_rows(store.location, smoothed.model, merge, rows)
    return Smoothed(
        graph=smoothed,
        record=joined(merge.record, rows_merge.record),
        blocks=joined_blocks(blocks, own, rows_merge) if blocks else (),
        notes=tuple(found.notes()),
    )


class Smoother:
    """Smooths the model of a calibration, and measures what that changes. Kept by its strength."""

    def __init__(self, context: Context[Any], graph: Graph, done: steps.Calibrated) -> None:
        """``graph``: of the model as it was calibrated."""
        self._context = context
        self._graph = graph
        self._done = done
        self._known: dict[float, _Measuring] = {}
        self._factors: CalibrationRecord | None = None

    def factors(self, config: schema.CalibrateSettings | schema.TuneSettings) -> CalibrationRecord:
        """What factors come from: the calibration's record, with the extrema of channels that it
        lacks; these are measured over the pool, once for all strengths."""
        if self._factors is None:
            done = self._done
            self._factors = done.merged.record
            if axes := lacking_channels(self._graph, self._factors):
                job = on_batches(channels_job(done.job, axes), done.store.latest().batches)
                store = create_store(channels_location(done.store.location), job.identity)
                rows = steps.measured(self._context, job, done.source, store, config.cluster)
                self._factors = joined(self._factors, rows.record)
        return self._factors

    def smoothed(
        self, alpha: float, config: schema.CalibrateSettings | schema.TuneSettings
    ) -> Smoothed:
        """The model smoothed with ``alpha``; what lacks is measured over the pool, with progress.

        Raises QD212, QD207, and what a calibration raises.
        """
        self.factors(config)
        own, done = self._measuring(alpha), self._done
        self._context.notes(own.notes)
        rows = steps.measured(self._context, own.whole, done.source, own.store, config.cluster)
        return Smoothed(
            graph=own.job.measuring.graph,
            record=joined(done.merged.record, rows.record),
            notes=own.notes,
        )

    def rows_here(self, alpha: float, n_samples: int | None) -> CalibrationRecord:
        """The rows that smoothing changes, of the first so many samples or all; what lacks is
        measured in this process. Comes after `factors`. Raises as `smoothed`, and QD311."""
        own, source = self._measuring(alpha), self._done.source
        if n_samples is not None:
            return statistics_here(own.job, source, own.store, n_samples).record
        return calibrate_here(own.whole, source, own.store).record

    def _measuring(self, alpha: float) -> _Measuring:
        """What measures the rows; the outputs are compared where that was not done."""
        if alpha in self._known:
            return self._known[alpha]
        done, graph = self._done, self._graph
        record = self._factors or done.merged.record
        smoothed, found = smoothed_graph(graph, record, done.job.taps, alpha)
        rows = smoothed_rows(graph, done.job.taps, found.smoothing)
        job = smoothed_job(done.job, smoothed, rows)
        store = create_store(smoothed_location(done.store.location, smoothed.model), job.identity)
        checked = store.document(_CHECK)
        if checked is None:
            feeds = load_phases(job.grid[0], done.source, job.inputs, job.decoder)[0]
            difference = rewriting_difference(
                graph.model,
                smoothed.model,
                feeds,
                graph.execution,
                budget_bytes=job.settings.memory_budget_bytes,
            )
            checked = {"difference": difference}
            store.put_document(_CHECK, checked)
        notes = found.notes()
        if checked["difference"]:
            notes.append(f"smoothing moves the float result by {checked['difference']:.2g}")
        self._known[alpha] = _Measuring(
            job=job,
            whole=on_batches(job, done.store.latest().batches),
            store=store,
            notes=tuple(notes),
        )
        return self._known[alpha]


class TrialStatistics:
    """Statistics that candidates of a search ask for, by their settings."""

    def __init__(
        self,
        done: steps.Calibrated,
        smoother: Smoother,
        alpha: float | None,
        factors: CalibrationRecord | None,
    ) -> None:
        """``alpha``: of the run itself; candidates may have another only where it is None.
        ``factors``: what theirs come from; None where they may not."""
        self.factors = factors
        self._done = done
        self._smoother = smoother
        self._alpha = alpha

    def __call__(self, settings: Settings) -> CalibrationRecord:
        """Measured in this process, where the stores lack them. Raises QD212, QD311."""
        done = self._done
        alpha = self._alpha
        if "smoothing" in settings:
            alpha = float(settings["smoothing"])
        n = int(settings["n_samples"]) if "n_samples" in settings else None
        record = done.merged.record
        if n is not None:
            record = statistics_here(done.job, done.source, done.store, n).record
        return record if alpha is None else joined(record, self._smoother.rows_here(alpha, n))


def measure_all(
    context: Context[Any],
    graph: Graph,
    done: steps.Calibrated,
    config: schema.CalibrateSettings | schema.TuneSettings,
    alphas: Sequence[float],
) -> int:
    """Measure what smoothing with each of the strengths changes. How many tensors at most."""
    smoother = Smoother(context, graph, done)
    counts = [0]
    for alpha in dict.fromkeys(alphas):
        context.say(f"smoothing with alpha {alpha:g}")
        found = smoother.smoothed(alpha, config).graph.model.smoothing
        counts.append(0 if found is None else len(found.exponents))
    return max(counts)


def check_search(settings: schema.TuneSettings) -> bool:
    """Whether candidates may be smoothed. Raises QD107 where the run itself is, too."""
    is_searched = settings.search.strategy == "optuna" and bool(
        settings.search.options.get("smoothing")
    )
    if is_searched and settings.quantization.smoothing is not None:
        raise ConfigError(
            "QD107",
            where="search.options.smoothing",
            got=f"a range beside quantization.smoothing={settings.quantization.smoothing:g}",
            expected="one of the two",
            mend="leave out quantization.smoothing: the search tries plans without smoothing too",
        )
    return is_searched


def strengths(given: float | Sequence[float]) -> tuple[float, ...]:
    """One strength, or several, as a configuration has them."""
    return tuple(given) if isinstance(given, Sequence) else (float(given),)
