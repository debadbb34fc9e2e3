#!/usr/bin/env python3
"""The search's pool: what a trial costs beside its evaluation, two workers beside one, the driver
with evaluations that take no time, and 500 trials in MLflow: in SQLite, and over HTTP.

    scripts/bench_pool.py --assets FOLDER [--json FILE] [--parts share,speedup,driver,mlflow]

``trial_overhead_share``: everything but the evaluation, per trial of one warm worker, from the end
of its first trial to the end of its last; the trials go to MLflow meanwhile, as in ``qdist tune``.
``two_worker_speedup``: trials per second of two workers over one, each from the moment all workers
have finished a trial; the median of pairs, in turn one before two and two before one. Beside it
``plain_scaling``: what two processes that have nothing to do with each other get out of this
machine, scoring the plain plan as a trial does. ``driver``: 2,000 trials.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from bench_models import Case, stories_case
from bench_stubs import Given, driver, tracking
from mlflow_serving import served

from actors.outcome import Hooks
from actors.session import ClusterSpec
from actors.trial_book import open_book
from actors.trial_worker import TrialSetup
from actors.tune import tune
from qdist.calibration import CalibrationSettings, calibrate_here, prepare
from qdist.cli.commands.trial_models import TrialModels
from qdist.cli.commands.tune_log import TrialLog
from qdist.cli.tracking import TrackingSpec, open_tracker
from qdist.data.arrays import ArraySource
from qdist.data.preprocess import Preprocess
from qdist.emit.qdq import emit_qdq
from qdist.evaluate.builtin import DatasetEvaluation, Runner, evaluate_on
from qdist.evaluate.reference import read_outputs
from qdist.evaluate.scorer import Scorer
from qdist.memory import keep_freed
from qdist.model.freeze import freeze
from qdist.model.graph import Graph
from qdist.model.loading import load_model
from qdist.model.session import Execution
from qdist.plan.choice import LayerChoice
from qdist.plan.planner import Planner
from qdist.plan.target import Target
from qdist.search.trial import Candidate, Trial
from qdist.store.zarr_store import create_store

LEAST_S = 5.5
"""How long an evaluation is to take, at least."""
PARTS = ("share", "speedup", "driver", "mlflow")
TARGET = Target(name="bench", precisions=("int8", "w8a16", "int16", "float32"))


@dataclass(frozen=True, slots=True, kw_only=True)
class Subject:
    """stories260K, calibrated, and how it is scored."""

    setup: TrialSetup
    names: tuple[str, ...]
    choosable: tuple[str, ...]
    evaluation_s: float

    def candidates(self, n: int) -> list[Candidate]:
        """``n`` different plans: the i-th layer that may change is wider, and then the next two."""
        found = []
        for i in range(n):
            width = 1 + i // len(self.choosable)
            changed = [self.choosable[(i + k) % len(self.choosable)] for k in range(width)]
            choices = dict.fromkeys(self.names, LayerChoice())
            choices |= dict.fromkeys(changed, LayerChoice(precision="w8a16"))
            found.append(
                Candidate(
                    number=i, label=f"w8a16 in {width}", choices=choices, changed=tuple(changed)
                )
            )
        return found


def main() -> int:
    """Measure the chosen parts; write them as JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--assets", type=Path, required=True, help="folder of models and data")
    parser.add_argument("--json", type=Path, help="write the figures here")
    parser.add_argument("--parts", default=",".join(PARTS), help="of " + ", ".join(PARTS))
    parser.add_argument("--trials", type=int, default=8, help="per measurement with evaluations")
    parser.add_argument("--rounds", type=int, default=3, help="pairs of one worker and two")
    parser.add_argument("--stub-trials", type=int, default=2000)
    options = parser.parse_args()
    parts = options.parts.split(",")
    figures: dict[str, Any] = {"cores": os.cpu_count()}
    with tempfile.TemporaryDirectory(prefix="qdist-pool-") as name:
        folder = Path(name)
        if {"share", "speedup"} & set(parts):
            figures |= _with_evaluations(options, parts, folder)
        if "driver" in parts:
            figures["driver"] = driver(options.stub_trials, folder)
            print(f"driver: {figures['driver']}", flush=True)
        if "mlflow" in parts:
            figures["mlflow"] = tracking(f"sqlite:///{folder / 'many.db'}", folder)
            print(f"mlflow: {figures['mlflow']}", flush=True)
            with served(f"sqlite:///{folder / 'served.db'}", folder / "served") as url:
                figures["mlflow_server"] = tracking(url, folder)
            print(f"mlflow_server: {figures['mlflow_server']}", flush=True)
    if options.json is not None:
        options.json.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    return 0


