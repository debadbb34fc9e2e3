"""How far every layer's output is off in the whole quantized model, for one plan after another."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import onnx
import onnxruntime as ort
from numpy.typing import NDArray

from qdist.data.source import DataSource
from qdist.emit.writer import write_model
from qdist.evaluate.builtin import batches, session_inputs
from qdist.evaluate.sums import Deviation, Sums
from qdist.model.freeze import FrozenModel
from qdist.model.session import Execution, run, scoring_session
from qdist.plan.target import ProjectedPlan
from qdist.simulate.assemble import assemble, raised

KEEP_BYTES = 1 << 28
"""The float model's values that are kept between plans, at most; beyond that it runs again."""


class InPlace:
    """Compares one plan of a model after another. One thread at a time.

    The float model stays loaded, and its outputs of every layer stay in memory as long as they
    take no more than ``keep_bytes``. ``n_samples``: the first so many of ``source``, up to whole
    runs where the model's batch is fixed; ``batch``: samples a run.
    """

    def __init__(
        self,
        frozen: FrozenModel,
        source: DataSource,
        execution: Execution,
        *,
        batch: int = 8,
        n_samples: int | None = None,
        keep_bytes: int = KEEP_BYTES,
    ) -> None:
        self._frozen = frozen
        self._source = source
        self._execution = execution
        self._batch = batch
        self._n_samples = n_samples
        self._room = keep_bytes
        self._session: ort.InferenceSession | None = None
        self._names: list[str] = []
        self._kept: dict[int, dict[str, NDArray[Any]]] = {}

    def sums(self, projected: ProjectedPlan) -> dict[str, Sums]:
        """Quantized layer -> the sums over its first output that is used, in the graph's order.

        Raises `DataError`, QD205, QD206.
        """
        outputs = first_outputs(self._frozen, projected)
        sums = {name: Sums() for name in outputs}
        names = list(outputs.values())
        if not names:
            return sums
        expected = self._float_session(names)
        with TemporaryDirectory(prefix="qdist-compare-") as folder:
            quantized = assemble(self._frozen, projected)
            set_outputs(quantized.proto, names)
            path = write_model(quantized, Path(folder) / "quantized.onnx").path
            found = scoring_session(path, self._execution)
            inputs = session_inputs(expected)
            runs = batches(self._source, inputs, self._batch, n_samples=self._n_samples)
            for i, entry in enumerate(runs):
                floats = self._floats(i, expected, names, entry.feeds)
                values = run(found, names, entry.feeds)
                for (layer, tensor), value in zip(outputs.items(), values, strict=True):
                    sums[layer].add(floats[tensor], value)
        return sums

    def deviations(self, projected: ProjectedPlan) -> dict[str, Deviation]:
        """Quantized layer -> how far its output is off. Raises as `sums`."""
        return {name: found.deviation() for name, found in self.sums(projected).items()}

    def _float_session(self, names: list[str]) -> ort.InferenceSession:
        """The float model with at least these tensors as outputs."""
        if self._session is None or not set(names) <= set(self._names):
            self._names = list(dict.fromkeys([*self._names, *names]))
            proto = raised(self._frozen, 0)
            set_outputs(proto, self._names)
            self._session = scoring_session(
                proto.SerializeToString(), self._execution, self._frozen.data_folder
            )
        return self._session

    def _floats(
        self, i: int, session: ort.InferenceSession, names: list[str], feeds: dict[str, Any]
    ) -> dict[str, NDArray[Any]]:
        """The float values of run ``i``, kept where there is room."""
        kept = self._kept.get(i)
        if kept is None or not set(names) <= set(kept):
            wanted = [name for name in names if kept is None or name not in kept]
            fresh = dict(zip(wanted, run(session, wanted, feeds), strict=True))
            size = sum(value.nbytes for value in fresh.values())
            whole = {**(kept or {}), **fresh}
            if size > self._room:
                return whole
            self._room -= size
            self._kept[i] = kept = whole
        return kept


def first_outputs(frozen: FrozenModel, projected: ProjectedPlan) -> dict[str, str]:
    """Quantized layer -> its first output that is used, in the order of the graph."""
    wanted = {layer.name for layer in projected.plan.layers if layer.is_quantized}
    nodes = [node for node in frozen.proto().graph.node if node.name in wanted]
    return {node.name: next(name for name in node.output if name) for node in nodes}


def set_outputs(proto: onnx.ModelProto, names: list[str]) -> None:
    """Let ``proto`` give these tensors, and nothing else."""
    del proto.graph.output[:]
    proto.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names)
