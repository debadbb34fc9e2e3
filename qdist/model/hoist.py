"""Bringing tensors out of the bodies of control flow, so that they can be measured.

An ``If`` gets one more output, which is an empty tensor where the other branch runs. A ``Loop``
collects the values of its steps, flat, in a sequence that it carries from step to step, so that
they may differ in size; a ``Scan`` stacks them. Nothing that was there before is changed.
"""

from __future__ import annotations

from collections.abc import Set

import numpy as np
from onnx import GraphProto, NodeProto, TensorProto, ValueInfoProto, helper, numpy_helper

from qdist.model.bodies import body_attributes, node_labels


def hoist(graph: GraphProto, paths: Set[str]) -> None:
    """Make the tensors at these paths available in ``graph`` as float32 tensors, each named by its
    path. What a step of a ``Loop`` or ``Scan`` holds comes flat, as one axis over all steps.
    """
    _hoist(graph, "", paths, flat=False, level=0)


def _hoist(graph: GraphProto, prefix: str, paths: Set[str], *, flat: bool, level: int) -> list[str]:
    """Paths that are now outputs-to-be of ``graph``, under the names `_at(path, level)`."""
    labels = node_labels(graph)
    own = [name for node in graph.node for name in node.output if name]
    nodes: list[NodeProto] = []
    found: list[str] = []
    # Clearing a field invalidates its messages, so the nodes are copied first.
    for label, given in zip(labels, list(graph.node), strict=True):
        node = NodeProto.FromString(given.SerializeToString())
        before: list[NodeProto] = []
        after: list[NodeProto] = []
        if any(path.startswith(f"{prefix}{label}/") for path in paths):
            is_repeated = flat or node.op_type != "If"
            for name, body in body_attributes(node):
                inner = f"{prefix}{label}/{name}/"
                reached = _hoist(body, inner, paths, flat=is_repeated, level=level + 1)
                for path in reached:
                    _CARRIERS[node.op_type](graph, node, body, path, level, before, after)
                found += reached
        nodes += [*before, node, *after]
    for name in own:
        if level and (path := prefix + name) in paths:
            nodes += _copied(graph, name, path, level, flat=flat)
            found.append(path)
    del graph.node[:]
    graph.node.extend(nodes)
    return found


def _at(path: str, level: int) -> str:
    """The name of a path's tensor ``level`` bodies deep: no body may reuse a name around it."""
    return path + "@" * level


def _copied(graph: GraphProto, name: str, path: str, level: int, *, flat: bool) -> list[NodeProto]:
    target = _at(path, level)
    if not flat:
        return [helper.make_node("Cast", [name], [target], target, to=TensorProto.FLOAT)]
    shape = _constant(graph, f"{target}.flat", np.array([-1]))
    return [
        helper.make_node("Cast", [name], [f"{target}.float32"], target, to=TensorProto.FLOAT),
        helper.make_node("Reshape", [f"{target}.float32", shape], [target], f"{target}.flat"),
    ]


def _constant(graph: GraphProto, name: str, value: np.ndarray[tuple[int, ...], np.dtype]) -> str:
    graph.initializer.append(numpy_helper.from_array(value, name))
    return name


def _output(name: str) -> ValueInfoProto:
    return helper.make_tensor_value_info(name, TensorProto.FLOAT, None)


def _through_if(
    graph: GraphProto,
    node: NodeProto,
    body: GraphProto,
    path: str,
    level: int,
    before: list[NodeProto],
    after: list[NodeProto],
) -> None:
    for _, branch in body_attributes(node):
        name = _at(path, level + 1)
        if branch is not body:
            _constant(branch, name, np.zeros(0, np.float32))
        branch.output.append(_output(name))
    _pad(node, len(body.output) - 1)
    node.output.append(_at(path, level))


def _through_loop(
    graph: GraphProto,
    node: NodeProto,
    body: GraphProto,
    path: str,
    level: int,
    before: list[NodeProto],
    after: list[NodeProto],
) -> None:
    inner, outer = _at(path, level + 1), _at(path, level)
    empty = _constant(graph, f"{outer}.empty", np.zeros(0, np.float32))
    start = f"{outer}.start"
    before.append(helper.make_node("SequenceConstruct", [empty], [start], start))
    n_states = len(body.input) - 2
    while len(node.input) < 2 + n_states:
        node.input.append("")
    node.input.append(start)
    carried = helper.make_tensor_sequence_value_info
    body.input.append(carried(f"{inner}.steps", TensorProto.FLOAT, None))
    insert = [f"{inner}.steps", inner]
    body.node.append(helper.make_node("SequenceInsert", insert, [f"{inner}.more"], f"{inner}.more"))
    # States come before what the steps stack up.
    body.output.insert(1 + n_states, carried(f"{inner}.more", TensorProto.FLOAT, None))
    _pad(node, n_states)
    node.output.insert(n_states, f"{outer}.steps")
    after.append(helper.make_node("ConcatFromSequence", [f"{outer}.steps"], [outer], outer, axis=0))


def _through_scan(
    graph: GraphProto,
    node: NodeProto,
    body: GraphProto,
    path: str,
    level: int,
    before: list[NodeProto],
    after: list[NodeProto],
) -> None:
    outer = _at(path, level)
    _pad(node, len(body.output))
    body.output.append(_output(_at(path, level + 1)))
    node.output.append(f"{outer}.steps")
    shape = _constant(graph, f"{outer}.flat", np.array([-1]))
    after.append(helper.make_node("Reshape", [f"{outer}.steps", shape], [outer], f"{outer}.flat"))


def _pad(node: NodeProto, n_outputs: int) -> None:
    """Outputs that nobody reads may be left off at the end; here they are counted."""
    while len(node.output) < n_outputs:
        node.output.append("")


_CARRIERS = {"If": _through_if, "Loop": _through_loop, "Scan": _through_scan}
