"""The arrays of a `Container` straight into chunks, and from them.

What Zarr does for such an array, with known work skipped: there is one codec pipeline, all is in
memory, and an array is written or read whole. Zarr's way through tasks and threads takes longer
than coding. `encoded` writes what Zarr would, byte for byte; what looks otherwise when read is
left to Zarr.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from numcodecs import blosc
from numcodecs.checksum32 import CRC32C
from numpy.typing import NDArray

BLOCK_BYTES = 1 << 20
"""What Blosc compresses at a time. In blocks of its own choice, level 3 makes records no smaller
and takes longer both ways."""

_CRC_BYTES = 4
_BLOSC_HEADER_BYTES = 16
_DTYPES = {name: np.dtype(name).newbyteorder("<") for name in ("int64", "uint64", "float32")}
_KEYS = {"name": "default", "configuration": {"separator": "/"}}
_BYTES = {"name": "bytes", "configuration": {"endian": "little"}}


def decoded(name: str, members: Mapping[str, bytes]) -> NDArray[Any] | None:
    """The array ``name``; None where only Zarr knows.

    Raises `KeyError`, `TypeError` or `ValueError` for a damaged one, `RuntimeError` where Blosc
    does.
    """
    about = json.loads(members[f"{name}/zarr.json"])
    shape, chunk = _shapes(about)
    dtype = _DTYPES.get(about["data_type"])
    if dtype is None or chunk is None or not _is_ours(about):
        return None
    n_chunks = math.ceil(shape[0] / chunk[0]) if math.prod(shape) else 0
    keys = [f"{name}/c/{'/'.join(map(str, (i, *[0] * (len(shape) - 1))))}" for i in range(n_chunks)]
    if not all(key in members for key in keys):
        return None
    array = np.empty(shape, dtype)
    for index, key in enumerate(keys):
        rows = array[index * chunk[0] : (index + 1) * chunk[0]]
        if rows.shape == chunk:
            _decode(members[key], rows)
        else:
            # The last chunk is stored whole, whatever it holds of the array.
            whole = np.empty(chunk, dtype)
            _decode(members[key], whole)
            rows[...] = whole[: len(rows)]
    return array


def encoded(name: str, values: NDArray[Any], n_items: int) -> Iterator[tuple[str, bytes]]:
    """The members of a group that make the array ``name``: its metadata, then its chunks.

    ``values``: of an integer or float dtype, at least one axis. A chunk is whole rows, as many as
    hold ``n_items`` at most, but one at least; the last one is filled up with the fill value.
    """
    dtype = values.dtype.newbyteorder("<")
    row = max(1, math.prod(values.shape[1:]))
    chunk = (max(1, min(values.shape[0], n_items // row)), *(max(1, n) for n in values.shape[1:]))
    # No array holds its own: a missing chunk cannot pass for data.
    fill = np.nan if dtype.kind == "f" else np.array(-1).astype(dtype)
    yield f"{name}/zarr.json", _metadata(values.shape, chunk, dtype, fill)
    ending = "/0" * (values.ndim - 1)
    for index, start in enumerate(range(0, values.shape[0] if values.size else 0, chunk[0])):
        rows = np.ascontiguousarray(values[start : start + chunk[0]], dtype)
        if rows.shape != chunk:
            whole = np.full(chunk, fill, dtype)
            whole[: len(rows)] = rows
            rows = whole
        held = blosc.compress(rows, b"zstd", clevel=1, shuffle=blosc.SHUFFLE, blocksize=BLOCK_BYTES)
        crc = CRC32C.checksum(held).to_bytes(_CRC_BYTES, "little")
        yield f"{name}/c/{index}{ending}", held + crc


def _metadata(
    shape: tuple[int, ...], chunk: tuple[int, ...], dtype: np.dtype[Any], fill: Any
) -> bytes:
    about = {
        "shape": shape,
        "data_type": dtype.name,
        "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": chunk}},
        "chunk_key_encoding": _KEYS,
        "fill_value": "NaN" if dtype.kind == "f" else int(fill),
        "codecs": [
            _BYTES if dtype.itemsize > 1 else {"name": "bytes"},
            {
                "name": "blosc",
                "configuration": {
                    "typesize": dtype.itemsize,
                    "cname": "zstd",
                    "clevel": 1,
                    "shuffle": "shuffle",
                    "blocksize": BLOCK_BYTES,
                },
            },
            {"name": "crc32c"},
        ],
        "attributes": {},
        "zarr_format": 3,
        "node_type": "array",
        "storage_transformers": [],
    }
    return json.dumps(about, indent=2).encode()


def _shapes(about: Mapping[str, Any]) -> tuple[tuple[int, ...], tuple[int, ...] | None]:
    """Shape of the array, and of its chunks where they are whole rows."""
    shape = tuple(int(n) for n in about["shape"])
    grid = about["chunk_grid"]
    if grid["name"] != "regular" or not shape:
        return shape, None
    chunk = tuple(int(n) for n in grid["configuration"]["chunk_shape"])
    is_rows = chunk[0] > 0 and chunk[1:] == tuple(max(1, n) for n in shape[1:])
    return shape, chunk if is_rows else None


def _is_ours(about: Mapping[str, Any]) -> bool:
    codecs = about["codecs"]
    names = [codec["name"] for codec in codecs]
    return (
        about["zarr_format"] == 3
        and about["chunk_key_encoding"] == _KEYS
        and names == ["bytes", "blosc", "crc32c"]
        and codecs[0] == _BYTES
        and not about.get("storage_transformers")
    )


def _decode(stored: bytes, into: NDArray[Any]) -> None:
    """Decompress one chunk into an array of its very size."""
    held = stored[:-_CRC_BYTES]
    told = int.from_bytes(stored[-_CRC_BYTES:], "little")
    if len(held) < _BLOSC_HEADER_BYTES or CRC32C.checksum(held) != told:
        raise ValueError("a chunk of another checksum")
    if int.from_bytes(held[4:8], "little") != into.nbytes:
        raise ValueError("a chunk of another size")
    blosc.decompress(held, into)
