"""Settings of a tracker, and what MLflow holds afterwards."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
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


def made_uri(folder: Path) -> str:
    """`sqlite_uri`, with MLflow's tables in place: making them takes a second each time."""
    path = folder / "mlflow.db"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        path.write_bytes(tables())
    return sqlite_uri(folder)


@cache
def tables() -> bytes:
    """An MLflow database without runs, for a server or for one user."""
    from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore

    with TemporaryDirectory() as name:
        folder = Path(name)
        SqlAlchemyStore(sqlite_uri(folder), "mlflow-artifacts:/").engine.dispose()
        return (folder / "mlflow.db").read_bytes()


def client_for(uri: str) -> Any:
    from mlflow import MlflowClient

    return MlflowClient(tracking_uri=uri)


def artifact(uri: str, run_id: str, name: str, folder: Path) -> str:
    return Path(client_for(uri).download_artifacts(run_id, name, str(folder))).read_text()
