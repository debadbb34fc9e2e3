"""A server that answers a client of Google Cloud Storage, as a process of its own.

Google's XML API is that of S3 but for what a store needs in two places: a write on the condition
that there is nothing yet is one for generation 0 (S3: ``If-None-Match: *``), and requests carry no
signature or another one. So moto's S3 answers, behind a layer that says the one in words of the
other. It shows that our calls and Google's client agree, and nothing about Google's service.
"""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from tests.s3_server import free_port, serving

_PROGRAM = """
import sys
from moto.server import DomainDispatcherApplication, create_backend_app
from werkzeug.serving import run_simple

s3 = DomainDispatcherApplication(create_backend_app)

def answer(environ, start_response):
    if environ.get("HTTP_X_GOOG_IF_GENERATION_MATCH") == "0":
        environ["HTTP_IF_NONE_MATCH"] = "*"
    credential = "Credential=somebody/20260101/us-east-1/s3/aws4_request"
    environ["HTTP_AUTHORIZATION"] = f"AWS4-HMAC-SHA256 {credential}"
    return s3(environ, start_response)

run_simple("127.0.0.1", int(sys.argv[1]), answer)
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class GcsServer:
    """``process``: to stop or suspend. ``environment``: what its clients need."""

    process: subprocess.Popen[bytes]
    port: int

    @property
    def environment(self) -> dict[str, str]:
        return {
            "GOOGLE_SERVICE_ACCOUNT_KEY": account_key(self.port),
            "GOOGLE_ALLOW_HTTP": "true",
        }


def account_key(port: int) -> str:
    """A service account whose requests go to this machine, unsigned."""
    nobody = {"client_email": "", "private_key": "", "private_key_id": ""}
    place = {"gcs_base_url": f"http://127.0.0.1:{port}", "disable_oauth": True}
    return json.dumps({**nobody, **place})


@contextmanager
def gcs_server() -> Iterator[GcsServer]:
    """A running server with an empty bucket `BUCKET`."""
    port = free_port()
    with serving(_PROGRAM, port) as process:
        yield GcsServer(process=process, port=port)
