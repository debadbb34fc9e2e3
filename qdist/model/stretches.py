"""A graph that is run in stretches, so that what it puts out is read while a cache still holds it.

Every measured tensor is an output, and outputs live until a run ends. In one run of a whole model
they all lie in memory by then, and each is fetched from there again to be counted. In stretches of
a few megabytes, each a session of its own, the same memory is written, counted and written again.
No bit changes: with graph optimization off, what a node computes depends on its inputs alone.

Measured (2 cores of 2 MiB, ONNX Runtime 1.31, an encoder of 153 activations of 16 M elements per
sample, float run 1.37 s): all outputs of one run 1.64 s, counted 2.7 s; in stretches 1.40 s and
2.05 s. With an arena for each session it is no faster than one run. Where the same memory serves in
each run (`Bound`), an encoder takes 5 % less and a small decoder 7 %. Beside the float run, in
stretches of 2, 4 and 8 MB, then: 1.53, 1.46 and 1.44 (encoder), 2.75, 2.6 and 2.6 (decoder). On 2
cores of 1 MiB, before memory was bound: 2.62, 2.73 and 2.72 s; 0.36, 0.38 and 0.39 s.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray
from onnx import ModelProto, TensorProto, helper

from qdist.errors import ModelError
from qdist.model.bound import BINDING_ERRORS, Bound, Forms, Made, Turn, form_bytes
from qdist.model.flow import Flow
from qdist.model.parts import can_cross, part_of
from qdist.model.picks import split_picks
from qdist.model.rewrite import remove_dead
from qdist.model.session import ORT_ERRORS, Execution, measuring_options, open_session, run
from qdist.model.shapes import Shapes, concrete_shapes
from qdist.model.weights import n_bytes_of


def _stretch_bytes() -> int:
    """Twice a core's second-level cache, from 2 to 8 MiB."""
    try:
        told = Path("/sys/devices/system/cpu/cpu0/cache/index2/size").read_text("ascii").strip()
        cache_bytes = int(told.removesuffix("K")) << 10
    except (OSError, ValueError):
        # Another system than Linux, or none that tells.
        cache_bytes = 0
    return min(max(2 * cache_bytes, 2 << 20), 8 << 20)


STRETCH_BYTES = _stretch_bytes()
"""Outputs of one stretch, at least: fewer cost more calls (some 60 us each) than they save."""
_REPEATED_BYTES = 16 << 20
"""Weights inside the graph that may be held once more because several stretches read them."""

_BOUND_BYTES = 64 << 20
"""Feeds and outputs beyond which memory is not bound: it would be held beside what other runs take,
and what it saves is little beside so many."""

_Key = tuple[tuple[str, tuple[int, ...], np.dtype[Any]], ...]
"""Names, shapes and element types of feeds."""


