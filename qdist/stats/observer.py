"""From one shard to its record: the function that runs inside every worker.

It knows neither Ray nor Zarr, so a whole calibration can run in one process with it. A model in
several segments is the same loop with the segments outside: each is loaded once per shard, and what
the next ones read waits in a spool.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import reduce
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qdist.data.positions import Dims, MaskDims, kept_positions
from qdist.data.source import Feeds
from qdist.errors import DataError, ModelError
from qdist.memory import give_back
from qdist.model.bound import Made
from qdist.model.frugal import frugal_session
from qdist.model.relay import Relay
from qdist.model.segments import Segment
from qdist.model.session import Execution, as_float32
from qdist.model.spool import Spool
from qdist.model.stretches import Runner, Stretches, Undivided
from qdist.model.taps import TapTable
from qdist.stats.record import CalibrationRecord
from qdist.stats.side_by_side import SideBySide
from qdist.stats.spec import StatisticsSpec

NAN_POLICIES = ("error", "report")
SPOOL_BYTES = 64 << 20

Batch = tuple[tuple[str, ...], Callable[[], Sequence[Feeds]]]
"""Names of a micro-batch's samples, and what loads its feeds, one for each phase."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Padding:
    """Positions that count nowhere. Picklable.

    ``mask``: the input [B, S] of the model that is zero where a position is padding. ``names``,
    ``dims`` (declared dimensions by tensor) and ``axes`` (sequence axes by tensor, from a user who
    knows) help to find the sequence in a tensor; see `kept_positions`.
    """

    mask: str
    names: MaskDims | None = None
    dims: Mapping[str, Dims] = field(default_factory=dict)
    axes: Mapping[str, tuple[int, ...]] = field(default_factory=dict)

    def kept(
        self, given: Mapping[str, NDArray[Any]], tensor: str, shape: tuple[int, ...]
    ) -> NDArray[np.bool_] | None:
        """Which elements of a tensor count; None: all. Raises `DataError` QD303."""
        if self.mask not in given:
            return None
        return kept_positions(
            given[self.mask] != 0,
            shape,
            tensor=tensor,
            dims=self.dims.get(tensor),
            names=self.names,
            axes=self.axes.get(tensor),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class ObserverSpec:
    """What a worker needs to measure shards. Picklable; large only when the weights are inline.

    ``segments``: of the frozen graph, in order; together they measure the taps' points.
    ``on_nan``: ``error`` stops at the first NaN in an activation, ``report`` counts it.
    ``channel_axes``: axis of the tensors that get extrema per channel. ``carry``: pairs of an input
    of the model and the output of the phase before that fills it (an output that some segment
    ``hands``). ``spool_bytes``: what waits between several segments in memory, beyond which it
    goes to files below ``spool_folder`` (None: the system's scratch folder).
    """

    segments: tuple[Segment, ...]
    data_folder: Path
    taps: TapTable
    execution: Execution
    on_nan: str = "error"
    statistics: StatisticsSpec = field(default_factory=StatisticsSpec)
    channel_axes: Mapping[str, int] = field(default_factory=dict)
    carry: tuple[tuple[str, str], ...] = ()
    padding: Padding | None = None
    spool_bytes: int = SPOOL_BYTES
    spool_folder: Path | None = None

    def __post_init__(self) -> None:
        if self.on_nan not in NAN_POLICIES:
            raise ValueError(f"on_nan must be one of {NAN_POLICIES}, got {self.on_nan!r}")
        measured = [tensor for segment in self.segments for tensor in segment.tensors]
        if sorted(measured) != sorted(self.taps.tensors):
            raise ValueError(
                f"segments measure {len(measured)} tensors, the taps are {len(self.taps.points)}"
            )
        handed = {name for segment in self.segments for name in segment.hands}
        lacking = [name for _, name in self.carry if name not in handed]
        if lacking:
            raise ValueError(f"no segment hands out {', '.join(lacking)}, which are carried")


class Observer:
    """Runs the segments and counts. One thread at a time.

    A single segment is kept between shards, loaded with the first; of several, one is loaded at a
    time.
    """

    def __init__(self, spec: ObserverSpec) -> None:
        self._spec = spec
        self._points = {point.tensor: point for point in spec.taps.points}
        self._is_whole = len(spec.segments) == 1
        self._kept = self._load(0) if self._is_whole else None
        self._counting: SideBySide | None = None

    def observe(self, batches: Sequence[Batch]) -> CalibrationRecord:
        """The record of one shard.

        ``batches``: the micro-batches, in order. Each loads its feeds (float and integer arrays
        with a leading batch axis), one for each phase; phases after the first lack the inputs that
        are carried. Raises `DataError` QD309 for a NaN, `ModelError` QD205 when the model fails,
        `ArtifactError` QD603 where the scratch folder has no room.
        """
        spec = self._spec
        parts: list[list[CalibrationRecord]] = [[] for _ in spec.segments]
        # One segment hands nothing on but what is in memory anyway.
        with Spool(None if self._is_whole else spec.spool_bytes, spec.spool_folder) as spool:
            asides = () if spec.padding is None else (spec.padding.mask,)
            relay = Relay(spec.segments, spool, spec.carry, asides)
            for index, phase in relay.rounds():
                parts[index].append(self._round(index, phase, batches, relay))
                if not self._is_whole:
                    give_back()
        records = [reduce(CalibrationRecord.merge, part) for part in parts]
        if len(records) == 1:
            return records[0]
        return CalibrationRecord.join(records, spec.taps.tensors)

    def _load(self, index: int) -> Runner | None:
        """What runs a segment; None where nothing of it is wanted but its inputs."""
        spec = self._spec
        segment = spec.segments[index]
        outputs = self._outputs(index)
        if not outputs:
            return None
        if not segment.is_frugal:
            return Stretches(segment.graph_bytes, outputs, spec.data_folder, spec.execution)
        session = frugal_session(segment.graph_bytes, spec.data_folder, spec.execution)
        return Undivided(session, (*segment.feeds, *segment.receives), outputs)

    def _outputs(self, index: int) -> tuple[str, ...]:
        """What a segment has to put out: for its taps, for later segments, for the next phase."""
        spec = self._spec
        segment = spec.segments[index]
        points = (self._points[tensor] for tensor in segment.tensors)
        tapped = (point.output for point in points if not point.is_input)
        carried = (output for _, output in spec.carry if output in segment.hands)
        return tuple(dict.fromkeys((*tapped, *segment.sends, *carried)))

    def _round(
        self, index: int, phase: int | None, batches: Sequence[Batch], relay: Relay
    ) -> CalibrationRecord:
        """All micro-batches through one segment."""
        spec = self._spec
        segment = spec.segments[index]
        runner = self._kept if self._is_whole else self._load(index)
        accumulator = self._accumulator(segment)
        rows = self._rows(segment)
        wanted = relay.wanted(index)
        for batch, (names, load) in enumerate(batches):
            if batch not in relay:
                relay.start(batch, load())
            for number in relay.phases(batch, phase):
                given = relay.take(batch, number, index)
                made: dict[str, NDArray[Any]] = {}
                try:
                    for part in _all_of(rows, given, runner):
                        made.update(_kept(part, wanted))
                        self._count(accumulator, rows, part, given)
                except ModelError:
                    # It may be a NaN that the model fails of.
                    self._refuse_nan(accumulator, rows, _all_of(rows, given, runner), names)
                    raise
                self._refuse_nan(accumulator, rows, _all_of(rows, given, runner), names)
                relay.hand_on(batch, number, index, made)
            if phase is None or phase == 0:
                accumulator.add_samples(len(names))
        return accumulator.record()

    def _accumulator(self, segment: Segment) -> SideBySide:
        """An empty one. A single segment's is used again, with the memory that it has by then."""
        if self._counting is not None:
            self._counting.reset()
            return self._counting
        spec = self._spec
        new = SideBySide(
            segment.tensors,
            spec.statistics,
            spec.channel_axes,
            n_threads=spec.execution.n_threads,
        )
        if self._is_whole:
            self._counting = new
        return new

    def _rows(self, segment: Segment) -> dict[str, tuple[int, str]]:
        """Row and name of the measured tensors, by what they are called among inputs or outputs."""
        points = [self._points[tensor] for tensor in segment.tensors]
        return {
            point.tensor if point.is_input else point.output: (row, point.tensor)
            for row, point in enumerate(points)
        }

    def _count(
        self,
        accumulator: SideBySide,
        rows: Mapping[str, tuple[int, str]],
        made: Made,
        given: Feeds,
    ) -> None:
        """Add the tapped tensors among those made. Empties what is not fixed."""
        padding = self._spec.padding
        if padding is None and made.is_fixed and accumulator.add_again(made):
            return
        known = [name for name in made.arrays if name in rows]
        arrays = [made.arrays[name] for name in known]
        if not made.is_fixed:
            made.arrays.clear()
        if padding is None:
            places = [rows[name][0] for name in known]
            accumulator.add_all(places, arrays, made if made.is_fixed else None)
            return
        for name, found in zip(known, arrays, strict=True):
            row, tensor = rows[name]
            values = as_float32(found)
            accumulator.add(row, values, padding.kept(given, tensor, values.shape))

    def _refuse_nan(
        self,
        accumulator: SideBySide,
        rows: Mapping[str, tuple[int, str]],
        again: Iterable[Made],
        names: tuple[str, ...],
    ) -> None:
        """Raise QD309 where a NaN was counted and must not be: after the micro-batch has run
        ``again``, up to the first tensor that holds one."""
        if self._spec.on_nan != "error" or not accumulator.has_nan:
            return
        for made in again:
            for name, found in made.arrays.items():
                row, tensor = rows.get(name, (-1, ""))
                if row >= 0 and accumulator.n_nan(row):
                    raise _nan_error(tensor, as_float32(found), names, accumulator.n_nan(row))


def _all_of(
    rows: Mapping[str, tuple[int, str]], given: Feeds, runner: Runner | None
) -> Iterator[Made]:
    """What is measured of a micro-batch's inputs, then what the runner puts out."""
    yield Made({name: given[name] for name in rows if name in given})
    if runner is not None:
        yield from runner.parts(given)


def _kept(made: Made, wanted: Sequence[str]) -> Iterator[tuple[str, NDArray[Any]]]:
    """Those that are wanted later, as arrays that stay as they are."""
    for name in wanted:
        if name in made.arrays:
            array = made.arrays[name]
            yield name, array.copy() if made.is_fixed else array


def _nan_error(
    tensor: str, values: NDArray[np.float32], names: tuple[str, ...], n_nan: int
) -> DataError:
    """Names the samples that hold NaN, where the tensor has a batch axis; else all of them."""
    where = " or ".join(names)
    if values.ndim and len(values) == len(names):
        held = [bool(np.isnan(part).any()) for part in values]
        guilty = [name for name, bad in zip(names, held, strict=True) if bad]
        where = " and ".join(guilty) or where
    return DataError(
        "QD309",
        where=f"tensor {tensor}, sample {where}",
        got=f"{n_nan} NaN",
        expected="finite activations from the float model",
        mend="leave the sample out, mend the model, or set calibration.on_nan=report",
    )
