"""The QDQ ONNX artifact: assembled, written, checked by ONNX, loaded by ONNX Runtime.

What is scored is this file, loaded from disk (design law 5).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import onnx
import onnx.checker
import onnx.shape_inference

from qdist.emit.writer import WrittenModel, move_model, staging, write_model
from qdist.errors import ArtifactError, ConfigError, ModelError
from qdist.model.freeze import FrozenModel
from qdist.model.rewrite import tensors
from qdist.model.session import Execution, scoring_session
from qdist.model.weights import external_range
from qdist.plan.target import ProjectedPlan
from qdist.simulate.assemble import assemble
from qdist.simulate.integers import integer_graph

MODES = ("artifact-exact", "target-exact")
"""What an emitted model computes: the QDQ graph that ships, or the chip's whole numbers."""
MODE_KEY = "qdist.mode"


@dataclass(frozen=True, slots=True, kw_only=True)
class Artifact:
    """A file that ships, or with mode ``target-exact`` a simulation of the chip. ``opset``: of its
    default domain. ``plan_digest``: what it computes."""

    path: Path
    data_path: Path | None
    n_bytes: int
    opset: int
    plan_digest: str
    target: str
    mode: str = "artifact-exact"


def emit_qdq(
    frozen: FrozenModel,
    projected: ProjectedPlan,
    path: Path,
    *,
    execution: Execution | None = None,
    check: bool = True,
    mode: str = "artifact-exact",
) -> Artifact:
    """Write the quantized model to ``path`` and prove that it can be used. ``mode``: of `MODES`.

    ``check=False`` leaves out the ONNX checker and the loading (a search loads it anyway). Raises
    QD107 when ``path`` is the float model, QD206, QD601, QD602, QD603.
    """
    refuse_overwriting(frozen, path)
    if mode not in MODES:
        raise ValueError(f"mode must be one of {MODES}, got {mode!r}")
    if mode == "target-exact":
        graph = integer_graph(frozen, projected).graph
        entry = graph.proto.metadata_props.add()
        entry.key, entry.value = MODE_KEY, mode
    else:
        graph = assemble(frozen, projected)
    entry = graph.proto.metadata_props.add()
    entry.key, entry.value = "qdist.plan", projected.plan.digest
    opset = max(e.version for e in graph.proto.opset_import if e.domain in ("", "ai.onnx"))
    tag = projected.plan.digest[:8]
    if check:
        # Checked aside, so that a file that fails never takes the place of one that works.
        with staging(path) as aside:
            written = write_model(graph, aside, tag)
            check_artifact(written, execution or Execution(), path)
            written = move_model(written, path)
    else:
        written = write_model(graph, path, tag)
    return Artifact(
        path=written.path,
        data_path=written.data_path,
        n_bytes=written.n_bytes,
        opset=int(opset),
        plan_digest=projected.plan.digest,
        target=projected.target.name,
        mode=mode,
    )


def refuse_overwriting(frozen: FrozenModel, path: Path) -> None:
    """Raise QD107 if writing the artifact to ``path`` would replace the float model's own files."""
    own = {frozen.source.resolve()}
    for tensor in tensors(frozen.proto()):
        place = external_range(tensor, frozen.data_folder)
        if place is not None:
            own.add(place.path.resolve())
    if path.resolve() in own:
        raise ConfigError(
            "QD107",
            where=str(path),
            got="a file of the float model as the place of the quantized one",
            expected="another file",
            mend="choose another output.folder=FOLDER or artifact=FILE",
        )


def check_artifact(written: WrittenModel, execution: Execution, shown: Path | None = None) -> None:
    """The ONNX checker with full check, by path, then loading. Raises QD601, QD602, naming
    ``shown`` (default: the path itself)."""
    try:
        onnx.checker.check_model(str(written.path), full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise ArtifactError(
            "QD601",
            where=str(shown or written.path),
            got=str(error).strip().splitlines()[0][:400],
            expected="a model that onnx.checker accepts with full_check",
            mend="check the float model with onnx.checker; if it passes, report this",
        ) from error
    try:
        scoring_session(written.path, execution)
    except ModelError as error:
        raise ArtifactError(
            "QD602",
            where=str(shown or written.path),
            got=error.got,
            expected="a model that ONNX Runtime loads",
            mend="leave the layer that it names in float with a rule",
        ) from error
