"""Every way of storing a tensor, in the graph and in NumPy: the same bits."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import ModelProto, helper

from qdist.emit.qdq import emit_qdq
from qdist.emit.writer import write_model
from qdist.errors import PlanError
from qdist.model.freeze import FrozenModel
from qdist.model.session import run, scoring_session
from qdist.model.weights import Weights
from qdist.numbers.dtype import FLOATS
from qdist.numbers.rounding import round_float
from qdist.plan.choice import LayerChoice
from qdist.plan.plan import LayerPlan
from qdist.plan.planner import Planner, PlanSettings
from qdist.plan.quantizer import Quantizer, rounding_to
from qdist.plan.target import ProjectedPlan
from qdist.simulate import pairs as pairs_module
from qdist.simulate.assemble import assemble
from qdist.simulate.pairs import IntegerWeight, Pairs, pack
from qdist.simulate.twins import SUFFIX, twin_graph
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

LEVELS = (
    ort.GraphOptimizationLevel.ORT_DISABLE_ALL,
    ort.GraphOptimizationLevel.ORT_ENABLE_ALL,
)


def alone(quantizer: Quantizer, rank: int, opset: int = 21) -> ModelProto:
    """A model that stores its input and gives it back."""
    pairs = Pairs(Weights([], None), {"x", "y"})
    nodes = pairs.result("x", "y", quantizer)
    shape: list[Any] = ["a", "b", "c", "d"][:rank]
    if quantizer.is_dynamic:
        shape[-1] = quantizer.token_length
    proto = model(nodes, [value("x", shape)], [value("y", shape)], opset=opset)
    proto.graph.initializer.extend(pairs.initializers)
    proto.ir_version = 10
    onnx.checker.check_model(proto, full_check=True)
    return proto


def computed(quantizer: Quantizer, x: Array, level: Any = LEVELS[0]) -> Array:
    options = ort.SessionOptions()
    options.graph_optimization_level = level
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    session = ort.InferenceSession(
        alone(quantizer, x.ndim).SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    return np.asarray(session.run(None, {"x": x})[0])


def same_bits(one: Array, other: Array, *, sign_of_zero: bool = True) -> bool:
    if not sign_of_zero:
        one, other = one + np.float32(0), other + np.float32(0)
    nan = np.isnan(one) & np.isnan(other)
    return bool(((one.view(np.uint32) == other.view(np.uint32)) | nan).all())


def every_float32(step: int = 8191) -> Array:
    bits = np.arange(0, 2**32, step, dtype=np.uint64).astype(np.uint32)
    # Ties of 7 and 10 bits of mantissa, and all subnormal numbers of few bits.
    ties = np.concatenate(
        [
            (np.arange(2**15, dtype=np.uint32) << 17) + np.uint32(half)
            for half in (0x8000, 0x18000, 0x1000, 0x3000)
        ]
    )
    low = np.arange(2**14, dtype=np.uint32)
    both = np.concatenate([bits, ties, low, low | np.uint32(1 << 31)]).view(np.float32)
    return np.where(np.isnan(both), np.float32(np.nan), both)


# --- floating-point types -----------------------------------------------------------------------


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("saturates", [False, True])
@pytest.mark.parametrize("name", ["bf16", "fp16", "tf32"])
def test_rounding_in_a_graph_is_rounding_in_numpy(name: str, saturates: bool, level: Any) -> None:
    """Bit for bit, whatever ONNX Runtime optimizes. tf32 has no negative zero."""
    quantizer = rounding_to(FLOATS[name], saturates=saturates)
    x = every_float32()
    expected = round_float(x, FLOATS[name], saturate=saturates)
    found = computed(quantizer, x, level)
    assert same_bits(found, expected, sign_of_zero=name != "tf32")
    with np.errstate(all="ignore"):
        assert same_bits(quantizer.applied(x), expected)
    assert not same_bits(found, x)


def test_tf32_of_the_largest_numbers_is_no_nan() -> None:
    x = np.array([3.9e34, 4.1e34, 1e38, -3.4e38, np.finfo(np.float32).max], np.float32)
    found = computed(rounding_to(FLOATS["tf32"], saturates=False), x)
    assert np.array_equal(found[:-1], round_float(x, FLOATS["tf32"])[:-1])
    assert np.isfinite(found[:-1]).all()
    assert found[-1] == np.inf


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("name", ["fp8_e4m3", "fp8_e5m2"])
@pytest.mark.parametrize("scale", [1.0, 0.37, 2.0**-9])
def test_float8_has_a_scale_and_saturates(name: str, scale: float, level: Any) -> None:
    kind = FLOATS[name]
    quantizer = replace(
        rounding_to(kind, saturates=True), scales=(float(np.float32(scale)),), method="max"
    )
    x = every_float32()
    x = x[np.isfinite(x)]
    with np.errstate(over="ignore"):
        expected = quantizer.applied(x)
    assert same_bits(computed(quantizer, x, level), expected)
    assert np.abs(expected).max() == np.float32(kind.largest) * np.float32(scale)


# --- integers -----------------------------------------------------------------------------------


def integer(dtype: str, low: int, high: int, **changes: Any) -> Quantizer:
    fields: dict[str, Any] = {
        "bits": int(dtype.lstrip("uint")),
        "low": low,
        "high": high,
        "scales": (0.0371,),
        "zero_points": (0,),
        "axis": None,
        "method": "max",
        "bounds": (-1.0, 1.0),
        "storage": dtype,
    }
    return Quantizer(**{**fields, **changes})


CHANNELS: dict[str, Any] = {"scales": (0.02, 0.5, 1e-3), "axis": 1}
INTEGERS = {
    "uint8": integer("uint8", 0, 255, zero_points=(131,)),
    "uint16": integer("uint16", 0, 65535, zero_points=(31000,), scales=(1e-4,)),
    "uint4": integer("uint4", 0, 15, zero_points=(7,)),
    "int4": integer("int4", -8, 7),
    "7 bits in int8": integer("int8", -64, 63, zero_points=(-9,)),
    "7 bits in uint8": integer("uint8", 0, 127, zero_points=(64,)),
    "14 bits in int16": integer("int16", -8192, 8191, zero_points=(5,), scales=(1e-4,)),
    "channels": integer("int8", -128, 127, zero_points=(0, 3, -100), **CHANNELS),
    "6 bits in channels": integer("int8", -32, 31, zero_points=(0, 3, -10), **CHANNELS),
    "14 bits in channels": integer("uint16", 0, 16383, zero_points=(0, 3, 9), **CHANNELS),
    "tokens": integer("int8", -127, 127, token_length=40),
    "tokens of 6 bits": integer("int8", -31, 31, token_length=40),
    "tokens of 16 bits": integer("int16", -32767, 32767, token_length=40),
    "tokens of 4 bits": integer("int4", -7, 7, token_length=40),
}


@pytest.mark.parametrize("name", INTEGERS)
def test_integers_in_a_graph_are_integers_in_numpy(name: str) -> None:
    quantizer = INTEGERS[name]
    x = normal(4, 3, 40, seed=2) * np.geomspace(1e-3, 30, 4).astype(np.float32).reshape(4, 1, 1)
    x[0, 0] = 0
    x[1, 1, :3] = [1e-40, -3e30, 3e30]
    with np.errstate(over="ignore"):
        expected = quantizer.applied(x)
    assert same_bits(computed(quantizer, x), expected)
    stored = quantizer.quantize(x)
    assert quantizer.low <= stored.min()
    assert stored.max() <= quantizer.high
    if not quantizer.is_dynamic:
        assert np.array_equal(quantizer.quantize(expected), stored)


def test_a_scale_per_token_fits_each_row() -> None:
    quantizer = INTEGERS["tokens"]
    x = normal(5, 40) * np.array([[1e-6], [1], [1e6], [0], [1e-42]], np.float32)
    error = np.abs(quantizer.applied(x) - x).max(axis=1)
    top = np.abs(x).max(axis=1)
    assert (error[:3] <= top[:3] / 127 * 0.5001).all()
    assert (np.abs(quantizer.quantize(x)[:3]).max(axis=1) == 127).all()
    assert not quantizer.applied(x)[3:].any()
    with pytest.raises(ValueError, match="in the tensor itself"):
        quantizer.dequantize(quantizer.quantize(x))


# --- whole models -------------------------------------------------------------------------------


def network() -> ModelProto:
    """Two matmuls, one with a bias and ReLU, a square root without an integer form, a view."""
    return model(
        [
            helper.make_node("MatMul", ["x", "w"], ["m"], "first"),
            helper.make_node("Add", ["m", "bias"], ["a"], "bias"),
            helper.make_node("Relu", ["a"], ["r"], "relu"),
            helper.make_node("Add", ["r", "one"], ["s"], "shift"),
            helper.make_node("Sqrt", ["s"], ["q"], "root"),
            helper.make_node("Reshape", ["q", "shape"], ["v"], "view"),
            helper.make_node("MatMul", ["v", "w2"], ["y"], "second"),
        ],
        [value("x", ["n", 24])],
        [value("y", ["n", 5])],
        {
            "w": normal(24, 16, seed=3),
            "bias": normal(16, seed=4),
            "one": np.linspace(1, 3, 16, dtype=np.float32),
            "shape": np.array([-1, 16], np.int64),
            "w2": normal(16, 5, seed=5),
        },
    )


@pytest.fixture
def given(tmp_path: Path) -> tuple[FrozenModel, Planner]:
    frozen = frozen_from(network(), tmp_path / "model.onnx")
    return frozen, planner_for(frozen, samples_of("x", 24, n=40), tmp_path / "store")


def plan_of(planner: Planner, **settings: Any) -> ProjectedPlan:
    choice = LayerChoice(**settings)
    return ANY_TARGET.project(planner.plan({layer.name: choice for layer in planner.layers}))


def layers_of(plan: ProjectedPlan) -> dict[str, LayerPlan]:
    return {layer.name: layer for layer in plan.plan.layers}


def stored(plan: ProjectedPlan, layer: str, tensor: str, x: Array) -> Array:
    entry = layers_of(plan)[layer]
    for found in (*entry.activations, *entry.weights):
        if found.tensor == tensor:
            return found.quantizer.applied(x)
    return x


def by_hand(plan: ProjectedPlan, weights: Weights, x: Array) -> Iterator[tuple[str, Array]]:
    """What the network computes under the plan, layer by layer, in float64 in between."""
    kind = plan.plan.layers[0].choice.bits.rounds

    def result(values: Array) -> Array:
        return values if kind is None else round_float(values.astype(np.float32), kind)

    def read(layer: str, name: str, values: Array | None = None) -> Array:
        values = weights.read(name) if values is None else values
        return stored(plan, layer, name, values.astype(np.float32)).astype(np.float64)

    product = read("first", "x", x) @ read("first", "w")
    r = result(np.maximum(product + weights.read("bias"), 0))
    yield "r", r
    s = result(read("shift", "r", r) + read("shift", "one"))
    yield "s", s
    q = result(np.sqrt(read("root", "s", s)))
    yield "y", result(read("second", "v", q) @ read("second", "w2"))


CHOICES: dict[str, dict[str, Any]] = {
    "bf16": {"precision": "bf16"},
    "fp16": {"precision": "fp16"},
    "tf32": {"precision": "tf32"},
    "fp8_e4m3": {"precision": "fp8_e4m3"},
    "fp8_e5m2": {"precision": "fp8_e5m2"},
    "uint8": {"precision": "uint8"},
    "uint16": {"precision": "uint16"},
    "int16": {"precision": "int16"},
    "int4": {"precision": "int4"},
    "uint4": {"precision": "uint4"},
    "u4a8": {"precision": "u4a8"},
    "u4 in blocks": {"precision": "u4", "granularity": "block=8"},
    "u4 fitted by parameters": {"precision": "u4", "weight_saturation": "percentile:99"},
    "6;7": {"weight_range_bits": 6, "activation_range_bits": 7},
    "w4 in blocks": {"precision": "w4", "granularity": "block=7"},
    "w8 in blocks": {"precision": "w8", "granularity": "block=8"},
    "w4a8 in blocks": {"precision": "w4a8", "granularity": "block=16"},
    "groups": {"granularity": "group:3"},
    "tokens": {"activation_granularity": "token"},
    "w4a8 tokens": {"precision": "w4a8", "activation_granularity": "token"},
    "channels": {"activation_granularity": "channel"},
}


@pytest.mark.parametrize("name", CHOICES)
def test_a_model_computes_what_the_numbers_say(
    name: str, given: tuple[FrozenModel, Planner], tmp_path: Path
) -> None:
    frozen, planner = given
    plan = plan_of(planner, **CHOICES[name])
    artifact = emit_qdq(frozen, plan, tmp_path / "quantized.onnx")
    x = normal(7, 24, seed=8)
    *_, (_, expected) = by_hand(plan, frozen.weights(), x)
    (found,) = run(scoring_session(artifact.path, EXECUTION), None, {"x": x})
    (exact,) = run(scoring_session(frozen.source, EXECUTION), None, {"x": x})
    off = np.abs(found - expected)
    # A sum that rounds the other way moves what is stored by one step, in few places.
    assert np.median(off) <= 2e-6
    assert np.linalg.norm(off) <= 0.2 * np.linalg.norm(exact - expected)
    assert artifact.opset >= plan.plan.opset


def test_floating_point_types_round_every_result(
    given: tuple[FrozenModel, Planner], tmp_path: Path
) -> None:
    """Of the operators without an integer form too, and of the model itself."""
    frozen, planner = given
    for name in ("bf16", "fp16", "tf32"):
        graph = assemble(frozen, plan_of(planner, precision=name))
        made = ["r", "s", "q", "v", "y"]
        graph.proto.graph.output.extend(onnx.ValueInfoProto(name=n) for n in made[:-1])
        written = write_model(graph, tmp_path / f"{name}.onnx")
        values = run(scoring_session(written.path, EXECUTION), made, {"x": normal(7, 24)})
        for tensor, found in zip(made, values, strict=True):
            assert same_bits(found, round_float(found, FLOATS[name])), (name, tensor)
        # Nothing is rounded between a matmul, its bias and its ReLU, and nothing twice.
        assert not any(
            o in ("m.exact", "a.exact") for n in graph.proto.graph.node for o in n.output
        )
        narrow = sum(n.name.endswith((".Narrow", ".Shift")) for n in graph.proto.graph.node)
        assert narrow == len({"x", "r", "s", "q", "y"})


def test_no_optimizer_of_onnx_runtime_removes_a_rounding(
    given: tuple[FrozenModel, Planner], tmp_path: Path
) -> None:
    frozen, planner = given
    x = normal(50, 24, seed=8)
    for name in ("bf16", "fp16", "tf32"):
        path = emit_qdq(frozen, plan_of(planner, precision=name), tmp_path / f"{name}.onnx").path
        results = []
        for level in LEVELS:
            options = ort.SessionOptions()
            options.graph_optimization_level = level
            options.intra_op_num_threads = 1
            session = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
            results.append(np.asarray(session.run(None, {"x": x})[0]))
        for found in results:
            assert same_bits(found, round_float(found, FLOATS[name]))
        step = 2.0 ** -FLOATS[name].mantissa_bits
        np.testing.assert_allclose(results[0], results[1], rtol=4 * step, atol=4 * step)


def test_half_precision_weights_are_stored_in_half_the_bytes(
    given: tuple[FrozenModel, Planner], tmp_path: Path
) -> None:
    frozen, planner = given
    sizes = {}
    for name in ("float32", "tf32", "fp16", "bf16", "fp8_e4m3", "w8", "w4", "u4"):
        graph = assemble(frozen, plan_of(planner, precision=name))
        sizes[name] = {
            t.name.split(".")[0]: t for t in graph.proto.graph.initializer if "scale" not in t.name
        }["w"]
    kinds = {name: onnx.TensorProto.DataType.Name(t.data_type) for name, t in sizes.items()}
    assert kinds == {
        "float32": "FLOAT",
        "tf32": "FLOAT",
        "fp16": "FLOAT16",
        "bf16": "BFLOAT16",
        "fp8_e4m3": "FLOAT8E4M3FN",
        "w8": "INT8",
        "w4": "INT4",
        "u4": "UINT4",
    }


def test_unsigned_weights_are_the_signed_ones_moved(
    given: tuple[FrozenModel, Planner], tmp_path: Path
) -> None:
    frozen, planner = given
    values = frozen.weights().read("w")
    for granularity in ("channel", "tensor", "block=8"):
        one, other = (
            layers_of(plan_of(planner, precision=name, granularity=granularity))["first"]
            .weights[0]
            .quantizer
            for name in ("w4", "u4")
        )
        assert np.array_equal(one.quantize(values) + 8, other.quantize(values))
        assert same_bits(one.applied(values), other.applied(values))
    symmetric = replace(ANY_TARGET, symmetric_only=True)
    with pytest.raises(PlanError, match="weights of uint4, with a zero point"):
        symmetric.project(plan_of(planner, precision="u4").plan)


def test_masks_saturate_in_narrow_floating_point_types(tmp_path: Path) -> None:
    """-1e9 and the lowest float32 stay finite, so that nothing becomes 0 * infinity."""
    for mask in (-1e9, float(np.finfo(np.float32).min)):
        proto = model(
            [
                helper.make_node("Mul", ["x", "mask"], ["m"], "masking"),
                helper.make_node("Add", ["x", "m"], ["s"], "scores"),
                helper.make_node("Softmax", ["s"], ["y"], "softmax", axis=-1),
            ],
            [value("x", ["n", 4])],
            [value("y", ["n", 4])],
            {"mask": np.array([0, 0, 0, mask], np.float32)},
        )
        frozen = frozen_from(proto, tmp_path / "model.onnx")
        feeds = np.array([[1, 2, 0, 1], [0, 1, 0, 1], [2, 0, 1, 1]], np.float32)
        source = HeldSamples(samples=[{"x": row} for row in feeds])
        planner = planner_for(frozen, source, tmp_path / f"store{mask}")
        for name in ("fp16", "bf16", "tf32"):
            graph = assemble(frozen, plan_of(planner, precision=name))
            written = write_model(graph, tmp_path / "quantized.onnx")
            (found,) = run(scoring_session(written.path, EXECUTION), None, {"x": feeds})
            assert np.isfinite(found).all()
            assert (found[:, 3] < 1e-6).all()
            np.testing.assert_allclose(found.sum(axis=1), 1, atol=0.01)


def test_twins_of_rounded_layers_are_rounded(
    given: tuple[FrozenModel, Planner], tmp_path: Path
) -> None:
    frozen, planner = given
    twins = twin_graph(frozen, plan_of(planner, precision="bf16"))
    written = write_model(twins.graph, tmp_path / "twins.onnx")
    names = list(twins.outputs.values())
    assert set(names) == {"m", "s", "q", "y"}
    session = scoring_session(written.path, EXECUTION)
    for name in names:
        exact, twin = run(session, [name, name + SUFFIX], {"x": normal(7, 24)})
        assert same_bits(twin, round_float(twin, FLOATS["bf16"]))
        assert not same_bits(exact, round_float(exact, FLOATS["bf16"]))
        np.testing.assert_allclose(twin, exact, rtol=0.03, atol=0.03)


# --- plans --------------------------------------------------------------------------------------


def test_weights_alone_leave_activations_and_pointwise_constants_float(
    given: tuple[FrozenModel, Planner],
) -> None:
    _, planner = given
    layers = layers_of(plan_of(planner, precision="w4", granularity="block=8"))
    assert [e.quantizer.grain for e in layers["first"].weights] == ["in blocks of 8"]
    assert layers["first"].left_float == {"x": "precision w4"}
    assert not layers["shift"].is_quantized
    assert "multiplied" in layers["shift"].left_float["one"]
    blocks = layers["first"].weights[0].quantizer.blocks
    assert blocks is not None
    assert (blocks.shape, blocks.axis) == ((3, 16), 0)


def test_a_narrower_range_is_a_coarser_scale(given: tuple[FrozenModel, Planner]) -> None:
    _, planner = given
    settings = {"saturation": "max", "weight_saturation": "max"}
    whole = layers_of(plan_of(planner, **settings))["first"]
    narrow = layers_of(plan_of(planner, weight_range_bits=6, activation_range_bits=7, **settings))[
        "first"
    ]
    for before, after, ratio in (
        (whole.weights[0], narrow.weights[0], 127 / 31),
        (whole.activations[0], narrow.activations[0], 255 / 127),
    ):
        scales = np.array(after.quantizer.scales) / np.array(before.quantizer.scales)
        np.testing.assert_allclose(scales, ratio, rtol=1e-6)
        assert after.quantizer.dtype == "int8"


def test_groups_share_the_widest_scale(given: tuple[FrozenModel, Planner]) -> None:
    _, planner = given
    channel = layers_of(plan_of(planner))["first"].weights[0].quantizer
    group = layers_of(plan_of(planner, granularity="group=3"))["first"].weights[0].quantizer
    parts = np.array_split(np.array(channel.scales), 3)
    assert group.axis == channel.axis == 1
    np.testing.assert_allclose(group.scales, np.concatenate([p * 0 + p.max() for p in parts]))
    assert (group.expected_mse or 0) >= (channel.expected_mse or 0)


def test_blocks_of_a_whole_column_are_channels(given: tuple[FrozenModel, Planner]) -> None:
    _, planner = given
    for precision, method in (("int8", "max"), ("w4", "mse")):
        plans = [
            plan_of(planner, precision=precision, granularity=g, weight_saturation=method)
            for g in ("channel", "block=24")
        ]
        channel, block = (layers_of(p)["first"].weights[0].quantizer for p in plans)
        assert block.blocks is not None
        np.testing.assert_allclose(block.blocks.values[0], channel.scales, rtol=1e-6)
        assert block.expected_mse == pytest.approx(channel.expected_mse, rel=1e-5)


def test_unsigned_activations_are_signed_ones_moved(given: tuple[FrozenModel, Planner]) -> None:
    _, planner = given
    signed, unsigned = (
        layers_of(plan_of(planner, precision=p))["second"].activations[0].quantizer
        for p in ("int8", "uint8")
    )
    assert unsigned.scales == signed.scales
    assert unsigned.zero_points[0] == signed.zero_points[0] + 128
    x = normal(100)
    assert same_bits(unsigned.applied(x), signed.applied(x))


def test_channels_have_the_range_that_was_seen(
    given: tuple[FrozenModel, Planner], tmp_path: Path
) -> None:
    frozen, _ = given
    spread = np.geomspace(0.01, 100, 24).astype(np.float32)
    source = HeldSamples(samples=[{"x": row * spread} for row in normal(30, 24)])
    planner = planner_for(frozen, source, tmp_path / "wide", PlanSettings(symmetric=True))
    found = layers_of(plan_of(planner, activation_granularity="channel"))
    quantizer = found["first"].activations[0].quantizer
    top = np.abs([s["x"] for s in source.samples]).max(axis=0)
    np.testing.assert_allclose(np.array(quantizer.scales) * 127, top, rtol=1e-6)
    groups = layers_of(plan_of(planner, activation_granularity="group=4"))["first"]
    parts = np.split(np.array(quantizer.scales), 4)
    np.testing.assert_allclose(
        groups.activations[0].quantizer.scales, np.repeat([p.max() for p in parts], 6)
    )
    # A view's channels lie elsewhere.
    assert found["second"].activations[0].quantizer.axis is None
    plan = plan_of(planner, activation_granularity="channel").plan
    assert any("1 activations have one scale all the same" in note for note in plan.notes)
    assert any("second" in note for note in plan.notes)


@pytest.mark.parametrize(
    "wrong",
    [
        {"weight_range_bits": 9},
        {"activation_range_bits": 1},
        {"precision": "w4a8", "weight_range_bits": 5},
        {"granularity": "block=0"},
        {"granularity": "token"},
        {"activation_granularity": "block=2"},
        {"precision": "fp8_e4m3", "activation_granularity": "token"},
        {"precision": "uint8", "activation_granularity": "token"},
    ],
)
def test_numbers_that_do_not_go_together_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(PlanError, match="QD507"):
        LayerChoice(**wrong)


# --- stored weights -----------------------------------------------------------------------------


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("name", ["int4", "int8"])
def test_blocks_quantized_in_pieces_are_the_same_bytes(
    monkeypatch: pytest.MonkeyPatch, name: str, axis: int
) -> None:
    from onnx import numpy_helper

    from qdist.plan.precision import weight_levels
    from qdist.plan.weight_range import block_quantizer

    array = normal(14, 6)
    bits = int(name[3:])
    quantizer = block_quantizer(array, weight_levels(bits), bits, axis, 4, "max")
    weights = Weights([numpy_helper.from_array(array, "w")], None)
    entry = IntegerWeight(name="i", source="w", quantizer=quantizer)
    expected = pack(quantizer.quantize(array), name)
    assert b"".join(entry.raw_blocks(weights)) == expected
    monkeypatch.setattr(pairs_module, "_BLOCK_ELEMENTS", 6)
    blocks = list(entry.raw_blocks(weights))
    assert b"".join(blocks) == expected
    assert len(blocks) > 1


def test_quantizers_of_every_kind_survive_json(given: tuple[FrozenModel, Planner]) -> None:
    _, planner = given
    for settings in CHOICES.values():
        plan = plan_of(planner, **settings).plan
        again = type(plan).from_json(plan.to_json())
        assert again == plan
        assert again.digest == plan.digest
