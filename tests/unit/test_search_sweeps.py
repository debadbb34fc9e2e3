"""SlimAI's smart search, Knight's sweep, and a strategy of the user's own."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise, product
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qdist.errors import ConfigError
from qdist.evaluate.report import EvalReport
from qdist.plan.choice import LayerChoice
from qdist.search.knight import (
    QUANT_MODES,
    KnightSettings,
    Sweep,
    quantization_loss,
    ranked,
)
from qdist.search.problem import SearchLayer, SearchProblem
from qdist.search.settings import SearchSettings
from qdist.search.slimai import ACCURACY_LEVELS, SlimAISettings, SmartSearch, halved, parse
from qdist.search.strategies import make_strategy
from qdist.search.trial import Candidate, Strategy, Trial
from qdist.targets import load_target

OPTIONS = tuple(
    LayerChoice(precision=precision, granularity=granularity)
    for precision in ("int8", "int16")
    for granularity in ("channel", "tensor")
)
NAMES = ("a", "b", "fixed")


def problem() -> SearchProblem:
    """Two layers that may change, one of them without scales per tensor, and one that may not."""
    return SearchProblem(
        plain=dict.fromkeys(NAMES, OPTIONS[0]),
        layers=(
            SearchLayer(name="a", op_type="Conv", position=0, n_weights=9),
            SearchLayer(name="b", op_type="Gemm", position=1, n_weights=9, sources=("a",)),
        ),
        groups=(("a",), ("b",)),
        options={"a": OPTIONS, "b": tuple(o for o in OPTIONS if o.granularity == "channel")},
    )


def trial(candidate: Candidate, **metrics: float) -> Trial:
    name, score = next(iter(metrics.items()))
    report = EvalReport(
        score=score,
        metric=name,
        higher_is_better=name != "relative_l2",
        metrics=metrics,
        n_samples=1,
        seconds=0.0,
    )
    return Trial(candidate=candidate, report=report, n_bytes=1)


def rounds(strategy: Strategy) -> list[list[Candidate]]:
    found = []
    while candidates := strategy.ask():
        found.append(candidates)
        strategy.tell([trial(c, score=0.5) for c in candidates])
        assert len(found) < 100
    return found


RANGES = st.sets(st.integers(1, 100), min_size=1, max_size=20).map(lambda s: tuple(sorted(s)))
LEVELS = st.sets(st.sampled_from(sorted(ACCURACY_LEVELS)), min_size=1).map(tuple)


@settings(max_examples=25)
@given(LEVELS, RANGES, st.integers(1, 30))
def test_smart_search_has_every_level_with_every_range_once(
    levels: tuple[int, ...], ranges: tuple[int, ...], most: int
) -> None:
    how = SlimAISettings(accuracy_levels=levels, ranges=ranges)
    first, *rest = rounds(SmartSearch(problem(), how))
    assert [c.label for c in first] == ["plain"]
    found = [c for each in rest for c in each]
    expected = {f"accuracy_level {n}, range {r}" for n, r in product(levels, ranges)}
    # Levels that come to the same plan are one: none here, since "a" takes them all.
    assert sorted(c.label for c in found) == sorted(expected)
    assert len({c.key for c in found}) == len(found)
    assert [c.round for each in rest for c in each] == sorted(c.round for c in found)
    limited = SlimAISettings(accuracy_levels=levels, ranges=ranges, max_trials=most)
    asked = [c.key for each in rounds(SmartSearch(problem(), limited)) for c in each]
    assert asked == [c.key for c in (*first, *found)][:most]


def test_what_a_level_and_a_range_are() -> None:
    how = SlimAISettings(accuracy_levels=(0, 2), ranges=(92,))
    _, (low, high) = rounds(SmartSearch(problem(), how))
    assert low.choices["a"] == LayerChoice(
        precision="int8", granularity="tensor", saturation="max", th_scale=0.92
    )
    assert low.choices["b"] == low.choices["fixed"] == OPTIONS[0]
    assert {high.choices[n].precision for n in "ab"} == {"int16"}
    assert high.choices["b"].th_scale == 0.92
    assert high.changed == ("a", "b")


def test_a_layer_without_weights_has_any_granularity() -> None:
    relu = SearchLayer(name="b", op_type="Relu", position=1, sources=("a",))
    mixed = replace(problem(), layers=(problem().layers[0], relu))
    _, (low,) = rounds(SmartSearch(mixed, SlimAISettings(accuracy_levels=(0,), ranges=(92,))))
    assert low.choices["b"] == replace(OPTIONS[0], saturation="max", th_scale=0.92)


@given(RANGES)
def test_halving_visits_all_and_the_ends_first(ranges: tuple[int, ...]) -> None:
    found = halved(ranges)
    assert sorted(value for each in found for value in each) == list(ranges)
    assert {ranges[0], ranges[-1]} == set(found[0])
    # What is visited next halves gaps, so after any round no gap is much wider than another.
    for i in range(1, len(found)):
        seen = sorted(ranges.index(value) for each in found[:i] for value in each)
        gaps = [high - low for low, high in pairwise(seen)]
        assert max(gaps) <= 2 * min(gaps)


CFG = """[quantization]
calibration = ImprovedKL
accuracy_level = {levels}
range = {range}

