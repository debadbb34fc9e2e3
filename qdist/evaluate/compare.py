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
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray

from qdist.data.checks import InputSpec
from qdist.data.source import DataSource, Feeds
from qdist.emit.writer import write_model
from qdist.evaluate.builtin import batches, session_inputs
from qdist.model.freeze import FrozenModel
from qdist.model.session import Execution, run, scoring_session
from qdist.plan.target import ProjectedPlan
from qdist.simulate.assemble import assemble, raised
from qdist.simulate.twins import SUFFIX, twin_graph


@dataclass(frozen=True, slots=True, kw_only=True)
class Deviation:
    """How far a tensor is from its float self, over all its values in all samples.

    ``cosine`` in -1..1; ``relative_l2`` = ||q - f|| / ||f||; ``sqnr_db`` = -20 log10 of that,
    infinite when equal; ``mse`` and ``mae`` in units of the tensor.
    """

    cosine: float
    relative_l2: float
    mse: float
    mae: float
    sqnr_db: float

    def to_json(self) -> dict[str, float | str]:
        """As a JSON object; an infinite SQNR is the string ``inf``."""
        values = {"cosine": self.cosine, "relative_l2": self.relative_l2, "mse": self.mse}
        rest = {"mae": self.mae, "sqnr_db": self.sqnr_db}
        return {k: v if np.isfinite(v) else str(v) for k, v in {**values, **rest}.items()}


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


class Sums:
    """Running sums of one tensor pair, in float64. Adding batches in one order gives one result.

    Values that are infinite or NaN in the float model are left out; one that is so only in the
    quantized model makes the deviation infinite.
    """

    def __init__(self) -> None:
        self._ff = self._qq = self._fq = self._square = self._absolute = 0.0
        self._n = 0
        self._is_broken = False

    def add(self, expected: NDArray[Any], found: NDArray[Any]) -> None:
        """Add the float tensor and the quantized one, of equal shape."""
        f = expected.astype(np.float64, copy=False).ravel()
        q = found.astype(np.float64, copy=False).ravel()
        finite = np.isfinite(f)
        if not finite.all():
            f, q = f[finite], q[finite]
        if not np.isfinite(q).all():
            self._is_broken = True
            return
        self._ff += float(f @ f)
        self._qq += float(q @ q)
        self._fq += float(f @ q)
        d = q - f
        self._square += float(d @ d)
        self._absolute += float(np.abs(d).sum())
        self._n += f.size

    def deviation(self) -> Deviation:
        """What the sums come to; perfect agreement when nothing was added."""
        square = float("inf") if self._is_broken else self._square
        return deviation_of(self._ff, self._qq, self._fq, square, self._absolute, self._n)


def deviation_of(
    ff: float, qq: float, fq: float, square: float, absolute: float, n: int
) -> Deviation:
    """From sums over ``n`` values of f*f, q*q, f*q, (q-f)^2 and abs(q-f); an infinite ``square``
    says that values are infinite or NaN in the quantized model alone."""
    inf = float("inf")
    if not np.isfinite(square):
        return Deviation(cosine=0.0, relative_l2=inf, mse=inf, mae=inf, sqnr_db=-inf)
    if n == 0 or square == 0.0:
        return Deviation(cosine=1.0, relative_l2=0.0, mse=0.0, mae=0.0, sqnr_db=inf)
    norms = np.sqrt(ff) * np.sqrt(qq)
    relative = float(np.sqrt(square / ff)) if ff else inf
    return Deviation(
        cosine=fq / float(norms) if norms else 0.0,
        relative_l2=relative,
        mse=square / n,
        mae=absolute / n,
        sqnr_db=float(-20 * np.log10(relative)) if np.isfinite(relative) else -inf,
    )


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
    in_place = _in_place(frozen, projected, source, execution, batch, n_samples)
    first_outputs = _first_outputs(frozen, projected)
    rows = [
        LayerComparison(
            name=layer.name,
            op_type=layer.op_type,
            precision=layer.choice.precision,
            tensor=first_outputs[layer.name],
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


def _in_place(
    frozen: FrozenModel,
    projected: ProjectedPlan,
    source: DataSource,
    execution: Execution,
    batch: int,
    n_samples: int | None,
) -> dict[str, Sums]:
    outputs = _first_outputs(frozen, projected)
    names = list(outputs.values())
    sums = {name: Sums() for name in outputs}
    if not names:
        return sums
    with TemporaryDirectory(prefix="qdist-compare-") as folder:
        quantized = assemble(frozen, projected)
        _set_outputs(quantized.proto, names)
        path = write_model(quantized, Path(folder) / "quantized.onnx").path
        expected_proto = raised(frozen, 0)
        _set_outputs(expected_proto, names)
        expected = scoring_session(
            expected_proto.SerializeToString(), execution, frozen.data_folder
        )
        found = scoring_session(path, execution)
        inputs = session_inputs(expected)
        for feeds in _first(source, inputs, batch, n_samples):
            pairs = zip(run(expected, names, feeds), run(found, names, feeds), strict=True)
            for layer, (f, q) in zip(outputs, pairs, strict=True):
                sums[layer].add(f, q)
    return sums


def _first_outputs(frozen: FrozenModel, projected: ProjectedPlan) -> dict[str, str]:
    """Quantized layer -> its first output that is used, in the order of the graph."""
    wanted = {layer.name for layer in projected.plan.layers if layer.is_quantized}
    nodes = [node for node in frozen.proto().graph.node if node.name in wanted]
    return {node.name: next(name for name in node.output if name) for node in nodes}


def _first(
    source: DataSource, inputs: tuple[InputSpec, ...], size: int, n_samples: int | None
) -> Iterator[Feeds]:
    for entry in batches(source, inputs, size, n_samples=n_samples):
        yield entry.feeds


def _set_outputs(proto: onnx.ModelProto, names: list[str]) -> None:
    del proto.graph.output[:]
    proto.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names)
