"""Workers, nodes, drivers and disks that fail while `qdist calibrate` runs on two nodes.

Whatever happens, the statistics end up the same to the last bit, nothing that was finished is
measured again, what happened is said, and no worker outlives its run.
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from qdist.store.receipt import ShardReceipt
from tests.command_line import check_error, here
from tests.e2e.cluster import Command, RayCluster, statistics, wait_until
from tests.e2e.committed import n_committed, receipts

pytestmark = pytest.mark.slow

N_SHARDS = 80
WORDS = (
    *("calibrate", "model=digits_cnn", "data=digits", "tracking=none", "store.path=s.zarr"),
    *("calibration.micro_batch=1", "calibration.shard_samples=2"),
)


@pytest.fixture(scope="module")
def nodes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RayCluster]:
    """Two nodes of one CPU."""
    made = RayCluster(tmp_path_factory.mktemp("cluster"), n_others=1)
    try:
        yield made
    finally:
        made.close()


@pytest.fixture(scope="module")
def undisturbed(nodes: RayCluster, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """The digest of the statistics, and the store, of a run that nothing happens to."""
    folder = tmp_path_factory.mktemp("undisturbed")
    printed = start(nodes, folder).finish()
    assert "is gone" not in printed
    assert len(receipts(folder)) == N_SHARDS
    return statistics(printed), folder / "s.zarr"


def start(nodes: RayCluster, folder: Path, *words: str) -> Command:
    return Command(
        *WORDS, f"cluster.address={nodes.address}", *words, folder=folder, extra=nodes.extra
    )


def wait_for_shards(run: Command, folder: Path, n: int) -> None:
    """Until ``n`` are finished, in the middle of the run."""
    run.wait_until(lambda: n_committed(folder) >= n)
    assert n_committed(folder) < N_SHARDS, "too late to be in the middle"


def check_kept(before: list[ShardReceipt], folder: Path) -> None:
    """All is finished, and nothing of what was finished ``before`` was measured again."""
    after = receipts(folder)
    assert len(after) == N_SHARDS
    # A receipt says which process made it and how long that took.
    assert [receipt for receipt in before if receipt not in after] == []


def check_nobody_left(nodes: RayCluster, *runs: Command) -> None:
    assert wait_until(lambda: not nodes.workers()), "workers outlived their run"
    for run in runs:
        assert wait_until(lambda run=run: not run.family()), run.output  # type: ignore[misc]


def kill_worker(nodes: RayCluster, run: Command, dice: random.Random) -> None:
    """Kill one of the workers, as soon as there is one."""
    run.wait_until(lambda: bool(nodes.workers()))
    os.kill(dice.choice(nodes.workers()), signal.SIGKILL)


def test_killed_workers(nodes: RayCluster, undisturbed: tuple[str, Path], tmp_path: Path) -> None:
    dice = random.Random(0)
    run = start(nodes, tmp_path)
    for moment in sorted(dice.sample(range(4, 60), k=3)):
        wait_for_shards(run, tmp_path, moment)
        kill_worker(nodes, run, dice)
        before = receipts(tmp_path)
    printed = run.finish()
    assert statistics(printed) == undisturbed[0]
    assert printed.count("is gone") == 3
    check_kept(before, tmp_path)
    check_nobody_left(nodes, run)


def test_killed_driver_whose_workers_were_killed_before_and_after(
    nodes: RayCluster, undisturbed: tuple[str, Path], tmp_path: Path
) -> None:
    dice = random.Random(1)
    first = start(nodes, tmp_path)
    wait_for_shards(first, tmp_path, dice.randrange(4, 20))
    kill_worker(nodes, first, dice)
    wait_for_shards(first, tmp_path, dice.randrange(20, 40))
    first.kill()
    # The cluster ends the workers of a driver that is gone.
    check_nobody_left(nodes, first)
    before = receipts(tmp_path)
    assert len(before) < N_SHARDS
    again = start(nodes, tmp_path)
    wait_for_shards(again, tmp_path, len(before) + dice.randrange(4, 20))
    kill_worker(nodes, again, dice)
    assert statistics(again.finish()) == undisturbed[0]
    check_kept(before, tmp_path)
    check_nobody_left(nodes, again)


def test_two_drivers_on_one_store(
    nodes: RayCluster, undisturbed: tuple[str, Path], tmp_path: Path
) -> None:
    first = start(nodes, tmp_path, "cluster.workers=1")
    wait_for_shards(first, tmp_path, 1)
    # It stands still until the second has committed something, so that they surely overlap.
    (paused,) = {receipt.made_by["pid"] for receipt in receipts(tmp_path)}
    os.kill(paused, signal.SIGSTOP)
    try:
        second = start(nodes, tmp_path, "cluster.workers=1")
        wait_for_shards(second, tmp_path, n_committed(tmp_path) + 1)
    finally:
        os.kill(paused, signal.SIGCONT)
    for run in (first, second):
        assert statistics(run.finish()) == undisturbed[0]
    made = receipts(tmp_path)
    assert len(made) == N_SHARDS, "each shard once, whoever measured it"
    assert len({receipt.made_by["pid"] for receipt in made}) == 2
    check_nobody_left(nodes, first, second)


def test_store_that_is_away_for_a_moment(
    nodes: RayCluster, undisturbed: tuple[str, Path], tmp_path: Path
) -> None:
    store, away = tmp_path / "s.zarr", tmp_path / "away.zarr"
    run = start(nodes, tmp_path)
    wait_for_shards(run, tmp_path, 10)
    store.rename(away)
    run.wait_until(lambda: "QD408" in run.output)
    assert not store.exists(), "half a store was made in its place"
    away.rename(store)
    before = receipts(tmp_path)
    assert len(before) < N_SHARDS
    printed = run.finish()
    assert statistics(printed) == undisturbed[0]
    assert "the store cannot be reached" in printed
    assert "\nworker " not in printed, "that the store is away costs no worker"
    check_kept(before, tmp_path)
    check_nobody_left(nodes, run)


def test_flipped_bits(nodes: RayCluster, undisturbed: tuple[str, Path], tmp_path: Path) -> None:
    shutil.copytree(undisturbed[1], tmp_path / "s.zarr")
    # Else no record would be read that an inner node of the merge stands for.
    shutil.rmtree(tmp_path / "s.zarr" / "nodes")
    before = receipts(tmp_path)
    damaged = flip_bits(tmp_path / "s.zarr", random.Random(3))
    assert len(damaged) >= 2, "a shard's record and the merged one"
    check_error(here("show", str(tmp_path / "s.zarr")), "QD403")
    run = start(nodes, tmp_path)
    printed = run.finish()
    assert statistics(printed) == undisturbed[0]
    assert "2 samples to measure again: their records are damaged or gone" in printed
    after = receipts(tmp_path)
    assert len(after) == N_SHARDS
    assert sum(receipt not in before for receipt in after) == 1
    assert here("show", str(tmp_path / "s.zarr")).status == 0
    check_nobody_left(nodes, run)


def flip_bits(store: Path, dice: random.Random) -> list[Path]:
    """Flip one bit of one file in every part of the store that holds statistics."""
    damaged = []
    for part in sorted(path for path in store.iterdir() if path.is_dir()):
        files = sorted(p for p in part.rglob("*") if p.is_file() and p.suffix != ".json")
        if files:
            file = dice.choice(files)
            data = bytearray(file.read_bytes())
            position = dice.randrange(8 * len(data))
            data[position // 8] ^= 1 << position % 8
            file.write_bytes(data)
            damaged.append(file)
    return damaged


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """An empty file system of 8 MB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(folder)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("mounting a small file system needs root")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def test_full_disk(
    nodes: RayCluster, undisturbed: tuple[str, Path], small_disk: Path, tmp_path: Path
) -> None:
    blocks = [path.stat().st_blocks for path in undisturbed[1].rglob("*") if path.is_file()]
    free = os.statvfs(small_disk).f_bavail * os.statvfs(small_disk).f_frsize
    # Room for less than half of the store: it fills in the middle.
    ballast = small_disk / "ballast"
    ballast.write_bytes(bytes(free - 512 * sum(blocks) * 2 // 5))
    first = start(nodes, small_disk)
    assert first.process.wait(60) == 2
    (line,) = [line for line in first.output.splitlines() if line.startswith("error: ")]
    assert line.startswith("error: QD404 "), first.output
    assert "No space left on device" in line
    assert "Traceback" not in first.output
    check_nobody_left(nodes, first)
    before = receipts(small_disk)
    assert 0 < len(before) < N_SHARDS
    ballast.unlink()
    again = start(nodes, small_disk)
    assert statistics(again.finish()) == undisturbed[0]
    check_kept(before, small_disk)
    check_nobody_left(nodes, again)


def test_frozen_worker(nodes: RayCluster, undisturbed: tuple[str, Path], tmp_path: Path) -> None:
    run = start(nodes, tmp_path)
    wait_for_shards(run, tmp_path, 10)
    frozen = nodes.workers()[0]
    os.kill(frozen, signal.SIGSTOP)
    # Its task may take an hour by default; another worker, idle at the end, does it as well.
    printed = run.finish()
    assert statistics(printed) == undisturbed[0]
    assert f"pid {frozen}) has been busy for" in printed
    assert len(receipts(tmp_path)) == N_SHARDS
    check_nobody_left(nodes, run)


def test_lost_node(nodes: RayCluster, undisturbed: tuple[str, Path], tmp_path: Path) -> None:
    """The last one, for the node does not come back."""
    run = start(nodes, tmp_path)
    wait_for_shards(run, tmp_path, 10)
    run.wait_until(lambda: len(nodes.workers()) == 2)
    nodes.kill_node()
    before = receipts(tmp_path)
    printed = run.finish()
    assert statistics(printed) == undisturbed[0]
    assert "is gone" in printed
    check_kept(before, tmp_path)
    assert len({receipt.made_by["pid"] for receipt in receipts(tmp_path)}) == 2
    check_nobody_left(nodes, run)
