"""Optuna's TPE and NSGA-II for what holds for the whole plan, behind ask and tell.

A study lies in Optuna's own storage. Every proposal has a random stream of its own, made from the
seed and its number, and rounds have a fixed size: so the same seed gives the same proposals for any
number of workers, and a search that goes on after a break proposes what it would have proposed
without one. What the study knows already it asks for again, and whoever keeps scores answers.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from typing import Any

import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution
from optuna.samplers import BaseSampler, NSGAIISampler, TPESampler
from optuna.study import StudyDirection
from optuna.trial import TrialState

from qdist.digest import digest_json
from qdist.errors import ConfigError
from qdist.search.problem import SearchProblem
from qdist.search.proposals import Proposals
from qdist.search.trial import Candidate, Settings, Trial
from qdist.threshold.registry import applicable

SAMPLERS = ("tpe", "nsga2")
SMOOTHING_STEP = 0.05
"""Every strength needs a run of the float model, so there are not too many."""
_ATTEMPTS = 32
"""How often in a row Optuna may propose what it has proposed before; then a round is cut short."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Space:
    """What is searched; an empty tuple leaves a setting as it is. ``saturations`` and
    ``granularities``: of every layer that may change and takes it. ``percent``: least and largest
    share that the percentile keeps, in percent below 100, drawn evenly in log(100 - percent).
    ``bins``, ``n_samples``: values to choose from. ``smoothing``: least and largest strength, in
    steps of `SMOOTHING_STEP`; a plan without smoothing stays a choice beside them."""

    saturations: tuple[str, ...] = ("max", "mse", "percentile", "kl")
    granularities: tuple[str, ...] = ()
    percent: tuple[float, float] | tuple[()] = (99.0, 99.9999)
    bins: tuple[int, ...] = ()
    n_samples: tuple[int, ...] = ()
    smoothing: tuple[float, float] | tuple[()] = ()

    def __post_init__(self) -> None:
        if self.smoothing and not 0 <= self.smoothing[0] <= self.smoothing[1] <= 1:
            raise ValueError(f"smoothing {list(self.smoothing)}: 0 <= least <= largest <= 1")


@dataclass(frozen=True, slots=True, kw_only=True)
class StudySettings:
    """``sampler``: ``tpe`` for the score alone, ``nsga2`` for score and bytes. ``storage``: a
    database URL of Optuna, such as ``sqlite:///FILE``; None: in memory. ``max_trials``: the plain
    plan included. ``round_size``: proposals that do not know of each other's scores."""

    sampler: str = "tpe"
    storage: str | None = None
    seed: int = 0
    max_trials: int = 50
    round_size: int = 4
    space: Space = Space()

    def __post_init__(self) -> None:
        if self.sampler not in SAMPLERS or self.round_size < 1 or self.max_trials < 1:
            raise ValueError(f"{self.sampler!r}, round_size {self.round_size}")


