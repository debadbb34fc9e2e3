"""Workers: throughput of two beside one, and what a finished run costs when it is repeated."""

from __future__ import annotations

import shutil
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bench_engine import Subject, new_store
from bench_models import Case
from bench_timing import Role

from actors.calibrate import CalibrationProgress, calibrate
from actors.session import ClusterSpec, ray_session

Say = Callable[[str], None]
FIRST_RUN_S = 120.0
"""How long a run has to take at least whose repetition is timed."""


def _cluster(n_workers: int) -> ClusterSpec:
    return ClusterSpec(address=None, n_workers=n_workers, cpus_per_worker=1, ready_timeout_s=300)


def throughput(subject: Subject, n_workers: int, path: Path) -> float:
    """Samples per second of a pool, from when every worker has finished a shard to the last one.

    Until then they start, load the model and compile nothing but load what is compiled; this is
    what a long run does not notice. Shards are of one size, whatever the number of workers.
    """
    job = subject.job("all", n_workers=2)
    seen: list[tuple[float, int]] = []

    def watch(state: CalibrationProgress) -> None:
        if not seen or state.done != seen[-1][1]:
            seen.append((time.perf_counter(), state.done))

    calibrate(job, subject.source, new_store(path, job), _cluster(n_workers), on_progress=watch)
    shutil.rmtree(path)
    n_warm = n_workers * job.n_per_shard * job.identity.micro_batch
    begin_s, n_begin = next(entry for entry in seen if entry[1] >= n_warm)
    end_s, n_end = next(entry for entry in seen if entry[1] == len(job.manifest))
    return (n_end - n_begin) / (end_s - begin_s)


def two_workers(
    case: Case, n_samples: int, folder: Path, n_rounds: int, say: Say
) -> dict[str, Any]:
    """Speed-up of two workers over one, beside that of two plain float runs over one.

    The second is what this machine gives to any two processes that have nothing to do with one
    another: its memory, caches and other users are in both.
    """
    subject = Subject(case, n_samples)
    speedups: list[float] = []
    scalings: list[float] = []
    arguments = {"case": case.to_json(), "n_samples": max(16, n_samples // 4)}
    with (
        Role("float runs", arguments) as left,
        Role("float runs", arguments) as right,
        ray_session(_cluster(2)),
    ):
        for role in (left, right):
            role.answer()
        for index in range(n_rounds):
            counts = (1, 2) if index % 2 == 0 else (2, 1)
            rates = {n: throughput(subject, n, folder / f"w{n}.zarr") for n in counts}
            speedups.append(rates[2] / rates[1])
            say(
                f"1 worker {rates[1]:.1f}, 2 workers {rates[2]:.1f} samples/s: "
                f"{speedups[-1]:.2f} x ({index + 1}/{n_rounds})"
            )
            if index in (0, n_rounds - 1):
                left.ask()
                alone_s = left.answer()["wall_s"]
                for role in (left, right):
                    role.ask()
                both_s = max(role.answer()["wall_s"] for role in (left, right))
                scalings.append(2 * alone_s / both_s)
                say(f"plain runs {scalings[-1]:.2f} x")
    return {
        "two_worker_speedup": statistics.median(speedups),
        "two_process_scaling": statistics.median(scalings),
        "two_worker_rounds": n_rounds,
    }


class Resumed:
    """``qdist calibrate``, and the same command once more when it has finished.

    Whole processes are timed, start-up and all, since that is what a user waits for. One worker, so
    that memory can be measured on the other core meanwhile.
    """

    def __init__(self, case: Case, n_samples: int, folder: Path, say: Say) -> None:
        self._n_samples = n_samples
        self._folder = folder
        self._say = say
        self._words = [
            *(sys.executable, "-m", "qdist.cli", "calibrate"),
            *(f"model.path={case.model}", f"model.name={case.name}"),
            *("data=arrays", f"data.path={case.samples}"),
            f"data.calibration.inputs={{{case.input_name}: x}}",
            f"data.calibration.limit={n_samples}",
            "+data.calibration.preprocess.dtype=keep",
            f"calibration.micro_batch={case.micro_batch}",
            *("cluster.workers=1", "tracking=none", f"output.root={folder / 'runs'}"),
        ]
        say(f"qdist calibrate on {n_samples} samples begins")
        self._seconds: dict[str, float] = {}
        self._first = threading.Thread(target=self._run, args=("first",))
        self._first.start()

    def result(self) -> dict[str, Any]:
        """Wait for the first run and repeat it. Raises `RuntimeError` when one of them fails."""
        self._first.join()
        self._run("repeated")
        missing = {"first", "repeated"} - set(self._seconds)
        for name in sorted(missing):
            text = (self._folder / f"{name}.txt").read_text("utf-8")
            raise RuntimeError(f"the {name} qdist calibrate failed:\n{text}")
        first_s, repeated_s = self._seconds["first"], self._seconds["repeated"]
        self._say(f"first {first_s:.1f} s, repeated {repeated_s:.1f} s")
        return {
            "resume_overhead": repeated_s / first_s,
            "resume": {
                "first_s": first_s,
                "repeated_s": repeated_s,
                "n_samples": self._n_samples,
            },
        }

    def _run(self, name: str) -> None:
        begin = time.perf_counter()
        with (self._folder / f"{name}.txt").open("w", encoding="utf-8") as output:
            done = subprocess.run(
                self._words, cwd=self._folder, stdout=output, stderr=subprocess.STDOUT, check=False
            )
        if done.returncode == 0:
            self._seconds[name] = time.perf_counter() - begin
