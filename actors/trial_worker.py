"""What scores the candidates of a search: planned, written, loaded and scored by one worker."""

from __future__ import annotations

import pickle
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from actors.plan_folder import ARTIFACT, PLAN, PlanFolder
from actors.statistics import Measured, StatisticsTask, run_statistics
from qdist.data.source import DataSource
from qdist.digest import digest_json
from qdist.emit.qdq import emit_qdq
from qdist.errors import QdistError
from qdist.evaluate.command import CommandError
from qdist.evaluate.early import Incumbent
from qdist.evaluate.evaluation_run import EvaluationRun
from qdist.evaluate.in_place import InPlace
from qdist.evaluate.report import EvalReport
from qdist.evaluate.scorer import Evaluation, Scorer
from qdist.evaluate.sums import Deviation
from qdist.memory import keep_freed
from qdist.model.freeze import FrozenModel
from qdist.model.graph import Graph
from qdist.model.session import Execution, fingerprint
from qdist.model.taps import TapTable
from qdist.plan.choice import LayerChoice
from qdist.plan.plan_settings import PlanSettings
from qdist.plan.planner import Planner
from qdist.plan.resolved import resolved_digest
from qdist.plan.target import ProjectedPlan, Target
from qdist.search.applied import planner_with
from qdist.search.results import LOST_TO, PlanResult
from qdist.search.trial import EVALUATION, Candidate
from qdist.stats.record import CalibrationRecord
from qdist.store.record_file import read_record

if TYPE_CHECKING:  # what it imports takes time that few searches need
    from qdist.search.statistics import CandidateStatistics

_KEPT_PLANNERS = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class TrialTask:
    """One plan to score, hashable so that it can travel. ``key``: of its choices; ``number``: of
    the trial that first asked for it; ``plans``: below which every plan has its folder;
    ``incumbent``: what it has to beat, where a trial that cannot may stop early; ``settings`` of
    the candidate; ``statistics``: where the record is that these ask for."""

    key: str
    number: int
    choices: tuple[tuple[str, LayerChoice], ...]
    changed: tuple[str, ...]
    wants_layers: bool
    plans: Path
    session: str
    incumbent: Incumbent | None = None
    settings: tuple[tuple[str, int | float | str], ...] = ()
    statistics: Path | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Twin:
    """The answer to a task whose plan is that of another task, ``owner`` (a key), which runs."""

    digest: str
    owner: str


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerSamples:
    """What layers are compared on, in trials that want it: the first ``n_samples`` of ``source``,
    ``batch`` a run."""

    source: DataSource
    n_samples: int
    batch: int = 8

    @property
    def name(self) -> str:
        """Says whether two comparisons were on the same samples of one source."""
        return digest_json([self.n_samples, self.source.preprocessing()])[:16]


@dataclass(frozen=True, slots=True, kw_only=True)
class TrialSetup:
    """What a worker needs besides the candidate. Picklable. ``reference``: `Scorer.reference` of
    a scorer that lives until the search has ended. ``layers``: None where no layer is compared.
    ``statistics``: what measures for candidates with statistics of their own; None where there may
    be none. It goes to workers packed (`packed`), since few searches need it."""

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
    layers: LayerSamples | None = None
    statistics: CandidateStatistics | bytes | None = None

    def packed(self) -> TrialSetup:
        """The same, to be sent to workers."""
        return replace(self, statistics=pickle.dumps(self.statistics))


