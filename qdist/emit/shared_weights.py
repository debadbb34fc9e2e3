"""Models of one search without the weights that they have in common.

Every large constant goes into a file named by its content, once for all models; a model's own file
refers to these as external data. Put the files beside it in a folder of the given name, and any
ONNX runtime loads it.
"""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path

import onnx
from onnx import TensorProto

from qdist.digest import digest_bytes
from qdist.files import make_folder
from qdist.model.rewrite import tensors
from qdist.model.weights import external_range

SHARED_BYTES = 4096
"""Constants below this stay in the graph."""
SMALL_BYTES = 1 << 20
"""Models below this are left whole."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SharedModel:
    """``graph``: the model's own file. ``names``: the files of weights that it refers to, all of
    them; ``fresh``: those that no earlier model had."""

    graph: Path
    names: tuple[str, ...]
    fresh: tuple[Path, ...]


class SharedWeights:
    """Takes models apart, one after another. ``folder``: whose name the graphs refer to; the files
    are written there, and may go once they are kept elsewhere (`forget`)."""

    def __init__(self, folder: Path, *, small_bytes: int = SMALL_BYTES) -> None:
        self._folder = folder
        self._small_bytes = small_bytes
        self._known: set[str] = set()

    def split(self, model: Path) -> SharedModel | None:
        """The parts of a model; None for one that is small. Raises QD603."""
        beside = list(model.parent.glob(f"{model.name}.*.data"))
        if sum(path.stat().st_size for path in (model, *beside)) < self._small_bytes:
            return None
        make_folder(self._folder)
        proto = onnx.load(model, load_external_data=False)
        names: list[str] = []
        fresh: list[Path] = []
        for tensor in tensors(proto):
            content = _content(tensor, model.parent)
            if content is None or len(content) < SHARED_BYTES:
                continue
            name = f"{digest_bytes(content)[:40]}.bin"
            if name not in self._known:
                self._known.add(name)
                path = self._folder / name
                path.write_bytes(content)
                fresh.append(path)
            names.append(name)
            _refer(tensor, f"{self._folder.name}/{name}", len(content))
        place = Path(tempfile.mkdtemp(dir=self._folder)) / model.name
        place.write_bytes(proto.SerializeToString())
        return SharedModel(graph=place, names=tuple(dict.fromkeys(names)), fresh=tuple(fresh))

    def forget(self, shared: SharedModel) -> None:
        """Remove the files of a model that is kept elsewhere now."""
        for path in (*shared.fresh, shared.graph):
            path.unlink(missing_ok=True)
        shared.graph.parent.rmdir()


def _content(tensor: TensorProto, folder: Path) -> bytes | None:
    """The raw bytes; None where a tensor has none of its own form."""
    place = external_range(tensor, folder)
    if place is not None:
        with place.path.open("rb") as file:
            file.seek(place.offset)
            return file.read(place.n_bytes)
    return tensor.raw_data or None


def _refer(tensor: TensorProto, location: str, n_bytes: int) -> None:
    tensor.ClearField("raw_data")
    del tensor.external_data[:]
    tensor.data_location = TensorProto.EXTERNAL
    for key, value in (("location", location), ("offset", 0), ("length", n_bytes)):
        tensor.external_data.add(key=key, value=str(value))
