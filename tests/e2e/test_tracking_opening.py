"""Opening a tracker: what works from the first use on, and what is refused before any work."""

from __future__ import annotations

import os
import socket
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

import pytest

from qdist.cli.tracking import open_tracker
from qdist.errors import ConfigError, TrackingError
from tests.e2e.mlflow_server import free_port
from tests.e2e.tracked import client_for, made_uri, spec, sqlite_uri


def test_sqlite_artifacts_land_beside_the_database(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    before = dict(os.environ)
    with (
        open_tracker(spec("sqlite:///here/mlflow.db"), spool_folder=Path("out")) as tracker,
        tracker.start_run("r", command="search", config={}) as run,
    ):
        (tmp_path / "elsewhere").mkdir()
        monkeypatch.chdir(tmp_path / "elsewhere")
        run.log_text("x", "note.txt")
    stored = tmp_path / "here" / "mlartifacts" / run.id / "artifacts" / "note.txt"
    assert stored.read_text() == "x"
    assert list((tmp_path / "elsewhere").iterdir()) == []
    assert sorted(path.name for path in tmp_path.iterdir()) == ["elsewhere", "here"]
    leaked = {key for key in os.environ if key.startswith("MLFLOW")} - set(before)
    assert leaked == set()


FIRST_USE = """
import sys, time
from pathlib import Path
from qdist.cli.tracking import TrackingSpec, open_tracker
import mlflow
folder = Path(sys.argv[1])
(folder / f"ready{sys.argv[2]}").touch()
while not (folder / "go").exists():
    time.sleep(0.005)
spec = TrackingSpec(uri=f"sqlite:///{folder / 'mlflow.db'}", experiment="digits",
                    artifacts="all", enabled=True, run_name=None)
with open_tracker(spec, spool_folder=folder) as tracker:
    with tracker.start_run(f"run {sys.argv[2]}", command="search", config={}) as run:
        run.log_metrics({"score": 1.0})
    print(tracker.n_spooled)
"""


def test_two_first_users_at_once(tmp_path: Path) -> None:
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", FIRST_USE, str(tmp_path), str(number)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for number in range(2)
    ]
    try:
        deadline = time.monotonic() + 60
        while len(list(tmp_path.glob("ready*"))) < 2 and time.monotonic() < deadline:
            time.sleep(0.05)
        (tmp_path / "go").touch()  # both have MLflow loaded: they meet at the database
        outputs = [process.communicate(timeout=60) for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0, 0], outputs
    assert [out for out, _ in outputs] == ["0\n", "0\n"]
    client = client_for(sqlite_uri(tmp_path))
    experiment = client.get_experiment_by_name("digits")
    runs = client.search_runs([experiment.experiment_id])
    assert sorted(run.info.run_name for run in runs) == ["run 0", "run 1"]
    assert not list(tmp_path.glob(".*partial"))


def test_a_first_use_killed_halfway_does_not_spoil_the_next(tmp_path: Path) -> None:
    (tmp_path / "go").touch()
    process = subprocess.Popen([sys.executable, "-c", FIRST_USE, str(tmp_path), "0"])
    partial = tmp_path / ".mlflow.db.partial"
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and not (partial.exists() and partial.stat().st_size):
        time.sleep(0.005)
    process.kill()
    process.wait(timeout=10)
    assert partial.exists()  # else it was killed too early or too late to show anything
    assert not (tmp_path / "mlflow.db").exists()
    with (
        open_tracker(spec(sqlite_uri(tmp_path)), spool_folder=tmp_path) as tracker,
        tracker.start_run("r", command="search", config={}) as run,
    ):
        run.log_metrics({"score": 1.0})
    assert tracker.n_spooled == 0
    assert not partial.exists()


