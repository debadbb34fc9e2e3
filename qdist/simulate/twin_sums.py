"""Quantized twins of several plans in one graph, of which nothing but sums leaves the graph.

Every layer stands beside one twin for each distinct way in which the plans quantize it, all fed by
the float activations. Per twin the graph gives the sums that a deviation is made of. Twins of equal
quantizers are one, as are Q/DQ pairs and stored weights.

Sums are taken in two steps: the last axis in float32, whose rounding is some 1e-7 of a row's sum,
then all rows in float64. Layers named in ``careful`` are summed in float64 throughout, without the
places where the float model is infinite or NaN: what `qdist.evaluate.compare.Sums` does with whole
tensors.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx
from onnx import NodeProto, TensorProto

from qdist.digest import digest_bytes
from qdist.model import rewrite
from qdist.model.freeze import FrozenModel
from qdist.plan.plan import LayerPlan
from qdist.plan.target import ProjectedPlan
from qdist.simulate.assemble import QuantizedGraph, finished, pair_nodes, raised, round_results
from qdist.simulate.pairs import Pairs
from qdist.simulate.split_bias import with_bias_apart
from qdist.simulate.twins import own_results, twin_of
from qdist.simulate.wires import Wires

N_SUMS = 5
"""Of f*f, q*q, (q-f)^2, abs(q-f), and 1, over all elements."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TwinSums:
    """``graph`` has one output, `TOTALS`: float64[len(keys), N_SUMS], a row for each of ``keys``
    (see `twin_key`), in order. ``careful``: the layers that were summed in float64, and so on.
    ``layer_of``: key -> layer."""

    graph: QuantizedGraph
    keys: tuple[str, ...]
    layer_of: Mapping[str, str]
    careful: frozenset[str]


TOTALS = "qdist.totals"


def twin_key(layer: LayerPlan) -> str:
    """Hex SHA-256 of all that decides what a layer's twin computes, but for the model."""
    rounded = layer.outputs if layer.choice.bits.rounds is not None else ()
    parts = [layer.name.encode()]
    apart = (layer.bias_add.entries,) if layer.bias_add is not None else ()
    for entries in (layer.activations, layer.weights, rounded, *apart):
        parts.append(str(len(entries)).encode())
        for entry in entries:
            *kind, scales, zeros, axis, blocks = entry.quantizer.key
            parts.append(repr((entry.index, entry.tensor, kind, axis, blocks)).encode())
            # As text, thousands of scales would take longer than the layer.
            parts.append(np.asarray(scales, np.float64).tobytes())
            parts.append(np.asarray(zeros, np.int64).tobytes())
    return digest_bytes(*parts)


def twin_sums(
    frozen: FrozenModel,
    plans: Sequence[ProjectedPlan],
    *,
    keys: Collection[str] | None = None,
    careful: Collection[str] = (),
    scalars: Collection[str] = (),
) -> TwinSums:
    """The graph for the quantized layers of ``plans``, which are of this model.

    ``keys``: the twins that are wanted; None: all. ``careful``: layers whose values are not all
    finite, or whose squares leave float32. ``scalars``: tensors without axes. What no wanted twin
    needs is left out, the end of the model included. Raises QD206.
    """
    wanted = _wanted(plans, keys)
    proto = raised(frozen, max((projected.plan.opset for projected in plans), default=0))
    pairs = Pairs(frozen.weights(), rewrite.tensor_names(proto))
    nodes: list[NodeProto] = []
    placed: set[str] = set()
    rows: list[str] = []
    found: dict[str, str] = {}
    for node in proto.graph.node:
        nodes.append(node)
        output = next((name for name in node.output if name), "")
        wires = _Reductions(
            pairs,
            f"{output}.sums",
            is_careful=node.name in careful or output in scalars,
        )
        for i, (key, layer) in enumerate(wanted.get(node.name, {}).items()):
            twin = twin_of(node, f".twin{i}")
            result = next(name for name in twin.output if name)
            nodes.extend(pair_nodes(twin, layer, pairs, placed))
            made = with_bias_apart(twin, layer, pairs, placed)
            after = round_results(made[-1], own_results(node, layer), pairs)
            start = len(wires.nodes)
            row = wires.sums(output, result)
            nodes.extend((*made, *after, *wires.nodes[start:]))
            rows.append(row)
            found[key] = node.name
    wires = _Reductions(pairs, "qdist", is_careful=False)
    if rows:
        nodes.extend(wires.table(rows))
    del proto.graph.output[:]
    if rows:
        proto.graph.output.append(
            onnx.helper.make_tensor_value_info(TOTALS, TensorProto.DOUBLE, [len(rows), N_SUMS])
        )
    return TwinSums(
        graph=finished(frozen, proto, nodes, pairs),
        keys=tuple(found),
        layer_of=found,
        careful=frozenset(careful),
    )


def _wanted(
    plans: Sequence[ProjectedPlan], keys: Collection[str] | None
) -> dict[str, dict[str, LayerPlan]]:
    """Layer -> key -> what the twin is to be."""
    wanted: dict[str, dict[str, LayerPlan]] = {}
    for projected in plans:
        for layer in projected.plan.layers:
            if layer.is_quantized:
                key = twin_key(layer)
                if keys is None or key in keys:
                    wanted.setdefault(layer.name, {})[key] = layer
    return wanted


class _Reductions(Wires):
    """Collects the nodes that make sums of two tensors of one shape."""

    def __init__(self, pairs: Pairs, stem: str, *, is_careful: bool) -> None:
        super().__init__(pairs, stem)
        self._is_careful = is_careful
        self._of_float: tuple[str, ...] | None = None

    def sums(self, expected: str, found: str) -> str:
        """float64[1, N_SUMS] of the float tensor and the twin's."""
        if self._of_float is None:
            self._of_float = self._prepared(expected)
        f, mask, ff, n = self._of_float
        q = self.add("Where", mask, self.wide(found), self.constant(0.0)) if mask else found
        d = self.add("Sub", q, f)
        parts = (
            ff,
            self._square(q),
            self._square(d),
            self._total(self.add("Abs", d)),
            n,
        )
        return self.add("Concat", *parts, axis=1)

    def table(self, rows: list[str]) -> Iterator[NodeProto]:
        """The nodes that make `TOTALS` of rows."""
        self.add("Concat", *rows, target=TOTALS, axis=0)
        yield from self.nodes

    def _prepared(self, expected: str) -> tuple[str, ...]:
        """The float tensor as it is compared, which of it counts (empty: all), and its sums."""
        if not self._is_careful:
            size = self.add("Cast", self.add("Size", expected), to=TensorProto.DOUBLE)
            return expected, "", self._square(expected), self._row(size)
        wide = self.wide(expected)
        # A difference with itself is 0 for finite numbers, NaN for all others.
        finite = self.add("Equal", self.add("Sub", wide, wide), self.constant(0.0))
        f = self.add("Where", finite, wide, self.constant(0.0))
        return f, finite, self._square(f), self._total(finite)

    def _square(self, tensor: str) -> str:
        return self._total(self.add("Mul", tensor, tensor))

    def _total(self, tensor: str) -> str:
        """float64[1, 1]: the sum over all elements."""
        if not self._is_careful:
            # Of all reductions of an axis, ONNX Runtime has a vectorized kernel for this one alone.
            tensor = self.add("ReduceSum", tensor, self.constant([-1], np.int64), keepdims=0)
        return self._row(self.add("ReduceSum", self.wide(tensor), keepdims=0))

    def _row(self, scalar: str) -> str:
        return self.add("Reshape", scalar, self.constant([1, 1], np.int64))
