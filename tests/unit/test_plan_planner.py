"""From statistics and choices to a plan, on small models."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import helper

from qdist.calibration import CalibrationSettings, calibrate_here, prepare
from qdist.cli import schema
from qdist.cli.commands import steps
from qdist.emit.qdq import emit_qdq
from qdist.errors import ModelError, PlanError, StoreError
from qdist.model import constants
from qdist.model.freeze import freeze
from qdist.model.graph import Graph
from qdist.model.loading import load_model
from qdist.model.session import run, scoring_session
from qdist.plan import weight_range
from qdist.plan.choice import LayerChoice
from qdist.plan.consumers import consumers_of
from qdist.plan.plan import LayerPlan, QuantizationPlan
from qdist.plan.planner import Planner, PlanSettings
from qdist.plan.precision import activation_levels, weight_levels
from qdist.plan.rules import Rule
from qdist.plan.weight_range import weight_quantizer
from qdist.store.zarr_store import create_store
from qdist.threshold.clip import scale_and_zero
from qdist.threshold.registry import METHODS, find_threshold
from qdist.threshold.sentinel import masked_floor, split_sentinels
from tests.onnx_models import (
    ANY_TARGET,
    EXECUTION,
    Array,
    HeldSamples,
    frozen_from,
    model,
    normal,
    planner_for,
    samples_of,
    value,
)

WEIGHT = normal(6, 4, seed=3)
OTHER = normal(4, 4, seed=5)


def small_model() -> Any:
    """(x @ w + bias) -> Relu -> @ v * gain + mask -> Softmax * 2, where the mask holds a -1e9."""
    return model(
        [
            helper.make_node("MatMul", ["x", "w"], ["a"], name="first"),
            helper.make_node("Add", ["a", "bias"], ["b"], name="bias"),
            helper.make_node("Relu", ["b"], ["r"], name="relu"),
            helper.make_node("MatMul", ["r", "v"], ["s"], name="second"),
            helper.make_node("Mul", ["s", "gain"], ["g"], name="gained"),
            helper.make_node("Add", ["g", "mask"], ["t"], name="masking"),
            helper.make_node("Softmax", ["t"], ["p"], name="softmax"),
            helper.make_node("Mul", ["p", "two"], ["out"], name="scaled"),
        ],
        [value("x", ["n", 6])],
        [value("out", ["n", 4])],
        {
            "w": WEIGHT,
            "bias": normal(4, seed=4),
            "v": OTHER,
            "gain": normal(4, seed=6),
            "mask": np.array([0, 0, 0, -1e9], np.float32),
            "two": np.array(2, np.float32),
        },
    )


@pytest.fixture
def planner(tmp_path: Path) -> Planner:
    frozen = frozen_from(small_model(), tmp_path / "model.onnx")
    return planner_for(frozen, samples_of("x", 6, n=40), tmp_path / "store")


SQUEEZING = ("kl", "kl_v2", "symkl", "jsd", "kld", "improved_kl")


def plan_with(planner: Planner, **settings: Any) -> QuantizationPlan:
    return planner.plan({layer.name: LayerChoice(**settings) for layer in planner.layers})


def layer(plan: QuantizationPlan, name: str) -> LayerPlan:
    return next(entry for entry in plan.layers if entry.name == name)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(("precision", "bits"), [("int8", 8), ("int16", 16), ("w4a8", 8)])
def test_an_activation_gets_the_threshold_of_its_histogram(
    planner: Planner, method: str, precision: str, bits: int
) -> None:
    plan = plan_with(planner, saturation=method, precision=precision)
    found = layer(plan, "second").activations[0].quantizer
    levels = activation_levels(bits, symmetric=False)
    readers = consumers_of("r", planner.graph, planner.layers, planner.taps, planner.record)
    assert [reader.name for reader in readers] == ["second"]
    threshold = find_threshold(planner.record.histogram("r").finite, levels, method, {}, readers)
    scale, zero = scale_and_zero(threshold.low, threshold.high, levels)
    assert (found.scales, found.zero_points) == ((scale,), (zero,))
    assert found.bounds == (threshold.low, threshold.high)
    assert (found.clipped_share, found.expected_mse) == (
        threshold.clipped_share,
        threshold.expected_mse,
    )
    assert (found.bits, found.axis, found.method) == (bits, None, threshold.method)
    fell_back = bits == 16 and method in SQUEEZING
    if method == "auto":
        (note,) = plan.notes
        assert note.startswith("auto chose, by the layers that read the tensors: ")
        assert threshold.note == "least expected error in second"
        return
    assert threshold.method == ("max" if fell_back else method)
    noted = (f"{method} needs more bins than levels: max is used for 16-bit layers",)
    assert plan.notes == (noted if fell_back else ())


def test_auto_says_how_many_tensors_it_judged_alone(planner: Planner) -> None:
    (note,) = plan_with(planner, saturation="auto").notes
    # Only the two matmuls have weights to judge by; what the others read is judged by itself.
    assert note.endswith("by the error in the tensor alone")
    # Another planner that takes over the ranges knows who was asked for them.
    other = planner.with_rules(planner.settings.tensors)
    assert plan_with(other, saturation="auto").notes == (note,)


def test_vendors_names_are_the_methods_they_stand_for(planner: Planner) -> None:
    for name, method in (("ems", "mse"), ("null", "max"), ("MAX", "max"), ("KL", "kl")):
        named = plan_with(planner, saturation=name)
        plain = plan_with(planner, saturation=method)
        assert named.notes == plain.notes == ()
        for one, other in zip(named.layers, plain.layers, strict=True):
            assert (one.activations, one.weights) == (other.activations, other.weights)


def test_parameters_of_the_default_do_not_reach_a_method_that_a_rule_chose(tmp_path: Path) -> None:
    frozen = frozen_from(small_model(), tmp_path / "model.onnx")
    settings = PlanSettings(saturation_parameters={"percent": 99.0, "th_scale": 0.5})
    planner = planner_for(frozen, samples_of("x", 6), tmp_path / "store", settings)
    found = layer(plan_with(planner, saturation="max"), "first").activations[0].quantizer
    histogram = planner._record.histogram("x")
    assert found.bounds == (0.5 * histogram.minimum, 0.5 * histogram.maximum)
    fixed = Planner(
        planner.graph,
        planner._record,
        planner.taps,
        PlanSettings(saturation_parameters={"threshold": 2.5}),
    )
    plan = plan_with(fixed)
    found = layer(plan, "first").activations[0].quantizer
    assert (found.bounds, found.method, plan.notes) == ((-2.5, 2.5), "fixed", ())


@pytest.mark.parametrize(
    ("precision", "granularity", "weight_saturation", "expected"),
    [
        ("int8", "channel", "auto", (8, 1, "max")),
        ("int8", "tensor", "mse", (8, None, "mse")),
        ("w4a8", "channel", "auto", (4, 1, "mse")),
        ("w8a16", "tensor", "auto", (8, None, "max")),
        ("int8", "channel", "kl", (8, 1, "kl")),
        ("w4a8", "channel", "ACIQ", (4, 1, "aciq")),
        ("int8", "channel", "percentile:99", (8, 1, "percentile")),
    ],
)
def test_a_weight_gets_the_range_of_its_values(
    planner: Planner,
    precision: str,
    granularity: str,
    weight_saturation: str,
    expected: tuple[int, int | None, str],
) -> None:
    plan = plan_with(
        planner, precision=precision, granularity=granularity, weight_saturation=weight_saturation
    )
    bits, axis, method = expected
    (found,) = layer(plan, "first").weights
    assert (found.index, found.tensor) == (1, "w")
    assert found.quantizer == weight_quantizer(WEIGHT, weight_levels(bits), bits, axis, method)


def test_symmetric_settings_leave_no_zero_point(tmp_path: Path) -> None:
    frozen = frozen_from(small_model(), tmp_path / "model.onnx")
    settings = PlanSettings(symmetric=True)
    planner = planner_for(frozen, samples_of("x", 6), tmp_path / "store", settings)
    found = [e.quantizer for entry in plan_with(planner).layers for e in entry.activations]
    assert found
    assert all(set(q.zero_points) == {0} for q in found)
    # An activation saturates where its type ends.
    assert {(q.low, q.high) for q in found} == {(-128, 127)}


def test_what_stays_float_says_why(planner: Planner) -> None:
    plan = plan_with(planner)
    reasons = {entry.name: entry.left_float for entry in plan.layers}
    assert reasons["first"] == {}
    assert reasons["bias"] == {"a": "computed with first", "bias": "computed with first"}
    assert reasons["relu"] == {"b": "computed with first"}
    assert reasons["softmax"] == {"t": "holds 40 values that mean masked, not magnitudes"}
    assert reasons["masking"] == {"mask": "holds values that mean masked, not magnitudes"}
    assert reasons["scaled"]["two"] == "a single number"
    floats = plan_with(planner, precision="float32")
    assert not any(entry.is_quantized for entry in floats.layers)
    assert layer(floats, "first").left_float == {
        "x": "precision float32",
        "w": "precision float32",
    }


@pytest.mark.parametrize("symmetric", [False, True])
def test_masked_scores_may_be_quantized_for_a_softmax(symmetric: bool, tmp_path: Path) -> None:
    """The emitted model gives what is masked no weight, and the others theirs."""
    frozen = frozen_from(small_model(), tmp_path / "model.onnx")
    source = samples_of("x", 6, n=40)
    settings = PlanSettings(masked="quantize", symmetric=symmetric)
    planner = planner_for(frozen, source, tmp_path / "store", settings)
    plan = plan_with(planner)
    # What a sum reads keeps its mask; only the Softmax knows what it means.
    assert layer(plan, "masking").left_float.keys() == {"mask"}
    (found,) = layer(plan, "softmax").activations
    body = split_sentinels(planner._record.histogram("t").finite).body
    bottom = found.quantizer.dequantize(np.array(found.quantizer.low))
    assert bottom <= masked_floor(body) < body.minimum
    artifact = emit_qdq(frozen, ANY_TARGET.project(plan), tmp_path / "int8.onnx")
    feeds = {"x": np.stack([sample["x"] for sample in source.samples])}
    (given,) = run(scoring_session(tmp_path / "model.onnx", EXECUTION), None, feeds)
    (result,) = run(scoring_session(artifact.path, EXECUTION), None, feeds)
    # The last layer doubles them.
    assert result[:, 3].max() < 2e-6
    assert np.abs(result - given).max() < 0.3
    with pytest.raises(ValueError, match="masked"):
        PlanSettings(masked="never")


def test_the_compute_scope_leaves_pointwise_layers_float(tmp_path: Path) -> None:
    frozen = frozen_from(small_model(), tmp_path / "model.onnx")
    settings = PlanSettings(scope="compute")
    planner = planner_for(frozen, samples_of("x", 6), tmp_path / "store", settings)
    plan = plan_with(planner)
    assert [entry.name for entry in plan.layers if entry.is_quantized] == ["first", "second"]
    assert {entry.name for entry in planner.choosable()} == {"first", "second"}
    with pytest.raises(ValueError, match="scope"):
        Planner(planner.graph, planner.record, planner.taps, PlanSettings(scope="some"))


def test_a_tensor_that_was_not_measured_is_an_error(tmp_path: Path) -> None:
    frozen = frozen_from(small_model(), tmp_path / "model.onnx")
    graph, source = Graph(frozen), samples_of("x", 6)
    job = prepare(frozen, source, CalibrationSettings(taps="compute"), EXECUTION, graph=graph)
    store = create_store(tmp_path / "store", job.identity)
    record = calibrate_here(job, source, store).record
    with pytest.raises(StoreError) as caught:
        plan_with(Planner(graph, record, job.taps))
    assert caught.value.code == "QD406"
    assert caught.value.where.startswith("tensor ")
    assert plan_with(Planner(graph, record, job.taps, PlanSettings(scope="compute")))


def test_one_plan_after_another_is_the_same(planner: Planner) -> None:
    first = plan_with(planner)
    plan_with(planner, precision="w4a16", saturation="max", granularity="tensor")
    assert plan_with(planner) == first
    fresh = Planner(planner.graph, planner.record, planner.taps)
    assert plan_with(fresh).digest == first.digest
    assert first.statistics_digest == planner.record.digest
    assert first.model_digest == planner.graph.model.digest


def test_a_constant_zero_activation_gets_a_quantizer_that_keeps_it(tmp_path: Path) -> None:
    frozen = frozen_from(small_model(), tmp_path / "model.onnx")
    source = HeldSamples(samples=[{"x": np.zeros(6, np.float32)}])
    planner = planner_for(frozen, source, tmp_path / "store")
    found = layer(plan_with(planner), "first").activations[0].quantizer
    zeros = np.zeros(5, np.float32)
    assert found.scales == (1.0,)
    assert np.array_equal(found.dequantize(found.quantize(zeros)), zeros)


def planner_of(proto: Any, samples: Any, folder: Path) -> Planner:
    return planner_for(frozen_from(proto, folder / "model.onnx"), samples, folder / "store")


def test_a_divisor_stays_float(tmp_path: Path) -> None:
    proto = model(
        [
            helper.make_node("Abs", ["x"], ["a"], name="abs"),
            helper.make_node("Div", ["x", "c"], ["b"], name="by constant"),
            helper.make_node("Div", ["b", "a"], ["y"], name="by activation"),
        ],
        [value("x", ["n", 4])],
        [value("y", ["n", 4])],
        {"c": np.array([1e-3, 1, 1, 5], np.float32)},
    )
    source = HeldSamples(samples=[{"x": v} for v in np.abs(normal(8, 4)) + np.float32(1e-2)])
    planner = planner_of(proto, source, tmp_path)
    projected = ANY_TARGET.project(plan_with(planner))
    for name, divisor in (("by constant", "c"), ("by activation", "a")):
        found = layer(projected.plan, name)
        assert found.left_float == {divisor: "a divisor"}
        assert [entry.index for entry in (*found.activations, *found.weights)] == [0]
    artifact = emit_qdq(planner.graph.model, projected, tmp_path / "int8.onnx")
    feeds = {"x": np.stack([sample["x"] for sample in source.samples])}
    (result,) = run(scoring_session(artifact.path, EXECUTION), None, feeds)
    assert np.isfinite(result).all()


def test_a_large_weight_that_was_not_folded_is_no_activation(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(constants, "FOLD_LIMIT_BYTES", 0)
    proto = model(
        [
            helper.make_node("Transpose", ["w"], ["t"], name="turn", perm=[1, 0]),
            helper.make_node("MatMul", ["x", "t"], ["y"], name="matmul"),
        ],
        [value("x", ["n", 4])],
        [value("y", ["n", 6])],
        {"w": WEIGHT},
    )
    path = tmp_path / "model.onnx"
    onnx.save(proto, path, save_as_external_data=True, location="data", size_threshold=0)
    planner = planner_for(freeze(load_model(path)), samples_of("x", 4), tmp_path / "store")
    plan = plan_with(planner)
    found = layer(plan, "matmul")
    assert [entry.tensor for entry in found.activations] == ["x"]
    assert found.left_float == {"t": "a large weight behind Transpose, not folded"}
    assert (plan.coverage().n_compute, plan.coverage().n_quantized) == (1, 0)


def test_a_weight_without_values_stays_float(tmp_path: Path) -> None:
    proto = model(
        [
            helper.make_node("Concat", ["x", "none"], ["h"], name="concat", axis=1),
            helper.make_node("MatMul", ["h", "narrow"], ["m"], name="narrow"),
            helper.make_node("MatMul", ["m", "wide"], ["y"], name="wide"),
        ],
        [value("x", [4, 6])],
        [value("y", [4, 3])],
        {
            "none": np.zeros((4, 0), np.float32),
            "narrow": np.zeros((6, 0), np.float32),
            "wide": np.zeros((0, 3), np.float32),
        },
    )
    plan = plan_with(planner_of(proto, samples_of("x", 4, 6), tmp_path))
    for name, tensor in (("concat", "none"), ("narrow", "narrow"), ("wide", "wide")):
        assert layer(plan, name).left_float[tensor] == "holds no values"


@pytest.mark.parametrize("kind", [np.float64])
def test_a_model_of_another_float_type_is_refused(kind: Any, tmp_path: Path) -> None:
    element = helper.np_dtype_to_tensor_dtype(np.dtype(kind))
    proto = model(
        [helper.make_node("MatMul", ["x", "w"], ["y"], name="matmul")],
        [value("x", ["n", 6], element)],
        [value("y", ["n", 4], element)],
        {"w": WEIGHT.astype(kind)},
    )
    source = HeldSamples(samples=[{"x": row.astype(kind)} for row in normal(4, 6)])
    planner = planner_of(proto, source, tmp_path)
    with pytest.raises(ModelError, match=f"a {np.dtype(kind).name} model") as caught:
        plan_with(planner)
    assert caught.value.code == "QD209"
    assert caught.value.mend == "export the model in float32"
    assert not plan_with(planner, precision="float32").coverage().n_quantized


def rule(match: str, precision: str = "int16") -> Rule:
    return Rule(match=match, settings={"precision": precision})


@pytest.mark.parametrize(
    ("match", "expected"),
    [
        ("relu", "relu is computed with first; write the rule for first"),
        ("op:Relu", "relu is computed with first; write the rule for first"),
        ("b*", "bias is computed with first; write the rule for first"),
        ("root", "a layer that is quantized; root stays float: Sqrt has no integer form"),
    ],
)
def test_a_rule_without_effect_is_refused(match: str, expected: str, tmp_path: Path) -> None:
    proto = small_model()
    proto.graph.node.append(helper.make_node("Sqrt", ["p"], ["root"], name="root"))
    proto.graph.output.append(value("root", ["n", 4]))
    planner = planner_of(proto, samples_of("x", 6), tmp_path)
    with pytest.raises(PlanError) as caught:
        planner.check_rules([rule("first"), rule(match)])
    assert caught.value.code == "QD503"
    assert caught.value.expected == expected
    # What is float already may be asked to be.
    planner.check_rules([rule("first"), rule("*"), rule("root", "float32"), rule("op:Add")])


def test_the_command_line_refuses_a_rule_without_effect(planner: Planner) -> None:
    rules = [{"match": "relu", "precision": "int16"}]
    config = schema.QuantizationConfig.model_validate({"rules": rules})
    with pytest.raises(PlanError, match="write the rule for first"):
        steps.make_choices(planner, config)


def test_a_rule_with_some_effect_is_noted_where_it_has_none(planner: Planner) -> None:
    default, chosen = LayerChoice(), LayerChoice(precision="int16")
    names = [entry.name for entry in planner.layers]
    choices = {name: chosen if name in ("bias", "masking") else default for name in names}
    why = dict.fromkeys(("bias", "masking"), "rule op:Add")
    expected = ("rule op:Add has no effect on bias: computed with first",)
    assert planner.plan(choices, why, ("before",)).notes == ("before", *expected)
    # The rule decides about the layer itself, too.
    everywhere = planner.plan(dict.fromkeys(names, chosen), dict.fromkeys(names, "rule *"))
    assert everywhere.notes == ()


@pytest.mark.parametrize("axis", [None, 0, 1, 2])
@pytest.mark.parametrize("method", ["max", "mse"])
def test_weight_ranges_do_not_depend_on_the_pieces(
    axis: int | None, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    weight = normal(3, 7, 5, seed=8)
    whole = weight_quantizer(weight, weight_levels(4), 4, axis, method)
    monkeypatch.setattr(weight_range, "_BLOCK_ELEMENTS", 4)
    sizes: list[int] = []
    pieces = weight_range._pieces

    def counted(block: Array) -> Iterator[Array]:
        for piece in pieces(block):
            sizes.append(piece.size)
            yield piece

    monkeypatch.setattr(weight_range, "_pieces", counted)
    found = weight_quantizer(weight, weight_levels(4), 4, axis, method)
    assert max(sizes) <= 4
    assert found.expected_mse == pytest.approx(whole.expected_mse, rel=1e-5)
    assert replace(found, expected_mse=None) == replace(whole, expected_mse=None)


def test_weight_elements_are_counted(planner: Planner) -> None:
    counts = {entry.name: planner.weight_elements(entry) for entry in planner.layers}
    assert counts["first"] == WEIGHT.size
    assert counts["relu"] == 0
