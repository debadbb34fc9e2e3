#!/usr/bin/env python3
"""What SmoothQuant does to the accuracy of int8 models, by its strength.

    scripts/bench_smoothing.py [--assets FOLDER] [--only NAME ...] [--alphas 0.3,0.5,0.7]
                               [--method auto] [--markdown FILE]

Models, samples and scores are those of ``bench_accuracy.py``; the row without alpha is its default.
Intervals are paired bootstraps over samples of the score less that without smoothing, 95 %.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from bench_accuracy_cases import AccuracyCase, make_case
from bench_accuracy_ours import TARGET
from bench_accuracy_scores import EXECUTION, Scores, float_outputs, paired, score

from qdist.calibration import CalibrationSettings, calibrate_here, prepare
from qdist.calibration.smoothed import channels_job, joined, smoothed_job, smoothed_rows
from qdist.emit.qdq import emit_qdq
from qdist.errors import ModelError
from qdist.model.freeze import freeze
from qdist.model.graph import Graph
from qdist.model.loading import load_model
from qdist.model.smoothed import smoothed_model
from qdist.plan.choice import LayerChoice
from qdist.plan.plan_settings import PlanSettings
from qdist.plan.planner import Planner
from qdist.plan.smoothing import find_smoothing, lacking_channels
from qdist.store.zarr_store import create_store

ASSETS = Path(__file__).resolve().parents[2] / "shared" / "assets"
MODELS = ("digits_vit", "cifar10_vit", "stories260K")
HEADER = ("model", "activations", "alpha", "tensors", "metric", "score", "less that without")


@dataclass(frozen=True, slots=True, kw_only=True)
class Smoothed:
    """``alpha``: None for the model as it is; ``n_tensors`` smoothed; ``planners`` by symmetry."""

    alpha: float | None
    n_tensors: int
    planners: dict[bool, Planner]


def smoothed(case: AccuracyCase, folder: Path, alphas: Sequence[float]) -> Iterator[Smoothed]:
    """The model as it is, then with each strength; its statistics are measured once, and then the
    rows that change."""
    graph = Graph(freeze(load_model(case.model), EXECUTION), EXECUTION)
    settings = CalibrationSettings(micro_batch=case.micro_batch)
    job = prepare(graph.model, case.calibration, settings, EXECUTION, graph=graph)
    store = create_store(folder / "plain", job.identity)
    record = factors = calibrate_here(job, case.calibration, store).record
    if axes := lacking_channels(graph, record):
        again = channels_job(job, axes)
        place = create_store(folder / "channels", again.identity)
        factors = joined(record, calibrate_here(again, case.calibration, place).record)
    for alpha in (None, *alphas):
        own, statistics, n = graph, record, 0
        if alpha is not None:
            try:
                smoothing = find_smoothing(graph, factors, job.taps, alpha).smoothing
            except ModelError as error:
                print(f"{case.name}: {error}", file=sys.stderr)
                return
            n = len(smoothing.exponents)
            own = Graph(smoothed_model(graph, smoothing), EXECUTION)
            part = smoothed_job(job, own, smoothed_rows(graph, job.taps, smoothing))
            place = create_store(folder / f"alpha-{alpha:g}", part.identity)
            statistics = joined(record, calibrate_here(part, case.calibration, place).record)
        planners = {
            symmetric: Planner(own, statistics, job.taps, PlanSettings(symmetric=symmetric))
            for symmetric in (False, True)
        }
        yield Smoothed(alpha=alpha, n_tensors=n, planners=planners)


def rows(
    case: AccuracyCase, folder: Path, alphas: Sequence[float], method: str
) -> Iterator[tuple[str, ...]]:
    """Rows of `HEADER`."""
    reference = float_outputs(case)
    plain: dict[bool, Scores] = {}
    choice = LayerChoice(saturation=method)
    for own in smoothed(case, folder, alphas):
        for symmetric, planner in own.planners.items():
            plan = TARGET.project(planner.plan({layer.name: choice for layer in planner.layers}))
            path = folder / "quantized.onnx"
            emit_qdq(planner.graph.model, plan, path, execution=EXECUTION, check=False)
            found = score(case, path, reference)
            plain.setdefault(symmetric, found)
            for metric, value in found.values().items():
                difference = ""
                if own.alpha is not None:
                    d = paired(found, plain[symmetric], metric)
                    difference = f"{d.mean:+.4f} ({d.low:+.4f} .. {d.high:+.4f})"
                yield (
                    case.name,
                    "symmetric" if symmetric else "asymmetric",
                    "" if own.alpha is None else f"{own.alpha:g}",
                    str(own.n_tensors),
                    metric,
                    f"{value:.4f}",
                    difference,
                )


def main() -> int:
    """Print the table as it grows."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--assets", type=Path, default=ASSETS, help="real models and data")
    parser.add_argument("--only", nargs="*", default=MODELS, help="names of models")
    parser.add_argument("--alphas", default="0.3,0.5,0.7")
    parser.add_argument("--method", default="auto", help="threshold method of activations")
    parser.add_argument("--markdown", type=Path, help="write the table here too")
    given = parser.parse_args()
    alphas = [float(text) for text in given.alphas.split(",")]
    lines = [f"| {' | '.join(HEADER)} |", f"|{' --- |' * len(HEADER)}"]
    print("\n".join(lines), flush=True)
    with tempfile.TemporaryDirectory(prefix="bench-smoothing-") as scratch:
        for name in given.only:
            case = make_case(name, given.assets, Path(scratch))
            if case is None:
                print(f"{name}: skipped, since it is not in {given.assets}", file=sys.stderr)
                continue
            folder = Path(scratch) / case.name
            folder.mkdir()
            for row in rows(case, folder, alphas, given.method):
                lines.append(f"| {' | '.join(row)} |")
                print(lines[-1], flush=True)
    if given.markdown is not None:
        given.markdown.write_text("\n".join(lines) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
