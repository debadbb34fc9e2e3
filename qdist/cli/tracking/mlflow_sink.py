"""The sink that writes to MLflow."""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qdist.cli.tracking.address import experiment_page
from qdist.cli.tracking.client_call import brief, client_call
from qdist.cli.tracking.sink import Kind
from qdist.cli.tracking.spool import Spool

if TYPE_CHECKING:
    from mlflow import MlflowClient

_FIRST_PAUSE_S = 30.0
_LONGEST_PAUSE_S = 600.0
_LOCAL = "local-"


class MlflowSink:
    """Writes through `MlflowClient`, and to the spool what does not get through.

    After a server failed (3 s if nothing listens, a minute if it hangs), nothing is sent for a
    while (30 s, doubling up to 10 minutes): a search with hundreds of trials must not wait for
    a dead server at every record.
    """

    def __init__(
        self, client: MlflowClient, experiment: str, spool: Spool, *, remote: bool
    ) -> None:
        self._client = client
        self._experiment = experiment
        self._spool = spool
        self._remote = remote
        self._pause_s = _FIRST_PAUSE_S
        self._paused_until = 0.0
        self._last_error = ""

    @property
    def n_spooled(self) -> int:
        return self._spool.n_records

    def create(self, payload: dict[str, Any]) -> str:
        created: list[str] = []

        def call() -> None:
            run = self._client.create_run(
                self._experiment,
                start_time=payload["time_ms"],
                tags=payload["tags"],
                run_name=payload["name"],
            )
            created.append(str(run.info.run_id))

        parent = payload["tags"].get("mlflow.parentRunId", "")
        error = self._refusal(call, parent)
        if error is None:
            return created[0]
        local = _LOCAL + uuid.uuid4().hex
        self._spool.add(local, "create", {**payload, "experiment": self._experiment}, error)
        return local

    def deliver(self, run: str, kind: Kind, payload: dict[str, Any]) -> None:
        error = self._refusal(lambda: self._apply(run, kind, payload), run)
        if error is not None:
            self._spool.add(run, kind, payload, error)

    def url(self, run: str) -> str:
        if run.startswith(_LOCAL):
            return str(self._spool.path)
        if not self._remote:
            return ""
        return f"{experiment_page(self._client.tracking_uri, self._experiment)}/runs/{run}"

    def _refusal(self, call: Callable[[], None], run: str) -> str | None:
        """Make the call; None if it went through, else why not, in one line."""
        from mlflow.exceptions import MlflowException, RestException

        if run.startswith(_LOCAL):
            return "MLflow does not know the run"
        if time.monotonic() < self._paused_until:
            return self._last_error
        try:
            with client_call():
                call()
        except (MlflowException, OSError) as error:
            self._last_error = brief(error)
            answered = isinstance(error, RestException) and error.get_http_status_code() < 500
            if self._remote and not answered:
                self._paused_until = time.monotonic() + self._pause_s
                self._pause_s = min(2 * self._pause_s, _LONGEST_PAUSE_S)
            return self._last_error
        self._pause_s = _FIRST_PAUSE_S
        return None

    def _apply(self, run: str, kind: Kind, payload: dict[str, Any]) -> None:
        from mlflow.entities import Metric, Param, RunTag

        if kind == "batch":
            self._client.log_batch(
                run,
                metrics=[Metric(*fields) for fields in payload["metrics"]],
                params=[Param(*item) for item in payload["params"].items()],
                tags=[RunTag(*item) for item in payload["tags"].items()],
            )
        elif kind == "text":
            self._client.log_text(run, payload["text"], payload["name"])
        elif kind == "file":
            source = Path(payload["path"])
            send = self._client.log_artifacts if source.is_dir() else self._client.log_artifact
            send(run, str(source), payload["folder"] or None)
        elif kind == "end":
            self._client.set_terminated(run, payload["status"], payload["time_ms"])
