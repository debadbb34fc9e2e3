"""The one simplification that measuring, scoring and emitting all start from.

A frozen graph has a stable name for every node, its constants folded, its batch normalizations in
the weights and an opset of at least 13. Tensor names survive, so statistics fit the quantized
graph.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import onnx
import onnx.checker
import onnx.inliner
from onnx import ModelProto

from qdist.errors import ModelError
from qdist.model import constants, rewrite
from qdist.model.loading import ModelFile, combined_digest, external_ranges
from qdist.model.opset import raise_opset
from qdist.model.session import Execution
from qdist.model.smoothing import Smoothing
from qdist.model.weights import Weights

LOWEST_OPSET = 13
"""Q/DQ have an ``axis`` from opset 13 on."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FrozenModel:
    """A frozen graph. Immutable and picklable; small when the weights are external.

    ``graph_bytes`` is a serialized ``ModelProto`` whose external data (if any) lies in
    ``data_folder``; ``digest`` covers the graph and all weights, but nothing of the given file
    that freezing dropped. ``smoothing``: the factors that were moved into the constants, where
    this was made of another frozen model (`qdist.model.smoothed`).
    """

    graph_bytes: bytes
    data_folder: Path
    digest: str
    source: Path
    source_digest: str
    n_source_bytes: int
    notes: tuple[str, ...] = ()
    smoothing: Smoothing | None = None

    def proto(self) -> ModelProto:
        """A fresh copy of the graph."""
        return ModelProto.FromString(self.graph_bytes)

    def weights(self) -> Weights:
        """The initializers, read on demand."""
        return Weights(self.proto().graph.initializer, self.data_folder)


def freeze(model: ModelFile, execution: Execution | None = None) -> FrozenModel:
    """Simplify ``model`` once and for all.

    Raises `ModelError`: QD202 for recursive local functions, QD204, QD205 when constants cannot be
    computed, QD206 when the opset cannot be raised.
    """
    execution = execution or Execution()
    notes: list[str] = []
    proto = model.proto()
    rewrite.drop_initializer_inputs(proto)
    before = rewrite.opset_of(proto)
    if proto.functions:
        proto = _inlined(proto, model.path)
        notes.append("local functions were inlined")
    if before < LOWEST_OPSET:
        proto = raise_opset(proto, LOWEST_OPSET)
        notes.append(f"opset raised from {before} to {LOWEST_OPSET}")
    rewrite.strip_documentation(proto)
    constants.constants_to_initializers(proto)
    rewrite.name_nodes(proto)
    rewrite.remove_identities(proto)
    unfolded = constants.fold_constants(proto, model.folder, execution)
    if unfolded:
        notes.append(unfolded)
    n_folded = rewrite.fold_batch_normalization(
        proto, Weights(proto.graph.initializer, model.folder)
    )
    if n_folded:
        notes.append(f"{n_folded} batch normalizations folded into the layer before")
    rewrite.remove_dead(proto)
    rewrite.complete_outputs(proto)
    graph_bytes = proto.SerializeToString(deterministic=True)
    return FrozenModel(
        graph_bytes=graph_bytes,
        data_folder=model.folder,
        digest=combined_digest(
            graph_bytes,
            (model.range_digests[place] for place in external_ranges(proto, model.folder)),
        ),
        source=model.path,
        source_digest=model.digest,
        n_source_bytes=model.n_bytes,
        notes=tuple(notes),
    )


def _inlined(proto: ModelProto, path: Path) -> ModelProto:
    try:
        return onnx.inliner.inline_local_functions(proto)
    except (onnx.checker.ValidationError, RuntimeError, ValueError) as error:
        raise ModelError(
            "QD202",
            where=str(path),
            got=f"local functions that cannot be inlined: {str(error).strip()[:300]}",
            expected="local functions that do not call themselves",
            mend="export the model without local functions",
        ) from error
