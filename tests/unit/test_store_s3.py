"""The store in an object store, on a server that speaks S3."""

from __future__ import annotations

import pickle
import signal
import subprocess
import sys
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from qdist.store.zarr_store import create_store, open_store
from tests.records import BATCHES, IDENTITY, receipt_of, record_of
from tests.s3_server import BUCKET, S3Server, free_port, s3_server
from tests.store_contract import StoreContract, assert_same, code_of


@pytest.fixture(scope="module")
def server() -> Iterator[S3Server]:
    with s3_server() as running:
        yield running


@pytest.fixture
def reachable(server: S3Server, monkeypatch: pytest.MonkeyPatch) -> S3Server:
    for name, value in server.environment.items():
        monkeypatch.setenv(name, value)
    return server


def new_place() -> str:
    return f"s3://{BUCKET}/{uuid.uuid4().hex}/run.zarr"


class TestS3Store(StoreContract):
    """The contract, on S3."""

    @pytest.fixture
    def place(self, tmp_path: Path, reachable: S3Server) -> str:
        return new_place()


def test_a_store_at_the_root_of_a_bucket_prefix_of_one_name(reachable: S3Server) -> None:
    place = f"s3://{BUCKET}/{uuid.uuid4().hex}"
    store = create_store(f"{place}/", IDENTITY)
    assert store.location == place
    assert open_store(place).identity == IDENTITY


def test_a_server_that_refuses_connections_is_not_reached(monkeypatch: pytest.MonkeyPatch) -> None:
    port = free_port()
    with s3_server(port) as running:
        for name, value in running.environment.items():
            monkeypatch.setenv(name, value)
        store = create_store(f"s3://{BUCKET}/s", IDENTITY)
        record = record_of(1)
        receipt = receipt_of(record, BATCHES[0])
        store.commit(receipt, record)
    other = receipt_of(record, BATCHES[1])
    assert code_of(lambda: store.commit(other, record)) == "QD408"
    assert code_of(store.receipts) == "QD408"
    assert code_of(lambda: store.read(receipt)) == "QD408"
    assert code_of(lambda: open_store(f"s3://{BUCKET}/s")) == "QD408"
    assert code_of(lambda: create_store(f"s3://{BUCKET}/new", IDENTITY)) == "QD408"


def test_a_server_that_comes_back_in_time_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    with s3_server() as running:
        for name, value in running.environment.items():
            monkeypatch.setenv(name, value)
        store = create_store(f"s3://{BUCKET}/s", IDENTITY)
        running.process.send_signal(signal.SIGSTOP)
        wake = f"import os, time; time.sleep(1); os.kill({running.process.pid}, {signal.SIGCONT:d})"
        waker = subprocess.Popen([sys.executable, "-c", wake])
        record = record_of(1)
        receipt = receipt_of(record, BATCHES[0])
        assert store.commit(receipt, record) is True
        assert_same(store.read(receipt), record)
        assert waker.wait(timeout=30) == 0


def test_a_bucket_that_is_not_there_is_not_reached(reachable: S3Server) -> None:
    assert code_of(lambda: open_store("s3://no-such-bucket/s")) == "QD402"
    assert code_of(lambda: create_store("s3://no-such-bucket/s", IDENTITY)) == "QD408"


def test_plain_http_must_be_allowed(reachable: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("AWS_ALLOW_HTTP")
    assert code_of(lambda: open_store(new_place())) == "QD408"


def test_the_location_alone_opens_the_store_elsewhere(reachable: S3Server) -> None:
    store = create_store(new_place(), IDENTITY)
    location = pickle.loads(pickle.dumps(store.location))
    program = (
        "import sys; from qdist.store.zarr_store import open_store;"
        "print(open_store(sys.argv[1]).identity.micro_batch)"
    )
    found = subprocess.run(
        [sys.executable, "-c", program, location], capture_output=True, text=True, check=True
    )
    assert found.stdout.strip() == str(IDENTITY.micro_batch)