[smart_search]
smart_search_level = 0
time_limit = 7200   # at most 7200 seconds
"""


def test_a_slimai_cfg() -> None:
    found = parse(CFG.format(levels="0,1", range="96:99:1"), "net.cfg")
    assert found == SlimAISettings(
        accuracy_levels=(0, 1), ranges=(96, 97, 98, 99), time_limit_s=7200.0
    )
    assert parse("[quantization]\naccuracy_level=1\nrange=92:92", "f").ranges == (92,)
    noted = parse(
        "[quantization]\naccuracy_level=1\nrange=9:92:40\n[smart_search]\nsmart_search_level=1", "f"
    )
    assert noted.ranges == (9, 49, 89)
    assert "no effect" in noted.notes[0]


@given(LEVELS, st.integers(1, 99), st.integers(0, 40), st.integers(1, 9))
def test_a_slimai_cfg_gives_what_was_written(
    levels: tuple[int, ...], low: int, width: int, step: int
) -> None:
    high = min(100, low + width)
    text = CFG.format(levels=", ".join(map(str, levels)), range=f"{low}:{high}:{step}")
    found = parse(text, "f")
    assert found.accuracy_levels == levels
    assert list(found.ranges) == [
        n for n in range(1, 101) if low <= n <= high and not (n - low) % step
    ]


@pytest.mark.parametrize(
    ("text", "code"),
    [
        ("accuracy_level = 0", "QD106"),
        ("[quantization]\nrange = 92:93", "QD105"),
        ("[quantization]\naccuracy_level = 0", "QD105"),
        ("[quantization]\naccuracy_level = 7\nrange = 92:93", "QD104"),
        ("[quantization]\naccuracy_level = x\nrange = 92:93", "QD104"),
        ("[quantization]\naccuracy_level = 0\nrange = 93:92", "QD104"),
        ("[quantization]\naccuracy_level = 0\nrange = 1:2:3:4", "QD104"),
        ("[quantization]\naccuracy_level = 0\nrange = 9\nhistogram_bins = 10240", "QD107"),
        (CFG.format(levels="0", range="9").replace("7200 ", "0 "), "QD104"),
        (CFG.format(levels="0", range="9").replace("level = 0\nt", "level = 2\nt"), "QD104"),
    ],
)
def test_mistakes_in_a_slimai_cfg(text: str, code: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse(text, "net.cfg")
    assert caught.value.code == code
    assert "net.cfg" in str(caught.value)


@settings(max_examples=40)
@given(
    st.lists(st.sampled_from(["all", *QUANT_MODES]), min_size=1, max_size=6).map(tuple),
    st.lists(st.integers(1, 9), min_size=1, max_size=4).map(tuple),
    st.integers(1, 8),
    st.integers(1, 12),
)
def test_a_sweep_has_every_mode_with_every_iteration_once(
    modes: tuple[str, ...], iterations: tuple[int, ...], batch: int, most: int
) -> None:
    how = KnightSettings(modes=modes, iterations=iterations, batch_size=batch)
    (found,) = rounds(Sweep(problem(), how))
    named = set(QUANT_MODES) if "all" in modes else set(modes)
    assert {(c.choices["a"].saturation, c.settings["n_samples"]) for c in found} == {
        (QUANT_MODES[mode], n * batch) for mode, n in product(named, iterations)
    }
    assert len({c.key for c in found}) == len(found) == len(named) * len(set(iterations))
    for candidate in found:
        is_share = candidate.choices["a"].saturation == "percentile"
        assert candidate.settings.get("percent") == (99.999 if is_share else None)
        assert candidate.choices["fixed"] == OPTIONS[0]
    limited = KnightSettings(modes=modes, iterations=iterations, batch_size=batch, max_trials=most)
    (fewer,) = rounds(Sweep(problem(), limited))
    assert [c.key for c in fewer] == [c.key for c in found][:most]


def test_the_table_of_a_sweep_is_by_loss_and_failures_are_last() -> None:
    (asked,) = rounds(Sweep(problem(), KnightSettings(iterations=(5, 10))))
    losses = [0.3, None, 0.1, 0.2, 0.1, None, 0.9, 0.8, 0.7, 0.6]
    trials = [
        Trial(candidate=c, report=None, n_bytes=0, reason="it failed")
        if loss is None
        else trial(c, relative_l2=loss)
        for c, loss in zip(asked, losses, strict=True)
    ]
    rows = ranked(reversed(trials))
    assert [row.trial.candidate.number for row in rows] == [2, 4, 3, 0, 9, 8, 7, 6, 1, 5]
    assert [row.loss for row in rows[-2:]] == [None, None]


def test_the_loss_is_one_number_however_it_is_told() -> None:
    candidate = Candidate(number=0, label="", choices=problem().plain)
    assert quantization_loss(trial(candidate, relative_l2=0.1)) == 0.1
    assert quantization_loss(trial(candidate, top1=0.8, sqnr_db=20.0)) == pytest.approx(0.1)
    assert quantization_loss(trial(candidate, top1=0.8)) == -0.8


@pytest.mark.parametrize(
    "wrong",
    [
        {"modes": ("max",)},
        {"modes": ()},
        {"iterations": (0,)},
        {"percent": 99.9},
        {"batch_size": 0},
    ],
)
def test_mistakes_in_a_sweep(wrong: dict[str, object]) -> None:
    with pytest.raises(ConfigError) as caught:
        KnightSettings(**wrong)  # type: ignore[arg-type]
    assert caught.value.code == "QD104"


OWN = '''
from dataclasses import replace
from qdist.search.trial import Candidate


class OneByOne:
    """The plain plan, then every layer in 16 bits by itself, for as long as the last one helped."""

    def __init__(self, problem):
        self.problem, self.left = problem, [layer.name for layer in problem.layers]
        self.n, self.best = 0, None

    def ask(self):
        plain = dict(self.problem.plain)
        if self.n and not self.left:
            return []
        changed = (self.left.pop(0),) if self.n else ()
        choices = plain | {n: replace(plain[n], precision="int16") for n in changed}
        candidate = Candidate(
            number=self.n, label=",".join(changed) or "plain", choices=choices,
            changed=changed, round=self.n,
        )
        self.n += 1
        return [candidate]

    def tell(self, trials):
        for trial in trials:
            if self.best and trial.rank <= self.best:
                self.left = []
            self.best = max(trial.rank, self.best or trial.rank)
'''


def test_a_strategy_in_a_users_own_file(tmp_path: Path) -> None:
    file = tmp_path / "mine.py"
    file.write_text(OWN, "utf-8")
    strategy: Strategy = load_target(f"{file}:OneByOne")(problem())
    asked = []
    for score in (0.5, 0.7, 0.6):
        (candidate,) = strategy.ask()
        asked.append(candidate)
        strategy.tell([trial(candidate, top1=score)])
    assert strategy.ask() == []
    assert [(c.number, c.round, c.label) for c in asked] == [
        (0, 0, "plain"),
        (1, 1, "a"),
        (2, 2, "b"),
    ]
    assert asked[1].choices["a"].precision == "int16"
    assert asked[1].why == {"a": "trial 1"}


def test_strategies_by_name(tmp_path: Path) -> None:
    options = {"accuracy_level": [0, 2], "range": "92:96:2"}
    found = make_strategy("smart_search", problem(), SearchSettings(options=options, max_trials=5))
    assert sum(len(each) for each in rounds(found)) == 5
    file = tmp_path / "quant_autotune_config.toml"
    file.write_text("[AutoTune]\nround_num = 3\n")
    for chosen in ({"config": str(file)}, {"round_num": 3, "chip": "zhuge"}):
        strategy = make_strategy("icraft", problem(), SearchSettings(options=chosen))
        (plain,) = strategy.ask()
        assert plain.wants_layers
        assert plain.label == "plain"


@pytest.mark.parametrize(
    ("name", "options", "code"),
    [
        ("smart_search", {"accuracy_level": 0}, "QD105"),
        ("smart_search", {"accuracy_level": 0, "range": 92, "ranges": 92}, "QD102"),
        ("smart_search", {"accuracy_level": 9, "range": 92}, "QD104"),
        ("icraft", {"chip": "other"}, "QD104"),
        ("icraft", {"rounds": 3}, "QD102"),
        ("icraft", {"config": "none.toml"}, "QD106"),
        ("icraft", {"config": "none.toml", "round_num": 3}, "QD107"),
    ],
)
def test_mistakes_in_options(name: str, options: dict[str, object], code: str) -> None:
    with pytest.raises(ConfigError) as caught:
        make_strategy(name, problem(), SearchSettings(options=options))
    assert caught.value.code == code


def test_icraft_needs_a_round() -> None:
    with pytest.raises(ConfigError) as caught:
        make_strategy("icraft", problem(), SearchSettings(max_trials=1))
    assert caught.value.code == "QD104"
