"""A server that speaks Azure's Blob service, as a process of its own: Microsoft's Azurite.

It comes from npm, so it is not among what pip installs. ``AZURITE_BLOB`` names its command
``azurite-blob``, unless it is on the path.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import os
import shutil
import subprocess
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from email.utils import formatdate

from tests.s3_server import free_port

CONTAINER = "calibrations"
NO_AZURITE = (
    "no azurite-blob: install it with `npm install --prefix FOLDER azurite`, and name it with"
    " AZURITE_BLOB=FOLDER/node_modules/.bin/azurite-blob"
)
_ACCOUNT = "somebody"
_KEY = base64.b64encode(b"secret").decode()
_VERSION = "2023-11-03"


@dataclass(frozen=True, slots=True, kw_only=True)
class AzureServer:
    """``process``: to stop or suspend. ``environment``: what its clients need."""

    process: subprocess.Popen[bytes]
    port: int

    @property
    def environment(self) -> dict[str, str]:
        return {
            "AZURE_STORAGE_ACCOUNT_NAME": _ACCOUNT,
            "AZURE_STORAGE_ACCOUNT_KEY": _KEY,
            "AZURE_STORAGE_ENDPOINT": f"http://127.0.0.1:{self.port}/{_ACCOUNT}",
            "AZURE_ALLOW_HTTP": "true",
        }


def azurite_blob() -> str | None:
    """The command, or None where there is none."""
    return os.environ.get("AZURITE_BLOB") or shutil.which("azurite-blob")


@contextmanager
def azure_server() -> Iterator[AzureServer]:
    """A running server with an empty container `CONTAINER`, where there is an `azurite_blob`."""
    command, port = azurite_blob() or "azurite-blob", free_port()
    with tempfile.TemporaryDirectory() as folder:
        # The environment names the accounts; without the flag Azurite reports its use to Microsoft.
        process = subprocess.Popen(
            [command, "--blobPort", str(port), "--inMemoryPersistence", "--disableTelemetry"],
            cwd=folder,
            env={**os.environ, "AZURITE_ACCOUNTS": f"{_ACCOUNT}:{_KEY}"},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        try:
            _make_container(process, port)
            yield AzureServer(process=process, port=port)
        finally:
            process.kill()
            process.wait(timeout=30)


def _make_container(process: subprocess.Popen[bytes], port: int) -> None:
    """Create Container, authorized with a Shared Key, as Microsoft documents the two."""
    end = time.monotonic() + 120
    while True:
        headers = {"x-ms-date": formatdate(usegmt=True), "x-ms-version": _VERSION}
        signed = "\n".join(
            (
                "PUT",
                *[""] * 11,
                *(f"{name}:{value}" for name, value in headers.items()),
                # The emulator's paths begin with the account, which so stands there twice.
                f"/{_ACCOUNT}/{_ACCOUNT}/{CONTAINER}",
                "restype:container",
            )
        )
        digest = hmac.digest(base64.b64decode(_KEY), signed.encode(), hashlib.sha256)
        headers["Authorization"] = f"SharedKey {_ACCOUNT}:{base64.b64encode(digest).decode()}"
        url = f"http://127.0.0.1:{port}/{_ACCOUNT}/{CONTAINER}?restype=container"
        try:
            request = urllib.request.Request(url, method="PUT", headers=headers)
            urllib.request.urlopen(request, timeout=30).close()
            return
        except urllib.error.HTTPError:
            raise
        except (urllib.error.URLError, ConnectionError):
            if process.poll() is not None or time.monotonic() > end:
                raise
            time.sleep(0.1)
