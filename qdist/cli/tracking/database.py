"""MLflow's SQLite database: locked, created whole or not at all, refused when it is unusable."""

from __future__ import annotations

import fcntl
import os
import shlex
import sqlite3
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from qdist.cli.tracking.address import database_uri
from qdist.cli.tracking.client_call import brief, client_call
from qdist.cli.tracking.experiment import find_experiment
from qdist.errors import TrackingError

if TYPE_CHECKING:
    from mlflow import MlflowClient

_ARTIFACTS_NAME = "mlartifacts"
_LOCK_TIMEOUT_S = 60.0


def open_database(path: Path, *, experiment: str) -> tuple[MlflowClient, str]:
    """A client of the database at ``path``, created if missing, and the experiment's id.

    Raises QD902 (it cannot be used) and QD104 (the experiment was deleted).
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with _locked(path.with_name(f".{path.name}.lock")):
            fresh = _is_fresh(path)
            return _open_store(path, experiment, fresh=fresh)
    except (OSError, sqlite3.Error) as error:
        raise _unusable(path, error) from error


def _open_store(path: Path, experiment: str, *, fresh: bool) -> tuple[MlflowClient, str]:
    """The caller holds the lock: two first users migrating at once break a database."""
    with client_call():
        from alembic.util.exc import CommandError
        from mlflow import MlflowClient
        from mlflow.exceptions import MlflowException
        from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore
        from sqlalchemy.exc import SQLAlchemyError

        root = path.parent / _ARTIFACTS_NAME
        try:
            if fresh:
                # Built aside and moved, since an interrupted migration cannot be repeated.
                partial = path.with_name(f".{path.name}.partial")
                for left in (partial, partial.with_name(f"{partial.name}-journal")):
                    left.unlink(missing_ok=True)
                SqlAlchemyStore(database_uri(partial), root.as_uri()).engine.dispose()
                os.replace(partial, path)
            client = MlflowClient(tracking_uri=database_uri(path))
            return client, find_experiment(client, experiment, location=root.as_uri())
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
    upgrade = f"mlflow db upgrade {shlex.quote(database_uri(path))}"
    return TrackingError(
        "QD902",
        where=str(path),
        got=brief(error),
        expected="an MLflow database that this user can read and write",
        mend=f"back the file up and run: {upgrade}"
        if stale
        else "free the path or choose another with tracking.uri=sqlite:///FOLDER/mlflow.db",
    )


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold an exclusive lock on ``path``. Raises `TimeoutError` after a minute."""
    deadline = time.monotonic() + _LOCK_TIMEOUT_S
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
