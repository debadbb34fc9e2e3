"""A frozen model with the factors of a `Smoothing` moved into its constants.

Factors are powers of two, so scaled constants and every number computed from them are the old ones
with another exponent: the outputs, and all tensors but those divided by factors, keep their bits,
as long as no number leaves the range of normal float32 (`qdist.plan.smoothing` sees to that).
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray
from onnx import numpy_helper

from qdist.digest import digest_json
from qdist.errors import ModelError
from qdist.model import rewrite
from qdist.model.freeze import FrozenModel
from qdist.model.graph import Graph
from qdist.model.smooth_points import Fold, find_points
from qdist.model.smoothing import Smoothing

MOST_BYTES = 1 << 30
"""Of scaled weights, which are held in the graph; one protobuf ends at 2 GiB."""


def smoothed_model(graph: Graph, smoothing: Smoothing) -> FrozenModel:
    """The model of ``graph`` with its constants scaled. The same factors give the same bytes.

    Raises `ModelError` QD212 for factors of tensors that this model cannot scale, and where scaled
    weights come to more than `MOST_BYTES`.
    """
    frozen = graph.model
    folds = _folds(graph, smoothing)
    proto = frozen.proto()
    nodes = {node.name: node for node in proto.graph.node}
    _check_size(graph, {nodes[name].input[index] for name, index in folds})
    uses = Counter(name for node in proto.graph.node for name in rewrite.names_read(node))
    uses.update(value.name for value in proto.graph.output)
    place = {tensor.name: i for i, tensor in enumerate(proto.graph.initializer)}
    taken = rewrite.tensor_names(proto)
    for (node_name, index), own in folds.items():
        node = nodes[node_name]
        old = node.input[index]
        scaled = graph.weights.read(old)
        for fold, exponents in own:
            shape = [1] * scaled.ndim
            shape[fold.axis] = -1
            scaled = np.ldexp(scaled, (fold.sign * exponents).reshape(shape))
        if uses[old] == 1:
            proto.graph.initializer[place[old]].CopyFrom(numpy_helper.from_array(scaled, old))
            continue
        # What others read too stays as it is.
        new = _free_name(old, taken)
        node.input[index] = new
        proto.graph.initializer.append(numpy_helper.from_array(scaled, new))
        uses[old] -= 1
    return replace(
        frozen,
        graph_bytes=proto.SerializeToString(deterministic=True),
        digest=digest_json(["smoothed", frozen.digest, smoothing.digest]),
        smoothing=smoothing,
    )


def changed_tensors(graph: Graph, smoothing: Smoothing) -> tuple[str, ...]:
    """Names of all tensors of ``graph`` that the factors divide, in graph order of their points."""
    points = find_points(graph).points
    return tuple(
        dict.fromkeys(name for p in points if p.tensor in smoothing.exponents for name in p.changed)
    )


_Folds = dict[tuple[str, int], list[tuple[Fold, NDArray[np.int32]]]]


def _folds(graph: Graph, smoothing: Smoothing) -> _Folds:
    """(node, input) -> what is done to the constant there: a weight may be scaled on both axes."""
    points = {point.tensor: point for point in find_points(graph).points}
    found: _Folds = defaultdict(list)
    for tensor, own in smoothing.exponents.items():
        point = points.get(tensor)
        if point is None or point.n_channels != len(own):
            raise _refuse(
                graph,
                f"factors of {tensor}, {len(own)} channels",
                "factors of tensors that this model can scale",
                "give the model that the factors were found for",
            )
        for fold in (*point.weights, *point.makers):
            found[fold.node, fold.index].append((fold, smoothing.of(tensor)))
    return found


def _check_size(graph: Graph, names: Iterable[str]) -> None:
    total = sum(graph.weights.n_bytes(name) for name in names)
    if total > MOST_BYTES:
        raise _refuse(
            graph,
            f"{total / 1e9:.2f} GB of weights to scale",
            f"at most {MOST_BYTES / 1e9:.2f} GB, since they are held in the graph",
            "leave out smoothing for this model",
        )


def _refuse(graph: Graph, got: str, expected: str, mend: str) -> ModelError:
    return ModelError("QD212", where=str(graph.model.source), got=got, expected=expected, mend=mend)


def _free_name(name: str, taken: set[str]) -> str:
    """A new tensor name, the same in every run. Adds it to ``taken``."""
    n = 0
    while (new := f"{name}.smoothed_{n}") in taken:
        n += 1
    taken.add(new)
    return new
