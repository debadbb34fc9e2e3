"""Where to cut a graph so that every part fits a budget and little crosses the cuts."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from onnx import ModelProto

from qdist.errors import ModelError
from qdist.model.estimate import BASE_BYTES, Estimate, Need
from qdist.model.flow import Flow
from qdist.model.parts import can_cross
from qdist.model.rewrite import remove_dead
from qdist.model.session import Execution
from qdist.model.shapes import Shapes, concrete_shapes

InputShapes = Mapping[str, Sequence[int]]
"""The shape of every input of the model, batch axis included, of one micro-batch (of one phase)."""

SEGMENT_COST_BYTES = 16 << 20
"""One more segment is worth it where so many boundary bytes fewer cross per micro-batch."""
_MANY_BYTES = 64 << 20
_NARROW = 8
"""A cut is a candidate where nothing crosses less within so many steps on either side."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CutPlan:
    """Where a model is cut. ``needs``: one per part, whose ranges of steps join without a gap.

    ``unknown``: tensors whose size nothing tells, and which count as nothing.
    """

    flow: Flow
    estimate: Estimate
    needs: tuple[Need, ...]
    unknown: tuple[str, ...]

    def __post_init__(self) -> None:
        ends = [0, *(need.stop for need in self.needs)]
        if [need.start for need in self.needs] != ends[:-1] or ends[-1] != len(self.flow.steps):
            raise ValueError(f"parts {ends} of {len(self.flow.steps)} steps")


def plan_cuts(
    model: ModelProto,
    shapes: Sequence[InputShapes],
    budget_bytes: int,
    *,
    folder: Path | None,
    execution: Execution,
    measured: frozenset[str] = frozenset(),
    base_bytes: int = BASE_BYTES,
) -> CutPlan:
    """Cut a model whose outputs are all held until a run ends, as cheaply as the budget allows.

    ``shapes``: of the inputs, one or several kinds, all of which have to fit. ``measured``: the
    outputs that get statistics. Raises `ModelError` QD211 where one step does not fit, QD205 where
    the runtime refuses the graph.
    """
    estimate, unknown = _estimate(model, shapes, folder, execution, measured)
    flow = estimate.flow
    available = budget_bytes - base_bytes - estimate.held_bytes
    crossing = flow.crossing()
    allowed = [p for p, names in enumerate(crossing) if can_cross(names, estimate.elements)]
    _refuse_too_large(estimate, allowed, budget_bytes, budget_bytes - available)
    needs: tuple[Need, ...] | None = None
    if estimate.need(0, len(flow.steps)).peak_bytes <= available:
        needs = (estimate.need(0, len(flow.steps)),)
    else:
        costs = [sum(estimate.n_bytes[name] for name in names) for names in crossing]
        for cuts in (_narrow(costs, allowed), allowed):
            needs = needs or _cheapest(estimate, costs, cuts, available)
    return CutPlan(flow=flow, estimate=estimate, needs=needs or (), unknown=unknown)


def plan_at(
    model: ModelProto,
    shapes: Sequence[InputShapes],
    cuts: Sequence[int],
    *,
    folder: Path | None,
    execution: Execution,
    measured: frozenset[str] = frozenset(),
) -> CutPlan:
    """Cut before the steps named, whatever that costs; positions where no cut can be are left out.

    Raises QD205 where the runtime refuses the graph.
    """
    estimate, unknown = _estimate(model, shapes, folder, execution, measured)
    crossing = estimate.flow.crossing()
    n = len(estimate.flow.steps)
    inner = sorted({p for p in cuts if 0 < p < n and can_cross(crossing[p], estimate.elements)})
    ends = [0, *inner, n]
    needs = tuple(estimate.need(a, b) for a, b in pairwise(ends))
    return CutPlan(flow=estimate.flow, estimate=estimate, needs=needs, unknown=unknown)


