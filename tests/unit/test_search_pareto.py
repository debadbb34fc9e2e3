"""The strategy pareto and what it stands on, without Ray: deterministic, bounded, never worse."""

from __future__ import annotations

import ctypes
import math
import os
import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qdist.errors import ConfigError
from qdist.evaluate.report import EvalReport
from qdist.plan.choice import LayerChoice
from qdist.search.candidates import CandidateTable
from qdist.search.correction import group_weights, losses
from qdist.search.costs import Costs, Edge, bit_operations, weight_bytes
from qdist.search.front import Front, answer_of, front_of
from qdist.search.gaps import Gaps
from qdist.search.greedy import Greedy, GreedySettings, greedy_for
from qdist.search.pareto import Pareto, cost_text
from qdist.search.problem import Interaction, SearchLayer, SearchProblem
from qdist.search.settings import SearchSettings
from qdist.search.solver_output import without_stray_lines
from qdist.search.strategies import STRATEGIES, check_strategy, make_strategy
from qdist.search.trial import Candidate, Trial, best_of, choices_key

INT8, W4, W16 = (LayerChoice(precision=name) for name in ("int8", "w4a8", "w8a16"))
OPTIONS = (INT8, replace(INT8, saturation="max"), W4, W16)
ERRORS = {"int8": 0.02, "w4a8": 0.1, "w8a16": 0.01}


def problem_of(n: int = 12, seed: int = 0, *, group: int = 1) -> SearchProblem:
    """Layers of different sizes and sensitivities, in groups of ``group``."""
    rng = random.Random(seed)
    names = [f"layer{i}" for i in range(n)]
    sizes = {name: rng.randint(100, 5000) for name in names}
    scale = {name: rng.lognormvariate(0, 1) for name in names}
    sensitivity = {
        name: {
            choice: scale[name] * ERRORS[choice.precision] * (1.3 if choice == OPTIONS[1] else 1)
            for choice in OPTIONS
        }
        for name in names
    }
    return SearchProblem(
        plain=dict.fromkeys(names, INT8),
        layers=tuple(
            SearchLayer(name=name, op_type="MatMul", position=i, n_weights=sizes[name])
            for i, name in enumerate(names)
        ),
        groups=tuple(tuple(names[i : i + group]) for i in range(0, n, group)),
        options=dict.fromkeys(names, OPTIONS),
        sensitivity=sensitivity,
        costs=Costs(
            unit="bit_operations",
            layers={
                name: {choice: bit_operations(choice, sizes[name]) for choice in OPTIONS}
                for name in names
            },
        ),
        float_score=1.0,
    )


Score = Callable[[Candidate], float | None]


def score_of(problem: SearchProblem, seed: int = 5, sign: float = 1.0) -> Score:
    """A score whose truth differs from what is predicted, layer by layer."""
    rng = random.Random(seed)
    truth = {layer.name: rng.lognormvariate(0, 0.7) for layer in problem.layers}

    def known(choice: LayerChoice) -> LayerChoice:
        return choice if choice in OPTIONS else OPTIONS[1]

    def score(candidate: Candidate) -> float:
        harm = sum(
            truth[name] * problem.sensitivity[name][known(choice)] ** 2
            for name, choice in candidate.choices.items()
        )
        return sign * round(1 - harm, 3)

    return score


def trial_of(candidate: Candidate, score: float | None, *, higher: bool = True) -> Trial:
    if score is None:
        return Trial(candidate=candidate, report=None, n_bytes=0, reason="it failed")
    report = EvalReport(
        score=score,
        metric="m",
        higher_is_better=higher,
        metrics={"m": score},
        n_samples=1,
        seconds=0.0,
    )
    n_bytes = int(sum(100 * (c.bits.weight_bits or 32) for c in candidate.choices.values()))
    return Trial(candidate=candidate, report=report, n_bytes=n_bytes)


def search(
    strategy: Pareto | Greedy, score: Score, *, higher: bool = True, seed: int | None = None
) -> list[Trial]:
    """A whole search; with ``seed``, the trials of a round end in a random order."""
    done: list[Trial] = []
    for _ in range(100):
        proposals = strategy.ask()
        if not proposals:
            return done
        trials = [trial_of(c, score(c), higher=higher) for c in proposals]
        done += trials
        if seed is not None:
            random.Random(seed).shuffle(trials)
        strategy.tell(trials)
    pytest.fail("the search does not end")


