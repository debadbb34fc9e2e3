#!/usr/bin/env python3
"""Time of every threshold method on rows of real activations, beside ONNX Runtime's entropy search.

    scripts/bench_thresholds.py [--json FILE] [--rows N] [--ort-rows N] [--quick]

One core, in time of the processor. Progress goes to the standard error, tables to the standard
output. docs/thresholds.md says what every figure is.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

# This has to be said before the numerical libraries are imported.
for _name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "NUMBA_NUM_THREADS"):
    os.environ.setdefault(_name, "1")

import numpy as np  # noqa: E402
from bench_rows import LINEAR_BINS, Row, collect_rows  # noqa: E402
from bench_timing import machine  # noqa: E402
from onnxruntime.quantization.calibrate import HistogramCollector  # noqa: E402

from qdist.files import write_json  # noqa: E402
from qdist.numbers.dtype import FLOATS  # noqa: E402
from qdist.stats.histogram import Density  # noqa: E402
from qdist.threshold.clip import Levels  # noqa: E402
from qdist.threshold.consumer import Consumer  # noqa: E402
from qdist.threshold.entropy import best_candidate, divergence_of  # noqa: E402
from qdist.threshold.float_error import FLOAT_METHODS, float_threshold  # noqa: E402
from qdist.threshold.pinning import pinning  # noqa: E402
from qdist.threshold.registry import METHODS, find_threshold, find_thresholds  # noqa: E402

ASSETS = Path(__file__).resolve().parents[2] / "shared" / "assets"
INT8 = Levels(low=-128, high=127, symmetric=False)
SYMMETRIC = Levels(low=-127, high=127, symmetric=True)
BINS = 2048
FP8 = ("fp8_e4m3", "fp8_e5m2")
NEAR = 0.01
"""Bounds that differ by less than this share agree."""
BOUND_MS = 10.0
BOUND_SPEEDUP = 100.0
_SHARES = (
    "within_1_percent",
    "noted",
    "within_1_percent_without_note",
    "within_placements",
    "halves_within_1_percent",
)
_EXCESSES = ("median_excess_nats", "most_excess_nats")


@dataclass(frozen=True, slots=True, kw_only=True)
class Timed:
    """A method as it is timed."""

    label: str
    method: str
    parameters: Mapping[str, Any]
    consumers: tuple[Consumer, ...] = ()


def timed_methods() -> tuple[Timed, ...]:
    """All methods, with 2,048 bins where they have bins; and some with what vendors advise."""
    found = []
    for method in METHODS:
        has_bins = method.startswith(("kl", "symkl", "jsd", "improved"))
        parameters = {"bins": BINS} if has_bins else {}
        found.append(Timed(label=method, method=method, parameters=parameters))
    for label, method, parameters in (
        ("kl, every bin", "kl", {"bins": BINS, "stride": 1}),
        ("kld, 4,096 bins (Icraft)", "kld", {}),
        ("improved_mse, 10,240 bins (SlimAI)", "improved_mse", {}),
        ("improved_kl, 10,240 bins (SlimAI)", "improved_kl", {}),
    ):
        found.append(Timed(label=label, method=method, parameters=parameters))
    reader = Consumer(name="reader", gains=np.ones(64), mean_gain=1.0)
    found.append(Timed(label="auto, one reader", method="auto", parameters={}, consumers=(reader,)))
    return tuple(found)


def main() -> int:
    """Measure, print, write. Exit status 1 where there was no row."""
    options = _options()
    begin = time.perf_counter()

    def say(text: str) -> None:
        print(f"[{time.perf_counter() - begin:6.1f} s] {text}", file=sys.stderr, flush=True)

    with tempfile.TemporaryDirectory() as folder:
        rows = collect_rows(options.assets, Path(folder), options.rows, say)
    if not rows:
        print("no row of activations was found", file=sys.stderr)
        return 1
    figures: dict[str, Any] = {"machine": machine(), "n_rows": len(rows), "quick": options.quick}
    figures |= {"methods": time_methods(rows, say), "floats": time_floats(rows, say)}
    figures |= {"channels": time_channels(rows, say)}
    figures |= against_ort(rows, options.ort_rows, say)
    figures |= {"linear_agreement": agreement(rows, say)}
    figures["bounds"] = _bounds(figures)
    print(markdown(figures))
    if options.json is not None:
        write_json(options.json, figures)
    return 0


def time_methods(rows: Sequence[Row], say: Callable[[str], None]) -> dict[str, Any]:
    """Milliseconds a row of each method, asymmetric and symmetric int8, ranges and errors found."""
    found: dict[str, Any] = {}
    for timed in timed_methods():
        entry = {}
        for name, levels in (("asymmetric", INT8), ("symmetric", SYMMETRIC)):
            _ms(rows[0].density, levels, timed)
            entry[name] = _summary([_ms(row.density, levels, timed) for row in rows])
        found[timed.label] = entry
        say(f"{timed.label}: {entry['asymmetric']['mean_ms']:.2f} ms a row")
    return found


def time_floats(rows: Sequence[Row], say: Callable[[str], None]) -> dict[str, Any]:
    """Milliseconds a row of each method that has a meaning on the types of 8 bits."""
    found: dict[str, Any] = {}
    for name in FP8:
        for method in FLOAT_METHODS:
            find = partial(float_threshold, kind=FLOATS[name], method=method)
            _shortest(partial(find, rows[0].density))
            found[f"{method}, {name}"] = _summary(
                [_shortest(partial(find, row.density)) for row in rows]
            )
        say(f"methods for {name}")
    return found


def _ms(density: Density, levels: Levels, timed: Timed) -> float:
    arguments = (density, levels, timed.method, timed.parameters, timed.consumers)
    return _shortest(partial(find_threshold, *arguments))


def _shortest(action: Callable[[], Any]) -> float:
    """Milliseconds of the processor, which is one core's time; the shortest of three turns, since a
    machine that others use has cold caches in some."""
    laps = []
    for _ in range(3):
        begin = time.process_time()
        action()
        laps.append(time.process_time() - begin)
    return min(laps) * 1e3


def _summary(times: Sequence[float]) -> dict[str, float]:
    return {
        "mean_ms": statistics.fmean(times),
        "median_ms": statistics.median(times),
        "most_ms": max(times),
    }


def time_channels(rows: Sequence[Row], say: Callable[[str], None]) -> dict[str, Any]:
    """Milliseconds a channel, all channels of a tensor in one call, beside its whole row."""
    some = [row for row in rows if len(row.channels) > 1][::8][:40]
    found: dict[str, Any] = {"n_tensors": len(some), "methods": {}}
    found["n_channels"] = sum(len(row.channels) for row in some)
    for method in ("mse", "kl", "percentile", "aciq"):
        timed = Timed(label=method, method=method, parameters={})
        whole = sum(_ms(row.density, SYMMETRIC, timed) for row in some)
        begin = time.process_time()
        for row in some:
            find_thresholds(row.channels, SYMMETRIC, method)
        channels = (time.process_time() - begin) * 1e3
        per_row, per_channel = whole / len(some), channels / found["n_channels"]
        found["methods"][method] = {
            "ms_per_tensor": per_row,
            "ms_per_channel": per_channel,
            "share": per_channel / per_row,
        }
        say(f"{method}: {per_channel:.3f} ms a channel, {per_row:.3f} ms a tensor")
    return found


def against_ort(rows: Sequence[Row], n: int, say: Callable[[str], None]) -> dict[str, Any]:
    """ONNX Runtime's search over 2,048 bins of both signs with 128 levels, beside ours over 2,048
    bins of |x|, every bin a candidate, with 127 levels; on the same rows, histograms given."""
    collector = HistogramCollector("entropy", True, BINS, 128, 99.99, "same")
    step = max(1, len(rows) // n)
    some = rows[::step][:n]
    every = Timed(label="", method="kl", parameters={"bins": BINS, "stride": 1})
    usual = Timed(label="", method="kl", parameters={"bins": BINS})
    theirs, ours, ours_usual = [], [], []
    for done, row in enumerate(some, 1):
        begin = time.process_time()
        collector.get_entropy_threshold(row.ort, 128)
        theirs.append((time.process_time() - begin) * 1e3)
        ours.append(_ms(row.density, SYMMETRIC, every))
        ours_usual.append(_ms(row.density, SYMMETRIC, usual))
        if done % 8 == 0 or done == len(some):
            say(f"ONNX Runtime's entropy search: {done} of {len(some)} rows")
    return {
        "ort": {
            "n_rows": len(some),
            "ms_per_row": statistics.fmean(theirs),
            "ours_every_bin_ms_per_row": statistics.fmean(ours),
            "ours_ms_per_row": statistics.fmean(ours_usual),
        },
        "speedup_vs_ort_entropy": sum(theirs) / sum(ours),
        "speedup_vs_ort_entropy_usual_stride": sum(theirs) / sum(ours_usual),
    }


def agreement(rows: Sequence[Row], say: Callable[[str], None]) -> dict[str, Any]:
    """How near the bounds on re-binned counts come to those on true linear histograms.

    Of ``kl``: also how much the true divergence at our bound exceeds its least, and how many of the
    rows agree with a true histogram of every other value, which is what chance alone does. Of
    ``improved_mse``: both bounds against its search on the true signed histogram.
    """
    found: dict[str, Any] = {}
    for bins in LINEAR_BINS:
        found[f"kl, {bins} bins"] = _kl_agreement(rows, bins)
        found[f"improved_mse, {bins} bins"] = _mse_agreement(rows, bins)
        say(f"agreement with {bins} true linear bins")
    return found


def _kl_agreement(rows: Sequence[Row], bins: int) -> dict[str, Any]:
    moves, excess, halves, moved, loose, within = [], [], [], [], [], []
    for row in rows:
        counts, half = row.linear[bins].copy(), row.halved[bins].copy()
        counts[0], half[0] = counts[1], half[1]
        true = best_candidate(counts, 127, 8)
        range_ = find_threshold(row.density, SYMMETRIC, "kl", {"bins": bins})
        top = max(-row.density.minimum, row.density.maximum)
        kept = round(max(-range_.low, range_.high) / top * bins)
        moves.append(abs(kept - true) / true)
        halves.append(abs(best_candidate(half, 127, 8) - true) / true)
        known = pinning(row.density, SYMMETRIC, "kl", {"bins": bins})
        loose.append(known is not None and not known.is_pinned)
        bound = top * true / bins
        within.append(known is None or known.least * (1 - NEAR) <= bound <= known.most * (1 + NEAR))
        excess.append(divergence_of(counts, kept, 127) - divergence_of(counts, true, 127))
        if moves[-1] > NEAR:
            moved.append((row.name, row.n_values, true, kept, excess[-1]))
    return {
        "within_1_percent": float(np.mean(np.array(moves) <= NEAR)),
        "noted": float(np.mean(loose)),
        "within_1_percent_without_note": float(np.mean(np.array(moves)[~np.array(loose)] <= NEAR)),
        "within_placements": float(np.mean(within)),
        "halves_within_1_percent": float(np.mean(np.array(halves) <= NEAR)),
        "median_excess_nats": statistics.median(excess),
        "most_excess_nats": max(excess),
        "moved": moved,
    }


def _mse_agreement(rows: Sequence[Row], bins: int) -> dict[str, Any]:
    moves, loose, moved = [], [], []
    for row in rows:
        low, high = min(row.density.minimum, 0.0), max(row.density.maximum, 0.0)
        edges = np.linspace(low, high, bins + 1)
        some = row.signed[bins] > 0
        true = Density(lower=edges[:-1][some], upper=edges[1:][some], counts=row.signed[bins][some])
        one = find_threshold(row.density, INT8, "improved_mse", {"bins": bins})
        other = find_threshold(true, INT8, "improved_mse", {"bins": bins})
        width = other.high - other.low
        moves.append(max(abs(one.low - other.low), abs(one.high - other.high)) / width)
        known = pinning(row.density, INT8, "improved_mse", {"bins": bins})
        loose.append(known is not None and not known.is_pinned)
        if moves[-1] > NEAR:
            moved.append((row.name, row.n_values, other.low, other.high, one.low, one.high))
    near, pinned = np.array(moves) <= NEAR, ~np.array(loose)
    return {
        "within_1_percent": float(np.mean(near)),
        "noted": float(np.mean(loose)),
        "within_1_percent_without_note": float(np.mean(near[pinned])),
        "moved": moved,
    }


def _bounds(figures: Mapping[str, Any]) -> dict[str, Any]:
    entries = [
        *(entry[kind] for entry in figures["methods"].values() for kind in entry),
        *figures["floats"].values(),
    ]
    slowest = max(entry["mean_ms"] for entry in entries)
    slowest_row = max(entry["most_ms"] for entry in entries)
    speedup = figures["speedup_vs_ort_entropy"]
    return {
        "slowest_method_ms": {"value": slowest, "bound": BOUND_MS, "holds": slowest < BOUND_MS},
        "slowest_row_ms": {
            "value": slowest_row,
            "bound": BOUND_MS,
            "holds": slowest_row < BOUND_MS,
        },
        "speedup_vs_ort_entropy": {
            "value": speedup,
            "bound": BOUND_SPEEDUP,
            "holds": speedup >= BOUND_SPEEDUP,
        },
    }


def markdown(figures: Mapping[str, Any]) -> str:
    """The tables that docs/thresholds.md shows."""
    lines = [
        f"{figures['n_rows']} rows, {BINS:,} bins unless stated; ms of one core a row",
        "",
        "| method | asymmetric, mean | most | symmetric, mean | most |",
        "| --- | ---: | ---: | ---: | ---: |",
    ]
    for label, entry in figures["methods"].items():
        cells = (
            f"{entry[kind][key]:.2f}"
            for kind in ("asymmetric", "symmetric")
            for key in ("mean_ms", "most_ms")
        )
        lines.append(f"| {label} | {' | '.join(cells)} |")
    lines += ["", "| method, type of 8 bits | mean | most |", "| --- | ---: | ---: |"]
    for label, entry in figures["floats"].items():
        lines.append(f"| {label} | {entry['mean_ms']:.2f} | {entry['most_ms']:.2f} |")
    channels = figures["channels"]
    lines += [
        "",
        f"{channels['n_channels']:,} channels of {channels['n_tensors']} tensors",
        "",
        "| method | ms a tensor | ms a channel | share |",
        "| --- | ---: | ---: | ---: |",
    ]
    for method, entry in channels["methods"].items():
        lines.append(
            f"| {method} | {entry['ms_per_tensor']:.3f} | {entry['ms_per_channel']:.3f} "
            f"| {entry['share']:.2f} |"
        )
    ort = figures["ort"]
    lines += [
        "",
        f"ONNX Runtime's entropy search on {ort['n_rows']} of the rows: "
        f"{ort['ms_per_row']:,.0f} ms a row; ours with every bin a candidate "
        f"{ort['ours_every_bin_ms_per_row']:.2f} ms, as usual {ort['ours_ms_per_row']:.2f} ms.",
        f"`speedup_vs_ort_entropy`: {figures['speedup_vs_ort_entropy']:,.0f} "
        f"(usual stride: {figures['speedup_vs_ort_entropy_usual_stride']:,.0f})",
        "",
        "| re-binned counts against a true linear histogram | bounds within 1 % "
        "| noted | without a note, within 1 % | within other placements "
        "| of half the values | median excess (nats) | most |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for label, entry in figures["linear_agreement"].items():
        shares = " | ".join(f"{entry[key]:.1%}" if key in entry else "" for key in _SHARES)
        median, most = (f"{entry[key]:.2g}" if key in entry else "" for key in _EXCESSES)
        lines.append(f"| {label} | {shares} | {median} | {most} |")
    return "\n".join(lines)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures here")
    parser.add_argument("--rows", type=int, default=500, metavar="N", help="rows (default 500)")
    parser.add_argument(
        "--ort-rows",
        type=int,
        default=40,
        metavar="N",
        help="rows for ONNX Runtime's search too, evenly spread; it takes seconds each "
        "(default 40)",
    )
    parser.add_argument(
        "--quick",
        action="store_true",
        help="a smoke run on 24 rows; its figures mean nothing",
    )
    parser.add_argument(
        "--assets",
        type=Path,
        default=ASSETS,
        metavar="FOLDER",
        help="real models and data; where they are absent, the demo models give all rows",
    )
    options = parser.parse_args()
    if options.quick:
        options.rows, options.ort_rows = 24, 2
    return options


if __name__ == "__main__":
    sys.exit(main())
