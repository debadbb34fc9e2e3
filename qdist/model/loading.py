"""Reading an ONNX file without pulling its weights into one protobuf."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import onnx
from google.protobuf.message import DecodeError

from qdist.digest import digest_bytes
from qdist.errors import ModelError
from qdist.model.rewrite import tensors
from qdist.model.weights import ExternalRange, external_range

_BLOCK_BYTES = 1 << 24


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelFile:
    """A model as the user gave it.

    ``graph_bytes`` is the serialized ``ModelProto`` with external data left outside; ``digest``
    is SHA-256 over it and over every external byte it refers to, so one changed weight byte is
    another model. ``range_digests``: SHA-256 of each external range.
    """

    path: Path
    graph_bytes: bytes
    digest: str
    n_bytes: int
    range_digests: Mapping[ExternalRange, str]

    @property
    def folder(self) -> Path:
        """The folder that external data is relative to."""
        return self.path.parent

    def proto(self) -> onnx.ModelProto:
        """A fresh copy of the graph, external data not loaded."""
        return onnx.ModelProto.FromString(self.graph_bytes)


def load_model(
    path: str | Path, *, on_progress: Callable[[int, int], None] | None = None
) -> ModelFile:
    """Read and fingerprint a model. ``on_progress(done, total)`` counts bytes hashed.

    Raises `ModelError`: QD201 not found, QD202 not ONNX, QD203 damaged, QD204 external data
    missing or short.
    """
    path = Path(path).expanduser().absolute()
    graph_bytes = _read(path)
    proto = _parse(path, graph_bytes)
    ranges = external_ranges(proto, path.parent)
    total = len(graph_bytes) + sum(place.n_bytes for place in ranges)
    done = len(graph_bytes)
    digests: dict[ExternalRange, str] = {}
    for place in ranges:
        h = hashlib.sha256()
        for block in _blocks(place):
            h.update(block)
            done += len(block)
            if on_progress is not None:
                on_progress(done, total)
        digests[place] = h.hexdigest()
    return ModelFile(
        path=path,
        graph_bytes=graph_bytes,
        digest=combined_digest(graph_bytes, digests.values()),
        n_bytes=total,
        range_digests=digests,
    )


def read_graph(path: Path) -> onnx.ModelProto:
    """The graph of a model file; external data is neither looked for nor read.

    Raises `ModelError`: QD201, QD202, QD203.
    """
    return _parse(path, _read(path))


def combined_digest(graph_bytes: bytes, range_digests: Iterable[str]) -> str:
    """Hex SHA-256 of a graph and, in the order that it names them, its external ranges."""
    return digest_bytes(graph_bytes, *(entry.encode() for entry in range_digests))


def external_ranges(model: onnx.ModelProto, folder: Path) -> list[ExternalRange]:
    """Where the model's external tensors lie, each range once. Raises QD204."""
    places = (external_range(tensor, folder) for tensor in tensors(model))
    return list(dict.fromkeys(place for place in places if place is not None))


def _blocks(place: ExternalRange) -> Iterator[bytes]:
    with place.path.open("rb") as file:
        file.seek(place.offset)
        left = place.n_bytes
        while left and (block := file.read(min(left, _BLOCK_BYTES))):
            yield block
            left -= len(block)


def _read(path: Path) -> bytes:
    if not path.is_file():
        kind = "a folder" if path.is_dir() else "nothing there"
        raise ModelError(
            "QD201",
            where=str(path),
            got=kind,
            expected="an ONNX file",
            mend="give the path of the .onnx file with model.path=FILE",
        )
    try:
        return path.read_bytes()
    except OSError as error:
        raise ModelError(
            "QD201",
            where=str(path),
            got=error.strerror or str(error),
            expected="an ONNX file that this user can read",
            mend="change its permissions, or copy it to another place",
        ) from error


def _parse(path: Path, data: bytes) -> onnx.ModelProto:
    try:
        proto = onnx.ModelProto.FromString(data)
    except DecodeError as error:
        raise _not_a_model(path, data) from error
    # Protobuf accepts many byte strings that are no model at all, so look for a graph.
    if not proto.graph.node or not proto.opset_import or proto.ir_version == 0:
        raise _not_a_model(path, data)
    return proto


def _not_a_model(path: Path, data: bytes) -> ModelError:
    if not data:
        return ModelError(
            "QD202",
            where=str(path),
            got="an empty file",
            expected="an ONNX model",
            mend="export the model again",
        )
    if _looks_like_text(data[:4096]):
        return ModelError(
            "QD202",
            where=str(path),
            got=f"a text file that begins {data[:30].decode('utf-8', 'replace')!r}",
            expected="a binary ONNX model",
            mend="give the exported .onnx file; a Git LFS pointer must be fetched first",
        )
    # Every ModelProto that common exporters write starts with field 1, ir_version.
    if data[:1] == b"\x08":
        return ModelError(
            "QD203",
            where=str(path),
            got=f"{len(data)} bytes that break off or are damaged",
            expected="a whole ONNX model",
            mend="copy or export the file again; this one is incomplete",
        )
    return ModelError(
        "QD202",
        where=str(path),
        got=f"{len(data)} bytes of another format",
        expected="an ONNX model",
        mend="export the model to ONNX first",
    )


def _looks_like_text(data: bytes) -> bool:
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError:
        return False
    printable = sum(character.isprintable() or character.isspace() for character in text)
    return printable >= 0.97 * len(text)
