"""Losing trials that stop early: when, how sure that is, and that where depends on scores alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qdist.data.executor import Executor
from qdist.errors import ConfigError, EvaluationError
from qdist.evaluate.early import Incumbent, Race
from qdist.evaluate.function import FunctionEvaluation
from qdist.evaluate.report import EvalReport
from qdist.search.trial import Candidate, Trial, best_of

UNIT = st.floats(0, 1, allow_nan=False)
PAIRS = st.lists(st.tuples(UNIT, UNIT), min_size=1, max_size=60)


def incumbent(scores: Any, **changes: Any) -> Incumbent:
    return Incumbent(scores=tuple(map(float, scores)), **{"sample_range": (0.0, 1.0), **changes})


@given(PAIRS, st.integers(1, 7))
@settings(max_examples=60)
def test_where_a_race_is_lost_depends_on_no_batches(
    pairs: list[tuple[float, float]], size: int
) -> None:
    ours, theirs = zip(*pairs, strict=True)
    whole = Race(incumbent(theirs)).lost(ours)
    race, found = Race(incumbent(theirs)), None
    for i in range(0, len(ours), size):
        found = race.lost(ours[i : i + size])
        if found is not None:
            break
    assert found == whole


@given(PAIRS)
@settings(max_examples=60)
def test_losses_have_one_meaning_in_both_directions(pairs: list[tuple[float, float]]) -> None:
    ours, theirs = zip(*pairs, strict=True)
    up = Race(incumbent(theirs, sample_range=(-1.0, 1.0))).lost(ours)
    down = Race(
        incumbent([-t for t in theirs], sample_range=(-1.0, 1.0), higher_is_better=False)
    ).lost([-o for o in ours])
    assert up == down


@given(st.lists(UNIT, min_size=1, max_size=60))
def test_a_tie_is_never_lost(scores: list[float]) -> None:
    assert Race(incumbent(scores)).lost(scores) is None


def test_a_certain_loss_needs_no_statistics() -> None:
    # After 3 of 4 samples the trial has 0 of at most 1; the best has 1 + 1 + 1 + 1.
    assert Race(incumbent([1, 1, 1, 1], risk=1e-9)).lost([0, 0, 0, 0]) == 1
    # Two behind with two samples left in which it can win back one each: not lost yet.
    assert Race(incumbent([1, 1, 0, 0], risk=1e-9)).lost([0, 0, 1, 1]) is None
    assert Race(incumbent([1, 1, 0, 0], risk=1e-9)).lost([0, 0, 0, 1]) == 3


def test_equal_trials_are_stopped_no_more_often_than_the_risk() -> None:
    rng = np.random.default_rng(7)
    risk, n_trials, stopped = 0.1, 300, 0
    for _ in range(n_trials):
        scores = rng.random((2, 300)) < 0.5
        # Samples that never come keep the certain rule out of this.
        best = incumbent([*scores[0], *np.zeros(600)], risk=risk)
        stopped += Race(best).lost([float(right) for right in scores[1]]) is not None
    assert stopped <= risk * n_trials


def test_a_clearly_worse_trial_is_stopped_long_before_its_end() -> None:
    rng = np.random.default_rng(8)
    best, trial = rng.random(2000) < 0.9, rng.random(2000) < 0.6
    found = Race(incumbent(best)).lost([float(right) for right in trial])
    assert found is not None
    assert found < 400


@pytest.mark.parametrize("changes", [{"sample_range": (1.0, 1.0)}, {"risk": 0.0}, {"risk": 1.0}])
def test_a_race_that_makes_no_sense_is_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(ConfigError) as caught:
        incumbent([1.0], **changes)
    assert caught.value.code == "QD104"


def executor() -> Executor:
    return Executor(
        run=lambda feeds: [feeds["x"]],
        input_nodes=["x"],
        output_nodes=["y"],
        model_path=Path("model.onnx"),
    )


def yielding(tmp_path: Path, body: str, **changes: Any) -> FunctionEvaluation:
    (tmp_path / "script.py").write_text(f"import numpy as np\n\ndef f(executor, **extra):\n{body}")
    fields = {"target": f"{tmp_path}/script.py:f", "higher_is_better": True}
    return FunctionEvaluation(**{**fields, "sample_range": (0.0, 1.0), **changes})


def test_yielded_scores_are_the_metric(tmp_path: Path) -> None:
    body = "    yield 1.0\n    yield np.array([0.0, 0.5])\n    return {'f1': 0.25}\n"
    report = yielding(tmp_path, body, metric="top1").run(executor())
    assert (report.score, report.metric, report.n_samples) == (0.5, "top1", 3)
    assert report.per_sample == (1.0, 0.0, 0.5)
    assert report.metrics == {"top1": 0.5, "f1": 0.25}
    assert EvalReport.from_json(report.to_json()) == report


def test_a_losing_function_is_ended_and_sees_the_flag(tmp_path: Path) -> None:
    place = tmp_path / "ended"
    body = f"""    try:
        for i in range(100):
            yield extra["score"]
    finally:
        open({str(place)!r}, "w").write(f"{{i}} {{executor.early_stop_flag}}")
