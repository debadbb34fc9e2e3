#!/usr/bin/env python3
"""Time, memory and store of a calibration, beside a plain float run and ONNX Runtime's calibrators.

    scripts/bench_calibration.py [--json FILE] [--only MODEL]... [--part PART]... [--quick]

Takes some 11 minutes on 2 cores; progress goes to the standard error, a table to the standard
output. docs/benchmarks.md says what every figure is and how like is compared with like.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# Every side gets one thread. This has to be said before the numerical libraries are imported.
for _name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "NUMBA_NUM_THREADS"):
    os.environ.setdefault(_name, "1")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("RAY_ENABLE_UV_RUN_RUNTIME_ENV", "0")

from bench_cluster import large_model  # noqa: E402
from bench_engine import Subject  # noqa: E402
from bench_estimate import check  # noqa: E402
from bench_memory import memory  # noqa: E402
from bench_merge import merging  # noqa: E402
from bench_models import CASES, Case, EncoderShape, encoder_case  # noqa: E402
from bench_ort import against_ort  # noqa: E402
from bench_roles import ROLES  # noqa: E402
from bench_speed import kernel, speed  # noqa: E402
from bench_table import keys_text, markdown, with_bounds  # noqa: E402
from bench_timing import machine  # noqa: E402
from bench_workers import FIRST_RUN_S, Resumed, two_workers  # noqa: E402

from qdist.files import write_json  # noqa: E402

ASSETS = Path(__file__).resolve().parents[2] / "shared" / "assets"
MODELS = ("encoder", *CASES)
PARTS = ("speed", "kernel", "ort", "workers", "memory", "merge", "estimate", "resume")
ENCODER_ONLY = {"merge", "estimate", "resume"}
"""Parts that ask nothing of a model, or that would take too long on all of them."""
SIDE_BY_SIDE = {"memory", "resume"}
"""Parts that can share the machine: they come last, the one while the other runs."""
SMALL_ENCODER = EncoderShape(n_layers=2, width=96, n_heads=3, feed_forward=384, length=64)
"""The encoder of a smoke run."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Size:
    """How much is measured. ``n_few`` samples, and ``n_many`` for the growth of memory.

    ``n_worker_rounds``: of the encoder, and of the others. ``one_thread``: measure one thread
    against ONNX Runtime's calibrators too. ``is_distinct``: measure them with the distinct tensors
    alone too. ``others``: parts of the other models.
    """

    n_few: int = 64
    n_many: int = 1024
    n_rounds: int = 5
    n_ort_rounds: int = 5
    one_thread: bool = False
    is_distinct: bool = False
    n_worker_samples: int = 128
    n_worker_rounds: tuple[int, int] = (5, 1)
    n_records: int = 768
    first_run_s: float = FIRST_RUN_S
    n_samples_made: int = 1 << 14
    encoder: EncoderShape = EncoderShape()  # noqa: RUF009
    others: tuple[str, ...] = tuple(part for part in PARTS if part not in ENCODER_ONLY)


QUICK = Size(
    n_few=16,
    n_many=32,
    n_rounds=1,
    n_ort_rounds=1,
    n_worker_samples=128,
    n_worker_rounds=(1, 1),
    n_records=16,
    first_run_s=2.0,
    n_samples_made=1 << 10,
    encoder=SMALL_ENCODER,
    others=("speed", "kernel", "ort"),
)


class Benchmark:
    """One model, part after part. ``figures`` grows; ``say`` gets lines of progress."""

    def __init__(self, case: Case, size: Size, folder: Path, say: Callable[[str], None]) -> None:
        self.figures: dict[str, Any] = {"part_s": {}}
        self._case = case
        self._size = size
        self._folder = folder
        self._say = say

    def run(self, parts: list[str]) -> None:
        """Measure the parts, one after another."""
        subject = Subject(self._case, self._size.n_few) if set(parts) - {"memory"} else None
        for part in parts:
            begin = time.perf_counter()
            found = self._memory() if subject is None else self._part(part, subject)
            self.figures |= found
            self.figures["part_s"][part] = time.perf_counter() - begin

    def resumed(self) -> Resumed:
        """Begin the long run that is repeated later."""
        seconds = self.figures.get("detail", {}).get("seconds", {}).get("all taps")
        per_sample_s = seconds / self._size.n_few if seconds else 0.06
        # Whole commands take longer than a calibration without start-up and company.
        wanted = math.ceil(0.9 * self._size.first_run_s / per_sample_s)
        n_samples = min(self._size.n_samples_made, wanted)
        return Resumed(self._case, n_samples, self._folder, self._teller("resume"))

    def _part(self, part: str, subject: Subject) -> dict[str, Any]:
        size, folder, say = self._size, self._folder, self._teller(part)
        match part:
            case "speed":
                wants_bound = self._case.name != "encoder"
                return speed(subject, folder, size.n_rounds, say, wants_bound=wants_bound)
            case "kernel":
                return kernel(subject, max(5, size.n_rounds), say)
            case "ort":
                return against_ort(
                    subject, folder, size.n_ort_rounds, say, size.one_thread, size.is_distinct
                )
            case "workers":
                n_rounds = size.n_worker_rounds[self._case.name != "encoder"]
                return two_workers(self._case, size.n_worker_samples, folder, n_rounds, say)
            case "merge":
                return merging(folder, size.n_records, say)
            case "estimate":
                return {"estimate": check(folder, 32, min(2, size.n_rounds), say)}
            case _:
                return self._memory()

    def _memory(self) -> dict[str, Any]:
        size = self._size
        return memory(self._case, size.n_few, size.n_many, self._folder, self._teller("memory"))

    def _teller(self, part: str) -> Callable[[str], None]:
        return lambda text: self._say(f"{self._case.name}: {part}: {text}")


