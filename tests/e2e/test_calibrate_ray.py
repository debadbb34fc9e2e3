"""Laws 1 and 3 on a real Ray: the same statistics to the last bit, whatever happens on the way."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import actors.calibrate
from actors.calibrate import CalibrationProgress, calibrate
from actors.pool import WorkerPool
from actors.session import ClusterSpec, RaySession
from qdist.calibration import CalibrationJob, CalibrationSettings, Merged, calibrate_here, prepare
from qdist.data.arrays import ArraySource
from qdist.data.preprocess import Preprocess
from qdist.demo import demo_file
from qdist.model.freeze import freeze
from qdist.model.graph import Graph
from qdist.model.loading import load_model
from qdist.plan.choice import LayerChoice
from qdist.plan.planner import Planner
from qdist.store.zarr_store import ZarrStore, create_store, open_store
from tests.command_line import command, environment, here, succeed
from tests.onnx_models import EXECUTION

FROZEN = freeze(load_model(demo_file("digits_vit.onnx")))
GRAPH = Graph(FROZEN, EXECUTION)
SOURCE = ArraySource(
    path=demo_file("digits.npz"),
    inputs={"images": "calibration_images"},
    preprocess=Preprocess(scale=0.0625, mean=(0.3,), std=(0.37,)),
)
WORDS = (
    *("calibrate", "model=digits_vit", "data=digits", "tracking=none"),
    *("calibration.micro_batch=1", "calibration.shard_samples=2", "store.path=s.zarr"),
)


def job_of(shard_samples: int = 16, micro_batch: int = 1) -> CalibrationJob:
    settings = CalibrationSettings(micro_batch=micro_batch, shard_samples=shard_samples)
    return prepare(FROZEN, SOURCE, settings, EXECUTION, graph=GRAPH)


def store_of(path: Path, job: CalibrationJob) -> ZarrStore:
    return create_store(path, job.identity)


def plan_digest(job: CalibrationJob, merged: Merged) -> str:
    planner = Planner(GRAPH, merged.record, job.taps)
    return planner.plan({layer.name: LayerChoice() for layer in planner.layers}).digest


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """Digests of the statistics and of the plan, from one process without Ray."""
    job = job_of()
    merged = calibrate_here(job, SOURCE, store_of(tmp_path_factory.mktemp("here") / "s", job))
    return merged.record.digest, plan_digest(job, merged)


def run(
    path: Path,
    n_workers: int,
    job: CalibrationJob,
    on_progress: Callable[[CalibrationProgress], None] | None = None,
) -> Merged:
    spec = ClusterSpec(address=None, n_workers=n_workers, cpus_per_worker=1)
    return calibrate(job, SOURCE, store_of(path, job), spec, on_progress=on_progress)


@pytest.mark.parametrize(("n_workers", "shard_samples"), [(1, 16), (2, 16), (2, 7)])
def test_workers_and_shards_change_no_bit(
    n_workers: int,
    shard_samples: int,
    expected: tuple[str, str],
    cluster: RaySession,
    tmp_path: Path,
) -> None:
    job = job_of(shard_samples)
    merged = run(tmp_path / "s", n_workers, job)
    assert (merged.record.digest, plan_digest(job, merged)) == expected
    assert merged.n_shards == -(-160 // shard_samples)
    assert merged.record.n_samples == 160


def test_a_worker_that_is_killed_in_the_middle_changes_no_bit(
    expected: tuple[str, str], cluster: RaySession, tmp_path: Path
) -> None:
    job = job_of(shard_samples=2)
    store = store_of(tmp_path / "s", job)
    states: list[CalibrationProgress] = []
    killed: list[int] = []

    def watch(state: CalibrationProgress) -> None:
        states.append(state)
        if state.done >= 20 and not killed:
            pid = int(store.receipts()[0].made_by["pid"])
            os.kill(pid, signal.SIGKILL)
            killed.append(pid)
            assert state.done < 120, "too late to be in the middle"

    merged = run(tmp_path / "s", 2, job, watch)
    assert (merged.record.digest, plan_digest(job, merged)) == expected
    said = "\n".join(state.message for state in states if state.message)
    assert "is gone" in said
    assert "is tried again" in said
    assert f"pid {killed[0]}" in said
    assert states[-1].done == states[-1].total == 160
    n_merged = [state.n_merged for state in states if state.n_records == 80]
    assert n_merged == sorted(n_merged)
    assert n_merged[-1] == 80
    # As a tree: five nodes of sixteen, made by the workers.
    assert len(store.nodes()) == 5
    assert min(state.n_workers for state in states[2:]) == 1
    pids = {receipt.made_by["pid"] for receipt in store.receipts()}
    assert killed[0] in pids, "what the dead worker had finished still counts"


def test_a_worker_that_is_killed_while_merging_changes_no_bit(
    expected: tuple[str, str],
    cluster: RaySession,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With nothing to measure, and workers that have no model."""
    job = job_of(shard_samples=2)
    calibrate_here(job, SOURCE, store_of(tmp_path / "s", job))
    for part in ("finished", "merges", "nodes", "inner"):
        shutil.rmtree(tmp_path / "s" / part)
    pools: list[WorkerPool[Any, Any]] = []
    enter = WorkerPool.__enter__

    def seen(pool: WorkerPool[Any, Any]) -> WorkerPool[Any, Any]:
        pools.append(pool)
        return enter(pool)

    monkeypatch.setattr(WorkerPool, "__enter__", seen)
    monkeypatch.setattr(actors.calibrate, "is_worth_a_pool", lambda *_: True)
    states: list[CalibrationProgress] = []
    killed: list[int] = []

    def watch(state: CalibrationProgress) -> None:
        states.append(state)
        if state.n_merged and not killed:
            killed.append(int(pools[0].facts[0]["pid"]))
            os.kill(killed[0], signal.SIGKILL)
            assert state.n_merged < 80, "too late to be in the middle"

    merged = run(tmp_path / "s", 2, job, watch)
    assert (merged.record.digest, plan_digest(job, merged)) == expected
    assert len(pools) == len(killed) == 1
    said = "\n".join(state.message for state in states if state.message)
    # Whichever was ready first.
    assert said.count("worker merge-") == said.count(" is gone: ") == 1, said
    assert {(state.done, state.resumed) for state in states} == {(160, 160)}
    assert [state.n_merged for state in states if state.n_records][-1] == 80
    assert len(open_store(tmp_path / "s").nodes()) == 5


