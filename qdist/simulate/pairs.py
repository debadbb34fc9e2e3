"""Q/DQ nodes and stored weights, made once per distinct quantizer of a tensor."""

from __future__ import annotations

from collections.abc import Iterator, Set
from dataclasses import dataclass, replace
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray
from onnx import NodeProto, TensorProto, helper, numpy_helper

from qdist.model.weights import Weights
from qdist.plan.quantizer import Quantizer
from qdist.simulate.nodes import dynamic_pair, pair, rounding

ONNX_TYPES = {
    "int4": TensorProto.INT4,
    "uint4": TensorProto.UINT4,
    "int8": TensorProto.INT8,
    "uint8": TensorProto.UINT8,
    "int16": TensorProto.INT16,
    "uint16": TensorProto.UINT16,
    "fp8_e4m3": TensorProto.FLOAT8E4M3FN,
    "fp8_e5m2": TensorProto.FLOAT8E5M2,
    "fp16": TensorProto.FLOAT16,
    "bf16": TensorProto.BFLOAT16,
    "tf32": TensorProto.FLOAT,
}
"""How each number type lies in a file."""
_NUMPY_TYPES: dict[str, Any] = {
    "int8": np.int8,
    "uint8": np.uint8,
    "int16": np.int16,
    "uint16": np.uint16,
    "fp8_e4m3": ml_dtypes.float8_e4m3fn,
    "fp8_e5m2": ml_dtypes.float8_e5m2,
    "fp16": np.float16,
    "bf16": ml_dtypes.bfloat16,
    "tf32": np.float32,
}
_ENDS = (
    *("q", "dq", "int", "rounded", "scale", "zero_point", "narrow", "wide", "clip"),
    *("abs", "largest", "floor", "bound", "shift", "add", "sub"),
)
"""What names made of a stem end in."""
_BLOCK_ELEMENTS = 1 << 22
"""Weight values that are quantized at a time; each takes some 20 bytes meanwhile."""


@dataclass(frozen=True, slots=True, kw_only=True)
class IntegerWeight:
    """A weight that is quantized when the model is written: stored numbers of ``source``.

    The graph holds a tensor of this ``name`` with shape and type but no data.
    """

    name: str
    source: str
    quantizer: Quantizer

    def raw_blocks(self, weights: Weights) -> Iterator[bytes]:
        """The little-endian raw data of the stored tensor, piece by piece."""
        values = weights.read(self.source)
        for block, quantizer in _blocks(values, self.quantizer):
            yield pack(quantizer.quantize(block), quantizer.dtype)


def _blocks(values: NDArray[Any], quantizer: Quantizer) -> Iterator[tuple[NDArray[Any], Quantizer]]:
    """Consecutive pieces of a tensor, each with its quantizer.

    All but the last have an even number of elements, so that 4-bit pairs do not straddle pieces.
    """
    if quantizer.blocks is not None:
        yield from _blocks_of_blocks(values, quantizer)
        return
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


