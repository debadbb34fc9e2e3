"""A server that speaks S3, as a process of its own: moto, with one request at a time.

One at a time, because moto looks whether an object exists and writes it in two steps; in a single
thread the two are one, as S3 promises for ``If-None-Match``.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

BUCKET = "calibrations"
_PROGRAM = """
import sys
from moto.server import DomainDispatcherApplication, create_backend_app
from werkzeug.serving import run_simple
run_simple("127.0.0.1", int(sys.argv[1]), DomainDispatcherApplication(create_backend_app))
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class S3Server:
    """``process``: to stop or suspend. ``environment``: what its clients need."""

    process: subprocess.Popen[bytes]
    port: int

    @property
    def environment(self) -> dict[str, str]:
        return {
            "AWS_ACCESS_KEY_ID": "somebody",
            "AWS_SECRET_ACCESS_KEY": "secret",
            "AWS_REGION": "us-east-1",
            "AWS_ENDPOINT_URL": f"http://127.0.0.1:{self.port}",
            "AWS_ALLOW_HTTP": "true",
        }


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def s3_server(port: int | None = None) -> Iterator[S3Server]:
    """A running server with an empty bucket `BUCKET`."""
    port = port or free_port()
    with serving(_PROGRAM, port) as process:
        yield S3Server(process=process, port=port)


@contextmanager
def serving(program: str, port: int) -> Iterator[subprocess.Popen[bytes]]:
    """A process of a program of moto's that is given the port, with an empty bucket `BUCKET`."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("AWS_")}
    process = subprocess.Popen(
        [sys.executable, "-c", program, str(port)],
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        _make_bucket(process, port)
        yield process
    finally:
        process.kill()
        process.wait(timeout=30)


def _make_bucket(process: subprocess.Popen[bytes], port: int) -> None:
    url = f"http://127.0.0.1:{port}/{BUCKET}"
    end = time.monotonic() + 120
    while True:
        try:
            # The header alone tells moto which of Amazon's services is asked.
            credential = "Credential=somebody/20260101/us-east-1/s3/aws4_request"
            headers = {"Authorization": f"AWS4-HMAC-SHA256 {credential}"}
            request = urllib.request.Request(url, method="PUT", headers=headers)
            urllib.request.urlopen(request, timeout=30).close()
            return
        except (urllib.error.URLError, ConnectionError):
            if process.poll() is not None or time.monotonic() > end:
                raise
            time.sleep(0.1)
