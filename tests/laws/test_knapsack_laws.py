"""The knapsack equals brute force; fronts hold nothing dominated."""

from __future__ import annotations

import itertools
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qdist.search.knapsack import GroupEdge, Item, Knapsack, Pair, Solution, undominated
from qdist.search.lagrange import spread, swept

KINDS = ("int4", "int8", "int16")
NUMBERS = st.integers(0, 40).map(lambda n: n / 4)


@st.composite
def knapsacks(draw: st.DrawFn, *, tied: bool = True) -> Knapsack:
    n = draw(st.integers(1, 4))
    item = st.builds(
        Item,
        harm=NUMBERS,
        cost=NUMBERS,
        kind=st.sampled_from(KINDS),
        is_raised=st.booleans() if tied else st.just(False),
    )
    groups = tuple(tuple(draw(st.lists(item, min_size=1, max_size=4))) for _ in range(n))
    conversions = st.dictionaries(
        st.tuples(st.sampled_from(KINDS), st.sampled_from(KINDS)).filter(lambda p: p[0] != p[1]),
        NUMBERS,
    )
    ends = st.tuples(st.integers(0, n - 1), st.integers(0, n - 1)).filter(lambda e: e[0] != e[1])
    edges, pairs, implied = [], [], []
    if n > 1 and tied:
        for a, b in draw(st.lists(ends, max_size=3, unique=True)):
            edges.append(GroupEdge(source=a, reader=b, conversion=draw(conversions)))
        for a, b in draw(st.lists(ends, max_size=2, unique_by=frozenset)):
            k, m = (draw(st.integers(0, len(groups[g]) - 1)) for g in (a, b))
            harm = draw(st.integers(-8, 8)) / 4
            if harm:
                pairs.append(Pair(first=(a, k), second=(b, m), harm=harm))
        implied = draw(st.lists(ends, max_size=2))
    return Knapsack(
        groups=groups,
        edges=tuple(edges),
        pairs=tuple(pairs),
        implied=tuple(implied),
        fixed=draw(NUMBERS),
    )


def all_choices(knapsack: Knapsack) -> list[Solution]:
    picks = itertools.product(*(range(len(group)) for group in knapsack.groups))
    return [
        Solution(picks=p, harm=knapsack.harm(p), cost=knapsack.cost(p))
        for p in picks
        if knapsack.is_allowed(p)
    ]


@settings(max_examples=150)
@given(knapsacks(), st.integers(0, 200).map(lambda n: n / 4))
def test_the_solver_equals_brute_force(knapsack: Knapsack, budget: float) -> None:
    fitting = [s for s in all_choices(knapsack) if s.cost <= budget]
    found = knapsack.solve(budget)
    if not fitting:
        assert found is None
        return
    assert found is not None
    assert knapsack.is_allowed(found.picks)
    assert found.cost <= budget + 1e-6
    assert found.harm == pytest.approx(min(s.harm for s in fitting), abs=1e-3)
    cheapest = knapsack.solve(budget, cheapest=True)
    assert cheapest is not None
    assert cheapest.cost == pytest.approx(min(s.cost for s in fitting), abs=1e-3)
    assert knapsack.solve(budget) == found


@settings(max_examples=40)
@given(knapsacks())
def test_a_front_rises_in_cost_and_falls_in_harm(knapsack: Knapsack) -> None:
    front = knapsack.front(6)
    allowed = all_choices(knapsack)
    if not allowed:
        assert front == ()
        return
    assert front
    for cheaper, dearer in itertools.pairwise(front):
        assert cheaper.cost < dearer.cost
        assert cheaper.harm > dearer.harm
    assert front[-1].harm == pytest.approx(min(s.harm for s in allowed), abs=1e-3)


@settings(max_examples=60)
@given(knapsacks(tied=False), st.integers(1, 12))
def test_a_price_finds_a_best_choice_for_its_own_cost(knapsack: Knapsack, n: int) -> None:
    everything = all_choices(knapsack)
    for picks in swept(knapsack, n):
        own = Solution(picks=picks, harm=knapsack.harm(picks), cost=knapsack.cost(picks))
        rivals = [s.harm for s in everything if s.cost <= own.cost]
        assert own.harm == pytest.approx(min(rivals), abs=1e-9)


