#!/usr/bin/env python3
"""Scores of quantized models: every threshold method of ours, beside ONNX Runtime's calibrators.

    scripts/bench_accuracy.py [--json FILE] [--only MODEL]... [--quick]

Progress goes to the standard error, tables to the standard output. docs/accuracy.md says what every
figure is, how like is compared with like, and how long it takes.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

# One thread. This has to be said before the numerical libraries are imported.
for _name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "NUMBA_NUM_THREADS"):
    os.environ.setdefault(_name, "1")

from bench_accuracy_cases import CASES, AccuracyCase, make_case  # noqa: E402
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
    """Measure, print, write. Exit status 0 unless something could not be measured at all."""
    options = _options()
    if options.markdown is not None:
        print(markdown(json.loads(options.markdown.read_text("utf-8"))))
        return 0
    results = _measure_all(options)
    print(markdown(results))
    return 0


def _measure_all(options: argparse.Namespace) -> dict[str, Any]:
    begin = time.perf_counter()

    def say(text: str) -> None:
        print(f"[{time.perf_counter() - begin:5.0f} s] {text}", file=sys.stderr, flush=True)

    models: dict[str, Any] = {}
    names = options.only or (QUICK_MODELS if options.quick else CASES)
    with tempfile.TemporaryDirectory(prefix="qdist-accuracy-", dir=options.folder) as root:
        for name in names:
            folder = Path(root) / name
            folder.mkdir()
            case = make_case(name, options.assets, folder)
            if case is None:
                say(f"{name}: skipped, since {options.assets} does not hold it")
                models[name] = {"skipped": f"not in {options.assets}"}
                continue
            models[name] = _measure(case, folder, options, say)
            # What is there by now outlives a run that is stopped.
            results = {"about": _about(options.quick, begin), "models": models}
            if options.json is not None:
                write_json(options.json, results)
    say(f"done; at most {_peak_mb() / 1024:.1f} GB of memory")
    return {"about": _about(options.quick, begin), "models": models}


def _about(quick: bool, begin: float) -> dict[str, Any]:
    total_s = round(time.perf_counter() - begin, 1)
    return {
        "machine": machine(),
        "quick": quick,
        "total_s": total_s,
        "peak_memory_mb": _peak_mb(),
    }


def _peak_mb() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024


def _measure(
    case: AccuracyCase, folder: Path, options: argparse.Namespace, say: Callable[[str], None]
) -> dict[str, Any]:
    begin = time.perf_counter()
    if options.quick:
        case = case.shortened(*QUICK)
    methods = options.method or (("max",) if options.quick else tuple(METHODS))
    found = Measured(case, folder, say).everything(methods, options.picker or PICKERS)
    return {**found, "seconds": round(time.perf_counter() - begin, 1)}


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
