"""A graph that is run in stretches, so that what it puts out is read while a cache still holds it.

Every measured tensor is an output, and outputs live until a run ends. In one run of a whole model
they all lie in memory by then, and each is fetched from there again to be counted. In stretches of
a few megabytes, each a session of its own whose activations come from one arena for all, the same
memory is written, counted and written again. No bit changes: with graph optimization off, what a
node computes depends on its inputs alone.

Measured (2 cores of 2 MiB, ONNX Runtime 1.31, an encoder of 153 activations of 16 M elements per
sample, float run 1.37 s): all outputs of one run 1.64 s, counted 2.7 s; in stretches 1.40 s and
2.05 s. With an arena for each session it is no faster than one run. On 2 cores of 1 MiB
stretches of 2 MB, 4 MB and 8 MB took 2.62, 2.73 and 2.72 s, and for a small decoder 0.36, 0.38 and
0.39 s.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any, Protocol

import onnxruntime as ort
from numpy.typing import NDArray
from onnx import ModelProto, TensorProto

from qdist.errors import ModelError
from qdist.model.flow import Flow
from qdist.model.parts import can_cross, part_of
from qdist.model.rewrite import remove_dead
from qdist.model.session import ORT_ERRORS, Execution, measuring_options, open_session, run
from qdist.model.shapes import Shapes, concrete_shapes
from qdist.model.weights import n_bytes_of

STRETCH_BYTES = 2 << 20
"""Outputs of one stretch, at least: fewer cost more calls (some 20 us each) than they save."""
_REPEATED_BYTES = 16 << 20
"""Weights inside the graph that may be held once more because several stretches read them."""

Arrays = dict[str, NDArray[Any]]


class Runner(Protocol):
    """Runs a graph once per call of `parts`. One thread at a time."""

    def parts(self, feeds: Mapping[str, NDArray[Any]]) -> Iterator[Arrays]:
        """All wanted outputs, some at a time, in the order of the graph. Raises QD205.

        They are the caller's; memory is used again once an array is let go. What is not read is
        ignored in ``feeds``.
        """
        ...


class Undivided:
    """A `Runner` of one session."""

    def __init__(
        self, session: ort.InferenceSession, reads: Iterable[str], outputs: Iterable[str]
    ) -> None:
        self._session = session
        self._reads = tuple(reads)
        self._outputs = list(outputs)

    def parts(self, feeds: Mapping[str, NDArray[Any]]) -> Iterator[Arrays]:
        """All at once."""
        reads = {name: feeds[name] for name in self._reads if name in feeds}
        yield dict(zip(self._outputs, run(self._session, self._outputs, reads), strict=True))


@dataclass(frozen=True, slots=True, kw_only=True)
class _Stretch:
    """``outputs``: all that it puts out. ``wanted``: those for the caller. ``sends``: those that
    later stretches read. ``last``: what no later one reads any more."""

    session: ort.InferenceSession
    reads: tuple[str, ...]
    outputs: list[str]
    wanted: tuple[str, ...]
    sends: tuple[str, ...]
    last: tuple[str, ...]


class Stretches:
    """A `Runner` that divides its graph by the shapes of the first feeds, and loads it then.

    ``graph_bytes``: a model with at least the ``outputs`` wanted. Feeds of other shapes run in the
    same stretches. On a provider with memory of its own it is not divided.
    """

    def __init__(
        self,
        graph_bytes: bytes,
        outputs: Sequence[str],
        data_folder: Path | None,
        execution: Execution,
        *,
        stretch_bytes: int = STRETCH_BYTES,
    ) -> None:
        self._graph_bytes = graph_bytes
        self._outputs = tuple(outputs)
        self._data_folder = data_folder
        self._execution = execution
        self._stretch_bytes = stretch_bytes
        self._stretches: tuple[_Stretch, ...] = ()

    def __len__(self) -> int:
        """How many there are; 0 before the first run."""
        return len(self._stretches)

    def parts(self, feeds: Mapping[str, NDArray[Any]]) -> Iterator[Arrays]:
        """Stretch by stretch."""
        if not self._stretches:
            self._stretches = self._divided(feeds)
        waiting = dict(feeds)
        for stretch in self._stretches:
            reads = {name: waiting[name] for name in stretch.reads if name in waiting}
            for name in stretch.last:
                waiting.pop(name, None)
            found = run(stretch.session, stretch.outputs, reads)
            made = dict(zip(stretch.outputs, found, strict=True))
            waiting.update((name, made[name]) for name in stretch.sends)
            wanted = {name: made[name] for name in stretch.wanted}
            # Nothing here may keep alive what the caller lets go.
            del reads, found, made
            yield wanted

    def _divided(self, feeds: Mapping[str, NDArray[Any]]) -> tuple[_Stretch, ...]:
        model = ModelProto.FromString(self._graph_bytes)
        kept = [value for value in model.graph.output if value.name in set(self._outputs)]
        del model.graph.output[:]
        model.graph.output.extend(kept)
        remove_dead(model)
        flow = Flow(model)
        shapes = self._shapes(model, feeds)
        cuts = [] if shapes is None else _cuts(flow, shapes, self._stretch_bytes)
        elements = {} if shapes is None else shapes.elements
        ends = [0, *cuts, len(flow.steps)]
        return tuple(self._stretch(flow, a, b, elements) for a, b in pairwise(ends))

    def _shapes(self, model: ModelProto, feeds: Mapping[str, NDArray[Any]]) -> Shapes | None:
        """None where the graph stays whole."""
        if self._execution.provider != "CPUExecutionProvider":
            return None
        given = {name: array.shape for name, array in feeds.items()}
        try:
            return concrete_shapes(model, given, self._data_folder, self._execution)
        except ModelError:
            # Whether the runtime takes the graph is for its session to say.
            return None

    def _stretch(self, flow: Flow, start: int, stop: int, elements: Mapping[str, int]) -> _Stretch:
        part = part_of(flow, start, stop, elements)
        _share_arena()
        options = measuring_options(self._execution)
        options.add_session_config_entry("session.use_env_allocators", "1")
        session = open_session(
            part.model.SerializeToString(), self._data_folder, self._execution, options
        )
        reads = (*part.feeds, *part.receives)
        return _Stretch(
            session=session,
            reads=reads,
            outputs=[value.name for value in part.model.graph.output],
            wanted=part.hands,
            sends=part.sends,
            last=tuple(name for name in reads if flow.last_reader[name] < stop),
        )


def _cuts(flow: Flow, shapes: Shapes, stretch_bytes: int) -> list[int]:
    """Where to cut, so that each stretch but the last puts out ``stretch_bytes`` at least."""
    crossing = flow.crossing()
    found: list[int] = []
    taken = 0
    for position, step in enumerate(flow.steps[:-1], 1):
        taken += sum(shapes.n_bytes(name) or 0 for name in step.makes if name in flow.kept)
        if taken >= stretch_bytes and can_cross(crossing[position], shapes.elements):
            found.append(position)
            taken = 0
    return found if _repeated_bytes(flow, found) <= _REPEATED_BYTES else []


def _repeated_bytes(flow: Flow, cuts: Sequence[int]) -> int:
    """Bytes of weights inside the graph that stretches hold beyond the first one to read them."""
    total = 0
    seen: set[str] = set()
    for start, stop in pairwise([0, *cuts, len(flow.steps)]):
        own = {name for step in flow.steps[start:stop] for name in step.weights}
        for name in own & seen:
            if flow.weights[name].data_location != TensorProto.EXTERNAL:
                total += n_bytes_of(flow.weights[name])
        seen |= own
    return total


@cache
def _share_arena() -> None:
    """See to it that sessions of this process can share one arena."""
    memory = ort.OrtMemoryInfo(
        "Cpu", ort.OrtAllocatorType.ORT_ARENA_ALLOCATOR, 0, ort.OrtMemType.DEFAULT
    )
    # It grows by what is asked for, not in powers of two.
    growth = ort.OrtArenaCfg({"arena_extend_strategy": 1})
    # Where there is one already, it serves as well.
    with suppress(*ORT_ERRORS):
        ort.create_and_register_allocator(memory, growth)
