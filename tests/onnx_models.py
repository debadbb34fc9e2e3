"""Small ONNX models, samples and plans that several test modules are built from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import ModelProto, NodeProto, TensorProto, ValueInfoProto, helper, numpy_helper

from qdist.calibration import CalibrationSettings, calibrate_here, prepare
from qdist.data.source import Feeds
from qdist.digest import digest_arrays
from qdist.model.freeze import FrozenModel, freeze
from qdist.model.graph import Graph
from qdist.model.loading import load_model
from qdist.model.session import Execution
from qdist.plan.choice import LayerChoice
from qdist.plan.planner import Planner, PlanSettings
from qdist.plan.precision import PRECISIONS
from qdist.plan.target import ProjectedPlan, Target
from qdist.store.zarr_store import create_store

Array = NDArray[Any]
EXECUTION = Execution()
ANY_TARGET = Target(name="any", precisions=tuple(PRECISIONS))


@dataclass(frozen=True, kw_only=True)
class HeldSamples:
    """A data source whose samples are held in memory, each with a label or all without."""

    samples: Sequence[Feeds]
    labels: Sequence[Array] | None = None

    def keys(self) -> list[str]:
        return [f"{i:04d}" for i in range(len(self.samples))]

    def content_digest(self, key: str) -> str:
        return digest_arrays(self.samples[int(key)].items())

    def preprocessing(self) -> dict[str, Any]:
        return {"kind": "held"}

    def load(self, key: str) -> Feeds:
        return dict(self.samples[int(key)])

    def label(self, key: str) -> NDArray[np.int64] | None:
        return None if self.labels is None else np.asarray(self.labels[int(key)], np.int64)


def value(
    name: str, shape: Sequence[int | str | None] | None, element: int = TensorProto.FLOAT
) -> ValueInfoProto:
    """An input or output."""
    return helper.make_tensor_value_info(name, element, shape)


def model(
    nodes: Sequence[NodeProto],
    inputs: Sequence[ValueInfoProto],
    outputs: Sequence[ValueInfoProto],
    constants: Mapping[str, Array] | None = None,
    *,
    opset: int = 13,
    domains: Mapping[str, int] | None = None,
) -> ModelProto:
    """A model of the given nodes, in IR version 8."""
    initializers = [numpy_helper.from_array(array, n) for n, array in (constants or {}).items()]
    graph = helper.make_graph(list(nodes), "graph", list(inputs), list(outputs), initializers)
    imports = [helper.make_opsetid(d, v) for d, v in {"": opset, **(domains or {})}.items()]
    return helper.make_model(graph, opset_imports=imports, ir_version=8)


def frozen_from(proto: ModelProto, path: Path) -> FrozenModel:
    """The model saved at ``path`` and frozen."""
    onnx.save(proto, path)
    return freeze(load_model(path))


def normal(*shape: int, seed: int = 0) -> NDArray[np.float32]:
    """Standard normal values."""
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def floats(values: Any) -> NDArray[np.float32]:
    """A float32 array of a number or of nested lists."""
    return np.asarray(values, np.float32)


def integers(values: Any) -> NDArray[np.int64]:
    """An int64 array of a number or of nested lists."""
    return np.asarray(values, np.int64)


def samples_of(name: str, *shape: int, n: int = 4, seed: int = 1) -> HeldSamples:
    """Normal samples of one input, without the batch axis."""
    return HeldSamples(samples=[{name: array} for array in normal(n, *shape, seed=seed)])


def planner_for(
    frozen: FrozenModel, source: Any, store: Path, settings: PlanSettings | None = None
) -> Planner:
    """A planner on a calibration of ``source`` that ran in this process."""
    graph = Graph(frozen)
    job = prepare(frozen, source, CalibrationSettings(), EXECUTION, graph=graph)
    merged = calibrate_here(job, source, create_store(store, job.identity))
    return Planner(graph, merged.record, job.taps, settings)


def projected(
    planner: Planner, precision: str = "int8", target: Target = ANY_TARGET, **per_layer: str
) -> ProjectedPlan:
    """One precision for all layers, but for those named (layer=precision)."""
    chosen = {layer.name: LayerChoice(precision=precision) for layer in planner.layers}
    assert set(per_layer) <= set(chosen)
    chosen.update({name: LayerChoice(precision=p) for name, p in per_layer.items()})
    return target.project(planner.plan(chosen))