class Study:
    """The strategy. The first round is the plain plan alone. Raises QD107 for a space with nothing
    to choose, QD104 for a storage that cannot be opened."""

    def __init__(self, problem: SearchProblem, settings: StudySettings) -> None:
        self._problem = problem
        self._settings = settings
        # A round is always made whole, so that a search with more trials goes on with it.
        self._proposals = Proposals(problem, settings.max_trials + settings.round_size)
        self._distributions = _distributions(settings.space)
        if not self._distributions:
            raise ConfigError(
                "QD107",
                where="search.space",
                got="nothing to choose from",
                expected="at least one setting with a range or values",
                mend="give search.space.saturations, for example",
            )
        self._study = _open(problem, settings)
        self._stored = self._study.get_trials(deepcopy=False)
        self._n_seen = 0
        self._n_asked = 0
        self._numbers: dict[int, int] = {}
        self._values: dict[int, list[float]] = {}

    def ask(self) -> list[Candidate]:
        """The next round; empty when the search is over."""
        self._proposals.next_round()
        if self._proposals.round == 0:
            self._n_asked = 1
            plain = self._proposals.make("plain", self._problem.plain)
            return [plain] if plain else []
        room = self._settings.max_trials - self._n_asked
        found: list[Candidate] = []
        n_known = 0
        while room > 0 and len(found) < self._settings.round_size:
            number, candidate = self._propose()
            if candidate is not None:
                self._numbers[candidate.number] = number
                found.append(candidate)
                n_known = 0
                continue
            n_known += 1
            if n_known >= _ATTEMPTS:
                break
        found = found[:room]
        self._n_asked += len(found)
        return found

    def tell(self, trials: Iterable[Trial]) -> None:
        """All trials of the last round; a study that knows one already keeps what it has."""
        for trial in sorted(trials, key=lambda t: t.candidate.number):
            values = self._objectives(trial)
            if values is not None:
                self._values[trial.candidate.number] = values
            number = self._numbers.get(trial.candidate.number)
            if number is not None:
                self._finish(number, values)

    def _propose(self) -> tuple[int, Candidate | None]:
        """The next trial of the study, stored or new, and its candidate; None for a plan that there
        was before, whose score the study is told at once."""
        number = self._n_seen
        self._n_seen += 1
        if number < len(self._stored):
            parameters = self._stored[number].params
        else:
            self._study.sampler = _sampler(self._settings, number)
            parameters = self._study.ask(self._distributions).params
        label, choices, settings = self._plan(parameters)
        earlier = self._proposals.number_of(choices, settings)
        if earlier is not None:
            self._finish(number, self._values.get(earlier))
            return number, None
        return number, self._proposals.make(label, choices, settings=settings)

    def _finish(self, number: int, values: list[float] | None) -> None:
        if values is None:
            self._study.tell(number, state=TrialState.FAIL, skip_if_finished=True)
        else:
            self._study.tell(number, values, skip_if_finished=True)

    def _objectives(self, trial: Trial) -> list[float] | None:
        if trial.report is None:
            return None
        if self._settings.sampler == "tpe":
            return [trial.report.score]
        return [trial.report.score, float(trial.n_bytes)]

    def _plan(self, parameters: dict[str, Any]) -> tuple[str, dict[str, Any], Settings]:
        problem = self._problem
        choices = dict(problem.plain)
        for layer in problem.layers:
            choice = choices[layer.name]
            wanted = parameters.get("granularity", choice.granularity)
            takes = {o.granularity for o in problem.options[layer.name]}
            choices[layer.name] = replace(
                choice,
                saturation=parameters.get("saturation", choice.saturation),
                granularity=wanted if wanted in takes else choice.granularity,
            )
        methods = {choices[layer.name].saturation for layer in problem.layers}
        given: dict[str, Any] = {}
        if "tail" in parameters:
            given["percent"] = 100 - parameters["tail"]
        if "bins" in parameters:
            given["bins"] = parameters["bins"]
        # What no method takes would make two plans of one.
        settings: dict[str, int | float | str] = {}
        for method in sorted(methods):
            settings.update(applicable(method, given))
        if "n_samples" in parameters:
            settings["n_samples"] = parameters["n_samples"]
        if parameters.get("smoothed"):
            # What the steps lose in the last bits would make two plans of one.
            settings["smoothing"] = round(parameters["smoothing"], 6)
        shown: dict[str, Any] = {
            k: parameters[k] for k in ("saturation", "granularity") if k in parameters
        }
        label = ", ".join(
            f"{k} {v:g}" if isinstance(v, float) else f"{k} {v}"
            for k, v in (*shown.items(), *settings.items())
        )
        return label, choices, settings


def _distributions(space: Space) -> dict[str, BaseDistribution]:
    found: dict[str, BaseDistribution] = {}
    for name, values in (
        ("saturation", space.saturations),
        ("granularity", space.granularities),
        ("bins", space.bins),
        ("n_samples", space.n_samples),
    ):
        if values:
            found[name] = CategoricalDistribution(values)
    if space.percent:
        low, high = space.percent
        found["tail"] = FloatDistribution(100 - high, 100 - low, log=True)
    if space.smoothing:
        low, high = space.smoothing
        n_steps = int((high - low) / SMOOTHING_STEP + 1e-9)
        found["smoothed"] = CategoricalDistribution((False, True))
        found["smoothing"] = FloatDistribution(
            low, low + n_steps * SMOOTHING_STEP, step=SMOOTHING_STEP
        )
    return found


def _sampler(settings: StudySettings, number: int) -> BaseSampler:
    """A sampler whose stream depends on the seed and the number of the proposal alone."""
    seed = int(digest_json([settings.seed, number])[:8], 16)
    if settings.sampler == "tpe":
        return TPESampler(seed=seed)
    return NSGAIISampler(seed=seed, population_size=max(2, settings.round_size))


def _open(problem: SearchProblem, settings: StudySettings) -> optuna.Study:
    """The study of these settings and this problem, new or from its storage."""
    plain = {name: choice.to_json() for name, choice in problem.plain.items()}
    about = asdict(settings)
    # More trials, or another place, go on with the same study.
    del about["storage"], about["max_trials"]
    score = StudyDirection.MAXIMIZE if problem.higher_is_better else StudyDirection.MINIMIZE
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        try:
            return optuna.create_study(
                storage=settings.storage,
                study_name=f"qdist-{digest_json([plain, about])[:16]}",
                directions=[score]
                if settings.sampler == "tpe"
                else [score, StudyDirection.MINIMIZE],
                load_if_exists=True,
            )
        except Exception as error:
            raise ConfigError(
                "QD104",
                where="search.storage",
                got=f"{settings.storage}: {type(error).__name__}: {error}",
                expected="a database that Optuna can open, such as sqlite:///FILE",
                mend="correct the URL; the folder of an SQLite file must exist",
            ) from error