class TrialWorker:
    """Scores candidates. A plain class: one process, one thread.

    Between trials it keeps the model, the histograms and the ranges read from them, and, once it
    has compared layers, the loaded float model and its values. The float model's outputs for the
    evaluation are read from the file that the driver wrote once.
    """

    def __init__(self, setup: TrialSetup) -> None:
        self._setup = setup
        self._planner: Planner | None = None
        self._planners: dict[object, Planner] = {}
        self._scorer: Scorer | None = None
        self._statistics: CandidateStatistics | None = None
        self._in_place: InPlace | None = None
        self._compared = ""

    def setup(self) -> dict[str, Any]:
        """Index the model; says under which fingerprint it runs."""
        keep_freed()
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
        return {"fingerprint": fingerprint(s.execution)}

    def run(self, task: TrialTask | StatisticsTask) -> PlanResult | Twin | Measured:
        """Score a candidate, or measure what candidates need. Safe to run twice."""
        if isinstance(task, StatisticsTask):
            return run_statistics(task, self._measuring())
        return self._run_trial(task)

    def _measuring(self) -> CandidateStatistics:
        if self._statistics is None:
            given = self._setup.statistics
            found = pickle.loads(given) if isinstance(given, bytes) else given
            if found is None:
                raise RuntimeError("nothing measures for candidates of this search")
            self._statistics = found
        return self._statistics

    def _run_trial(self, task: TrialTask) -> PlanResult | Twin:
        """Plan, write, load and score one candidate, unless its plan was scored before or is being
        scored. One that the target refuses, that cannot be written, loaded or scored has a reason
        and no report. What was scored is on disk when this returns."""
        begin = time.perf_counter()
        try:
            projected = self._projected(task)
            digest = resolved_digest(projected.plan)
        except QdistError as error:
            return PlanResult(digest="", report=None, n_bytes=0, reason=str(error))
        folder = PlanFolder(path=task.plans / digest[:32], session=task.session)
        found = _usable(folder.result(), task)
        if found is None:
            owner = folder.claimed_by(task.key)
            if owner != task.key:
                return Twin(digest=digest, owner=owner)
            # Who held the claim may have finished in between.
            found = _usable(folder.result(), task)
        if found is not None:
            return self._with_layers(task, projected, folder, replace(found, reused=True))
        result = self._scored(task, projected, digest, folder, begin)
        folder.save(result)
        return self._with_layers(task, projected, folder, result)

    def _projected(self, task: TrialTask) -> ProjectedPlan:
        candidate = Candidate(
            number=task.number, label="", choices=dict(task.choices), changed=task.changed
        )
        plan = self._planner_for(task).plan(candidate.choices, candidate.why)
        return self._setup.target.project(plan)

    def _planner_for(self, task: TrialTask) -> Planner:
        """The worker's own, or one as the task's settings want it, of which a few are kept."""
        if self._planner is None:
            raise RuntimeError("run() before setup()")
        if not task.settings:
            return self._planner
        key = (task.settings, task.statistics)
        if key not in self._planners:
            while len(self._planners) >= _KEPT_PLANNERS:
                self._planners.pop(next(iter(self._planners)))
            self._planners[key] = planner_with(
                self._planner,
                dict(task.settings),
                lambda _: self._record(task),
                self._factors(task),
            )
        return self._planners[key]

    def _model(self, task: TrialTask) -> FrozenModel:
        """The float model that the task's plan is for: smoothed, where its settings say so."""
        return self._planner_for(task).graph.model

    def _factors(self, task: TrialTask) -> CalibrationRecord | None:
        is_smoothed = any(name == "smoothing" for name, _ in task.settings)
        return self._measuring().factors if is_smoothed else None

    def _record(self, task: TrialTask) -> CalibrationRecord:
        if task.statistics is None:
            raise RuntimeError(f"no statistics of {dict(task.settings)} came with the task")
        return read_record(task.statistics, self._setup.taps.tensors)

    def _scored(
        self,
        task: TrialTask,
        projected: ProjectedPlan,
        digest: str,
        folder: PlanFolder,
        begin: float,
    ) -> PlanResult:
        """``begin``: when work on the plan began, by `time.perf_counter`."""
        details: dict[str, object] = {}
        report: EvalReport | None = None
        n_bytes, reason = 0, ""
        try:
            artifact = emit_qdq(self._model(task), projected, folder.path / ARTIFACT, check=False)
            projected.plan.save(folder.path / PLAN)
            n_bytes = artifact.n_bytes
            details |= {
                "build_s": time.perf_counter() - begin,
                "plan_digest": artifact.plan_digest,
                "opset": artifact.opset,
                "counts": dict(projected.plan.counts()),
                "coverage": str(projected.plan.coverage()),
            }
            report = self._score(artifact.path, task.incumbent, details)
        except QdistError as error:
            reason = str(error)
        return PlanResult(
            digest=digest, report=report, n_bytes=n_bytes, reason=reason, details=details
        )

    def _score(
        self, model: Path, incumbent: Incumbent | None, details: dict[str, object]
    ) -> EvalReport:
        if self._scorer is None:
            raise RuntimeError("run() before setup()")
        begin = time.perf_counter()
        try:
            report = self._scorer.score(model, incumbent)
        except QdistError as error:
            found = error.run if isinstance(error, CommandError) else None
            run = found or EvaluationRun(exit_status=None, seconds=time.perf_counter() - begin)
            details[EVALUATION] = run.to_json()
            raise
        finally:
            details["evaluation_s"] = time.perf_counter() - begin
        if report.stopped_early and incumbent is not None:
            details[LOST_TO] = incumbent.mean
        return report

    def _with_layers(
        self, task: TrialTask, projected: ProjectedPlan, folder: PlanFolder, result: PlanResult
    ) -> PlanResult:
        """``result`` with every layer compared, where the task wants that and it can be had."""
        samples = self._setup.layers
        if not task.wants_layers or samples is None or result.report is None:
            return result
        if result.has_layers(samples.name):
            return result
        begin = time.perf_counter()
        try:
            layers = self._deviations(self._model(task), projected, samples)
        except QdistError:
            # The score stands, though this data cannot be compared on.
            layers = {}
        details = {**result.details, "layers_s": time.perf_counter() - begin}
        whole = replace(result, layers=layers, layers_of=samples.name, details=details)
        folder.save(whole)
        return whole

    def _deviations(
        self, model: FrozenModel, projected: ProjectedPlan, samples: LayerSamples
    ) -> dict[str, Deviation]:
        if self._in_place is None or self._compared != model.digest:
            self._compared = model.digest
            self._in_place = InPlace(
                model,
                samples.source,
                self._setup.execution,
                batch=samples.batch,
                n_samples=samples.n_samples,
            )
        return self._in_place.deviations(projected)


def _usable(found: PlanResult | None, task: TrialTask) -> PlanResult | None:
    """What is known of a plan, if it holds for the task."""
    return found if found is not None and found.holds_against(task.incumbent) else None
