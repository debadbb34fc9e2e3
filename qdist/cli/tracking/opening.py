"""Connecting to MLflow, so that what cannot work fails before anything expensive starts."""

from __future__ import annotations

import logging
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from qdist.cli.tracking.address import database_uri, experiment_page, shown
from qdist.cli.tracking.client_call import brief, client_call
from qdist.cli.tracking.database import open_database
from qdist.cli.tracking.experiment import find_experiment
from qdist.cli.tracking.mlflow_sink import MlflowSink
from qdist.cli.tracking.run import Tracker
from qdist.cli.tracking.sink import NullSink
from qdist.cli.tracking.spec import TrackingSpec
from qdist.cli.tracking.spool import Spool
from qdist.errors import TrackingError

if TYPE_CHECKING:
    from mlflow import MlflowClient

_LOGGER = logging.getLogger(__name__)
_PROBE = {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0", "MLFLOW_HTTP_REQUEST_TIMEOUT": "5"}


def open_tracker(
    spec: TrackingSpec, *, spool_folder: Path, warn: Callable[[str], None] = _LOGGER.warning
) -> Tracker:
    """Connect to MLflow, create database and experiment where missing, and prove both usable.

    ``spool_folder`` (created only when needed) takes what MLflow refuses later, and what waits
    there of an earlier run is sent now; ``warn`` is told of either, with one line. Raises QD901
    (no server answers, within about 10 s), QD902 (the database cannot be used) or QD104 (the
    experiment was deleted). With ``enabled=False`` nothing is imported and every call on the
    tracker does nothing.
    """
    if not spec.enabled:
        return Tracker(spec, NullSink(), hint="tracking is off (tracking.enabled=false)")
    database = spec.database
    if database is None:
        client, experiment = _open_server(spec)
        hint = experiment_page(spec.uri, experiment)
    else:
        client, experiment = open_database(database, experiment=spec.experiment)
        hint = (
            f"mlflow ui --backend-store-uri {shlex.quote(database_uri(database))}"
            f"  # then open http://127.0.0.1:5000/#/experiments/{experiment}"
        )
    spool = Spool(spool_folder.absolute(), warn, address=f"{shown(spec.uri)}#{experiment}")
    sink = MlflowSink(client, experiment, spool, remote=database is None)
    if n_sent := sink.catch_up():
        warn(f"MLflow has taken {n_sent} records that had waited in {spool.path}")
    return Tracker(spec, sink, hint=hint)


def _open_server(spec: TrackingSpec) -> tuple[MlflowClient, str]:
    with client_call(_PROBE):
        from mlflow import MlflowClient
        from mlflow.exceptions import MlflowException

        try:
            client = MlflowClient(tracking_uri=spec.uri)
            return client, find_experiment(client, spec.experiment, location=None)
        except (MlflowException, OSError) as error:
            raise TrackingError(
                "QD901",
                where=shown(spec.uri),
                got=brief(error),
                expected="an MLflow tracking server that answers",
                mend="start the server or correct tracking.uri; to record locally use "
                "tracking.uri=sqlite:///mlruns/mlflow.db, to record nothing tracking.enabled=false",
            ) from error
