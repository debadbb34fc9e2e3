"""How far activations are clipped, as a whole plan has it.

A threshold method with its parameters, ``percentile:99.9`` or ``max:th_scale=0.97``, that all
layers of one width have. What so much clipping does to a model no layer tells by itself: errors of
the largest values meet further on, and some models are the better for fewer of these. So it is
tried on whole plans, one for each width (`Width`): the plain plan, and the least harmful one, which
has wider activations where these help.

The methods of a `Line` differ in one number alone. The first of each line is tried first; from one
that helps the search goes on to its neighbours, the stronger first.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from qdist.plan.choice import LayerChoice
from qdist.search.problem import SearchProblem
from qdist.search.trial import Choices, Trial, choices_key
from qdist.threshold.registry import resolve

Width = bool
"""Of a layer's activations in a plan: whether they have more bits than in the plain plan."""
PLAIN_WIDTH: Width = False
RAISED: Width = True


@dataclass(frozen=True, slots=True, kw_only=True)
class Line:
    """``methods`` that differ in one number, from the mildest clipping to the strongest; ``first``:
    the one that is tried first."""

    methods: tuple[str, ...]
    first: str

    def beside(self, method: str) -> tuple[str, ...]:
        """The neighbours of one of them, the stronger first."""
        at = self.methods.index(method)
        return tuple(self.methods[i] for i in (at + 1, at - 1) if 0 <= i < len(self.methods))


def lines(methods: Sequence[str]) -> tuple[Line, ...]:
    """The lines of the methods that a user lists, in the order of their first ones. Raises QD501,
    QD502.

    >>> for line in lines(["percentile:99.9", "max:th_scale=0.9", "percentile:99.99"]):
    ...     print(line.first, line.methods)
    percentile:99.9 ('percentile:99.99', 'percentile:99.9')
    max:th_scale=0.9 ('max:th_scale=0.9',)
    """
    found: dict[object, list[tuple[float, str]]] = {}
    for method in dict.fromkeys(methods):
        key, strength = _line_of(method)
        found.setdefault(key, []).append((strength, method))
    return tuple(
        Line(methods=tuple(method for _, method in sorted(known)), first=known[0][1])
        for known in found.values()
    )


def _line_of(method: str) -> tuple[object, float]:
    """What the methods of a line share, and how strongly this one clips among them."""
    name, given = resolve(method, where="search.clipping")
    for parameter in ("th_scale", "percent"):
        if parameter in given:
            rest = {key: value for key, value in given.items() if key != parameter}
            return (name, parameter, tuple(sorted(rest.items()))), -float(given[parameter])
    return (name, "", tuple(sorted(given.items()))), 0.0


@dataclass(slots=True)
class _Tested:
    """The plan that stands for a width, and what its trials said. ``name``: of the plan, empty for
    the plain one. ``lines``: what is tried on it. ``keys``: of its candidates -> the method;
    ``gains``: method -> score, more is better; None is the plan as it is."""

    name: str
    plan: Choices
    lines: tuple[Line, ...]
    keys: dict[str, str | None] = field(default_factory=dict)
    gains: dict[str | None, float] = field(default_factory=dict)

    @property
    def best(self) -> str | None:
        """None unless a method is better than the plan as it is; of equal ones the earlier."""
        if None not in self.gains:
            return None
        ordered = sorted(self.gains.items(), key=lambda entry: entry[0] is not None)
        return max(ordered, key=lambda entry: entry[1])[0]


class Clipping:
    """What whole plans are clipped with, by the trials so far. Nothing but told trials decides."""

    def __init__(self, problem: SearchProblem, methods: Sequence[str]) -> None:
        """``methods``: as a user lists them. Raises QD501, QD502."""
        self._problem = problem
        self._methods = tuple(methods)
        lines(methods)
        self._tested: dict[Width, _Tested] = {}

    def refer(self, width: Width, name: str, plan: Choices, last: Sequence[str] = ()) -> None:
        """The plan that stands for a width, which is tried as it is, too. ``last``: methods that
        are tried after those of the user."""
        known = lines((*self._methods, *last))
        keys: dict[str, str | None] = {choices_key(plan): None}
        self._tested[width] = _Tested(name=name, plan=plan, lines=known, keys=keys)

    def of(self, plan: Choices) -> dict[str, LayerChoice]:
        """A plan with what serves best so far. What costs more than the plain plan lies between the
        two that were tried: there layers of the plain width are clipped only if that helped both.
        Those that the plan raises are the ones that were the better for it."""
        best = {width: tested.best for width, tested in self._tested.items()}
        cost = self._problem.cost
        if best.get(RAISED) is None and cost(plan) > cost(self._problem.plain):
            best[PLAIN_WIDTH] = None
        return self._clipped(plan, best)

    def next(self, width: Width) -> tuple[str, dict[str, LayerChoice], Choices] | None:
        """The next trial of the width's plan: in a few words, the plan clipped, and as it is. None
        where there is nothing to try, or nothing that it would change."""
        tested = self._tested.get(width)
        if tested is None:
            return None
        while (method := self._wanted(width, tested)) is not None:
            plan = self._clipped(tested.plan, {width: method})
            key = choices_key(plan)
            if key not in tested.keys:
                tested.keys[key] = method
                label = f"{tested.name}, {method}" if tested.name else f"{method} everywhere"
                return label, plan, tested.plan
            # As it is, the plan has that method already.
            tested.gains[method] = -math.inf
        return None

    def tell(self, trials: Mapping[str, Trial]) -> None:
        """All trials so far, by the keys of their candidates."""
        for tested in self._tested.values():
            for key, method in tested.keys.items():
                if key in trials:
                    tested.gains[method] = _gain(trials[key])

    def is_lost(self, key: str) -> bool:
        """Whether the candidate of that key was a trial of a method that does not serve best."""
        return any(
            tested.keys.get(key) not in (None, tested.best) for tested in self._tested.values()
        )

    def _wanted(self, width: Width, tested: _Tested) -> str | None:
        """Beside what serves best, else the first of a line of which nothing was tried."""
        tried = {*tested.gains, *tested.keys.values()}
        best = tested.best
        if best is not None:
            line = next(line for line in tested.lines if best in line.methods)
            near = line.beside(best)
            # With fine steps clipping is all of the error, so less of it comes first.
            ordered = reversed(near) if width == RAISED else near
            return next((method for method in ordered if method not in tried), None)
        heads = (line.first for line in tested.lines)
        return next((method for method in heads if method not in tried), None)

    def _clipped(
        self, plan: Choices, methods: Mapping[Width, str | None]
    ) -> dict[str, LayerChoice]:
        """The plan with a method for each width. Layers that may not change keep theirs, and so do
        those whose activations have no range to be found."""
        found = dict(plan)
        for layer in self._problem.layers:
            choice = plan[layer.name]
            method = methods.get(self._problem.is_raised(layer.name, choice))
            if method is not None and _has_range(choice):
                found[layer.name] = replace(choice, saturation=method, th_scale=1.0)
        return found


def _gain(trial: Trial) -> float:
    """The score, such that more is better; of what has no whole one, less than any."""
    report = trial.report
    if report is None or report.stopped_early or math.isnan(report.score):
        return -math.inf
    return report.score if report.higher_is_better else -report.score


def _has_range(choice: LayerChoice) -> bool:
    bits = choice.bits
    if bits.is_float or bits.rounds is not None or bits.activation is None:
        return False
    return choice.activation_granularity != "token" and choice.threshold is None
