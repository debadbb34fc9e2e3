"""Icraft's three searches (``quant_autotune_config``): ``accuracy``, ``tradeoff``, ``performance``.

As section 3.5 of the vendor's guide has them; docs/search-vendors.md lists what it leaves open. A
round is one scored plan, that starts from the plan of the round before. The search ends with the
target reached, ``round_num`` rounds, or nothing left to change.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass

from qdist.errors import ConfigError
from qdist.evaluate.compare import Deviation
from qdist.plan.choice import LayerChoice
from qdist.search.icraft_ladders import CHIPS, SPLIT, combinations, raised, rung_of, rungs
from qdist.search.icraft_measures import CONDITION_B, LEVELS, to_change, widened, worst_share
from qdist.search.problem import SearchProblem
from qdist.search.proposals import Proposals
from qdist.search.trial import Candidate, Choices, Trial

_N_AHEAD = 2
"""How far its own guesses are worth following."""
PRIORITIES = ("accuracy", "tradeoff", "performance")
Alone = Mapping[str, Mapping[LayerChoice, Deviation]]
"""Layer -> choice -> deviation of its output when it alone has it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """When a search may end. ``measure``: a key of the report's metrics, or ``score``."""

    measure: str
    value: float

    def is_reached(self, trial: Trial, *, higher_is_better: bool) -> bool:
        """Whether the trial is as good as this. Raises QD107 where its evaluation does not give the
        measure; a failed trial is not."""
        if self.measure == "score":
            if trial.report is None:
                return False
            score = trial.report.score
            return score >= self.value if higher_is_better else score <= self.value
        if trial.report is None:
            return False
        found = trial.report.metrics.get(self.measure)
        if found is None:
            raise ConfigError(
                "QD107",
                where="search.target",
                got=f"{self.measure} with an evaluation that gives "
                + ", ".join(trial.report.metrics),
                expected="a measure that the evaluation gives",
                mend="choose an evaluation that compares with the float model, or another target",
            )
        return found >= self.value if self.measure == "cosine" else found <= self.value


@dataclass(frozen=True, slots=True, kw_only=True)
class IcraftSettings:
    """``priority``: of `PRIORITIES`; ``chip``: of `icraft_ladders.CHIPS`. ``threshold_level``: 1 to
    3, for ``accuracy``. ``round_num``: rounds beside the plain plan. ``float_cal``: whether Buyi
    may mix float32 in. ``target``: None to go on to the last round."""

    priority: str = "accuracy"
    chip: str = "buyi"
    threshold_level: int = 1
    round_num: int = 50
    float_cal: bool = False
    target: Target | None = Target(measure="cosine", value=0.99)

    def __post_init__(self) -> None:
        if self.priority not in PRIORITIES or self.chip not in CHIPS:
            raise ValueError(f"{self.priority!r} or {self.chip!r} is unknown")
        if self.threshold_level not in LEVELS or self.round_num < 1:
            raise ValueError("threshold_level must be 1, 2 or 3 and round_num at least 1")

    @property
    def splits_bias(self) -> bool:
        """Whether the bias of an int16 convolution may be split off."""
        return self.priority == "accuracy" and self.chip == "buyi"


@dataclass(frozen=True, slots=True, kw_only=True)
class _Move:
    """``names``: the layers whose choice is new; ``is_trial``: whether it goes back unless better
    than before."""

    label: str
    choices: Choices
    names: tuple[str, ...]
    is_trial: bool = False


