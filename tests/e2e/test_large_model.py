"""A model of more than 2 GiB, which no protobuf can hold whole, with its peak memory watched.

Every step runs in a process of its own (this file as a program), so that its peak is its own.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import onnx.checker
import pytest
from onnx import TensorProto, helper

from qdist.calibration import CalibrationSettings, calibrate_here, prepare
from qdist.data.arrays import ArraySource
from qdist.emit.qdq import emit_qdq
from qdist.model.freeze import FrozenModel, freeze
from qdist.model.graph import Graph
from qdist.model.loading import load_model
from qdist.model.session import Execution, run, scoring_session
from qdist.plan.choice import LayerChoice
from qdist.plan.planner import Planner
from qdist.plan.target import Target
from qdist.store.zarr_store import create_store, open_store

WIDTH = 8192
N_LAYERS = 10
N_MODEL_BYTES = N_LAYERS * WIDTH * WIDTH * 4
GIB = 1 << 30
N_FREE_BYTES = 8 * GIB
EXECUTION = Execution()


def memory_available() -> int:
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return 0


# The steps, each a function of the folder they share.


def write(folder: Path) -> None:
    """h += relu(h @ w), ten times; the weights are streamed, tile after tile, to one file."""
    nodes, weights = [], []
    rng = np.random.default_rng(0)
    tile = rng.normal(size=(512, WIDTH)).astype(np.float32) / np.float32(np.sqrt(WIDTH))
    with (folder / "model.data").open("wb") as file:
        for i in range(N_LAYERS):
            weight = TensorProto(name=f"w{i}", data_type=TensorProto.FLOAT, dims=[WIDTH, WIDTH])
            weight.data_location = TensorProto.EXTERNAL
            for key, text in (
                ("location", "model.data"),
                ("offset", str(file.tell())),
                ("length", str(WIDTH * WIDTH * 4)),
            ):
                weight.external_data.add(key=key, value=text)
            weights.append(weight)
            for j in range(WIDTH // len(tile)):
                file.write(np.roll(tile, 37 * i + 101 * j, axis=1).tobytes())
            nodes += [
                helper.make_node("MatMul", [f"h{i}", f"w{i}"], [f"m{i}"], f"matmul{i}"),
                helper.make_node("Relu", [f"m{i}"], [f"r{i}"], f"relu{i}"),
                helper.make_node("Add", [f"h{i}", f"r{i}"], [f"h{i + 1}"], f"add{i}"),
            ]
    ends = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, ["b", WIDTH])
        for name in ("h0", f"h{N_LAYERS}")
    ]
    graph = helper.make_graph(nodes, "large", ends[:1], ends[1:], weights)
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8)
    (folder / "model.onnx").write_bytes(proto.SerializeToString())
    np.save(folder / "x.npy", rng.normal(size=(1, WIDTH)).astype(np.float32))


def prepared(folder: Path) -> tuple[FrozenModel, ArraySource]:
    frozen = freeze(load_model(folder / "model.onnx"))
    return frozen, ArraySource(path=folder / "x.npy", inputs={"h0": ""})


def calibrate(folder: Path) -> None:
    frozen, source = prepared(folder)
    job = prepare(frozen, source, CalibrationSettings(), EXECUTION)
    store = create_store(folder / "store", job.identity)
    calibrate_here(job, source, store)


def quantize(folder: Path) -> None:
    frozen, _ = prepared(folder)
    store = open_store(folder / "store")
    merge = store.latest()
    planner = Planner(Graph(frozen), merge.record, merge.taps)
    plan = planner.plan({layer.name: LayerChoice() for layer in planner.layers})
    target = Target(name="any", precisions=("int8",))
    emit_qdq(frozen, target.project(plan), folder / "out" / "quantized.onnx", check=True)


def score(folder: Path) -> None:
    x = np.load(folder / "x.npy")
    outputs = []
    for path in (folder / "model.onnx", folder / "out" / "quantized.onnx"):
        (found,) = run(scoring_session(path, EXECUTION), None, {"h0": x})
        outputs.append(found.astype(np.float64))
    expected, found = outputs
    ratio = np.linalg.norm(expected) / np.linalg.norm(found - expected)
    result = {"sqnr_db": float(20 * np.log10(ratio)), "norm": float(np.linalg.norm(expected))}
    (folder / "score.json").write_text(json.dumps(result))


STEPS = {step.__name__: step for step in (write, calibrate, quantize, score)}


# Watching them.


@dataclass(frozen=True, kw_only=True)
class Peak:
    """Largest sizes of a process in bytes.

    ``total_bytes``: everything resident, as the kernel keeps it (VmHWM). It holds the pages of
    memory-mapped weights too, which the kernel drops whenever it needs the room.
    ``private_bytes``: anonymous memory, which has to stay (RssAnon, looked at every few ms).
    """

    total_bytes: int
    private_bytes: int
    seconds: float


def watch(step: str, folder: Path) -> Peak:
    """Run one step to its end."""
    root = Path(__file__).resolve().parents[2]
    begin = time.perf_counter()
    log = folder / f"{step}.log"
    with log.open("wb") as file:
        process = subprocess.Popen(
            [sys.executable, "-m", "tests.e2e.test_large_model", step, str(folder)],
            cwd=root,
            stdout=file,
            stderr=file,
            env={**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"},
        )
        total = private = 0
        while process.poll() is None:
            sizes = sizes_of(process.pid)
            total = max(total, sizes.get("VmHWM", 0))
            private = max(private, sizes.get("RssAnon", 0))
            time.sleep(0.005)
    assert process.returncode == 0, log.read_text()[-4000:]
    seconds = time.perf_counter() - begin
    return Peak(total_bytes=total, private_bytes=private, seconds=seconds)


def sizes_of(pid: int) -> dict[str, int]:
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return {}
    fields = (line.split() for line in lines if line.startswith(("VmHWM:", "RssAnon:")))
    return {name.rstrip(":"): int(kib) * 1024 for name, kib, *_ in fields}


@dataclass(frozen=True, kw_only=True)
class Finished:
    """The folder after all steps, and the peak of each."""

    folder: Path
    peaks: dict[str, Peak]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Finished]:
    folder = tmp_path_factory.mktemp("large")
    if shutil.disk_usage(folder).free < N_FREE_BYTES:
        pytest.skip("less than 8 GiB of disk are free")
    if memory_available() < N_FREE_BYTES:
        pytest.skip("less than 8 GiB of memory are available")
    try:
        yield Finished(folder=folder, peaks={step: watch(step, folder) for step in STEPS})
    finally:
        shutil.rmtree(folder)


pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not Path("/proc/meminfo").exists(), reason="needs Linux's /proc"),
]


def test_model_is_larger_than_a_protobuf_can_be(finished: Finished) -> None:
    assert (finished.folder / "model.data").stat().st_size == N_MODEL_BYTES > 2 * GIB
    assert (finished.folder / "model.onnx").stat().st_size < 10_000


def test_calibration_holds_the_model_once(finished: Finished) -> None:
    """The session needs all weights; the whole of it, mapped pages included, is the measure."""
    peak = finished.peaks["calibrate"]
    assert peak.total_bytes < N_MODEL_BYTES + 1.5 * GIB


def test_quantizing_holds_one_weight_at_a_time(finished: Finished) -> None:
    """Private memory is the measure: weights are read through memory maps, whose pages the kernel
    takes back when it needs them, and counts once per map although they are there once. The
    checks of the artifact are part of it, loading included."""
    peak = finished.peaks["quantize"]
    assert peak.private_bytes < GIB
    # The looking was not too coarse: the process did go through all the weights.
    assert peak.total_bytes > N_MODEL_BYTES


def test_artifact_is_a_quarter_outside_the_graph_and_valid(finished: Finished) -> None:
    path = finished.folder / "out" / "quantized.onnx"
    (data,) = path.parent.glob("quantized.onnx.*.data")
    assert sorted(path.parent.iterdir()) == [path, data]
    assert data.stat().st_size == pytest.approx(N_MODEL_BYTES / 4, rel=0.01)
    assert path.stat().st_size < 100_000
    onnx.checker.check_model(str(path), full_check=True)
    weights = {
        tensor.name: tensor
        for tensor in onnx.load(path, load_external_data=False).graph.initializer
        if tensor.data_location == TensorProto.EXTERNAL
    }
    integers = [f"w{i}.int8.int" for i in range(N_LAYERS)]
    assert set(integers) <= set(weights)
    assert all(weights[name].data_type == TensorProto.INT8 for name in integers)


def test_artifact_computes_nearly_the_same(finished: Finished) -> None:
    result = json.loads((finished.folder / "score.json").read_text())
    assert result["norm"] > 100
    assert result["sqnr_db"] > 20


if __name__ == "__main__":
    STEPS[sys.argv[1]](Path(sys.argv[2]))