@settings(max_examples=6)
@given(st.integers(1, 9), st.integers(0, 99), st.integers(1, 3), st.integers(1, 9))
def test_searches_end_in_time_are_reproducible_and_try_nothing_twice(
    n: int, seed: int, group: int, max_trials: int
) -> None:
    problem = problem_of(n, seed, group=group)
    clipping = ("percentile:99.9", "percentile:99.5") if seed % 2 else ()
    wanted = SearchSettings(max_trials=max_trials, n_budgets=8, clipping=clipping)
    score = score_of(problem, seed)
    trials = search(Pareto(problem, wanted), score)
    again = search(Pareto(problem, wanted), score, seed=seed)
    assert [(t.candidate.label, t.candidate.key) for t in trials] == [
        (t.candidate.label, t.candidate.key) for t in again
    ]
    keys = [trial.candidate.key for trial in trials]
    assert len(set(keys)) == len(keys) <= max_trials
    assert [trial.candidate.number for trial in trials] == list(range(len(trials)))
    assert trials[0].candidate.key == choices_key(problem.plain)
    for trial in trials:
        for names in problem.groups:
            assert len({trial.candidate.choices[name].precision for name in names}) == 1


@settings(max_examples=5)
@given(st.integers(2, 12), st.integers(0, 99), st.booleans())
def test_with_greedy_beside_the_answer_is_never_worse_than_greedy(
    n: int, seed: int, higher: bool
) -> None:
    problem = replace(problem_of(n, seed), higher_is_better=higher, float_score=None)
    score = score_of(problem, seed + 1, 1.0 if higher else -1.0)
    own = GreedySettings(max_trials=8, saturations=("max",))
    alone = best_of(search(greedy_for(problem, own), score, higher=higher))
    both = SearchSettings(
        max_trials=6,
        n_budgets=6,
        clipping=("max", "percentile:99.9"),
        include_greedy=True,
        greedy=own,
    )
    trials = search(Pareto(problem, both), score, higher=higher)
    found = best_of(trials)
    assert alone is not None
    assert found is not None
    assert found.rank[:2] >= alone.rank[:2]
    assert len({trial.candidate.key for trial in trials}) == len(trials) <= 14


def covered(front: Front, worst: tuple[float, float]) -> float:
    """The area between a front and the corner of the largest cost and the lowest score."""
    points = [p for p in front.points if p.cost <= worst[0] and p.score >= worst[1]]
    ends = [*(p.cost for p in points[1:]), worst[0]]
    return sum((e - p.cost) * (p.score - worst[1]) for p, e in zip(points, ends, strict=True))


@pytest.mark.parametrize("seed", [0, 3])
def test_its_front_covers_more_than_that_of_greedy_with_twice_the_trials(seed: int) -> None:
    problem = problem_of(30, seed)
    score = score_of(problem, seed)
    ours = Pareto(problem, SearchSettings(max_trials=12))
    front = Front.of(search(ours, score), problem)
    twice = GreedySettings(max_trials=24, saturations=("max",))
    greedy = Front.of(search(greedy_for(problem, twice), score), problem)
    points = (*front.points, *greedy.points)
    worst = max(p.cost for p in points), min(p.score for p in points)
    assert covered(front, worst) > covered(greedy, worst)
    assert ours.front == front


def test_a_target_is_met_at_a_lower_cost_and_a_budget_is_kept() -> None:
    problem = problem_of(20, 1)
    score = score_of(problem, 1)
    plain = score(Candidate(number=0, label="", choices=problem.plain))
    assert plain is not None
    wanted = SearchSettings(max_trials=12, n_budgets=60, target=plain - 0.004)
    trials = search(Pareto(problem, wanted), score)
    found = answer_of(trials, problem, target=wanted.target)
    assert found is not None
    assert found.report is not None
    assert found.report.score >= plain - 0.004
    assert problem.cost(found.candidate.choices) < 0.97 * problem.cost(problem.plain)
    budget = 0.8 * problem.cost(problem.plain)
    trials = search(Pareto(problem, SearchSettings(max_trials=8, budget=budget)), score)
    assert all(problem.cost(t.candidate.choices) <= budget * (1 + 1e-9) for t in trials[1:])
    answer = answer_of(trials, problem, budget=budget)
    assert answer is not None
    assert problem.cost(answer.candidate.choices) <= budget * (1 + 1e-9)


