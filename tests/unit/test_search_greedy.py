"""The greedy search: pure, bounded, never worse than the plain plan."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qdist.evaluate.report import EvalReport
from qdist.plan.choice import LayerChoice
from qdist.search.greedy import Greedy, GreedySettings
from qdist.search.trial import Candidate, Trial, best_of

Score = Callable[[Candidate], float | None]
"""The score of a plan, or None when its trial fails."""

COST = {"w4a8": 0.5, "int8": 1.0, "w8a16": 1.0, "int16": 2.0, "float32": 4.0}
HARM = {"w4a8": 8.0, "int8": 1.0, "w8a16": 0.25, "int16": 0.1, "float32": 0.0}


def layers(n: int, *, saturation: str = "mse") -> dict[str, LayerChoice]:
    return {f"layer{i}": LayerChoice(saturation=saturation) for i in range(n)}


def sensitivities(plain: Mapping[str, LayerChoice], seed: int = 0) -> dict[str, dict[str, float]]:
    """Reproducible errors that differ between layers and grow with fewer bits."""
    base = {name: 0.001 * (1 + (i * 7 + seed) % 11) for i, name in enumerate(plain)}
    return {"int8": base, "w4a8": {name: 8 * error for name, error in base.items()}}


def model_of(error: Mapping[str, float], sign: float = 1.0) -> Score:
    """A score that falls with the error of every layer at the precision that it has."""

    def score(candidate: Candidate) -> float:
        harm = sum(
            error.get(name, 0.0)
            * HARM[choice.precision]
            * (1.2 if choice.saturation == "max" else 1)
            for name, choice in candidate.choices.items()
        )
        # Rounded as an accuracy over few samples is: most small changes look like none.
        return sign * round(1 - harm, 2)

    return score


def trial_of(candidate: Candidate, score: float | None, *, higher_is_better: bool = True) -> Trial:
    n_bytes = int(1000 * sum(COST[choice.precision] for choice in candidate.choices.values()))
    if score is None:
        return Trial(candidate=candidate, report=None, n_bytes=n_bytes, reason="it failed")
    report = EvalReport(
        score=score,
        metric="m",
        higher_is_better=higher_is_better,
        metrics={"m": score},
        n_samples=1,
        seconds=0.0,
    )
    return Trial(candidate=candidate, report=report, n_bytes=n_bytes)


def search(
    plain: Mapping[str, LayerChoice],
    settings: GreedySettings,
    score: Score,
    *,
    higher_is_better: bool = True,
    backwards: bool = False,
    seed: int = 0,
) -> list[Trial]:
    """A whole search; ``backwards``: the trials of a round end in the other order."""
    strategy = Greedy(plain, sensitivities(plain, seed), settings, dict.fromkeys(plain, 100))
    done: list[Trial] = []
    for _ in range(1000):
        proposals = strategy.ask()
        if not proposals:
            return done
        trials = [trial_of(c, score(c), higher_is_better=higher_is_better) for c in proposals]
        done += trials
        strategy.tell(reversed(trials) if backwards else trials)
    pytest.fail("the search does not end")


def seen(trials: list[Trial]) -> list[tuple[int, str, str]]:
    return [(t.candidate.number, t.candidate.label, t.candidate.key) for t in trials]


settings_of = st.builds(
    GreedySettings,
    low=st.sampled_from([None, "w4a8"]),
    high=st.sampled_from([None, "w8a16", "int16"]),
    saturations=st.lists(st.sampled_from(["max", "mse", "percentile", "kl"]), unique=True).map(
        tuple
    ),
    max_trials=st.integers(1, 40),
    first_share=st.floats(0.05, 1),
)


@given(
    n_layers=st.integers(0, 12),
    settings=settings_of,
    seed=st.integers(0, 50),
    higher_is_better=st.booleans(),
    failing=st.sets(st.integers(0, 39)),
)
def test_what_holds_for_every_search(
    n_layers: int,
    settings: GreedySettings,
    seed: int,
    higher_is_better: bool,
    failing: set[int],
) -> None:
    plain = layers(n_layers)
    before = dict(plain)
    error = {name: 0.003 * (1 + (i * 5 + seed) % 7) for i, name in enumerate(plain)}
    smooth = model_of(error, 1.0 if higher_is_better else -1.0)

    def score(candidate: Candidate) -> float | None:
        return None if candidate.number in failing else smooth(candidate)

    trials = search(plain, settings, score, higher_is_better=higher_is_better, seed=seed)
    again = search(
        plain, settings, score, higher_is_better=higher_is_better, seed=seed, backwards=True
    )
    assert seen(trials) == seen(again), "what is proposed depends on finished rounds alone"
    assert plain == before
    assert 1 <= len(trials) <= settings.max_trials
    assert [t.candidate.number for t in trials] == list(range(len(trials)))
    assert trials[0].candidate.choices == plain
    assert trials[0].candidate.changed == ()
    keys = [t.candidate.key for t in trials]
    assert len(set(keys)) == len(keys), "no plan is tried twice"
    best = best_of(trials)
    if all(t.report is None for t in trials):
        assert best is None
    else:
        assert best is not None
        assert all(best.rank >= t.rank for t in trials)
    for trial in trials:
        changed = {n for n, choice in trial.candidate.choices.items() if choice != plain[n]}
        assert set(trial.candidate.changed) == changed
        assert set(trial.candidate.choices) == set(plain)
        used = {c.precision for c in trial.candidate.choices.values()}
        assert used <= {"int8", settings.low, settings.high}


def test_it_lowers_what_can_be_lowered_and_raises_what_has_to_be_raised() -> None:
    plain = layers(8)
    error = dict.fromkeys(plain, 0.0001) | {"layer3": 0.06}
    # layer3 is the most sensitive one to the search as well.
    ranks = {p: dict(error) for p in ("int8", "w4a8")}
    strategy = Greedy(plain, ranks, GreedySettings(max_trials=60), dict.fromkeys(plain, 100))
    score = model_of(error)
    done: list[Trial] = []
    while proposals := strategy.ask():
        trials = [trial_of(candidate, score(candidate)) for candidate in proposals]
        done += trials
        strategy.tell(trials)
    best = best_of(done)
    assert best is not None
    assert best.report is not None
    assert done[0].report is not None
    assert best.candidate.choices["layer3"].precision == "w8a16"
    assert best.report.score > done[0].report.score
    low = [n for n, choice in best.candidate.choices.items() if choice.precision == "w4a8"]
    assert len(low) >= 6
    assert best.n_bytes < done[0].n_bytes


def test_the_first_round_is_the_plain_plan_and_the_other_methods() -> None:
    plain = layers(4, saturation="mse")
    strategy = Greedy(plain, sensitivities(plain), GreedySettings(), dict.fromkeys(plain, 1))
    assert [c.label for c in strategy.ask()] == [
        "plain",
        "saturation max",
        "saturation percentile",
        "saturation kl",
    ]


def test_without_precisions_to_move_to_only_methods_are_tried() -> None:
    plain = layers(6)
    settings = GreedySettings(low=None, high=None, max_trials=30)
    trials = search(plain, settings, model_of(sensitivities(plain)["int8"]))
    assert {c.precision for t in trials for c in t.candidate.choices.values()} == {"int8"}
    assert len(trials) > 4
    alone = replace(settings, saturations=())
    assert len(search(plain, alone, model_of(sensitivities(plain)["int8"]))) == 1


def test_a_model_without_layers_has_one_trial() -> None:
    assert len(search({}, GreedySettings(), lambda candidate: 0.5)) == 1


def test_layers_without_sensitivity_never_change_but_for_the_method_of_the_whole() -> None:
    plain = layers(4)
    ranks = {"int8": {"layer1": 0.1}, "w4a8": {"layer1": 0.2}}
    strategy = Greedy(plain, ranks, GreedySettings(), dict.fromkeys(plain, 1))
    strategy.tell([trial_of(candidate, 0.5) for candidate in strategy.ask()])
    for candidate in strategy.ask():
        assert candidate.changed == ("layer1",)


def test_layers_without_weights_are_not_lowered() -> None:
    plain = layers(4)
    settings = GreedySettings(saturations=(), high=None, first_share=1.0)
    n_weights = {"layer0": 0, "layer1": 10, "layer2": 10, "layer3": 0}
    strategy = Greedy(plain, sensitivities(plain), settings, n_weights)
    strategy.tell([trial_of(candidate, 0.5) for candidate in strategy.ask()])
    (lowered,) = strategy.ask()
    assert lowered.changed == ("layer1", "layer2")


def test_it_ends_when_every_trial_fails_and_goes_on_when_the_plain_plan_fails() -> None:
    plain = layers(6)
    none = search(plain, GreedySettings(max_trials=40), lambda candidate: None)
    assert len(none) == 4
    assert best_of(none) is None

    def plain_fails(candidate: Candidate) -> float | None:
        return None if candidate.number == 0 else 0.5

    some = search(plain, GreedySettings(max_trials=40), plain_fails)
    assert len(some) > 4
    best = best_of(some)
    assert best is not None
    assert best.candidate.number != 0


def test_lower_is_better_ranks_the_other_way() -> None:
    plain = layers(3)
    scores = {0: 4.0, 1: 3.0, 2: 5.0}
    trials = search(
        plain,
        GreedySettings(max_trials=3),
        lambda candidate: scores[candidate.number],
        higher_is_better=False,
    )
    best = best_of(trials)
    assert best is not None
    assert best.candidate.number == 1


def test_equal_scores_prefer_the_smaller_artifact_then_the_earlier_trial() -> None:
    plain = layers(4)
    low = {**plain, "layer0": LayerChoice(precision="w4a8")}
    candidates = [
        Candidate(number=i, label=str(i), choices=choices)
        for i, choices in enumerate((plain, low, dict(low)))
    ]
    trials = [trial_of(candidate, 0.5) for candidate in candidates]
    best = best_of(reversed(trials))
    assert best is not None
    assert best.candidate.number == 1


def test_equal_scores_are_told_apart_by_the_searchs_own_cost_then_by_closeness() -> None:
    plain = layers(2)
    (trial,) = search(plain, GreedySettings(max_trials=1), lambda candidate: 0.5)
    assert trial.report is not None
    large = replace(trial, cost=1.0, n_bytes=900)
    small = replace(trial, cost=2.0, n_bytes=100)
    assert best_of([small, large]) is large
    small = replace(small, cost=1.0)
    assert best_of([large, small]) is small
    near = replace(trial.report, metrics={**trial.report.metrics, "sqnr_db": 30.0})
    close = replace(large, report=near)
    assert best_of([small, close]) is close


def test_of_equal_scores_that_cost_no_more_than_the_plain_plan_the_nearest_to_float_is_best() -> (
    None
):
    plain = layers(2)
    (trial,) = search(plain, GreedySettings(max_trials=1), lambda candidate: 0.5)
    assert trial.report is not None

    def of(cost: float, sqnr_db: float, number: int) -> Trial:
        assert trial.report is not None
        report = replace(trial.report, metrics={**trial.report.metrics, "sqnr_db": sqnr_db})
        candidate = replace(trial.candidate, number=number)
        return replace(trial, report=report, candidate=candidate, cost=cost, plain_cost=100.0)

    cheap, near, plain_one = of(62, 8.0, 1), of(98, 21.0, 2), of(100, 20.0, 0)
    dear, dearer = of(140, 30.0, 3), of(200, 40.0, 4)
    assert best_of([cheap, near, plain_one, dear, dearer]) is near
    assert best_of([dear, dearer]) is dear
    assert best_of([cheap, dear]) is cheap
    # A search goes on from the cheapest.
    assert max([cheap, near, dear], key=lambda t: t.rank_by_cost) is cheap
    assert dear.report is not None
    higher = replace(dear.report, score=0.6, metrics={"m": 0.6, "sqnr_db": 3.0})
    better = replace(dear, report=higher)
    assert best_of([cheap, near, better]) is better


def test_where_an_evaluation_tells_no_closeness_the_harm_does() -> None:
    plain = layers(2)
    (trial,) = search(plain, GreedySettings(max_trials=1), lambda candidate: 0.5)

    def of(cost: float, harm: float | None, number: int) -> Trial:
        candidate = replace(trial.candidate, number=number)
        return replace(trial, candidate=candidate, cost=cost, plain_cost=100.0, harm=harm)

    cheap, near = of(62, 0.5, 1), of(98, 0.1, 2)
    assert best_of([cheap, near]) is near
    assert best_of([of(62, None, 1), of(98, None, 2)]) == of(62, None, 1)


@pytest.mark.parametrize(
    "wrong",
    [{"max_trials": 0}, {"first_share": 0.0}, {"first_share": 1.5}, {"first_share": math.nan}],
)
def test_settings_out_of_range_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="max_trials must be at least 1"):
        GreedySettings(**wrong)  # type: ignore[arg-type]
