#!/usr/bin/env python3
"""Calibrates a transformer that is larger than the memory it is given, and watches from outside.

Writes a synthetic float transformer with external weights, runs ``qdist calibrate`` on it with
``calibration.memory_budget``, and samples the resident memory of every process of the run from
/proc. With ``--compare`` it also runs without a budget and checks that the statistics are the same
to the last bit.

    scripts/bench_large_model.py --weights-gb 6 --budget 2GB --json large.json
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper

from qdist.cli.sizes import n_bytes
from qdist.files import write_json
from qdist.store.zarr_store import open_store

HEADS = 16
SAMPLE_EVERY_S = 0.02
MARK = "QDIST_BENCH_RUN"
"""Set in the environment of the run, so that every process of it can be found."""


@dataclass(frozen=True, kw_only=True)
class Shape:
    """Of the transformer: ``width`` features, ``hidden`` in the feed-forward layers."""

    width: int
    hidden: int
    n_blocks: int
    sequence: int

    @property
    def block_bytes(self) -> int:
        """Weights of one block."""
        return 4 * (4 * self.width * self.width + 2 * self.width * self.hidden + 4 * self.width)

    @property
    def weight_bytes(self) -> int:
        """Weights of all blocks."""
        return self.n_blocks * self.block_bytes


class Weights:
    """Streams weights into one external file; the model holds only where they are."""

    def __init__(self, folder: Path) -> None:
        self._file = (folder / "model.data").open("wb")
        self._rng = np.random.default_rng(0)
        self._tile: NDArray[np.float32] = self._rng.normal(size=1 << 22).astype(np.float32)
        self.protos: list[TensorProto] = []

    def matrix(self, name: str, rows: int, columns: int) -> str:
        """Normal values of variance 1 / ``rows``."""
        n = rows * columns
        scale = np.float32(1 / np.sqrt(rows))
        start = self._begin(name, (rows, columns), n)
        left = n
        while left:
            shift = int(self._rng.integers(self._tile.size))
            part = np.roll(self._tile, shift)[: min(left, self._tile.size)] * scale
            self._file.write(part.tobytes())
            left -= part.size
        assert self._file.tell() == start + 4 * n
        return name

    def ones(self, name: str, n: int) -> str:
        """For the normalizations."""
        self._begin(name, (n,), n)
        self._file.write(np.ones(n, np.float32).tobytes())
        return name

    def close(self) -> None:
        """No more weights."""
        self._file.close()

    def _begin(self, name: str, dims: Sequence[int], n: int) -> int:
        offset = self._file.tell()
        proto = TensorProto(name=name, data_type=TensorProto.FLOAT, dims=list(dims))
        proto.data_location = TensorProto.EXTERNAL
        for key, value in (("location", "model.data"), ("offset", offset), ("length", 4 * n)):
            proto.external_data.add(key=key, value=str(value))
        self.protos.append(proto)
        return offset


def write_model(folder: Path, shape: Shape) -> Path:
    """A pre-norm transformer: attention and a ReLU feed-forward layer in each block."""
    weights = Weights(folder)
    nodes: list[onnx.NodeProto] = []

    def add(op: str, inputs: list[str], output: str, **attributes: Any) -> str:
        nodes.append(helper.make_node(op, inputs, [output], output, **attributes))
        return output

    shapes = {
        "split": [0, 0, HEADS, shape.width // HEADS],
        "joined": [0, 0, shape.width],
    }
    constants = [
        helper.make_tensor(name, TensorProto.INT64, [len(dims)], dims)
        for name, dims in shapes.items()
    ]
    constants.append(
        helper.make_tensor("root", TensorProto.FLOAT, [], [(shape.width / HEADS) ** 0.5])
    )
    h = "x"
    for i in range(shape.n_blocks):
        p = f"block{i}/"
        n = add("LayerNormalization", [h, weights.ones(f"{p}norm1", shape.width)], f"{p}n1")
        heads = []
        for part, order in (("q", [0, 2, 1, 3]), ("k", [0, 2, 3, 1]), ("v", [0, 2, 1, 3])):
            w = weights.matrix(f"{p}w_{part}", shape.width, shape.width)
            m = add("MatMul", [n, w], f"{p}{part}")
            r = add("Reshape", [m, "split"], f"{p}{part}_split")
            heads.append(add("Transpose", [r], f"{p}{part}_heads", perm=order))
        scores = add("MatMul", heads[:2], f"{p}scores")
        scaled = add("Div", [scores, "root"], f"{p}scaled")
        shares = add("Softmax", [scaled], f"{p}shares", axis=-1)
        mixed = add("MatMul", [shares, heads[2]], f"{p}mixed")
        back = add("Transpose", [mixed], f"{p}back", perm=[0, 2, 1, 3])
        flat = add("Reshape", [back, "joined"], f"{p}flat")
        w = weights.matrix(f"{p}w_o", shape.width, shape.width)
        h = add("Add", [h, add("MatMul", [flat, w], f"{p}o")], f"{p}h1")
        n = add("LayerNormalization", [h, weights.ones(f"{p}norm2", shape.width)], f"{p}n2")
        w = weights.matrix(f"{p}w_up", shape.width, shape.hidden)
        up = add("Relu", [add("MatMul", [n, w], f"{p}up")], f"{p}act")
        w = weights.matrix(f"{p}w_down", shape.hidden, shape.width)
        h = add("Add", [h, add("MatMul", [up, w], f"{p}down")], f"{p}h2")
    weights.close()
    ends = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, ["b", shape.sequence, shape.width])
        for name in ("x", h)
    ]
    graph = helper.make_graph(nodes, "large", ends[:1], ends[1:], [*constants, *weights.protos])
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    path = folder / "model.onnx"
    path.write_bytes(proto.SerializeToString())
    return path


@dataclass
class Watched:
    """Largest resident memory of each process of a run, in bytes, by what it is."""

    peaks: dict[str, int] = field(default_factory=dict)
    seconds: float = 0.0
    status: int = 0
    output: str = ""


def watch(words: list[str], folder: Path) -> Watched:
    """Run ``qdist`` to its end, looking at all its processes every few ms."""
    mark = f"{os.getpid()}-{time.monotonic_ns()}"
    found = Watched()
    begin = time.perf_counter()
    log = folder / "run.log"
    with log.open("wb") as file:
        process = subprocess.Popen(
            [sys.executable, "-m", "qdist.cli", *words],
            stdout=file,
            stderr=subprocess.STDOUT,
            env={**os.environ, MARK: mark},
        )
        known: dict[int, str | None] = {}
        while process.poll() is None:
            for pid, what in _processes(mark, known):
                found.peaks[what] = max(found.peaks.get(what, 0), _resident_bytes(pid))
            time.sleep(SAMPLE_EVERY_S)
    found.seconds = time.perf_counter() - begin
    found.status = process.returncode
    found.output = log.read_text("utf-8", "replace")
    return found


def _processes(mark: str, known: dict[int, str | None]) -> Iterator[tuple[int, str]]:
    """Processes of the run: pid, and a name for what it does."""
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        pid = int(entry.name)
        try:
            if pid not in known:
                ours = f"{MARK}={mark}".encode() in (entry / "environ").read_bytes()
                known[pid] = "" if ours else None
            if known[pid] is None:
                continue
            raw = (entry / "cmdline").read_bytes().replace(b"\0", b" ")
        except OSError:
            continue
        yield pid, _role(raw.decode("utf-8", "replace"))


def _role(command: str) -> str:
    if "qdist.cli" in command:
        return "driver"
    if command.startswith("ray::Host"):
        return "worker"
    return "ray"


def _resident_bytes(pid: int) -> int:
    try:
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return 0


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--weights-gb", type=float, default=6.0, help="float weights, in GB")
    parser.add_argument("--budget", default="2GB", help="calibration.memory_budget")
    parser.add_argument("--samples", type=int, default=4, help="calibration samples")
    parser.add_argument("--sequence", type=int, default=128, help="tokens of a sample")
    parser.add_argument("--width", type=int, default=2048)
    parser.add_argument("--hidden", type=int, default=8192)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--compare", action="store_true", help="run without a budget too")
    parser.add_argument("--folder", type=Path, help="where the model goes; kept if given")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures here")
    arguments = parser.parse_args()
    one = Shape(
        width=arguments.width, hidden=arguments.hidden, n_blocks=1, sequence=arguments.sequence
    )
    n_blocks = int(np.ceil(arguments.weights_gb * 1e9 / one.block_bytes))
    shape = Shape(**{**vars(one), "n_blocks": n_blocks})
    folder = arguments.folder or Path(tempfile.mkdtemp(prefix="qdist-large-"))
    folder.mkdir(parents=True, exist_ok=True)
    try:
        figures = _measure(folder, shape, arguments)
    finally:
        if arguments.folder is None:
            shutil.rmtree(folder, ignore_errors=True)
    print("\n".join(f"{key}: {value}" for key, value in figures.items()))
    if arguments.json:
        write_json(arguments.json, figures)
    return 0 if figures["within_budget"] and figures.get("same_statistics", True) else 1


def _measure(folder: Path, shape: Shape, arguments: argparse.Namespace) -> dict[str, Any]:
    model = folder / "model.onnx"
    if not model.is_file():
        print(f"writing {shape.weight_bytes / 1e9:.2f} GB of weights to {folder}", flush=True)
        write_model(folder, shape)
    samples = np.random.default_rng(1).normal(size=(arguments.samples, shape.sequence, shape.width))
    np.save(folder / "samples.npy", samples.astype(np.float32))
    budget = n_bytes("--budget", arguments.budget)
    print(f"calibrating {arguments.samples} samples within {arguments.budget}", flush=True)
    bounded = _run(folder, arguments, "bounded", [f"calibration.memory_budget={budget}"])
    figures: dict[str, Any] = {
        "weight_bytes": shape.weight_bytes,
        "n_blocks": shape.n_blocks,
        "n_samples": arguments.samples,
        "sequence": shape.sequence,
        "budget_bytes": budget,
        "peak_bytes": bounded.peaks,
        "seconds": round(bounded.seconds, 1),
        "within_budget": max(bounded.peaks.get(k, 0) for k in ("worker", "driver")) <= budget,
        "segments": next((line for line in bounded.output.splitlines() if "segments" in line), ""),
    }
    if arguments.compare:
        print("calibrating without a budget", flush=True)
        free = _run(folder, arguments, "free", [])
        figures["free_peak_bytes"] = free.peaks
        figures["free_seconds"] = round(free.seconds, 1)
        digests = [_digest(folder / name) for name in ("bounded.zarr", "free.zarr")]
        figures["same_statistics"] = digests[0] == digests[1]
    return figures


def _run(folder: Path, arguments: argparse.Namespace, name: str, words: list[str]) -> Watched:
    shutil.rmtree(folder / f"{name}.zarr", ignore_errors=True)
    found = watch(
        [
            "calibrate",
            f"model.path={folder / 'model.onnx'}",
            f"data.path={folder / 'samples.npy'}",
            "data.calibration.inputs={x: ''}",
            f"store.path={folder / f'{name}.zarr'}",
            f"output.root={folder / 'runs'}",
            "calibration.micro_batch=1",
            f"cluster.workers={arguments.workers}",
            "tracking=none",
            *words,
        ],
        folder,
    )
    if found.status:
        sys.exit(f"qdist calibrate ended with {found.status}:\n{found.output}")
    return found


def _digest(path: Path) -> str:
    return open_store(str(path)).latest().record.digest


if __name__ == "__main__":
    sys.exit(main())
