"""A real ``mlflow server`` for tests: own port, own process group, gone at the end."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tests.e2e.tracked import tables

START_TIMEOUT_S = 90.0


@dataclass(frozen=True, slots=True, kw_only=True)
class MlflowServer:
    """A running server; ``log`` is the file that takes its output."""

    url: str
    process: subprocess.Popen[bytes]
    log: Path

    def kill(self) -> None:
        """End the server and its workers at once, as a crash would; wait until they are gone."""
        try:
            os.killpg(self.process.pid, signal.SIGKILL)
        except ProcessLookupError:
            return
        self.process.wait(timeout=10)


def free_port() -> int:
    """A port on the loopback interface that nothing listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def mlflow_server(folder: Path, port: int | None = None) -> Iterator[MlflowServer]:
    """Serve a database and artifacts in ``folder``; the server is dead when the block ends.

    ``port``: where to listen; None: anywhere.

    Raises `RuntimeError` with the server's output if it does not answer within 90 s.
    """
    folder.mkdir(parents=True, exist_ok=True)
    port = port or free_port()
    log = folder / "server.log"
    database = folder / "server.db"
    if not database.exists():
        database.write_bytes(tables())
    command = [
        *(sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port)),
        *("--workers", "1", "--backend-store-uri", f"sqlite:///{database}"),
        *("--artifacts-destination", str(folder / "served")),
    ]
    quiet = {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", "MLFLOW_DISABLE_TELEMETRY": "true"}
    with log.open("wb") as output:
        process = subprocess.Popen(
            command,
            cwd=folder,
            env=os.environ | quiet,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    server = MlflowServer(url=f"http://127.0.0.1:{port}", process=process, log=log)
    try:
        _wait_until_it_answers(server)
        yield server
    finally:
        server.kill()


def _wait_until_it_answers(server: MlflowServer) -> None:
    request = urllib.request.Request(
        f"{server.url}/api/2.0/mlflow/experiments/search",
        data=json.dumps({"max_results": 1}).encode(),
        headers={"Content-Type": "application/json"},
    )
    deadline = time.monotonic() + START_TIMEOUT_S
    while time.monotonic() < deadline and server.process.poll() is None:
        try:
            with urllib.request.urlopen(request, timeout=5):
                return
        except (urllib.error.URLError, OSError):
            time.sleep(0.2)
    raise RuntimeError(f"the MLflow server does not answer: {server.log.read_text()[-2000:]}")
