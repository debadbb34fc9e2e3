#!/usr/bin/env python3
"""Compare samples chosen by their activations with random picks of the same size.

    scripts/compare_selection.py [NAME ...] [--assets FOLDER] [--sizes 8,16,32] [--seeds 20]
                                 [--json FILE]

For every model and size: how far the clipping ranges of the picked samples are from those of the
whole set (mean over tensors of the relative error of the range's width, by method), and the SQNR
of the outputs of the int8 model made from the picked samples, in dB against the float model. The
demo models need nothing else; the others need the folder of real models and data. Constants of the
selection were set on the models marked ``tuned``; the others say what it is worth.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import scipy.sparse
from numpy.typing import NDArray

from qdist.calibration import input_specs
from qdist.data.arrays import ArraySource
from qdist.data.images import ImageSource
from qdist.data.preprocess import Preprocess
from qdist.data.source import DataSource, Feeds
from qdist.data.text import TextSource
from qdist.demo import demo_file
from qdist.emit.qdq import emit_qdq
from qdist.model.freeze import FrozenModel, freeze
from qdist.model.graph import Graph
from qdist.model.loading import load_model
from qdist.model.session import (
    Execution,
    as_float32,
    measuring_session,
    run,
    scoring_session,
)
from qdist.model.taps import TapTable, find_taps, tapped_graph
from qdist.plan.choice import LayerChoice
from qdist.plan.planner import Planner, PlanSettings
from qdist.plan.precision import PRECISIONS
from qdist.plan.target import Target
from qdist.selection import plan_selection, select_here
from qdist.stats.histogram import Histogram
from qdist.stats.record import CalibrationRecord
from qdist.store.sketches import SketchStore
from qdist.threshold.clip import Levels
from qdist.threshold.registry import find_threshold
from qdist.threshold.sentinel import split_sentinels

EXECUTION = Execution()
LEVELS = Levels(low=-128, high=127, symmetric=False)
METHODS: dict[str, tuple[str, dict[str, float]]] = {
    "mse": ("mse", {}),
    "percentile 99.9": ("percentile", {"percent": 99.9}),
    "percentile 99.99": ("percentile", {"percent": 99.99}),
    "max": ("max", {}),
}
SQNR = "SQNR of int8 (dB)"
N_BINS = 1 << 16
N_SCORED = 32

Counts = NDArray[np.uint64]


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """A model and its samples; both functions take the folder of real models and data."""

    tuned: bool
    model: Callable[[Path], Path]
    source: Callable[[Path], DataSource]


def _digits(assets: Path) -> DataSource:
    preprocess = Preprocess(scale=0.0625, mean=(0.3,), std=(0.37,))
    return ArraySource(
        path=demo_file("digits.npz"), inputs={"images": "test_images"}, preprocess=preprocess
    )


def _cifar(mean: tuple[float, ...], std: tuple[float, ...]) -> Callable[[Path], DataSource]:
    preprocess = Preprocess(scale=1 / 255, mean=mean, std=std, transpose=(2, 0, 1))
    return lambda assets: ArraySource(
        path=assets / "data/cifar10_clean242_vnncomp.npz",
        inputs={"input": "x"},
        preprocess=preprocess,
    )


def _keywords(assets: Path) -> DataSource:
    scale = 0.5847029
    return ArraySource(
        path=assets / "data/kws01_mfcc.npz",
        inputs={"input": "x_int8"},
        preprocess=Preprocess(scale=scale, mean=(83 * scale,)),
    )


def _imagenet(assets: Path) -> DataSource:
    preprocess = Preprocess(scale=1 / 255, mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))
    return ImageSource(
        folder=assets / "data/imagenet100", input_name="input", crop=224, preprocess=preprocess
    )


def _stories(assets: Path) -> DataSource:
    return TextSource(
        path=assets / "data/tinystories_120k.txt",
        tokenizer_path=assets / "models/stories260K/tok512.bin",
        input_name="input_ids",
        lengths=(32, 64, 128),
        n_samples=240,
    )


CASES: dict[str, Case] = {
    "digits_cnn": Case(
        tuned=True, model=lambda assets: demo_file("digits_cnn.onnx"), source=_digits
    ),
    "digits_vit": Case(
        tuned=True, model=lambda assets: demo_file("digits_vit.onnx"), source=_digits
    ),
    "kws_dscnn": Case(
        tuned=True,
        model=lambda assets: assets / "models/mlperf_tiny_kws_dscnn.onnx",
        source=_keywords,
    ),
    "cifar10_resnet20": Case(
        tuned=False,
        model=lambda assets: assets / "models/cifar10_resnet20.onnx",
        source=_cifar((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    ),
    "cifar10_vit": Case(
        tuned=False,
        model=lambda assets: assets / "models/cifar10_vit_ibp_3_3_8.onnx",
        source=_cifar((0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)),
    ),
    "squeezenet1.1": Case(
        tuned=False, model=lambda assets: assets / "models/squeezenet1.1.onnx", source=_imagenet
    ),
    "stories260K": Case(
        tuned=False, model=lambda assets: assets / "models/stories260K/model.onnx", source=_stories
    ),
}


class Measured:
    """Every sample's exact histograms, so that any pick's record is a sum of rows."""

    def __init__(self, graph: Graph, samples: Sequence[Feeds]) -> None:
        self.taps: TapTable = find_taps(graph, "compute")
        self.n = len(samples)
        frozen = graph.model
        session = measuring_session(tapped_graph(graph, self.taps), frozen.data_folder, EXECUTION)
        points = self.taps.points
        fetched = [point.output for point in points if not point.is_input]
        rows, self._extrema = [], np.zeros((self.n, len(points), 2), np.float32)
        for row, feeds in enumerate(samples):
            found = feeds | dict(zip(fetched, run(session, fetched, feeds), strict=True))
            tables = []
            for i, point in enumerate(points):
                name = point.tensor if point.is_input else point.output
                values = np.ascontiguousarray(as_float32(found[name])).reshape(-1)
                tables.append(np.bincount(values.view(np.uint32) >> 16, minlength=N_BINS))
                values = values[np.isfinite(values)]
                self._extrema[row, i] = values.min(), values.max()
            rows.append(scipy.sparse.csr_matrix(np.concatenate(tables)))
        self._counts = scipy.sparse.vstack(rows, format="csr")

    def tables(self, picked: Sequence[int]) -> Counts:
        """Merged counts, uint64[tensors, bins]."""
        chosen = np.zeros(self.n, np.int64)
        chosen[list(picked)] = 1
        return np.asarray(chosen @ self._counts).reshape(-1, N_BINS).astype(np.uint64)

    def extrema(self, picked: Sequence[int]) -> NDArray[np.float32]:
        """Merged minima and maxima, float32[tensors, 2]."""
        part = self._extrema[list(picked)]
        return np.stack([part[:, :, 0].min(axis=0), part[:, :, 1].max(axis=0)], axis=1)

    def record(self, picked: Sequence[int]) -> CalibrationRecord:
        """What a calibration of the picked samples would give."""
        return CalibrationRecord.from_dense(
            self.taps.tensors, list(self.tables(picked)), self.extrema(picked), len(picked)
        )

    def widths(self, picked: Sequence[int]) -> dict[str, NDArray[np.float64]]:
        """Method -> width of every tensor's range."""
        found: dict[str, list[float]] = {name: [] for name in METHODS}
        for table, (low, high) in zip(self.tables(picked), self.extrema(picked), strict=True):
            bins = np.flatnonzero(table)
            density = Histogram(
                bins=bins.astype(np.uint16),
                counts=table[bins],
                minimum=float(low),
                maximum=float(high),
            ).finite
            body = split_sentinels(density).body
            for name, (method, parameters) in METHODS.items():
                threshold = find_threshold(body, LEVELS, method, parameters)
                found[name].append(threshold.high - threshold.low)
        return {name: np.array(widths) for name, widths in found.items()}


