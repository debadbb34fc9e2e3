"""What a tapped graph holds, and whether one more tap changes it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from onnx import GraphProto, ModelProto, TensorProto, ValueInfoProto, helper

from qdist.model.graph import Graph
from qdist.model.session import measuring_session, run
from qdist.model.taps import TapTable, find_taps, tapped_graph
from tests.onnx_models import EXECUTION, Array, frozen_from, value


def graph_of(proto: ModelProto, folder: Path) -> Graph:
    """The model, frozen and indexed."""
    return Graph(frozen_from(proto, folder / "model.onnx"))


def node(op_type: str, inputs: list[str], outputs: list[str], name: str = "", **kw: Any) -> Any:
    """A node; ``domain`` goes in with the attributes."""
    return helper.make_node(op_type, inputs, outputs, name, **kw)


def body(
    nodes: list[Any],
    inputs: list[ValueInfoProto],
    outputs: list[str],
    constants: dict[str, Array] | None = None,
    elements: dict[str, int] | None = None,
) -> GraphProto:
    """A body of control flow. ``elements``: of the outputs that are no float32."""
    kinds = elements or {}
    made = [value(name, None, kinds.get(name, TensorProto.FLOAT)) for name in outputs]
    initializers = [helper.make_tensor(n, *_tensor(a)) for n, a in (constants or {}).items()]
    return helper.make_graph(nodes, "body", inputs, made, initializers)


def _tensor(array: Array) -> tuple[int, tuple[int, ...], list[Any]]:
    element = helper.np_dtype_to_tensor_dtype(array.dtype)
    return element, array.shape, array.ravel().tolist()


def tapped_values(graph: Graph, taps: TapTable, feeds: dict[str, Array]) -> dict[str, Array]:
    """What a run of the tapped graph hands out, by measured tensor; inputs are left out."""
    session = measuring_session(tapped_graph(graph, taps), graph.model.data_folder, EXECUTION)
    points = [point for point in taps.points if not point.is_input]
    values = run(session, [point.output for point in points], feeds)
    return dict(zip((point.tensor for point in points), values, strict=True))


def assert_taps_change_nothing(graph: Graph, feeds: dict[str, Array]) -> dict[str, Array]:
    """Law 1: each tensor holds the same bits whether it is tapped alone or with all others.
    Returns the values."""
    taps = find_taps(graph)
    together = tapped_values(graph, taps, feeds)
    for point in taps.points:
        if not point.is_input:
            alone = tapped_values(graph, replace(taps, points=(point,)), feeds)
            np.testing.assert_array_equal(
                alone[point.tensor], together[point.tensor], err_msg=point.tensor, strict=True
            )
    return together


def untapped_outputs(graph: Graph, feeds: dict[str, Array]) -> dict[str, Array]:
    """What the frozen graph gives without any tap."""
    session = measuring_session(graph.model.graph_bytes, graph.model.data_folder, EXECUTION)
    names = [output.name for output in session.get_outputs()]
    return dict(zip(names, run(session, names, feeds), strict=True))
