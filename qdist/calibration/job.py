"""Everything that is fixed before the first sample runs."""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from qdist.calibration.feeds import batch_size_for, input_specs, load_phases
from qdist.calibration.measuring import Measuring, Shapes
from qdist.calibration.settings import CalibrationSettings
from qdist.data.checks import InputSpec, fixed_batch
from qdist.data.decoder import Decoder, Phased
from qdist.data.manifest import SampleManifest
from qdist.data.shards import MicroBatch, micro_batches
from qdist.data.source import DataSource
from qdist.errors import DataError, ModelError
from qdist.model.freeze import FrozenModel
from qdist.model.graph import Graph
from qdist.model.masks import sentinel_paths
from qdist.model.segments import unknown_sizes
from qdist.model.session import Execution, fingerprint
from qdist.model.taps import TapTable, find_taps
from qdist.model.weights import n_bytes_of
from qdist.stats.observer import ObserverSpec
from qdist.store.identity import Identity


@dataclass(frozen=True, slots=True, kw_only=True)
class CalibrationJob:
    """One calibration, from the model to the grid.

    ``observer``: measures all ``taps``. ``grid``: all micro-batches, in order. ``n_per_shard``:
    micro-batches per shard. ``decoder``: how samples become a prefill and decode steps, for a model
    with a cache. ``measuring`` stays with the driver: workers get observers.
    """

    identity: Identity
    taps: TapTable
    observer: ObserverSpec
    inputs: tuple[InputSpec, ...]
    manifest: SampleManifest
    grid: tuple[MicroBatch, ...]
    n_per_shard: int
    notes: tuple[str, ...]
    measuring: Measuring
    decoder: Decoder | None = None

    @property
    def settings(self) -> CalibrationSettings:
        """What the user decided."""
        return self.measuring.settings

    def observer_for(self, tensors: tuple[str, ...]) -> ObserverSpec:
        """What measures some of the taps: their bits do not depend on the others (law 1)."""
        if tensors == self.taps.tensors:
            return self.observer
        return self.measuring.observer(only(self.taps, tensors))

    def part(self, grid: tuple[MicroBatch, ...]) -> CalibrationJob:
        """The same job on some micro-batches of its grid, which are one block."""
        settings = replace(self.settings, n_blocks=1)
        return replace(self, grid=grid, measuring=replace(self.measuring, settings=settings))

    def prefix(self, n_batches: int) -> CalibrationJob:
        """The same job on the first ``n_batches`` micro-batches of its grid."""
        return self.part(self.grid[:n_batches])

    @property
    def n_samples(self) -> int:
        """Samples on the grid."""
        return sum(len(batch) for batch in self.grid)


def identify(
    frozen: FrozenModel,
    source: DataSource,
    settings: CalibrationSettings,
    execution: Execution,
    inputs: tuple[InputSpec, ...],
) -> Identity:
    """What a store for this calibration is made for. Loads one sample; raises `DataError`."""
    return Identity(
        model_digest=frozen.digest,
        preprocessing=_preparation(source, settings),
        fingerprint=fingerprint(execution),
        micro_batch=batch_size_for(source, inputs, settings.micro_batch, decoder_of(source)),
        statistics=settings.statistics.to_json(),
    )


def _preparation(source: DataSource, settings: CalibrationSettings) -> dict[str, Any]:
    """What is done to samples before they count: padding that is left out is part of it."""
    if settings.mask_input is None:
        return source.preprocessing()
    axes = {name: list(own) for name, own in sorted(settings.sequence_axes.items())}
    return {**source.preprocessing(), "counted": {"mask": settings.mask_input, "axes": axes}}


def prepare(
    frozen: FrozenModel,
    source: DataSource,
    settings: CalibrationSettings,
    execution: Execution,
    *,
    graph: Graph | None = None,
    earlier: SampleManifest | None = None,
    on_progress: Callable[[int, int], None] | None = None,
) -> CalibrationJob:
    """Fix the taps, the manifest and the grid. ``on_progress(done, total)`` counts samples named.

    ``earlier``: the manifest of the store, which is extended, so that what it names keeps its place
    and its results. Raises `DataError` and `ModelError`, QD401 for an earlier manifest of other
    preprocessing.
    """
    graph = graph or Graph(frozen, execution)
    inputs = input_specs(graph)
    identity = identify(frozen, source, settings, execution, inputs)
    taps = find_taps(graph, settings.taps)
    _refuse_unused(graph, taps, settings)
    manifest = (
        SampleManifest.first(source, on_progress=on_progress)
        if earlier is None
        else earlier.extend(source, on_progress=on_progress)
    )
    size = identity.micro_batch
    grid = micro_batches(manifest, size, bucketed=settings.bucketed)
    _refuse_rest(grid, size, manifest, inputs)
    decoder = decoder_of(source)
    measuring = Measuring(
        graph=graph,
        settings=settings,
        execution=execution,
        shapes=_largest(grid, source, inputs, decoder) if settings.memory_budget_bytes else (),
        decoder=decoder,
        masked=sentinel_paths(graph),
    )
    observer = measuring.observer(taps)
    n_samples = sum(len(batch) for batch in grid)
    n_per_shard = (
        settings.samples_per_shard(
            n_samples,
            n_segments=len(observer.segments),
            weight_bytes=sum(map(n_bytes_of, graph.proto.graph.initializer)),
        )
        // size
    )
    return CalibrationJob(
        identity=identity,
        taps=taps,
        observer=observer,
        inputs=inputs,
        manifest=manifest,
        grid=grid,
        n_per_shard=max(1, n_per_shard),
        notes=tuple(_notes(graph, settings, manifest, size, observer)),
        measuring=measuring,
        decoder=decoder,
    )


