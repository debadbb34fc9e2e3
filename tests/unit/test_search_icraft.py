"""Icraft's searches: beside a plain transcription of the guide, and what holds for any model."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qdist.errors import ConfigError
from qdist.evaluate.compare import Deviation
from qdist.evaluate.report import EvalReport
from qdist.plan.choice import LayerChoice
from qdist.search.icraft import PRIORITIES, Icraft, IcraftSettings, Target
from qdist.search.icraft_config import IcraftConfig, parse, read, render
from qdist.search.icraft_ladders import SPLIT, rungs
from qdist.search.problem import SearchLayer, SearchProblem
from qdist.search.trial import Candidate, Trial

PRECISIONS = {
    "buyi": ("int8", "int16", "float32"),
    "zhuge": ("int8", "bf16", "fp16", "tf32"),
}
SHRINK = {"int8": 1.0, "bf16": 0.4, "int16": 0.1, "fp16": 0.2, "tf32": 0.05, "float32": 0.0}


def deviation(error: float) -> Deviation:
    """Of a layer whose output is ``error`` off: all four measures grow with it."""
    return Deviation(
        cosine=1 - error,
        relative_l2=math.sqrt(error) / 4,
        mse=error / 8,
        mae=error / 4,
        sqnr_db=-10 * math.log10(error) if error else math.inf,
    )


@dataclass(frozen=True)
class Chain:
    """A model of layers one after the other. ``errors``: of each with int8 and the first method;
    those of the layers before add up in place. ``splits``: whether convolutions may have their bias
    split off, which takes a third of the error in int16 away."""

    errors: tuple[float, ...]
    ops: tuple[str, ...]
    chip: str = "buyi"
    saturations: tuple[str, ...] = ("max",)
    splits: bool = False

    @property
    def names(self) -> list[str]:
        return [f"n{i}" for i in range(len(self.errors))]

    def options(self) -> tuple[LayerChoice, ...]:
        return tuple(
            LayerChoice(precision=p, granularity="tensor", saturation=s)
            for p in PRECISIONS[self.chip]
            for s in self.saturations
        )

    def options_of(self, i: int) -> tuple[LayerChoice, ...]:
        found = self.options()
        if not self.splits or self.ops[i] != "Conv":
            return found
        wide = [replace(o, split_bias=True) for o in found if o.precision == "int16"]
        return (*found, *wide)

    def error(self, i: int, choice: LayerChoice) -> float:
        # Of the methods after the first, one in three brings something.
        rank = self.saturations.index(choice.saturation)
        gain = 1.0 if not rank else (0.7 if (i + rank) % 3 == 0 else 1.1)
        apart = 2 / 3 if choice.split_bias else 1.0
        return min(1.0, self.errors[i] * SHRINK[choice.precision] * gain * apart)

    def alone(self) -> dict[str, dict[LayerChoice, Deviation]]:
        return {
            name: {option: deviation(self.error(i, option)) for option in self.options_of(i)}
            for i, name in enumerate(self.names)
        }

    def problem(self) -> SearchProblem:
        names = self.names
        return SearchProblem(
            plain={name: self.options()[0] for name in names},
            layers=tuple(
                SearchLayer(name=n, op_type=op, position=i, sources=tuple(names[max(0, i - 1) : i]))
                for i, (n, op) in enumerate(zip(names, self.ops, strict=True))
            ),
            groups=tuple((name,) for name in names),
            options={name: self.options_of(i) for i, name in enumerate(names)},
        )

    def in_place(self, choices: Mapping[str, LayerChoice]) -> list[Deviation]:
        total, found = 0.0, []
        for i, name in enumerate(self.names):
            total += self.error(i, choices[name])
            found.append(deviation(min(1.0, total)))
        return found

    def trial(self, candidate: Candidate) -> Trial:
        found = self.in_place(candidate.choices)
        cosine = found[-1].cosine
        report = EvalReport(
            score=cosine,
            metric="cosine",
            higher_is_better=True,
            metrics={"cosine": cosine},
            n_samples=1,
            seconds=0.0,
        )
        layers = dict(zip(self.names, found, strict=True))
        return Trial(candidate=candidate, report=report, n_bytes=1, layers=layers)


def search(
    chain: Chain,
    how: IcraftSettings,
    fails: Sequence[int] = (),
    guesses: list[list[str]] | None = None,
) -> list[Trial]:
    """``guesses``: filled with what the strategy expects next, in each round."""
    strategy = Icraft(chain.problem(), how, chain.alone())
    done: list[Trial] = []
    while proposals := strategy.ask():
        if guesses is not None:
            guesses.append([c.key for c in strategy.speculate([], proposals)])
        trials = [
            Trial(candidate=c, report=None, n_bytes=0, reason="it failed")
            if c.number in fails
            else chain.trial(c)
            for c in proposals
        ]
        strategy.tell(trials)
        done += trials
        assert len(done) < 1000
    return done


def precisions(trial: Trial) -> str:
    return " ".join(
        "split" if choice.split_bias else choice.precision
        for choice in trial.candidate.choices.values()
    )


def text_bad(d: Deviation, cos: float, far: float) -> bool:
    return d.cosine < cos or d.relative_l2 > far or d.mse > far or d.mae > far


def transcribed(chain: Chain, priority: str, n_rounds: int, level: int = 1) -> list[str]:
    """What the guide says, for a chain and Buyi without float_cal, in plain loops: the precisions
    of every plan, the plain one first; ``split`` is int16 with the bias split off."""
    n = len(chain.errors)
    now = ["int8"] * n
    plans = [list(now)]

    def score(plan: Sequence[str]) -> list[Deviation]:
        return chain.in_place({f"n{i}": choice(p) for i, p in enumerate(plan)})

    def choice(word: str) -> LayerChoice:
        option = chain.options()[0]
        if word == "split":
            return replace(option, precision="int16", split_bias=True)
        return replace(option, precision=word)

    def single(i: int) -> Deviation:
        return deviation(chain.error(i, choice(now[i])))

    def is_done(i: int) -> bool:
        if chain.splits and chain.ops[i] == "Conv":
            return now[i] == "split"
        return now[i] == "int16"

    def is_over() -> bool:
        return len(plans) > n_rounds or score(plans[-1])[-1].cosine >= 0.99

    if priority == "accuracy":
        cos, far = {1: (0.97, 0.05), 2: (0.98, 0.03), 3: (0.99, 0.01)}[level]
        for step in range(1, n_rounds + 1):
            if is_over():
                break
            loose_cos = 1 - (1 - cos) * n_rounds / step
            loose_far = far * n_rounds / step
            bad = [
                i for i in range(n) if not is_done(i) and text_bad(single(i), loose_cos, loose_far)
            ]
            bad.sort(key=lambda i: single(i).cosine)
            chosen = bad[: -(-len(bad) * step // n_rounds)]
            if chosen:
                for i in chosen:
                    now[i] = "int16" if now[i] == "int8" else "split"
                plans.append(list(now))
        return [" ".join(plan) for plan in plans]

    while not is_over():
        measured = score(now)
        wanted: list[int] = []
        for threshold in (0.8, 0.85, 0.9, 0.95):
            for first in range(n):
                if wanted or measured[first].cosine >= threshold:
                    continue
                point = first
                while point >= 0:
                    computes = chain.ops[point] != "Reshape"
                    if computes and text_bad(single(point), 0.97, 0.03) and now[point] == "int8":
                        break
                    point -= 1
                if point == first:
                    wanted = [
                        i
                        for i in range(max(0, first - 3), first + 1)
                        if text_bad(single(i), 0.97, 0.03) and now[i] == "int8"
                    ]
                elif point >= 0:
                    wanted = [point]
        if not wanted:
            break
        for i in wanted:
            if is_over():
                break
            now[i] = "int16"
            plans.append(list(now))
    return [" ".join(plan) for plan in plans]


ERRORS = st.sampled_from([0.0, 0.001, 0.004, 0.02, 0.035, 0.06, 0.12, 0.25])
CHAINS = st.tuples(
    st.lists(
        st.tuples(ERRORS, st.sampled_from(["Conv", "Relu", "Reshape"])), min_size=1, max_size=12
    ),
    st.booleans(),
).map(
    lambda found: Chain(
        errors=tuple(e for e, _ in found[0]),
        ops=tuple(o for _, o in found[0]),
        splits=found[1],
    )
)


@given(CHAINS, st.sampled_from(["accuracy", "tradeoff"]), st.integers(1, 12), st.integers(1, 3))
def test_plans_are_those_of_a_plain_transcription(
    chain: Chain, priority: str, n_rounds: int, level: int
) -> None:
    how = IcraftSettings(priority=priority, round_num=n_rounds, threshold_level=level)
    found = [precisions(trial) for trial in search(chain, how)]
    assert found == transcribed(chain, priority, n_rounds, level)


@given(CHAINS, st.integers(1, 12))
def test_performance_without_other_methods_is_tradeoff(chain: Chain, n_rounds: int) -> None:
    how = IcraftSettings(priority="performance", round_num=n_rounds)
    found = [precisions(trial) for trial in search(chain, how)]
    assert found == transcribed(chain, "tradeoff", n_rounds)


def test_performance_tries_methods_before_precision() -> None:
    chain = Chain(errors=(0.001, 0.3), ops=("Conv", "Conv"), saturations=("max", "mse", "kl"))
    trials = search(chain, IcraftSettings(priority="performance"))
    second = [t.candidate.choices["n1"] for t in trials]
    assert [(c.precision, c.saturation) for c in second] == [
        ("int8", "max"),
        ("int8", "mse"),  # brings nothing, and goes back
        ("int8", "kl"),  # helps, and stays
        ("int16", "kl"),  # the layer is still bad, and no method is left
    ]
    scores = [trial.report.score for trial in trials if trial.report]
    assert scores == pytest.approx([0.699, 0.669, 0.789, 0.978])


@settings(max_examples=40)
@given(
    CHAINS,
    st.sampled_from(PRIORITIES),
    st.sampled_from(sorted(PRECISIONS)),
    st.booleans(),
    st.integers(1, 15),
    st.sets(st.integers(1, 15)),
)
def test_never_twice_never_too_many_and_always_the_same(
    chain: Chain, priority: str, chip: str, float_cal: bool, n_rounds: int, fails: set[int]
) -> None:
    chain = replace(chain, chip=chip, saturations=("max", "mse", "kl"))
    how = IcraftSettings(priority=priority, chip=chip, float_cal=float_cal, round_num=n_rounds)
    trials = search(chain, how, sorted(fails))
    keys = [trial.candidate.key for trial in trials]
    assert len(set(keys)) == len(keys) <= n_rounds + 1
    assert [t.candidate.number for t in trials] == list(range(len(trials)))
    assert [t.candidate.key for t in search(chain, how, sorted(fails))] == keys
    for trial in trials[:-1]:
        assert trial.report is None or trial.report.score < 0.99
    for trial in trials:
        for i, (name, choice) in enumerate(trial.candidate.choices.items()):
            assert choice in chain.options_of(i)
            assert not choice.split_bias or (priority == "accuracy" and chip == "buyi")
            assert (name in trial.candidate.changed) == (choice != chain.options()[0])
        if chip == "buyi" and not float_cal:
            assert "float32" not in precisions(trial)


@settings(max_examples=40)
@given(CHAINS, st.sampled_from(PRIORITIES), st.integers(1, 12))
def test_guesses_of_what_comes_next_change_nothing(
    chain: Chain, priority: str, n_rounds: int
) -> None:
    chain = replace(chain, saturations=("max", "mse"))
    how = IcraftSettings(priority=priority, round_num=n_rounds, target=None)
    guesses: list[list[str]] = []
    trials = search(chain, how, guesses=guesses)
    keys = [trial.candidate.key for trial in trials]
    assert keys == [trial.candidate.key for trial in search(chain, how)]
    if priority == "accuracy":
        # Layers by themselves say all: each of the next two rounds is known before.
        assert guesses == [keys[i + 1 : i + 3] for i in range(len(keys))]


def test_the_next_change_is_known_while_the_layers_found_last_are_being_changed() -> None:
    chain = Chain(errors=(0.12, 0.12, 0.12), ops=("Conv",) * 3)
    guesses: list[list[str]] = []
    how = IcraftSettings(priority="tradeoff", target=None)
    trials = search(chain, how, guesses=guesses)
    keys = [trial.candidate.key for trial in trials]
    assert len(keys) > 3
    assert guesses[0] == []  # nothing is measured in place yet
    assert any(guess[:1] == keys[i + 1 : i + 2] != [] for i, guess in enumerate(guesses))


def test_layers_of_a_group_are_raised_together() -> None:
    chain = Chain(errors=(0.001, 0.3, 0.001), ops=("Conv",) * 3)
    problem = replace(chain.problem(), groups=(("n0", "n1"), ("n2",)))
    strategy = Icraft(problem, IcraftSettings(priority="tradeoff"), chain.alone())
    strategy.tell([chain.trial(c) for c in strategy.ask()])
    (candidate,) = strategy.ask()
    assert candidate.changed == ("n0", "n1")


def test_without_a_plain_plan_there_is_no_search() -> None:
    chain = Chain(errors=(0.3,), ops=("Conv",))
    assert len(search(chain, IcraftSettings(), fails=[0])) == 1


def test_sensitivities_of_the_problem_serve_where_no_measures_are_given() -> None:
    chain = Chain(errors=(0.06, 0.001), ops=("Conv", "Conv"))
    plain = chain.options()[0]
    known = {"n0": {plain: 0.2}, "n1": {plain: 0.001}}
    strategy = Icraft(
        replace(chain.problem(), sensitivity=known), IcraftSettings(round_num=1, target=None)
    )
    strategy.tell([chain.trial(c) for c in strategy.ask()])
    (candidate,) = strategy.ask()
    assert candidate.changed == ("n0",)


@pytest.mark.parametrize(
    ("chip", "precision", "used", "float_cal", "expected"),
    [
        ("zhuge", "int8", {"int8"}, False, ("bf16", "fp16", "tf32")),
        ("zhuge", "bf16", {"int8", "bf16"}, False, ("fp16", "tf32")),
        ("zhuge", "fp16", {"fp16"}, False, ("bf16", "tf32")),
        ("zhuge", "fp16", {"bf16", "fp16"}, True, ("tf32",)),
        ("zhuge", "tf32", {"tf32"}, True, ()),
        ("buyi", "int8", {"int8"}, False, ("int16",)),
        ("buyi", "int8", {"int8"}, True, ("int16", "float32")),
        ("buyi", "int16", {"int16"}, False, ()),
        ("buyi", "int16", {"int16"}, True, ("float32",)),
        ("buyi", SPLIT, {"int16", SPLIT}, False, ()),
        ("buyi", SPLIT, {"int16", SPLIT}, True, ("float32",)),
        ("buyi", "float32", {"int16"}, True, ()),
    ],
)
def test_ladders(
    chip: str, precision: str, used: set[str], float_cal: bool, expected: tuple[str, ...]
) -> None:
    assert rungs(chip, precision, used, float_cal=float_cal) == expected


def test_a_bias_is_split_off_before_float32() -> None:
    for float_cal, above in ((False, ()), (True, ("float32",))):
        assert rungs("buyi", "int16", {"int8"}, float_cal=float_cal, splits=True) == (SPLIT, *above)
        # Formats of int16's kind have no such rung.
        assert rungs("buyi", "w8a16", {"int8"}, float_cal=float_cal, splits=True) == above
        assert rungs("buyi", "int8", {"int8"}, float_cal=float_cal, splits=True)[0] == "int16"
    chain = Chain(errors=(1.0, 1.0), ops=("Conv", "Relu"), splits=True)
    how = IcraftSettings(threshold_level=3, round_num=6, float_cal=True, target=None)
    trials = search(chain, how)
    assert [precisions(trial) for trial in trials] == [
        "int8 int8",
        "int16 int8",
        "int16 int16",
        "split int16",
        "float32 float32",
    ]
    assert trials[3].candidate.label == f"{SPLIT} in 1 layer"
    for priority in ("tradeoff", "performance"):
        for trial in search(chain, replace(how, priority=priority)):
            assert "split" not in precisions(trial)


def test_layers_of_a_group_keep_their_biases_when_another_splits_its_own() -> None:
    chain = Chain(errors=(1.0, 0.01), ops=("Conv", "Conv"), splits=True)
    problem = replace(chain.problem(), groups=(("n0", "n1"),))
    how = IcraftSettings(threshold_level=3, round_num=2, float_cal=True, target=None)
    strategy = Icraft(problem, how, chain.alone())
    found = []
    while proposals := strategy.ask():
        trials = [chain.trial(candidate) for candidate in proposals]
        strategy.tell(trials)
        found += [precisions(trial) for trial in trials]
    assert found == ["int8 int8", "int16 int16", "split int16"]


@pytest.mark.parametrize(
    ("target", "score", "reached"),
    [
        (Target(measure="cosine", value=0.99), 0.99, True),
        (Target(measure="score", value=0.9), 0.89, False),
        (Target(measure="score", value=0.9), 0.91, True),
    ],
)
def test_targets(target: Target, score: float, reached: bool) -> None:
    chain = Chain(errors=(1 - score,), ops=("Conv",))
    candidate = Candidate(number=0, label="", choices=chain.problem().plain)
    trial = chain.trial(candidate)
    assert target.is_reached(trial, higher_is_better=True) is reached
    with pytest.raises(ConfigError) as caught:
        replace(target, measure="mae").is_reached(trial, higher_is_better=True)
    assert caught.value.code == "QD107"


CONFIGS = st.builds(
    IcraftConfig,
    settings=st.builds(
        IcraftSettings,
        priority=st.sampled_from(PRIORITIES),
        threshold_level=st.integers(1, 3),
        round_num=st.integers(1, 500),
        float_cal=st.booleans(),
        target=st.builds(
            Target,
            measure=st.sampled_from(["cosine", "relative_l2", "mae", "mse", "score"]),
            value=st.floats(0, 1),
        ),
    ),
    folder=st.text(min_size=1),
    command=st.text(min_size=1),
)


@given(CONFIGS)
def test_a_config_reads_as_it_was_written(config: IcraftConfig) -> None:
    again = parse(render(config), "c.toml", "buyi")
    assert replace(again, notes=()) == config


def test_the_guides_own_example(tmp_path: Path) -> None:
    file = tmp_path / "quant_autotune_config.toml"
    file.write_text(
        '[AutoTune]\npriority = "accuracy" # accuracy  tradeoff performance\nround_num = 5\n'
        "float_cal = 0\n#cos_targetvalue = 0.9\nmetrics_targetvalue = 1\n"
        'evalscript_path = "C:/pyrt"\nevalscript_cmd = "D:/python.exe test1.py"\nskip_comfirm = 1\n'
    )
    found = read(file, "buyi")
    assert found.settings == IcraftSettings(round_num=5, target=Target(measure="score", value=1.0))
    assert (found.folder, found.words) == ("C:/pyrt", ("D:/python.exe", "test1.py"))
    assert len(found.notes) == 1
    assert "skip_comfirm" in found.notes[0]
    assert parse("[AutoTune]", "f", "zhuge").settings == IcraftSettings(chip="zhuge")


@pytest.mark.parametrize(
    ("text", "code"),
    [
        ("[AutoTune", "QD106"),
        ("[Other]", "QD106"),
        ("[AutoTune]\nrounds = 3", "QD102"),
        ("[AutoTune]\npriority = 'fast'", "QD104"),
        ("[AutoTune]\npriority = ['accuracy']", "QD104"),
        ("[AutoTune]\nthreshold_level = 4", "QD104"),
        ("[AutoTune]\nround_num = 0", "QD104"),
        ("[AutoTune]\nfloat_cal = true", "QD104"),
        ("[AutoTune]\ncos_targetvalue = 1.5", "QD104"),
        ("[AutoTune]\nmse_targetvalue = nan", "QD104"),
        ("[AutoTune]\ncos_targetvalue = 0.9\nmae_targetvalue = 0.1", "QD107"),
        ("[AutoTune]\nmetrics_targetvalue = 80", "QD105"),
        ("[AutoTune]\nevalscript_path = 'x'", "QD105"),
    ],
)
def test_mistakes_in_a_config(text: str, code: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse(text, "c.toml", "buyi")
    assert caught.value.code == code
    assert "c.toml" in str(caught.value)


def test_a_config_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        read(tmp_path / "none.toml", "buyi")
    assert caught.value.code == "QD106"