def test_no_server_is_said_at_once(tmp_path: Path) -> None:
    started = time.monotonic()
    with pytest.raises(TrackingError, match="QD901") as caught:
        open_tracker(
            spec(f"http://user:secret@127.0.0.1:{free_port()}"), spool_folder=tmp_path / "out"
        )
    assert time.monotonic() - started < 15
    assert "secret" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_a_server_that_never_answers_is_said_soon(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        started = time.monotonic()
        with pytest.raises(TrackingError, match="QD901"):
            open_tracker(spec(f"http://127.0.0.1:{silent.getsockname()[1]}"), spool_folder=tmp_path)
        assert time.monotonic() - started < 15


def test_unusable_databases_are_refused_and_left_alone(tmp_path: Path) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("a regular file where a folder should be")
    corrupt = tmp_path / "corrupt.db"
    corrupt.write_bytes(b"not a database " * 1000)
    foreign = tmp_path / "foreign.db"
    with sqlite3.connect(foreign) as connection:
        connection.execute("CREATE TABLE customers (name TEXT)")
    connection.close()
    contents = {path: path.read_bytes() for path in (blocked, corrupt, foreign)}
    for path, reason in [
        (blocked / "mlflow.db", "file"),
        (tmp_path, "unable to open"),
        (corrupt, "file is not a database"),
        (foreign, "another program"),
    ]:
        started = time.monotonic()
        with pytest.raises(TrackingError, match="QD902") as caught:
            open_tracker(spec(f"sqlite:///{path}"), spool_folder=tmp_path)
        assert reason in caught.value.got.lower()
        assert time.monotonic() - started < 15
    assert contents == {path: path.read_bytes() for path in contents}


def test_a_damaged_mlflow_database_is_refused(tmp_path: Path) -> None:
    uri = made_uri(tmp_path)
    open_tracker(spec(uri), spool_folder=tmp_path)
    with sqlite3.connect(tmp_path / "mlflow.db") as connection:
        connection.execute("UPDATE alembic_version SET version_num = 'from-the-future'")
    connection.close()
    # MLflow keeps opened stores by URI, so another spelling of the path makes it look again.
    with pytest.raises(TrackingError, match="QD902"):
        open_tracker(
            spec(f"sqlite:///{tmp_path}/../{tmp_path.name}/mlflow.db"), spool_folder=tmp_path
        )


def test_a_deleted_experiment_is_said(tmp_path: Path) -> None:
    uri = made_uri(tmp_path)
    open_tracker(spec(uri), spool_folder=tmp_path)
    client = client_for(uri)
    client.delete_experiment(client.get_experiment_by_name("digits").experiment_id)
    with pytest.raises(ConfigError, match="was deleted"):
        open_tracker(spec(uri), spool_folder=tmp_path)


@pytest.mark.parametrize(
    "uri", ["", "mlruns", "sqlite://", "sqlite:///", "sqlite:///:memory:", "http://", "ftp://x"]
)
def test_unknown_uris_are_refused(uri: str) -> None:
    with pytest.raises(ConfigError, match=r"QD104.*tracking\.uri"):
        spec(uri)


DISABLED = """
import sys
from pathlib import Path
from qdist.cli.tracking import TrackingSpec, open_tracker
folder = Path(sys.argv[1])
spec = TrackingSpec(uri="", experiment="", artifacts="all", enabled=False, run_name=None)
with open_tracker(spec, spool_folder=folder / "out") as tracker:
    with tracker.start_run("r", command="search", config={"a": 1}, params={"b": 2}) as run:
        with run.start_child("trial-000", number=0) as child:
            child.log_metrics({"score": float("nan")})
            child.log_artifact(Path(sys.executable))
            child.log_table([{"a": 1}], "t")
    print(tracker.n_spooled, run.url)
assert "mlflow" not in sys.modules
"""


def test_disabled_tracking_writes_nothing_and_does_not_import_mlflow(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", DISABLED, str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == "0 tracking is off (tracking.enabled=false)\n"
    assert list(tmp_path.iterdir()) == []