def test_a_damaged_record_is_measured_again_in_the_same_run(
    expected: tuple[str, str], cluster: RaySession, tmp_path: Path
) -> None:
    job = job_of()
    calibrate_here(job, SOURCE, store_of(tmp_path / "s", job))
    shutil.rmtree(tmp_path / "s/merges")
    damaged = sorted((tmp_path / "s/records").iterdir())[3]
    damaged.write_bytes(b"x")
    states: list[CalibrationProgress] = []
    merged = run(tmp_path / "s", 1, job, states.append)
    assert (merged.record.digest, plan_digest(job, merged)) == expected
    assert [state.message for state in states if "again" in state.message] == [
        "16 samples to measure again: their records are damaged or gone"
    ]
    assert (states[-1].done, states[-1].resumed, states[-1].n_merged) == (160, 144, 10)


# --- the driver as a process --------------------------------------------------------------


class Driver:
    """`qdist` as a process whose descendants carry a mark in their environment."""

    def __init__(self, folder: Path) -> None:
        self._mark = f"QDIST_TEST_MARK={uuid.uuid4().hex}"
        name, _, text = self._mark.partition("=")
        self.output = folder / "output.txt"
        with self.output.open("wb") as output:
            self.process = subprocess.Popen(
                command(*WORDS),
                cwd=folder,
                env=environment({name: text}),
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def descendants(self) -> list[int]:
        """Processes that are alive and carry the mark."""
        found = []
        for entry in Path("/proc").iterdir():
            if not entry.name.isdecimal():
                continue
            try:
                is_ours = self._mark.encode() in (entry / "environ").read_bytes()
                is_zombie = "\nState:\tZ" in (entry / "status").read_text()
            except OSError:
                continue
            if is_ours and not is_zombie:
                found.append(int(entry.name))
        return found

    def wait_until_alone(self) -> None:
        """Until nothing of it is left, ourselves aside; fails after 90 s.

        Ray's agents look for their parent every few seconds.
        """
        deadline = time.monotonic() + 90
        while self.descendants():
            assert time.monotonic() < deadline, self._names()
            time.sleep(0.2)

    def _names(self) -> list[str]:
        return [Path(f"/proc/{pid}/cmdline").read_text() for pid in self.descendants()]


@pytest.fixture
def driver(tmp_path: Path) -> Iterator[Driver]:
    made = Driver(tmp_path)
    try:
        yield made
    finally:
        for pid in made.descendants():
            os.kill(pid, signal.SIGKILL)
        made.process.wait()


def finished(folder: Path) -> dict[str, int]:
    """Receipt -> when it was written, in nanoseconds."""
    paths = (folder / "s.zarr/receipts").glob("*.json")
    return {path.stem: path.stat().st_mtime_ns for path in paths}


def wait_for_shards(driver: Driver, folder: Path, n: int) -> None:
    deadline = time.monotonic() + 60
    while len(finished(folder)) < n:
        assert driver.process.poll() is None, driver.output.read_text()
        assert time.monotonic() < deadline, driver.output.read_text()
        time.sleep(0.02)


def settle(folder: Path) -> None:
    """Until workers that outlive their driver for a moment have written what they had begun."""
    n = -1
    while n != len(finished(folder)):
        n = len(finished(folder))
        time.sleep(0.5)


def test_a_driver_that_is_killed_goes_on_where_it_was(
    driver: Driver,
    expected: tuple[str, str],
    cluster: RaySession,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    wait_for_shards(driver, tmp_path, 10)
    driver.process.send_signal(signal.SIGKILL)
    assert driver.process.wait(10) == -signal.SIGKILL
    settle(tmp_path)
    before = finished(tmp_path)
    assert 10 <= len(before) < 80, "not in the middle"
    monkeypatch.chdir(tmp_path)
    assert here("quantize", "model=digits_vit", "tracking=none", "store.path=s.zarr").status == 2

    out = succeed(*WORDS)
    assert f"{expected[0][:16]}" in out
    after = finished(tmp_path)
    assert len(after) == 80
    assert {name: after[name] for name in before} == before, "measured again"

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("nothing is left to measure, so nothing needs Ray")

    monkeypatch.setattr(actors.calibrate, "ray_session", refuse)
    monkeypatch.setattr(actors.calibrate, "WorkerPool", refuse)
    out = succeed(*WORDS)
    assert "calibrating: 160/160 samples, all of it done before" in out
    assert f"{expected[0][:16]}" in out
    # Another shard size asks for the same micro-batches, which are all there.
    out = succeed(*(w.replace("shard_samples=2", "shard_samples=32") for w in WORDS))
    assert "all of it done before" in out
    assert finished(tmp_path) == after
    driver.wait_until_alone()


def test_ctrl_c_ends_everything_and_keeps_what_is_done(driver: Driver, tmp_path: Path) -> None:
    wait_for_shards(driver, tmp_path, 5)
    os.killpg(driver.process.pid, signal.SIGINT)  # as a terminal does: to the whole group
    assert driver.process.wait(30) == 130
    driver.wait_until_alone()
    text = driver.output.read_text()
    assert "stopped; what was measured is kept" in text
    assert "Traceback" not in text
    n_done = len(finished(tmp_path))
    assert 5 <= n_done < 80
    store = open_store(tmp_path / "s.zarr")
    assert len(store.receipts()) == n_done
    for receipt in store.receipts():
        assert store.read(receipt).digest == receipt.record_digest