class Outputs:
    """The int8 model of a pick, and how its outputs compare with the float model's."""

    def __init__(self, graph: Graph, measured: Measured, samples: Sequence[Feeds]) -> None:
        self._graph, self._measured, self._samples = graph, measured, samples
        self._float = self._run(graph.model.source)

    def sqnr_db(self, picked: Sequence[int], folder: Path) -> float:
        """Signal over error of all outputs together."""
        record = self._measured.record(picked)
        planner = Planner(self._graph, record, self._measured.taps, PlanSettings(scope="compute"))
        plan = planner.plan({layer.name: LayerChoice() for layer in planner.layers})
        projected = Target(name="any", precisions=tuple(PRECISIONS)).project(plan)
        artifact = emit_qdq(self._graph.model, projected, folder / "int8.onnx", check=False)
        signal = error = 0.0
        for before, after in zip(self._float, self._run(artifact.path), strict=True):
            signal += float(np.sum(before.astype(np.float64) ** 2))
            error += float(np.sum((before.astype(np.float64) - after) ** 2))
        return 10 * float(np.log10(signal / error))

    def _run(self, model: Path) -> list[NDArray[Any]]:
        session = scoring_session(model, EXECUTION)
        return [output for feeds in self._samples for output in run(session, None, dict(feeds))]


