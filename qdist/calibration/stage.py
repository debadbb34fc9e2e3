"""Some consecutive segments of a model as one stage of a pipeline: what it runs, and on what.

A stage measures the taps of its own segments and commits them as a tap set of their own; what later
stages read it leaves in the store's place (`boundary`). The store puts the tap sets together, so
the statistics are those of the whole model to the last bit, and no stage ever reads a weight of
another.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import accumulate

from qdist.calibration.boundary import Boundaries, LostBoundaryError
from qdist.calibration.feeds import load_phases
from qdist.calibration.job import CalibrationJob, only
from qdist.calibration.measure import commit
from qdist.calibration.work import Work, cut
from qdist.data.checks import InputSpec
from qdist.data.decoder import Decoder
from qdist.data.shards import MicroBatch, Shard
from qdist.data.source import DataSource, Feeds
from qdist.digest import digest_bytes, digest_json
from qdist.errors import ConfigError
from qdist.model.relay import Relay
from qdist.model.segments import Segment
from qdist.model.spool import Spool
from qdist.model.stretches import Runner
from qdist.stats.accumulator import Accumulator
from qdist.stats.observer import Batch, Observer, ObserverSpec
from qdist.stats.record import CalibrationRecord
from qdist.store.protocol import CalibrationStore
from qdist.store.receipt import ShardReceipt

Send = Callable[[int, list[Feeds]], None]
"""Takes the number of a micro-batch, and what later stages read of it, one mapping a phase."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Stage:
    """Segments ``first..stop`` of a model. Picklable.

    ``observer``: measures their taps; where later stages read anything, its last segment has no
    graph and stands for these. ``holds``: all their sessions fit into memory at once, so that they
    are kept; else they are loaded in turn, shard by shard. ``plan``: hex digest of the way in which
    the model is cut.
    """

    first: int
    stop: int
    observer: ObserverSpec
    holds: bool
    plan: str

    @property
    def weight_bytes(self) -> int:
        """Weights of its segments."""
        return sum(segment.weight_bytes for segment in self.observer.segments)


@dataclass(frozen=True, slots=True, kw_only=True)
class StageTask:
    """One shard through one stage, or without ``shard`` only its sessions to load.

    ``wanted``: the tensors to commit, of those that it measures; none where it only has to run.
    ``sends``: a later stage waits for it.
    """

    shard: Shard | None
    wanted: tuple[str, ...] = ()
    sends: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class StageAnswer:
    """``receipt``: of what was committed, if anything was. ``is_lost``: what the stage before left
    is not there, so nothing was done."""

    receipt: ShardReceipt | None = None
    is_lost: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class StagedShard:
    """A shard to measure. ``wanted``: by segment, the tensors that the store lacks."""

    shard: Shard
    wanted: tuple[tuple[str, ...], ...]


class StageObserver(Observer):
    """An `Observer` of one stage, which sends on what later stages read. One thread at a time."""

    def __init__(self, stage: Stage) -> None:
        self._stage = stage
        self._sessions: dict[int, Runner | None] = {}
        self._send: Send | None = None
        super().__init__(stage.observer)

    def load(self) -> None:
        """Load what is kept between shards. Raises `ModelError` QD205."""
        if self._stage.holds:
            for index in range(len(self._stage.observer.segments)):
                self._load(index)

    def measure(self, batches: Sequence[Batch], send: Send | None) -> CalibrationRecord:
        """As `observe`, of feeds with what the stages before have sent; hands on what is read
        later, one micro-batch at a time."""
        self._send = send
        try:
            return self.observe(batches)
        finally:
            self._send = None

    def _load(self, index: int) -> Runner | None:
        if not self._stage.holds:
            return super()._load(index)
        if index not in self._sessions:
            self._sessions[index] = super()._load(index)
        return self._sessions[index]

    def _round(
        self, index: int, phase: int | None, batches: Sequence[Batch], relay: Relay
    ) -> CalibrationRecord:
        if index < self._stage.stop - self._stage.first:
            return super()._round(index, phase, batches, relay)
        accumulator = Accumulator((), self._stage.observer.statistics)
        for batch, (names, _) in enumerate(batches):
            sent = [relay.take(batch, number, index) for number in relay.phases(batch, phase)]
            if self._send is not None:
                self._send(batch, sent)
            accumulator.add_samples(len(names))
        return accumulator.record()


def stages_of(job: CalibrationJob, n_workers: int) -> tuple[Stage, ...]:
    """The model of ``job`` in as many stages as there are workers, or segments where these are
    fewer: ranges of segments, the heaviest of which has as few weights as can be.

    Raises `ConfigError` QD107 for a job without a memory budget, and for a model whose phases hand
    something back to an earlier segment.
    """
    spec, budget = job.observer, job.settings.memory_budget_bytes
    if budget is None:
        raise _contradiction(
            "no calibration.memory_budget, by which the model is cut",
            "a memory budget that each worker's share of the model fits",
            "set calibration.memory_budget to what one worker may hold, or cluster.pipeline=false",
        )
    if _hands_back(spec):
        raise _contradiction(
            "a model whose decode steps need what its last segment made in the step before",
            "a model whose steps hand on caches within a segment, or to later ones",
            "set cluster.pipeline=false: every worker then runs all segments in turn",
        )
    plan = digest_json(
        [
            digest_bytes(*(segment.graph_bytes for segment in spec.segments)),
            [[*s.feeds, *s.receives, *s.sends, *s.hands, *s.tensors] for s in spec.segments],
        ]
    )
    parts = balance([segment.weight_bytes for segment in spec.segments], n_workers)
    return tuple(_stage(job, part, budget - spec.spool_bytes, plan) for part in parts)


