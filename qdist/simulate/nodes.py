"""The nodes that store a tensor: what a chip keeps of it, as float32 again.

Every one of them computes what `Quantizer.applied` says, bit for bit. No optimizer of ONNX Runtime
removes them: a tensor cast to a narrower type and back is kept at every optimization level, unless
``optimization.enable_cast_chain_elimination`` is asked for, which this project never does.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from onnx import NodeProto, TensorProto, helper

from qdist.numbers.dtype import FloatType
from qdist.numbers.grid import LEAST_SCALE
from qdist.plan.quantizer import Quantizer

Constant = Callable[..., str]
"""Of a number or list and its dtype (float32): the name of an initializer that holds it."""
_CASTS = {"fp16": TensorProto.FLOAT16, "bf16": TensorProto.BFLOAT16}
_INTEGERS = {"int4": TensorProto.INT4, "int8": TensorProto.INT8, "int16": TensorProto.INT16}
"""Types of dynamic quantizers, which are symmetric."""
_FLOAT, _DOUBLE, _INT32 = TensorProto.FLOAT, TensorProto.DOUBLE, TensorProto.INT32


_WIDEN = "Widen"


def is_rounding(node: NodeProto) -> bool:
    """Whether this is the last node of a `rounding`."""
    return node.op_type == "Cast" and node.name.endswith(f".{_WIDEN}")


class Chain:
    """Nodes one after the other, from the tensor ``source`` on, named after ``stem``."""

    def __init__(self, source: str, stem: str) -> None:
        self.nodes: list[NodeProto] = []
        self.last = source
        self._stem = stem

    def then(
        self, op_type: str, *others: str, name: str = "", target: str = "", **attributes: Any
    ) -> Chain:
        """Add a node on the last result and ``others``. It is called after ``name`` (default: its
        operator), and so is its result unless it is ``target``."""
        label = f"{self._stem}.{name or op_type}"
        target = target or f"{self._stem}.{(name or op_type).lower()}"
        node = helper.make_node(op_type, [self.last, *others], [target], label, **attributes)
        self.nodes.append(node)
        self.last = target
        return self

    def back_to(self, tensor: str) -> Chain:
        """Go on from another tensor."""
        self.last = tensor
        return self


def pair(
    source: str,
    target: str,
    stem: str,
    quantizer: Quantizer,
    parameters: tuple[str, str],
    constant: Constant,
) -> list[NodeProto]:
    """``QuantizeLinear`` and ``DequantizeLinear`` with scales and zero points of these names.

    The first saturates where the storage does; where fewer levels are in use, values are clipped
    before it, or integers after it when channels have bounds of their own.
    """
    chain = Chain(source, stem)
    where = {} if quantizer.axis is None else {"axis": quantizer.axis}
    levels = (quantizer.low, quantizer.high)
    if quantizer.is_narrow and quantizer.axis is None:
        # The bounds are whole levels, so they round to themselves.
        scale, zero = np.float32(quantizer.scales[0]), quantizer.zero_points[0]
        chain.then("Clip", *(constant(np.float32(end - zero) * scale) for end in levels))
    chain.then("QuantizeLinear", *parameters, name="Quantize", target=f"{stem}.q", **where)
    if quantizer.is_narrow and quantizer.axis is not None:
        element = parameters[1]
        chain.then("Cast", name="Wide", to=_INT32)
        chain.then("Clip", *(constant(end, np.int32) for end in levels))
        chain.then("CastLike", element, name="Narrow")
    return chain.then(
        "DequantizeLinear", *parameters, name="Dequantize", target=target, **where
    ).nodes


def dynamic_pair(
    source: str, target: str, stem: str, quantizer: Quantizer, constant: Constant
) -> list[NodeProto]:
    """A Q/DQ pair whose scale is found from the tensor: for each row of the last axis the largest
    magnitude over the highest level."""
    high = np.float32(quantizer.high)
    where = {"axis": -1, "block_size": quantizer.token_length}
    scale = f"{stem}.scale"
    return (
        Chain(source, stem)
        .then("Abs")
        .then("ReduceMax", constant([-1], np.int64), name="Largest", keepdims=1)
        .then("Max", constant(np.float32(LEAST_SCALE * quantizer.high)), name="Floor")
        .then("Div", constant(high), target=scale)
        .back_to(source)
        .then(
            "QuantizeLinear",
            scale,
            name="Quantize",
            target=f"{stem}.q",
            output_dtype=_INTEGERS[quantizer.dtype],
            **where,
        )
        .then("DequantizeLinear", scale, name="Dequantize", target=target, **where)
        .nodes
    )


def rounding(
    source: str, target: str, stem: str, quantizer: Quantizer, constant: Constant
) -> list[NodeProto]:
    """Rounding to bf16, fp16 or tf32, in float32 again. Raises `ValueError` for another type."""
    kind = quantizer.number
    if not isinstance(kind, FloatType) or kind.bits == 8:
        raise ValueError(f"{quantizer.dtype} is not bf16, fp16 or tf32")
    chain = Chain(source, stem)
    if quantizer.saturates:
        chain.then("Clip", constant(-kind.largest), constant(kind.largest))
    if kind.name in _CASTS:
        chain.then("Cast", name="Narrow", target=f"{stem}.q", to=_CASTS[kind.name])
        return chain.then("Cast", name=_WIDEN, target=target, to=_FLOAT).nodes
    return _tf32(chain, kind, stem, target, constant)


def _tf32(
    chain: Chain, kind: FloatType, stem: str, target: str, constant: Constant
) -> list[NodeProto]:
    """Round half to even after 10 bits of mantissa: Veltkamp's split (Dekker 1971), in float64.

    ``x + k - k`` rounds x to the last bit of k. With k = 2**42 * |x| that bit is the 11th of x, and
    k has no bits of its own near it, so halves go to the even neighbour. In float64 nothing
    overflows up to the largest float32, where the split in float32 gives NaN from 4e34 on. Below
    the smallest normal number k stops shrinking, and so does the step; k is bounded above too, so
    that infinities stay. What rounds to zero is a positive zero.
    """
    kept = kind.mantissa_bits + 1
    ends = (1.5 * 2.0**kind.least_exponent, float(np.finfo(np.float32).max))
    wide = f"{stem}.wide"
    factor = 2.0 ** (np.finfo(np.float64).nmant + 1 - kept)
    chain.then("Cast", name="Wide", to=_DOUBLE)
    shift = (
        Chain(wide, stem)
        .then("Abs")
        .then("Clip", *(constant(e, np.float64) for e in ends), name="Bound")
        .then("Mul", constant(factor, np.float64), name="Shift")
    )
    chain.nodes.extend(shift.nodes)
    return (
        chain.then("Add", shift.last)
        .then("Sub", shift.last)
        .then("Cast", name=_WIDEN, target=target, to=_FLOAT)
        .nodes
    )
