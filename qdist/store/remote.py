"""A store's bytes in an object store: S3 and what speaks its language, Google Cloud, Azure.

Credentials, region and endpoint come from the environment that each provider documents, such as
``AWS_ACCESS_KEY_ID``, ``AWS_REGION``, ``AWS_ENDPOINT_URL`` and ``AWS_ALLOW_HTTP``, or Azure's
``AZURE_STORAGE_ACCOUNT_NAME``, ``AZURE_STORAGE_ACCOUNT_KEY`` and ``AZURE_STORAGE_ENDPOINT``.
"""

from __future__ import annotations

import os
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import TYPE_CHECKING, cast

import obstore
from obstore.exceptions import (
    AlreadyExistsError,
    BaseError,
    PermissionDeniedError,
    PreconditionError,
    UnauthenticatedError,
)
from obstore.store import from_url

from qdist.errors import StoreError
from qdist.store import failures
from qdist.store.place import PARTIAL, Entry

if TYPE_CHECKING:
    from obstore.store import AzureStore, ClientConfig, GCSStore, RetryConfig, S3Store

SCHEMES = ("s3", "gs", "az")
_ALLOW_HTTP = ("AWS_ALLOW_HTTP", "GOOGLE_ALLOW_HTTP", "AZURE_ALLOW_HTTP")
_RETRIES: RetryConfig = {
    "max_retries": 3,
    "retry_timeout": timedelta(seconds=20),
    "backoff": {
        "init_backoff": timedelta(milliseconds=200),
        "max_backoff": timedelta(seconds=4),
        "base": 2,
    },
}


class RemotePlace:
    """`Place` under a URL ``s3://bucket/prefix``, ``gs://bucket/prefix`` or ``az://box/prefix``.

    A request is tried four times at most, for some 20 seconds, unless it is a large one that is
    under way. `create` is a conditional request (``If-None-Match``), decided by the server.
    """

    def __init__(self, url: str) -> None:
        """Raises QD404 where the URL or the environment lacks something; asks no server."""
        self._url = url
        self._store = _open(url)

    @property
    def where(self) -> str:
        """The URL."""
        return self._url

    def make(self) -> None:
        """Prove that the server keeps the promise of `create`. Raises QD404, QD405, QD408."""
        with self._requesting():
            listed = obstore.list_with_delimiter(self._store)
            others = [*listed["common_prefixes"], *(meta["path"] for meta in listed["objects"])]
        own = (PARTIAL, "zarr.json")
        if any(not name.endswith(own) for name in others):
            raise failures.foreign(self.where, "a place with other objects in it")
        key = f"{uuid.uuid4().hex}{PARTIAL}"
        try:
            if not self._create(key, b"1") or self._create(key, b"2"):
                raise failures.unwritable(
                    self.where, "a server that does not honour If-None-Match when it writes"
                )
        finally:
            with suppress(StoreError):
                self.delete(key)

    def get(self, key: str) -> bytes | None:
        """The object; None where there is none. Raises QD404, QD408."""
        try:
            with self._requesting():
                return bytes(obstore.get(self._store, key).bytes())
        except FileNotFoundError:
            return None

    def put(self, key: str, data: bytes) -> None:
        """Write the object, in place of any other. Raises QD404, QD408."""
        try:
            with self._requesting():
                obstore.put(self._store, key, data, use_multipart=False)
        except FileNotFoundError as error:
            raise failures.unreachable(self.where, _reason(error)) from error

    def create(self, key: str, data: bytes) -> bool:
        """Write the object only if there is none. Raises QD404, QD408."""
        # A request that the server fulfilled, but whose answer was lost, is refused when repeated.
        return self._create(key, data) or self.get(key) == data

    def put_in_order(
        self, objects: Sequence[tuple[str, bytes]], *, create_last: bool = False
    ) -> bool:
        """Write objects one after the other; False where the last was there already.

        Raises QD404, QD408.
        """
        others = objects[:-1] if create_last else objects
        for key, data in others:
            self.put(key, data)
        return not create_last or self.create(*objects[-1])

    def delete(self, key: str) -> None:
        """Remove the object, if there is one. Raises QD404, QD408."""
        with suppress(FileNotFoundError), self._requesting():
            obstore.delete(self._store, key)

    def entries(self, folder: str) -> list[Entry]:
        """All objects of a folder. Raises QD404, QD408."""
        prefix = f"{folder}/" if folder else None
        with self._requesting():
            if prefix is None:
                found = list(obstore.list_with_delimiter(self._store)["objects"])
            else:
                found = [meta for page in obstore.list(self._store, prefix) for meta in page]
        return [
            Entry(
                name=meta["path"].rpartition("/")[2],
                n_bytes=meta["size"],
                modified_s=meta["last_modified"].timestamp(),
                version=meta["e_tag"] or "",
            )
            for meta in found
        ]

    def now_s(self) -> float:
        """By the clock of the server, as its lists show it: they may round otherwise than heads."""
        name = f"{uuid.uuid4().hex}{PARTIAL}"
        self.put(name, b"")
        try:
            found = [entry for entry in self.entries("") if entry.name == name]
        finally:
            self.delete(name)
        if not found:
            raise failures.unreachable(self.where, "a list without an object that was just written")
        return found[0].modified_s

    def _create(self, key: str, data: bytes) -> bool:
        try:
            with self._requesting():
                obstore.put(self._store, key, data, mode="create", use_multipart=False)
        except (AlreadyExistsError, PreconditionError):
            return False
        except FileNotFoundError as error:
            raise failures.unreachable(self.where, _reason(error)) from error
        return True

    @contextmanager
    def _requesting(self) -> Iterator[None]:
        try:
            yield
        except (AlreadyExistsError, PreconditionError):
            raise
        except (PermissionDeniedError, UnauthenticatedError, PermissionError) as error:
            raise failures.unwritable(self.where, _reason(error)) from error
        except (BaseError, ConnectionError, TimeoutError) as error:
            raise failures.unreachable(self.where, _reason(error)) from error


def _open(url: str) -> S3Store | GCSStore | AzureStore:
    client: ClientConfig = {
        "connect_timeout": timedelta(seconds=5),
        "timeout": timedelta(seconds=120),
        "read_timeout": timedelta(seconds=20),
        # Given options replace those of the environment.
        "allow_http": any(
            os.environ.get(name, "").lower() in ("true", "1") for name in _ALLOW_HTTP
        ),
    }
    try:
        opened = from_url(url, client_options=client, retry_config=_RETRIES)
    except (BaseError, ValueError) as error:
        raise failures.unwritable(url, _reason(error)) from error
    return cast("S3Store | GCSStore | AzureStore", opened)


def _reason(error: Exception) -> str:
    """What happened and what the server answered, on one line, without how the client sees itself.

    Answers in XML may have a line of their own for every element.
    """
    told = str(error).partition("\n\nDebug source:")[0]
    return " ".join(told.split()) or type(error).__name__
