"""Settings of a tracker, and what MLflow holds afterwards."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from qdist.cli.tracking import TrackingSpec


def spec(
    uri: str, *, artifacts: Literal["all", "best", "none"] = "all", enabled: bool = True
) -> TrackingSpec:
    return TrackingSpec(
        uri=uri, experiment="digits", artifacts=artifacts, enabled=enabled, run_name=None
    )


def sqlite_uri(folder: Path) -> str:
    return f"sqlite:///{folder / 'mlflow.db'}"


def client_for(uri: str) -> Any:
    from mlflow import MlflowClient

    return MlflowClient(tracking_uri=uri)


def artifact(uri: str, run_id: str, name: str, folder: Path) -> str:
    return Path(client_for(uri).download_artifacts(run_id, name, str(folder))).read_text()