def _with_evaluations(
    options: argparse.Namespace, parts: Sequence[str], folder: Path
) -> dict[str, Any]:
    n = options.trials
    case = _case(options.assets.absolute(), folder)
    if case is None:
        raise SystemExit(f"no stories260K below {options.assets}")
    subject, scorer = _subject(case, folder)
    figures: dict[str, Any] = {"float_evaluation_s": subject.evaluation_s}
    with scorer:
        found: dict[int, list[dict[str, Any]]] = {1: [], 2: []}
        scalings: list[float] = []
        for index in range(options.rounds):
            for workers in (1, 2) if index % 2 == 0 else (2, 1):
                if workers == 1 or "speedup" in parts:
                    measured = _measured(subject, folder / str(index), n, workers)
                    found[workers].append(measured)
                    print(f"{workers} workers: {measured}", flush=True)
            if "speedup" in parts:
                scalings.append(_plain_scaling(subject, folder / "plain.onnx"))
                print(f"plain scaling: {scalings[-1]:.2f}", flush=True)
        figures["one_worker"], figures["two_workers"] = found[1], found[2]
        figures["trial_overhead_share"] = statistics.median(o["overhead_share"] for o in found[1])
        if scalings:
            figures["two_worker_speedup"] = statistics.median(
                two["trials_per_s"] / one["trials_per_s"]
                for one, two in zip(found[1], found[2], strict=True)
            )
            figures["plain_scaling"] = statistics.median(scalings)
    print({k: v for k, v in figures.items() if isinstance(v, float)}, flush=True)
    return figures


def _case(assets: Path, folder: Path) -> Case | None:
    """Samples enough for an evaluation of `LEAST_S` with the float model."""
    n = 256
    while (case := stories_case(assets, folder, n)) is not None:
        seconds = _float_run_s(case)
        if seconds >= LEAST_S or n > 1 << 15:
            return case
        n = int(n * max(1.3, 1.15 * LEAST_S / seconds))
    return None


def _source(case: Case, limit: int | None = None) -> ArraySource:
    return ArraySource(
        path=Path(case.samples),
        inputs={case.input_name: "x"},
        limit=limit,
        preprocess=Preprocess(dtype="int64"),
    )


def _float_run_s(case: Case) -> float:
    """One evaluation of the float model."""
    evaluation = DatasetEvaluation(
        source=_source(case), metric="perplexity", token_input=case.input_name
    )
    begin = time.perf_counter()
    evaluate_on(Runner(Path(case.model), Execution()), evaluation)
    return time.perf_counter() - begin


def _plain_scaling(subject: Subject, model: Path) -> float:
    """Twice the time of one process over that of two at once, scoring the plain plan, which is
    written to ``model``."""
    setup = subject.setup
    planner = Planner(Graph(setup.frozen), setup.record, setup.taps, setup.settings)
    plan = planner.plan(dict.fromkeys(subject.names, LayerChoice()))
    emit_qdq(setup.frozen, setup.target.project(plan), model, check=False)
    if not isinstance(setup.evaluation, DatasetEvaluation) or setup.reference is None:
        raise SystemExit("the trials are not scored beside the float model's outputs")
    work = (model, setup.evaluation, setup.reference)
    context = multiprocessing.get_context("spawn")
    with context.Pool(2, keep_freed) as pool:
        pool.map(_scored_s, [work] * 2, chunksize=1)
        (alone,) = pool.map(_scored_s, [work])
        both = max(pool.map(_scored_s, [work] * 2, chunksize=1))
    return 2 * alone / both


