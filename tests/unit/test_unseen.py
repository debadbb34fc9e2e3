"""The front of a search on samples that the search did not see."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import helper

from actors.outcome import Outcome
from qdist.cli.commands.trial_models import MODEL, TrialModels
from qdist.cli.commands.unseen import ScoredTrials, Unseen
from qdist.evaluate.builtin import DatasetEvaluation
from qdist.evaluate.metrics import find_metric
from qdist.evaluate.paired import paired
from qdist.evaluate.report import EvalReport
from qdist.evaluate.scorer import Scorer
from qdist.files import write_json
from qdist.plan.choice import LayerChoice
from qdist.report.values import UnseenRow
from qdist.search.problem import SearchLayer, SearchProblem
from qdist.search.trial import Candidate, Trial
from tests.onnx_models import EXECUTION, model, samples_of, value

PLAIN = LayerChoice()
COARSE = replace(PLAIN, granularity="tensor")
PROBLEM = SearchProblem(
    plain={"layer": PLAIN},
    layers=(SearchLayer(name="layer", op_type="MatMul", position=0),),
    groups=(("layer",),),
    options={"layer": (PLAIN, COARSE)},
)


def doubling(path: Path, factor: float, *after: str) -> Path:
    """A model that multiplies by ``factor``; ``after``: an operator on its result."""
    first = "y" if not after else "h"
    nodes = [helper.make_node("MatMul", ["x", "w"], [first], "layer")]
    nodes += [helper.make_node(name, ["h"], ["y"], "after") for name in after]
    shape: list[int | str | None] = ["n", 4]
    weights = {"w": factor * np.eye(4, dtype=np.float32)}
    path.parent.mkdir(parents=True, exist_ok=True)
    onnx.save(model(nodes, [value("x", shape)], [value("y", shape)], weights), path)
    return path


def trial(number: int, choice: LayerChoice, score: float) -> Trial:
    report = EvalReport(
        score=score,
        metric="mse",
        higher_is_better=False,
        metrics={"mse": score},
        n_samples=1,
        seconds=0.0,
    )
    candidate = Candidate(number=number, label=f"number {number}", choices={"layer": choice})
    return Trial(candidate=candidate, report=report, n_bytes=1)


@pytest.mark.parametrize("fails", [False, True])
def test_a_trial_without_a_score_is_left_out_and_named(fails: bool, tmp_path: Path) -> None:
    """The square root of negative numbers is none, and the plain plan's score then not finite."""
    models = TrialModels(folder=tmp_path)
    doubling(models.place(0) / MODEL, 1.5, *(("Sqrt",) if fails else ()))
    best_model = doubling(models.place(1) / MODEL, 1.99)
    plain, best = trial(0, PLAIN, 0.3), trial(1, COARSE, 0.1)
    outcome = Outcome(
        trials=[plain, best],
        stopped="strategy",
        n_scored=2,
        n_reused=0,
        n_ahead=0,
        driver_s=0.0,
        seconds=0.0,
    )
    float_model = doubling(tmp_path / "float.onnx", 2.0)
    evaluation = DatasetEvaluation(source=samples_of("x", 4, n=8), metric="mse")
    said: list[str] = []
    with Scorer(
        evaluation=evaluation, float_model=float_model, scratch=tmp_path, execution=EXECUTION
    ) as scorer:
        before, float_parts = scorer.score_samples(float_model)
        after, best_parts = scorer.score_samples(best_model)
        assert float_parts is not None
        assert best_parts is not None
        scored = ScoredTrials(
            scorer, outcome, PROBLEM, models, best, (after, best_parts), said.append
        )
        rows = scored.rows(float_parts)
    (row,) = (row for row in rows if row.is_best)
    assert row.score == after.score
    assert row.over_float is not None
    if fails:
        assert [row.number for row in rows] == [1]
        assert row.over_plain is None
        (note,) = said
        assert "trial 0" in note
        assert "QD704" in note
    else:
        assert [row.number for row in rows] == [0, 1]
        assert row.over_plain is not None
        assert row.over_plain.mean > 0
        assert not said
    written = write_json(
        tmp_path / "unseen.json", Unseen(before=before, after=after, rows=tuple(rows)).to_json()
    )
    assert len(json.loads(written.read_text())["trials"]) == len(rows)


def test_intervals_without_end_are_written(tmp_path: Path) -> None:
    """A perplexity is infinite over draws that hold one bad text often enough."""
    ones = np.ones(10)
    bad = np.array([3000.0, *ones[1:]])
    found = paired(find_metric("perplexity"), (bad, ones), (ones, ones))
    assert math.isfinite(found.mean)
    assert not math.isfinite(found.high)
    report = EvalReport(
        score=1.0,
        metric="perplexity",
        higher_is_better=False,
        metrics={"perplexity": 1.0},
        n_samples=10,
        seconds=0.0,
    )
    row = UnseenRow(
        number=0, label="one", score=1.0, over_plain=found, over_float=found, is_best=True
    )
    unseen = Unseen(before=report, after=report, rows=(row,))
    written = write_json(tmp_path / "unseen.json", unseen.to_json())
    (trial_row,) = json.loads(written.read_text())["trials"]
    assert trial_row["over_plain"]["mean"] == found.mean
    assert trial_row["over_plain"]["high"] is None