class Runner(Protocol):
    """Runs a graph once per call of `parts`. One thread at a time."""

    def parts(self, feeds: Mapping[str, NDArray[Any]]) -> Iterator[Made]:
        """All wanted outputs, some at a time, in the order of the graph. Raises QD205.

        Fixed ones are valid until the next are asked for. Others are the caller's, and their memory
        is used again once an array is let go. What is not read is ignored in ``feeds``.
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

    def parts(self, feeds: Mapping[str, NDArray[Any]]) -> Iterator[Made]:
        """All at once."""
        reads = {name: feeds[name] for name in self._reads if name in feeds}
        yield Made(dict(zip(self._outputs, run(self._session, self._outputs, reads), strict=True)))


class Stretches:
    """A `Runner` that divides its graph by the shapes of the first feeds, and loads it then.

    ``graph_bytes``: a model with at least the ``outputs`` wanted. Feeds of other shapes run in the
    same stretches; feeds shaped like those before run on bound memory. On a provider with memory of
    its own it is not divided.
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
        self._stretches: tuple[Turn, ...] = ()
        self._reads: frozenset[str] = frozenset()
        self._may_bind = execution.provider == "CPUExecutionProvider"
        self._is_inferred = False
        self._bound: Bound | None = None
        self._bound_for: _Key = ()
        self._seen: tuple[_Key, list[Forms]] | None = None

    def __len__(self) -> int:
        """How many there are; 0 before the first run."""
        return len(self._stretches)

    def parts(self, feeds: Mapping[str, NDArray[Any]]) -> Iterator[Made]:
        """Stretch by stretch."""
        if not self._stretches:
            self._stretches, forms = self._divided(feeds)
            self._reads = frozenset(name for one in self._stretches for name in one.reads)
            self._is_inferred = forms is not None
            self._seen = None if forms is None else (self._key(feeds), forms)
        key = self._key(feeds)
        bound = self._bound_to(key)
        if bound is None:
            yield from self._unbound(feeds, key)
            return
        runs = bound.runs(feeds)
        for done in range(len(self._stretches)):
            try:
                made = next(runs)
            except BINDING_ERRORS:
                # A shape that depends on values, or is another than was inferred. Whatever else it
                # is comes again.
                self._bound, self._bound_for = None, ()
                self._may_bind, self._is_inferred = self._is_inferred, False
                sent = [name for one in self._stretches[:done] for name in one.sends]
                feeds = {**feeds, **{name: bound.array(name) for name in sent}}
                yield from self._unbound(feeds, key, done)
                return
            yield made

    def _key(self, feeds: Mapping[str, NDArray[Any]]) -> _Key:
        return tuple((name, a.shape, a.dtype) for name, a in feeds.items() if name in self._reads)

    def _bound_to(self, key: _Key) -> Bound | None:
        """Memory for feeds of these shapes, where it is known what is put out for them."""
        if self._bound is not None and self._bound_for == key:
            return self._bound
        if not self._may_bind or self._seen is None or self._seen[0] != key:
            return None
        forms, self._seen = self._seen[1], None
        self._bound, self._bound_for = None, key
        given_bytes = sum(form_bytes((dims, dtype)) for _, dims, dtype in key)
        with suppress(ValueError):
            self._bound = Bound(self._stretches, forms, _BOUND_BYTES - given_bytes)
        return self._bound

    def _unbound(
        self, feeds: Mapping[str, NDArray[Any]], key: _Key, first: int = 0
    ) -> Iterator[Made]:
        """Stretches from the ``first`` on, each with memory that it asks for."""
        forms: list[Forms] = []
        waiting = dict(feeds)
        for stretch in self._stretches[first:]:
            reads = {name: waiting[name] for name in stretch.reads if name in waiting}
            for name in stretch.last:
                waiting.pop(name, None)
            found = run(stretch.session, stretch.outputs, reads)
            made = dict(zip(stretch.outputs, found, strict=True))
            forms.append({name: (array.shape, array.dtype) for name, array in made.items()})
            waiting.update((name, made[name]) for name in stretch.sends)
            wanted = {name: made[name] for name in stretch.wanted}
            # Nothing here may keep alive what the caller lets go.
            del reads, found, made
            yield Made(wanted)
        if first == 0 and key != self._bound_for:
            self._seen, self._is_inferred = (key, forms), False

    def _divided(
        self, feeds: Mapping[str, NDArray[Any]]
    ) -> tuple[tuple[Turn, ...], list[Forms] | None]:
        """The stretches, and what they put out for such feeds, where that is known."""
        model = ModelProto.FromString(self._graph_bytes)
        kept = [value for value in model.graph.output if value.name in set(self._outputs)]
        del model.graph.output[:]
        model.graph.output.extend(kept)
        remove_dead(model)
        shapes = self._shapes(model, feeds)
        if shapes is not None:
            split_picks(model, shapes, self._data_folder)
        flow = Flow(model)
        cuts = [] if shapes is None else _cuts(flow, shapes, self._stretch_bytes)
        elements = {} if shapes is None else shapes.elements
        ends = [0, *cuts, len(flow.steps)]
        turns = tuple(self._stretch(flow, a, b, elements) for a, b in pairwise(ends))
        return turns, None if shapes is None else _forms(turns, shapes)

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

    def _stretch(self, flow: Flow, start: int, stop: int, elements: Mapping[str, int]) -> Turn:
        part = part_of(flow, start, stop, elements)
        _share_arena()
        options = measuring_options(self._execution)
        options.add_session_config_entry("session.use_env_allocators", "1")
        session = open_session(
            part.model.SerializeToString(), self._data_folder, self._execution, options
        )
        reads = (*part.feeds, *part.receives)
        return Turn(
            session=session,
            reads=reads,
            outputs=[value.name for value in part.model.graph.output],
            wanted=part.hands,
            sends=part.sends,
            last=tuple(name for name in reads if flow.last_reader[name] < stop),
        )


def _forms(turns: Sequence[Turn], shapes: Shapes) -> list[Forms] | None:
    """What the stretches put out for the inputs that the shapes are of; None where not all is
    known."""
    known = shapes.dims.keys() & shapes.elements.keys()
    if not all(known.issuperset(turn.outputs) for turn in turns):
        return None
    return [
        {
            name: (shapes.dims[name], helper.tensor_dtype_to_np_dtype(shapes.elements[name]))
            for name in turn.outputs
        }
        for turn in turns
    ]


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
