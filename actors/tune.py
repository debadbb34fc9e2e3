"""The search over a pool of its own: a free worker always has a trial, as long as the strategy can
name one, and what the strategy is told depends on finished rounds alone.

Candidates of the round come first. When there are fewer of them than workers, candidates that may
come next (`qdist.search.ahead`) are run ahead: their results are kept, and become trials only if
they are asked for. So timing decides what is known early, never what is asked.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TypeAlias

from actors.events import Worker
from actors.fingerprints import refuse_mixed
from actors.outcome import Hooks, Limits, Outcome, Stopped, incumbent_maker
from actors.pool import Completed, Failed, Retried, WorkerLost, WorkerPool
from actors.session import ClusterSpec, ray_session
from actors.statistics import Measured, Orders, StatisticsTask
from actors.trial_book import TrialBook
from actors.trial_worker import TrialSetup, TrialTask, TrialWorker, Twin
from qdist.errors import QdistError
from qdist.evaluate.early import Incumbent
from qdist.search.ahead import Foresighted
from qdist.search.results import PlanResult
from qdist.search.statistics import CandidateStatistics
from qdist.search.trial import Candidate, Strategy, Trial, best_of

_Task: TypeAlias = TrialTask | StatisticsTask
_Answer: TypeAlias = PlanResult | Twin | Measured


def tune(
    strategy: Strategy,
    setup: TrialSetup,
    cluster: ClusterSpec,
    book: TrialBook,
    limits: Limits | None = None,
    hooks: Hooks | None = None,
) -> Outcome:
    """Run the strategy to its end, to a limit, or to Ctrl-C.

    Raises QD801 to QD804; what is wrong with one candidate is the reason of its failed trial.
    """
    layers_of = "" if setup.layers is None else setup.layers.name
    known = replace(
        limits or Limits(), layers_of=layers_of, incumbent_of=incumbent_maker(setup.evaluation)
    )
    measuring = setup.statistics
    orders = Orders(
        book.statistics,
        measuring if isinstance(measuring, CandidateStatistics) else None,
        cluster.n_workers,
    )
    make_worker = partial(TrialWorker, setup.packed())
    return search(strategy, make_worker, cluster, book, known, hooks, orders)


def search(
    strategy: Strategy,
    make_worker: Callable[[], Worker[_Task, _Answer]],
    cluster: ClusterSpec,
    book: TrialBook,
    limits: Limits,
    hooks: Hooks | None = None,
    orders: Orders | None = None,
) -> Outcome:
    """`tune`, with workers of the caller's own. ``orders``: what candidates with statistics of
    their own wait for; None: only those that are in the book's folder."""
    orders = orders or Orders(book.statistics, None, cluster.n_workers)
    with (
        ray_session(cluster),
        WorkerPool[_Task, _Answer](cluster, make_worker, name="trial", prefetch=0) as pool,
    ):
        return _Search(strategy, pool, book, limits, hooks or Hooks(), orders).run()


@dataclass(slots=True)
class _Round:
    """``waiting``: candidates without a result, by number; ``by_key`` the same by what they choose,
    since keys cost time; ``finished``: trials, as they ended."""

    waiting: dict[int, Candidate]
    by_key: dict[str, list[Candidate]] = field(default_factory=dict)
    finished: list[Trial] = field(default_factory=list)


