"""Stages on a real Ray: the same statistics, whoever dies on the way and whatever is lost."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from actors.calibrate import CalibrationProgress, calibrate
from actors.session import ClusterSpec, RaySession
from qdist.calibration import CalibrationJob, Merged, calibrate_here
from qdist.calibration.stage import stages_of
from qdist.errors import ConfigError, StoreError
from qdist.store.receipt import ShardReceipt
from qdist.store.zarr_store import ZarrStore, create_store
from tests.e2e.cluster import wait_until
from tests.staged import cut_up, job_of, layers, samples, saved_apart

WIDTH, N_LAYERS, N_SHARDS = 64, 6, 24
SOURCE = samples(2 * N_SHARDS, WIDTH)
SPEC = ClusterSpec(address=None, n_workers=2, cpus_per_worker=1, pipeline=True)


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> CalibrationJob:
    return job_of(saved_apart(layers(N_LAYERS, WIDTH), tmp_path_factory.mktemp("m")), SOURCE)


@pytest.fixture(scope="module")
def job(plain: CalibrationJob) -> CalibrationJob:
    made = cut_up(plain, range(100))
    assert len(made.observer.segments) > N_LAYERS
    return made


@pytest.fixture(scope="module")
def expected(plain: CalibrationJob, tmp_path_factory: pytest.TempPathFactory) -> str:
    store = create_store(tmp_path_factory.mktemp("s") / "s", plain.identity)
    return calibrate_here(plain, SOURCE, store).record.digest


class Watched:
    """A calibration in a pipeline, disturbed by ``at`` whenever it says something."""

    def __init__(self, job: CalibrationJob, folder: Path) -> None:
        self.job = job
        self.store: ZarrStore = create_store(folder / "s", job.identity)
        self.spool = folder / "s/spool"
        self.states: list[CalibrationProgress] = []
        self.most_in_spool = 0

    def run(
        self, at: Callable[[CalibrationProgress], None] | None = None, spec: ClusterSpec = SPEC
    ) -> Merged:
        def hear(state: CalibrationProgress) -> None:
            self.states.append(state)
            self.most_in_spool = max(self.most_in_spool, len(self.waiting()))
            if at is not None:
                at(state)

        return calibrate(self.job, SOURCE, self.store, spec, on_progress=hear)

    def waiting(self) -> list[Path]:
        return [path for path in self.spool.glob("*") if path.suffix != ".partial"]

    def receipts(self, stage: int) -> list[ShardReceipt]:
        """What was committed for a stage of two."""
        tensors = stages_of(self.job, 2)[stage].observer.taps.tensors
        return [receipt for receipt in self.store.receipts() if receipt.tensors == tensors]

    @property
    def said(self) -> str:
        return "\n".join(state.message for state in self.states if state.message)


def test_two_workers_share_a_model(
    job: CalibrationJob, expected: str, cluster: RaySession, tmp_path: Path
) -> None:
    run = Watched(job, tmp_path)
    assert run.run().record.digest == expected
    pids = [{r.made_by["pid"] for r in run.receipts(stage)} for stage in (0, 1)]
    assert [len(part) for part in pids] == [1, 1]
    assert pids[0] != pids[1]
    assert len(run.receipts(0)) == len(run.receipts(1)) == N_SHARDS
    assert len(run.store.receipts()) == 2 * N_SHARDS
    # Four shards under way, two micro-batches each, before and behind the stage that runs.
    assert 0 < run.most_in_spool <= 4 * 2 * 2
    assert run.waiting() == []
    done = [state.done for state in run.states]
    assert done == sorted(done)
    assert (done[-1], run.states[-1].total, run.states[0].resumed) == (48, 48, 0)
    assert max(state.n_workers for state in run.states) == 2
    (node,) = run.states[-1].nodes
    assert node.n_completed == 2 * N_SHARDS + 2  # and two that load
    assert wait_until(
        lambda: not any(Path(f"/proc/{pid}").exists() for part in pids for pid in part)
    )


@pytest.mark.parametrize("n_workers", [1, 2])
def test_sessions_that_do_not_fit_together_are_loaded_in_turn(
    n_workers: int, job: CalibrationJob, expected: str, cluster: RaySession, tmp_path: Path
) -> None:
    budget = max(s.estimate_bytes for s in job.observer.segments) + job.observer.spool_bytes
    chosen = replace(job.settings, memory_budget_bytes=budget, shard_samples=8)
    measuring = replace(job.measuring, settings=chosen)
    tight = replace(job, measuring=measuring, n_per_shard=8)
    assert not any(stage.holds for stage in stages_of(tight, n_workers))
    run = Watched(tight, tmp_path)
    assert run.run(spec=replace(SPEC, n_workers=n_workers)).record.digest == expected


@pytest.mark.parametrize("victim", [0, 1])
def test_a_stage_that_is_killed_goes_on(
    victim: int, job: CalibrationJob, expected: str, cluster: RaySession, tmp_path: Path
) -> None:
    run = Watched(job, tmp_path)
    killed: list[int] = []
    before: list[ShardReceipt] = []

    def kill(state: CalibrationProgress) -> None:
        if state.done >= 12 and not killed:
            killed.append(int(run.receipts(victim)[0].made_by["pid"]))
            os.kill(killed[0], signal.SIGKILL)
            before.extend(run.store.receipts())
            assert len(run.receipts(0)) < N_SHARDS, "too late to be in the middle"

    assert run.run(kill).record.digest == expected
    assert f"segments-{0 if not victim else stages_of(job, 2)[1].first}-" in run.said
    assert "is gone" in run.said
    assert f"pid {killed[0]}" in run.said
    assert len(run.store.receipts()) == 2 * N_SHARDS
    assert [receipt for receipt in before if receipt not in run.store.receipts()] == []
    assert len({r.made_by["pid"] for r in run.receipts(victim)}) == 2
    assert len({r.made_by["pid"] for r in run.receipts(1 - victim)}) == 1
    assert run.waiting() == []


@pytest.mark.parametrize("damage", [Path.unlink, lambda path: path.write_bytes(b"x")])
def test_a_lost_boundary_is_made_again(
    damage: Callable[[Path], object],
    job: CalibrationJob,
    expected: str,
    cluster: RaySession,
    tmp_path: Path,
) -> None:
    run = Watched(job, tmp_path)
    hit: list[str] = []

    def lose(state: CalibrationProgress) -> None:
        if "goes back" not in run.said:
            for path in run.waiting():
                try:
                    damage(path)
                except FileNotFoundError:
                    continue
                hit.append(path.name)

    assert run.run(lose).record.digest == expected
    assert hit
    assert "goes back: what was left before segment" in run.said
    assert run.states[-1].n_retried > 0
    assert len(run.store.receipts()) == 2 * N_SHARDS
    assert run.waiting() == []


def test_a_run_goes_on_where_another_stopped(
    job: CalibrationJob, expected: str, cluster: RaySession, tmp_path: Path
) -> None:
    first = Watched(job, tmp_path)

    def stop(state: CalibrationProgress) -> None:
        if state.done >= 12 and first.waiting():
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        first.run(stop)
    before = first.store.receipts()
    # Stages are not equally far, and what waits between them stays for the next run.
    assert 12 <= len(before) < 2 * N_SHARDS
    assert first.waiting()
    again = Watched(job, tmp_path)
    assert again.run().record.digest == expected
    assert again.states[-1].resumed >= 12
    after = again.store.receipts()
    assert len(after) == 2 * N_SHARDS
    assert [receipt for receipt in before if receipt not in after] == []
    assert again.waiting() == []


def test_other_divisions_and_no_division_go_on_from_each_other(
    plain: CalibrationJob, job: CalibrationJob, expected: str, cluster: RaySession, tmp_path: Path
) -> None:
    store = create_store(tmp_path / "s", plain.identity)
    part = replace(plain, grid=plain.grid[:10])
    calibrate(part, SOURCE, store, replace(SPEC, pipeline=False))
    assert len(store.receipts()) == 5
    run = Watched(job, tmp_path)
    assert run.run().record.digest == expected
    assert (run.states[0].done, run.states[0].total) == (10, 48)
    assert len(store.receipts()) == 5 + 2 * (N_SHARDS - 5)
    # And the whole model takes what the stages have measured.
    assert calibrate(plain, SOURCE, store, replace(SPEC, pipeline=False)).record.digest == expected
    assert len(store.receipts()) == 5 + 2 * (N_SHARDS - 5)


def test_what_keeps_getting_lost_is_an_error(
    job: CalibrationJob,
    cluster: RaySession,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    run = Watched(job, tmp_path)

    def lose(state: CalibrationProgress) -> None:
        for path in run.waiting():
            path.unlink(missing_ok=True)

    # Not every one is lost in time.
    monkeypatch.setattr("actors.pipeline._MAX_LOST", 0)
    with pytest.raises(StoreError, match=r"QD403.*folder spool"):
        run.run(lose)


def test_more_workers_than_segments_share_a_stage(
    plain: CalibrationJob, expected: str, cluster: RaySession, tmp_path: Path
) -> None:
    job = cut_up(plain, [3])
    assert len(job.observer.segments) == 2
    run = Watched(job, tmp_path)
    merged = run.run(spec=replace(SPEC, n_workers=3, cpus_per_worker=0.5))
    assert merged.record.digest == expected
    assert max(state.n_workers for state in run.states) == 3
    pids = [{r.made_by["pid"] for r in run.receipts(stage)} for stage in (0, 1)]
    # The heavier stage has two, none of which ever does the other stage's work.
    assert not pids[0] & pids[1]
    assert sorted(map(len, pids)) == [1, 2]


def test_blocks_and_the_whole_are_measured_once(
    plain: CalibrationJob, job: CalibrationJob, expected: str, cluster: RaySession, tmp_path: Path
) -> None:
    chosen = replace(job.settings, n_blocks=3)
    run = Watched(replace(job, measuring=replace(job.measuring, settings=chosen)), tmp_path)
    assert run.run().record.digest == expected
    assert len(run.store.receipts()) == 2 * N_SHARDS
    assert len(run.store.finished()) == 4
    assert len({r.made_by["pid"] for r in run.store.receipts()}) == 2, "the workers stay"


def test_a_model_in_one_piece_needs_no_pipeline(
    plain: CalibrationJob, expected: str, cluster: RaySession, tmp_path: Path
) -> None:
    run = Watched(plain, tmp_path)
    assert run.run().record.digest == expected
    assert "no pipeline is needed" in run.said
    assert len(run.store.receipts()) == N_SHARDS


def test_a_pipeline_without_a_budget_is_refused(
    plain: CalibrationJob, cluster: RaySession, tmp_path: Path
) -> None:
    chosen = replace(plain.settings, memory_budget_bytes=None)
    run = Watched(replace(plain, measuring=replace(plain.measuring, settings=chosen)), tmp_path)
    with pytest.raises(ConfigError, match="QD107"):
        run.run()


# --- memory -----------------------------------------------------------------------------------


def test_no_worker_holds_the_whole_model(cluster: RaySession, tmp_path: Path) -> None:
    width, n_layers = 2560, 8
    n_bytes = n_layers * width * width * 4
    source = samples(4, width)
    plain = job_of(saved_apart(layers(n_layers, width), tmp_path), source)

    def peaks(job: CalibrationJob, name: str) -> list[int]:
        store = create_store(tmp_path / name, job.identity)
        found: dict[int, int] = {}

        def look(state: CalibrationProgress) -> None:
            for pid in {int(receipt.made_by["pid"]) for receipt in store.receipts()}:
                found[pid] = max(peak_bytes(pid), found.get(pid, 0))

        merged = calibrate(job, source, store, SPEC, on_progress=look)
        digests.add(merged.record.digest)
        return list(found.values())

    digests: set[str] = set()
    whole = peaks(plain, "whole")
    parts = peaks(cut_up(plain, range(100)), "parts")
    assert len(digests) == 1
    assert len(parts) == 2
    assert max(whole) - max(parts) > 0.4 * n_bytes


def peak_bytes(pid: int) -> int:
    """Of a process; 0 for one that has ended."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0
    return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:"))
