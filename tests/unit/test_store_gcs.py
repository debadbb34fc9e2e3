"""The store in an object store, by the client of Google Cloud Storage."""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from qdist.errors import StoreError
from qdist.store.zarr_store import create_store, open_store
from tests.gcs_server import GcsServer, account_key, gcs_server
from tests.records import IDENTITY
from tests.s3_server import BUCKET, free_port
from tests.store_contract import StoreContract, assert_a_calibration_goes_there, code_of


@pytest.fixture(scope="module")
def server() -> Iterator[GcsServer]:
    with gcs_server() as running:
        yield running


@pytest.fixture
def reachable(server: GcsServer, monkeypatch: pytest.MonkeyPatch) -> GcsServer:
    for name, text in server.environment.items():
        monkeypatch.setenv(name, text)
    return server


def new_place() -> str:
    return f"gs://{BUCKET}/{uuid.uuid4().hex}/run.zarr"


class TestGcsStore(StoreContract):
    """The contract, by Google's client."""

    @pytest.fixture
    def place(self, tmp_path: Path, reachable: GcsServer) -> str:
        return new_place()


def test_a_calibration_goes_there_as_to_a_folder(reachable: GcsServer, tmp_path: Path) -> None:
    assert_a_calibration_goes_there(new_place(), tmp_path)


def test_a_server_that_refuses_connections_is_not_reached(
    reachable: GcsServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GOOGLE_SERVICE_ACCOUNT_KEY", account_key(free_port()))
    assert code_of(lambda: open_store(new_place())) == "QD408"


def test_a_bucket_that_is_not_there_is_named(reachable: GcsServer) -> None:
    assert code_of(lambda: open_store("gs://no-such-bucket/s")) == "QD402"
    with pytest.raises(StoreError, match=r"QD408.*bucket does not exist"):
        create_store("gs://no-such-bucket/s", IDENTITY)


def test_an_account_that_is_none_is_refused(
    reachable: GcsServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GOOGLE_SERVICE_ACCOUNT_KEY", "{}")
    assert code_of(lambda: open_store(new_place())) == "QD404"


def test_plain_http_must_be_allowed(reachable: GcsServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("GOOGLE_ALLOW_HTTP")
    assert code_of(lambda: open_store(new_place())) == "QD408"
