from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper

from qdist.demo import demo_file
from qdist.emit.writer import write_model
from qdist.errors import ModelError
from qdist.model.freeze import FrozenModel, freeze
from qdist.model.loading import load_model
from qdist.model.session import run, scoring_session
from qdist.model.weights import Weights
from qdist.plan.planner import Planner
from qdist.plan.quantizer import Quantizer
from qdist.plan.target import ProjectedPlan
from qdist.simulate import pairs as pairs_module
from qdist.simulate.assemble import QuantizedGraph, assemble, raised
from qdist.simulate.pairs import IntegerWeight, pack
from qdist.simulate.twins import SUFFIX, only, twin_graph
from tests.onnx_models import (
    EXECUTION,
    Array,
    frozen_from,
    model,
    normal,
    planner_for,
    projected,
    samples_of,
    value,
)

Floats = NDArray[np.float64]


def node(op_type: str, inputs: list[str], outputs: list[str], name: str = "", **kw: Any) -> Any:
    return helper.make_node(op_type, inputs, outputs, name, **kw)


def outputs_of(graph: QuantizedGraph, folder: Path, feeds: dict[str, Array]) -> list[Array]:
    written = write_model(graph, folder / "quantized.onnx")
    return run(scoring_session(written.path, EXECUTION), None, feeds)


# The scheme, by itself: what a quantized layer has to compute.


def rounded(x: Array, quantizer: Quantizer) -> Floats:
    """Quantized and dequantized, in float64 but for the division, which ONNX does in float32."""
    shape = [1] * x.ndim
    if quantizer.axis is not None:
        shape[quantizer.axis] = -1
    scale = np.asarray(quantizer.scales, np.float32).reshape(shape)
    zero = np.asarray(quantizer.zero_points, np.int64).reshape(shape)
    q = np.clip(np.rint(x / scale).astype(np.float64) + zero, quantizer.low, quantizer.high)
    return (q - zero) * scale.astype(np.float64)


def convolved(x: Floats, w: Floats) -> Floats:
    windows = sliding_window_view(x, w.shape[2:], (2, 3))
    return np.einsum("bihwkl,oikl->bohw", windows, w)


LAYERS: dict[str, tuple[NodeProto, dict[str, Array], tuple[int, ...], Any]] = {
    "conv": (
        node("Conv", ["x", "w", "b"], ["y"], "layer"),
        {"w": normal(5, 3, 3, 3), "b": normal(5)},
        (3, 7, 7),
        lambda x, w: convolved(x, w) + normal(5).reshape(1, 5, 1, 1),
    ),
    "gemm": (
        node("Gemm", ["x", "w", "b"], ["y"], "layer", transB=1, alpha=0.5),
        {"w": normal(7, 9), "b": normal(7)},
        (9,),
        lambda x, w: 0.5 * x @ w.T + normal(7),
    ),
    "matmul": (
        node("MatMul", ["x", "w"], ["y"], "layer"),
        {"w": normal(9, 7) * np.geomspace(0.01, 10, 7).astype(np.float32)},
        (5, 9),
        lambda x, w: x @ w,
    ),
    "matmul with the weight first": (
        node("MatMul", ["w", "x"], ["y"], "layer"),
        {"w": normal(7, 9)},
        (9, 3),
        lambda x, w: w @ x,
    ),
}


def single(case: str, folder: Path) -> tuple[FrozenModel, Planner, tuple[int, ...]]:
    layer, constants, shape, _ = LAYERS[case]
    proto = model(
        [layer], [value("x", ["n", *shape])], [value("y", [None] * (len(shape) + 1))], constants
    )
    frozen = frozen_from(proto, folder / "model.onnx")
    return frozen, planner_for(frozen, samples_of("x", *shape), folder / "store"), shape


@pytest.mark.parametrize("precision", ["int8", "w8a16", "int16", "w4a8", "w4a16"])
@pytest.mark.parametrize("case", LAYERS)
def test_a_layer_computes_what_the_scheme_says(case: str, precision: str, tmp_path: Path) -> None:
    frozen, planner, shape = single(case, tmp_path)
    plan = projected(planner, precision)
    (layer,) = plan.plan.layers
    (activation,), (weight,) = layer.activations, layer.weights
    assert f"int{activation.quantizer.bits}" == activation.quantizer.dtype
    assert {"int8": (8, 8), "w8a16": (16, 8), "int16": (16, 16), "w4a8": (8, 4), "w4a16": (16, 4)}[
        precision
    ] == (activation.quantizer.bits, weight.quantizer.bits)
    assert len(weight.quantizer.scales) == {"conv": 5}.get(case, 7)
    # Beyond the calibrated range too, so that clipping is part of it.
    x = normal(3, *shape, seed=9) * 1.5
    w = frozen.weights().read("w")
    expected = LAYERS[case][3](rounded(x, activation.quantizer), rounded(w, weight.quantizer))
    (found,) = outputs_of(assemble(frozen, plan), tmp_path, {"x": x})
    assert np.linalg.norm(found - expected) <= 1e-5 * np.linalg.norm(expected)
    unquantized = LAYERS[case][3](x.astype(np.float64), w.astype(np.float64))
    assert np.linalg.norm(found - unquantized) > 1e-5 * np.linalg.norm(unquantized)


