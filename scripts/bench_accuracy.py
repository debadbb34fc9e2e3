#!/usr/bin/env python3
"""Scores of quantized models: every threshold method of ours, beside ONNX Runtime's calibrators.

    scripts/bench_accuracy.py [--json FILE] [--only MODEL]... [--jobs N] [--quick]

Progress goes to the standard error, tables to the standard output. docs/accuracy.md says what every
figure is, how like is compared with like, and how long it takes.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

# One thread. This has to be said before the numerical libraries are imported.
for _name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "NUMBA_NUM_THREADS"):
    os.environ.setdefault(_name, "1")

from bench_accuracy_cases import CASES, make_case  # noqa: E402
from bench_accuracy_model import Measured  # noqa: E402
from bench_accuracy_ours import PICKERS  # noqa: E402
from bench_accuracy_table import markdown  # noqa: E402
from bench_timing import machine  # noqa: E402

from qdist.files import write_json  # noqa: E402
from qdist.threshold.registry import METHODS  # noqa: E402

ASSETS = Path(__file__).resolve().parents[2] / "shared" / "assets"
QUICK = (8, 16)
"""Samples of a smoke run that calibrate and that score."""
QUICK_MODELS = ("digits_cnn",)


def main() -> int:
    """Measure, print, write. Exit status 1 where a model could not be measured."""
    options = _options()
    if options.markdown is not None:
        print(markdown(json.loads(options.markdown.read_text("utf-8"))))
        return 0
    # Being told to stop ends what was started, too.
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    run = _Run(options)
    names = tuple(options.only or (QUICK_MODELS if options.quick else CASES))
    with tempfile.TemporaryDirectory(prefix="qdist-accuracy-", dir=options.folder) as root:
        if options.jobs > 1 and len(names) > 1:
            _side_by_side(run, names, Path(root))
        else:
            for name in names:
                _measure(run, name, Path(root) / name)
    run.say(f"done; at most {run.peak_mb / 1024:.1f} GB of memory a process")
    print(markdown(run.results()))
    return int(any("failed" in model for model in run.models.values()))


class _Run:
    """What was measured so far, and its file."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.models: dict[str, Any] = {}
        self.peak_mb = 0
        self._begin = time.perf_counter()

    def say(self, text: str) -> None:
        """A line of progress."""
        wall, cpu = time.perf_counter() - self._begin, time.process_time()
        print(f"[{wall:5.0f} s, cpu {cpu:4.0f} s] {text}", file=sys.stderr, flush=True)

    def keep(self, models: dict[str, Any]) -> None:
        """Add results, or the rows of one so far, and write all: what is there by now outlives a
        run that is stopped."""
        self.models |= models
        own = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
        self.peak_mb = max(self.peak_mb, own)
        if self.options.json is not None:
            write_json(self.options.json, self.results())

    def results(self) -> dict[str, Any]:
        """All of it, as JSON."""
        about = {
            "machine": machine(),
            "quick": self.options.quick,
            "jobs": self.options.jobs,
            "total_s": round(time.perf_counter() - self._begin, 1),
            "cpu_s": round(sum(m.get("cpu_seconds", 0.0) for m in self.models.values()), 1),
            "peak_memory_mb": self.peak_mb,
        }
        return {"about": about, "models": {n: self.models[n] for n in CASES if n in self.models}}


def _measure(run: _Run, name: str, folder: Path) -> None:
    options, begin = run.options, time.perf_counter()
    folder.mkdir()
    case = make_case(name, options.assets, folder)
    if case is None:
        run.say(f"{name}: skipped, since {options.assets} does not hold it")
        run.keep({name: {"skipped": f"not in {options.assets}"}})
        return
    if options.quick:
        case = case.shortened(*QUICK)
    cpu = time.process_time()
    methods = options.method or (("max",) if options.quick else tuple(METHODS))
    measured = Measured(case, folder, run.say)
    for found in measured.everything(methods, options.picker or PICKERS):
        times = {
            "seconds": round(time.perf_counter() - begin, 1),
            "cpu_seconds": round(time.process_time() - cpu, 1),
        }
        run.keep({name: {**found, **times}})


def _side_by_side(run: _Run, names: Sequence[str], root: Path) -> None:
    """The models in processes of their own, ``--jobs`` at a time, in this order; the rows of all
    that are under way are gathered every few seconds. A model whose process fails costs no other
    one."""
    waiting, running = list(names), dict[str, tuple[subprocess.Popen[bytes], Path]]()
    try:
        while waiting or running:
            while waiting and len(running) < run.options.jobs:
                name = waiting.pop(0)
                part = root / f"{name}.json"
                command = _command(run.options, name, part)
                process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
                running[name] = process, part
            time.sleep(1.0)
            for name, (process, part) in list(running.items()):
                status = process.poll()
                found = json.loads(part.read_text("utf-8")) if part.exists() else None
                if found is not None:
                    run.peak_mb = max(run.peak_mb, found["about"]["peak_memory_mb"])
                    if found["models"] != {name: run.models.get(name)}:
                        run.keep(found["models"])
                if status is not None:
                    del running[name]
                    if status:
                        run.say(f"{name}: failed with exit status {status}")
                        run.keep({name: {**run.models.get(name, {}), "failed": status}})
    finally:
        for process, _ in running.values():
            process.terminate()
            process.wait()


def _command(options: argparse.Namespace, name: str, part: Path) -> list[str]:
    """This script for one model."""
    command = [sys.executable, __file__, "--only", name, "--jobs", "1", "--json", str(part)]
    command += ["--assets", str(options.assets), "--folder", str(part.parent)]
    command += ["--quick"] if options.quick else []
    command += [word for method in options.method or () for word in ("--method", method)]
    return command + [word for picker in options.picker or () for word in ("--picker", picker)]


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures here")
    parser.add_argument(
        "--only", action="append", choices=tuple(CASES), help="this model only; may be repeated"
    )
    parser.add_argument(
        "--method",
        action="append",
        choices=tuple(METHODS),
        help="this threshold method beside the default; may be repeated (default: all)",
    )
    parser.add_argument(
        "--picker",
        action="append",
        choices=PICKERS,
        help="this picker of layers to raise; may be repeated (default: all)",
    )
    parser.add_argument(
        "--jobs",
        type=int,
        default=min(2, os.cpu_count() or 1),
        metavar="N",
        help="so many models side by side, each in a process of its own (default: %(default)s)",
    )
    parser.add_argument(
        "--quick",
        action="store_true",
        help="a smoke run of some seconds on few samples; its figures mean nothing",
    )
    parser.add_argument(
        "--markdown", type=Path, metavar="FILE", help="print the tables of an earlier --json FILE"
    )
    parser.add_argument(
        "--assets",
        type=Path,
        default=ASSETS,
        metavar="FOLDER",
        help="where models/ and data/ of the real models are (default: %(default)s)",
    )
    parser.add_argument(
        "--folder", type=Path, metavar="FOLDER", help="for temporary files (default: the system's)"
    )
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
