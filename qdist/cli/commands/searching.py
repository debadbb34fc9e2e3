"""The search problem of a command: its space, its costs, and how sensitive every layer is."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from qdist.cli import domain
from qdist.cli.commands import steps
from qdist.cli.context import Context
from qdist.cli.schema import TuneSettings
from qdist.evaluate.end_to_end import DivergenceTask
from qdist.evaluate.report import EvalReport
from qdist.evaluate.sensitivity import sensitivities, sensitivity_identity
from qdist.plan.choice import LayerChoice
from qdist.plan.planner import Planner
from qdist.plan.target import Target
from qdist.search.building import build_problem, measured, measuring_choices
from qdist.search.probing import (
    Probe,
    group_probes,
    interactions,
    pair_probes,
    with_divergences,
)
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
        "graph": planner.graph,
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
    problem = replace(
        problem,
        sensitivity=measured(problem, tried, found),
        float_score=before.score,
        higher_is_better=before.higher_is_better,
    )
    if search.end_to_end is None:
        return problem
    prober = _Prober(context, planner, target, calibrated, problem, identity, search.end_to_end)
    groups = group_probes(problem)
    alone = prober.measure(groups)
    pairs = pair_probes(problem, alone, search.pairs)
    together = prober.measure(tuple(both for _, _, both in pairs))
    return replace(
        with_divergences(problem, alone), interactions=interactions(pairs, {**alone, **together})
    )


class _Prober:
    """Measures groups at the model's outputs, over the pool; what the store knows it does not
    measure again."""

    def __init__(
        self,
        context: Context[TuneSettings],
        planner: Planner,
        target: Target,
        calibrated: steps.Calibrated,
        problem: SearchProblem,
        identity: Mapping[str, Any],
        measure: str,
    ) -> None:
        from actors.probe import ProbeSetup

        search = context.settings.search
        self._context = context
        self._planner = planner
        self._target = target
        self._problem = problem
        about = {**identity, "end_to_end": measure}
        self._store = SensitivityStore(calibrated.store.place, about)
        self._setup = ProbeSetup(
            frozen=planner.graph.model,
            source=calibrated.source,
            execution=context.execution,
            measure=measure,
            batch=context.settings.compare.batch,
            n_samples=search.sensitivity_samples,
        )

    def measure(self, probes: tuple[Probe, ...]) -> dict[Probe, float]:
        """Probe -> divergence."""
        from actors.probe import probe

        # Every group has one choice in all of its probes, so that one plan holds them all.
        choices = {name: choice for p in probes for name, choice in p.choices}
        plan = self._target.project(self._planner.plan({**self._problem.plain, **choices}))
        keys = {p: p.key(plan) for p in probes}
        known = {key: float(value[0]) for key, value in self._store.known().items()}
        tasks = {
            keys[p]: DivergenceTask(key=keys[p], names=p.names, projected=plan)
            for p in probes
            if keys[p] not in known
        }

        def keep(found: Mapping[str, float]) -> None:
            self._store.keep({key: np.array([value]) for key, value in found.items()})

        cluster = domain.cluster(self._context.settings.cluster)
        known |= probe(self._setup, list(tasks.values()), cluster, on_done=keep)
        return {p: known[keys[p]] for p in probes}