def test_integer_weights_are_packed_as_onnx_unpacks_them() -> None:
    for shape in ((3, 5), (2, 4), (1,), (7, 1, 3)):
        n = int(np.prod(shape))
        integers = (np.arange(n, dtype=np.int32) % 15 - 7).reshape(shape)
        tensor = TensorProto(
            data_type=TensorProto.INT4, dims=shape, raw_data=pack(integers, "int4")
        )
        assert len(tensor.raw_data) == -(-n // 2)
        np.testing.assert_array_equal(numpy_helper.to_array(tensor).astype(np.int32), integers)
    for bits, dtype in ((8, "<i1"), (16, "<i2")):
        low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
        integers = np.array([low, -1, 0, high], np.int32)
        np.testing.assert_array_equal(np.frombuffer(pack(integers, f"int{bits}"), dtype), integers)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize(
    ("shape", "axis"),
    [((5, 7), 0), ((5, 7), 1), ((5, 7), None), ((9, 3, 3), 0), ((4, 3, 5), 1), ((1, 1, 7), 2)],
)
def test_weights_quantized_in_pieces_are_the_same_bytes(
    monkeypatch: pytest.MonkeyPatch, shape: tuple[int, ...], axis: int | None, bits: int
) -> None:
    n = 1 if axis is None else shape[axis]
    high = 2 ** (bits - 1) - 1
    quantizer = Quantizer(
        bits=bits,
        low=-high,
        high=high,
        scales=tuple(0.1 + 0.05 * i for i in range(n)),
        zero_points=(0,) * n,
        axis=axis,
        method="max",
        bounds=(-1, 1),
    )
    array = normal(*shape)
    tensor = numpy_helper.from_array(array, "w")
    weights = Weights([tensor], None)
    entry = IntegerWeight(name="i", source="w", quantizer=quantizer)
    expected = pack(quantizer.quantize(array), f"int{bits}")
    assert b"".join(entry.raw_blocks(weights)) == expected
    monkeypatch.setattr(pairs_module, "_BLOCK_ELEMENTS", 6)
    blocks = list(entry.raw_blocks(weights))
    assert b"".join(blocks) == expected
    assert len(blocks) > 1


# The graph around the layers.


def branching() -> ModelProto:
    """``x`` is read by two layers, ``a`` by three."""
    return model(
        [
            node("MatMul", ["x", "w1"], ["a"], "first"),
            node("MatMul", ["x", "w1"], ["b"], "second"),
            node("MatMul", ["a", "w2"], ["c"], "third"),
            node("MatMul", ["a", "w2"], ["d"], "fourth"),
            node("Add", ["a", "b"], ["e"], "add"),
            node("Add", ["c", "d"], ["f"], "add2"),
            node("Mul", ["e", "f"], ["y"], "mul"),
        ],
        [value("x", ["n", 8])],
        [value("y", ["n", 8])],
        {"w1": normal(8, 8), "w2": normal(8, 8, seed=1)},
    )


def branching_planner(folder: Path) -> tuple[FrozenModel, Planner]:
    frozen = frozen_from(branching(), folder / "model.onnx")
    return frozen, planner_for(frozen, samples_of("x", 8), folder / "store")


def sources_read(graph: QuantizedGraph, layer: str) -> list[str]:
    (found,) = (n for n in graph.proto.graph.node if n.name == layer)
    return list(found.input)


def count(graph: QuantizedGraph, op_type: str) -> int:
    return sum(n.op_type == op_type for n in graph.proto.graph.node)


def test_equal_quantizers_share_one_pair_and_one_integer_weight(tmp_path: Path) -> None:
    frozen, planner = branching_planner(tmp_path)
    graph = assemble(frozen, projected(planner))
    distinct = {"x", "a", "b", "c", "d", "e", "f"}
    assert count(graph, "QuantizeLinear") == len(distinct)
    assert count(graph, "DequantizeLinear") == len(distinct) + 2
    assert [w.source for w in graph.integer_weights] == ["w1", "w2"]
    assert (
        sources_read(graph, "first")
        == sources_read(graph, "second")
        == [
            "x.int8.dq",
            "w1.int8.dq",
        ]
    )
    assert {t.name for t in graph.proto.graph.initializer if t.name.endswith(".int")} == {
        "w1.int8.int",
        "w2.int8.int",
    }
    assert not {"w1", "w2"} & {t.name for t in graph.proto.graph.initializer}


def test_layers_of_different_precision_read_a_tensor_through_pairs_of_their_own(
    tmp_path: Path,
) -> None:
    frozen, planner = branching_planner(tmp_path)
    graph = assemble(frozen, projected(planner, "int8", third="w8a16", fourth="float32"))
    assert sources_read(graph, "third") == ["a.int16.dq", "w2.int8.dq"]
    assert sources_read(graph, "fourth") == ["a", "w2"]
    assert sources_read(graph, "add") == ["a.int8.dq", "b.int8.dq"]
    kept = {t.name for t in graph.proto.graph.initializer}
    assert {"w2", "w2.int8.int"} <= kept
    assert "w1" not in kept


def test_two_quantizers_of_one_width_get_names_of_their_own(tmp_path: Path) -> None:
    frozen, planner = branching_planner(tmp_path)
    plan = projected(planner)
    second = plan.plan.layers[1]
    (entry,) = second.activations
    wider = replace(entry.quantizer, scales=(entry.quantizer.scales[0] * 2,))
    changed = replace(second, activations=(replace(entry, quantizer=wider),))
    layers = (plan.plan.layers[0], changed, *plan.plan.layers[2:])
    graph = assemble(frozen, replace(plan, plan=replace(plan.plan, layers=layers)))
    assert sources_read(graph, "first")[0] == "x.int8.dq"
    assert sources_read(graph, "second")[0] == "x.int8.1.dq"
    names = [t.name for t in graph.proto.graph.initializer]
    assert len(names) == len(set(names))
    (found,) = outputs_of(graph, tmp_path, {"x": normal(2, 8)})
    assert np.isfinite(found).all()


def test_names_of_the_model_are_not_taken_twice(tmp_path: Path) -> None:
    """As in a model that is the artifact of an earlier run."""
    proto = model(
        [
            node("Neg", ["x"], ["x.int8.dq"], "neg"),
            node("MatMul", ["x", "w"], ["m"], "matmul"),
            node("MatMul", ["x.int8.dq", "w"], ["y"], "again"),
            node("Relu", ["m"], ["z"], "relu"),
        ],
        [value("x", ["n", 4])],
        [value("y", ["n", 4]), value("z", ["n", 4])],
        {"w": normal(4, 4)},
    )
    frozen = frozen_from(proto, tmp_path / "model.onnx")
    planner = planner_for(frozen, samples_of("x", 4), tmp_path / "store")
    graph = assemble(frozen, projected(planner))
    assert sources_read(graph, "matmul")[0] == "x.int8.1.dq"
    y, z = outputs_of(graph, tmp_path, {"x": normal(2, 4)})
    np.testing.assert_allclose(np.maximum(-y, 0), z, atol=0.1)


def test_float_plan_is_the_frozen_model(tmp_path: Path) -> None:
    frozen = freeze(load_model(demo_file("digits_vit.onnx")))
    planner = planner_for(frozen, samples_of("images", 1, 8, 8), tmp_path / "store")
    graph = assemble(frozen, projected(planner, "float32"))
    assert graph.integer_weights == ()
    assert list(graph.proto.graph.node) == list(frozen.proto().graph.node)
    feeds = {"images": normal(4, 1, 8, 8)}
    session = scoring_session(frozen.graph_bytes, EXECUTION, frozen.data_folder)
    for expected, found in zip(
        run(session, None, feeds), outputs_of(graph, tmp_path, feeds), strict=True
    ):
        np.testing.assert_array_equal(found, expected, strict=True)


def test_layers_computed_together_have_no_pair_between_them(tmp_path: Path) -> None:
    proto = model(
        [
            node("Conv", ["x", "k"], ["c"], "conv"),
            node("Relu", ["c"], ["r"], "relu"),
            node("GlobalAveragePool", ["r"], ["p"], "pool"),
            node("Flatten", ["p"], ["f"], "flatten"),
            node("MatMul", ["f", "w"], ["m"], "matmul"),
            node("Add", ["bias", "m"], ["a"], "bias"),
            node("Relu", ["a"], ["h"], "relu2"),
            node("MatMul", ["h", "w2"], ["y"], "last"),
        ],
        [value("x", ["n", 3, 6, 6])],
        [value("y", ["n", 4])],
        {
            "k": normal(8, 3, 3, 3),
            "w": normal(8, 8),
            "bias": normal(8),
            "w2": normal(8, 4),
        },
    )
    frozen = frozen_from(proto, tmp_path / "model.onnx")
    planner = planner_for(frozen, samples_of("x", 3, 6, 6), tmp_path / "store")
    assert planner.fused == {"relu": "conv", "bias": "matmul", "relu2": "matmul"}
    graph = assemble(frozen, projected(planner))
    quantized = {n.input[0] for n in graph.proto.graph.node if n.op_type == "QuantizeLinear"}
    # The quantizer of ``f`` is that of ``p``, whose values it rearranges.
    assert quantized == {"x", "r", "f", "h"}
    assert sources_read(graph, "relu") == ["c"]
    assert sources_read(graph, "bias") == ["bias", "m"]
    assert sources_read(graph, "relu2") == ["a"]
    by_name = {layer.name: layer for layer in projected(planner).plan.layers}
    assert by_name["relu"].left_float == {"c": "computed with conv"}
    assert by_name["relu2"].left_float == {"a": "computed with matmul"}


def test_shared_pairs_come_before_their_first_reader(tmp_path: Path) -> None:
    frozen, planner = branching_planner(tmp_path)
    for precision in ("int8", "w4a16"):
        graph = assemble(frozen, projected(planner, precision))
        made = {"x", *(t.name for t in graph.proto.graph.initializer)}
        for entry in graph.proto.graph.node:
            assert set(entry.input) <= made, entry.name
            made.update(entry.output)


def test_plan_for_another_model_is_refused(tmp_path: Path) -> None:
    _, planner = branching_planner(tmp_path)
    other = freeze(load_model(demo_file("digits_cnn.onnx")))
    with pytest.raises(ModelError) as caught:
        assemble(other, projected(planner))
    assert caught.value.code == "QD208"
    assert "add" in caught.value.got


@pytest.mark.parametrize("precision", ["int8", "w4a16"])
def test_opset_rises_only_where_the_types_ask_for_it(precision: str, tmp_path: Path) -> None:
    frozen, planner = branching_planner(tmp_path)
    graph = assemble(frozen, projected(planner, "float32", third=precision))
    (entry,) = (e for e in graph.proto.opset_import if e.domain == "")
    assert entry.version == {"int8": 13, "w4a16": 21}[precision]
    assert graph.proto.ir_version == {"int8": 8, "w4a16": 10}[precision]
    assert raised(frozen, 13).opset_import[0].version == 13


# Twins.


@pytest.fixture(scope="module")
def vit(tmp_path_factory: pytest.TempPathFactory) -> tuple[FrozenModel, Planner]:
    frozen = freeze(load_model(demo_file("digits_vit.onnx")))
    folder = tmp_path_factory.mktemp("vit")
    return frozen, planner_for(frozen, samples_of("images", 1, 8, 8, n=8), folder / "store")


def with_outputs(graph: QuantizedGraph, names: list[str]) -> QuantizedGraph:
    del graph.proto.graph.output[:]
    graph.proto.graph.output.extend(value(name, None) for name in names)
    return graph


@pytest.mark.parametrize("precision", ["int8", "w4a16"])
def test_twin_is_the_layer_quantized_by_itself(
    vit: tuple[FrozenModel, Planner], precision: str, tmp_path: Path
) -> None:
    frozen, planner = vit
    plan = projected(planner, precision)
    twins = twin_graph(frozen, plan)
    quantized = [layer.name for layer in plan.plan.layers if layer.is_quantized]
    assert list(twins.outputs) == quantized
    names = [t for out in twins.outputs.values() for t in (out, out + SUFFIX)]
    assert [o.name for o in twins.graph.proto.graph.output] == names
    feeds = {"images": normal(3, 1, 8, 8, seed=4)}
    found = dict(zip(names, outputs_of(twins.graph, tmp_path, feeds), strict=True))
    float_session = scoring_session(
        with_outputs(
            assemble(frozen, only(plan, set())), list(twins.outputs.values())
        ).proto.SerializeToString(),
        EXECUTION,
    )
    floats = run(float_session, list(twins.outputs.values()), feeds)
    for out, expected in zip(twins.outputs.values(), floats, strict=True):
        np.testing.assert_array_equal(found[out], expected)
    for name in quantized[::7]:
        one = only(plan, {name})
        assert [layer.name for layer in one.plan.layers if layer.is_quantized] == [name]
        out = twins.outputs[name]
        (alone,) = outputs_of(with_outputs(assemble(frozen, one), [out]), tmp_path, feeds)
        np.testing.assert_array_equal(alone, found[out + SUFFIX], strict=True)
        assert not np.array_equal(alone, found[out])


def test_twins_of_a_float_plan_are_none(vit: tuple[FrozenModel, Planner]) -> None:
    frozen, planner = vit
    twins = twin_graph(frozen, projected(planner, "float32"))
    assert twins.outputs == {}


def test_only_keeps_every_layer_in_the_plan(vit: tuple[FrozenModel, Planner]) -> None:
    _, planner = vit
    plan: ProjectedPlan = projected(planner)
    reduced = only(plan, set())
    assert [e.name for e in reduced.plan.layers] == [e.name for e in plan.plan.layers]
    assert not any(layer.is_quantized for layer in reduced.plan.layers)
    assert reduced.target == plan.target
