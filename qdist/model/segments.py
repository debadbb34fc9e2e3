"""Models larger than the memory budget, as segments that run one after another.

Each segment is a graph of its own whose weights lie where they always lay: nothing is copied. What
crosses a cut is carried from one to the next. The cuts fall where least crosses, which is the
residual stream between the blocks of a transformer.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from onnx import ModelProto, TensorProto, helper

from qdist.model.cutting import CutPlan, InputShapes, plan_at, plan_cuts
from qdist.model.estimate import BASE_BYTES
from qdist.model.graph import Graph
from qdist.model.half import carried
from qdist.model.parts import part_of
from qdist.model.session import Execution
from qdist.model.taps import TapTable, tapped_graph

_ARENA = 2
"""An arena grows to at most so many times what is needed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Segment:
    """Consecutive steps of a model as a graph of their own. Picklable.

    ``graph_bytes``: serialized graph. It reads ``feeds`` (inputs of the model) and ``receives``
    (made by earlier segments). Its outputs are those of the taps ``tensors``, in their order,
    which are measured here; ``sends``, which later segments read; and ``hands``, which the caller
    asked for. ``weight_bytes``, ``estimate_bytes``: weights and peak of the process; 0 where they
    were not estimated. ``is_frugal``: run without an arena, since the budget is counted that way.
    ``unsized``: what it makes whose size nothing tells in advance and which the estimate leaves
    out, by the names in the graph as it is run (`unknown_sizes` has those of the model).
    """

    graph_bytes: bytes
    feeds: tuple[str, ...]
    receives: tuple[str, ...] = ()
    sends: tuple[str, ...] = ()
    hands: tuple[str, ...] = ()
    tensors: tuple[str, ...] = ()
    weight_bytes: int = 0
    estimate_bytes: int = 0
    is_frugal: bool = False
    unsized: tuple[str, ...] = ()


def whole(graph: Graph, taps: TapTable, *, hands: Iterable[str] = ()) -> Segment:
    """The whole model as one segment. ``hands``: tensors that the caller wants beside the taps."""
    handed = tuple(dict.fromkeys(hands))
    return Segment(
        graph_bytes=_with_outputs(graph, taps, handed).SerializeToString(),
        feeds=tuple(graph.input_names),
        hands=handed,
        tensors=taps.tensors,
    )


def cut(
    graph: Graph,
    taps: TapTable,
    shapes: InputShapes | Sequence[InputShapes],
    budget_bytes: int,
    *,
    hands: Iterable[str] = (),
    base_bytes: int = BASE_BYTES,
    execution: Execution | None = None,
) -> tuple[Segment, ...]:
    """Segments that each fit the budget, with as few bytes between them as can be.

    ``shapes``: of the inputs in the largest micro-batch; or several such, one for each phase of a
    decoder, all of which have to fit. ``base_bytes``: what the process holds without the model; it
    comes off the budget. One segment, as `whole` makes it, where that fits. Raises `ModelError`
    QD211 where one operator does not fit, naming its largest part and the smallest budget that
    would do; QD205 where the runtime refuses the graph.
    """
    handed = tuple(dict.fromkeys(hands))
    plan = plan_cuts(
        _with_outputs(graph, taps, handed),
        [shapes] if isinstance(shapes, Mapping) else list(shapes),
        budget_bytes,
        folder=graph.model.data_folder,
        execution=execution or Execution(),
        measured=_outputs_of(taps),
        base_bytes=base_bytes,
    )
    need = plan.needs[0]
    taken = base_bytes + plan.estimate.held_bytes
    if len(plan.needs) == 1 and _with_arena(plan) + taken <= budget_bytes:
        # The arena makes it faster.
        return (
            replace(
                whole(graph, taps, hands=handed),
                weight_bytes=need.weight_bytes,
                estimate_bytes=_with_arena(plan) + taken,
                unsized=plan.unknown,
            ),
        )
    return _measuring(plan, taps, handed, base_bytes)


