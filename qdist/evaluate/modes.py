"""Where the two modes disagree: the artifact as it is written, and the chip's whole numbers.

Both run on the same samples. Each layer's output is taken in both, stored in the numbers that the
plan has for it, and compared in steps of these numbers. What came before adds up: the last layers
disagree most.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray

from qdist.data.source import DataSource
from qdist.emit.writer import write_model
from qdist.evaluate.builtin import batches, session_inputs
from qdist.evaluate.compare import Deviation, Sums
from qdist.model.freeze import FrozenModel
from qdist.model.session import Execution, run, scoring_session
from qdist.plan.plan import LayerPlan
from qdist.plan.quantizer import Quantizer
from qdist.plan.target import ProjectedPlan
from qdist.simulate.assemble import QuantizedGraph, assemble
from qdist.simulate.integers import integer_graph


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerDisagreement:
    """One layer. ``scheme``: what computes it in whole numbers; None where it is computed in
    float32, and ``why`` then says the reason. ``tensor``: where
    it is compared. ``differing``: share of the values that are stored as another number;
    ``most_steps``: how far the furthest is off, in steps of the output's numbers (None where these
    are not known). ``deviation``: of target-exact from artifact-exact."""

    name: str
    op_type: str
    scheme: str | None
    why: str
    tensor: str
    differing: float | None
    most_steps: int | None
    deviation: Deviation

    def to_json(self) -> dict[str, Any]:
        """As a flat JSON object."""
        return {
            "layer": self.name,
            "op_type": self.op_type,
            "scheme": self.scheme,
            "why": self.why,
            "tensor": self.tensor,
            "differing": self.differing,
            "most_steps": self.most_steps,
            **self.deviation.to_json(),
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class ModesReport:
    """All layers, in the order of the graph. ``reading``: how far the target's arithmetic is
    documented. ``outputs``: deviation of each of the model's outputs. ``notes``: what saturates on
    the chip that should not."""

    reading: str
    layers: tuple[LayerDisagreement, ...]
    outputs: dict[str, Deviation]
    notes: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """As a JSON object."""
        return {
            "reading": self.reading,
            "notes": list(self.notes),
            "layers": [layer.to_json() for layer in self.layers],
            "outputs": {name: entry.to_json() for name, entry in self.outputs.items()},
        }

    @property
    def n_integer(self) -> int:
        """How many layers are computed in whole numbers."""
        return sum(layer.scheme is not None for layer in self.layers)


class _Steps:
    """Running counts of one tensor."""

    def __init__(self, quantizer: Quantizer | None) -> None:
        self.sums = Sums()
        self._quantizer = quantizer
        self._n = self._n_differing = self._most = 0

    def add(self, artifact: NDArray[Any], target: NDArray[Any]) -> None:
        if self._quantizer is None:
            self.sums.add(artifact, target)
            return
        a, t = (self._quantizer.quantize(np.asarray(v, np.float32)) for v in (artifact, target))
        self.sums.add(self._quantizer.dequantize(a), self._quantizer.dequantize(t))
        off = np.abs(a.astype(np.int64) - t.astype(np.int64))
        self._n += off.size
        self._n_differing += int(np.count_nonzero(off))
        self._most = max(self._most, int(off.max(initial=0)))

    @property
    def differing(self) -> float | None:
        return None if self._quantizer is None else self._n_differing / max(1, self._n)

    @property
    def most_steps(self) -> int | None:
        return None if self._quantizer is None else self._most


def compare_modes(
    frozen: FrozenModel,
    projected: ProjectedPlan,
    source: DataSource,
    execution: Execution,
    *,
    batch: int = 8,
    n_samples: int | None = None,
) -> ModesReport:
    """Run both modes over the first ``n_samples`` of ``source``.

    Raises `DataError`, QD205, QD206.
    """
    target = integer_graph(frozen, projected)
    layers = [layer for layer in projected.plan.layers if layer.is_quantized]
    made = {node.name: node for node in frozen.proto().graph.node}
    places = {
        layer.name: layer.outputs[0].tensor
        if layer.outputs
        else next(name for name in made[layer.name].output if name)
        for layer in layers
    }
    outputs = [value.name for value in frozen.proto().graph.output]
    steps = {layer.name: _Steps(_numbers(layer)) for layer in layers}
    sums = {name: Sums() for name in outputs}
    names = list(dict.fromkeys([*places.values(), *outputs]))
    with TemporaryDirectory(prefix="qdist-modes-") as folder:
        sessions = [
            scoring_session(_written(graph, names, Path(folder) / f"{label}.onnx"), execution)
            for label, graph in (
                ("artifact", assemble(frozen, projected)),
                ("target", target.graph),
            )
        ]
        for entry in batches(source, session_inputs(sessions[0]), batch, n_samples=n_samples):
            one, other = (
                dict(zip(names, run(session, names, entry.feeds), strict=True))
                for session in sessions
            )
            for name, place in places.items():
                steps[name].add(one[place], other[place])
            for name in outputs:
                sums[name].add(one[name], other[name])
    return ModesReport(
        reading=target.reading,
        layers=tuple(
            LayerDisagreement(
                name=layer.name,
                op_type=layer.op_type,
                scheme=target.schemes.get(layer.name),
                why=target.in_float.get(layer.name, ""),
                tensor=places[layer.name],
                differing=steps[layer.name].differing,
                most_steps=steps[layer.name].most_steps,
                deviation=steps[layer.name].sums.deviation(),
            )
            for layer in layers
        ),
        outputs={name: entry.deviation() for name, entry in sums.items()},
        notes=target.notes,
    )


def _numbers(layer: LayerPlan) -> Quantizer | None:
    """The integers that the layer's result is stored in."""
    if not layer.outputs or layer.outputs[0].quantizer.is_float:
        return None
    return layer.outputs[0].quantizer


def _written(graph: QuantizedGraph, names: list[str], path: Path) -> Path:
    del graph.proto.graph.output[:]
    graph.proto.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names)
    return write_model(graph, path).path
