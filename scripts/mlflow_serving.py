"""A real ``mlflow server`` over a SQLite database, for as long as a script needs it."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

START_TIMEOUT_S = 90.0
_QUIET = {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", "MLFLOW_DISABLE_TELEMETRY": "true"}


@contextmanager
def found_at(uri: str) -> Iterator[str]:
    """The URL of a server for ``uri``: itself, or one over the database that it names."""
    if not uri.startswith("sqlite:///"):
        yield uri.rstrip("/")
        return
    database = Path(uri.removeprefix("sqlite:///")).absolute()
    if not database.is_file():
        raise SystemExit(f"no database at {database}")
    with served(f"sqlite:///{database}") as url:
        yield url


@contextmanager
def served(database: str, artifacts: Path | None = None) -> Iterator[str]:
    """The URL of a server over ``database``, an absolute address, which is made where it is
    missing. ``artifacts``: where files of new experiments go, through the server. It is ended with
    the block. Raises `SystemExit` with its output if it does not start."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", port]
    command += ["--workers", "1", "--backend-store-uri", database]
    if artifacts is not None:
        command += ["--artifacts-destination", str(artifacts)]
    with tempfile.TemporaryDirectory() as folder, (Path(folder) / "log").open("w+b") as log:
        process = subprocess.Popen(
            command,
            cwd=folder,
            env=os.environ | _QUIET,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            url = f"http://127.0.0.1:{port}"
            if not _answers(url, process):
                log.seek(0)
                raise SystemExit(f"the MLflow server does not start:\n{log.read().decode()}")
            yield url
        finally:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait(timeout=10)


def _answers(url: str, process: subprocess.Popen[bytes]) -> bool:
    deadline = time.monotonic() + START_TIMEOUT_S
    while time.monotonic() < deadline and process.poll() is None:
        try:
            with urllib.request.urlopen(f"{url}/version", timeout=5):
                return True
        except (urllib.error.URLError, OSError):
            time.sleep(0.3)
    return False
