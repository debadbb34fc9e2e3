"""Studies of global settings: the same answer again, after a break, and for any timing."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import optuna
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qdist.errors import ConfigError
from qdist.evaluate.report import EvalReport
from qdist.plan.choice import LayerChoice
from qdist.search.optuna_study import SAMPLERS, Space, Study, StudySettings
from qdist.search.problem import SearchLayer, SearchProblem
from qdist.search.trial import Candidate, Trial

PLAIN = LayerChoice()
PROBLEM = SearchProblem(
    plain={"a": PLAIN, "b": PLAIN},
    layers=(
        SearchLayer(name="a", op_type="Conv", position=0),
        SearchLayer(name="b", op_type="Gemm", position=1, sources=("a",)),
    ),
    groups=(("a",), ("b",)),
    options={"a": (PLAIN, replace(PLAIN, granularity="tensor")), "b": (PLAIN,)},
)
SPACE = Space(
    saturations=("max", "mse", "percentile"),
    granularities=("channel", "tensor"),
    n_samples=(16, 64, 256),
    smoothing=(0.0, 1.0),
)


def score(candidate: Candidate) -> float:
    """Best with the percentile, all samples and a strength of 0.6."""
    method = candidate.choices["a"].saturation
    samples = float(candidate.settings.get("n_samples", 0)) / 256
    strength = float(candidate.settings.get("smoothing", 0))
    return {"max": 0.0, "mse": 0.3, "percentile": 0.5}[method] + samples - abs(strength - 0.6)


def trial(candidate: Candidate, fails: Callable[[int], bool] = lambda n: False) -> Trial:
    if fails(candidate.number):
        return Trial(candidate=candidate, report=None, n_bytes=0, reason="it failed")
    value = score(candidate)
    report = EvalReport(
        score=value,
        metric="m",
        higher_is_better=True,
        metrics={"m": value},
        n_samples=1,
        seconds=0.0,
    )
    n_bytes = 100 if candidate.choices["a"].granularity == "channel" else 90
    return Trial(candidate=candidate, report=report, n_bytes=n_bytes)


def search(
    how: StudySettings, *, backwards: bool = False, n_rounds: int = 1000, n_told: int = 1000
) -> list[Candidate]:
    """``n_rounds``: where it breaks off, after ``n_told`` trials of the last round."""
    study = Study(PROBLEM, how)
    asked: list[Candidate] = []
    for i in range(n_rounds):
        candidates = study.ask()
        if not candidates:
            break
        asked += candidates
        if i == n_rounds - 1:
            candidates = candidates[:n_told]
        done = [trial(c, lambda n: n % 5 == 4) for c in candidates]
        study.tell(done[::-1] if backwards else done)
    return asked


def plans(candidates: list[Candidate]) -> list[tuple[int, int, str]]:
    return [(c.number, c.round, c.key) for c in candidates]


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_a_study_that_breaks_off_goes_on_as_if_it_had_not(sampler: str, tmp_path: Path) -> None:
    how = StudySettings(sampler=sampler, max_trials=14, round_size=4, space=SPACE, seed=3)
    expected = plans(search(how))
    assert len(expected) == 14
    url = f"sqlite:///{tmp_path / 'study.db'}"
    kept = replace(how, storage=url)
    # Within a round, some of it told; with fewer trials asked for; then all of it.
    assert plans(search(kept, n_rounds=3, n_told=2)) == expected[:9]
    assert plans(search(replace(kept, max_trials=11))) == expected[:11]
    assert plans(search(kept)) == expected
    (summary,) = optuna.get_all_study_summaries(url)
    stored = optuna.load_study(study_name=summary.study_name, storage=url).trials
    # The last round was made whole, for a search with more trials.
    assert sum(not trial.state.is_finished() for trial in stored) == 3
    assert len(stored) >= 16


@settings(max_examples=6)
@given(st.sampled_from(SAMPLERS), st.integers(0, 2**31), st.integers(1, 5), st.integers(1, 14))
def test_never_twice_never_too_many_and_always_the_same(
    sampler: str, seed: int, round_size: int, most: int
) -> None:
    how = StudySettings(
        sampler=sampler, seed=seed, round_size=round_size, max_trials=most, space=SPACE
    )
    found = plans(search(how))
    assert len({key for _, _, key in found}) == len(found) == most
    assert [number for number, _, _ in found] == list(range(most))
    assert plans(search(how, backwards=True)) == found
    per_round = [sum(r == i for _, r, _ in found) for i in range(found[-1][1] + 1)]
    assert per_round[0] == 1
    assert set(per_round[1:-1]) <= {round_size}


def test_a_small_space_is_searched_to_its_end() -> None:
    space = Space(saturations=("max", "mse"), percent=(), n_samples=(16, 64))
    found = search(StudySettings(space=space, max_trials=50, round_size=3))
    shown = {(c.choices["a"].saturation, c.settings.get("n_samples")) for c in found}
    assert shown == {("mse", None), ("max", 16), ("max", 64), ("mse", 16), ("mse", 64)}
    assert len(found) == 5


def test_a_percent_is_only_where_a_method_takes_it() -> None:
    found = search(StudySettings(space=Space(percent=(99.0, 99.99)), max_trials=20))
    assert any("percent" in c.settings for c in found)
    for candidate in found[1:]:
        takes = candidate.choices["a"].saturation == "percentile"
        assert ("percent" in candidate.settings) == takes
        assert 99.0 <= float(candidate.settings.get("percent", 99.5)) <= 99.99
        assert candidate.choices["b"].granularity == "channel"


def test_strengths_of_smoothing_lie_on_a_grid_and_may_be_none() -> None:
    space = Space(saturations=(), percent=(), smoothing=(0.3, 0.52))
    found = search(StudySettings(space=space, max_trials=50, round_size=3))
    strengths = [c.settings.get("smoothing") for c in found]
    # The plain plan is the one without smoothing; the space is searched to its end.
    assert strengths[0] is None
    assert sorted(s for s in strengths[1:] if s is not None) == [0.3, 0.35, 0.4, 0.45, 0.5]
    single = Space(saturations=(), percent=(), smoothing=(0.5, 0.5))
    found = search(StudySettings(space=single, max_trials=50))
    assert [c.settings for c in found] == [{}, {"smoothing": 0.5}]
    for ends in ((0.6, 0.5), (-0.1, 0.5), (0.5, 1.1)):
        with pytest.raises(ValueError, match="smoothing"):
            Space(smoothing=ends)


def test_tpe_finds_better_than_its_random_start() -> None:
    how = StudySettings(max_trials=60, space=SPACE, seed=1)
    found = search(how)
    assert max(map(score, found)) > 1.4
    mean = [sum(map(score, part)) / len(part) for part in (found[1:11], found[-20:])]
    assert mean[1] > mean[0]


@pytest.mark.parametrize(
    ("wrong", "code"),
    [
        ({"space": Space(saturations=(), percent=())}, "QD107"),
        ({"storage": "nothing://x"}, "QD104"),
        ({"storage": "sqlite:////no/such/folder/s.db"}, "QD104"),
    ],
)
def test_mistakes(wrong: dict[str, object], code: str) -> None:
    with pytest.raises(ConfigError) as caught:
        Study(PROBLEM, StudySettings(**wrong))  # type: ignore[arg-type]
    assert caught.value.code == code
