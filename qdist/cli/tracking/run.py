"""What callers hold: a tracker that takes runs, and the runs."""

from __future__ import annotations

import csv
import io
import json
import math
import time
import traceback
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Self

from omegaconf import OmegaConf

from qdist import __version__
from qdist.cli.tracking.names import Names
from qdist.cli.tracking.sink import RunState, Sink
from qdist.cli.tracking.spec import TrackingSpec
from qdist.cli.tracking.values import as_plain, as_text
from qdist.errors import ArtifactError

Status = Literal["FINISHED", "FAILED", "KILLED"]


class Tracker:
    """An experiment that takes runs. Leaving the ``with`` block ends the runs still open.

    Owned by one thread of the driver. Make one with `open_tracker`.
    """

    def __init__(self, spec: TrackingSpec, sink: Sink, *, hint: str) -> None:
        self._spec = spec
        self._sink = sink
        self._open: list[Run] = []
        self.dashboard_hint = hint
        """Where to look: a URL for a server, else the command that shows the database."""

    @property
    def n_spooled(self) -> int:
        """How many records MLflow did not take; they are in the spool file."""
        return self._sink.n_spooled

    def catch_up(self) -> int:
        """Try again to send what MLflow did not take; how many records it took now."""
        return self._sink.catch_up()

    def start_run(
        self,
        name: str,
        *,
        command: str,
        config: Mapping[str, Any],
        params: Mapping[str, Any] | None = None,
        tags: Mapping[str, str] | None = None,
        model_digest: str | None = None,
        data_digest: str | None = None,
        resume: str | None = None,
    ) -> Run:
        """Start a parent run (named ``spec.run_name`` if set) and save ``config`` with it.

        ``resume``: the id of a run to go on with, if MLflow has it.
        """
        own = {
            "qdist.command": command,
            "qdist.version": __version__,
            "qdist.artifacts": self._spec.artifacts,
            "mlflow.source.name": f"qdist {command}",
            "mlflow.source.type": "LOCAL",
        }
        digests = {"qdist.model_digest": model_digest, "qdist.data_digest": data_digest}
        own |= {key: digest for key, digest in digests.items() if digest is not None}
        known = resume if resume is not None and self._sink.reopen(resume) else None
        run = self._start(
            self._spec.run_name or name, None, None, own | dict(tags or {}), params, known
        )
        plain = json.loads(json.dumps(as_plain(config), default=str))
        run.log_text(OmegaConf.to_yaml(OmegaConf.create(plain)), "config.yaml")
        return run

    def _start(
        self,
        name: str,
        parent: Run | None,
        number: int | None,
        tags: Mapping[str, str],
        params: Mapping[str, Any] | None,
        known: str | None = None,
    ) -> Run:
        run = Run(self, self._spec, self._sink, name, parent, number, tags, known)
        self._open.append(run)
        run.log_params(params or {})
        return run

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: Any) -> None:
        for run in reversed(self._open.copy()):  # children before their parents
            run.__exit__(*exception)


