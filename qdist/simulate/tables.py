"""Functions of one tensor as tables, where a chip has them (target-exact mode).

A table holds the stored result at ``2**bits`` + 1 evenly spaced levels of the input, the first at
the lowest. In between it is interpolated linearly and rounded half up, as whole numbers. For an
input that has no more levels than the table has entries, the table is the function.

Our reading: Knight's document gives the lengths (2**8 to 2**12, default 2**10, for 16-bit numbers
only), not what is between two entries.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from onnx import NodeProto, TensorProto, helper

from qdist.model.session import Execution, run, scoring_session
from qdist.plan.quantizer import Quantizer
from qdist.simulate.wires import Wires


def table_of(
    node: NodeProto, source: Quantizer, result: Quantizer, bits: int, opset: int
) -> NDArray[np.int64]:
    """The stored results (less the zero point), int64[2**bits + 1], at the levels of ``source``
    that lie ``2**(source.bits - bits)`` apart."""
    step = 1 << max(0, source.bits - bits)
    first = source.low - source.zero_points[0]
    levels = first + step * np.arange((1 << min(bits, source.bits)) + 1, dtype=np.int64)
    x = levels.astype(np.float32) * np.float32(source.scales[0])
    stored = result.quantize(_evaluated(node, x, opset)) - result.zero_points[0]
    return np.asarray(stored, np.int64)


def interpolated(
    integers: NDArray[np.int64], table: NDArray[np.int64], source: Quantizer, bits: int
) -> NDArray[np.int64]:
    """The definition: results for whole numbers of the input (less its zero point)."""
    place = integers - (source.low - source.zero_points[0])
    return interpolated_at(place, table, max(0, source.bits - bits))


def interpolated_at(
    place: NDArray[np.int64], table: NDArray[np.int64], shift: int
) -> NDArray[np.int64]:
    """What lies at ``place`` when the entries of ``table`` are ``2**shift`` apart, from 0 on."""
    index, rest = place >> shift, place & ((1 << shift) - 1)
    rise = (table[index + 1] - table[index]) * rest
    return np.asarray(table[index] + ((rise + ((1 << shift) >> 1)) >> shift), np.int64)


def looked_up(
    wires: Wires, whole: str, table: NDArray[np.int64], source: Quantizer, bits: int
) -> str:
    """`interpolated` in a graph: float64 whole numbers in and out."""
    first = float(source.low - source.zero_points[0])
    place = wires.add("Sub", whole, wires.constant(first))
    return at_levels(wires, place, table, max(0, source.bits - bits))


def at_levels(wires: Wires, place: str, table: NDArray[np.int64], shift: int) -> str:
    """`interpolated_at` in a graph: float64 whole numbers in and out."""
    step = float(1 << shift)
    index = wires.add("Floor", wires.add("Mul", place, wires.constant(1.0 / step)))
    rest = wires.add("Sub", place, wires.add("Mul", index, wires.constant(step)))
    at = wires.add("Cast", index, to=TensorProto.INT64)
    entries = wires.constant(table.astype(np.float64))
    rises = wires.constant(np.diff(table).astype(np.float64))
    rise = wires.add("Mul", wires.add("Gather", rises, at), rest)
    part = wires.add("Mul", rise, wires.constant(1.0 / step))
    rounded = wires.add("Floor", wires.add("Add", part, wires.constant(0.5)))
    return wires.add("Add", wires.add("Gather", entries, at), rounded)


def _evaluated(node: NodeProto, x: NDArray[np.float32], opset: int) -> NDArray[np.float32]:
    """The function itself, by ONNX Runtime."""
    alone = NodeProto.FromString(node.SerializeToString())
    del alone.input[:], alone.output[:]
    alone.input.append("x")
    alone.output.append("y")
    graph = helper.make_graph(
        [alone],
        "function",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n"])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n"])],
    )
    imports = [helper.make_opsetid("", opset)]
    model: bytes | Path = helper.make_model(
        graph, opset_imports=imports, ir_version=10
    ).SerializeToString()
    (y,) = run(scoring_session(model, Execution()), None, {"x": x})
    return np.asarray(y, np.float32)
