"""`qdist calibrate cluster.pipeline=true` on two nodes whose workers, driver and nodes die.

Whatever happens, the statistics are those of the whole model in one process, nothing that was
committed is committed again, and no worker outlives its run.
"""

from __future__ import annotations

import functools
import os
import signal
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import pytest

from qdist.calibration import CalibrationSettings, prepare
from qdist.data.arrays import ArraySource
from qdist.data.preprocess import Preprocess
from qdist.demo import demo_file
from qdist.errors import ModelError
from qdist.model.estimate import BASE_BYTES
from qdist.model.freeze import freeze
from qdist.model.loading import load_model
from qdist.store.receipt import ShardReceipt
from tests.command_line import check_error, here
from tests.e2e.cluster import Command, RayCluster, statistics, wait_until
from tests.e2e.committed import n_committed, receipts
from tests.onnx_models import EXECUTION

pytestmark = pytest.mark.slow

N_SHARDS = 40
WORDS = (
    *("calibrate", "model=digits_vit", "data=digits", "tracking=none", "store.path=s.zarr"),
    *("calibration.micro_batch=1", "calibration.shard_samples=4"),
)
MIB = 1 << 20
PIXELS = Preprocess(scale=0.0625, mean=(0.3,), std=(0.37,))


@pytest.fixture(scope="module")
def nodes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RayCluster]:
    """Two nodes of one CPU."""
    made = RayCluster(tmp_path_factory.mktemp("cluster"), n_others=1)
    try:
        yield made
    finally:
        made.close()


@pytest.fixture(scope="module")
def expected(nodes: RayCluster, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The digest of the statistics of the whole model, in workers that hold all of it."""
    folder = tmp_path_factory.mktemp("whole")
    run = Command(*WORDS, f"cluster.address={nodes.address}", folder=folder, extra=nodes.extra)
    digest = statistics(run.finish())
    assert len(receipts(folder)) == N_SHARDS
    return digest


@functools.cache
def budget() -> int:
    """A memory budget, in MiB, by which the model is cut into four segments or more."""
    frozen = freeze(load_model(demo_file("digits_vit.onnx")))
    source = ArraySource(
        path=demo_file("digits.npz"), inputs={"images": "calibration_images"}, preprocess=PIXELS
    )
    large = CalibrationSettings(micro_batch=1, memory_budget_bytes=1 << 40)
    job = prepare(frozen, source, large, EXECUTION)
    for n_mib in range(BASE_BYTES // MIB, 4 * BASE_BYTES // MIB):
        chosen = replace(large, memory_budget_bytes=n_mib * MIB)
        # Less than the least (QD211) is not what is looked for.
        with suppress(ModelError):
            spec = replace(job.measuring, settings=chosen).observer(job.taps)
            if len(spec.segments) >= 4:
                return n_mib
    raise AssertionError("no such budget")


def start(nodes: RayCluster, folder: Path) -> Command:
    pipeline = ("cluster.pipeline=true", "cluster.workers=2", "cluster.ready_timeout_s=60")
    words = (f"calibration.memory_budget={budget()}MiB", f"cluster.address={nodes.address}")
    return Command(*WORDS, *pipeline, *words, folder=folder, extra=nodes.extra)


def wait_for(run: Command, folder: Path, n: int) -> list[ShardReceipt]:
    """Until ``n`` shards and stages are committed; what is, in the middle of the run."""
    run.wait_until(lambda: n_committed(folder) >= n)
    found = receipts(folder)
    assert len(found) < 2 * N_SHARDS, "too late to be in the middle"
    return found


def check(
    run: Command, folder: Path, nodes: RayCluster, expected: str, before: list[ShardReceipt]
) -> str:
    """It ends as it should; what it printed."""
    printed = run.finish()
    assert statistics(printed) == expected
    after = receipts(folder)
    # A receipt says which process made it and how long that took.
    assert [receipt for receipt in before if receipt not in after] == []
    counted = Counter((b, tensor) for r in after for b in r.batches for tensor in r.tensors)
    assert set(counted.values()) == {1}, "each tensor of each micro-batch once"
    # Of a write that was killed half of it may be left, as anywhere in a store.
    assert {path.suffix for path in (folder / "s.zarr/spool").iterdir()} <= {".partial"}
    assert wait_until(lambda: not nodes.workers()), "workers outlived their run"
    assert wait_until(lambda: not run.family()), run.output
    return printed


def test_a_killed_worker_and_a_killed_driver(
    nodes: RayCluster, expected: str, tmp_path: Path
) -> None:
    first = start(nodes, tmp_path)
    wait_for(first, tmp_path, 10)
    os.kill(nodes.workers()[0], signal.SIGKILL)
    wait_for(first, tmp_path, 30)
    first.kill()
    assert wait_until(lambda: not nodes.workers()), "workers outlived their driver"
    before = receipts(tmp_path)
    assert "is gone" in first.output
    again = start(nodes, tmp_path)
    check(again, tmp_path, nodes, expected, before)
    assert len(receipts(tmp_path)) == 2 * N_SHARDS


def test_a_killed_node(nodes: RayCluster, expected: str, tmp_path: Path) -> None:
    """The model is then divided among those that are left; here one worker holds all of it."""
    run = start(nodes, tmp_path)
    before = wait_for(run, tmp_path, 10)
    assert len({receipt.made_by["pid"] for receipt in before}) == 2
    nodes.kill_node()
    try:
        printed = check(run, tmp_path, nodes, expected, before)
    finally:
        nodes.add_node()
    assert "is gone" in printed
    assert "the model is divided among 1 workers from here on" in printed


def test_settings_that_contradict_each_other_start_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    check_error(here(*WORDS, "cluster.pipeline=true"), "QD107", "calibration.memory_budget")
