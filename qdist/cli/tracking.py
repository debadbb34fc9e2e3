"""Runs, trials and artifacts in MLflow: the one place that writes to it.

`open_tracker` proves that MLflow can be used before anything expensive starts. From then on
tracking never ends a run: what MLflow does not take is appended to ``mlflow-spool.jsonl``, a
file of self-contained records ``{"run", "kind", "payload", "error"}``, and the run goes on.

One process, the driver, owns all writes. Only `MlflowClient` is used, never the fluent API,
and MLflow's variables are set around each call alone, so nothing leaks into the processes
that the driver starts. MLflow is imported inside functions: the import takes 2-3 seconds,
which ``qdist --help`` should not pay.
"""

from __future__ import annotations

import csv
import fcntl
import hashlib
import io
import json
import logging
import math
import os
import re
import shlex
import shutil
import sqlite3
import time
import traceback
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol, Self
from urllib.parse import urlsplit, urlunsplit

from omegaconf import OmegaConf

from qdist import __version__
from qdist.errors import ArtifactError, ConfigError, TrackingError
from qdist.files import make_folder

if TYPE_CHECKING:
    from mlflow import MlflowClient

Status = Literal["FINISHED", "FAILED", "KILLED"]
Kind = Literal["create", "batch", "text", "file", "end"]

SPOOL_NAME = "mlflow-spool.jsonl"
ARTIFACTS_NAME = "mlartifacts"
N_PARAM_CHARACTERS = 500  # the least that any MLflow server accepts
N_TAG_CHARACTERS = 4_000
N_NAME_CHARACTERS = 250
LOCK_TIMEOUT_S = 60.0
FIRST_PAUSE_S = 30.0
LONGEST_PAUSE_S = 600.0