def unknown_sizes(graph: Graph, segments: Iterable[Segment]) -> tuple[str, ...]:
    """Tensors of the model, and measured ones inside bodies, that no estimate of these segments
    holds, since their sizes depend on values. In graph order, bodies last."""
    unsized: set[str] = set()
    measured: dict[str, None] = {}
    for segment in segments:
        unsized.update(segment.unsized)
        measured.update(dict.fromkeys(segment.tensors))
    return tuple(name for name in dict.fromkeys((*graph.maker, *measured)) if name in unsized)


def cut_at(
    graph: Graph,
    taps: TapTable,
    shapes: InputShapes | Sequence[InputShapes],
    positions: Sequence[int],
    *,
    hands: Iterable[str] = (),
    execution: Execution | None = None,
) -> tuple[Segment, ...]:
    """As `cut`, before the steps named; positions where no cut can be are left out."""
    handed = tuple(dict.fromkeys(hands))
    plan = plan_at(
        _with_outputs(graph, taps, handed),
        [shapes] if isinstance(shapes, Mapping) else list(shapes),
        positions,
        folder=graph.model.data_folder,
        execution=execution or Execution(),
        measured=_outputs_of(taps),
    )
    return _measuring(plan, taps, handed, BASE_BYTES)


def segments_of(plan: CutPlan, base_bytes: int = BASE_BYTES) -> tuple[Segment, ...]:
    """The parts of a plan. What each ``hands`` out are the outputs of the model that it makes."""
    return tuple(_segment(plan, index, base_bytes) for index in range(len(plan.needs)))


def _measuring(
    plan: CutPlan, taps: TapTable, handed: tuple[str, ...], base_bytes: int
) -> tuple[Segment, ...]:
    """The parts of a plan, each with its taps. An input is measured by its first reader."""
    segments = segments_of(plan, base_bytes)
    reader: dict[str, int] = {}
    for index, segment in enumerate(segments):
        for name in segment.feeds:
            reader.setdefault(name, index)
    return tuple(
        replace(
            segment,
            tensors=tuple(
                point.tensor
                for point in taps.points
                if (
                    reader.get(point.tensor, 0) == index
                    if point.is_input
                    else point.output in segment.hands
                )
            ),
            hands=tuple(name for name in handed if name in segment.hands),
        )
        for index, segment in enumerate(segments)
    )


def _outputs_of(taps: TapTable) -> frozenset[str]:
    return frozenset(point.output for point in taps.points if not point.is_input)


def _with_arena(plan: CutPlan) -> int:
    """Peak of the only part of a plan when activations come from an arena."""
    need = plan.needs[0]
    return need.weight_bytes + _ARENA * max(0, need.peak_bytes - need.weight_bytes)


def _with_outputs(graph: Graph, taps: TapTable, handed: Iterable[str]) -> ModelProto:
    proto = ModelProto.FromString(tapped_graph(graph, taps))
    present = {value.name for value in proto.graph.output}
    for name in handed:
        if name not in present:
            found = graph.type_of(name)
            element = found.element if found is not None else TensorProto.FLOAT
            proto.graph.output.append(helper.make_tensor_value_info(name, carried(element), None))
    return proto


def _segment(plan: CutPlan, index: int, base_bytes: int) -> Segment:
    need = plan.needs[index]
    part = part_of(plan.flow, need.start, need.stop, plan.estimate.elements)
    made = {name for step in plan.flow.steps[need.start : need.stop] for name in step.makes}
    return Segment(
        graph_bytes=part.model.SerializeToString(),
        feeds=part.feeds,
        receives=part.receives,
        sends=part.sends,
        hands=part.hands,
        weight_bytes=need.weight_bytes,
        estimate_bytes=need.peak_bytes + base_bytes + plan.estimate.held_bytes,
        is_frugal=True,
        unsized=tuple(name for name in plan.unknown if name in made),
    )
