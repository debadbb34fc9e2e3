"""The search over a real pool: what is scored, how often, what is told, and how it ends."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest

from actors.outcome import Hooks, Limits, Outcome
from actors.session import ClusterSpec, RaySession
from actors.trial_book import TrialBook, open_book
from actors.trial_worker import LayerSamples, TrialSetup
from actors.tune import tune
from qdist.calibration import CalibrationSettings, calibrate_here, prepare
from qdist.demo import demo_file
from qdist.emit.qdq import emit_qdq
from qdist.evaluate.compare import compare_layers
from qdist.evaluate.function import FunctionEvaluation
from qdist.model.freeze import freeze
from qdist.model.graph import Graph
from qdist.model.loading import load_model
from qdist.plan.choice import LayerChoice
from qdist.plan.plan import load_plan
from qdist.plan.planner import Planner
from qdist.plan.resolved import resolved_digest
from qdist.search.applied import planner_with
from qdist.search.statistics import CandidateStatistics
from qdist.search.trial import Candidate, Choices, Settings, Trial
from qdist.stats.record import CalibrationRecord
from qdist.store.record_file import read_record
from qdist.store.zarr_store import create_store
from tests.onnx_models import ANY_TARGET, EXECUTION, samples_of

CNN = demo_file("digits_cnn.onnx")
PLAIN = LayerChoice()
SAME = LayerChoice(weight_saturation="max")  # what "auto" is for 8-bit weights
SCORE = """
import os, pathlib, signal, time
import numpy as np

def score(executor, folder, seconds=0.0, dies=()):
    here = pathlib.Path(folder)
    x = np.linspace(-1, 1, 64, dtype=np.float32).reshape(1, 1, 8, 8)
    value = float(np.abs(executor.forward(x)[0]).sum())
    with (here / "scored").open("a") as file:
        file.write(f"{value!r}\\n")
    n = len((here / "scored").read_text().splitlines())
    if n in dies:
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(seconds)
    return value
