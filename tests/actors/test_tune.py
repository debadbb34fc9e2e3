"""The search over a real pool: one candidate that cannot be costs no other its trial."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

from actors.session import ClusterSpec, RaySession
from actors.trial_book import open_book
from actors.trial_worker import TrialSetup
from actors.tune import tune
from qdist.calibration import CalibrationSettings, calibrate_here, prepare
from qdist.demo import demo_file
from qdist.evaluate.builtin import DatasetEvaluation
from qdist.evaluate.scorer import Scorer
from qdist.model.freeze import freeze
from qdist.model.graph import Graph
from qdist.model.loading import load_model
from qdist.plan.choice import LayerChoice
from qdist.plan.planner import Planner
from qdist.search.trial import Candidate, Trial
from qdist.store.zarr_store import create_store
from tests.onnx_models import ANY_TARGET, EXECUTION, samples_of
from tests.user_commands import python

CNN = demo_file("digits_cnn.onnx")
PER_TENSOR = replace(ANY_TARGET, name="coarse", per_channel=False)


class Rounds:
    """One round: a plan for every granularity, the one that the target refuses first."""

    def __init__(self, layers: Iterable[str]) -> None:
        self._plans = [
            dict.fromkeys(layers, LayerChoice(granularity=name)) for name in ("channel", "tensor")
        ]
        self.told: list[Trial] = []

    def ask(self) -> list[Candidate]:
        return (
            []
            if self.told
            else [
                Candidate(number=i, label=str(i), choices=plan)
                for i, plan in enumerate(self._plans)
            ]
        )

    def tell(self, trials: Iterable[Trial]) -> None:
        self.told.extend(trials)


def test_a_candidate_that_the_target_refuses_is_a_failed_trial(
    cluster: RaySession, tmp_path: Path
) -> None:
    frozen = freeze(load_model(CNN))
    source = samples_of("images", 1, 8, 8, n=8)
    graph = Graph(frozen)
    job = prepare(frozen, source, CalibrationSettings(), EXECUTION, graph=graph)
    merged = calibrate_here(job, source, create_store(tmp_path / "store", job.identity))
    planner = Planner(graph, merged.record, job.taps)
    strategy = Rounds([layer.name for layer in planner.layers])
    evaluation = DatasetEvaluation(source=source, metric="sqnr_db")
    scorer = Scorer(
        evaluation=evaluation, float_model=CNN, scratch=tmp_path / "scratch", execution=EXECUTION
    )
    with scorer:
        scorer.score(CNN)
        setup = TrialSetup(
            frozen=frozen,
            record=merged.record,
            taps=job.taps,
            settings=planner.settings,
            target=PER_TENSOR,
            evaluation=evaluation,
            execution=EXECUTION,
            scratch=scorer.scratch,
            reference=scorer.reference,
        )
        spec = ClusterSpec(address=None, n_workers=1, cpus_per_worker=1)
        refused, fine = tune(strategy, setup, spec, open_book(tmp_path / "trials", {})).trials
        expected = scorer.score(tmp_path / "trials" / "trial-001" / "model.onnx")
    assert refused.report is None
    assert "QD507" in refused.reason
    assert fine.report is not None
    assert fine.report.metrics == expected.metrics
    assert strategy.told == [refused, fine]


SCRIPT = """
import pathlib, sys
lost = pathlib.Path({lost!r})
print("scoring", sys.argv[1].rsplit("/", 1)[-1])
if not lost.exists():
    lost.touch()
    print("no label file", file=sys.stderr)
    sys.exit(3)
print(0.75)
"""


def test_how_a_command_ended_is_kept_with_its_trial(cluster: RaySession, tmp_path: Path) -> None:
    frozen = freeze(load_model(CNN))
    source = samples_of("images", 1, 8, 8, n=8)
    graph = Graph(frozen)
    job = prepare(frozen, source, CalibrationSettings(), EXECUTION, graph=graph)
    merged = calibrate_here(job, source, create_store(tmp_path / "store", job.identity))
    planner = Planner(graph, merged.record, job.taps)
    setup = TrialSetup(
        frozen=frozen,
        record=merged.record,
        taps=job.taps,
        settings=planner.settings,
        target=ANY_TARGET,
        evaluation=python(SCRIPT.format(lost=str(tmp_path / "lost")), "{model}"),
        execution=EXECUTION,
        scratch=tmp_path / "scratch",
    )
    spec = ClusterSpec(address=None, n_workers=1, cpus_per_worker=1)
    strategy = Rounds([layer.name for layer in planner.layers])
    trials = tune(strategy, setup, spec, open_book(tmp_path / "trials", {})).trials
    assert [trial.report is None for trial in trials] == [True, False]
    found = [
        json.loads((tmp_path / "trials" / f"trial-{i:03d}" / "trial.json").read_text())
        for i in range(2)
    ]
    assert [value["evaluation"]["exit_status"] for value in found] == [3, 0]
    assert [value["evaluation"]["output_tail"] for value in found] == [
        "scoring model.onnx\nno label file\n",
        "scoring model.onnx\n0.75\n",
    ]
    for trial, value in zip(trials, found, strict=True):
        assert trial.evaluation is not None
        assert value["evaluation"] == trial.evaluation.to_json()
        assert 0 < trial.evaluation.seconds < 60
        assert "evaluation" not in value["details"]
    (best,) = [value for value in found if value["report"]]
    assert json.loads((tmp_path / "trials" / "best.json").read_text()) == best
