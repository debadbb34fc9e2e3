"""A Zarr v3 group in one object: arrays with their attributes, and JSON documents beside them.

The object is a ZIP archive of the group's keys, so that writing a record takes one request and
leaves nothing half-written, and ``zarr.open_group(zarr.storage.ZipStore(path, mode="r"))`` reads
it. The archive itself does not compress: each chunk is compressed by its Zarr codecs and carries a
CRC-32C. Equal contents give equal bytes.
"""

from __future__ import annotations

import hashlib
import io
import json
import zipfile
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, cast

import numpy as np
import zarr
from numpy.typing import NDArray
from zarr.core.buffer import default_buffer_prototype
from zarr.storage import MemoryStore

from qdist.store import chunks

CHUNK_ITEMS = 1 << 24
"""Items of one chunk, at most: the codecs take less than 2 GiB at a time."""

UNREADABLE = (
    ArithmeticError,
    AttributeError,
    EOFError,
    LookupError,
    MemoryError,
    NotImplementedError,
    OSError,
    RuntimeError,
    TypeError,
    ValueError,
    zipfile.BadZipFile,
    zlib.error,
)
"""What ZIP, Zarr, its codecs and our own parsing raise on damaged bytes."""

_DOCUMENTS = "documents/"
_EPOCH = (1980, 1, 1, 0, 0, 0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Container:
    """``arrays``: numeric arrays by name. ``attributes``: the group's, small. ``documents``: JSON
    values by name, of any size. ``encoded``: members of the object that hold further arrays."""

    arrays: Mapping[str, NDArray[Any]]
    attributes: Mapping[str, Any]
    documents: Mapping[str, Any] = field(default_factory=dict)
    encoded: Mapping[str, bytes] = field(default_factory=dict)

    def pack(self) -> bytes:
        """The bytes of the object."""
        about = {"attributes": self.attributes, "zarr_format": 3, "node_type": "group"}
        members = {"zarr.json": json.dumps(about, indent=2, allow_nan=False).encode()}
        members.update(self.encoded)
        for name, values in self.arrays.items():
            members.update(chunks.encoded(name, values, CHUNK_ITEMS))
        packed = io.BytesIO()
        with zipfile.ZipFile(packed, "w", zipfile.ZIP_STORED) as archive:
            for key in sorted(members):
                archive.writestr(zipfile.ZipInfo(key, _EPOCH), members[key])
            for name, value in sorted(self.documents.items()):
                info = zipfile.ZipInfo(f"{_DOCUMENTS}{name}.json", _EPOCH)
                info.compress_type = zipfile.ZIP_DEFLATED
                archive.writestr(info, json.dumps(value, allow_nan=False))
        return packed.getvalue()

    @classmethod
    def unpack(cls, data: bytes) -> Container:
        """From `pack`, with each array both as an array and as it is encoded. Raises one of
        `UNREADABLE`."""
        members: dict[str, bytes] = {}
        documents = {}
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            for key in archive.namelist():
                content = archive.read(key)
                if key.startswith(_DOCUMENTS):
                    documents[key[len(_DOCUMENTS) :].removesuffix(".json")] = json.loads(content)
                else:
                    members[key] = content
        names = sorted({key.partition("/")[0] for key in members if "/" in key})
        arrays = {name: chunks.decoded(name, members) for name in names}
        group = json.loads(members["zarr.json"])
        if group["zarr_format"] != 3 or group["node_type"] != "group":
            raise ValueError("no group of Zarr")
        return cls(
            arrays={
                name: _by_zarr(name, members) if array is None else array
                for name, array in arrays.items()
            },
            attributes=dict(group["attributes"]),
            documents=documents,
            encoded={key: content for key, content in members.items() if "/" in key},
        )


def checksum(data: bytes) -> str:
    """Hex SHA-256 of the bytes of an object."""
    return hashlib.sha256(data).hexdigest()


def _by_zarr(name: str, members: Mapping[str, bytes]) -> NDArray[Any]:
    """The array ``name``, as Zarr reads it."""
    new = default_buffer_prototype().buffer.from_bytes
    held = {key: new(content) for key, content in members.items()}
    group = zarr.open_group(MemoryStore(held, read_only=True), mode="r")
    return np.asarray(cast(zarr.Array[Any], group[name])[...])
