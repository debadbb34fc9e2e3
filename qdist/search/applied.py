"""What a candidate changes for the whole plan, applied to the planner that plans it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from qdist.plan.planner import Planner
from qdist.search.trial import Settings
from qdist.stats.record import CalibrationRecord

_OF_METHODS = ("percent", "bins")


def planner_with(
    planner: Planner, settings: Settings, statistics: Callable[[int], CalibrationRecord]
) -> Planner:
    """The planner as ``settings`` (`qdist.search.trial.SETTINGS`) want it; itself for none.

    ``statistics(n)``: those of the first ``n`` samples. Raises `ValueError` for a setting that no
    planner has, and what ``statistics`` raises.
    """
    if not settings:
        return planner
    parameters: Mapping[str, Any] = {k: settings[k] for k in _OF_METHODS if k in settings}
    record = planner.record
    if "n_samples" in settings:
        record = statistics(int(settings["n_samples"]))
    unknown = set(settings) - {*_OF_METHODS, "n_samples"}
    if unknown:
        raise ValueError(f"no planner has {', '.join(sorted(unknown))}")
    old = planner.settings
    new = replace(old, saturation_parameters={**old.saturation_parameters, **parameters})
    return Planner(planner.graph, record, planner.taps, new)
