"""Clipping of whole plans: what is tried, and what becomes of what helps."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest

from qdist.errors import PlanError
from qdist.plan.choice import LayerChoice
from qdist.search.clipping import lines
from qdist.search.pareto import Pareto
from qdist.search.problem import SearchProblem
from qdist.search.settings import SearchSettings
from qdist.search.trial import Candidate, Choices, Trial, choices_key
from tests.unit.test_search_pareto import INT8, problem_of, search

METHODS = ("percentile:99.9", "percentile:99.5", "percentile:99", "percentile:99.97")
Worth = Callable[[LayerChoice], float]


def score_with(problem: SearchProblem, worth: Worth) -> Callable[[Candidate], float]:
    """1 less what layers harm, times what a choice's clipping is worth."""

    def score(candidate: Candidate) -> float:
        harms = [
            worth(choice) * problem.sensitivity[name][replace(choice, saturation="mse")] ** 2
            for name, choice in candidate.choices.items()
        ]
        return 1 - sum(harms)

    return score


def methods_of(choices: Choices, precisions: tuple[str, ...]) -> set[str]:
    return {c.saturation for c in choices.values() if c.precision in precisions}


def own(problem: SearchProblem) -> SearchProblem:
    """Without another threshold method among the options, so that clipping is all there is."""
    kept = {
        name: tuple(c for c in options if c.saturation == "mse")
        for name, options in problem.options.items()
    }
    known = {
        name: {choice: error for choice, error in errors.items() if choice in kept[name]}
        for name, errors in problem.sensitivity.items()
    }
    return replace(problem, options=kept, sensitivity=known)


def found(
    worth: Worth, n_trials: int = 16, n_layers: int = 14
) -> tuple[SearchProblem, list[Trial]]:
    problem = own(problem_of(n_layers, 3))
    wanted = SearchSettings(max_trials=n_trials, patience=9, clipping=METHODS)
    return problem, search(Pareto(problem, wanted), score_with(problem, worth))


@pytest.mark.parametrize("helps_wide", [True, False])
def test_clipping_that_helps_is_what_all_later_plans_have(helps_wide: bool) -> None:
    """Those dearer than the plain plan only where it helps the least harmful one, too."""

    def worth(choice: LayerChoice) -> float:
        if choice.saturation == "mse":
            return 1.0
        return 0.5 if helps_wide or choice.bits.activation_bits == 8 else 3.0

    problem, trials = found(worth)
    labels = [trial.candidate.label for trial in trials]
    assert labels[:5] == [
        "plain",
        "least harm",
        "percentile:99.9 everywhere",
        "least harm at no more cost",
        "least harm, percentile:99.9",
    ]
    assert trials[2].candidate.changed == tuple(problem.plain)
    # Both of the line's neighbours are worth the same: the first that helped stays.
    plain = [label for label in labels if label.endswith("everywhere")]
    assert plain == [f"percentile:{p} everywhere" for p in ("99.9", "99.5", "99.97")]
    best = [label for label in labels if label.startswith("least harm, ")]
    assert len(best) == (3 if helps_wide else 1)
    later = [t.candidate for t in trials[5:] if "percentile" not in t.candidate.label]
    assert len(later) > 4
    n_mixed = 0
    for candidate in later:
        is_dear = problem.cost(candidate.choices) > problem.cost(problem.plain)
        narrow = {"mse"} if is_dear and not helps_wide else {"percentile:99.9"}
        assert methods_of(candidate.choices, ("int8", "w4a8")) <= narrow
        wide = {"percentile:99.9"} if helps_wide else {"mse"}
        assert methods_of(candidate.choices, ("w8a16",)) <= wide
        n_mixed += len({choice.precision for choice in candidate.choices.values()}) > 1
    assert n_mixed > 2