def test_a_sweep_of_a_large_knapsack_is_near_what_exact_solving_finds() -> None:
    rng = random.Random(7)
    groups = []
    for _ in range(120):
        scale, size = rng.lognormvariate(0, 1.5), rng.uniform(1, 50)
        groups.append(
            tuple(
                Item(harm=scale * 4.0 ** -(bits / 4), cost=size * bits, kind=kind)
                for kind, bits in (("int4", 4), ("int8", 8), ("int16", 16), ("float32", 32))
            )
        )
    conversion = {(a, b): 20.0 for a in KINDS for b in KINDS if a != b}
    edges = tuple(GroupEdge(source=g, reader=g + 1, conversion=conversion) for g in range(119))
    knapsack = Knapsack(groups=tuple(groups), edges=edges)
    front = knapsack.front(20)
    assert len(front) > 10
    for solution in front[:: len(front) // 4]:
        exact = knapsack.solve(solution.cost)
        assert exact is not None
        assert solution.harm <= 1.05 * exact.harm


@given(st.floats(0, 1e12), st.floats(0, 1e12), st.integers(0, 40))
def test_budgets_lie_between_two_costs_each_the_same_factor_from_the_next(
    low: float, high: float, n: int
) -> None:
    found = spread(low, high, n)
    assert len(found) in (0, n)
    if low < 0.999 * high and n:
        assert len(found) == n
    start = max(low, high / 1000)
    ends = [start, *found, high]
    assert all(low < cost < high for cost in found[1:-1])
    if len(found):
        factors = [b / a for a, b in itertools.pairwise(ends)]
        assert factors == pytest.approx([factors[0]] * len(factors))


@pytest.mark.parametrize("n", [60, 160])
def test_a_front_is_as_fine_where_plans_are_cheap_as_where_they_are_dear(n: int) -> None:
    """Solved budget by budget, and swept by prices."""
    rng = random.Random(n)
    groups = []
    for _ in range(n):
        scale, size = rng.lognormvariate(0, 1.5), rng.uniform(1, 20)
        groups.append(
            tuple(
                Item(harm=scale * 4.0 ** -(bits / 4), cost=size * bits * bits, kind=str(bits))
                for bits in (8, 16, 27)
            )
        )
    front = Knapsack(groups=tuple(groups), fixed=50.0).front(30)
    costs = [solution.cost for solution in front]
    assert costs[-1] > 10 * costs[0]
    step = (costs[-1] / costs[0]) ** (1 / 29)
    assert max(b / a for a, b in itertools.pairwise(costs)) < 1.5 * (step - 1) + 1


def test_where_a_price_turns_many_groups_at_once_there_is_a_plan_between(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A chain whose conversions cost more than its layers: swept, it changes as a whole."""
    monkeypatch.setattr("qdist.search.knapsack.EXACT_ITEMS", 0)
    rng = random.Random(5)
    groups = tuple(
        tuple(
            Item(harm=scale * 4.0 ** -(bits / 4), cost=10.0 * bits, kind=kind)
            for kind, bits in (("int4", 4), ("int8", 8), ("int16", 16))
        )
        for scale in [rng.uniform(1, 1.1) for _ in range(24)]
    )
    conversion = {(a, b): 200.0 for a in KINDS for b in KINDS if a != b}
    edges = tuple(GroupEdge(source=g, reader=g + 1, conversion=conversion) for g in range(23))
    knapsack = Knapsack(groups=groups, edges=edges)
    alone = sorted(knapsack.cost(picks) for picks in swept(knapsack, 12))
    hole = max(itertools.pairwise(alone), key=lambda pair: pair[1] / pair[0])
    assert hole[1] > 1.3 * hole[0]
    between = [s for s in knapsack.front(12) if hole[0] < s.cost < hole[1]]
    assert between
    assert all(len(set(solution.picks)) > 1 for solution in between)


@given(st.lists(st.tuples(NUMBERS, NUMBERS), max_size=12))
def test_nothing_of_a_front_is_dominated(points: list[tuple[float, float]]) -> None:
    solutions = [Solution(picks=(i,), harm=h, cost=c) for i, (h, c) in enumerate(points)]
    front = undominated(solutions)
    for kept in front:
        assert not any(
            (s.cost <= kept.cost and s.harm < kept.harm)
            or (s.cost < kept.cost and s.harm <= kept.harm)
            for s in solutions
        )
    for one in solutions:
        assert any(kept.cost <= one.cost and kept.harm <= one.harm for kept in front)


@pytest.mark.parametrize("groups", [((),), ((Item(harm=float("nan"), cost=1.0),),)])
def test_groups_without_candidates_and_numbers_are_refused(
    groups: tuple[tuple[Item, ...], ...],
) -> None:
    with pytest.raises(ValueError, match=r"candidate|finite"):
        Knapsack(groups=groups)


def test_nothing_to_choose_costs_what_is_fixed() -> None:
    nothing = Knapsack(groups=(), fixed=3.0)
    assert nothing.solve() == Solution(picks=(), harm=0.0, cost=3.0)
    assert nothing.solve(2.0) is None
