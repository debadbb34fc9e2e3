"""Q/DQ nodes and integer weights, made once per distinct quantizer of a tensor."""

from __future__ import annotations

from collections.abc import Iterator, Set
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnx import NodeProto, TensorProto, helper, numpy_helper

from qdist.model.weights import Weights
from qdist.plan.quantizer import Quantizer

_ONNX_TYPES = {4: TensorProto.INT4, 8: TensorProto.INT8, 16: TensorProto.INT16}
_NUMPY_TYPES = {8: np.int8, 16: np.int16}
_ENDS = ("q", "dq", "int", "scale", "zero_point")
_BLOCK_ELEMENTS = 1 << 22
"""Weight values that are quantized at a time; each takes some 20 bytes meanwhile."""


@dataclass(frozen=True, slots=True, kw_only=True)
class IntegerWeight:
    """A weight that is quantized when the model is written: integers of ``source``.

    The graph holds a tensor of this ``name`` with shape and type but no data.
    """

    name: str
    source: str
    quantizer: Quantizer

    def raw_blocks(self, weights: Weights) -> Iterator[bytes]:
        """The little-endian raw data of the integer tensor, piece by piece."""
        values = weights.read(self.source)
        for block, quantizer in _blocks(values, self.quantizer):
            yield pack(quantizer.quantize(block), quantizer.bits)


def _blocks(values: NDArray[Any], quantizer: Quantizer) -> Iterator[tuple[NDArray[Any], Quantizer]]:
    """Consecutive pieces of a tensor, each with its quantizer.

    All but the last have an even number of elements, so that 4-bit pairs do not straddle pieces.
    """
    if quantizer.axis is None:
        flat = values.reshape(-1)
        for i in range(0, max(1, flat.size), _BLOCK_ELEMENTS):
            yield flat[i : i + _BLOCK_ELEMENTS], quantizer
        return
    shape, axis = values.shape, quantizer.axis
    n_channels, n_inner = shape[axis], int(np.prod(shape[axis + 1 :], dtype=np.int64))
    cube = values.reshape(int(np.prod(shape[:axis], dtype=np.int64)), n_channels, n_inner)
    if len(cube) > 1:
        step, quantizer = _even_step(n_channels * n_inner), replace(quantizer, axis=1)
        for i in range(0, len(cube), step):
            yield cube[i : i + step], quantizer
        return
    step = _even_step(n_inner)
    for i in range(0, n_channels, step):
        part = slice(i, i + step)
        scales, zeros = quantizer.scales[part], quantizer.zero_points[part]
        yield cube[:, part], replace(quantizer, axis=1, scales=scales, zero_points=zeros)


def _even_step(n_elements: int) -> int:
    """How many slices of so many elements make a block."""
    return max(2, _BLOCK_ELEMENTS // max(1, n_elements) // 2 * 2)


def pack(integers: NDArray[np.int32], bits: int) -> bytes:
    """Raw data as ONNX lays it out; two 4-bit values a byte, the first in the low half."""
    if bits in _NUMPY_TYPES:
        return integers.astype(np.dtype(_NUMPY_TYPES[bits]).newbyteorder("<")).tobytes()
    nibbles = (integers.reshape(-1).astype(np.int8) & 0x0F).astype(np.uint8)
    if nibbles.size % 2:
        nibbles = np.append(nibbles, np.uint8(0))
    return (nibbles[0::2] | (nibbles[1::2] << 4)).tobytes()


class Pairs:
    """Collects what the quantized graph needs beside the layers themselves.

    `activation` and `weight` return the name of the dequantized tensor; asking twice for an equal
    quantizer gives the same one.
    """

    def __init__(self, weights: Weights, taken: Set[str]) -> None:
        """``taken``: tensor names that the graph has already."""
        self.weights = weights
        self._taken = taken
        self._made: dict[tuple[Any, ...], str] = {}
        self._stems: set[str] = set()
        self.nodes: dict[str, list[NodeProto]] = {}
        self.initializers: list[TensorProto] = []
        self.integer_weights: list[IntegerWeight] = []

    def activation(self, tensor: str, quantizer: Quantizer) -> str:
        """Name of the tensor after a Q/DQ pair on ``tensor``."""
        key = (tensor, quantizer.key)
        if key not in self._made:
            stem = self._stem(tensor, quantizer)
            scale, zero = self._parameters(stem, quantizer)
            axis = {} if quantizer.axis is None else {"axis": quantizer.axis}
            self.nodes[f"{stem}.dq"] = [
                helper.make_node(
                    "QuantizeLinear",
                    [tensor, scale, zero],
                    [f"{stem}.q"],
                    f"{stem}.Quantize",
                    **axis,
                ),
                helper.make_node(
                    "DequantizeLinear",
                    [f"{stem}.q", scale, zero],
                    [f"{stem}.dq"],
                    f"{stem}.Dequantize",
                    **axis,
                ),
            ]
            self._made[key] = f"{stem}.dq"
        return self._made[key]

    def weight(self, tensor: str, quantizer: Quantizer) -> str:
        """Name of the dequantized tensor of an integer weight."""
        key = (tensor, quantizer.key)
        if key not in self._made:
            stem = self._stem(tensor, quantizer)
            scale, zero = self._parameters(stem, quantizer)
            axis = {} if quantizer.axis is None else {"axis": quantizer.axis}
            name = f"{stem}.int"
            self.initializers.append(
                TensorProto(
                    name=name,
                    data_type=_ONNX_TYPES[quantizer.bits],
                    dims=self.weights.shape(tensor),
                )
            )
            self.integer_weights.append(
                IntegerWeight(name=name, source=tensor, quantizer=quantizer)
            )
            self.nodes[f"{stem}.dq"] = [
                helper.make_node(
                    "DequantizeLinear",
                    [name, scale, zero],
                    [f"{stem}.dq"],
                    f"{stem}.Dequantize",
                    **axis,
                )
            ]
            self._made[key] = f"{stem}.dq"
        return self._made[key]

    def _stem(self, tensor: str, quantizer: Quantizer) -> str:
        base = f"{tensor}.{quantizer.dtype}"
        stem, n = base, 0
        while stem in self._stems or any(f"{stem}.{end}" in self._taken for end in _ENDS):
            n += 1
            stem = f"{base}.{n}"
        self._stems.add(stem)
        return stem

    def _parameters(self, stem: str, quantizer: Quantizer) -> tuple[str, str]:
        scales = np.asarray(quantizer.scales, np.float32)
        zeros = np.asarray(quantizer.zero_points, np.int32)
        if quantizer.axis is None:
            scales, zeros = scales.reshape(()), zeros.reshape(())
        names = f"{stem}.scale", f"{stem}.zero_point"
        self.initializers.append(numpy_helper.from_array(scales, names[0]))
        self.initializers.append(
            TensorProto(
                name=names[1],
                data_type=_ONNX_TYPES[quantizer.bits],
                dims=zeros.shape,
                raw_data=pack(zeros, quantizer.bits),
            )
        )
        return names
