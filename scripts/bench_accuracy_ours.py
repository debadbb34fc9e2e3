"""qdist's side of the accuracy benchmark: calibrate once, then any plan from what is stored."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench_accuracy_cases import AccuracyCase
from bench_accuracy_scores import EXECUTION

from qdist.calibration import CalibrationSettings, prepare
from qdist.calibration.here import calibrate_here
from qdist.emit.qdq import emit_qdq
from qdist.model.freeze import FrozenModel, freeze
from qdist.model.graph import Graph
from qdist.model.loading import load_model
from qdist.model.taps import TapTable
from qdist.plan.choice import LayerChoice
from qdist.plan.plan_settings import PlanSettings
from qdist.plan.planner import Planner
from qdist.plan.precision import PRECISIONS
from qdist.plan.target import ProjectedPlan, Target
from qdist.stats.record import CalibrationRecord
from qdist.store.zarr_store import create_store

TARGET = Target(name="qdq", precisions=tuple(PRECISIONS))


@dataclass(frozen=True, slots=True, kw_only=True)
class Calibrated:
    """A model with its statistics. ``planners``: symmetric or not -> planner."""

    case: AccuracyCase
    frozen: FrozenModel
    planners: Mapping[bool, Planner]

    def plan(self, choice: LayerChoice, *, symmetric: bool) -> ProjectedPlan:
        """The plan that has one choice for all layers."""
        planner = self.planners[symmetric]
        return TARGET.project(planner.plan({layer.name: choice for layer in planner.layers}))

    def write(self, projected: ProjectedPlan, path: Path) -> Path:
        """The quantized model as a file."""
        return emit_qdq(self.frozen, projected, path, execution=EXECUTION, check=False).path


def calibrate(case: AccuracyCase, folder: Path) -> Calibrated:
    """Measure all distinct activations of the calibration samples, once."""
    frozen = freeze(load_model(case.model), EXECUTION)
    graph = Graph(frozen, EXECUTION)
    settings = CalibrationSettings(micro_batch=case.micro_batch)
    job = prepare(frozen, case.calibration, settings, EXECUTION, graph=graph)
    store = create_store(str(folder / f"{case.name}.zarr"), job.identity)
    merged = calibrate_here(job, case.calibration, store)
    return Calibrated(
        case=case, frozen=frozen, planners=_planners(graph, merged.record, job.taps)
    )


def _planners(
    graph: Graph, record: CalibrationRecord, taps: TapTable, **settings: Any
) -> dict[bool, Planner]:
    return {
        symmetric: Planner(graph, record, taps, PlanSettings(symmetric=symmetric, **settings))
        for symmetric in (False, True)
    }