class Run:
    """One MLflow run, or a place for its records where MLflow cannot be reached.

    As a context manager it ends as FINISHED; as FAILED or, on Ctrl-C, KILLED if an exception
    passes, with the error as tag ``qdist.error`` and the traceback as ``error.txt``. Names are
    rewritten to what MLflow accepts; values too long for it are cut, visibly, and stored whole
    as an artifact.
    """

    def __init__(
        self,
        tracker: Tracker,
        spec: TrackingSpec,
        sink: Sink,
        name: str,
        parent: Run | None,
        number: int | None,
        tags: Mapping[str, str],
        known: str | None = None,
    ) -> None:
        """``known``: the id of a run that is there already, and goes on."""
        self.name = name
        self._tracker = tracker
        self._spec = spec
        self._sink = sink
        self._parent = parent
        self._number = number
        self._ended = False
        self._names = Names()
        self.params: dict[str, Any] = {}
        """What `log_params` was given."""
        # Recognises the run at a replay, should it exist although the answer was lost.
        own = {"qdist.run_key": uuid.uuid4().hex}
        if parent is not None:
            own["mlflow.parentRunId"] = parent.id
        if number is not None:
            own["qdist.number"] = str(number)
        short, whole = self._names.fitted("tags", own | dict(tags))
        self.id: str = known or sink.create({"name": name, "tags": short, "time_ms": now_ms()})
        """MLflow's run id; begins with ``local-`` if the run could not be created."""
        if known is not None:
            self._batch(tags={k: v for k, v in short.items() if k != "qdist.run_key"})
        self._keep(whole)

    @property
    def url(self) -> str:
        """Where to look at this run (for a database: the command that shows it)."""
        return self._sink.url(self.id) or self._tracker.dashboard_hint

    def start_child(
        self,
        name: str,
        *,
        params: Mapping[str, Any] | None = None,
        tags: Mapping[str, str] | None = None,
        number: int | None = None,
        resume: str | None = None,
    ) -> Run:
        """Start a run below this one, or go on with the child whose id is ``resume``.

        With ``number``, the metrics that the child logs without a step also go to this run,
        with ``number`` as their step: the parent shows every trial's score as a curve.
        """
        return self._tracker._start(name, self, number, tags or {}, params, resume)

    def children(self) -> dict[int, RunState]:
        """The children that MLflow has, by their ``number``."""
        return self._sink.children(self.id)

    def log(
        self,
        *,
        metrics: Mapping[str, float],
        params: Mapping[str, Any],
        tags: Mapping[str, str],
    ) -> None:
        """Metrics, parameters and tags of this run alone, in one call. As the calls for each."""
        fields, skipped = self._fields(metrics, 0)
        texts = {name: as_text(value) for name, value in params.items()}
        short_params, whole_params = self._names.fitted("params", texts)
        short_tags, whole_tags = self._names.fitted("tags", {**skipped, **tags})
        self._batch(metrics=fields, params=short_params, tags=short_tags)
        self._keep({**whole_params, **whole_tags})

    def log_points(self, points: Sequence[tuple[str, float, int, int]]) -> None:
        """Points of curves in one call: name, value, time in ms, step. NaN and infinity go."""
        fields = [
            (self._names.name("metrics", name), float(value), time_ms, step)
            for name, value, time_ms, step in points
            if math.isfinite(value)
        ]
        self._batch(metrics=fields)

    def _batch(
        self,
        *,
        metrics: Sequence[tuple[str, float, int, int]] = (),
        params: Mapping[str, str] | None = None,
        tags: Mapping[str, str] | None = None,
    ) -> None:
        whole = {"metrics": list(metrics), "params": dict(params or {}), "tags": dict(tags or {})}
        if any(whole.values()):
            self._sink.deliver(self.id, "batch", whole)

    def _fields(
        self, metrics: Mapping[str, float], step: int
    ) -> tuple[list[tuple[str, float, int, int]], dict[str, str]]:
        """Metrics as MLflow takes them, and tags for those that it does not take."""
        now = now_ms()
        fields: list[tuple[str, float, int, int]] = []
        skipped: dict[str, str] = {}
        for name, raw in metrics.items():
            value = float(raw)
            if math.isfinite(value):
                fields.append((self._names.name("metrics", name), value, now, step))
            else:
                skipped[f"qdist.skipped.{name}"] = f"{value} at step {step}"
        return fields, skipped

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Record numbers; ``step`` only for curves within this run.

        NaN and infinity, which MLflow alters or refuses, are left out and named in the tags
        ``qdist.skipped.NAME``.
        """
        fields, skipped = self._fields(metrics, step or 0)
        tags, _ = self._names.fitted("tags", skipped)
        self._batch(metrics=fields, tags=tags)
        if step is None and self._parent is not None and self._number is not None:
            self._parent.log_metrics(metrics, self._number)

    def log_params(self, params: Mapping[str, Any]) -> None:
        """Record settings. MLflow takes each name once; mappings and lists become JSON."""
        self.params |= dict(params)
        texts = {name: as_text(value) for name, value in params.items()}
        short, whole = self._names.fitted("params", texts)
        self._batch(params=short)
        self._keep(whole)

    def set_tags(self, tags: Mapping[str, str]) -> None:
        """Set or replace tags."""
        short, whole = self._names.fitted("tags", tags)
        self._batch(tags=short)
        self._keep(whole)

    def log_artifact(self, path: Path, folder: str = "", *, best: bool = False) -> None:
        """Send a file, or a folder's contents, subject to ``spec.artifacts``. Raises QD604."""
        if not path.exists():
            raise ArtifactError(
                "QD604",
                where=str(path),
                got="no such file",
                expected="a file or folder to record",
                mend="look for an earlier error that kept it from being written",
            )
        wanted = self._spec.artifacts
        is_best = best or self._parent is None
        if wanted == "all" or (wanted in ("best", "front") and is_best):
            payload = {"path": str(path.absolute()), "folder": folder}
            self._sink.deliver(self.id, "file", payload)

    def log_text(self, text: str, name: str) -> None:
        """Store text as the artifact ``name`` (a relative path with ``/``)."""
        self._sink.deliver(self.id, "text", {"text": text, "name": name})

    def log_json(self, value: Any, name: str) -> None:
        """Store a value as JSON. NaN and infinity become the strings "nan", "inf", "-inf"."""
        self.log_text(json.dumps(as_plain(value), indent=2, default=str) + "\n", name)

    def log_table(self, rows: Sequence[Mapping[str, Any]], name: str) -> None:
        """Store rows as CSV, with every column that occurs, in order of first appearance."""
        columns = list(dict.fromkeys(column for row in rows for column in row))
        text = io.StringIO()
        writer = csv.DictWriter(text, columns, restval="", lineterminator="\n")
        writer.writeheader()
        writer.writerows({key: as_text(value) for key, value in row.items()} for row in rows)
        self.log_text(text.getvalue(), name if name.endswith(".csv") else f"{name}.csv")

    def end(self, status: Status = "FINISHED") -> None:
        """End the run; a second call changes nothing."""
        if not self._ended:
            self._ended = True
            self._sink.deliver(self.id, "end", {"status": status, "time_ms": now_ms()})
            if self in self._tracker._open:
                self._tracker._open.remove(self)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, _kind: Any, error: BaseException | None, _trace: Any) -> None:
        if error is None or self._ended:
            self.end()
            return
        tags = {"qdist.error": f"{type(error).__name__}: {error}"}
        if code := getattr(error, "code", None):
            tags["qdist.error_code"] = str(code)
        self.set_tags(tags)
        self.log_text("".join(traceback.format_exception(error)), "error.txt")
        self.end("KILLED" if isinstance(error, KeyboardInterrupt) else "FAILED")

    def _keep(self, whole: Mapping[str, str]) -> None:
        for artifact, text in whole.items():
            self.log_text(text, artifact)


def now_ms() -> int:
    """Now, as MLflow counts time."""
    return time.time_ns() // 1_000_000
