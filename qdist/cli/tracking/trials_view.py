"""The view of a search's trials that an experiment has from its first run: MLflow's own saved
views, which are tags of the experiment.

It stands in the menu *Views* of the experiment's page: the trials alone, the highest score first,
with the numbers that they are compared by as columns.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import suppress
from typing import TYPE_CHECKING

from qdist.cli.tracking.run import now_ms

if TYPE_CHECKING:
    from mlflow import MlflowClient

KEY = "qdist-trials"
"""What the view's address ends with: ``#/experiments/ID/runs?viewStateShareKey=qdist-trials``."""
NAME = "Trials"
_TAG = f"mlflow.sharedViewState.{KEY}"
_COLUMNS = (
    *("metrics.`score`", "metrics.`sqnr_db`", "metrics.`artifact_mb`", "metrics.`bit_operations`"),
    *("metrics.`evaluation_s`", "params.`model`", "params.`round`", "params.`changed_layers`"),
    *("params.`layers_w4a8`", "params.`layers_int8`", "params.`layers_w8a16`"),
    *("params.`layers_float32`", "tags.`qdist.status`"),
)


def add_trials_view(client: MlflowClient, experiment: str, tags: Mapping[str, str]) -> None:
    """Give the experiment the view, unless its ``tags`` have it: a user may have changed it. That
    MLflow does not take it is no error, since nothing but convenience is lost."""
    from mlflow.exceptions import MlflowException

    if _TAG in tags:
        return
    with suppress(MlflowException, OSError):
        client.set_experiment_tag(experiment, _TAG, _value(now_ms()))


def _value(time_ms: int) -> str:
    """What MLflow's page writes for a view of this name; ``state`` may be JSON or compressed."""
    state = {
        "searchFilter": "tags.`qdist.number` LIKE '%'",
        # By any number: ordered by time, trials are folded below their search.
        "orderByKey": "metrics.`score`",
        "orderByAsc": False,
        "startTime": "ALL",
        "lifecycleFilter": "Active",
        "datasetsFilter": [],
        "modelVersionFilter": "All Runs",
        "selectedColumns": list(_COLUMNS),
        "columnOrder": [],
        "columnWidths": {},
        "runsHiddenMode": "SHOW_ALL",
        "viewMaximized": False,
        "runListHidden": False,
        "isAccordionReordered": False,
        "useGroupedValuesInCharts": True,
        "hideEmptyCharts": True,
        "groupBy": None,
        "groupsExpanded": {},
        "globalLineChartConfig": {
            "xAxisKey": "step",
            "lineSmoothness": 0,
            "selectedXAxisMetricKey": "",
        },
    }
    return json.dumps(
        {"name": NAME, "createdAt": time_ms, "updatedAt": time_ms, "state": json.dumps(state)}
    )