def balance(weights: Sequence[int], n_parts: int) -> tuple[range, ...]:
    """Consecutive ranges of positions, ``n_parts`` at most and none empty, so that the heaviest
    weighs as little as can be. Weights are at least 0, ``n_parts`` is at least 1.

    >>> balance([5, 1, 1, 5], 2)
    (range(0, 2), range(2, 4))
    """
    n = len(weights)
    sums = [0, *accumulate(weights)]
    # best[stop]: the heaviest of the best parts of the first ``stop``, and their ends.
    best: list[tuple[int, tuple[int, ...]]] = [(sums[stop], (stop,)) for stop in range(n + 1)]
    for part in range(1, min(n_parts, n)):
        best = [
            min(
                (max(best[cut][0], sums[stop] - sums[cut]), (*best[cut][1], stop))
                for cut in range(part, stop)
            )
            if stop > part
            else best[stop]
            for stop in range(n + 1)
        ]
    ends = best[n][1]
    return tuple(range(a, b) for a, b in zip((0, *ends), ends, strict=False))


def staged(job: CalibrationJob, work: Work) -> tuple[StagedShard, ...]:
    """The shards of ``work``, in the order of the grid, each with what every segment owes."""
    tap_sets: dict[tuple[str, ...], set[int]] = {}
    for task in work.tasks:
        for batch in task.shard.batches:
            tap_sets.setdefault(batch.ids, set()).add(task.tap_set)
    groups: dict[frozenset[int], list[MicroBatch]] = {}
    for batch in job.grid:
        if batch.ids in tap_sets:
            groups.setdefault(frozenset(tap_sets[batch.ids]), []).append(batch)
    found = [
        StagedShard(shard=shard, wanted=wanted)
        for numbers, batches in groups.items()
        for wanted in [_owed(job, work, numbers)]
        for shard in cut(job, batches)
    ]
    position = {batch.ids: i for i, batch in enumerate(job.grid)}
    found.sort(key=lambda one: position[one.shard.batches[0].ids])
    return tuple(
        replace(one, shard=replace(one.shard, index=index)) for index, one in enumerate(found)
    )


def run_stage(
    task: StageTask,
    stage: Stage,
    observer: StageObserver,
    source: DataSource,
    inputs: tuple[InputSpec, ...],
    store: CalibrationStore,
    decoder: Decoder | None = None,
) -> StageAnswer:
    """One shard through one stage: leaves what later ones read, then commits what is wanted.

    Safe to run twice. Raises `DataError`, `ModelError` and `StoreError`.
    """
    begin = time.perf_counter()
    shard = task.shard
    if shard is None:
        observer.load()
        return StageAnswer()
    waiting = Boundaries(store.location, stage.plan)

    def fetch(number: int) -> list[Feeds]:
        return waiting.get(shard.id, stage.first, number)

    batches: list[Batch] = [
        (
            batch.keys,
            partial(fetch, number)
            if stage.first
            else partial(load_phases, batch, source, inputs, decoder),
        )
        for number, batch in enumerate(shard.batches)
    ]
    send = partial(waiting.put, shard.id, stage.stop) if task.sends else None
    try:
        record = observer.measure(batches, send)
    except LostBoundaryError:
        return StageAnswer(is_lost=True)
    if not task.wanted:
        return StageAnswer()
    return StageAnswer(receipt=commit(shard, record.select(task.wanted), store, begin))


def _stage(job: CalibrationJob, part: range, budget_bytes: int, plan: str) -> Stage:
    spec = job.observer
    own = [spec.segments[index] for index in part]
    later = spec.segments[part.stop :]
    tensors = {tensor for segment in own for tensor in segment.tensors}
    handed = {name for segment in own for name in segment.hands}
    # One after the other, what a segment takes beside its weights is free again.
    most = max(segment.estimate_bytes - segment.weight_bytes for segment in own)
    return Stage(
        first=part.start,
        stop=part.stop,
        observer=replace(
            spec,
            segments=(*own, *([_reader(spec, later)] if later else [])),
            taps=only(job.taps, tuple(t for t in job.taps.tensors if t in tensors)),
            carry=tuple((name, output) for name, output in spec.carry if output in handed),
        ),
        holds=most + sum(segment.weight_bytes for segment in own) <= budget_bytes,
        plan=plan,
    )


def _reader(spec: ObserverSpec, later: Iterable[Segment]) -> Segment:
    """A segment without a graph that reads whatever the ``later`` ones need from before them."""
    inputs = {point.tensor for point in spec.taps.points if point.is_input}
    reads: dict[str, None] = {}
    made: set[str] = set()
    for segment in later:
        measured = (tensor for tensor in segment.tensors if tensor in inputs)
        reads |= dict.fromkeys(
            name for name in (*segment.feeds, *segment.receives, *measured) if name not in made
        )
        made.update(segment.sends)
    return Segment(graph_bytes=b"", feeds=(), receives=tuple(reads))


def _hands_back(spec: ObserverSpec) -> bool:
    """Whether a phase carries something to a segment before the one that made it."""
    if not spec.carry:
        return False
    with Spool() as spool:
        _, phase = next(Relay(spec.segments, spool, spec.carry).rounds())
    return phase is not None


def _owed(job: CalibrationJob, work: Work, tap_sets: Iterable[int]) -> tuple[tuple[str, ...], ...]:
    lacking = {tensor for number in tap_sets for tensor in work.observers[number].taps.tensors}
    return tuple(
        tuple(tensor for tensor in segment.tensors if tensor in lacking)
        for segment in job.observer.segments
    )


def _contradiction(got: str, expected: str, mend: str) -> ConfigError:
    return ConfigError(
        "QD107", where="cluster.pipeline=true", got=got, expected=expected, mend=mend
    )