@settings(max_examples=4)
@given(st.integers(0, 99))
def test_of_equal_scores_no_plan_that_costs_as_little_harms_less_than_the_answer(seed: int) -> None:
    problem = problem_of(8, seed)
    table, exact = CandidateTable(problem), score_of(problem, seed)

    def coarse(candidate: Candidate) -> float:
        return round(8 * (exact(candidate) or 0.0)) / 8

    found = search(Pareto(problem, SearchSettings(max_trials=12)), coarse)
    plain_cost = problem.cost(problem.plain)
    trials = [
        replace(
            trial,
            cost=problem.cost(trial.candidate.choices),
            plain_cost=plain_cost,
            harm=table.harm_of(trial.candidate.choices),
        )
        for trial in found
    ]
    answer = answer_of(trials, problem)
    assert answer is not None
    best = max(coarse(trial.candidate) for trial in trials)
    costs = {t: problem.cost(trials[t].candidate.choices) for t in range(len(trials))}
    alike = [
        trial
        for t, trial in enumerate(trials)
        if costs[t] <= plain_cost and coarse(trial.candidate) == best
    ]
    assert coarse(answer.candidate) == best
    if alike:
        harms = [table.harm_of(trial.candidate.choices) for trial in alike]
        assert problem.cost(answer.candidate.choices) <= plain_cost
        assert table.harm_of(answer.candidate.choices) == min(harms)


def test_failed_trials_and_a_budget_that_nothing_fits_end_the_search() -> None:
    problem = problem_of(6)
    trials = search(Pareto(problem, SearchSettings()), lambda candidate: None)
    assert 2 < len(trials) <= 12
    assert answer_of(trials, problem, target=0.5) is None
    none = search(Pareto(problem, SearchSettings(budget=1.0)), score_of(problem))
    assert [trial.candidate.label for trial in none] == ["plain"]


