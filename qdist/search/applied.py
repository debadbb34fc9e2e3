"""What a candidate changes for the whole plan, applied to the planner that plans it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from qdist.plan.planner import Planner
from qdist.plan.smoothing import smoothed_graph
from qdist.search.trial import Settings
from qdist.stats.record import CalibrationRecord

_OF_METHODS = ("percent", "bins")
OF_STATISTICS = ("n_samples", "smoothing")
"""Settings of candidates whose ranges come from statistics of their own."""


def planner_with(
    planner: Planner,
    settings: Settings,
    statistics: Callable[[Settings], CalibrationRecord],
    factors: CalibrationRecord | None = None,
) -> Planner:
    """The planner as ``settings`` (`qdist.search.trial.SETTINGS`) want it; itself for none.

    ``statistics(settings)``: those of a candidate with settings that `needs_statistics`. Factors of
    smoothing come from ``factors``, of the model as it is; None: the planner's own record. Raises
    `ValueError` for a setting that no planner has, QD212, and what ``statistics`` raises.
    """
    if not settings:
        return planner
    parameters: Mapping[str, Any] = {k: settings[k] for k in _OF_METHODS if k in settings}
    unknown = set(settings) - {*_OF_METHODS, *OF_STATISTICS}
    if unknown:
        raise ValueError(f"no planner has {', '.join(sorted(unknown))}")
    graph, old = planner.graph, planner.settings
    if "smoothing" in settings:
        alpha = float(settings["smoothing"])
        graph, _ = smoothed_graph(graph, factors or planner.record, planner.taps, alpha)
    record = statistics(settings) if needs_statistics(settings) else planner.record
    new = replace(old, saturation_parameters={**old.saturation_parameters, **parameters})
    return Planner(graph, record, planner.taps, new)


def needs_statistics(settings: Settings) -> bool:
    """Whether a candidate with these settings has statistics of its own."""
    return any(name in settings for name in OF_STATISTICS)
