"""Writing a quantized graph to disk, one weight at a time.

Small models become one file. Large ones, and those whose source was external, get an external-data
file beside the graph, so that no protobuf ever holds all weights.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from onnx import TensorProto

from qdist.errors import ArtifactError
from qdist.files import make_folder
from qdist.model.weights import external_range, n_bytes_of
from qdist.simulate.assemble import QuantizedGraph

INLINE_LIMIT_BYTES = 1 << 30
"""Weights beyond this go outside; protobuf itself ends at 2 GiB."""
_KEEP_INLINE_BYTES = 1024
_ALIGNMENT = 4096
_BLOCK_BYTES = 1 << 24


@dataclass(frozen=True, slots=True, kw_only=True)
class WrittenModel:
    """The files of a written model and their size in bytes together."""

    path: Path
    data_path: Path | None
    n_bytes: int


def write_model(graph: QuantizedGraph, path: Path) -> WrittenModel:
    """Write ``graph`` to ``path``, whole or not at all. Mutates ``graph.proto``. Raises QD603."""
    make_folder(path.parent)
    tensors = list(graph.proto.graph.initializer)
    total = sum(n_bytes_of(tensor) for tensor in tensors)
    data_path = path.with_name(path.name + ".data") if total > INLINE_LIMIT_BYTES else None
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    data_partial = path.with_name(f".{path.name}.data.{os.getpid()}.partial")
    try:
        if data_path is None:
            _fill_inline(graph, tensors)
        else:
            with data_partial.open("wb") as file:
                _fill_external(graph, tensors, file, data_path.name)
        partial.write_bytes(graph.proto.SerializeToString())
        if data_path is not None:
            os.replace(data_partial, data_path)
        else:
            path.with_name(path.name + ".data").unlink(missing_ok=True)
        os.replace(partial, path)
    except OSError as error:
        raise ArtifactError(
            "QD603",
            where=str(path),
            got=error.strerror or str(error),
            expected=f"room for {total / 1e6:.0f} MB in a folder that this user can write",
            mend="free some space or choose another folder with output.folder=PATH",
        ) from error
    finally:
        partial.unlink(missing_ok=True)
        data_partial.unlink(missing_ok=True)
    n_bytes = path.stat().st_size + (data_path.stat().st_size if data_path else 0)
    return WrittenModel(path=path, data_path=data_path, n_bytes=n_bytes)


def _fill_inline(graph: QuantizedGraph, tensors: list[TensorProto]) -> None:
    pending = {weight.name: weight for weight in graph.integer_weights}
    for tensor in tensors:
        if tensor.name in pending:
            tensor.raw_data = pending[tensor.name].raw_bytes(graph.weights)
            continue
        place = external_range(tensor, graph.data_folder)
        if place is not None:
            with place.path.open("rb") as source:
                source.seek(place.offset)
                tensor.raw_data = source.read(place.n_bytes)
            _mark_inline(tensor)


def _fill_external(
    graph: QuantizedGraph, tensors: list[TensorProto], file: BinaryIO, location: str
) -> None:
    pending = {weight.name: weight for weight in graph.integer_weights}
    for tensor in tensors:
        n_bytes = n_bytes_of(tensor)
        if n_bytes <= _KEEP_INLINE_BYTES and tensor.name not in pending:
            place = external_range(tensor, graph.data_folder)
            if place is not None:
                with place.path.open("rb") as source:
                    source.seek(place.offset)
                    tensor.raw_data = source.read(place.n_bytes)
                _mark_inline(tensor)
            continue
        offset = -(-file.tell() // _ALIGNMENT) * _ALIGNMENT
        file.seek(offset)
        if tensor.name in pending:
            file.write(pending[tensor.name].raw_bytes(graph.weights))
        else:
            _copy(tensor, graph.data_folder, file)
        _mark_external(tensor, location, offset, n_bytes)


def _copy(tensor: TensorProto, folder: Path, file: BinaryIO) -> None:
    place = external_range(tensor, folder)
    if place is None:
        from onnx import numpy_helper

        file.write(tensor.raw_data or numpy_helper.to_array(tensor).tobytes())
        return
    with place.path.open("rb") as source:
        source.seek(place.offset)
        left = place.n_bytes
        while left:
            block = source.read(min(left, _BLOCK_BYTES))
            file.write(block)
            left -= len(block)


def _mark_inline(tensor: TensorProto) -> None:
    del tensor.external_data[:]
    tensor.data_location = TensorProto.DEFAULT


def _mark_external(tensor: TensorProto, location: str, offset: int, n_bytes: int) -> None:
    name, data_type, dims = tensor.name, tensor.data_type, list(tensor.dims)
    tensor.Clear()
    tensor.name, tensor.data_type = name, data_type
    tensor.dims.extend(dims)
    tensor.data_location = TensorProto.EXTERNAL
    for key, value in (("location", location), ("offset", offset), ("length", n_bytes)):
        tensor.external_data.add(key=key, value=str(value))
