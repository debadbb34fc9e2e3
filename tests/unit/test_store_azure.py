"""The store in an object store, on a server that speaks Azure's Blob service."""

from __future__ import annotations

import uuid
from base64 import b64encode
from collections.abc import Iterator
from pathlib import Path

import pytest

from qdist.errors import StoreError
from qdist.store.remote import RemotePlace
from qdist.store.zarr_store import create_store, open_store
from tests.azure_server import CONTAINER, NO_AZURITE, AzureServer, azure_server, azurite_blob
from tests.records import IDENTITY
from tests.s3_server import free_port
from tests.store_contract import StoreContract, assert_a_calibration_goes_there, code_of

pytestmark = pytest.mark.skipif(azurite_blob() is None, reason=NO_AZURITE)


@pytest.fixture(scope="module")
def server() -> Iterator[AzureServer]:
    with azure_server() as running:
        yield running


@pytest.fixture
def reachable(server: AzureServer, monkeypatch: pytest.MonkeyPatch) -> AzureServer:
    for name, text in server.environment.items():
        monkeypatch.setenv(name, text)
    return server


def new_place() -> str:
    return f"az://{CONTAINER}/{uuid.uuid4().hex}/run.zarr"


class TestAzureStore(StoreContract):
    """The contract, on Azure's Blob service."""

    @pytest.fixture
    def place(self, tmp_path: Path, reachable: AzureServer) -> str:
        return new_place()


def test_a_calibration_goes_there_as_to_a_folder(reachable: AzureServer, tmp_path: Path) -> None:
    assert_a_calibration_goes_there(new_place(), tmp_path)


def test_a_server_that_refuses_connections_is_not_reached(
    reachable: AzureServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Azure's deletions are batches, which fail in a way of their own."""
    monkeypatch.setenv("AZURE_STORAGE_ENDPOINT", f"http://127.0.0.1:{free_port()}/somebody")
    place = RemotePlace(new_place())
    assert code_of(lambda: place.delete("zarr.json")) == "QD408"
    assert code_of(lambda: open_store(place.where)) == "QD408"


def test_a_container_that_is_not_there_is_named(reachable: AzureServer) -> None:
    assert code_of(lambda: open_store("az://no-such-container/s")) == "QD402"
    with pytest.raises(StoreError, match=r"QD408.*specified container does not exist"):
        create_store("az://no-such-container/s", IDENTITY)


def test_a_wrong_key_is_refused(reachable: AzureServer, monkeypatch: pytest.MonkeyPatch) -> None:
    place = create_store(new_place(), IDENTITY).location
    monkeypatch.setenv("AZURE_STORAGE_ACCOUNT_KEY", b64encode(b"guessed").decode())
    assert code_of(lambda: open_store(place)) == "QD404"
    assert code_of(lambda: create_store(new_place(), IDENTITY)) == "QD404"


def test_plain_http_must_be_allowed(
    reachable: AzureServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("AZURE_ALLOW_HTTP")
    assert code_of(lambda: open_store(new_place())) == "QD408"
