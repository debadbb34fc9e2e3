"""Hill climbing over groups of layers.

The first round tries the plain plan and the other threshold methods for the whole model. Every
further round starts from the best plan so far and proposes one move of each kind, each for a group
of layers: the least sensitive ones at a lower precision, the most sensitive ones at a higher one,
with another threshold method, or with a weight scale per channel. A kind of move that brought
nothing takes half as many layers the next time; when all kinds are down to none, the search is
over.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from qdist.plan.choice import LayerChoice
from qdist.search.ahead import if_rest_fails
from qdist.search.problem import SearchProblem
from qdist.search.trial import Candidate, Choices, Trial, choices_key


@dataclass(frozen=True, slots=True, kw_only=True)
class GreedySettings:
    """``low`` and ``high``: precisions to move to, or None. ``saturations``: threshold methods to
    try. ``granularity``: of weights, to move to, or None. ``max_trials``: the plain plan included.
    ``first_share``: share of the layers that the first groups take."""

    low: str | None = "w4a8"
    high: str | None = "w8a16"
    saturations: tuple[str, ...] = ("max", "mse", "percentile", "kl")
    granularity: str | None = "channel"
    max_trials: int = 12
    first_share: float = 0.5

    def __post_init__(self) -> None:
        if self.max_trials < 1 or not 0 < self.first_share <= 1:
            raise ValueError("max_trials must be at least 1 and first_share within 0..1")


class Greedy:
    """The strategy. ``plain``: the choice of every layer in the plain plan. ``sensitivity``: for
    each precision, layer -> relative L2 error when that layer alone has it; its keys are the layers
    that may change. ``n_weights``: layer -> how many weights it has. Layers are lowered in the
    order of squared error per weight, and those without weights not at all."""

    def __init__(
        self,
        plain: Choices,
        sensitivity: Mapping[str, Mapping[str, float]],
        settings: GreedySettings,
        n_weights: Mapping[str, int],
    ) -> None:
        self._plain = dict(plain)
        self._settings = settings
        base = next(iter(plain.values())).precision if plain else "int8"
        default = sensitivity.get(base) or next(iter(sensitivity.values()), {})
        self._layers = [name for name in plain if name in default]
        self._worst_first = _ordered(self._layers, default, descending=True)
        low = sensitivity.get(settings.low or "", default)
        price = {
            name: low.get(name, 0.0) ** 2 / n_weights[name]
            for name in self._layers
            if n_weights.get(name)
        }
        self._least_first = _ordered(list(price), price, descending=False)
        self._trials: list[Trial] = []
        self._asked: set[str] = set()
        self._kind_of: dict[int, str] = {}
        self._n = 0
        self._best: Trial | None = None
        n_first = max(1, round(settings.first_share * len(self._layers)))
        self._groups = {
            "low": min(n_first, len(self._least_first)),
            # Raising few layers tells more, and costs less.
            "high": max(1, n_first // 4),
            "saturation": max(1, n_first // 2),
            "granularity": n_first,
        }
        self._started = False

    def ask(self) -> list[Candidate]:
        """The next round; empty when the search is over."""
        if not self._started:
            self._started = True
            return self._first_round()
        if self._best is None:
            return []
        while any(self._groups.values()) and self._n < self._settings.max_trials:
            proposals = self._moves(dict(self._best.candidate.choices))
            if proposals:
                return proposals
            self._groups = {kind: n // 2 for kind, n in self._groups.items()}
        return []

    def tell(self, trials: Iterable[Trial]) -> None:
        """All trials of the last round."""
        told = sorted(trials, key=lambda trial: trial.candidate.number)
        before = self._best
        self._trials.extend(told)
        scored = (trial for trial in self._trials if trial.report is not None)
        self._best = max(scored, key=lambda trial: trial.rank_by_cost, default=None)
        enough = None if before is None else before.rank_by_cost
        for trial in told:
            kind = self._kind_of.get(trial.candidate.number)
            if kind is not None and enough is not None and trial.rank_by_cost <= enough:
                self._groups[kind] //= 2

    def speculate(self, finished: Sequence[Trial], running: Sequence[Candidate]) -> list[Candidate]:
        """The next round, if what still runs brings nothing."""
        return if_rest_fails(self, finished, running)

    def _first_round(self) -> list[Candidate]:
        proposals = [self._candidate("plain", self._plain)]
        default = {choice.saturation for choice in self._plain.values()}
        for method in self._settings.saturations:
            if method not in default:
                choices = {n: replace(c, saturation=method) for n, c in self._plain.items()}
                proposals.append(self._candidate(f"saturation {method}", choices))
        return [candidate for candidate in proposals if candidate is not None]

    def _moves(self, best: dict[str, LayerChoice]) -> list[Candidate]:
        settings = self._settings
        found = []
        for kind, order, field, values in (
            ("low", self._least_first, "precision", (settings.low,)),
            ("high", self._worst_first, "precision", (settings.high,)),
            ("saturation", self._worst_first, "saturation", settings.saturations),
            ("granularity", self._least_first[::-1], "granularity", (settings.granularity,)),
        ):
            for value in values:
                n = self._groups[kind]
                candidate = self._moved(best, order, n, field, value) if value else None
                if candidate is not None:
                    self._kind_of[candidate.number] = kind
                    found.append(candidate)
                    break
        return found

    def _moved(
        self,
        best: Mapping[str, LayerChoice],
        order: Sequence[str],
        n: int,
        field: str,
        value: str,
    ) -> Candidate | None:
        """The best plan with ``field`` = ``value`` in the first ``n`` layers that differ in it."""
        names = [name for name in order if getattr(best[name], field) != value][:n]
        if not names:
            return None
        choices = {**best, **{name: _changed(best[name], {field: value}) for name in names}}
        what = value if field == "precision" else f"{field} {value}"
        noun = "layer" if len(names) == 1 else "layers"
        parent = self._best.candidate.number if self._best is not None else 0
        start = f"trial {parent} + " if parent else ""
        return self._candidate(f"{start}{what} in {len(names)} {noun}", choices)

    def _candidate(self, label: str, choices: Choices) -> Candidate | None:
        key = choices_key(choices)
        if key in self._asked or self._n >= self._settings.max_trials:
            return None
        self._asked.add(key)
        changed = tuple(n for n in self._layers if choices[n] != self._plain[n])
        candidate = Candidate(number=self._n, label=label, choices=choices, changed=changed)
        self._n += 1
        return candidate


def _changed(choice: LayerChoice, change: Mapping[str, str]) -> LayerChoice:
    return LayerChoice(**{**choice.to_json(), **change})


def _ordered(
    layers: Sequence[str], sensitivity: Mapping[str, float], *, descending: bool
) -> list[str]:
    """By sensitivity; layers without one count as insensitive; graph order on ties."""
    sign = -1.0 if descending else 1.0
    return sorted(layers, key=lambda name: sign * sensitivity.get(name, 0.0))


def greedy_for(problem: SearchProblem, settings: GreedySettings) -> Greedy:
    """The strategy for a problem: its low precision is left out where no layer may have it."""
    sensitivity: dict[str, dict[str, float]] = {}
    for name, known in problem.sensitivity.items():
        for choice, error in known.items():
            sensitivity.setdefault(choice.precision, {}).setdefault(name, error)
    n_weights = {layer.name: layer.n_weights for layer in problem.layers}
    return Greedy(problem.plain, sensitivity, settings, n_weights)
