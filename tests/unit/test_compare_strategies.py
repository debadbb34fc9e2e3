"""The comparison of strategies: which plans stand beside which, and on which side."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from hydra import compose, initialize_config_dir

SCRIPTS = Path(__file__).resolve().parents[2] / "scripts"
sys.path.insert(0, str(SCRIPTS))

from compare_strategies import Book  # noqa: E402
from compare_strategies_runs import (  # noqa: E402
    CONTENDERS,
    COST,
    FIFTHS,
    LADDERS,
    Search,
    Tried,
    rival_of,
    words_of,
)
from compare_strategies_table import (  # noqa: E402
    FLOAT,
    ModelRuns,
    beside,
    gain,
    markdown,
    reported,
)

from qdist.cli import domain  # noqa: E402
from qdist.cli.compose import hydra_words, register_resolvers, validated  # noqa: E402
from qdist.cli.groups import config_folder  # noqa: E402
from qdist.cli.schema import TuneSettings  # noqa: E402
from qdist.evaluate.report import EvalReport  # noqa: E402
from qdist.search.strategies import check_strategy  # noqa: E402
from qdist.search.trial import Candidate, Trial  # noqa: E402

Rows = list[tuple[float | None, float, str]]
"""Of each trial: score, cost, plan."""


def search_of(name: str, rows: Rows, metric: str = "agreement") -> Search:
    tried = []
    for number, (score, cost, plan) in enumerate(rows):
        report = None
        if score is not None:
            report = EvalReport(
                score=score,
                metric=metric,
                higher_is_better=metric != "perplexity",
                metrics={metric: score},
                n_samples=4,
                seconds=0.0,
            )
        candidate = Candidate(number=number, label=plan, choices={})
        trial = Trial(candidate=candidate, report=report, n_bytes=10, cost=cost)
        tried.append(Tried(trial=trial, cost=cost, plan=plan))
    return Search(model="m", name=name, tried=tuple(tried), seconds=1.0)


OURS = search_of(
    "pareto",
    [(0.5, 10.0, "plain"), (0.2, 4.0, "low"), (0.9, 20.0, "high"), (0.7, 9.0, "mid")],
)
THEIRS = search_of("greedy", [(0.5, 10.0, "plain"), (None, 0.0, ""), (0.7, 12.0, "theirs")])


def test_equal_trials_and_equal_cost_choose_by_what_the_search_saw() -> None:
    found = beside(OURS, THEIRS)
    assert found is not None
    assert found.theirs.plan == "theirs"
    assert found.equal_trials.plan == "high"  # the fourth trial came after theirs were used up
    assert found.half_trials is None
    assert found.equal_cost is not None
    assert found.equal_cost.plan == "mid"
    assert (found.n_ours, found.n_within, found.n_theirs) == (3, 4, 3)
    two = Search(model="m", name="greedy", tried=THEIRS.tried[:1], seconds=1.0)
    found = beside(OURS, two)
    assert found is not None
    assert found.equal_trials.plan == found.theirs.plan == "plain"
    assert (found.n_ours, found.n_within) == (1, 1)
    long = search_of("greedy", [(0.1, 10.0, f"{n}") for n in range(8)])
    found = beside(OURS, long)
    assert found is not None
    assert found.half_trials is not None
    assert found.half_trials.plan == "high"
    cheap = search_of("greedy", [(0.95, 3.0, "cheap")])
    found = beside(OURS, cheap)
    assert found is not None
    assert found.equal_cost is None
    assert (found.n_ours, found.n_within) == (None, None)
    assert beside(OURS, search_of("greedy", [(None, 1.0, "")])) is None


@pytest.mark.parametrize("metric", ["agreement", "perplexity"])
def test_a_gain_is_positive_where_ours_is_better(metric: str) -> None:
    rng = np.random.default_rng(3)
    lower, upper = rng.random(50), rng.random(50) + 0.5
    better, worse = (upper, lower) if metric == "agreement" else (lower, upper)
    ones = np.ones(50)
    runs = ModelRuns(
        name="m",
        searches={
            "pareto": search_of("pareto", [(0.5, 1.0, "a")], metric),
            "knight": search_of("knight", [(0.5, 1.0, "b")], metric),
        },
        unseen={"a": (better, ones), "b": (worse, ones), FLOAT: (better, ones)},
    )
    ours, theirs = (runs.searches[name].tried[0] for name in ("pareto", "knight"))
    found = gain(runs, ours, theirs)
    assert 0 < found.low < found.mean < found.high
    assert set(reported(runs)) == {"a", "b"}
    text = markdown([runs])
    assert "- equal trials: 1 better" in text
    assert "| m | knight |" in text
    # Four samples to none are not yet more than chance.
    right, wrong = np.ones(50), np.repeat([0.0, 1.0], [4, 46])
    if metric == "agreement":
        few = ModelRuns(
            name="m",
            searches=runs.searches,
            unseen={"a": (right, ones), "b": (wrong, ones), FLOAT: (right, ones)},
        )
        assert gain(few, ours, theirs).low > 0
        assert "- equal trials: 1 tie" in markdown([few])
    back = gain(runs, theirs, ours)
    assert (back.low, back.high) == pytest.approx((-found.high, -found.low))


def test_what_was_run_is_kept_and_other_settings_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "m.json"
    book = Book("m", path, {"trials": 3})
    assert book.runs.searches == {}
    book.keep(OURS)
    book.keep(THEIRS)
    book.keep_unseen("plain", (np.array([1.0, 0.0]), np.ones(2)))
    again = Book("m", path, {"trials": 3}).runs
    assert again.searches == {"pareto": OURS, "greedy": THEIRS}
    assert [part.tolist() for part in again.unseen["plain"]] == [[1.0, 0.0], [1.0, 1.0]]
    with pytest.raises(SystemExit, match="'trials': 3"):
        Book("m", path, {"trials": 4})


@pytest.fixture
def composing() -> Iterator[None]:
    register_resolvers()
    with initialize_config_dir(str(config_folder()), version_base="1.3"):
        yield


@pytest.mark.usefixtures("composing")
def test_every_search_is_a_command_that_the_command_line_takes() -> None:
    ladders: dict[str, tuple[str, ...]] = {}
    models = [*FIFTHS, *[next(iter(FIFTHS))] * len(CONTENDERS)]
    for model, (name, contender) in zip(models, CONTENDERS.items(), strict=False):
        words = [word.replace("{assets}", "A") for word in words_of(model, name, 7, 5)]
        settings = validated(compose("tune", hydra_words(words, TuneSettings)), TuneSettings)
        assert isinstance(settings, TuneSettings)
        search = domain.search_settings(settings.search, 1.0)
        assert (search.max_trials, settings.search.cost) == (7, COST)
        space = domain.space(settings.search, "int8", domain.target(settings.target), None)
        ladders.setdefault(contender.ladder, space.precisions)
        # What is compared may become the same.
        assert ladders[contender.ladder] == space.precisions
        assert CONTENDERS[rival_of(name)].ladder == contender.ladder
        check_strategy(settings.search.strategy)
    assert len(set(ladders.values())) == len(LADDERS)


def test_the_status_of_a_command_that_fails_is_that_of_the_comparison(tmp_path: Path) -> None:
    words = ("kws", "--assets", str(tmp_path), "--strategy", "knight")
    done = subprocess.run(
        [sys.executable, str(SCRIPTS / "compare_strategies.py"), *words],
        check=False,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2
    assert "QD301" in done.stderr
