"""The sink that writes to MLflow."""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from qdist.cli.tracking.address import experiment_page
from qdist.cli.tracking.client_call import brief, client_call
from qdist.cli.tracking.records import RunState, apply, children_of, find_run, is_final, reopen
from qdist.cli.tracking.sink import Kind
from qdist.cli.tracking.spool import Spool

if TYPE_CHECKING:
    from mlflow import MlflowClient

_FIRST_PAUSE_S = 30.0
_LONGEST_PAUSE_S = 600.0
_REPLAY_S = 5.0
"""Seconds at a time for what waits, so that what is new is not kept from going on."""
_LOCAL = "local-"


class MlflowSink:
    """Writes through `MlflowClient`, and to the spool what does not get through.

    After a server failed (3 s if nothing listens, a minute if it hangs), nothing is sent for a
    while (30 s, doubling up to 10 minutes): a search with hundreds of trials must not wait for
    a dead server at every record. Once it answers again, what waits is sent first, in its order;
    until all of it is sent, new records wait behind it.
    """

    def __init__(
        self,
        client: MlflowClient,
        experiment: str,
        spool: Spool,
        *,
        remote: bool,
        first_pause_s: float = _FIRST_PAUSE_S,
    ) -> None:
        self._client = client
        self._experiment = experiment
        self._spool = spool
        self._remote = remote
        self._first_pause_s = self._pause_s = first_pause_s
        self._paused_until = 0.0
        self._last_error = ""
        self._is_final = False

    @property
    def n_spooled(self) -> int:
        return self._spool.n_records

    def create(self, payload: dict[str, Any]) -> str:
        created: list[str] = []
        self._catch_up(_REPLAY_S)
        tags = dict(payload["tags"])
        parent = tags.get("mlflow.parentRunId", "")
        if parent:
            tags["mlflow.parentRunId"] = self._real(parent)

        def call() -> None:
            created.append(self._create({**payload, "tags": tags}))

        error = self._refusal(call, parent)
        if error is None:
            return created[0]
        local = _LOCAL + uuid.uuid4().hex
        self._spool.add(local, "create", {**payload, "experiment": self._experiment}, error)
        return local

    def deliver(self, run: str, kind: Kind, payload: dict[str, Any]) -> None:
        self._catch_up(_REPLAY_S)
        error = self._refusal(lambda: apply(self._client, self._real(run), kind, payload), run)
        if error is None:
            return
        keep = self._spool.refuse if self._is_final else self._spool.add
        keep(run, kind, payload, error)

    def reopen(self, run: str) -> bool:
        error = self._refusal(lambda: reopen(self._client, self._experiment, run), run)
        return error is None

    def children(self, run: str) -> dict[int, RunState]:
        found: dict[int, RunState] = {}
        real = self._real(run)
        self._refusal(lambda: found.update(children_of(self._client, self._experiment, real)), run)
        return found

    def catch_up(self) -> int:
        self._paused_until = 0.0
        before = self._spool.n_waiting
        while self._spool.n_waiting and time.monotonic() >= self._paused_until:
            n_left = self._spool.n_waiting
            self._catch_up(_REPLAY_S)
            if self._spool.n_waiting == n_left:
                break
        return before - self._spool.n_waiting

    def url(self, run: str) -> str:
        run = self._real(run)
        if run.startswith(_LOCAL):
            return str(self._spool.path)
        if not self._remote:
            return ""
        return f"{experiment_page(self._client.tracking_uri, self._experiment)}/runs/{run}"

    def _real(self, run: str) -> str:
        """MLflow's id of a run that was created later."""
        return self._spool.runs.get(run, run)

    def _create(self, payload: dict[str, Any]) -> str:
        run = self._client.create_run(
            payload.get("experiment", self._experiment),
            start_time=payload["time_ms"],
            tags=payload["tags"],
            run_name=payload["name"],
        )
        return str(run.info.run_id)

    def _catch_up(self, budget_s: float) -> None:
        """Send what waits, in order, until it is all sent, MLflow fails, or the time is over."""
        if not self._spool.n_waiting or time.monotonic() < self._paused_until:
            return
        deadline = time.monotonic() + budget_s
        for record in self._spool.waiting():
            error = self._attempt(lambda record=record: self._again(record))  # type: ignore[misc]
            if error is not None and not self._is_final:
                break
            if error is not None:
                self._spool.refuse(record["run"], record["kind"], record["payload"], error)
            self._spool.sent()
            if time.monotonic() > deadline:
                break
        self._spool.save()

    def _again(self, record: dict[str, Any]) -> None:
        """Do what a record says; harmless where it was done already."""
        run, kind, payload = record["run"], record["kind"], record["payload"]
        if kind != "create":
            apply(self._client, self._real(run), kind, payload)
            return
        tags = dict(payload["tags"])
        if parent := tags.get("mlflow.parentRunId"):
            tags["mlflow.parentRunId"] = self._real(parent)
        experiment = payload.get("experiment", self._experiment)
        # The answer to the first attempt may be all that was lost.
        known = find_run(self._client, experiment, tags["qdist.run_key"])
        self._spool.runs[run] = known or self._create({**payload, "tags": tags})

    def _refusal(self, call: Callable[[], None], run: str) -> str | None:
        """Make the call; None if it went through, else why not, in one line."""
        self._is_final = False
        if self._real(run).startswith(_LOCAL):
            return "MLflow does not know the run"
        if self._spool.n_waiting:
            return self._last_error or "earlier records wait"
        if time.monotonic() < self._paused_until:
            return self._last_error
        return self._attempt(call)

    def _attempt(self, call: Callable[[], None]) -> str | None:
        from mlflow.exceptions import MlflowException

        self._is_final = False
        try:
            with client_call():
                call()
        except (MlflowException, OSError) as error:
            self._last_error = brief(error)
            self._is_final = is_final(error)
            if self._remote and not self._is_final:
                self._paused_until = time.monotonic() + self._pause_s
                self._pause_s = min(2 * self._pause_s, _LONGEST_PAUSE_S)
            return self._last_error
        self._pause_s = self._first_pause_s
        return None
