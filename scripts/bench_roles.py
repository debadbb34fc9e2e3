"""What needs a process of its own: peaks of memory, and float runs side by side."""

from __future__ import annotations

import json
import shutil
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from bench_engine import (
    Subject,
    calibrate_once,
    new_observer,
    run_shards,
    shards_of,
    user_session,
)
from bench_models import Case
from bench_ort import collect, make_calibrator
from bench_timing import lap, memory_bytes


def answer(value: Any) -> None:
    """Say one line of JSON to the benchmark."""
    sys.__stdout__.write(json.dumps(value) + "\n")  # type: ignore[union-attr]
    sys.__stdout__.flush()  # type: ignore[union-attr]


def memory_of_ours(arguments: Mapping[str, Any]) -> None:
    """Peak RSS of a calibration of all taps, in this process."""
    subject = Subject(Case.from_json(arguments["case"]), arguments["n_samples"])
    session = _run_plain(subject)
    job = subject.job("all")
    observer = new_observer(job)
    loaded = memory_bytes("VmRSS")
    begin = time.perf_counter()
    calibrate_once(job, observer, subject.source, Path(arguments["store"]))
    answer(
        {
            "loaded_bytes": loaded,
            "peak_bytes": memory_bytes("VmHWM"),
            "seconds": time.perf_counter() - begin,
        }
    )
    del session


def memory_of_ort(arguments: Mapping[str, Any]) -> None:
    """Peak RSS of ONNX Runtime's percentile calibrator, in this process."""
    subject = Subject(Case.from_json(arguments["case"]), arguments["n_samples"])
    session = _run_plain(subject)
    folder = Path(arguments["folder"])
    tensors = subject.taps().tensors
    calibrator = make_calibrator("percentile", subject.case.model, folder, tensors)
    loaded = memory_bytes("VmRSS")
    collect(calibrator, subject)
    answer({"loaded_bytes": loaded, "peak_bytes": memory_bytes("VmHWM")})
    del session


def calibrations(arguments: Mapping[str, Any]) -> None:
    """Calibrate into a new store each time that a line comes in; answer what it took."""
    subject = Subject(Case.from_json(arguments["case"]), arguments["n_samples"])
    job = subject.job(arguments["taps"])
    observer = new_observer(job)
    store = Path(arguments["store"])

    def calibrate() -> dict[str, float]:
        done, spent = lap(lambda: calibrate_once(job, observer, subject.source, store))
        shutil.rmtree(store)
        return {**asdict(done), "commit_s": spent.commit_s, "finish_s": spent.finish_s}

    calibrate()
    answer(len(job.taps.points))
    for _ in sys.stdin:
        answer(calibrate())


def float_runs(arguments: Mapping[str, Any]) -> None:
    """Run the float model over all samples, or over those of one turn of several, each time that
    a line comes in; answer what it took."""
    subject = Subject(Case.from_json(arguments["case"]), arguments["n_samples"])
    session = _run_plain(subject)
    batches = subject.batches()[arguments.get("turn", 0) :: arguments.get("n_turns", 1)]

    def run() -> None:
        for keys in batches:
            session.run(None, subject.feeds(keys))

    answer("ready")
    for _ in sys.stdin:
        answer(asdict(lap(run)[0]))


def shards(arguments: Mapping[str, Any]) -> None:
    """Every second shard into the store whose place comes in, each time that one comes in."""
    subject = Subject(Case.from_json(arguments["case"]), arguments["n_samples"])
    job = subject.job("all", n_workers=arguments["n_turns"])
    observer = new_observer(job)
    warm = Path(arguments["folder"]) / f"warm-{arguments['turn']}.zarr"
    mine = shards_of(job, warm)[arguments["turn"] :: arguments["n_turns"]]
    run_shards(mine[:1], job, observer, subject.source, str(warm))
    answer("ready")
    for line in sys.stdin:
        run_shards(mine, job, observer, subject.source, json.loads(line))
        answer("done")


def _run_plain(subject: Subject) -> Any:
    """The user's session after one micro-batch. Both sides hold it, so both compare alike."""
    session = user_session(subject.case)
    session.run(None, subject.feeds(subject.batches()[0]))
    return session


ROLES: dict[str, Callable[[Mapping[str, Any]], None]] = {
    "memory of ours": memory_of_ours,
    "memory of ort": memory_of_ort,
    "calibrations": calibrations,
    "float runs": float_runs,
    "shards": shards,
}