def main() -> int:
    """Measure, print, write. Exit status 0 unless something could not be measured at all."""
    options = _options()
    if options.role:
        name, arguments = options.role
        ROLES[name](json.loads(arguments))
    elif options.keys:
        print(keys_text())
    elif options.markdown:
        _print(json.loads(options.markdown.read_text("utf-8")))
    else:
        results = _measure_all(options)
        if options.json is not None:
            write_json(options.json, results)
        _print(results)
    return 0


def _measure_all(options: argparse.Namespace) -> dict[str, Any]:
    begin = time.perf_counter()

    def say(text: str) -> None:
        passed = time.perf_counter() - begin
        print(f"[{passed:5.0f} s] {text}", file=sys.stderr, flush=True)

    size = (
        QUICK
        if options.quick
        else Size(one_thread=options.one_thread, is_distinct=options.distinct)
    )
    chosen = options.part or PARTS
    results: dict[str, Any] = {}
    benchmarks: dict[str, Benchmark] = {}
    about = {"machine": machine(), "quick": options.quick}
    with tempfile.TemporaryDirectory(prefix="qdist-bench-", dir=options.folder) as root:
        for name in options.only or MODELS:
            folder = Path(root) / name
            folder.mkdir()
            case = _case(name, options.assets, folder, size)
            if case is None:
                say(f"{name}: skipped, since {options.assets} does not hold it")
                results[name] = {"skipped": f"not in {options.assets}"}
                continue
            own = PARTS if name == "encoder" else size.others
            benchmarks[name] = Benchmark(case, size, folder, say)
            benchmarks[name].run([p for p in own if p in chosen and p not in SIDE_BY_SIDE])
        wants_resume = "resume" in chosen and "encoder" in benchmarks
        resumed = benchmarks["encoder"].resumed() if wants_resume else None
        for name, benchmark in benchmarks.items():
            own = PARTS if name == "encoder" else size.others
            benchmark.run([part for part in own if part == "memory" and part in chosen])
        if resumed is not None:
            benchmarks["encoder"].figures |= resumed.result()
    about["total_s"] = round(time.perf_counter() - begin, 1)
    say("done")
    for name, benchmark in benchmarks.items():
        results[name] = {**with_bounds(name, benchmark.figures), **about}
    return results


def _case(name: str, assets: Path, folder: Path, size: Size) -> Case | None:
    if name == "encoder":
        return encoder_case(folder, size.n_samples_made, size.encoder)
    return CASES[name](assets, folder, size.n_many)


def _print(results: dict[str, Any]) -> None:
    print(markdown(results))
    if "estimate" in results.get("encoder", {}):
        print("\n" + large_model(results["encoder"]["estimate"]["constants"]))


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures here")
    parser.add_argument(
        "--only", action="append", choices=MODELS, help="this model only; may be repeated"
    )
    parser.add_argument(
        "--part", action="append", choices=PARTS, help="this part only; may be repeated"
    )
    parser.add_argument(
        "--quick",
        action="store_true",
        help="a smoke run of less than a minute on small models; its figures mean nothing",
    )
    parser.add_argument(
        "--distinct",
        action="store_true",
        help="part ort: also give ONNX Runtime the distinct tensors alone, half a minute more",
    )
    parser.add_argument(
        "--one-thread",
        action="store_true",
        help="part ort: one thread on both sides too, which takes a minute more",
    )
    parser.add_argument("--keys", action="store_true", help="say what is measured, and stop")
    parser.add_argument(
        "--markdown", type=Path, metavar="FILE", help="print the table of an earlier --json FILE"
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
    parser.add_argument("--role", nargs=2, help=argparse.SUPPRESS)
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
