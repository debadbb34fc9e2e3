"""What the searches say: every strategy's row, and ours beside each of the others."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from bench_accuracy_scores import Scores, discordant, paired
from bench_accuracy_table import table
from compare_strategies_runs import CONTENDERS, OURS, Search, Tried, rival_of

from qdist.evaluate.metrics import find_metric
from qdist.evaluate.metrics.batch import Parts
from qdist.evaluate.paired import Difference

FLOAT = "float"
"""Among the unseen scores of a model, those of the float model."""
MOST_P = 0.05
"""Where few samples are right under one plan alone, the bootstrap is too sure: there a difference
counts only if McNemar's test has less than this for chance."""
LONG = 8
"""Trials from which on half as many are to do."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelRuns:
    """All of one model. ``searches``: name of the strategy -> its search. ``unseen``: plan, or
    `FLOAT`, -> parts of its score on the samples that no search saw."""

    name: str
    searches: Mapping[str, Search]
    unseen: Mapping[str, Parts]

    @property
    def metric(self) -> str:
        """The metric that was searched by."""
        reports = (t.trial.report for s in self.searches.values() for t in s.tried)
        return next(report.metric for report in reports if report is not None)

    def scores(self, plan: str) -> Scores:
        """Of a plan on the unseen samples."""
        return Scores(parts={self.metric: self.unseen[plan]})


@dataclass(frozen=True, slots=True, kw_only=True)
class Beside:
    """Our search beside another over the same choices. ``equal_trials``: our best of as many trials
    as the other used, ``half_trials``: of half as many, from `LONG` on; ``equal_cost``: our best
    that costs no more than what the other ended with, None without any. ``n_ours``: trials until
    one scored as well as that on what both saw; ``n_within``: the same among plans that cost no
    more; None for never. ``n_theirs``: trials of the other."""

    theirs: Tried
    equal_trials: Tried
    half_trials: Tried | None
    equal_cost: Tried | None
    n_ours: int | None
    n_within: int | None
    n_theirs: int


def beside(ours: Search, other: Search) -> Beside | None:
    """The comparison; None where the other search verified nothing."""
    theirs, n = other.best(), len(other.tried)
    equal_trials = ours.best(n)
    if theirs is None or theirs.trial.report is None or equal_trials is None:
        return None
    score = theirs.trial.report.score
    return Beside(
        theirs=theirs,
        equal_trials=equal_trials,
        half_trials=ours.best(n // 2) if n >= LONG else None,
        equal_cost=ours.best(cost=theirs.cost),
        n_ours=ours.n_to_reach(score),
        n_within=ours.n_to_reach(score, theirs.cost),
        n_theirs=n,
    )


def all_beside(runs: ModelRuns) -> dict[str, Beside]:
    """Name of each other strategy that has been run beside ours -> the comparison."""
    found: dict[str, Beside] = {}
    for name, search in runs.searches.items():
        ours = runs.searches.get(rival_of(name))
        if not name.startswith(OURS) and ours is not None:
            entry = beside(ours, search)
            if entry is not None:
                found[name] = entry
    return found


def reported(runs: ModelRuns) -> dict[str, Search]:
    """Plan -> a search that has tried it: all plans whose unseen score the tables need."""
    found: dict[str, Search] = {}

    def add(entry: Tried | None, search: Search) -> None:
        if entry is not None:
            found.setdefault(entry.plan, search)

    for search in runs.searches.values():
        add(search.best(), search)
    for name, entry in all_beside(runs).items():
        for ours in (entry.equal_trials, entry.half_trials, entry.equal_cost):
            add(ours, runs.searches[rival_of(name)])
    return found


def gain(runs: ModelRuns, ours: Tried, theirs: Tried) -> Difference:
    """Ours - theirs on the unseen samples, such that more is better, with a paired interval."""
    metric = runs.metric
    one, other = (runs.scores(entry.plan) for entry in (ours, theirs))
    if find_metric(metric).higher_is_better:
        return paired(one, other, metric)
    return paired(other, one, metric)


def markdown(models: Iterable[ModelRuns]) -> str:
    """Both tables, and what they come to."""
    models = list(models)
    lines = [*_strategies(models), "", *_comparisons(models), ""]
    for text, outcomes in _tally(models).items():
        counted = ", ".join(f"{outcomes.count(kind)} {kind}" for kind in dict.fromkeys(outcomes))
        lines.append(f"- {text}: {counted or 'nothing to compare'}")
    return "\n".join(lines)


def _strategies(models: Sequence[ModelRuns]) -> Iterable[str]:
    head = ["model", "strategy", "metric", "seen", "unseen (float)", "bytes"]
    head += ["cost, % of plain", "trials (to the best)", "s"]
    rows = []
    for runs in models:
        metric = runs.metric
        before = runs.scores(FLOAT).value(metric)
        for name in _ordered(runs.searches):
            search = runs.searches[name]
            best = search.best()
            if best is None or best.trial.report is None:
                continue
            after = runs.scores(best.plan).value(metric)
            rows.append(
                [
                    runs.name,
                    name,
                    metric,
                    f"{best.trial.report.score:.4f}",
                    f"{after:.4f} ({before:.4f})",
                    f"{best.trial.n_bytes:,}",
                    f"{100 * best.cost / search.tried[0].cost:.0f}",
                    f"{len(search.tried)} ({best.number + 1})",
                    f"{search.seconds:.0f}",
                ]
            )
    return table(head, rows)


def _comparisons(models: Sequence[ModelRuns]) -> Iterable[str]:
    head = ["model", "beside", "equal trials: ours - theirs", "cost, ours / theirs"]
    head += ["equal cost", "half its trials", "trials to its score, ours / its", "at its cost"]
    rows = []
    for runs in models:
        found = all_beside(runs)
        for name in _ordered(found):
            entry = found[name]
            ratio = entry.equal_trials.cost / entry.theirs.cost
            rows.append(
                [
                    runs.name,
                    name,
                    _shown(runs, entry.equal_trials, entry.theirs),
                    f"{ratio:.2f}",
                    _shown(runs, entry.equal_cost, entry.theirs),
                    _shown(runs, entry.half_trials, entry.theirs) if entry.half_trials else "",
                    f"{_count(entry.n_ours)} / {entry.n_theirs}",
                    _count(entry.n_within),
                ]
            )
    return table(head, rows)


def _tally(models: Sequence[ModelRuns]) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {
        "equal trials": [],
        "equal cost": [],
        f"half the trials (where the other took {LONG} or more)": [],
        "the other's own score on the seen samples in half its trials": [],
        "the same at no more than its cost": [],
    }
    trials, cost, half, reached, within = found.values()
    for runs in models:
        for entry in all_beside(runs).values():
            trials.append(_outcome(runs, entry.equal_trials, entry.theirs))
            cost.append(_outcome(runs, entry.equal_cost, entry.theirs))
            if entry.half_trials is not None:
                half.append(_outcome(runs, entry.half_trials, entry.theirs))
                reached.append(_in_time(entry.n_ours, entry.n_theirs))
                within.append(_in_time(entry.n_within, entry.n_theirs))
    return found


def _in_time(n_ours: int | None, n_theirs: int) -> str:
    if n_ours is None:
        return "never"
    return "reached" if 2 * n_ours <= n_theirs else "later"


def _outcome(runs: ModelRuns, ours: Tried | None, theirs: Tried) -> str:
    if ours is None:
        return "no plan"
    if ours.plan == theirs.plan:
        return "the same plan"
    found = gain(runs, ours, theirs)
    apart = discordant(runs.scores(ours.plan), runs.scores(theirs.plan), runs.metric)
    if found.low <= 0 <= found.high or (apart is not None and apart.p > MOST_P):
        return "tie"
    return "better" if found.low > 0 else "worse"


def _shown(runs: ModelRuns, ours: Tried | None, theirs: Tried) -> str:
    if ours is None:
        return "no plan so cheap"
    if ours.plan == theirs.plan:
        return "the same plan"
    found = gain(runs, ours, theirs)
    mark = {"better": " better", "worse": " **worse**"}.get(_outcome(runs, ours, theirs), "")
    return f"{found.mean:+.4f} ({found.low:+.4f} .. {found.high:+.4f}){mark}"


def _count(n: int | None) -> str:
    return "never" if n is None else str(n)


def _ordered(names: Iterable[str]) -> list[str]:
    return sorted(names, key=list(CONTENDERS).index)