class _Search:
    """One run of one strategy over an entered pool."""

    def __init__(
        self,
        strategy: Strategy,
        pool: WorkerPool[_Task, _Answer],
        book: TrialBook,
        limits: Limits,
        hooks: Hooks,
        orders: Orders,
    ) -> None:
        self._strategy = strategy
        self._pool = pool
        self._book = book
        self._limits = limits
        self._hooks = hooks
        self._orders = orders
        self._trials: dict[int, Trial] = {}
        self._round = _Round({})
        self._running: dict[str, Candidate] = {}
        self._incumbents: dict[float | None, Incumbent | None] = {}
        """What trials of a cost have to beat in this round, as far as it was asked for."""
        self._twins: dict[str, list[tuple[str, Candidate]]] = {}
        self._ahead: list[Candidate] = []
        self._ahead_of = -1
        self._n_scored = self._n_reused = self._n_ahead = 0
        self._begin = time.monotonic()
        self._waited_s = 0.0

    def run(self) -> Outcome:
        """All rounds."""
        stopped: Stopped = "interrupt"
        # Ctrl-C keeps what there is; a second one, later, is the caller's.
        with suppress(KeyboardInterrupt):
            stopped = self._rounds()
        for trial in self._round.finished:
            self._trials[trial.candidate.number] = trial
        seconds = time.monotonic() - self._begin
        return Outcome(
            trials=[self._trials[number] for number in sorted(self._trials)],
            stopped=stopped,
            n_scored=self._n_scored,
            n_reused=self._n_reused,
            n_ahead=self._n_ahead,
            driver_s=seconds - self._waited_s,
            seconds=seconds,
        )

    def _rounds(self) -> Stopped:
        while (n_left := self._n_left()) > 0:
            proposals = self._strategy.ask()[:n_left]
            if not proposals:
                return "strategy"
            self._round = _Round({candidate.number: candidate for candidate in proposals})
            if not self._finish_round():
                return "time"
            finished = sorted(self._round.finished, key=lambda trial: trial.candidate.number)
            self._strategy.tell(finished)
            self._trials.update((trial.candidate.number, trial) for trial in finished)
            self._incumbents.clear()
            if any(self._is_reached(trial) for trial in finished):
                return "target"
        return "trials"

    def _to_beat(self, candidate: Candidate) -> Incumbent | None:
        """What a trial has to beat: the best of the rounds before that costs no more. What loses to
        a plan that costs more may still be on the front."""
        maker, cost = self._limits.incumbent_of, self._hooks.cost
        if maker is None:
            return None
        own = None if cost is None else cost(candidate.choices)
        if own not in self._incumbents:
            rivals = [
                trial
                for trial in self._trials.values()
                if own is None or (trial.cost is not None and trial.cost <= own)
            ]
            best = best_of(rivals)
            report = None if best is None else best.report
            self._incumbents[own] = None if report is None else maker(report)
        return self._incumbents[own]

    def _n_left(self) -> int:
        most = self._limits.max_trials
        return 1 << 30 if most is None else most - len(self._trials)

    def _is_reached(self, trial: Trial) -> bool:
        target = self._limits.target_score
        if target is None or trial.report is None or trial.report.stopped_early:
            return False
        sign = 1.0 if trial.report.higher_is_better else -1.0
        return sign * trial.report.score >= sign * target

    def _finish_round(self) -> bool:
        """Whether the round was finished before the time was up."""
        self._ahead_of = -1
        for candidate in list(self._round.waiting.values()):
            self._begin_trial(candidate)
        while self._round.waiting:
            left_s = self._left_s()
            if left_s <= 0:
                return False
            self._run_ahead()
            begin = time.monotonic()
            event = self._pool.next_event(min(0.5, left_s))
            self._waited_s += time.monotonic() - begin
            self._take(event)
        return True

    def _left_s(self) -> float:
        limit_s = self._limits.time_s
        return float("inf") if limit_s is None else self._begin + limit_s - time.monotonic()

    def _begin_trial(self, candidate: Candidate) -> None:
        """Finish the trial with what is known, or have it scored."""
        key = candidate.key
        self._round.by_key.setdefault(key, []).append(candidate)
        known = self._book.by_key(key)
        if known is not None and self._is_enough(known, candidate):
            self._finish(key, candidate, replace(known, reused=True))
        elif key not in self._running:
            self._submit(key, candidate)

    def _is_enough(self, result: PlanResult, candidate: Candidate) -> bool:
        if not result.holds_against(self._to_beat(candidate)):
            return False
        wanted = candidate.wants_layers and self._limits.layers_of and result.report is not None
        return not wanted or result.has_layers(self._limits.layers_of)

    def _submit(self, key: str, candidate: Candidate) -> None:
        """Have a candidate scored, once its statistics are there."""
        self._running[key] = candidate
        statistics = self._orders.path_of(candidate.settings)
        if statistics is None or statistics.exists():
            self._hand_in(key, candidate, statistics)
            return
        try:
            if self._orders.fingerprint is not None:
                refuse_mixed(self._orders.fingerprint, self._pool.facts)
            tasks = self._orders.wait(statistics, (key, candidate))
        except QdistError as error:
            self._lose(key, error)
            return
        for task in tasks:
            self._pool.submit(task)

    def _lose(self, key: str, error: BaseException) -> None:
        """Nothing is to be had for these choices. Of the others' results nothing is lost."""
        self._release(key)
        self._running.pop(key)
        self._known(key, PlanResult(digest="", report=None, n_bytes=0, reason=str(error)))

    def _hand_in(self, key: str, candidate: Candidate, statistics: Path | None) -> None:
        self._pool.submit(
            TrialTask(
                key=key,
                number=candidate.number,
                choices=tuple(candidate.choices.items()),
                changed=candidate.changed,
                wants_layers=candidate.wants_layers,
                plans=self._book.plans,
                session=self._book.session,
                incumbent=self._to_beat(candidate),
                settings=tuple(sorted(candidate.settings.items())),
                statistics=statistics,
            )
        )

    def _take(self, event: object) -> None:
        tell = self._hooks.on_message or (lambda text: None)
        match event:
            case Completed(task=TrialTask() as task, result=Twin() as twin):
                self._take_twin(task.key, self._running.pop(task.key), twin)
            case Completed(task=TrialTask() as task, result=PlanResult() as result):
                self._n_scored += not result.reused
                self._running.pop(task.key)
                self._known(task.key, result)
            case Failed(task=TrialTask() as task, error=error):
                self._lose(task.key, error)
            case Completed(task=StatisticsTask() as order):
                tasks, ready = self._orders.done(order)
                for each in tasks:
                    self._pool.submit(each)
                for key, candidate in ready:
                    self._hand_in(key, candidate, order.path)
            case Failed(task=StatisticsTask() as order, error=error):
                for key, _ in self._orders.failed(order):
                    self._lose(key, error)
            case Retried(task=TrialTask() as task, reason=reason):
                tell(f"trial {task.number} is tried again: {reason}")
            case Retried(task=StatisticsTask() as order, reason=reason):
                tell(f"statistics {order.path.stem} are measured again: {reason}")
            case WorkerLost(worker=worker, reason=reason):
                tell(f"worker {worker} is gone: {reason}")
            case _:
                pass

    def _take_twin(self, key: str, candidate: Candidate, twin: Twin) -> None:
        """Wait for the task that scores the same plan, or score it after all if that has ended."""
        known = self._book.by_digest(twin.digest)
        if known is not None and known.holds_against(self._to_beat(candidate)):
            self._known(key, replace(known, reused=True))
        elif twin.owner in self._running:
            self._twins.setdefault(twin.owner, []).append((key, candidate))
        else:
            self._book.plan_folder(twin.digest).release()
            self._submit(key, candidate)

    def _release(self, owner: str) -> None:
        """Let those that wait for a task that was given up try themselves."""
        for key, candidate in self._twins.pop(owner, []):
            self._submit(key, candidate)

    def _known(self, key: str, result: PlanResult) -> None:
        """Pass a result on to all who wait for it: the round, and plans that come to the same."""
        self._book.add(key, result)
        for waiting in list(self._round.by_key.get(key, ())):
            if self._is_enough(result, waiting):
                self._finish(key, waiting, result)
            elif key not in self._running:
                self._submit(key, waiting)
        for twin, _ in self._twins.pop(key, []):
            self._known(twin, replace(result, reused=True))

    def _finish(self, key: str, candidate: Candidate, result: PlanResult) -> None:
        cost, costs, harm = self._hooks.cost, self._hooks.costs, self._hooks.harm
        trial = Trial(
            candidate=candidate,
            report=result.report,
            n_bytes=result.n_bytes,
            reason=result.reason,
            details={**result.details, "reused": result.reused},
            layers=result.layers if candidate.wants_layers else {},
            cost=cost(candidate.choices) if cost else None,
            plain_cost=self._hooks.plain_cost,
            harm=harm(candidate.choices) if harm else None,
        )
        del self._round.waiting[candidate.number]
        self._round.by_key[key].remove(candidate)
        self._round.finished.append(trial)
        self._n_reused += result.reused
        self._book.finish(trial, result.digest, costs(candidate.choices) if costs else {})
        if self._hooks.on_trial is not None:
            self._hooks.on_trial(trial)

    def _run_ahead(self) -> None:
        """Give idle workers what may be asked for next. Not where trials may stop early: what the
        next round has to beat is not known yet, and where they stop is not to depend on timing."""
        strategy = self._strategy
        if self._limits.incumbent_of is not None or not isinstance(strategy, Foresighted):
            return
        while self._pool.n_idle and (found := self._next_ahead(strategy)) is not None:
            self._submit(*found)
            self._n_ahead += 1

    def _next_ahead(self, strategy: Foresighted) -> tuple[str, Candidate] | None:
        n_finished = len(self._round.finished)
        if self._ahead_of != n_finished:
            self._ahead_of = n_finished
            running = list(self._round.waiting.values())
            n_left = self._n_left() - n_finished - len(running)
            found = strategy.speculate(self._round.finished, running) if n_left > 0 else []
            self._ahead = _unlike(found[:n_left])
        while self._ahead:
            candidate = self._ahead.pop(0)
            key = candidate.key
            if key not in self._running and self._book.by_key(key) is None:
                return key, candidate
        return None


def _unlike(candidates: Iterable[Candidate]) -> list[Candidate]:
    """One candidate for each set of choices, in order."""
    return list({candidate.key: candidate for candidate in candidates}.values())
