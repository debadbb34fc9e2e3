"""Every command on a store in an object store, on a server that speaks S3."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from qdist.store.zarr_store import open_store
from tests.command_line import check_error, here, process, succeed
from tests.s3_server import BUCKET, S3Server, free_port, s3_server

STORE = f"s3://{BUCKET}/team/digits.zarr"
WORDS = ("model=digits_cnn", "data=digits", "tracking=none", f"store.path={STORE}")


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[S3Server]:
    with s3_server() as running:
        for name, value in running.environment.items():
            monkeypatch.setenv(name, value)
        yield running


def test_all_commands_on_one_store_in_a_bucket(
    server: S3Server, cnn_runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "300")
    # A Ray of its own, whose two workers have the server's address and keys.
    done = process("calibrate", *WORDS, "calibration.shard_samples=32", cwd=tmp_path)
    assert done.status == 0, done.err
    assert STORE in done.out
    remote, local = open_store(STORE), open_store(cnn_runs / "digits_cnn" / "calibration.zarr")
    assert remote.location == STORE
    assert remote.latest().record.digest == local.latest().record.digest
    assert len(remote.receipts()) == 5
    again = succeed("calibrate", *WORDS)
    assert "all of it done before" in again
    assert "160 samples" in succeed("show", STORE, "--rows", "3")
    succeed("quantize", "model=digits_cnn", "tracking=none", f"store.path={STORE}")
    quantized = tmp_path / "qdist-runs" / "digits_cnn" / "model.onnx"
    assert quantized.read_bytes() == (cnn_runs / "digits_cnn" / "model.onnx").read_bytes()
    succeed("store", "export", STORE, "run.qdist")
    succeed("store", "import", "run.qdist", f"{STORE}.copy")
    assert open_store(f"{STORE}.copy").latest().record.digest == local.latest().record.digest
    assert "0 leftovers removed" in succeed("store", "sweep", STORE)
    # Nothing of the store is on the disk.
    assert not list(tmp_path.rglob("*.zarr"))
    missing = f"s3://{BUCKET}/nothing.zarr"
    nothing = here("quantize", "model=digits_cnn", "tracking=none", f"store.path={missing}")
    check_error(nothing, "QD402", missing)


def test_a_server_that_is_not_there_is_said_before_anything_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "somebody")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{free_port()}")
    monkeypatch.setenv("AWS_ALLOW_HTTP", "true")
    monkeypatch.setenv("AWS_REGION", "us-east-1")
    check_error(here("calibrate", *WORDS, "cluster.store_patience_s=0"), "QD408", STORE)
