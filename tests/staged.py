"""Calibrations of small models that are cut into many segments, and the same ones uncut."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import ModelProto, helper

from qdist.calibration import CalibrationJob, CalibrationSettings, prepare
from qdist.data.source import DataSource
from qdist.model.freeze import FrozenModel, freeze
from qdist.model.loading import load_model
from qdist.model.segments import cut_at
from tests.onnx_models import EXECUTION, HeldSamples, model, normal, value

BUDGET = 1 << 40


def layers(n_layers: int, width: int) -> ModelProto:
    """h += relu(h @ w), again and again; the last one reads the input of the model as well."""
    nodes = []
    for i in range(n_layers):
        nodes += [
            helper.make_node("MatMul", [f"h{i}", f"w{i}"], [f"m{i}"], f"matmul{i}"),
            helper.make_node("Relu", [f"m{i}"], [f"r{i}"], f"relu{i}"),
            helper.make_node("Add", [f"h{i}", f"r{i}"], [f"h{i + 1}"], f"add{i}"),
        ]
    nodes.append(helper.make_node("Add", [f"h{n_layers}", "h0"], ["y"], "end"))
    weights = {
        f"w{i}": (normal(width, width, seed=i) / np.sqrt(width)).astype(np.float32)
        for i in range(n_layers)
    }
    return model(nodes, [value("h0", ["b", width])], [value("y", ["b", width])], weights)


def saved_apart(proto: ModelProto, folder: Path) -> FrozenModel:
    """The model with every weight in a file of its own, ``NAME.bin``."""
    for weight in proto.graph.initializer:
        (folder / f"{weight.name}.bin").write_bytes(weight.raw_data)
        n_bytes = len(weight.raw_data)
        weight.ClearField("raw_data")
        weight.data_location = onnx.TensorProto.EXTERNAL
        for key, text in (("location", f"{weight.name}.bin"), ("length", str(n_bytes))):
            weight.external_data.add(key=key, value=text)
    (folder / "m.onnx").write_bytes(proto.SerializeToString())
    return freeze(load_model(folder / "m.onnx"))


def samples(n: int, width: int) -> HeldSamples:
    return HeldSamples(samples=[{"h0": normal(width, seed=1000 + i)} for i in range(n)])


def job_of(frozen: FrozenModel, source: DataSource, **settings: Any) -> CalibrationJob:
    """The model in one piece, which fits the budget."""
    chosen = {"micro_batch": 1, "shard_samples": 2, "memory_budget_bytes": BUDGET, **settings}
    return prepare(frozen, source, CalibrationSettings(**chosen), EXECUTION)


def cut_up(job: CalibrationJob, positions: Sequence[int]) -> CalibrationJob:
    """The same calibration with the model cut before the steps named."""
    segments = cut_at(
        job.measuring.graph,
        job.taps,
        job.measuring.shapes,
        positions,
        hands=[output for _, output in job.observer.carry],
    )
    return replace(job, observer=replace(job.observer, segments=segments))
