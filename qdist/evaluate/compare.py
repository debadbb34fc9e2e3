"""Layer by layer: the quantized model beside the float one.

Two questions, two columns. *Alone*: how far does a layer's output move when it is quantized and its
inputs are the float model's? *In place*: how far is it off with the quantized model's own inputs,
where the errors of all layers before it have added up?
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from qdist.data.checks import InputSpec
from qdist.data.source import DataSource, Feeds
from qdist.emit.writer import write_model
from qdist.evaluate.builtin import batches, session_inputs
from qdist.evaluate.in_place import InPlace, first_outputs
from qdist.evaluate.sums import Deviation, Sums
from qdist.model.freeze import FrozenModel
from qdist.model.session import Execution, run, scoring_session
from qdist.plan.target import ProjectedPlan
from qdist.simulate.twins import SUFFIX, twin_graph

__all__ = ["Deviation", "LayerComparison", "Sums", "compare_layers"]


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerComparison:
    """One quantized layer. ``tensor``: its first output that is used; ``alone`` and ``in_place`` as
    above."""

    name: str
    op_type: str
    precision: str
    tensor: str
    alone: Deviation
    in_place: Deviation

    def to_json(self) -> dict[str, float | str]:
        """As a flat JSON object: every measure twice."""
        return {
            "layer": self.name,
            "op_type": self.op_type,
            "precision": self.precision,
            **{f"in_place_{k}": v for k, v in self.in_place.to_json().items()},
            **{f"alone_{k}": v for k, v in self.alone.to_json().items()},
        }


def compare_layers(
    frozen: FrozenModel,
    projected: ProjectedPlan,
    source: DataSource,
    execution: Execution,
    *,
    batch: int = 8,
    n_samples: int | None = None,
) -> tuple[LayerComparison, ...]:
    """Every quantized layer, the worst in place first.

    ``n_samples``: the first so many of ``source``; up to whole runs where the model's batch is
    fixed. Raises `DataError`, QD205, QD206.
    """
    alone = _alone(frozen, projected, source, execution, batch, n_samples)
    in_place = InPlace(
        frozen, source, execution, batch=batch, n_samples=n_samples, keep_bytes=0
    ).sums(projected)
    tensors = first_outputs(frozen, projected)
    rows = [
        LayerComparison(
            name=layer.name,
            op_type=layer.op_type,
            precision=layer.choice.precision,
            tensor=tensors[layer.name],
            alone=alone[layer.name].deviation(),
            in_place=in_place[layer.name].deviation(),
        )
        for layer in projected.plan.layers
        if layer.is_quantized
    ]
    return tuple(sorted(rows, key=lambda row: row.in_place.sqnr_db))


def _alone(
    frozen: FrozenModel,
    projected: ProjectedPlan,
    source: DataSource,
    execution: Execution,
    batch: int,
    n_samples: int | None,
) -> dict[str, Sums]:
    twins = twin_graph(frozen, projected)
    sums = {name: Sums() for name in twins.outputs}
    if not sums:
        return sums
    names = [t for out in twins.outputs.values() for t in (out, out + SUFFIX)]
    with TemporaryDirectory(prefix="qdist-twins-") as folder:
        path = write_model(twins.graph, Path(folder) / "twins.onnx").path
        session = scoring_session(path, execution)
        inputs = session_inputs(session)
        for entry in _first(source, inputs, batch, n_samples):
            values = dict(zip(names, run(session, names, entry), strict=True))
            for layer, out in twins.outputs.items():
                sums[layer].add(values[out], values[out + SUFFIX])
    return sums


def _first(
    source: DataSource, inputs: tuple[InputSpec, ...], size: int, n_samples: int | None
) -> Iterator[Feeds]:
    for entry in batches(source, inputs, size, n_samples=n_samples):
        yield entry.feeds
