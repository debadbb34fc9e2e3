"""How far the model's outputs move when one group of layers is quantized, all else being float.

A group's error is at home in the rest of the model, so nothing before its first layer needs to run
again: the float activations that cross the cut before that layer are kept, and the model runs from
there on. Tasks in the order of their first layers share one walk through the float model, from cut
to cut, so that its layers run once for all tasks together and only one cut is held at a time.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import onnx
from numpy.typing import NDArray
from onnx import ModelProto, helper

from qdist.calibration import input_specs
from qdist.data.source import DataSource, Feeds
from qdist.emit.writer import write_model
from qdist.evaluate.builtin import batches
from qdist.evaluate.metrics import find_metric
from qdist.model import rewrite
from qdist.model.freeze import FrozenModel
from qdist.model.graph import Graph
from qdist.model.session import Execution, run, scoring_session
from qdist.plan.target import ProjectedPlan
from qdist.simulate.assemble import QuantizedGraph, assemble, raised
from qdist.simulate.twins import only

MEASURES = ("relative", "kl")
"""Squared relative L2 error of all float outputs, or mean KL divergence of the logits, in nats."""
Values = dict[str, NDArray[Any]]


@dataclass(frozen=True, slots=True, kw_only=True)
class DivergenceTask:
    """The layers of ``names`` quantized as in ``projected``, all others float. Picklable."""

    key: str
    names: tuple[str, ...]
    projected: ProjectedPlan


@dataclass(frozen=True, slots=True, kw_only=True)
class _Held:
    """The float model's values at a cut, batch by batch: what its later layers read of earlier
    ones. ``position``: of the first node after the cut."""

    position: int
    values: tuple[Values, ...]


def in_order(frozen: FrozenModel, tasks: Sequence[DivergenceTask]) -> tuple[DivergenceTask, ...]:
    """The tasks by the place of their first layers, so that neighbours share a prefix: what to hand
    out to workers in contiguous stretches."""
    place = {node.name: i for i, node in enumerate(raised(frozen, 0).graph.node)}
    return tuple(sorted(tasks, key=lambda task: (min(place[n] for n in task.names), task.key)))


def divergences(
    frozen: FrozenModel,
    tasks: Sequence[DivergenceTask],
    source: DataSource,
    execution: Execution,
    *,
    measure: str = "relative",
    batch: int = 8,
    n_samples: int | None = None,
) -> dict[str, float]:
    """Task key -> divergence over the first ``n_samples``.

    Holds the float outputs of all these samples, and what crosses one cut. Raises `DataError`,
    QD205, QD206, and QD704 where outputs are no logits for ``kl``.
    """
    if measure not in MEASURES:
        raise ValueError(f"measure must be one of {MEASURES}, got {measure!r}")
    if not tasks:
        return {}
    opset = max(task.projected.plan.opset for task in tasks)
    walk = _Walk(frozen, opset, source, execution, batch, n_samples)
    return {task.key: walk.divergence(task, measure) for task in in_order(frozen, tasks)}


class _Walk:
    """Goes through the float model from cut to cut. One thread at a time."""

    def __init__(
        self,
        frozen: FrozenModel,
        opset: int,
        source: DataSource,
        execution: Execution,
        batch: int,
        n_samples: int | None,
    ) -> None:
        self._frozen = frozen
        self._execution = execution
        self._float = raised(frozen, opset)
        nodes = self._float.graph.node
        self._place = {node.name: i for i, node in enumerate(nodes)}
        self._made = {name: i for i, node in enumerate(nodes) for name in node.output if name}
        self._outputs = [value.name for value in self._float.graph.output]
        self._last = self._last_reads()
        inputs = input_specs(Graph(frozen))
        found = batches(source, inputs, batch, n_samples=n_samples)
        self._feeds: list[Feeds] = [entry.feeds for entry in found]
        self._expected = list(self._run(self._float, self._outputs, self._feeds))
        self._held = _Held(position=0, values=tuple({} for _ in self._feeds))

    def divergence(self, task: DivergenceTask, measure: str) -> float:
        """Of one task that is not before the ones that were asked for."""
        self._go_to(min(self._place[name] for name in task.names))
        graph = assemble(self._frozen, only(task.projected, set(task.names)))
        before = {node.name for node in self._float.graph.node[: self._held.position]}
        self._leave_out(graph.proto, before)
        metric = find_metric("kl" if measure == "kl" else "sqnr_db")
        score = metric.make()
        given = [
            {**feeds, **values}
            for feeds, values in zip(self._feeds, self._held.values, strict=True)
        ]
        found = self._run_graph(graph, given)
        for outputs, feeds, expected in zip(found, self._feeds, self._expected, strict=True):
            score.update(list(outputs.values()), feeds, None, list(expected.values()))
        result = score.result()
        return result if measure == "kl" else float(10 ** (-result / 10))

    def _go_to(self, position: int) -> None:
        """Hold the values at the cut before the node of this place."""
        if position == self._held.position:
            return
        crossing = [
            name for name, made in self._made.items() if made < position <= self._last.get(name, -1)
        ]
        new = [name for name in crossing if self._made[name] >= self._held.position]
        given = [
            {**feeds, **values}
            for feeds, values in zip(self._feeds, self._held.values, strict=True)
        ]
        part = ModelProto.FromString(self._float.SerializeToString())
        self._leave_out(part, {node.name for node in self._float.graph.node[: self._held.position]})
        _set_outputs(part, new)
        rewrite.remove_dead(part)
        values = []
        computed = self._run(part, new, given) if new else ({} for _ in given)
        for old, made in zip(self._held.values, computed, strict=True):
            values.append({name: made[name] if name in made else old[name] for name in crossing})
        self._held = _Held(position=position, values=tuple(values))

    def _leave_out(self, proto: ModelProto, before: set[str]) -> None:
        """Drop the nodes before the cut; what they made comes as inputs."""
        held = self._held.values[0] if self._held.values else {}
        kept = [
            node
            for node in proto.graph.node
            if node.name not in before and held.keys().isdisjoint(node.output)
        ]
        rewrite.set_nodes(proto, kept)
        for name, array in held.items():
            kind = helper.np_dtype_to_tensor_dtype(array.dtype)
            proto.graph.input.append(helper.make_tensor_value_info(name, kind, None))
        rewrite.remove_dead(proto)

    def _run_graph(self, graph: QuantizedGraph, given: list[Values]) -> Iterator[Values]:
        with TemporaryDirectory(prefix="qdist-suffix-") as folder:
            path = write_model(graph, Path(folder) / "suffix.onnx").path
            session = scoring_session(path, self._execution)
            yield from _run_all(session, self._outputs, given)

    def _run(
        self, proto: ModelProto, outputs: list[str], given: Sequence[Values]
    ) -> Iterator[Values]:
        session = scoring_session(
            proto.SerializeToString(), self._execution, self._frozen.data_folder
        )
        yield from _run_all(session, outputs, given)

    def _last_reads(self) -> dict[str, int]:
        """Tensor -> place of the last node that reads it; beyond all nodes for outputs."""
        found: dict[str, int] = {}
        for i, node in enumerate(self._float.graph.node):
            found.update(dict.fromkeys(rewrite.names_read(node), i))
        found.update(dict.fromkeys(self._outputs, len(self._float.graph.node)))
        return found


def _run_all(session: Any, outputs: list[str], given: Sequence[Values]) -> Iterator[Values]:
    read = {value.name for value in session.get_inputs()}
    for values in given:
        feeds = {name: array for name, array in values.items() if name in read}
        yield dict(zip(outputs, run(session, outputs, feeds), strict=True))


def _set_outputs(proto: ModelProto, names: Sequence[str]) -> None:
    del proto.graph.output[:]
    proto.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names)