"""


@dataclass
class Script:
    """Asks for given rounds; ``next_guess``: what it says may come after each."""

    rounds: Sequence[Sequence[Candidate]]
    guesses: Sequence[Sequence[Candidate]] = ()
    told: list[list[tuple[int, float | None]]] = field(default_factory=list)
    guessed: list[tuple[int, int]] = field(default_factory=list)

    def ask(self) -> list[Candidate]:
        n = len(self.told)
        return list(self.rounds[n]) if n < len(self.rounds) else []

    def tell(self, trials: Iterable[Trial]) -> None:
        self.told.append(
            [(t.candidate.number, t.report.score if t.report else None) for t in trials]
        )

    def speculate(self, finished: Sequence[Trial], running: Sequence[Candidate]) -> list[Candidate]:
        self.guessed.append((len(finished), len(running)))
        n = len(self.told)
        return list(self.guesses[n]) if n < len(self.guesses) else []


@dataclass(frozen=True)
class Bench:
    """A calibrated model, and what workers need to score its plans."""

    setup: TrialSetup
    planner: Planner
    folder: Path

    def candidate(self, number: int, **changed: LayerChoice) -> Candidate:
        """A plan; ``_N`` is the choice of the N-th choosable layer, ``all`` that of the others."""
        names = [layer.name for layer in self.planner.layers]
        choices = dict.fromkeys(names, changed.get("all", PLAIN))
        for i, layer in enumerate(self.planner.choosable()):
            name = layer.name
            choices[name] = changed.get(f"_{i}", choices[name])
        return Candidate(number=number, label=f"plan {number}", choices=choices)

    def run(
        self,
        strategy: Script,
        *,
        workers: int = 1,
        limits: Limits | None = None,
        hooks: Hooks | None = None,
        book: TrialBook | None = None,
        seconds: float = 0.0,
        dies: tuple[int, ...] = (),
    ) -> Outcome:
        assert isinstance(self.setup.evaluation, FunctionEvaluation)
        arguments = {"folder": str(self.folder), "seconds": seconds, "dies": dies}
        evaluation = replace(self.setup.evaluation, arguments=arguments)
        spec = ClusterSpec(address=None, n_workers=workers, cpus_per_worker=1)
        setup = replace(self.setup, evaluation=evaluation)
        return tune(strategy, setup, spec, book or self.book(), limits, hooks)

    def book(self, name: str = "trials", identity: str = "one") -> TrialBook:
        return open_book(self.folder / name, {"search": identity})

    @property
    def n_scored(self) -> int:
        path = self.folder / "scored"
        return len(path.read_text().splitlines()) if path.exists() else 0


@pytest.fixture
def bench(cluster: RaySession, tmp_path: Path) -> Bench:
    frozen = freeze(load_model(CNN))
    source = samples_of("images", 1, 8, 8, n=8)
    graph = Graph(frozen)
    job = prepare(frozen, source, CalibrationSettings(), EXECUTION, graph=graph)
    store = create_store(tmp_path / "store", job.identity)
    merged = calibrate_here(job, source, store)
    planner = Planner(graph, merged.record, job.taps)
    script = tmp_path / "score.py"
    script.write_text(SCORE)
    setup = TrialSetup(
        frozen=frozen,
        record=merged.record,
        taps=job.taps,
        settings=planner.settings,
        target=ANY_TARGET,
        evaluation=FunctionEvaluation(target=f"{script}:score", higher_is_better=True),
        execution=EXECUTION,
        scratch=tmp_path / "scratch",
        layers=LayerSamples(source=source, n_samples=4),
        statistics=CandidateStatistics(
            job=job,
            source=source,
            location=store.location,
            batches=store.latest().batches,
            record=merged.record,
        ),
    )
    return Bench(setup=setup, planner=planner, folder=tmp_path)


def merge_first_of(bench: Bench, n_samples: int) -> CalibrationRecord:
    """The statistics of the first samples, measured from nothing."""
    source = samples_of("images", 1, 8, 8, n=n_samples)
    job = prepare(bench.setup.frozen, source, CalibrationSettings(), EXECUTION)
    store = create_store(bench.folder / "few", job.identity)
    return calibrate_here(job, source, store).record


def scores(outcome: Outcome) -> list[float | None]:
    return [trial.report.score if trial.report else None for trial in outcome.trials]


def test_plans_that_come_to_the_same_are_scored_once(bench: Bench) -> None:
    wide = LayerChoice(precision="w8a16")
    asked = [bench.candidate(0), bench.candidate(1, all=SAME), bench.candidate(2, all=wide)]

    def n_wide(choices: Choices) -> float:
        return sum(choice == wide for choice in choices.values())

    costs = Hooks(
        costs=lambda choices: {"wide": n_wide(choices)}, cost=n_wide, plain_cost=1, harm=n_wide
    )
    first = bench.run(Script([asked]), workers=2, seconds=0.3, hooks=costs)
    assert bench.n_scored == first.n_scored == 2
    plain, same, other = scores(first)
    assert plain == same != other
    assert first.trials[0].n_bytes == first.trials[1].n_bytes
    assert [trial.cost for trial in first.trials] == [0, 0, len(bench.planner.layers)]
    assert [trial.harm for trial in first.trials] == [trial.cost for trial in first.trials]
    assert {trial.plain_cost for trial in first.trials} == {1}
    for number in range(3):
        place = bench.folder / "trials" / f"trial-{number:03d}"
        assert {"model.onnx", "plan.json", "trial.json"} <= {p.name for p in place.iterdir()}
        shown = json.loads((place / "trial.json").read_text())
        assert shown["costs"] == {"wide": len(bench.planner.layers) * (number == 2)}

    # The same search once more, in another order: all of it is known.
    again = bench.run(Script([[replace(asked[2], number=0)], [replace(asked[1], number=1)]]))
    assert scores(again) == [other, same]
    assert (again.n_scored, again.n_reused, bench.n_scored) == (0, 2, 2)
    assert not (bench.folder / "trials-1").exists()
    assert not (bench.folder / "trials" / "trial-002").exists()

    # Another one keeps what there was, and begins anew.
    bench.run(Script([asked[:1]]), book=bench.book(identity="other"))
    assert bench.n_scored == 3
    assert (bench.folder / "trials-1" / "trial-001" / "trial.json").exists()


def test_what_runs_ahead_changes_no_answer_and_is_used(bench: Bench) -> None:
    wide, coarse = LayerChoice(precision="w8a16"), LayerChoice(granularity="tensor")
    rounds = [
        [bench.candidate(0)],
        [bench.candidate(1, _0=wide), bench.candidate(2, _1=wide)],
        [bench.candidate(3, all=coarse)],
    ]
    wrong = bench.candidate(9, all=LayerChoice(precision="int16"))
    guesses = [[rounds[1][0], wrong], [], [rounds[2][0]]]
    alone = Script(rounds, guesses)
    few = bench.run(alone, book=bench.book("alone"), seconds=0.2)
    both = Script(rounds, guesses)
    many = bench.run(both, workers=2, book=bench.book("both"), seconds=0.2)
    assert alone.told == both.told
    assert scores(few) == scores(many)
    assert few.n_scored == 4  # one worker is never idle within a round
    assert (few.n_ahead, few.n_reused) == (0, 0)
    assert both.guessed
    assert many.n_ahead >= 1
    assert 4 <= many.n_scored == bench.n_scored - few.n_scored <= 5  # ahead, and then not again


def test_models_that_are_not_wanted_go_and_nothing_is_scored_again(bench: Bench) -> None:
    wide = LayerChoice(precision="w8a16")
    asked = [bench.candidate(0), bench.candidate(1, all=SAME), bench.candidate(2, all=wide)]
    ahead = [bench.candidate(9, _0=wide)]
    book = bench.book()
    first = bench.run(Script([asked], guesses=[ahead]), workers=2, seconds=0.3, book=book)
    n_scored = bench.n_scored
    trials = bench.folder / "trials"
    size = (trials / "trial-001" / "model.onnx").stat().st_size
    book.prune({1})
    # 0 and 1 are one plan.
    held = sorted(path.parent.name for path in trials.glob("trial-*/model.onnx"))
    assert held == ["trial-001"]
    (model,) = trials.glob("plans/*/model.onnx")
    assert model.stat().st_size == size
    assert len(list(trials.glob("trial-*/plan.json"))) == 3

    again = bench.run(Script([asked]))
    assert scores(again) == scores(first)
    assert (again.n_scored, bench.n_scored) == (0, n_scored)
    held = sorted(path.parent.name for path in trials.glob("trial-*/model.onnx"))
    assert held == ["trial-000", "trial-001"]
    # What went is what its plan is written as.
    plan = load_plan(trials / "trial-002" / "plan.json")
    written = emit_qdq(
        bench.setup.frozen, ANY_TARGET.project(plan), bench.folder / "again.onnx", check=False
    )
    assert written.n_bytes == first.trials[2].n_bytes


def test_limits_end_a_search_with_what_there_is(bench: Bench) -> None:
    wide = LayerChoice(precision="w8a16")
    asked = [[bench.candidate(0)], [bench.candidate(1, _0=wide), bench.candidate(2, _1=wide)]]
    cut = bench.run(Script(asked), limits=Limits(max_trials=2))
    assert (cut.stopped, len(cut.trials)) == ("trials", 2)
    level = scores(cut)[0]
    reached = bench.run(Script(asked), limits=Limits(target_score=level))
    assert (reached.stopped, len(reached.trials)) == ("target", 1)
    late = Script([[bench.candidate(0)], [bench.candidate(7, all=LayerChoice(precision="int16"))]])
    over = bench.run(late, limits=Limits(time_s=3), seconds=60)
    assert (over.stopped, len(over.trials)) == ("time", 1)
    assert over.seconds < 30


def test_ctrl_c_keeps_what_has_ended(bench: Bench) -> None:
    asked = [[bench.candidate(n, **{f"_{n}": LayerChoice(precision="w8a16")}) for n in range(3)]]
    seen: list[Trial] = []

    def interrupt(trial: Trial) -> None:
        seen.append(trial)
        if len(seen) == 2:
            raise KeyboardInterrupt

    stopped = bench.run(Script(asked), hooks=Hooks(on_trial=interrupt))
    assert stopped.stopped == "interrupt"
    assert stopped.trials == sorted(seen, key=lambda trial: trial.candidate.number)
    n = bench.n_scored
    assert len(bench.run(Script(asked)).trials) == 3
    assert bench.n_scored <= max(n, 2) + 1


def test_a_trial_whose_worker_dies_is_counted_once(bench: Bench) -> None:
    wide = LayerChoice(precision="w8a16")
    asked = [bench.candidate(0), bench.candidate(1, all=SAME), bench.candidate(2, all=wide)]
    said: list[str] = []
    outcome = bench.run(
        Script([asked]), workers=2, seconds=0.2, dies=(1,), hooks=Hooks(on_message=said.append)
    )
    assert [trial.candidate.number for trial in outcome.trials] == [0, 1, 2]
    assert None not in scores(outcome)
    assert outcome.n_scored == 2
    assert bench.n_scored == 3  # the one that died wrote its line first
    assert any("is gone" in text for text in said)


def test_trials_compare_their_layers_where_that_is_asked(bench: Bench) -> None:
    asked = replace(bench.candidate(0), wants_layers=True)
    plain = bench.candidate(1, _0=LayerChoice(precision="w8a16"))
    first = bench.run(Script([[bench.candidate(0)], [asked, plain]]))
    with_layers, without = first.trials
    assert bench.n_scored == 2  # comparing scores nothing anew
    assert without.layers == {}
    setup = bench.setup
    assert setup.layers is not None
    projected = setup.target.project(bench.planner.plan(asked.choices))
    rows = compare_layers(setup.frozen, projected, setup.layers.source, EXECUTION, n_samples=4)
    assert with_layers.layers == {row.name: row.in_place for row in rows}
    again = bench.run(Script([[asked]]))
    assert again.trials[0].layers == with_layers.layers


RACE = """
import pathlib
import numpy as np