def decoder_of(source: DataSource) -> Decoder | None:
    """How the samples of this source are run, where the model has a cache."""
    return source.decoder if isinstance(source, Phased) else None


def only(taps: TapTable, tensors: tuple[str, ...]) -> TapTable:
    """The taps with some of the points, in the order of ``tensors``."""
    points = {point.tensor: point for point in taps.points}
    return replace(
        taps,
        points=tuple(points[tensor] for tensor in tensors),
        aliases={name: row for name, row in taps.aliases.items() if row in tensors},
    )


def _largest(
    grid: tuple[MicroBatch, ...],
    source: DataSource,
    inputs: tuple[InputSpec, ...],
    decoder: Decoder | None,
) -> tuple[Shapes, ...]:
    """Shapes of the inputs in the micro-batch with the most elements, one mapping a phase."""
    batch = max(
        grid, key=lambda batch: len(batch) * sum(math.prod(shape) for _, shape in batch.shapes)
    )
    phases = load_phases(batch, source, inputs, decoder)
    full = dict(phases[0])
    found: list[Shapes] = []
    n_before = 0
    for feeds in phases:
        full.update(feeds)
        shapes = {name: array.shape for name, array in full.items()}
        if decoder is not None and found:
            n_before += phases[len(found) - 1][decoder.token.name].shape[1]
            # What a past has grown to; its only axis without elements is the one that grows.
            shapes |= {
                past.input: tuple(n or n_before for n in full[past.input].shape)
                for past in decoder.pasts
            }
        found.append(shapes)
    return tuple(found)


def _refuse_unused(graph: Graph, taps: TapTable, settings: CalibrationSettings) -> None:
    """Raise QD208 for settings of tensors that no taps would measure."""
    wanted: list[tuple[str, str, Callable[[str], bool]]] = [
        ("groups", each.match, each.matches) for each in settings.statistics.groups
    ]
    wanted += [("sequence_axes", name, {name}.__contains__) for name in settings.sequence_axes]
    unused = [each for each in wanted if not any(map(each[2], taps.tensors))]
    every = find_taps(graph) if unused else taps
    for key, given, matches in unused:
        if any(map(matches, every.tensors)):
            continue
        rows = {row for name, row in every.aliases.items() if matches(name)}
        close = sorted(rows) or difflib.get_close_matches(given, every.tensors, cutoff=0.5)
        raise ModelError(
            "QD208",
            where=f"calibration.{key} entry {given!r}",
            got="no measured tensor of that name",
            expected="a name or pattern of measured tensors",
            mend=f"did you mean {' or '.join(close[:3])}?"
            if close
            else "qdist show STORE lists them",
        )


def _refuse_rest(
    grid: tuple[MicroBatch, ...],
    size: int,
    manifest: SampleManifest,
    inputs: tuple[InputSpec, ...],
) -> None:
    """Raise QD303 where a model of fixed batch would be left with a part of one."""
    short = [batch for batch in grid if len(batch) != size]
    # Samples that carry their own batch axis run alone, whatever batch the inputs name.
    if short and size > 1 and fixed_batch(inputs) == size:
        raise DataError(
            "QD303",
            where=f"the micro-batch from sample {short[0].keys[0]}",
            got=f"{len(short[0])} samples of {len(manifest)}",
            expected=f"a multiple of {size}, the model's fixed batch",
            mend=f"use a number of samples that {size} divides (those left out later count too), "
            "or export a dynamic batch axis",
        )


def _notes(
    graph: Graph,
    settings: CalibrationSettings,
    manifest: SampleManifest,
    size: int,
    observer: ObserverSpec,
) -> list[str]:
    notes = list(graph.model.notes)
    if size != settings.micro_batch:
        notes.append(f"micro-batches of {size}: the model or its samples fix the batch")
    if len(observer.segments) > 1:
        most = max(segment.estimate_bytes for segment in observer.segments)
        notes.append(
            f"the model runs in {len(observer.segments)} segments of at most {most / 1e9:.2f} GB"
        )
    if unsized := unknown_sizes(graph, observer.segments):
        notes.append(
            f"the memory estimate leaves out {len(unsized)} tensors whose size depends on values, "
            f"such as {', '.join(unsized[:3])}"
        )
    notes.extend(f"sample {key} repeats another and counts once" for key in manifest.duplicates)
    if manifest.absent:
        notes.append(f"{len(manifest.absent)} samples of earlier runs are left out")
    return notes
