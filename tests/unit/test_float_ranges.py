"""Ranges of floating-point types of 8 bits, and parameters behind a method's name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from qdist.errors import ConfigError, PlanError
from qdist.numbers.dtype import FLOATS
from qdist.numbers.rounding import round_float
from qdist.plan.choice import LayerChoice
from qdist.plan.plan import LayerPlan
from qdist.plan.planner import Planner, PlanSettings
from qdist.plan.rules import Rule, apply_rules
from qdist.stats.histogram import Density
from qdist.threshold.clip import Levels
from qdist.threshold.float_error import (
    FLOAT_METHODS,
    expected_float_mse,
    expected_float_mse_reference,
    float_threshold,
    positive_numbers,
)
from qdist.threshold.registry import check_method, find_threshold, resolve
from tests.onnx_models import HeldSamples, frozen_from, model, normal, planner_for, value
from tests.unit.test_simulate_integers import node

KINDS = {"fp8_e4m3": ml_dtypes.float8_e4m3fn, "fp8_e5m2": ml_dtypes.float8_e5m2}


def points(values: NDArray[Any]) -> Density:
    x = np.sort(np.asarray(values, np.float64))
    return Density(lower=x, upper=x, counts=np.ones(x.size))


@pytest.mark.parametrize("name", KINDS)
def test_positive_numbers_are_those_of_the_type(name: str) -> None:
    every = np.arange(256, dtype=np.uint8).view(KINDS[name]).astype(np.float64)
    expected = np.unique(np.abs(every[np.isfinite(every)]))
    assert np.array_equal(positive_numbers(FLOATS[name]), expected)


@settings(max_examples=60)
@given(
    name=st.sampled_from(sorted(KINDS)),
    values=st.lists(st.floats(-1e4, 1e4, width=32), min_size=1, max_size=40),
    bound=st.floats(1e-3, 1e5),
)
def test_the_error_of_single_values_is_that_of_rounding(
    name: str, values: list[float], bound: float
) -> None:
    density = points(np.array(values))
    found = expected_float_mse(density, bound, FLOATS[name])
    expected = expected_float_mse_reference(density, bound, FLOATS[name])
    # Rounding goes by float32 in one and float64 in the other, so ties may part.
    assert found == pytest.approx(expected, rel=1e-5, abs=1e-12 * bound**2)


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("bound", [0.3, 20.0, 61.7, 900.0])
def test_the_error_of_an_interval_is_the_mean_over_it(name: str, bound: float) -> None:
    edges = np.linspace(-40.3, 61.7, 301)
    counts = np.random.default_rng(3).integers(1, 50, 300).astype(np.float64)
    density = Density(lower=edges[:-1], upper=edges[1:], counts=counts)
    inside = (np.arange(2000) + 0.5) / 2000
    dense = (edges[:-1, None] + inside * np.diff(edges)[:, None]).ravel()
    expected = expected_float_mse_reference(
        Density(lower=dense, upper=dense, counts=np.repeat(counts / 2000, 2000)),
        bound,
        FLOATS[name],
    )
    assert expected_float_mse(density, bound, FLOATS[name]) == pytest.approx(expected, rel=1e-3)


def data(shape: str) -> NDArray[np.float64]:
    random = np.random.default_rng(7)
    return (
        {
            "gauss": random.standard_normal(20_000),
            "laplace": random.laplace(size=20_000),
            "student": random.standard_t(3, 20_000),
            "relu": np.maximum(random.standard_normal(20_000), 0),
            "outlier": np.append(random.standard_normal(20_000), [3000.0]),
            "tiny beside large": np.append(random.standard_normal(20_000) * 1e-4, [1.0]),
        }[shape]
        .astype(np.float32)
        .astype(np.float64)
    )


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize(
    "shape", ["gauss", "laplace", "student", "relu", "outlier", "tiny beside large"]
)
def test_mse_is_near_the_best_of_all_bounds(name: str, shape: str) -> None:
    x, kind = data(shape), FLOATS[name]
    found = float_threshold(points(x), kind, "mse")
    bound = max(-found.low, found.high)

    def error(bound: float) -> float:
        scale = bound / kind.largest
        stored = round_float((x / scale).astype(np.float32), kind, saturate=True)
        return float(np.square(stored.astype(np.float64) * scale - x).mean())

    assert found.expected_mse == pytest.approx(error(bound), rel=1e-4)
    brute = min(error(b) for b in np.abs(x).max() * np.geomspace(1 / 64, 1, 400))
    # The error has a ripple from octave to octave of 2 or 3 %.
    assert found.expected_mse <= 1.03 * brute
    for method in FLOAT_METHODS:
        other = float_threshold(points(x), kind, method)
        assert other.expected_mse >= 0.999 * found.expected_mse
    assert float_threshold(points(x), kind, "auto").expected_mse <= found.expected_mse


@pytest.mark.parametrize("method", FLOAT_METHODS)
@pytest.mark.parametrize("values", [[], [0.0, 0.0], [3.0], [-2.0]])
def test_tensors_of_one_value_or_none(method: str, values: list[float]) -> None:
    found = float_threshold(points(np.array(values)), FLOATS["fp8_e4m3"], method)
    assert found.low <= min([0.0, *values])
    assert found.high >= max([0.0, *values]) * (1 - 1e-6)
    assert found.expected_mse <= 1e-12


# --- in plans -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def planner(tmp_path_factory: pytest.TempPathFactory) -> Planner:
    folder = tmp_path_factory.mktemp("plans")
    proto = model(
        [node("MatMul", ["x", "w"], ["y"], "layer"), node("Tanh", ["y"], ["z"], "last")],
        [value("x", ["n", 64])],
        [value("z", ["n", 5])],
        {"w": normal(64, 5) ** 3},
    )
    frozen = frozen_from(proto, folder / "model.onnx")
    samples = [{"x": normal(64, seed=i) ** 3} for i in range(40)]
    return planner_for(frozen, HeldSamples(samples=samples), folder / "store", PlanSettings())


def layer_of(planner: Planner, **choice: Any) -> tuple[LayerPlan, tuple[str, ...]]:
    plan = planner.plan({name: LayerChoice(**choice) for name in ("layer", "last")})
    return plan.layers[0], plan.notes


def test_float8_activations_and_weights_have_every_method_that_means_something(
    planner: Planner,
) -> None:
    errors: dict[str, float] = {}
    for method in ("max", "percentile", "mse", "auto"):
        layer, notes = layer_of(
            planner,
            precision="fp8_e4m3",
            saturation=method,
            weight_saturation="max" if method == "auto" else method,
        )
        quantizer = layer.activations[0].quantizer
        assert quantizer.expected_mse is not None
        errors[method] = quantizer.expected_mse
        assert quantizer.method == method or method == "auto"
        assert not any("evenly spaced" in note for note in notes)
    assert errors["auto"] == errors["mse"] == min(errors.values())
    mse, _ = layer_of(planner, precision="fp8_e5m2", weight_saturation="mse")
    largest, _ = layer_of(planner, precision="fp8_e5m2", weight_saturation="max")
    one, other = mse.weights[0].quantizer, largest.weights[0].quantizer
    assert one.method == "mse"
    assert (one.expected_mse or 0.0) < (other.expected_mse or 0.0)
    values = planner.graph.weights.read("w")
    for quantizer in (one, other):
        error = np.square(quantizer.applied(values).astype(np.float64) - values).mean()
        assert quantizer.expected_mse == pytest.approx(error, rel=1e-3)


def test_methods_for_even_steps_say_that_they_are_not_used(planner: Planner) -> None:
    _, notes = layer_of(planner, precision="fp8_e4m3", saturation="kl", weight_saturation="aciq")
    assert "kl is for evenly spaced levels: max is used for fp8_e4m3 layers" in notes
    assert (
        "aciq is for evenly spaced levels: max is used for the weights of fp8_e4m3 layers" in notes
    )


def test_given_and_scaled_ranges_of_float8(planner: Planner) -> None:
    fixed, _ = layer_of(planner, precision="fp8_e4m3", threshold=3.5)
    quantizer = fixed.activations[0].quantizer
    assert quantizer.scales == (3.5 / 448,)
    assert quantizer.method == "fixed"
    plain, _ = layer_of(planner, precision="fp8_e4m3", saturation="max")
    half, _ = layer_of(planner, precision="fp8_e4m3", saturation="max", th_scale=0.5)
    assert half.activations[0].quantizer.scales[0] == pytest.approx(
        plain.activations[0].quantizer.scales[0] / 2
    )
    assert half.activations[0].quantizer.method == "max"


# --- parameters behind a name -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("percentile:99.9", ("percentile", {"percent": 99.9})),
        ("PERCENTILE:99", ("percentile", {"percent": 99})),
        ("kl:bins=4096,stride=1", ("kl", {"bins": 4096, "stride": 1})),
        ("USE_KL:512", ("kl", {"bins": 512})),
        ("aciq:laplace", ("aciq", {"distribution": "laplace"})),
        ("percentile9999:99.9", ("percentile", {"percent": 99.9})),
        ("max:th_scale=0.5", ("max", {"th_scale": 0.5})),
    ],
)
def test_parameters_may_stand_behind_a_name(text: str, expected: tuple[str, Any]) -> None:
    assert resolve(text) == expected
    check_method(text)
    # They are of this very place, so they go before those of all layers.
    assert resolve(text, {**dict.fromkeys(expected[1], 1), "bins": 7})[1] == {
        "bins": 7,
        **expected[1],
    }


@pytest.mark.parametrize(
    ("text", "code"),
    [
        ("nothing:3", "QD501"),
        ("max:3", "QD502"),
        ("percentile:", "QD502"),
        ("kl:bins=", "QD502"),
        ("kl:bins=4096,bins=2", "QD502"),
        ("kl:percent=99", "QD502"),
    ],
)
def test_what_is_no_parameter_is_refused(text: str, code: str) -> None:
    with pytest.raises(PlanError) as caught:
        LayerChoice(weight_saturation=text)
    assert caught.value.code == code
    with pytest.raises(PlanError):
        LayerChoice(saturation=text)
    with pytest.raises(ConfigError) as limits:
        check_method("percentile:200")
    assert limits.value.code == "QD104"


def test_single_layers_have_parameters_of_their_weights(planner: Planner, tmp_path: Path) -> None:
    rule = Rule(match="layer", settings={"weight_saturation": "percentile:90"})
    found = apply_rules(planner.index, LayerChoice(), [rule])
    plan = planner.plan(found.choices)
    quantizer = plan.layers[0].weights[0].quantizer
    assert quantizer.method == "percentile"
    assert quantizer.clipped_share == pytest.approx(0.1, abs=0.03)
    column = np.sort(planner.graph.weights.read("w")[:, 0].astype(np.float64))
    levels = Levels(low=-127, high=127, symmetric=True)
    expected = find_threshold(points(column), levels, "percentile", {"percent": 90})
    bound = max(-expected.low, expected.high)
    assert quantizer.scales[0] * 127 == pytest.approx(bound, rel=1e-6)
    again = planner.plan({n: LayerChoice(weight_saturation="percentile:99") for n in found.choices})
    assert again.layers[0].weights[0].quantizer.scales != quantizer.scales
