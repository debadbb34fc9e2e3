"""The search's driver and its log, with evaluations that take no time."""

from __future__ import annotations

import resource
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from actors.outcome import Limits, Outcome
from actors.session import ClusterSpec, ray_session
from actors.statistics import StatisticsTask
from actors.trial_book import open_book
from actors.trial_worker import TrialTask
from actors.tune import search
from qdist.cli.commands.trial_models import TrialModels
from qdist.cli.commands.tune_log import TrialLog
from qdist.cli.tracking import TrackingSpec, open_tracker
from qdist.evaluate.report import EvalReport
from qdist.plan.choice import LayerChoice
from qdist.search.results import PlanResult
from qdist.search.trial import Candidate, Trial


@dataclass
class Given:
    """Asks for candidates, so many a round."""

    candidates: Sequence[Candidate]
    per_round: int
    n_told: int = 0
    told: list[Trial] = field(default_factory=list)

    def ask(self) -> list[Candidate]:
        """The next of them."""
        return list(self.candidates[self.n_told : self.n_told + self.per_round])

    def tell(self, trials: Iterable[Trial]) -> None:
        """Remember."""
        self.told += trials
        self.n_told = len(self.told)


class Idle:
    """A worker whose evaluation takes no time."""

    def setup(self) -> dict[str, Any]:
        """Nothing to get ready."""
        return {}

    def run(self, task: TrialTask | StatisticsTask) -> PlanResult:
        """A made-up score."""
        if not isinstance(task, TrialTask):
            raise TypeError("candidates here have no statistics of their own")
        score = int(task.key[:8], 16) / 16**8
        report = EvalReport(
            score=score,
            metric="score",
            higher_is_better=True,
            metrics={"score": score},
            n_samples=1,
            seconds=0.0,
        )
        return PlanResult(
            digest=task.key, report=report, n_bytes=1000, details={"evaluation_s": 0.0}
        )


def _stub_candidates(n: int, n_layers: int = 60) -> list[Candidate]:
    """Different plans of a model of ``n_layers`` layers."""
    names = [f"/layer.{i}/MatMul" for i in range(n_layers)]
    found = []
    for number in range(n):
        changed = tuple(name for i, name in enumerate(names) if number >> (i % 12) & 1 and i < 12)
        choices = dict.fromkeys(names, LayerChoice(th_scale=1 + number // 4096))
        choices |= dict.fromkeys(changed, LayerChoice(precision="w8a16"))
        found.append(
            Candidate(number=number, label=f"plan {number}", choices=choices, changed=changed)
        )
    return found


def driver(n: int, folder: Path) -> dict[str, Any]:
    """The driver with evaluations of no time: its processor time per trial, and where that ends."""
    figures: dict[str, Any] = {"trials": n}
    with ray_session(ClusterSpec(address=None, n_workers=2, cpus_per_worker=1)):
        for workers in (2, 8):
            begin = resource.getrusage(resource.RUSAGE_SELF)
            outcome: Outcome = search(
                Given(_stub_candidates(n), 50),
                partial(Idle),
                ClusterSpec(address=None, n_workers=workers, cpus_per_worker=2 / workers),
                open_book(folder / f"stub-{workers}", {}),
                Limits(),
            )
            end = resource.getrusage(resource.RUSAGE_SELF)
            processor_s = end.ru_utime + end.ru_stime - begin.ru_utime - begin.ru_stime
            if len(outcome.trials) != n:
                raise SystemExit(f"{len(outcome.trials)} of {n} trials")
            figures[f"{workers} workers"] = {
                "trials_per_s": n / outcome.seconds,
                "driver_processor_ms": 1e3 * processor_s / n,
                "driver_own_ms": 1e3 * outcome.driver_s / n,
                "workers_kept_busy_at_5_s": round(5.0 * n / outcome.seconds),
            }
    return figures


def tracking(uri: str, folder: Path, n: int = 500) -> dict[str, Any]:
    """``n`` trials below one parent in MLflow at ``uri``: to send them, and to list them.
    ``folder``: for what MLflow does not take, which is an error here."""
    from mlflow import MlflowClient

    tracked = TrackingSpec(uri=uri, experiment="many", artifacts="all", enabled=True, run_name=None)
    worker = Idle()
    with open_tracker(tracked, spool_folder=folder) as tracker:
        parent = tracker.start_run("many", command="tune", config={})
        log = TrialLog(parent, TrialModels(folder=folder / "none"), "stub", "all")
        with log:
            for candidate in _stub_candidates(n):
                task = TrialTask(
                    key=candidate.key,
                    number=candidate.number,
                    choices=(),
                    changed=(),
                    wants_layers=False,
                    plans=folder,
                    session="",
                )
                result = worker.run(task)
                log.add(Trial(candidate=candidate, report=result.report, n_bytes=result.n_bytes))
        if tracker.n_spooled:
            raise SystemExit(f"{tracker.n_spooled} records did not get through")
    client = MlflowClient(tracking_uri=uri)
    experiment = client.get_experiment_by_name("many").experiment_id
    begin = time.perf_counter()
    found = client.search_runs([experiment], max_results=1000)
    listing_s = time.perf_counter() - begin
    begin = time.perf_counter()
    points = client.get_metric_history(parent.id, "best_so_far")
    history_s = time.perf_counter() - begin
    if len(found) != n + 1 or len(points) != n:
        raise SystemExit(f"{len(found)} runs and {len(points)} points")
    return {
        "trials": n,
        "ms_per_trial": 1e3 * log.seconds / n,
        "list_all_s": listing_s,
        "curve_s": history_s,
    }