def test_costs_of_a_plan_are_those_that_the_knapsack_minimizes() -> None:
    """Edges between groups, within one, and to layers that cannot change."""
    conversion = {("int8", "int16"): 7.0, ("int16", "int8"): 3.0}
    problem = problem_of(6, 2, group=2)
    costs = problem.costs
    costs = replace(
        costs,
        fixed=11.0,
        layers={**costs.layers, "other": {INT8: 5.0}},
        edges=tuple(
            Edge(source=a, reader=b, conversion=conversion)
            for a, b in (
                ("layer0", "layer1"),
                ("layer1", "layer2"),
                ("layer0", "layer3"),
                ("layer3", "layer5"),
                ("layer5", "other"),
                ("other", "layer0"),
            )
        ),
    )
    problem = replace(problem, plain={**problem.plain, "other": INT8}, costs=costs)
    table = CandidateTable(problem)
    knapsack = table.knapsack([1.0] * 3)
    n = [len(group) for group in knapsack.groups]
    for picks in [(i % n[0], (i // 2) % n[1], (i * 7) % n[2]) for i in range(12)]:
        choices = table.choices(picks)
        assert knapsack.cost(picks) == pytest.approx(problem.cost(choices))
        assert knapsack.harm(picks) == pytest.approx(sum(table.harms_of(choices)))


def test_measured_divergences_and_interactions_weigh_in() -> None:
    problem = problem_of(3)
    local = problem.sensitivity["layer1"][W4] ** 2
    problem = replace(
        problem,
        divergence={"layer1": {W4: 50 * local}},
        interactions=(Interaction(layers=("layer0", "layer1"), choices=(W4, W4), value=0.25),),
    )
    table = CandidateTable(problem)
    choices = {**problem.plain, "layer1": W4}
    assert table.harms_of(choices)[1] == pytest.approx(50 * local)
    knapsack = table.knapsack([1.0] * 3)
    both = {**choices, "layer0": W4}
    picks = tuple(
        next(k for k, c in enumerate(group) if c.choices[0][1] == both[c.choices[0][0]])
        for group in table.candidates
    )
    extra = knapsack.harm(picks) - sum(knapsack.groups[g][k].harm for g, k in enumerate(picks))
    assert extra == pytest.approx(0.25)


def test_what_knights_rules_imply_holds_in_every_proposal() -> None:
    problem = replace(problem_of(8, 4), implied=(("layer0", "layer1"), ("layer1", "layer2")))
    for trial in search(Pareto(problem, SearchSettings(max_trials=16)), score_of(problem)):
        wide = {n for n, choice in trial.candidate.choices.items() if choice == W16}
        assert "layer0" not in wide or "layer1" in wide
        assert "layer1" not in wide or "layer2" in wide


def test_trials_move_the_weights_of_the_groups_that_explain_them() -> None:
    harms = [[1.0, 1.0, 1.0], [4.0, 1.0, 1.0], [1.0, 4.0, 1.0], [1.0, 1.0, 4.0]]
    truth = [0.1, 0.1, 1.0]
    lost = [sum(t * h for t, h in zip(truth, row, strict=True)) for row in harms]
    weights = group_weights(harms, lost, 3)
    assert weights[2] > 1.5 * max(weights[0], weights[1])
    assert group_weights(harms, [None] * 4, 3) == [1.0] * 3
    assert group_weights([[2.0]], [4.0], 1) == pytest.approx([2.0])
    candidate = Candidate(number=0, label="", choices={})
    trials = [trial_of(candidate, 0.75), trial_of(candidate, None), trial_of(candidate, 0.5)]
    assert losses(trials, 1.0) == [0.25, None, 0.5]
    assert losses(trials, None) == [0.0, None, 0.25]


POINTS = st.lists(st.tuples(st.integers(0, 8), st.integers(0, 8)), max_size=12)


@given(POINTS, st.booleans(), st.randoms())
def test_a_front_holds_what_no_trial_dominates_in_any_order(
    points: list[tuple[int, int]], higher: bool, rng: random.Random
) -> None:
    trials = [
        (trial_of(Candidate(number=i, label="", choices={}), float(s), higher=higher), float(c))
        for i, (s, c) in enumerate(points)
    ]

    def front(order: list[tuple[Trial, float]]) -> Front:
        made = Front(higher_is_better=higher)
        for trial, cost in order:
            made = made.with_trial(trial, cost)
        return made

    found = front(trials)
    mixed = list(trials)
    rng.shuffle(mixed)
    assert front(mixed) == found
    sign = 1 if higher else -1
    for point in found.points:
        assert not any(
            (c <= point.cost and sign * s > sign * point.score)
            or (c < point.cost and sign * s >= sign * point.score)
            for s, c in points
        )
    for s, c in points:
        assert any(p.cost <= c and sign * p.score >= sign * s for p in found.points)
    for trial, _ in trials[:1]:
        assert trial.report is not None
        partly = replace(trial, report=replace(trial.report, stopped_early=True))
        assert found.with_trial(partly, -1.0) == found
    costs = {trial.candidate.number: cost for trial, cost in trials}
    plain = front_of([t for t, _ in trials], lambda trial: costs[trial.candidate.number])
    assert plain == [point.trial for point in found.points]
    assert [row["cost"] for row in found.rows()] == [point.cost for point in found.points]


def test_a_choice_with_another_threshold_method_costs_what_its_like_does() -> None:
    fine, coarse = INT8, replace(INT8, granularity="tensor")
    costs = Costs(layers={"a": {fine: 5.0, coarse: 3.0, W16: 9.0}})
    clipped = replace(coarse, saturation="percentile:99.9")
    assert costs.of_layer("a", clipped) == 3.0
    assert costs.of_layer("a", replace(fine, saturation="percentile:99.9")) == 5.0
    assert costs.of_layer("a", replace(coarse, precision="w8a16")) == 9.0
    assert costs.of_layer("a", LayerChoice(precision="float32")) == 9.0
    assert costs.of_layer("b", clipped) == 0.0


def test_sizes_and_operations_of_a_layer() -> None:
    assert weight_bytes(W4, 1000, 10) == 540
    assert weight_bytes(LayerChoice(precision="float32"), 1000) == 4000
    assert bit_operations(W4, 10) == 320
    assert bit_operations(LayerChoice(precision="w8"), 1) == 256


def test_strategies_by_name_and_by_file(tmp_path: Path) -> None:
    problem = problem_of(2)
    assert isinstance(make_strategy("greedy", problem, SearchSettings()), Greedy)
    assert isinstance(make_strategy("pareto", problem, SearchSettings()), Pareto)
    assert {"pareto", "greedy"} <= set(STRATEGIES)
    file = tmp_path / "mine.py"
    file.write_text(
        "from qdist.search.trial import Candidate\n"
        "class Once:\n"
        "    def __init__(self, problem, settings):\n"
        "        self.left = [Candidate(number=0, label='plain', choices=problem.plain)]\n"
        "    def ask(self):\n"
        "        found, self.left = self.left, []\n"
        "        return found\n"
        "    def tell(self, trials):\n"
        "        pass\n"
        "class Mute:\n"
        "    pass\n"
    )
    once = make_strategy(f"{file}:Once", problem, SearchSettings())
    assert [c.label for c in once.ask()] == ["plain"]
    assert once.ask() == []
    with pytest.raises(ConfigError, match="QD108"):
        check_strategy(f"{file}:Mute")
    with pytest.raises(ConfigError, match="QD104"):
        check_strategy("annealing")


def test_a_search_with_fewer_trials_is_the_beginning_of_one_with_more() -> None:
    problem = problem_of(12, 3)
    score = score_of(problem, 3)

    def keys(n_trials: int) -> list[str]:
        clipping = ("percentile:99.9", "percentile:99.5")
        wanted = SearchSettings(max_trials=n_trials, n_budgets=8, patience=9, clipping=clipping)
        return [trial.candidate.key for trial in search(Pareto(problem, wanted), score)]

    many = keys(10)
    assert len(many) == 10
    for n in (1, 2, 3, 6, 7):
        assert keys(n) == many[:n]


def test_it_begins_with_the_best_there_is_the_best_at_no_more_cost_and_the_cheapest() -> None:
    problem = problem_of(12, 3)
    first = Pareto(problem, SearchSettings()).ask()
    assert [c.label for c in first] == [
        "plain",
        "least harm",
        "max everywhere",
        "least harm at no more cost",
        "cheapest",
    ]
    plain, best, other, free, cheapest = first
    assert set(other.choices.values()) == {OPTIONS[1]}
    assert problem.cost(free.choices) <= problem.cost(plain.choices)
    assert best.predicted is not None
    assert free.predicted is not None
    assert cheapest.predicted is not None
    assert best.predicted < free.predicted < cheapest.predicted
    assert set(cheapest.choices.values()) == {W4}
    assert set(best.choices.values()) == {W16}
    # By its own measure it is better than the plain plan too.
    table = CandidateTable(problem)
    assert sum(table.harms_of(free.choices)) < sum(table.harms_of(plain.choices))


def test_a_method_that_finds_the_ranges_of_the_plain_plan_is_no_other_plan() -> None:
    problem = problem_of(12, 3)
    plain = set(problem.plain.values()).pop()
    same = {
        name: {
            choice: known[plain] if choice.precision == plain.precision else error
            for choice, error in known.items()
        }
        for name, known in problem.sensitivity.items()
    }
    assert CandidateTable(problem).other_method() is not None
    assert CandidateTable(replace(problem, sensitivity=same)).other_method() is None


@pytest.mark.parametrize("higher", [True, False])
def test_beyond_a_plan_as_good_as_the_float_model_nothing_is_tried_while_less_may_do(
    higher: bool,
) -> None:
    sign = 1.0 if higher else -1.0
    problem = replace(problem_of(20, 1), higher_is_better=higher, float_score=sign * 0.9)
    middle = 1.1 * problem.cost(problem.plain)

    def score(candidate: Candidate) -> float:
        return sign * (0.9 if problem.cost(candidate.choices) > middle else 0.5)

    trials = search(Pareto(problem, SearchSettings()), score, higher=higher)
    cost = {trial.candidate.number: problem.cost(trial.candidate.choices) for trial in trials}
    later = [trial.candidate for trial in trials if trial.candidate.round > 0]
    assert len(later) > 3
    for candidate in later:
        # Of a round's own trials it is not known yet what they reach.
        known = [t.candidate.number for t in trials if t.candidate.round < candidate.round]
        assert cost[candidate.number] < min(cost[n] for n in known if cost[n] > middle)
    unknown = replace(problem, float_score=None)
    trials = search(Pareto(unknown, SearchSettings()), score, higher=higher)
    assert len(trials) > 6


def test_the_widest_gap_lies_between_plans_that_differ_in_cost_and_in_loss() -> None:
    gaps = Gaps.of([(2.0, 0.01), (1.0, 0.1), (4.0, 0.01), (4.0, 0.1), (0.5, None)])
    assert gaps.marks == ((0.5, None), (1.0, -10.0), (2.0, -20.0), (4.0, -20.0))
    middle = 0.5 * math.log(2)
    assert gaps.worth(2**0.5) == pytest.approx(middle * 6)
    assert gaps.worth(8**0.5) == pytest.approx(middle)
    assert gaps.worth(0.5**0.5) == pytest.approx(middle)  # nobody knows how they differ
    assert gaps.worth(1.1) < gaps.worth(1.3)
    assert gaps.worth(2.0) == 0
    assert gaps.worth(8.0) == pytest.approx(math.log(2))
    half = gaps.with_plan(2**0.5)
    assert half.marks[2] == pytest.approx((2**0.5, -15.0))
    assert half.with_plan(2**0.5) == half
    assert half.worth(2**0.25) == pytest.approx(middle / 2 * 3.5)
    assert gaps.with_plan(9.0).marks[-1] == (9.0, None)
    assert Gaps().worth(1.0) == math.inf
    free = Gaps.of([(0.0, 0.1), (1.0, 0.0)])
    assert free.worth(0.0) == 0
    assert free.with_plan(0.5).worth(0.7) > 0


def test_between_two_plans_losses_fall_as_the_predicted_front_does() -> None:
    """Ten times the cost and 30 dB apart; a fifth more cost brings half of them."""
    front = [(1.0, 1.0), (1.2, 0.01), (3.0, 0.003), (9.0, 0.0001), (10.0, 0.0)]
    gaps = Gaps.of([(1.0, 0.2), (10.0, 0.0002)], front)
    assert gaps.shape[-1] == pytest.approx((10.0, -50.0))
    assert gaps.with_plan(1.2).marks[1] == pytest.approx((1.2, 10 * math.log10(0.2) - 12))
    assert gaps.with_plan(1.1).marks[1][1] == gaps.marks[0][1]
    assert gaps.worth(1.2) == pytest.approx(math.log(1.2) * 13)
    assert gaps.worth(3.0) > gaps.worth(1.2) > gaps.worth(1.1)
    assert gaps.worth(9.0) < gaps.worth(1.2)
    later = gaps.with_plan(3.0)
    assert later.worth(1.2) > later.worth(9.0)
    # Before any trial the shape alone tells.
    new = Gaps.of([], front).with_plan(1.0).with_plan(10.0)
    assert new.worth(3.0) == pytest.approx(math.log(3) * (1 - 10 * math.log10(0.003)))
    assert new.worth(3.0) > new.worth(9.0)


def test_the_solvers_stray_lines_do_not_reach_stdout(capfd: pytest.CaptureFixture[str]) -> None:
    libc = ctypes.CDLL(None)
    libc.printf(b"before\n")
    with without_stray_lines():
        libc.printf(b"HighsMipSolverData::transformNewIntegerFeasibleSolution tmpSolver.run();\n")
        os.write(1, b"of another thread\n")
        libc.printf(b"%s", b"no end of line")
    libc.printf(b"after\n")
    libc.fflush(None)
    assert capfd.readouterr().out == "before\nof another thread\nno end of lineafter\n"


@pytest.mark.parametrize(
    ("unit", "cost", "said"),
    [
        ("bytes", 98_690.0, "98.69 kB of weights"),
        ("bytes", 12.0, "12 B of weights"),
        ("bit_operations", 2.5e9, "2.5 G bit operations"),
        ("bit_operations", 12.0, "12 bit operations"),
        ("latency", 1234.5, "1234 us"),
    ],
)
def test_a_cost_in_words(unit: str, cost: float, said: str) -> None:
    assert cost_text(unit, cost) == said
