#!/usr/bin/env python3
"""The probe of a search beside plain float runs, and beside a run for each layer and choice.

    scripts/bench_search.py [--json FILE] [--scope compute|all] [--rounds N] [--samples N] [--quick]

On the encoder of the calibration benchmark, with K = 3 precisions, one thread on every side and the
same samples. A *float pass* is the given model under ONNX Runtime's defaults over all samples. Ours
is a whole call of ``qdist.evaluate.sensitivity.sensitivities``: building the graph, opening the
session, running, and summing up. ``vs_naive`` is extrapolated from a sample of its runs, each of
which scores the model with one layer quantized against float outputs that are there already; what
building their graphs takes is left out, in their favour. Medians of paired rounds; figures that end
in ``_cpu`` are of processor seconds, which a busy machine disturbs less.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

for _name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "NUMBA_NUM_THREADS"):
    os.environ.setdefault(_name, "1")

import numpy as np  # noqa: E402
from bench_engine import EXECUTION, Subject, user_session  # noqa: E402
from bench_models import EncoderShape, encoder_case  # noqa: E402
from bench_timing import Lap, cpu, lap, machine, paired, ratio, wall  # noqa: E402

from qdist.calibration import calibrate_here  # noqa: E402
from qdist.emit.writer import write_model  # noqa: E402
from qdist.evaluate.sensitivity import sensitivities  # noqa: E402
from qdist.files import write_json  # noqa: E402
from qdist.model.session import scoring_session  # noqa: E402
from qdist.plan.choice import LayerChoice  # noqa: E402
from qdist.plan.plan_settings import PlanSettings  # noqa: E402
from qdist.plan.planner import Planner  # noqa: E402
from qdist.plan.precision import PRECISIONS  # noqa: E402
from qdist.plan.target import Target  # noqa: E402
from qdist.simulate.assemble import assemble  # noqa: E402
from qdist.simulate.twin_sums import twin_key, twin_sums  # noqa: E402
from qdist.simulate.twins import only  # noqa: E402
from qdist.store.zarr_store import create_store  # noqa: E402

CHOICES = ("int8", "w4a8", "w8a16")
BOUND = 1.25
BATCH = 4
"""Samples per run, on every side."""
N_NAIVE = 6
"""Layer and choice pairs that are run by themselves."""
SMALL = EncoderShape(n_layers=2, width=96, n_heads=3, feed_forward=384, length=64)


def main() -> int:
    """Measure, print, write; exit status 1 where the bound does not hold."""
    options = _options()
    with tempfile.TemporaryDirectory(prefix="qdist-bench-") as folder:
        figures = measure(Path(folder), options, lambda text: print(text, file=sys.stderr))
    print(json.dumps(figures, indent=2))
    if options.json is not None:
        write_json(options.json, figures)
    return 0 if figures["sensitivity_ratio"] <= BOUND or options.quick else 1


def measure(
    folder: Path, options: argparse.Namespace, say: Callable[[str], None]
) -> dict[str, Any]:
    """All figures, as JSON."""
    n_samples = 8 if options.quick else options.samples
    subject = Subject(encoder_case(folder, n_samples, SMALL if options.quick else None), n_samples)
    job = subject.job("all")
    merged = calibrate_here(job, subject.source, create_store(folder / "store", job.identity))
    settings = PlanSettings(scope=options.scope)
    planner = Planner(subject.graph, merged.record, job.taps, settings)
    target = Target(name="any", precisions=tuple(PRECISIONS))
    plans = [
        target.project(planner.plan(dict.fromkeys(names_of(planner), LayerChoice(precision=name))))
        for name in CHOICES
    ]
    feeds = [subject.feeds(keys) for keys in subject.batches(BATCH)]
    session = user_session(subject.case)

    def float_pass() -> None:
        for given in feeds:
            session.run(None, given)

    def ours() -> None:
        sensitivities(
            subject.frozen, plans, subject.source, EXECUTION, batch=BATCH, graph=subject.graph
        )

    float_pass()
    laps = paired({"float": float_pass, "ours": ours}, 1 if options.quick else options.rounds, say)
    float_s, ours_s = wall(laps["float"]), wall(laps["ours"])
    float_cpu_s, ours_cpu_s = cpu(laps["float"]), cpu(laps["ours"])
    naive, n_pairs = _naive(folder, subject, plans, feeds, say)
    return {
        "machine": machine(),
        "model": "encoder",
        "scope": options.scope,
        "n_samples": n_samples,
        "n_layers": len(planner.choosable()),
        "choices": list(CHOICES),
        "n_twins": len(twin_sums(subject.frozen, plans).keys),
        "float_pass_s": float(np.median(float_s)),
        "sensitivity_s": float(np.median(ours_s)),
        "sensitivity_ratio": ratio(ours_s, [(1 + len(CHOICES)) * s for s in float_s]),
        "sensitivity_ratio_cpu": ratio(ours_cpu_s, [(1 + len(CHOICES)) * s for s in float_cpu_s]),
        "sensitivity_bound": BOUND,
        "vs_naive": n_pairs * float(np.median(wall(naive))) / float(np.median(ours_s)),
        "vs_naive_cpu": n_pairs * float(np.median(cpu(naive))) / float(np.median(ours_cpu_s)),
        "vs_naive_is": f"extrapolated from {N_NAIVE} of {n_pairs} runs",
    }


def names_of(planner: Planner) -> list[str]:
    """All layers of the model."""
    return [layer.name for layer in planner.layers]


def _naive(
    folder: Path,
    subject: Subject,
    plans: list[Any],
    feeds: list[Any],
    say: Callable[[str], None],
) -> tuple[list[Lap], int]:
    """Some runs with one layer quantized, and how many such runs there are."""
    pairs = {
        twin_key(layer): (plan, layer.name)
        for plan in plans
        for layer in plan.plan.layers
        if layer.is_quantized
    }
    chosen = list(pairs.values())[:: max(1, len(pairs) // N_NAIVE)][:N_NAIVE]
    laps = []
    for i, (plan, name) in enumerate(chosen):
        graph = assemble(subject.frozen, only(plan, {name}))
        path = write_model(graph, folder / f"naive-{i}.onnx").path
        session = scoring_session(path, EXECUTION)

        def run(session: Any = session) -> None:
            for given in feeds:
                session.run(None, given)

        run()
        done, _ = lap(run)
        laps.append(done)
        say(f"{name} alone: {done.wall_s:.2f} s ({i + 1}/{len(chosen)})")
    return laps, len(pairs)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--json", type=Path, help="write the figures there")
    parser.add_argument("--scope", choices=("compute", "all"), default="compute")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--quick", action="store_true", help="a smoke run on a small encoder")
    return parser.parse_args()


if __name__ == "__main__":
    raise SystemExit(main())