"""
    good = yielding(tmp_path, body, arguments={"score": 1.0})
    best = good.run(executor())
    assert place.read_text() == "99 False"
    bad = yielding(tmp_path, body, arguments={"score": 0.25})
    report = bad.run(executor(), bad.incumbent(best))
    assert report.stopped_early
    assert report.n_samples == len(report.per_sample) < 100
    assert place.read_text() == f"{len(report.per_sample) - 1} True"
    assert EvalReport.from_json(report.to_json()) == report
    assert bad.incumbent(report) is None, "a stopped trial is nobody's incumbent"


def test_without_a_range_nothing_stops(tmp_path: Path) -> None:
    evaluation = yielding(tmp_path, "    yield 1.0\n", sample_range=None)
    assert evaluation.incumbent(evaluation.run(executor())) is None


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ("    yield 1.5\n", "1.5"),
        ("    yield 0.5\n    yield float('nan')\n", "sample 1"),
        ("    yield 'good'\n", "good"),
        ("    return 1\n    yield\n", "no yielded score"),
        ("    yield 0.5\n    return 0.75\n", "0.75"),
    ],
)
def test_rubbish_that_is_yielded_is_an_error(tmp_path: Path, body: str, said: str) -> None:
    with pytest.raises(EvaluationError) as caught:
        yielding(tmp_path, body).run(executor())
    assert caught.value.code == "QD704"
    assert said in str(caught.value)


def test_a_function_that_fails_between_samples_is_an_error_there(tmp_path: Path) -> None:
    with pytest.raises(EvaluationError) as caught:
        yielding(tmp_path, "    yield 0.5\n    raise OSError('gone')\n").run(executor())
    assert (caught.value.code, caught.value.where) == ("QD705", f"{tmp_path}/script.py:5")


@given(st.floats(-1e6, 1e6), st.floats(-1e6, 1e6), st.booleans())
def test_a_stopped_trial_never_ranks_above_a_whole_one(a: float, b: float, up: bool) -> None:
    def trial(number: int, score: float, stopped: bool) -> Trial:
        report = EvalReport(
            score=score,
            metric="m",
            higher_is_better=up,
            metrics={"m": score},
            n_samples=None,
            seconds=0.0,
            stopped_early=stopped,
        )
        return Trial(
            candidate=Candidate(number=number, label="", choices={}), report=report, n_bytes=number
        )

    whole, stopped = trial(2, a, False), trial(1, b, True)
    assert whole.rank > stopped.rank
    assert best_of([stopped, whole]) is whole


VENDOR = """
from onnx_quantize_tool.common.register import onnx_infer_func

@onnx_infer_func.register("infer_cls_model")
def anything(executor):
    return executor.batch_size
"""


def test_knights_script_runs_as_it_is(tmp_path: Path) -> None:
    path = tmp_path / "infer.py"
    path.write_text(VENDOR)
    for target in (f"{path}:infer_cls_model", f"{path}:anything", str(path)):
        assert FunctionEvaluation(target=target, higher_is_better=True).run(executor()).score == 1


def test_a_file_alone_wants_one_registered_function(tmp_path: Path) -> None:
    path = tmp_path / "infer.py"
    path.write_text("def f(executor):\n    return 1\n")
    with pytest.raises(ConfigError) as caught:
        FunctionEvaluation(target=str(path), higher_is_better=True).load()
    assert caught.value.code == "QD108"
