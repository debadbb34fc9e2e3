"""Writing a quantized graph to disk, one weight at a time.

Small models become one file. Large ones get an external-data file beside the graph, so that no
protobuf ever holds all weights.
"""

from __future__ import annotations

import errno
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from onnx import TensorProto, numpy_helper

from qdist.files import make_folder, unwritable
from qdist.model.rewrite import tensors
from qdist.model.weights import external_range, n_bytes_of
from qdist.simulate.assemble import QuantizedGraph
from qdist.simulate.pairs import IntegerWeight

INLINE_LIMIT_BYTES = 1 << 28
"""Weights beyond this go outside. Protobuf ends at 2 GiB, and what is inline is held in memory
twice while it is written, and twice more while it is checked and loaded."""
_KEEP_INLINE_BYTES = 1024
_ALIGNMENT = 4096
_BLOCK_BYTES = 1 << 24
_STRING = TensorProto.STRING


@dataclass(frozen=True, slots=True, kw_only=True)
class WrittenModel:
    """The files of a written model and their size in bytes together."""

    path: Path
    data_path: Path | None
    n_bytes: int


def write_model(graph: QuantizedGraph, path: Path, tag: str = "00000000") -> WrittenModel:
    """Write ``graph`` to ``path``, whole or not at all. Mutates ``graph.proto``.

    ``tag``: 8 hex digits that say what is in the file; part of the data file's name, so that a
    crash never leaves an old graph beside new weights. Data files of earlier tags go once the graph
    is in place. Raises QD204, QD603.
    """
    make_folder(path.parent)
    found = list(tensors(graph.proto))
    total = sum(n_bytes_of(tensor) for tensor in found)
    beside = path.with_name(f"{path.name}.{tag}.data")
    data_path = beside if total > INLINE_LIMIT_BYTES else None
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    data_partial = path.with_name(f".{path.name}.data.{os.getpid()}.partial")
    try:
        _refuse_folders(path, beside)
        if data_path is None:
            _fill_inline(graph, found)
        else:
            _fill_external(graph, found, data_partial, data_path.name)
        partial.write_bytes(graph.proto.SerializeToString())
        if data_path is not None:
            os.replace(data_partial, data_path)
        os.replace(partial, path)
        _remove_stale(path, data_path)
    except OSError as error:
        raise unwritable(
            path, error, f"room for {total / 1e6:.0f} MB in a folder that this user can write"
        ) from error
    finally:
        partial.unlink(missing_ok=True)
        data_partial.unlink(missing_ok=True)
    n_bytes = path.stat().st_size + (data_path.stat().st_size if data_path else 0)
    return WrittenModel(path=path, data_path=data_path, n_bytes=n_bytes)


@contextmanager
def staging(path: Path) -> Iterator[Path]:
    """A path of the same name in a hidden folder beside, which goes when the block ends."""
    make_folder(path.parent)
    aside = path.with_name(f".{path.name}.{os.getpid()}.checking")
    shutil.rmtree(aside, ignore_errors=True)
    try:
        yield aside / path.name
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def move_model(written: WrittenModel, path: Path) -> WrittenModel:
    """Move a written model to ``path``, its data first. Raises QD603."""
    data_path = None
    if written.data_path is not None:
        data_path = path.with_name(written.data_path.name)
    try:
        _refuse_folders(path, *([data_path] if data_path else []))
        if written.data_path is not None and data_path is not None:
            os.replace(written.data_path, data_path)
        os.replace(written.path, path)
        _remove_stale(path, data_path)
    except OSError as error:
        raise unwritable(path, error, "a file that this user can write") from error
    return replace(written, path=path, data_path=data_path)


def _remove_stale(path: Path, data_path: Path | None) -> None:
    own = re.compile(re.escape(path.name) + r"\.[0-9a-f]{8}\.data")
    for other in path.parent.iterdir():
        if own.fullmatch(other.name) and other != data_path and other.is_file():
            other.unlink(missing_ok=True)


def _refuse_folders(*paths: Path) -> None:
    # Found out now, not when one of the two files is already in place.
    for path in paths:
        if path.is_dir():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))


def _fill_inline(graph: QuantizedGraph, found: list[TensorProto]) -> None:
    pending = {weight.name: weight for weight in graph.integer_weights}
    for tensor in found:
        is_outside = tensor.data_location == TensorProto.EXTERNAL
        if is_outside or tensor.name in pending:
            tensor.raw_data = b"".join(_raw_blocks(graph, tensor, pending))
        if is_outside:
            del tensor.external_data[:]
            tensor.data_location = TensorProto.DEFAULT


def _fill_external(
    graph: QuantizedGraph, found: list[TensorProto], path: Path, location: str
) -> None:
    pending = {weight.name: weight for weight in graph.integer_weights}
    # Shape inference and the runtime read small tensors (shapes, axes) from the graph itself.
    small = [t for t in found if n_bytes_of(t) <= _KEEP_INLINE_BYTES or t.data_type == _STRING]
    _fill_inline(graph, small)
    inline = {id(tensor) for tensor in small}
    with path.open("wb") as file:
        for tensor in found:
            if id(tensor) in inline:
                continue
            offset = -(-file.tell() // _ALIGNMENT) * _ALIGNMENT
            file.seek(offset)
            for block in _raw_blocks(graph, tensor, pending):
                file.write(block)
            _mark_external(tensor, location, offset, file.tell() - offset)


def _raw_blocks(
    graph: QuantizedGraph, tensor: TensorProto, pending: dict[str, IntegerWeight]
) -> Iterator[bytes]:
    if tensor.name in pending:
        yield from pending[tensor.name].raw_blocks(graph.weights)
        return
    place = external_range(tensor, graph.data_folder)
    if place is None:
        yield tensor.raw_data or numpy_helper.from_array(numpy_helper.to_array(tensor)).raw_data
        return
    with place.path.open("rb") as source:
        source.seek(place.offset)
        left = place.n_bytes
        while left and (block := source.read(min(left, _BLOCK_BYTES))):
            yield block
            left -= len(block)


def _mark_external(tensor: TensorProto, location: str, offset: int, n_bytes: int) -> None:
    name, data_type, dims = tensor.name, tensor.data_type, list(tensor.dims)
    tensor.Clear()
    tensor.name, tensor.data_type = name, data_type
    tensor.dims.extend(dims)
    tensor.data_location = TensorProto.EXTERNAL
    for key, value in (("location", location), ("offset", offset), ("length", n_bytes)):
        tensor.external_data.add(key=key, value=str(value))