_LOGGER = logging.getLogger(__name__)
_SQLITE = "sqlite:///"
_LOCAL = "local-"
_DEFAULTS = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    # A dead server costs about three seconds; MLflow's own defaults take four minutes.
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2",
    "MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR": "1",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "20",
}
_PROBE = {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0", "MLFLOW_HTTP_REQUEST_TIMEOUT": "5"}


@dataclass(frozen=True, slots=True, kw_only=True)
class TrackingSpec:
    """Where runs are recorded.

    ``uri`` is ``sqlite:///PATH`` (artifacts land in ``mlartifacts`` beside the database) or
    ``http(s)://SERVER``. ``artifacts`` says which files are sent: ``all``; ``best``: those of
    parent runs and those logged with ``best=True``; ``none``. Configurations, JSON, text and
    tables are always sent. Raises QD104.
    """

    uri: str
    experiment: str
    artifacts: Literal["all", "best", "none"]
    enabled: bool
    run_name: str | None

    def __post_init__(self) -> None:
        if self.artifacts not in ("all", "best", "none"):
            raise _bad_value("tracking.artifacts", self.artifacts, "all, best or none")
        if not self.enabled:
            return
        if not self.experiment.strip():
            raise _bad_value("tracking.experiment", self.experiment, "a name")
        usable = (
            self.uri.removeprefix(_SQLITE) not in ("", ":memory:") and "?" not in self.uri
            if self.uri.startswith(_SQLITE)
            else self.uri.startswith(("http://", "https://")) and bool(urlsplit(self.uri).hostname)
        )
        if not usable:
            raise _bad_value(
                "tracking.uri", _shown(self.uri), "sqlite:///FOLDER/mlflow.db or http(s)://SERVER"
            )

    @property
    def database(self) -> Path | None:
        """Absolute path of the SQLite database; None for a server."""
        if not self.uri.startswith(_SQLITE):
            return None
        return Path(self.uri.removeprefix(_SQLITE)).expanduser().absolute()


def _bad_value(where: str, got: str, expected: str) -> ConfigError:
    return ConfigError(
        "QD104", where=where, got=repr(got), expected=expected, mend=f"set {where}=VALUE"
    )


def _shown(uri: str) -> str:
    """``uri`` without user name and password, fit for screens and logs."""
    parts = urlsplit(uri)
    host = parts.netloc.rpartition("@")[2]
    return uri if host == parts.netloc else urlunsplit(parts._replace(netloc=host))


@contextmanager
def _mlflow_call(forced: Mapping[str, str] | None = None) -> Iterator[None]:
    """MLflow's variables and silence for one call; what fails is reported by this module.

    The user's own variables win, except over ``forced``.
    """
    values = {k: v for k, v in _DEFAULTS.items() if k not in os.environ} | dict(forced or {})
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    import mlflow  # noqa: F401  (sets up its loggers, so it comes before they are silenced)

    loggers = [logging.getLogger(name) for name in ("alembic", "mlflow", "urllib3")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


# --- opening ------------------------------------------------------------------------------


def open_tracker(
    spec: TrackingSpec, *, spool_folder: Path, warn: Callable[[str], None] = _LOGGER.warning
) -> Tracker:
    """Connect to MLflow, create database and experiment where missing, and prove both usable.

    ``spool_folder`` (created only when needed) takes what MLflow refuses later; ``warn`` is
    called once, with one line, when that starts. Raises QD901 (no server answers, within about
    10 s), QD902 (the database cannot be used) or QD104 (the experiment was deleted). With
    ``enabled=False`` nothing is imported and every call on the tracker does nothing.
    """
    if not spec.enabled:
        return Tracker(spec, _NullSink(), hint="tracking is off (tracking.enabled=false)")
    database = spec.database
    if database is None:
        client, experiment = _open_server(spec)
        hint = _experiment_url(spec.uri, experiment)
    else:
        client, experiment = _open_database(spec, database)
        hint = (
            f"mlflow ui --backend-store-uri {shlex.quote(_SQLITE + str(database))}"
            f"  # then open http://127.0.0.1:5000/#/experiments/{experiment}"
        )
    spool = _Spool(spool_folder.absolute(), warn)
    sink = _MlflowSink(client, experiment, spool, remote=database is None)
    return Tracker(spec, sink, hint=hint)


def _experiment_url(uri: str, experiment: str) -> str:
    return f"{_shown(uri).rstrip('/')}/#/experiments/{experiment}"


def _open_server(spec: TrackingSpec) -> tuple[MlflowClient, str]:
    with _mlflow_call(_PROBE):
        from mlflow import MlflowClient
        from mlflow.exceptions import MlflowException

        try:
            client = MlflowClient(tracking_uri=spec.uri)
            return client, _experiment(client, spec.experiment, location=None)
        except (MlflowException, OSError) as error:
            raise TrackingError(
                "QD901",
                where=_shown(spec.uri),
                got=_brief(error),
                expected="an MLflow tracking server that answers",
                mend="start the server or correct tracking.uri; to record locally use "
                "tracking.uri=sqlite:///mlruns/mlflow.db, to record nothing tracking.enabled=false",
            ) from error


def _open_database(spec: TrackingSpec, path: Path) -> tuple[MlflowClient, str]:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with _locked(path.with_name(f".{path.name}.lock")):
            fresh = _is_fresh(path)
            return _open_store(spec, path, fresh=fresh)
    except (OSError, sqlite3.Error) as error:
        raise _unusable(path, error) from error


def _open_store(spec: TrackingSpec, path: Path, *, fresh: bool) -> tuple[MlflowClient, str]:
    """The caller holds the lock: two first users migrating at once break a database."""
    with _mlflow_call():
        from alembic.util.exc import CommandError
        from mlflow import MlflowClient
        from mlflow.exceptions import MlflowException
        from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore
        from sqlalchemy.exc import SQLAlchemyError

        root = path.parent / ARTIFACTS_NAME
        try:
            if fresh:
                # Built aside and moved, since an interrupted migration cannot be repeated.
                partial = path.with_name(f".{path.name}.partial")
                for left in (partial, partial.with_name(f"{partial.name}-journal")):
                    left.unlink(missing_ok=True)
                SqlAlchemyStore(f"{_SQLITE}{partial}", root.as_uri()).engine.dispose()
                os.replace(partial, path)
            client = MlflowClient(tracking_uri=f"{_SQLITE}{path}")
            return client, _experiment(client, spec.experiment, location=root.as_uri())
        except (MlflowException, SQLAlchemyError, CommandError) as error:
            raise _unusable(path, error) from error


def _is_fresh(path: Path) -> bool:
    """Whether there is nothing at ``path`` yet. Raises `sqlite3.Error` if it cannot be used."""
    if not path.exists():
        # MLflow would retry the failing open for two minutes; this fails at once.
        probe = path.with_name(f".{path.name}.{os.getpid()}.probe")
        probe.touch()
        probe.unlink()
        return True
    with closing(sqlite3.connect(path, timeout=10.0, isolation_level=None)) as connection:
        names = {row[0] for row in connection.execute("SELECT name FROM sqlite_master")}
        connection.execute("BEGIN IMMEDIATE")  # fails on a file that cannot be written
        connection.execute("ROLLBACK")
    if names and not names & {"alembic_version", "experiments"}:
        raise sqlite3.DatabaseError("the database belongs to another program")
    return not names


def _unusable(path: Path, error: BaseException) -> TrackingError:
    stale = "schema" in str(error)
    upgrade = f"mlflow db upgrade {shlex.quote(_SQLITE + str(path))}"
    return TrackingError(
        "QD902",
        where=str(path),
        got=_brief(error),
        expected="an MLflow database that this user can read and write",
        mend=f"back the file up and run: {upgrade}"
        if stale
        else "free the path or choose another with tracking.uri=sqlite:///FOLDER/mlflow.db",
    )


def _brief(error: BaseException) -> str:
    """The message on one line, without the password that a URL in it may carry."""
    text = re.sub(r"://[^/@\s]+@", "://", " ".join(str(error).split()))
    return text[:400] or type(error).__name__


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold an exclusive lock on ``path``. Raises `TimeoutError` after a minute."""
    deadline = time.monotonic() + LOCK_TIMEOUT_S
    with path.open("a") as file:
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise TimeoutError(f"another process holds {path}") from None
                time.sleep(0.1)
        yield


def _experiment(client: MlflowClient, name: str, *, location: str | None) -> str:
    """The id of experiment ``name``, created if missing. Raises QD104 if it was deleted."""
    from mlflow.exceptions import MlflowException

    found = client.get_experiment_by_name(name)
    if found is None:
        try:
            return str(client.create_experiment(name, artifact_location=location))
        except MlflowException:
            found = client.get_experiment_by_name(name)  # another driver was faster
            if found is None:
                raise
    if found.lifecycle_stage == "deleted":
        raise ConfigError(
            "QD104",
            where="tracking.experiment",
            got=f"{name!r}, which was deleted",
            expected="an active experiment",
            mend=f"choose another name, or: mlflow experiments restore -x {found.experiment_id}",
        )
    return str(found.experiment_id)


# --- where records go ---------------------------------------------------------------------


class _Sink(Protocol):
    """Takes records in order, from one thread. Never raises because MLflow does not answer."""

    @property
    def n_spooled(self) -> int: ...

    def create(self, payload: dict[str, Any]) -> str:
        """Create a run and return its id."""

    def deliver(self, run: str, kind: Kind, payload: dict[str, Any]) -> None: ...

    def url(self, run: str) -> str:
        """The page of one run; empty if it has none."""


class _NullSink:
    n_spooled = 0

    def create(self, payload: dict[str, Any]) -> str:
        return "off"

    def deliver(self, run: str, kind: Kind, payload: dict[str, Any]) -> None:
        return

    def url(self, run: str) -> str:
        return ""


class _Spool:
    """An append-only file of records; files are copied beside it, into ``mlflow-spool/``."""

    def __init__(self, folder: Path, warn: Callable[[str], None]) -> None:
        self.path = folder / SPOOL_NAME
        self.n_records = 0
        self._warn = warn

    def add(self, run: str, kind: Kind, payload: dict[str, Any], error: str) -> None:
        """Append one record. Raises QD603 or `OSError`: nothing else would keep the record."""
        make_folder(self.path.parent)
        if kind == "file":
            payload = {**payload, "path": str(self._kept(run, Path(payload["path"])))}
        record = {"run": run, "kind": kind, "payload": payload, "error": error}
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")
        self.n_records += 1
        if self.n_records == 1:
            self._warn(f"MLflow takes no records ({error}); the run goes on, see {self.path}")

    def _kept(self, run: str, source: Path) -> Path:
        # The source may be a temporary file that is gone by the time of a replay.
        folder = self.path.with_suffix("") / run / uuid.uuid4().hex
        folder.mkdir(parents=True)
        if source.is_dir():
            return Path(shutil.copytree(source, folder / source.name))
        return Path(shutil.copy2(source, folder / source.name))


class _MlflowSink:
    """Writes through `MlflowClient`, and to the spool what does not get through.

    After a server failed (3 s if nothing listens, a minute if it hangs), nothing is sent for a
    while (30 s, doubling up to 10 minutes): a search with hundreds of trials must not wait for
    a dead server at every record.
    """

    def __init__(
        self, client: MlflowClient, experiment: str, spool: _Spool, *, remote: bool
    ) -> None:
        self._client = client
        self._experiment = experiment
        self._spool = spool
        self._remote = remote
        self._pause_s = FIRST_PAUSE_S
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
        return f"{_experiment_url(self._client.tracking_uri, self._experiment)}/runs/{run}"

    def _refusal(self, call: Callable[[], None], run: str) -> str | None:
        """Make the call; None if it went through, else why not, in one line."""
        from mlflow.exceptions import MlflowException, RestException

        if run.startswith(_LOCAL):
            return "MLflow does not know the run"
        if time.monotonic() < self._paused_until:
            return self._last_error
        try:
            with _mlflow_call():
                call()
        except (MlflowException, OSError) as error:
            self._last_error = _brief(error)
            answered = isinstance(error, RestException) and error.get_http_status_code() < 500
            if self._remote and not answered:
                self._paused_until = time.monotonic() + self._pause_s
                self._pause_s = min(2 * self._pause_s, LONGEST_PAUSE_S)
            return self._last_error
        self._pause_s = FIRST_PAUSE_S
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


# --- what callers hold --------------------------------------------------------------------


class Tracker:
    """An experiment that takes runs. Leaving the ``with`` block ends the runs still open.

    Owned by one thread of the driver. Make one with `open_tracker`.
    """

    def __init__(self, spec: TrackingSpec, sink: _Sink, *, hint: str) -> None:
        self._spec = spec
        self._sink = sink
        self._open: list[Run] = []
        self.dashboard_hint = hint
        """Where to look: a URL for a server, else the command that shows the database."""

    @property
    def n_spooled(self) -> int:
        """How many records MLflow did not take; they are in the spool file."""
        return self._sink.n_spooled

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
    ) -> Run:
        """Start a parent run (named ``spec.run_name`` if set) and save ``config`` with it."""
        own = {
            "qdist.command": command,
            "qdist.version": __version__,
            "qdist.artifacts": self._spec.artifacts,
            "mlflow.source.name": f"qdist {command}",
            "mlflow.source.type": "LOCAL",
        }
        digests = {"qdist.model_digest": model_digest, "qdist.data_digest": data_digest}
        own |= {key: digest for key, digest in digests.items() if digest is not None}
        run = self._start(self._spec.run_name or name, None, None, own | dict(tags or {}), params)
        plain = json.loads(json.dumps(_plain(config), default=str))
        run.log_text(OmegaConf.to_yaml(OmegaConf.create(plain)), "config.yaml")
        return run

    def _start(
        self,
        name: str,
        parent: Run | None,
        number: int | None,
        tags: Mapping[str, str],
        params: Mapping[str, Any] | None,
    ) -> Run:
        run = Run(self, self._spec, self._sink, name, parent, number, tags)
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
        sink: _Sink,
        name: str,
        parent: Run | None,
        number: int | None,
        tags: Mapping[str, str],
    ) -> None:
        self.name = name
        self._tracker = tracker
        self._spec = spec
        self._sink = sink
        self._parent = parent
        self._number = number
        self._ended = False
        self._names: dict[tuple[str, str], str] = {}
        # Recognises the run at a replay, should it exist although the answer was lost.
        own = {"qdist.run_key": uuid.uuid4().hex}
        if parent is not None:
            own["mlflow.parentRunId"] = parent.id
        if number is not None:
            own["qdist.number"] = str(number)
        short, whole = self._fitted("tags", own | dict(tags), N_TAG_CHARACTERS)
        self.id: str = sink.create({"name": name, "tags": short, "time_ms": _now_ms()})
        """MLflow's run id; begins with ``local-`` if the run could not be created."""
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
    ) -> Run:
        """Start a run below this one.

        With ``number``, the metrics that the child logs without a step also go to this run,
        with ``number`` as their step: the parent shows every trial's score as a curve.
        """
        return self._tracker._start(name, self, number, tags or {}, params)

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Record numbers; ``step`` only for curves within this run.

        NaN and infinity, which MLflow alters or refuses, are left out and named in the tags
        ``qdist.skipped.NAME``.
        """
        now = _now_ms()
        fields: list[tuple[str, float, int, int]] = []
        skipped: dict[str, str] = {}
        for name, raw in metrics.items():
            value = float(raw)
            if math.isfinite(value):
                fields.append((self._name("metrics", name), value, now, step or 0))
            else:
                skipped[f"qdist.skipped.{name}"] = f"{value} at step {step or 0}"
        tags, _ = self._fitted("tags", skipped, N_TAG_CHARACTERS)
        if fields or tags:
            self._sink.deliver(self.id, "batch", {"metrics": fields, "params": {}, "tags": tags})
        if step is None and self._parent is not None and self._number is not None:
            self._parent.log_metrics(metrics, self._number)

    def log_params(self, params: Mapping[str, Any]) -> None:
        """Record settings. MLflow takes each name once; mappings and lists become JSON."""
        texts = {name: _text(value) for name, value in params.items()}
        short, whole = self._fitted("params", texts, N_PARAM_CHARACTERS)
        if short:
            self._sink.deliver(self.id, "batch", {"metrics": [], "params": short, "tags": {}})
        self._keep(whole)

    def set_tags(self, tags: Mapping[str, str]) -> None:
        """Set or replace tags."""
        short, whole = self._fitted("tags", tags, N_TAG_CHARACTERS)
        if short:
            self._sink.deliver(self.id, "batch", {"metrics": [], "params": {}, "tags": short})
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
        if wanted == "all" or (wanted == "best" and (best or self._parent is None)):
            payload = {"path": str(path.absolute()), "folder": folder}
            self._sink.deliver(self.id, "file", payload)

    def log_text(self, text: str, name: str) -> None:
        """Store text as the artifact ``name`` (a relative path with ``/``)."""
        self._sink.deliver(self.id, "text", {"text": text, "name": name})

    def log_json(self, value: Any, name: str) -> None:
        """Store a value as JSON. NaN and infinity become the strings "nan", "inf", "-inf"."""
        self.log_text(json.dumps(_plain(value), indent=2, default=str) + "\n", name)

    def log_table(self, rows: Sequence[Mapping[str, Any]], name: str) -> None:
        """Store rows as CSV, with every column that occurs, in order of first appearance."""
        columns = list(dict.fromkeys(column for row in rows for column in row))
        text = io.StringIO()
        writer = csv.DictWriter(text, columns, restval="", lineterminator="\n")
        writer.writeheader()
        writer.writerows({key: _text(value) for key, value in row.items()} for row in rows)
        self.log_text(text.getvalue(), name if name.endswith(".csv") else f"{name}.csv")

    def end(self, status: Status = "FINISHED") -> None:
        """End the run; a second call changes nothing."""
        if not self._ended:
            self._ended = True
            self._sink.deliver(self.id, "end", {"status": status, "time_ms": _now_ms()})
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

    def _name(self, kind: str, name: str) -> str:
        """A name that MLflow accepts and that no other name of this run was rewritten to."""
        clean = _clean(name)
        if self._names.setdefault((kind, clean), name) != name:
            clean = _cut_name(clean, N_NAME_CHARACTERS - 9) + "-" + _short_digest(name)
        return clean

    def _fitted(
        self, kind: str, values: Mapping[str, str], limit: int
    ) -> tuple[dict[str, str], dict[str, str]]:
        """Values cut to ``limit`` characters, and the whole texts of the cut ones by artifact."""
        short: dict[str, str] = {}
        whole: dict[str, str] = {}
        for raw, value in values.items():
            name = self._name(kind, raw)
            if len(value) > limit:
                artifact = f"{kind}/{name.replace('/', '_')}.txt"
                whole[artifact] = value
                note = f"\u2026 ({len(value)} characters, see {artifact})"
                value = value[: max(0, limit - len(note))] + note
            short[name] = value
        return short, whole

    def _keep(self, whole: Mapping[str, str]) -> None:
        for artifact, text in whole.items():
            self.log_text(text, artifact)


# --- names and values ---------------------------------------------------------------------


def _now_ms() -> int:
    return time.time_ns() // 1_000_000


def _clean(name: str) -> str:
    """``name`` with what MLflow rejects replaced by ``_``, at most 250 characters.

    A colon goes too: servers on Windows reject it. Empty and dotted path parts are dropped,
    since MLflow insists that names, read as paths, are normal and relative.
    """
    parts = re.sub(r"[^/\w.\- ]", "_", name).split("/")
    kept = "/".join(part for part in parts if part.strip() not in ("", ".", "..")).strip()
    if len(kept) > N_NAME_CHARACTERS:
        return f"{_cut_name(kept, N_NAME_CHARACTERS - 9)}-{_short_digest(name)}"
    return kept or "unnamed"


def _cut_name(name: str, limit: int) -> str:
    return name[:limit].rstrip("/. ")


def _short_digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:8]


def _text(value: Any) -> str:
    if isinstance(value, Mapping | list | tuple):
        return json.dumps(_plain(value), default=str)
    return "" if value is None else str(value)


def _plain(value: Any) -> Any:
    """``value`` as JSON can hold it; what JSON has no form for is left to ``default=str``."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        items: Iterable[Any] = value
        return [_plain(item) for item in items]
    if isinstance(value, float) and not math.isfinite(value):
        return str(float(value))
    return value