def test_the_search_follows_a_line_as_far_as_it_helps() -> None:
    strengths = {"mse": 1.0, **dict(zip(METHODS, (0.8, 0.6, 0.7, 0.9), strict=True))}
    _, trials = found(lambda choice: strengths[choice.saturation])
    labels = [trial.candidate.label for trial in trials]
    plain = [label for label in labels if label.endswith("everywhere")]
    assert plain == [f"percentile:{p} everywhere" for p in ("99.9", "99.5", "99")]
    best = [label for label in labels if label.startswith("least harm, ")]
    # With 16 bits the milder neighbour comes first.
    assert best[:2] == ["least harm, percentile:99.9", "least harm, percentile:99.97"]
    last = trials[-1].candidate.choices
    assert {choice.saturation for choice in last.values()} == {"percentile:99.5"}


def test_clipping_that_does_not_help_costs_a_trial_for_each_width() -> None:
    _, trials = found(lambda choice: 1.0 if choice.saturation == "mse" else 2.0)
    clipped = [t for t in trials if methods_of(t.candidate.choices, ("int8", "w8a16")) != {"mse"}]
    names = [t.candidate.label for t in clipped if "percentile" in t.candidate.label]
    assert names == ["percentile:99.9 everywhere", "least harm, percentile:99.9"]
    assert len(trials) > 10


def test_a_clipped_plan_counts_for_the_groups_as_it_was_before() -> None:
    """Weights are those of the same search without any clipping, where clipping changes nothing."""
    problem = own(problem_of(10, 5))
    score = score_with(problem, lambda choice: 1.0)
    wanted = SearchSettings(max_trials=9, patience=9)
    plain = search(Pareto(problem, wanted), score)
    trials = search(Pareto(problem, replace(wanted, clipping=METHODS[:1], max_trials=11)), score)
    kept = [t for t in trials if "percentile" not in t.candidate.label]
    assert len(trials) == 11
    predicted = {choices_key(t.candidate.choices): t.candidate.predicted for t in plain}
    shared = [t for t in kept if choices_key(t.candidate.choices) in predicted]
    assert len(shared) >= 7
    for trial in shared[5:]:
        assert trial.candidate.predicted == pytest.approx(predicted[trial.candidate.key], rel=0.3)


def test_layers_that_have_no_range_or_may_not_change_keep_what_they_have() -> None:
    problem = own(problem_of(4, 1))
    free = LayerChoice(precision="float32")
    given = replace(INT8, threshold=3.0)
    problem = replace(
        problem,
        plain={**problem.plain, "layer0": free, "layer1": given, "pinned": INT8},
        options={**problem.options, "layer0": (free,), "layer1": (given,)},
    )
    asked = Pareto(problem, SearchSettings(clipping=METHODS)).ask()
    (clipped,) = [c for c in asked if c.label == "percentile:99.9 everywhere"]
    assert clipped.choices["layer0"] == free
    assert clipped.choices["layer1"] == given
    assert clipped.choices["pinned"] == INT8
    assert clipped.choices["layer2"] == replace(INT8, saturation="percentile:99.9")


def test_nothing_is_clipped_twice_where_the_plain_plan_is_clipped_already() -> None:
    problem = own(problem_of(6, 1))
    plain = dict.fromkeys(problem.plain, replace(INT8, saturation="percentile:99.9"))
    problem = replace(problem, plain=plain)
    wanted = SearchSettings(clipping=("percentile:99.9",))
    labels = [candidate.label for candidate in Pareto(problem, wanted).ask()]
    assert "percentile:99.9 everywhere" not in labels


def test_lines_are_methods_that_differ_in_one_number() -> None:
    scaled = ("max:th_scale=0.9", "use_max:th_scale=1")
    known = lines(("percentile:99.9", "kl", scaled[0], "percentile:99", scaled[1]))
    assert [line.first for line in known] == ["percentile:99.9", "kl", "max:th_scale=0.9"]
    assert known[0].methods == ("percentile:99.9", "percentile:99")
    assert known[0].beside("percentile:99.9") == ("percentile:99",)
    assert known[2].methods == (scaled[1], scaled[0])
    with pytest.raises(PlanError, match="QD501"):
        lines(("clip",))