def _scored_s(work: tuple[Path, DatasetEvaluation, Path]) -> float:
    """One evaluation as in a trial."""
    model, evaluation, reference = work
    begin = time.perf_counter()
    evaluate_on(Runner(model, Execution()), evaluation, read_outputs(reference))
    return time.perf_counter() - begin


def _subject(case: Case, folder: Path) -> tuple[Subject, Scorer]:
    model = Path(case.model)
    frozen = freeze(load_model(model))
    graph = Graph(frozen)
    few = _source(case, limit=16)
    job = prepare(frozen, few, CalibrationSettings(), Execution(), graph=graph)
    merged = calibrate_here(job, few, create_store(folder / "store", job.identity))
    planner = Planner(graph, merged.record, job.taps)
    evaluation = DatasetEvaluation(
        source=_source(case), metric="perplexity", token_input=case.input_name
    )
    scorer = Scorer(
        evaluation=evaluation,
        float_model=model,
        scratch=folder / "scratch",
        execution=Execution(),
    )
    report = scorer.score(model)
    setup = TrialSetup(
        frozen=frozen,
        record=merged.record,
        taps=job.taps,
        settings=planner.settings,
        target=TARGET,
        evaluation=evaluation,
        execution=Execution(),
        scratch=scorer.scratch,
        reference=scorer.reference,
    )
    subject = Subject(
        setup=setup,
        names=tuple(layer.name for layer in planner.layers),
        choosable=tuple(layer.name for layer in planner.choosable() if layer.is_compute),
        evaluation_s=report.seconds,
    )
    return subject, scorer


def _measured(subject: Subject, folder: Path, n: int, workers: int) -> dict[str, Any]:
    """A search of ``n`` plans in one round, logged to MLflow."""
    folder.mkdir(exist_ok=True)
    book = open_book(folder / f"trials-of-{workers}", {})
    ends: list[float] = []
    seconds: list[float] = []
    tracked = TrackingSpec(
        uri=f"sqlite:///{folder / 'mlflow.db'}",
        experiment="bench",
        artifacts="all",
        enabled=True,
        run_name=None,
    )
    with open_tracker(tracked, spool_folder=folder) as tracker:
        parent = tracker.start_run("bench", command="tune", config={})
        log = TrialLog(parent, TrialModels(folder=book.folder), "stories260K", "all")

        def on_trial(trial: Trial) -> None:
            ends.append(time.perf_counter())
            found = trial.details.get("evaluation_s")
            seconds.append(found if isinstance(found, float) else 0.0)
            log.add(trial)

        with log:
            outcome = tune(
                Given(subject.candidates(n), n),
                subject.setup,
                ClusterSpec(address=None, n_workers=workers, cpus_per_worker=1),
                book,
                hooks=Hooks(on_trial=on_trial),
            )
    failed = [trial.reason for trial in outcome.trials if trial.report is None]
    if failed or outcome.n_scored != n:
        raise SystemExit(f"{outcome.n_scored} of {n} plans were scored; {failed[:1]}")
    warm_s = ends[-1] - ends[workers - 1]
    steps = [b - a for a, b in pairwise(ends)]
    return {
        "trials": n,
        "evaluation_s": statistics.median(seconds),
        "least_evaluation_s": min(seconds),
        "trials_per_s": (n - workers) / warm_s,
        # With several workers the steps of one are not told apart, so this is of one alone.
        "overhead_share": 1 - sum(seconds[1:]) / sum(steps) if workers == 1 else None,
        "driver_ms_per_trial": 1e3 * outcome.driver_s / n,
        "logging_ms_per_trial": 1e3 * log.seconds / n,
    }


if __name__ == "__main__":
    sys.exit(main())
