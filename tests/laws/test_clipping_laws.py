"""The search for a clipping ends, tries nothing twice, and stops where no neighbour is better."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from qdist.evaluate.report import EvalReport
from qdist.plan.choice import LayerChoice
from qdist.search.clipping import PLAIN_WIDTH, RAISED, Clipping, lines
from qdist.search.problem import SearchLayer, SearchProblem
from qdist.search.trial import Candidate, Choices, Trial, choices_key

METHODS = (
    *("percentile:99.99", "percentile:99.9", "percentile:99.5", "percentile:99"),
    *("max:th_scale=0.97", "max:th_scale=0.9", "kl"),
)
SCORES = st.integers(-3, 3).map(float)
NARROW, WIDE = LayerChoice(precision="int8"), LayerChoice(precision="int16")
PROBLEM = SearchProblem(
    plain={"a": NARROW, "b": NARROW},
    layers=tuple(
        SearchLayer(name=name, op_type="MatMul", position=i) for i, name in enumerate("ab")
    ),
    groups=(("a",), ("b",)),
    options=dict.fromkeys("ab", (NARROW, WIDE)),
)
PLANS: dict[bool, Choices] = {
    PLAIN_WIDTH: PROBLEM.plain,
    RAISED: {"a": WIDE, "b": WIDE},
}


def trial(number: int, plan: Choices, score: float | None, higher: bool) -> Trial:
    candidate = Candidate(number=number, label="", choices=plan)
    if score is None:
        return Trial(candidate=candidate, report=None, n_bytes=0, reason="it failed")
    report = EvalReport(
        score=score if higher else -score,
        metric="m",
        higher_is_better=higher,
        metrics={"m": score if higher else -score},
        n_samples=1,
        seconds=0.0,
    )
    return Trial(candidate=candidate, report=report, n_bytes=1)


@given(
    st.permutations(METHODS),
    st.integers(0, len(METHODS)),
    st.sampled_from([PLAIN_WIDTH, RAISED]),
    st.data(),
    st.booleans(),
)
def test_a_search_for_a_clipping(
    order: list[str], n: int, width: bool, data: st.DataObject, higher: bool
) -> None:
    methods = tuple(order[:n])
    clipping = Clipping(PROBLEM, methods)
    plan = PLANS[width]
    clipping.refer(width, "", plan)
    scores: dict[str | None, float | None] = {None: data.draw(SCORES)}
    told = {choices_key(plan): trial(0, plan, scores[None], higher)}
    clipping.tell(told)
    while (found := clipping.next(width)) is not None:
        _, clipped, before = found
        assert before == plan
        (method,) = {choice.saturation for choice in clipped.values()}
        assert method in methods
        assert method not in scores
        scores[method] = data.draw(st.none() | SCORES)
        told[choices_key(clipped)] = trial(len(told), clipped, scores[method], higher)
        clipping.tell(told)
    gains = {m: -99.0 if score is None else score for m, score in scores.items()}
    (best,) = {choice.saturation for choice in clipping.of(plan).values()}
    own = None if best == NARROW.saturation else best
    assert gains[own] == max(gains.values())
    for key, entry in told.items():
        used = next(iter(entry.candidate.choices.values())).saturation
        assert clipping.is_lost(key) == (used not in (NARROW.saturation, best))
    known = lines(methods)
    if own is None:
        # What does not help costs the first trial of its line.
        assert set(scores) == {None, *(line.first for line in known)}
    else:
        line = next(line for line in known if own in line.methods)
        assert set(line.beside(own)) <= set(scores)
    # Layers of the other width stay as they are.
    other = PLANS[not width]
    assert clipping.of(other) == other