class Icraft:
    """The strategy. ``alone``: the layer-by-layer measures; what it lacks is made from the relative
    L2 errors of the problem, and what these lack is taken from the last trial, in place."""

    def __init__(
        self, problem: SearchProblem, settings: IcraftSettings, alone: Alone | None = None
    ) -> None:
        self._problem = problem
        self._settings = settings
        self._alone = alone or {}
        self._order = [e.name for e in sorted(problem.layers, key=lambda e: e.position)]
        self._group_of = {name: group for group in problem.groups for name in group}
        self._proposals = Proposals(problem, settings.round_num + 1)
        self._choices = dict(problem.plain)
        self._used = {name: {rung_of(problem.plain[name])} for name in self._order}
        self._in_place: Mapping[str, Deviation] = {}
        self._current: Trial | None = None
        self._step = 0
        self._queue: list[str] = []
        self._tried: dict[str, set[LayerChoice]] = {name: set() for name in self._order}
        self._helped: set[str] = set()
        self._last: _Move | None = None
        self._is_over = False

    def ask(self) -> list[Candidate]:
        """The next plan; empty when the search is over."""
        if self._is_over:
            return []
        self._proposals.next_round()
        if self._proposals.round == 0:
            plain = self._proposals.make("plain", self._problem.plain, wants_layers=True)
            return [plain] if plain else []
        while (move := self._next_move()) is not None:
            found = self._proposals.make(move.label, move.choices, wants_layers=True)
            if found is not None:
                self._last = move
                return [found]
            if self._proposals.is_full:
                break
            if not move.is_trial:
                # The way to what lies above leads over a plan that was scored before.
                self._choices = dict(move.choices)
        self._is_over = True
        return []

    def tell(self, trials: Iterable[Trial]) -> None:
        """The trial of the last plan. Raises QD107, see `Target`."""
        move, self._last = self._last, None
        for trial in trials:
            target = self._settings.target
            if target is not None and target.is_reached(
                trial, higher_is_better=self._problem.higher_is_better
            ):
                self._is_over = True
            is_better = self._current is None or trial.rank_by_cost > self._current.rank_by_cost
            if move is None and trial.report is None:
                # Without measures of the plain plan there is nothing to go by.
                self._is_over = True
            if trial.report is None or (move is not None and move.is_trial and not is_better):
                continue
            self._choices = dict(trial.candidate.choices)
            self._in_place = trial.layers or self._in_place
            if move is not None and move.is_trial:
                self._helped.update(move.names)
            self._current = trial

    def speculate(self, finished: Sequence[Trial], running: Sequence[Candidate]) -> list[Candidate]:
        """The plans after the running one, as long as measures in place stay what they are: a
        change that stays has been made, and one that has to be better first was not."""
        if finished or not running:
            return []
        shared = (self._problem, self._settings, self._alone, self._order, self._group_of)
        kept = (*shared, self._in_place, self._current)
        copy = deepcopy(self, {id(entry): entry for entry in kept})
        found: list[Candidate] = []
        while len(found) < _N_AHEAD:
            move, copy._last = copy._last, None
            if move is not None and not move.is_trial:
                copy._choices = dict(move.choices)
            after = copy.ask()
            if not after:
                break
            found += after
        return found

    def _next_move(self) -> _Move | None:
        if self._settings.priority == "accuracy":
            return self._wider()
        while True:
            if not self._queue:
                found = to_change(
                    self._problem.layers, self._in_place, self._is_bad_alone, self._can_change
                )
                if not found:
                    return None
                self._queue = list(found)
                self._helped.clear()
            name = self._queue[0]
            move = self._combination(name) if self._settings.priority == "performance" else None
            if move is not None:
                return move
            self._queue.pop(0)
            if name in self._helped:
                continue
            raised_move = self._raise([name])
            if raised_move is not None:
                return raised_move

    def _wider(self) -> _Move | None:
        while self._step < self._settings.round_num:
            self._step += 1
            share = self._step / self._settings.round_num
            found = {name: d for name in self._order if (d := self._measure(name)) is not None}
            bounds = widened(self._settings.threshold_level, share)
            order = [name for name in self._order if self._above(name) is not None]
            move = self._raise(worst_share(found, bounds, share, order))
            if move is not None:
                return move
        return None

    def _combination(self, name: str) -> _Move | None:
        """The layer with the next granularity and threshold method that it was not tried with."""
        for option in combinations(self._choices[name], self._problem.options[name]):
            if option in self._tried[name]:
                continue
            self._tried[name] |= {option, self._choices[name]}
            choices = {**self._choices, name: option}
            for other in self._others(name):
                fitting = [
                    o
                    for o in combinations(self._choices[other], self._problem.options[other])
                    if (o.granularity, o.saturation) == (option.granularity, option.saturation)
                ]
                choices[other] = fitting[0] if fitting else self._choices[other]
            label = f"{option.granularity}, {option.saturation} in {name}"
            names = (name, *self._others(name))
            return _Move(label=label, choices=choices, names=names, is_trial=True)
        return None

    def _raise(self, names: Sequence[str]) -> _Move | None:
        """The layers, and those that change with them, one rung up. A rung counts as used from here
        on, whatever its trial brings."""
        choices = dict(self._choices)
        done: dict[str, str] = {}
        for name in names:
            above = self._above(name)
            if name in done or above is None:
                continue
            # A bias that is split off changes no number type, so nothing else has to follow.
            others = self._others(name) if rung_of(above) != SPLIT else ()
            for each in (name, *others):
                options = self._problem.options[each]
                chosen = (
                    above if each == name else raised(choices[each], options, [above.precision])
                )
                if chosen is not None:
                    choices[each] = chosen
                    self._used[each].add(rung_of(chosen))
                    self._tried[each] = set()
                    done[each] = rung_of(chosen)
        if not done:
            return None
        noun = "layer" if len(done) == 1 else "layers"
        what = ", ".join(sorted(set(done.values())))
        return _Move(label=f"{what} in {len(done)} {noun}", choices=choices, names=tuple(done))

    def _above(self, name: str) -> LayerChoice | None:
        """What the layer gets when it is raised; None at the top of the ladder."""
        choice, settings = self._choices[name], self._settings
        used = self._used[name]
        above = rungs(
            settings.chip,
            rung_of(choice),
            used,
            float_cal=settings.float_cal,
            splits=settings.splits_bias,
        )
        new = [rung for rung in above if rung not in used]
        return raised(choice, self._problem.options[name], new)

    def _can_change(self, name: str) -> bool:
        if self._above(name) is not None:
            return True
        if self._settings.priority != "performance":
            return False
        left = combinations(self._choices[name], self._problem.options[name])
        return any(option not in self._tried[name] for option in left)

    def _is_bad_alone(self, name: str) -> bool:
        found = self._measure(name)
        return found is not None and CONDITION_B.is_bad(found)

    def _measure(self, name: str) -> Deviation | None:
        choice = self._choices[name]
        known = self._alone.get(name, {}).get(choice)
        if known is not None:
            return known
        error = self._problem.sensitivity.get(name, {}).get(choice)
        if error is None:
            return self._in_place.get(name)
        # The least cosine that goes with such an error; its mean errors are unknown.
        cosine = max(0.0, 1 - error**2) ** 0.5
        return Deviation(cosine=cosine, relative_l2=error, mse=0.0, mae=0.0, sqnr_db=0.0)

    def _others(self, name: str) -> tuple[str, ...]:
        return tuple(each for each in self._group_of.get(name, ()) if each != name)
