"""What a record does to a run, by MLflow's client; and which runs there are."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from qdist.cli.tracking.sink import Kind, RunState

if TYPE_CHECKING:
    from mlflow import MlflowClient

_FINAL = frozenset({400, 404, 409})
"""Answers that stay the same however often one asks."""
_PAGE = 1000


def apply(client: MlflowClient, run: str, kind: Kind, payload: dict[str, Any]) -> None:
    """Do what a record of any kind but ``create`` says. Raises what MLflow raises."""
    from mlflow.entities import Metric, Param, RunTag

    if kind == "batch":
        client.log_batch(
            run,
            metrics=[Metric(*fields) for fields in payload["metrics"]],
            params=[Param(*item) for item in payload["params"].items()],
            tags=[RunTag(*item) for item in payload["tags"].items()],
        )
    elif kind == "text":
        client.log_text(run, payload["text"], payload["name"])
    elif kind == "file":
        source = Path(payload["path"])
        send = client.log_artifacts if source.is_dir() else client.log_artifact
        send(run, str(source), payload["folder"] or None)
    elif kind == "end":
        client.set_terminated(run, payload["status"], payload["time_ms"])


def is_final(error: BaseException) -> bool:
    """Whether MLflow understood and refuses, so that sending again is of no use."""
    status = getattr(error, "get_http_status_code", None)
    return callable(status) and status() in _FINAL


def find_run(client: MlflowClient, experiment: str, key: str) -> str | None:
    """The run with this ``qdist.run_key``, if there is one."""
    found = client.search_runs(
        [experiment], filter_string=f"tags.`qdist.run_key` = '{key}'", max_results=1
    )
    return str(found[0].info.run_id) if found else None


def reopen(client: MlflowClient, experiment: str, run: str) -> None:
    """Let a run of this experiment go on. Raises what MLflow raises."""
    from mlflow.exceptions import MlflowException
    from mlflow.protos.databricks_pb2 import RESOURCE_DOES_NOT_EXIST

    found = client.get_run(run)
    if found.info.experiment_id != experiment or found.info.lifecycle_stage == "deleted":
        raise MlflowException(f"no run {run} in this experiment", RESOURCE_DOES_NOT_EXIST)
    client.update_run(run, status="RUNNING")


def children_of(client: MlflowClient, experiment: str, run: str) -> dict[int, RunState]:
    """The children that have a number, by it; the newest of each."""
    found: dict[int, RunState] = {}
    token: str | None = None
    while True:
        page = client.search_runs(
            [experiment],
            filter_string=f"tags.`mlflow.parentRunId` = '{run}'",
            max_results=_PAGE,
            order_by=["attributes.start_time ASC"],
            page_token=token,
        )
        for child in page:
            tags = child.data.tags
            if tags.get("qdist.number", "").isdecimal():
                found[int(tags["qdist.number"])] = RunState(
                    run=str(child.info.run_id), status=str(child.info.status), tags=dict(tags)
                )
        token = page.token
        if not token:
            return found


__all__ = ["RunState", "apply", "children_of", "find_run", "is_final", "reopen"]
