"""Mixed precision without a search: what each picker raises, and why."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from onnx import helper

from qdist.errors import ConfigError, PlanError
from qdist.evaluate.compare import Deviation
from qdist.model.groups import LayerGroup
from qdist.model.layers import Layer
from qdist.plan.choice import LayerChoice
from qdist.plan.dialects.knight_rules import closure, violations
from qdist.plan.layer_index import LayerIndex
from qdist.plan.planner import Planner
from qdist.search.pickers.cosine import cosine
from qdist.search.pickers.hawq import Probes, hawq, traces
from qdist.search.pickers.picking import (
    Picked,
    PickSettings,
    closed,
    n_raised,
    raised_choices,
    worst,
)
from qdist.search.pickers.positions import initial, io_high
from qdist.search.pickers.recurrent import lstm
from qdist.search.pickers.strategies import find_mix, joined
from qdist.search.pickers.variance import variance
from tests.onnx_models import (
    EXECUTION,
    HeldSamples,
    frozen_from,
    model,
    normal,
    planner_for,
    samples_of,
    value,
)
from tests.unit.test_selectors import plain_layer
from tests.vendor_models import block_index, block_model

HIGH = PickSettings(high="int16")


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory) -> LayerIndex:
    return block_index(tmp_path_factory.mktemp("block"))


@pytest.fixture(scope="module")
def planner(tmp_path_factory: pytest.TempPathFactory) -> Planner:
    folder = tmp_path_factory.mktemp("pickers")
    frozen = frozen_from(block_model(), folder / "block.onnx")
    return planner_for(frozen, samples_of("x", 3, 4, 4, n=8), folder / "store")


def deviation(cosine: float) -> Deviation:
    return Deviation(cosine=cosine, relative_l2=0.0, mse=0.0, mae=0.0, sqnr_db=0.0)


# --- shares, thresholds, groups ---------------------------------------------------------------


@pytest.mark.parametrize(
    ("n", "share", "raised"), [(10, 0.5, 5), (10, 0.8, 2), (10, 1.0, 0), (10, 0.0, 10), (3, 0.5, 1)]
)
def test_a_share_of_layers_stays_low(n: int, share: float, raised: int) -> None:
    assert n_raised(n, share) == raised


def test_the_worst_come_first_and_ties_keep_their_order() -> None:
    assert worst({"a": 1.0, "b": 3.0, "c": 3.0, "d": 0.0}, 3) == ("b", "c", "a")


def test_what_must_agree_is_raised_together() -> None:
    groups = [LayerGroup(kind="concat", layers=("b", "c")), LayerGroup(kind="x", layers=("c", "d"))]
    found = closed(Picked(raised=frozenset({"b"}), why={"b": "chosen"}), groups, list("abcde"))
    assert found.raised == {"b", "c", "d"}
    assert found.why == {
        "b": "chosen",
        "c": "agrees with a raised layer",
        "d": "agrees with a raised layer",
    }
    assert found.notes == ("2 more layers are raised, since they must agree",)
    # A target's own closure may reach what groups then pull along.
    found = closed(Picked(raised=frozenset({"a"})), groups, list("abcde"), lambda s: s | {"b"})
    assert found.raised == {"a", "b", "c", "d"}


def test_raised_layers_get_precision_and_method() -> None:
    choices = {"a": LayerChoice(saturation="kl", th_scale=0.9), "b": LayerChoice()}
    settings = replace(HIGH, high_saturation="max")
    found = raised_choices(choices, Picked(raised=frozenset({"a"})), settings)
    assert found == {
        "a": LayerChoice(precision="int16", saturation="max", th_scale=0.9),
        "b": LayerChoice(),
    }
    with pytest.raises(ValueError, match="low_share"):
        PickSettings(high="int16", low_share=1.5)


# --- one by one -------------------------------------------------------------------------------


def test_initial_raises_nothing(index: LayerIndex) -> None:
    assert initial(index, HIGH) == Picked(raised=frozenset())


def test_both_ends_are_raised_by_turns(index: LayerIndex) -> None:
    assert io_high(index, HIGH).raised == {"stem", "block/conv1", "prob", "head", "block/conv2"}
    found = io_high(index, replace(HIGH, low_share=0.8))
    assert found.why == {"stem": "near the inputs", "prob": "near the outputs"}


def test_recurrent_layers_are_raised_where_they_have_a_choice() -> None:
    layers = (plain_layer("a", "LSTM", "x"), plain_layer("b", "GRU", "a.out"))
    found = lstm(LayerIndex(layers, left_out={"b": "GRU has no integer form"}), HIGH)
    assert found.raised == {"a"}
    assert found.why == {"a": "a LSTM"}
    assert found.notes == ("1 recurrent layers stay float anyway",)
    found = lstm(
        LayerIndex(layers, left_out={"b": "GRU has no integer form"}), replace(HIGH, high="fp16")
    )
    assert found.raised == {"a", "b"}


def test_cosines_below_the_threshold_or_the_worst_share() -> None:
    found = {"a": deviation(0.99), "b": deviation(0.96), "c": deviation(0.98), "d": deviation(1.0)}
    assert cosine(found, HIGH).raised == {"b"}
    assert cosine(found, HIGH).why == {"b": "cosine 0.96000 alone"}
    assert cosine(found, replace(HIGH, threshold=0.985)).raised == {"b", "c"}
    assert cosine(found, replace(HIGH, low_share=0.25)).raised == {"a", "b", "c"}


def test_values_that_huddle_in_their_range_are_raised_by_variance(tmp_path: Path) -> None:
    nodes = [
        helper.make_node("Relu", ["even"], ["e"], name="spread"),
        helper.make_node("Sigmoid", ["far"], ["f"], name="huddled"),
    ]
    frozen = frozen_from(
        model(
            nodes,
            [value("even", ["n", 100]), value("far", ["n", 100])],
            [value("e", ["n", 100]), value("f", ["n", 100])],
        ),
        tmp_path / "m.onnx",
    )
    rng = np.random.default_rng(0)
    samples = []
    for _ in range(4):
        far = rng.normal(size=100).astype(np.float32)
        far[0] = 100.0
        samples.append({"even": rng.uniform(-1, 1, 100).astype(np.float32), "far": far})
    planner = planner_for(frozen, HeldSamples(samples=samples), tmp_path / "store")
    choices = {x.name: LayerChoice(saturation="max") for x in planner.layers}
    plan = planner.plan(choices)
    found = variance(plan, planner.densities(plan), replace(HIGH, low_share=0.5))
    assert found.raised == {"huddled"}
    # Even values over the whole range have a twelfth of its square.
    assert -found.scores["spread"] == pytest.approx(1 / 12, rel=0.05)
    assert -found.scores["huddled"] < 0.02
    limit = replace(HIGH, threshold=0.05)
    assert variance(plan, planner.densities(plan), limit).raised == {"huddled"}
    # What fits a clipped range does not huddle in it any more.
    clipped = planner.plan({x.name: LayerChoice(threshold=3.0) for x in planner.layers})
    assert -variance(clipped, planner.densities(plan), limit).scores["huddled"] > 0.02


def test_variance_refuses_tf32(planner: Planner) -> None:
    plan = planner.plan({x.name: LayerChoice() for x in planner.layers})
    layer = plan.layers[0]
    choice = LayerChoice()
    object.__setattr__(choice, "precision", "tf32")
    with pytest.raises(PlanError, match=r"QD507.*tf32"):
        variance(replace(plan, layers=(replace(layer, choice=choice),)), {}, HIGH)


def linear_model(
    folder: Path, n_in: int = 6, n_hidden: int = 5, n_out: int = 4
) -> tuple[Planner, list[np.ndarray], dict[str, np.ndarray]]:
    """x @ a @ b, whose derivative by either weight is known."""
    weights = {"a": normal(n_in, n_hidden, seed=1), "b": normal(n_hidden, n_out, seed=2)}
    nodes = [
        helper.make_node("MatMul", ["x", "a"], ["h"], name="one"),
        helper.make_node("MatMul", ["h", "b"], ["y"], name="two"),
    ]
    proto = model(nodes, [value("x", ["n", n_in])], [value("y", ["n", n_out])], weights)
    frozen = frozen_from(proto, folder / "linear.onnx")
    source = samples_of("x", n_in, n=12, seed=5)
    inputs = [sample["x"] for sample in source.samples]
    return planner_for(frozen, source, folder / "store"), inputs, weights


def test_traces_are_those_of_the_derivative(tmp_path: Path) -> None:
    planner, inputs, weights = linear_model(tmp_path)
    source = HeldSamples(samples=[{"x": x} for x in inputs])
    frozen = planner.graph.model
    found = traces(frozen, ["a", "b"], source, EXECUTION, Probes(n_probes=400), batch=5)
    x = np.stack(inputs).astype(np.float64)
    a, b = (weights[name].astype(np.float64) for name in "ab")
    # y = x a b: the squared norm of dy/da_ij is x_i^2 |b_j|^2, that of dy/db_jk is (x a)_j^2.
    exact_a = np.mean(np.sum(x**2, axis=1)) * np.sum(b**2)
    exact_b = np.mean(np.sum((x @ a) ** 2, axis=1)) * b.shape[1]
    assert found["a"] == pytest.approx(exact_a, rel=0.15)
    assert found["b"] == pytest.approx(exact_b, rel=0.15)
    again = traces(frozen, ["a", "b"], source, EXECUTION, Probes(n_probes=3), batch=5)
    assert again == traces(frozen, ["a", "b"], source, EXECUTION, Probes(n_probes=3), batch=5)
    # Batches only regroup the samples.
    other = traces(frozen, ["b"], source, EXECUTION, Probes(n_probes=3), batch=12)
    same = traces(frozen, ["b"], source, EXECUTION, Probes(n_probes=3), batch=4)
    assert other["b"] == pytest.approx(same["b"], rel=1e-3)


def test_hawq_weighs_curvature_with_what_rounding_costs(tmp_path: Path) -> None:
    planner, _, _ = linear_model(tmp_path)
    plan = planner.plan({x.name: LayerChoice(precision="w4a8") for x in planner.layers})
    errors = [layer.weights[0].quantizer.expected_mse for layer in plan.layers]
    assert all(error is not None and error > 0 for error in errors)
    found = hawq(plan, {"a": 2.0, "b": 0.0}, HIGH)
    assert found.raised == {"one"}
    assert found.scores == {"one": 2.0 * (errors[0] or 0), "two": 0.0}
    assert hawq(plan, {"a": 2.0, "b": 1e9}, HIGH).raised == {"two"}


def test_a_weight_of_zeros_has_no_scale_to_step_by(tmp_path: Path) -> None:
    nodes = [helper.make_node("MatMul", ["x", "w"], ["y"], name="only")]
    proto = model(
        nodes, [value("x", ["n", 3])], [value("y", ["n", 2])], {"w": np.zeros((3, 2), np.float32)}
    )
    frozen = frozen_from(proto, tmp_path / "m.onnx")
    assert traces(frozen, ["w"], samples_of("x", 3), EXECUTION) == {"w": 0.0}


# --- by name ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("names", "base", "strategies", "high"),
    [
        (["io_high"], "int8", ("io_high",), "int16"),
        (["buyi"], "int8", ("variance",), "int16"),
        (["zhuge"], "int8", ("cosine", "lstm"), "fp16"),
        (["zhuge"], "bf16", ("cosine", "lstm"), "tf32"),
        (["zhuge", "variance"], "fp16", ("cosine", "lstm", "variance"), "tf32"),
        (["lstm", "lstm"], "w4a8", ("lstm",), "int8"),
    ],
)
def test_the_next_precision_up_is_as_the_vendor_has_it(
    names: list[str], base: str, strategies: tuple[str, ...], high: str
) -> None:
    mix = find_mix(names, "auto", base)
    assert (mix.strategies, mix.high) == (strategies, high)
    assert mix.runs_model == ("cosine" in strategies)
    assert find_mix(names, "int16", base).high == "int16"


def test_an_unknown_strategy_and_nothing_above_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"QD104.*'best'.*initial, io_high, hawq"):
        find_mix(["best"], "auto", "int8")
    for names, base in ((["zhuge"], "tf32"), (["variance"], "int16"), (["cosine"], "float32")):
        with pytest.raises(ConfigError, match=r"QD107.*auto above"):
            find_mix(names, "auto", base)


def test_several_pickers_are_joined() -> None:
    a = Picked(raised=frozenset({"x", "y"}), why={"x": "a", "y": "a"}, scores={"x": 1.0})
    b = Picked(raised=frozenset({"y", "z"}), why={"y": "b", "z": "b"}, notes=("said",))
    found = joined([a, b])
    assert found.raised == {"x", "y", "z"}
    assert found.why == {"x": "a", "y": "a", "z": "b"}
    assert found.notes == ("said",)
    assert joined([a]).scores == {"x": 1.0}


# --- Knight's closure -------------------------------------------------------------------------


def bits(index: LayerIndex, raised: frozenset[str]) -> dict[str, int]:
    return {layer.name: 16 if layer.name in raised else 8 for layer in index.choosable}


@pytest.mark.parametrize("start", ["stem", "norm", "left", "cat", "prob"])
def test_the_closure_of_a_raised_layer_breaks_no_rule(index: LayerIndex, start: str) -> None:
    found = closure(index, [start])
    assert start in found
    assert list(violations(index, bits(index, found))) == []
    assert len(found) < len(index.choosable)


def test_recurrent_layers_and_abs_have_rules_of_their_own() -> None:
    layers: tuple[Layer, ...] = (
        plain_layer("a", "Conv", "x"),
        plain_layer("rnn", "LSTM", "a.out"),
        plain_layer("b", "Conv", "x"),
        plain_layer("cat", "Concat", "rnn.out", "b.out"),
        plain_layer("abs", "Abs", "b.out"),
        plain_layer("last", "Conv", "abs.out"),
    )
    index = LayerIndex(layers)
    eight = dict.fromkeys(index.by_name, 8)
    rules = {v.rule for v in violations(index, {**eight, "rnn": 16})}
    assert rules == {
        "the same bits around LSTM",
        "rnn before Concat cat at no more bits than the Concat's neighbours",
        "the same bits for all inputs of cat",
    }
    (found,) = list(violations(index, {**eight, "abs": 16}))[:1]
    assert found.rule == "no mixing for Abs: the bits that most layers have"
    assert closure(index, ["rnn"]) >= {"a", "rnn", "cat", "b"}