def race(executor, folder, worst):
    here = pathlib.Path(folder)
    rng = np.random.default_rng(3)
    x = rng.uniform(-1, 1, (300, 1, 1, 8, 8)).astype(np.float32)
    value = float(np.abs(executor.forward(x[0])[0]).sum())
    bad = f"{value!r}" in worst
    n = 0
    for one in x:
        n += 1
        (here / f"{value!r}").write_text(str(n))
        yield 0.1 if bad else 0.9
"""


def test_a_trial_that_cannot_win_stops_early_and_never_wins(bench: Bench) -> None:
    script = bench.folder / "race.py"
    script.write_text(RACE)
    evaluation = FunctionEvaluation(
        target=f"{script}:race",
        higher_is_better=True,
        arguments={"folder": str(bench.folder), "worst": []},
        sample_range=(0.0, 1.0),
    )
    spec = ClusterSpec(address=None, n_workers=1, cpus_per_worker=1)
    coarse = bench.candidate(1, all=LayerChoice(granularity="tensor"))
    rounds = [[bench.candidate(0)], [coarse], [replace(coarse, number=2)]]

    def run(
        book: str,
        worst: list[str],
        asked: list[list[Candidate]],
        costs: tuple[float, float] | None = None,
    ) -> Outcome:
        setup = replace(
            bench.setup,
            evaluation=replace(evaluation, arguments={**evaluation.arguments, "worst": worst}),
        )
        hooks = Hooks()
        if costs is not None:
            hooks = Hooks(cost=lambda choices: costs[choices == coarse.choices])
        return tune(Script(asked), setup, spec, bench.book(book), hooks=hooks)

    run("both", [], rounds[:2])
    values = [path for path in bench.folder.iterdir() if path.name[0].isdigit()]
    _, other = (path.name for path in sorted(values, key=lambda path: path.stat().st_mtime_ns))

    found = run("race", [other], rounds)
    whole, stopped, again = found.trials
    assert whole.report is not None
    assert not whole.report.stopped_early
    assert stopped.report is not None
    assert stopped.report.stopped_early
    n_seen = int((bench.folder / other).read_text())
    assert n_seen == stopped.report.n_samples
    assert n_seen < 150
    assert stopped.rank < whole.rank
    # What lost before has lost now, too.
    assert again.details["reused"]
    assert found.n_scored == 2

    # In a search that has nothing to beat yet, it runs to its end.
    fresh = run("race", [other], [[replace(coarse, number=0)]])
    assert fresh.trials[0].report is not None
    assert fresh.trials[0].report.n_samples == 300

    # Nor does it stop where only a plan that costs more is better: it may be on the front.
    _, dearer = run("dearer", [other], rounds[:2], costs=(1.0, 2.0)).trials
    _, cheaper = run("cheaper", [other], rounds[:2], costs=(2.0, 1.0)).trials
    assert dearer.report is not None
    assert dearer.report.stopped_early
    assert cheaper.report is not None
    assert cheaper.report.n_samples == 300


def test_what_a_candidate_changes_for_the_whole_plan_is_applied(bench: Bench) -> None:
    planner, asked = bench.planner, []
    method = LayerChoice(saturation="percentile")
    plain = bench.candidate(0, all=method)
    wanted: list[Settings] = [
        *({}, {"n_samples": 4}, {"percent": 90.0}, {"n_samples": 4, "percent": 90.0}),
    ]
    for number, settings in enumerate(wanted):
        asked.append(replace(plain, number=number, settings=settings))
    record = merge_first_of(bench, 4)
    ended: list[int] = []
    hooks = Hooks(on_trial=lambda trial: ended.append(trial.candidate.number))
    found = bench.run(Script([asked]), hooks=hooks)
    # While the statistics of the second are measured, once for both who want them, the third runs.
    assert ended == [0, 2, 1, 3]
    (file,) = (bench.folder / "trials" / "statistics").iterdir()
    assert read_record(file, record.tensors).digest == record.digest
    expected = [
        resolved_digest(
            ANY_TARGET.project(
                planner_with(planner, one.settings, lambda _: record).plan(one.choices, one.why)
            ).plan
        )
        for one in asked
    ]
    written = [
        json.loads((bench.folder / "trials" / f"trial-{n:03d}" / "trial.json").read_text())["plan"]
        for n in range(4)
    ]
    assert written == expected
    assert len(set(expected)) == 4
    assert all(trial.report is not None for trial in found.trials)

    # A file that cannot be read is the trial's own failure.
    lost = replace(plain, settings={"n_samples": 3})
    book = bench.book("lost")
    book.statistics.mkdir()
    (book.statistics / "n_samples-3.zarr.zip").write_bytes(b"no record")
    (trial,) = bench.run(Script([[lost]]), hooks=hooks, book=book).trials
    assert trial.report is None
    assert "QD403" in trial.reason


def test_what_cannot_be_measured_fails_alone_and_several_parts_are_merged(bench: Bench) -> None:
    measuring = bench.setup.statistics
    assert isinstance(measuring, CandidateStatistics)
    short = replace(measuring, job=replace(measuring.job, n_per_shard=1))
    smoothed, many = bench.candidate(0), bench.candidate(1)
    asked = [
        replace(smoothed, settings={"smoothing": 0.5}),
        replace(many, settings={"n_samples": 9}),
        bench.candidate(2),
        replace(many, number=3, settings={"n_samples": 7}),
    ]
    setup = replace(bench, setup=replace(bench.setup, statistics=short))
    found = setup.run(Script([asked]), workers=2)
    reasons = [trial.reason[:5] for trial in found.trials]
    assert reasons == ["QD212", "QD311", "", ""]
    settings: Settings = {"n_samples": 7}
    assert short.n_parts(settings, 2) == 2
    path = bench.folder / "trials" / "statistics" / "n_samples-7.zarr.zip"
    assert read_record(path, measuring.job.taps.tensors).digest == measuring(settings).digest
