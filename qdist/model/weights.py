"""One weight at a time, whether it lies in the graph or in an external file."""

from __future__ import annotations

import mmap
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from qdist.errors import ModelError


@dataclass(frozen=True, slots=True, kw_only=True)
class ExternalRange:
    """Where an external weight lies: bytes ``offset .. offset + n_bytes`` of ``path``."""

    path: Path
    offset: int
    n_bytes: int


def n_bytes_of(tensor: TensorProto) -> int:
    """Size in bytes of the tensor's raw data, from its shape and type alone."""
    n_elements = int(np.prod(tensor.dims, dtype=np.int64)) if tensor.dims else 1
    return -(-n_elements * _bits(tensor.data_type) // 8)


def external_range(tensor: TensorProto, folder: Path | None) -> ExternalRange | None:
    """Where ``tensor`` lies outside the graph, or None. Raises QD204."""
    if tensor.data_location != TensorProto.EXTERNAL:
        return None
    fields = {entry.key: entry.value for entry in tensor.external_data}
    location = fields.get("location", "")
    path = (folder or Path()) / location
    offset = int(fields.get("offset", "0"))
    n_bytes = int(fields.get("length", str(n_bytes_of(tensor))))
    if not path.is_file():
        raise ModelError(
            "QD204",
            where=f"weight {tensor.name}",
            got=f"no file {path}",
            expected="the external-data file beside the model",
            mend="copy the file named in the model to the model's folder",
        )
    size = path.stat().st_size
    if n_bytes < n_bytes_of(tensor) or offset + n_bytes > size:
        raise ModelError(
            "QD204",
            where=f"weight {tensor.name} in {path}",
            got=f"{size} bytes in the file, {n_bytes} for the weight at offset {offset}",
            expected=f"{n_bytes_of(tensor)} bytes at offset {offset}",
            mend="copy or export the model's data file again; it is truncated",
        )
    return ExternalRange(path=path, offset=offset, n_bytes=n_bytes_of(tensor))


class Weights:
    """The initializers of one graph, read on demand. Not for sharing between threads.

    External weights come as read-only views of a memory map, so that a weight costs memory only
    while it is used.
    """

    def __init__(self, tensors: Iterable[TensorProto], folder: Path | None) -> None:
        self._tensors = {tensor.name: tensor for tensor in tensors}
        self._folder = folder
        self._maps: dict[Path, mmap.mmap] = {}

    def __contains__(self, name: object) -> bool:
        return name in self._tensors

    def names(self) -> list[str]:
        """Names of all initializers, in graph order."""
        return list(self._tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of one initializer."""
        return tuple(self._tensors[name].dims)

    def n_bytes(self, name: str) -> int:
        """Size of one initializer in bytes."""
        return n_bytes_of(self._tensors[name])

    def data_type(self, name: str) -> int:
        """ONNX element type of one initializer."""
        return int(self._tensors[name].data_type)

    def read(self, name: str) -> NDArray[Any]:
        """The array of one initializer, in its own dtype; read-only where it is external."""
        tensor = self._tensors[name]
        place = external_range(tensor, self._folder)
        if place is None:
            return np.asarray(numpy_helper.to_array(tensor))
        if place.n_bytes == 0:
            return np.zeros(tuple(tensor.dims), _numpy_dtype(tensor.data_type))
        if place.path not in self._maps:
            with place.path.open("rb") as file:
                self._maps[place.path] = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        if _bits(tensor.data_type) < 8:
            raw = self._maps[place.path][place.offset : place.offset + place.n_bytes]
            inline = TensorProto(
                name=name, dims=list(tensor.dims), data_type=tensor.data_type, raw_data=raw
            )
            return np.asarray(numpy_helper.to_array(inline))
        dtype = _numpy_dtype(tensor.data_type)
        n_elements = int(np.prod(tensor.dims, dtype=np.int64)) if tensor.dims else 1
        flat = np.frombuffer(
            self._maps[place.path], dtype=dtype, count=n_elements, offset=place.offset
        )
        return flat.reshape(tuple(tensor.dims))

    def read_float32(self, name: str) -> NDArray[np.float32]:
        """The array of one float initializer as float32."""
        return np.asarray(self.read(name)).astype(np.float32, copy=False)


def _numpy_dtype(data_type: int) -> np.dtype[Any]:
    if data_type == TensorProto.BFLOAT16:
        return np.dtype(ml_dtypes.bfloat16)
    return np.dtype(helper.tensor_dtype_to_np_dtype(data_type))


_SUB_BYTE = {
    getattr(TensorProto, name, None): bits
    for name, bits in {"INT4": 4, "UINT4": 4, "FLOAT4E2M1": 4, "INT2": 2, "UINT2": 2}.items()
}


def _bits(data_type: int) -> int:
    """Bits per element of an ONNX element type."""
    if data_type in _SUB_BYTE:
        return _SUB_BYTE[data_type]
    return int(onnx.helper.tensor_dtype_to_np_dtype(data_type).itemsize) * 8