def _blocks_of_blocks(
    values: NDArray[Any], quantizer: Quantizer
) -> Iterator[tuple[NDArray[Any], Quantizer]]:
    """Pieces along the first axis that end where blocks do."""
    blocks = quantizer.blocks
    if blocks is None:
        return
    n_rows, n_inner = values.shape[0], int(np.prod(values.shape[1:], dtype=np.int64))
    unit = blocks.size if blocks.axis == 0 else 1
    step = _even_step(n_inner * unit) * unit
    for i in range(0, n_rows, step):
        part = values[i : i + step]
        scales = blocks.values[i // unit : -(-(i + len(part)) // unit)]
        found = replace(
            blocks, shape=tuple(scales.shape), raw=np.ascontiguousarray(scales).tobytes()
        )
        yield part, replace(quantizer, blocks=found)


def _even_step(n_elements: int) -> int:
    """How many slices of so many elements make a block."""
    return max(2, _BLOCK_ELEMENTS // max(1, n_elements) // 2 * 2)


def pack(stored: NDArray[Any], dtype: str) -> bytes:
    """Raw data as ONNX lays it out; two 4-bit values a byte, the first in the low half. Values of a
    floating-point type are on its grid already."""
    if dtype in _NUMPY_TYPES:
        narrow = stored.astype(_NUMPY_TYPES[dtype])
        return narrow.astype(narrow.dtype.newbyteorder("<")).tobytes()
    nibbles = (stored.reshape(-1).astype(np.int8) & 0x0F).astype(np.uint8)
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
        self._constants: dict[tuple[Any, ...], str] = {}
        self.nodes: dict[str, list[NodeProto]] = {}
        self.initializers: list[TensorProto] = []
        self.integer_weights: list[IntegerWeight] = []

    def activation(self, tensor: str, quantizer: Quantizer) -> str:
        """Name of the tensor after a Q/DQ pair, or a rounding, on ``tensor``."""
        key = (tensor, quantizer.key)
        if key not in self._made:
            stem = self._stem(tensor, quantizer)
            self._made[key] = f"{stem}.dq"
            self.nodes[f"{stem}.dq"] = self.written(tensor, f"{stem}.dq", stem, quantizer)
        return self._made[key]

    def result(self, source: str, target: str, quantizer: Quantizer) -> list[NodeProto]:
        """The nodes that store a layer's result ``source`` under the name ``target``."""
        return self.written(source, target, self._stem(target, quantizer), quantizer)

    def written(self, source: str, target: str, stem: str, quantizer: Quantizer) -> list[NodeProto]:
        """The nodes that make ``target``, the values of ``source`` as they are after storing."""
        if quantizer.is_dynamic:
            return dynamic_pair(source, target, stem, quantizer, self.constant)
        if quantizer.is_float and quantizer.bits > 8:
            return rounding(source, target, stem, quantizer, self.constant)
        return pair(
            source, target, stem, quantizer, self._parameters(stem, quantizer), self.constant
        )

    def weight(
        self, tensor: str, quantizer: Quantizer, shape: tuple[int, ...] | None = None
    ) -> str:
        """Name of the dequantized tensor of a stored weight. ``shape``: in which it is stored, with
        one scale for all of it; None: its own."""
        key = (tensor, quantizer.key, shape)
        if key not in self._made:
            name, stem = self._stored(tensor, quantizer, shape)
            # tf32 has no type of its own in a file: what is stored is float32 already.
            target = name if quantizer.dtype == "tf32" else f"{stem}.dq"
            self.nodes[target] = self._restored(name, target, stem, quantizer)
            self._made[key] = target
        return self._made[key]

    def stored(
        self, tensor: str, quantizer: Quantizer, shape: tuple[int, ...] | None = None
    ) -> str:
        """Name of the stored numbers themselves; asking twice gives the same. ``shape`` as for
        `weight`."""
        key = ("stored", tensor, quantizer.key, shape)
        if key not in self._made:
            self._made[key] = self._stored(tensor, quantizer, shape)[0]
        return self._made[key]

    def _stored(
        self, tensor: str, quantizer: Quantizer, shape: tuple[int, ...] | None
    ) -> tuple[str, str]:
        stem = self._stem(tensor, quantizer)
        name = f"{stem}.int" if not quantizer.is_float else f"{stem}.rounded"
        self.initializers.append(
            TensorProto(
                name=name,
                data_type=ONNX_TYPES[quantizer.dtype],
                dims=self.weights.shape(tensor) if shape is None else shape,
            )
        )
        self.integer_weights.append(IntegerWeight(name=name, source=tensor, quantizer=quantizer))
        return name, stem

    def _restored(self, name: str, target: str, stem: str, quantizer: Quantizer) -> list[NodeProto]:
        if quantizer.dtype == "tf32":
            return []
        if quantizer.is_float and quantizer.bits > 8:
            cast = helper.make_node("Cast", [name], [target], f"{stem}.Cast", to=TensorProto.FLOAT)
            return [cast]
        scale, zero = self._parameters(stem, quantizer)
        where: dict[str, int] = {}
        if quantizer.blocks is not None:
            where = {"axis": quantizer.blocks.axis, "block_size": quantizer.blocks.size}
        elif quantizer.axis is not None:
            where = {"axis": quantizer.axis}
        return [
            helper.make_node(
                "DequantizeLinear",
                [name, scale, zero],
                [target],
                f"{stem}.Dequantize",
                **where,
            )
        ]

    def constant(self, value: Any, dtype: Any = np.float32) -> str:
        """Name of an initializer that holds a number or a list; equal ones share it."""
        array = np.asarray(value, dtype)
        key = (array.dtype.str, array.shape, array.tobytes())
        if key not in self._constants:
            name = self.free(f"qdist.{array.dtype.name}.{len(self._constants)}")
            self.initializers.append(numpy_helper.from_array(array, name))
            self._constants[key] = name
        return self._constants[key]

    def free(self, base: str) -> str:
        """``base``, or a name like it that no tensor has; taken from now on."""
        name, n = base, 0
        while name in self._taken or name in self._stems:
            n += 1
            name = f"{base}.{n}"
        self._stems.add(name)
        return name

    def _stem(self, tensor: str, quantizer: Quantizer) -> str:
        base = f"{tensor}.{quantizer.dtype}"
        stem, n = base, 0
        while stem in self._stems or any(f"{stem}.{end}" in self._taken for end in _ENDS):
            n += 1
            stem = f"{base}.{n}"
        self._stems.add(stem)
        return stem

    def _parameters(self, stem: str, quantizer: Quantizer) -> tuple[str, str]:
        scales: NDArray[np.float32] = np.asarray(quantizer.scales, np.float32)
        zeros = np.asarray(quantizer.zero_points, np.int32)
        if quantizer.blocks is not None:
            scales = quantizer.blocks.values
            zeros = np.full(scales.shape, quantizer.zero_points[0], np.int32)
        elif quantizer.axis is None:
            scales, zeros = scales.reshape(()), zeros.reshape(())
        names = f"{stem}.scale", f"{stem}.zero_point"
        self.initializers.append(numpy_helper.from_array(scales, names[0]))
        self.initializers.append(
            TensorProto(
                name=names[1],
                data_type=ONNX_TYPES[quantizer.dtype],
                dims=zeros.shape,
                raw_data=pack(zeros, quantizer.dtype),
            )
        )
        return names
