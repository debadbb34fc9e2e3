"""SmoothQuant for commands: factors, the smoothed model, and statistics that fit it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from qdist.calibration.smoothed import (
    channels_job,
    channels_location,
    joined,
    joined_blocks,
    on_batches,
    smoothed_rows,
    stored_channels,
    stored_rows,
)
from qdist.cli import schema
from qdist.cli.commands import steps
from qdist.cli.context import Context
from qdist.errors import ConfigError
from qdist.model.graph import Graph
from qdist.plan.smoothing import lacking_channels, smoothed_graph
from qdist.search.statistics import CandidateStatistics
from qdist.stats.record import CalibrationRecord
from qdist.store.protocol import FinishedMerge
from qdist.store.zarr_store import ZarrStore, create_store


@dataclass(frozen=True, slots=True, kw_only=True)
class Smoothed:
    """A smoothed model, and statistics of all its tensors."""

    graph: Graph
    record: CalibrationRecord
    notes: tuple[str, ...]
    blocks: tuple[CalibrationRecord, ...] = ()


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
        self._known: CandidateStatistics | None = None
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
        own, done = self._all().smoothed(alpha), self._done
        self._context.notes(own.notes)
        rows = steps.measured(self._context, own.whole, done.source, own.store, config.cluster)
        return Smoothed(
            graph=own.graph,
            record=joined(done.merged.record, rows.record),
            notes=own.notes,
        )

    def candidates(
        self, alpha: float | None, factors: CalibrationRecord | None
    ) -> CandidateStatistics:
        """What measures for the candidates of a search. ``alpha``: of the run itself. ``factors``:
        what theirs come from, where they may be smoothed."""
        return replace(self._all(), alpha=alpha, factors=factors or self._factors)

    def _all(self) -> CandidateStatistics:
        if self._known is None:
            done = self._done
            self._known = CandidateStatistics(
                job=done.job,
                source=done.source,
                location=done.store.location,
                batches=done.store.latest().batches,
                record=done.merged.record,
                factors=self._factors,
            )
        return self._known


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