def _estimate(
    model: ModelProto,
    shapes: Sequence[InputShapes],
    folder: Path | None,
    execution: Execution,
    measured: frozenset[str],
) -> tuple[Estimate, tuple[str, ...]]:
    if not shapes:
        raise ValueError("no input shapes to estimate for")
    model = ModelProto.FromString(model.SerializeToString())
    known = _shapes(model, shapes, folder, execution)
    remove_dead(model)
    unknown = dict.fromkeys(name for entry in known for name in entry.unknown)
    return Estimate(Flow(model), known, measured), tuple(unknown)


def _shapes(
    model: ModelProto, shapes: Sequence[InputShapes], folder: Path | None, execution: Execution
) -> list[Shapes]:
    return [concrete_shapes(model, entry, folder, execution) for entry in shapes]


def _blocks(allowed: Sequence[int], n_steps: int) -> Iterator[tuple[int, int]]:
    """The smallest parts there can be."""
    ends = [0, *(p for p in allowed if 0 < p < n_steps), n_steps]
    yield from pairwise(ends)


def _refuse_too_large(
    estimate: Estimate, allowed: Sequence[int], budget_bytes: int, taken_bytes: int
) -> None:
    """Raise QD211 where even the finest cut leaves a part that does not fit."""
    n_steps = len(estimate.flow.steps)
    needs = [estimate.need(start, stop) for start, stop in _blocks(allowed, n_steps)]
    worst = max(needs, key=lambda need: need.peak_bytes)
    wanted = worst.peak_bytes + taken_bytes
    if wanted <= budget_bytes:
        return
    node = estimate.flow.steps[worst.start].node
    raise ModelError(
        "QD211",
        where=f"{node.op_type} {node.name}, {worst.breaker}",
        got=f"a need of {_rounded_up(wanted)} for this operator alone ({_rounded_up(taken_bytes)} "
        f"of it for the process{_inline_part(estimate)}), a budget of {_rounded_up(budget_bytes)}",
        expected="every operator with its weights, inputs and measured outputs within the budget",
        mend=f"raise the memory budget to {_rounded_up(wanted)} or more, or lower the micro-batch",
    )


def _inline_part(estimate: Estimate) -> str:
    if estimate.inline_bytes < _MANY_BYTES:
        return ""
    return f" and {_rounded_up(estimate.inline_bytes)} of weights inside the graph"


def _rounded_up(n_bytes: int) -> str:
    unit, name = (1 << 20, "MiB") if n_bytes >= 1 << 24 else (1 << 10, "KiB")
    return f"{-(-n_bytes // unit)} {name}"


def _narrow(costs: Sequence[int], allowed: Sequence[int]) -> list[int]:
    """The cuts that are cheapest in their neighbourhood."""
    return [p for p in allowed if costs[p] == min(costs[max(0, p - _NARROW) : p + _NARROW + 1])]


def _cheapest(
    estimate: Estimate, costs: Sequence[int], cuts: Sequence[int], available: int
) -> tuple[Need, ...] | None:
    """The parts between some of ``cuts`` that fit and cost least; None where none fit.

    Dynamic program over the positions: ``best[p]`` is the least cost of the steps before ``p``.
    """
    n_steps = len(estimate.flow.steps)
    starts = [0, *(p for p in cuts if 0 < p < n_steps)]
    ends = {*starts[1:], n_steps}
    best: dict[int, tuple[int, int, Need | None]] = {0: (0, 0, None)}
    for start in starts:
        if start not in best:
            continue
        cost = best[start][0] + SEGMENT_COST_BYTES + costs[start]
        for need in estimate.grow(start):
            if need.peak_bytes > available:
                break
            if need.stop in ends and (need.stop not in best or cost < best[need.stop][0]):
                best[need.stop] = (cost, start, need)
    if n_steps not in best:
        return None
    needs: list[Need] = []
    position = n_steps
    while position:
        _, position, last = best[position]
        if last is not None:
            needs.append(last)
    return tuple(reversed(needs))
