"""qdist's side of the accuracy benchmark: calibrate once, then any plan from what is stored."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from bench_accuracy_cases import AccuracyCase
from bench_accuracy_scores import EXECUTION

from qdist.calibration import CalibrationSettings, prepare
from qdist.calibration.here import calibrate_here
from qdist.emit.qdq import emit_qdq
from qdist.evaluate.sensitivity import sensitivity
from qdist.model.freeze import FrozenModel, freeze
from qdist.model.graph import Graph
from qdist.model.loading import load_model
from qdist.model.taps import TapTable
from qdist.plan.choice import LayerChoice
from qdist.plan.plan import QuantizationPlan
from qdist.plan.plan_settings import PlanSettings
from qdist.plan.planner import Planner
from qdist.plan.precision import PRECISIONS
from qdist.plan.target import ProjectedPlan, Target
from qdist.search.pickers.cosine import cosine
from qdist.search.pickers.end_to_end import output_errors
from qdist.search.pickers.hawq import hawq, traces
from qdist.search.pickers.picking import Picked, PickSettings, raised_choices, worst
from qdist.search.pickers.positions import io_high
from qdist.search.pickers.variance import variance
from qdist.stats.record import CalibrationRecord
from qdist.store.zarr_store import create_store

PICKERS = ("end_to_end", "cosine", "variance", "hawq", "io_high")
HIGH = "w8a16"
"""What pickers raise to: activations of 16 bits, the weights as they were."""
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
    return Calibrated(case=case, frozen=frozen, planners=_planners(graph, merged.record, job.taps))


def pick(
    ours: Calibrated, name: str, low: LayerChoice, *, symmetric: bool
) -> Callable[[float], tuple[QuantizationPlan, int, int]]:
    """A function of the share of layers to raise: the plan, how many are raised, and of how many.
    What the picker ranks layers by is measured once, on calibration samples."""
    planner = ours.planners[symmetric]
    choices = {layer.name: low for layer in planner.layers}
    plain = planner.plan(choices)
    free = {layer.name for layer in planner.choosable()}
    plain = replace(plain, layers=tuple(each for each in plain.layers if each.name in free))
    ranking = _ranking(ours, name, planner, planner.plan(choices), plain)

    def raised(share: float) -> tuple[QuantizationPlan, int, int]:
        n = math.floor(share * len(free))
        chosen = frozenset(worst(ranking, n))
        settings = PickSettings(high=HIGH)
        mixed = raised_choices(choices, Picked(raised=chosen), settings)
        return planner.plan(mixed), n, len(free)

    return raised


def _ranking(
    ours: Calibrated,
    name: str,
    planner: Planner,
    whole: QuantizationPlan,
    plain: QuantizationPlan,
) -> Mapping[str, float]:
    """Layer -> the larger, the sooner it is raised. ``plain``: the layers that have a choice."""
    source, frozen = ours.case.calibration, ours.frozen
    batch, n = ours.case.micro_batch, ours.case.n_ranking
    settings = PickSettings(high=HIGH, low_share=0.8)
    match name:
        case "end_to_end":
            return output_errors(
                frozen, TARGET.project(whole), source, EXECUTION, batch=batch, n_samples=n
            )
        case "cosine":
            found = sensitivity(
                frozen, TARGET.project(whole), source, EXECUTION, batch=batch, n_samples=n
            )
            return cosine(found, settings).scores
        case "hawq":
            weights = dict.fromkeys(e.tensor for layer in plain.layers for e in layer.weights)
            curves = traces(frozen, list(weights), source, EXECUTION, batch=batch, n_samples=n)
            return hawq(plain, curves, settings).scores
        case "variance":
            return variance(plain, planner.densities(plain), settings).scores
    return io_high(planner.index, settings).scores


def _planners(
    graph: Graph, record: CalibrationRecord, taps: TapTable, **settings: Any
) -> dict[bool, Planner]:
    return {
        symmetric: Planner(graph, record, taps, PlanSettings(symmetric=symmetric, **settings))
        for symmetric in (False, True)
    }