def compare(name: str, assets: Path, sizes: Sequence[int], n_seeds: int) -> dict[str, Any]:
    """All numbers of one model, as JSON."""
    case = CASES[name]
    frozen: FrozenModel = freeze(load_model(case.model(assets)))
    graph = Graph(frozen, EXECUTION)
    source = case.source(assets)
    keys = source.keys()
    samples = [{k: v[np.newaxis] for k, v in source.load(key).items()} for key in keys]
    measured = Measured(graph, samples)
    whole = measured.widths(range(len(keys)))
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(prefix="qdist-selection-") as scratch:
        outputs = Outputs(graph, measured, samples[:: max(1, len(samples) // N_SCORED)][:N_SCORED])
        whole_db = outputs.sqnr_db(range(len(keys)), Path(scratch))

        def score(picked: Sequence[int]) -> dict[str, float]:
            widths = measured.widths(picked)
            found = {
                method: float(np.mean(np.abs(widths[method] / there - 1)[there > 0]))
                for method, there in whole.items()
            }
            return found | {SQNR: outputs.sqnr_db(picked, Path(scratch))}

        for size in sizes:
            job = plan_selection(graph, source, input_specs(graph), size, EXECUTION)
            selection = select_here(job, source, SketchStore(Path(scratch), job.identity))
            selected = score([keys.index(key) for key in selection.keys])
            picks = [
                np.random.default_rng([size, seed]).permutation(len(keys))[:size].tolist()
                for seed in range(n_seeds)
            ]
            rows += _rows(size, selected, [score(pick) for pick in picks])
    return {"tuned": case.tuned, "samples": len(keys), "whole_sqnr_db": whole_db, "rows": rows}


def _rows(
    size: int, selected: dict[str, float], picks: Sequence[dict[str, float]]
) -> list[dict[str, Any]]:
    rows = []
    for measure, ours in selected.items():
        theirs = np.array([pick[measure] for pick in picks])
        better = theirs < ours if measure == SQNR else theirs > ours
        rows.append(
            {
                "n": size,
                "measure": measure,
                "selected": ours,
                "random_mean": float(theirs.mean()),
                "random_std": float(theirs.std(ddof=1)),
                "beaten": float(better.mean()),
            }
        )
    return rows


def _print(name: str, found: dict[str, Any]) -> None:
    for row in found["rows"]:
        as_text = "{:.1f}" if row["measure"] == SQNR else "{:.1%}"
        ours, theirs = (as_text.format(row[key]) for key in ("selected", "random_mean"))
        print(
            f"| {name}{' (tuned)' if found['tuned'] else ''} | {row['n']} of {found['samples']} "
            f"| {row['measure']} | {ours} | {theirs} | {row['beaten']:.0%} |",
            flush=True,
        )


def _print_summary(results: dict[str, Any]) -> None:
    print("\n| models | measure | selected / random, mean | random picks beaten |")
    print("| --- | --- | --- | --- |")
    for tuned in (True, False):
        rows = [r for found in results.values() if found["tuned"] == tuned for r in found["rows"]]
        for measure in dict.fromkeys(row["measure"] for row in rows):
            some = [row for row in rows if row["measure"] == measure]
            if measure == SQNR:
                gains = [row["selected"] - row["random_mean"] for row in some]
                text = f"{np.mean(gains):+.1f} dB"
            else:
                ratios = [row["selected"] / row["random_mean"] for row in some]
                text = f"{np.exp(np.mean(np.log(np.maximum(ratios, 1e-3)))):.2f}"
            beaten = np.mean([row["beaten"] for row in some])
            print(f"| {'tuned' if tuned else 'others'} | {measure} | {text} | {beaten:.0%} |")


def main() -> int:
    """Compare the models that are there and print the tables; 0 as exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(CASES)}")
    parser.add_argument("--assets", type=Path, default=Path("assets"), help="real models and data")
    parser.add_argument("--sizes", default="8,16,32", help="how many samples, comma-separated")
    parser.add_argument("--seeds", type=int, default=20, help="random picks of every size")
    parser.add_argument("--json", type=Path, help="write the numbers here")
    options = parser.parse_args()
    unknown = [name for name in options.names if name not in CASES]
    if unknown:
        parser.error(f"no model {unknown[0]!r}; there are {', '.join(CASES)}")
    sizes = [int(size) for size in options.sizes.split(",")]
    results: dict[str, Any] = {}
    print("| model | samples | measure | selected | random, mean | random picks beaten |")
    print("| --- | --- | --- | --- | --- | --- |")
    for name in options.names or CASES:
        if not CASES[name].model(options.assets).is_file():
            print(f"{name} left out: {CASES[name].model(options.assets)} is not there")
            continue
        results[name] = compare(name, options.assets, sizes, options.seeds)
        _print(name, results[name])
    _print_summary(results)
    if options.json is not None:
        options.json.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
