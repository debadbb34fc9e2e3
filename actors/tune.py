"""The search over a pool of its own: every trial is planned, written, loaded and scored by one
worker, which keeps its histograms and its ranges between trials. The float model's outputs are
computed once, by whoever starts the search, and read from disk."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from actors.pool import Completed, Failed, Retried, WorkerLost, WorkerPool
from actors.session import ClusterSpec, ray_session
from qdist.emit.qdq import Artifact, emit_qdq
from qdist.errors import QdistError
from qdist.evaluate.report import EvalReport
from qdist.evaluate.scorer import Evaluation, Scorer
from qdist.model.freeze import FrozenModel
from qdist.model.graph import Graph
from qdist.model.session import Execution
from qdist.model.taps import TapTable
from qdist.plan.choice import LayerChoice
from qdist.plan.plan_settings import PlanSettings
from qdist.plan.planner import Planner
from qdist.plan.target import Target
from qdist.search.trial import Candidate, Strategy, Trial
from qdist.stats.record import CalibrationRecord

ARTIFACT = "model.onnx"
PLAN = "plan.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class TrialTask:
    """One candidate, hashable so that it can travel. ``folder``: where its files go."""

    number: int
    label: str
    choices: tuple[tuple[str, LayerChoice], ...]
    changed: tuple[str, ...]
    folder: Path


@dataclass(frozen=True, slots=True, kw_only=True)
class TrialSetup:
    """What a worker needs besides the candidate. Picklable. ``reference``: `Scorer.reference` of
    a scorer that lives until the search has ended."""

    frozen: FrozenModel
    record: CalibrationRecord
    taps: TapTable
    settings: PlanSettings
    target: Target
    evaluation: Evaluation
    execution: Execution
    scratch: Path
    reference: Path | None = None
    scorer_options: dict[str, Any] = field(default_factory=dict)


class TrialWorker:
    """Scores candidates. A plain class: one process, one thread."""

    def __init__(self, setup: TrialSetup) -> None:
        self._setup = setup
        self._planner: Planner | None = None
        self._scorer: Scorer | None = None

    def setup(self) -> dict[str, Any]:
        """Index the model."""
        s = self._setup
        graph = Graph(s.frozen, s.execution)
        self._planner = Planner(graph, s.record, s.taps, s.settings)
        self._scorer = Scorer(
            evaluation=s.evaluation,
            float_model=s.frozen.source,
            scratch=s.scratch,
            execution=s.execution,
            reference=s.reference,
            **s.scorer_options,
        )
        return {}

    def run(self, task: TrialTask) -> Trial:
        """Plan, write, load and score one candidate. One that the target refuses, that cannot be
        written, loaded or scored is a failed trial."""
        candidate = Candidate(
            number=task.number,
            label=task.label,
            choices=dict(task.choices),
            changed=task.changed,
        )
        details: dict[str, object] = {}
        report: EvalReport | None = None
        n_bytes, reason = 0, ""
        try:
            artifact = self._build(candidate, task.folder, details)
            n_bytes = artifact.n_bytes
            report = self._score(artifact.path, details)
        except QdistError as error:
            reason = str(error)
        return Trial(
            candidate=candidate, report=report, n_bytes=n_bytes, reason=reason, details=details
        )

    def _build(self, candidate: Candidate, folder: Path, details: dict[str, object]) -> Artifact:
        if self._planner is None:
            raise RuntimeError("run() before setup()")
        begin = time.perf_counter()
        plan = self._planner.plan(candidate.choices, candidate.why)
        projected = self._setup.target.project(plan)
        artifact = emit_qdq(self._setup.frozen, projected, folder / ARTIFACT, check=False)
        projected.plan.save(folder / PLAN)
        details |= {
            "build_s": time.perf_counter() - begin,
            "plan_digest": artifact.plan_digest,
            "opset": artifact.opset,
            "counts": dict(projected.plan.counts()),
            "coverage": str(projected.plan.coverage()),
        }
        return artifact

    def _score(self, model: Path, details: dict[str, object]) -> EvalReport:
        if self._scorer is None:
            raise RuntimeError("run() before setup()")
        begin = time.perf_counter()
        try:
            return self._scorer.score(model)
        finally:
            details["evaluation_s"] = time.perf_counter() - begin


def tune(
    strategy: Strategy,
    setup: TrialSetup,
    cluster: ClusterSpec,
    folder: Path,
    *,
    on_trial: Callable[[Trial], None] | None = None,
    on_message: Callable[[str], None] | None = None,
) -> list[Trial]:
    """Run the strategy to its end; all trials by number.

    Each round is finished before the next is asked for, so that the answer does not depend on
    timing. ``on_trial`` hears of every trial as it ends, ``on_message`` of retries and losses.
    Raises QD801 to QD804; what is wrong with one candidate is the reason of its failed trial.
    """
    trials: dict[int, Trial] = {}
    with (
        ray_session(cluster),
        WorkerPool[TrialTask, Trial](
            cluster, partial(TrialWorker, setup), name="trial", prefetch=0
        ) as pool,
    ):
        while proposals := strategy.ask():
            by_number = {candidate.number: candidate for candidate in proposals}
            for candidate in proposals:
                pool.submit(_task(candidate, folder))
            finished = _round(pool, by_number, on_trial, on_message)
            trials.update((trial.candidate.number, trial) for trial in finished)
            strategy.tell(finished)
    return [trials[number] for number in sorted(trials)]


def trial_folder(folder: Path, number: int) -> Path:
    """Where a trial's files are."""
    return folder / f"trial-{number:03d}"


def _task(candidate: Candidate, folder: Path) -> TrialTask:
    return TrialTask(
        number=candidate.number,
        label=candidate.label,
        choices=tuple(candidate.choices.items()),
        changed=candidate.changed,
        folder=trial_folder(folder, candidate.number),
    )


def _round(
    pool: WorkerPool[TrialTask, Trial],
    by_number: dict[int, Candidate],
    on_trial: Callable[[Trial], None] | None,
    on_message: Callable[[str], None] | None,
) -> list[Trial]:
    finished: list[Trial] = []
    tell: Callable[[str], None] = on_message or (lambda text: None)
    while pool.n_pending:
        match pool.next_event(0.5):
            case Completed(result=trial):
                whole = Trial(
                    candidate=by_number[trial.candidate.number],
                    report=trial.report,
                    n_bytes=trial.n_bytes,
                    reason=trial.reason,
                    details=trial.details,
                )
                finished.append(whole)
                if on_trial is not None:
                    on_trial(whole)
            case Failed(task=task, error=error):
                # Of the other trials' results nothing is lost, whatever it was.
                lost = Trial(
                    candidate=by_number[task.number], report=None, n_bytes=0, reason=str(error)
                )
                finished.append(lost)
                if on_trial is not None:
                    on_trial(lost)
            case Retried(task=task, reason=reason):
                tell(f"trial {task.number} is tried again: {reason}")
            case WorkerLost(worker=worker, reason=reason):
                tell(f"worker {worker} is gone: {reason}")
            case _:
                pass
    return sorted(finished, key=lambda trial: trial.candidate.number)
