"""The search problem of a command: its space, its costs, and how sensitive every layer is."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import Any

from qdist.cli import domain
from qdist.cli.commands import steps
from qdist.cli.context import Context
from qdist.cli.schema import TuneSettings
from qdist.evaluate.report import EvalReport
from qdist.evaluate.sensitivity import sensitivities, sensitivity_identity
from qdist.plan.choice import LayerChoice
from qdist.plan.planner import Planner
from qdist.plan.target import Target
from qdist.search.building import build_problem, measured, measuring_choices
from qdist.search.problem import SearchProblem
from qdist.store.sensitivities import SensitivityStore


def search_problem(
    context: Context[TuneSettings],
    planner: Planner,
    target: Target,
    calibrated: steps.Calibrated,
    choices: Mapping[str, LayerChoice],
    pinned: Collection[str],
    before: EvalReport,
) -> SearchProblem:
    """What a strategy is given, measured where the store does not know it yet.

    ``pinned`` layers, which the user has a rule for, keep their choices. ``before``: the float
    model's report. Raises QD511, QD512.
    """
    search = context.settings.search
    base = context.settings.quantization.precision
    space = domain.space(search, base, target, steps.high_opset_refusal(calibrated.store))
    problem = build_problem(
        planner,
        target,
        choices,
        space,
        pinned=pinned,
        together=search.together,
        unit=search.cost,
        table=domain.latency(search),
    )
    tried = measuring_choices(problem)
    plans = [target.project(planner.plan(assignment)) for assignment in tried]
    options: dict[str, Any] = {
        "batch": context.settings.compare.batch,
        "n_samples": search.sensitivity_samples,
    }
    frozen, source = planner.graph.model, calibrated.source
    identity = sensitivity_identity(frozen, plans, source, context.execution, **options)
    found = sensitivities(
        frozen,
        plans,
        source,
        context.execution,
        kept=SensitivityStore(calibrated.store.place, identity),
        **options,
    )
    return replace(
        problem,
        sensitivity=measured(problem, tried, found),
        float_score=before.score,
        higher_is_better=before.higher_is_better,
    )
