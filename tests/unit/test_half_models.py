"""Whole models in float16 and bfloat16 are calibrated as models in float32 are."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import pytest
from onnx import AttributeProto, GraphProto, ModelProto, TensorProto, numpy_helper

from qdist.calibration import CalibrationSettings, calibrate_here, prepare
from qdist.calibration.feeds import input_specs
from qdist.errors import DataError, ModelError
from qdist.model.difference import HALF_TOLERANCES, frozen_difference, opset_difference
from qdist.model.freeze import freeze
from qdist.model.graph import Graph
from qdist.model.half import widened
from qdist.model.loading import load_model
from qdist.model.rewrite import subgraphs
from qdist.model.segments import cut, cut_at, unknown_sizes, whole
from qdist.model.session import measuring_session, run
from qdist.model.shapes import runtime_types
from qdist.model.taps import TapTable, find_taps
from qdist.model.within import run_within
from qdist.stats.observer import Observer, ObserverSpec
from qdist.stats.record import CalibrationRecord
from qdist.stats.spec import StatisticsSpec
from qdist.store.zarr_store import create_store
from tests.onnx_models import EXECUTION, Array, HeldSamples, floats, integers, model, normal, value
from tests.tapped import assert_taps_change_nothing, body, graph_of, node, tapped_values

FLOAT16, BFLOAT16 = TensorProto.FLOAT16, TensorProto.BFLOAT16
HALF = [FLOAT16, BFLOAT16]
DTYPES: dict[int, Any] = {FLOAT16: np.float16, BFLOAT16: ml_dtypes.bfloat16}
FED: dict[int, Any] = {FLOAT16: np.float16, BFLOAT16: np.float32}
"""What samples are given in: NumPy has no bfloat16."""
MODELS = Path(__file__).resolve().parents[2].parent / "shared" / "assets" / "models"


def in_half(proto: ModelProto, element: int) -> ModelProto:
    """The model with every float32 tensor in half precision, as an exporter writes it."""
    proto = ModelProto.FromString(proto.SerializeToString())
    _narrow(proto.graph, element)
    return proto


def _narrow(graph: GraphProto, element: int) -> None:
    for tensor in graph.initializer:
        _narrow_tensor(tensor, element)
    for entry in (*graph.input, *graph.output):
        if entry.type.tensor_type.elem_type == TensorProto.FLOAT:
            entry.type.tensor_type.elem_type = element
    del graph.value_info[:]
    for step in graph.node:
        for attribute in step.attribute:
            if attribute.type == AttributeProto.TENSOR:
                _narrow_tensor(attribute.t, element)
            elif attribute.name == "to" and attribute.i == TensorProto.FLOAT:
                attribute.i = element
        for inner in subgraphs(step):
            _narrow(inner, element)


def _narrow_tensor(tensor: TensorProto, element: int) -> None:
    if tensor.data_type == TensorProto.FLOAT:
        narrow = numpy_helper.to_array(tensor).astype(DTYPES[element])
        tensor.CopyFrom(numpy_helper.from_array(narrow, tensor.name))


def rounded(values: Array, element: int) -> Array:
    """As float32 numbers that the type can hold."""
    return values.astype(DTYPES[element]).astype(np.float32)


def transformer() -> ModelProto:
    """Two blocks over token numbers, with a branch between them that the input takes."""
    nodes = [node("Gather", ["table", "ids"], ["r0"], "embed")]
    constants: dict[str, Array] = {
        "table": normal(16, 8),
        "scale": floats(0.35),
        "zero": integers(0),
    }
    for i, (r, end) in enumerate([("r0", "r1"), ("r2", "y")]):
        for j, c in enumerate("qkvo"):
            constants[f"{c}w{i}"] = normal(8, 8, seed=10 * i + j) / 3
        nodes += [
            node("LayerNormalization", [r, f"g{i}"], [f"n{i}"], f"norm{i}"),
            *(node("MatMul", [f"n{i}", f"{c}w{i}"], [f"{c}{i}"], f"{c}{i}") for c in "qkv"),
            node("Transpose", [f"k{i}"], [f"t{i}"], f"turn{i}", perm=[0, 2, 1]),
            node("MatMul", [f"q{i}", f"t{i}"], [f"s{i}"], f"scores{i}"),
            node("Mul", [f"s{i}", "scale"], [f"m{i}"], f"scaled{i}"),
            node("Softmax", [f"m{i}"], [f"p{i}"], f"softmax{i}"),
            node("MatMul", [f"p{i}", f"v{i}"], [f"a{i}"], f"mix{i}"),
            node("MatMul", [f"a{i}", f"ow{i}"], [f"o{i}"], f"out{i}"),
            node("Add", [r, f"o{i}"], [end], f"residual{i}"),
        ]
        constants[f"g{i}"] = normal(8, seed=5 + i)
    then = body([node("Mul", ["r1", "r1"], ["sq"]), node("Tanh", ["sq"], ["th"])], [], ["th"])
    other = body([node("Neg", ["r1"], ["ng"]), node("Concat", ["ng"], ["el"], axis=0)], [], ["el"])
    choice = [
        node("ReduceMax", ["ids"], ["top"], "top", keepdims=0),
        node("Greater", ["top", "limit"], ["is_large"], "is_large"),
        node("If", ["is_large"], ["r2"], "choice", then_branch=then, else_branch=other),
    ]
    constants["limit"] = integers(12)
    first = next(i for i, step in enumerate(nodes) if step.name == "residual0") + 1
    nodes[first:first] = choice
    tokens = value("ids", ["n", 5], TensorProto.INT64)
    return model(nodes, [tokens], [value("y", ["n", 5, 8])], constants, opset=17)


def tokens(vocabulary: int, length: int) -> Callable[[int], Array]:
    return lambda seed: np.random.default_rng(seed).integers(0, vocabulary, length)


@dataclass(frozen=True, kw_only=True)
class Subject:
    """A model in float32, the name of its input and one sample of it by seed."""

    make: Callable[[], ModelProto]
    input: str
    sample: Callable[[int], Array]

    def samples(self, element: int, n: int) -> HeldSamples:
        fed = (self.sample(seed) for seed in range(n))
        typed = (x.astype(FED[element]) if x.dtype == np.float32 else x for x in fed)
        return HeldSamples(samples=[{self.input: x} for x in typed])

    def graph(self, element: int, folder: Path) -> Graph:
        path = folder / "model.onnx"
        onnx.save(in_half(self.make(), element), path)
        return Graph(freeze(load_model(path)))


def stored(name: str) -> Callable[[], ModelProto]:
    def load() -> ModelProto:
        if not MODELS.is_dir():
            pytest.skip("the models are not there")
        return onnx.load(MODELS / name)

    return load


SMALL = Subject(make=transformer, input="ids", sample=tokens(16, 5))
SUBJECTS = {
    "small": SMALL,
    "stories": Subject(
        make=stored("stories260K/model.onnx"), input="input_ids", sample=tokens(512, 12)
    ),
    "resnet": Subject(
        make=stored("cifar10_resnet20.onnx"),
        input="input",
        sample=lambda seed: normal(3, 32, 32, seed=seed),
    ),
}
CASES = [(name, element) for name in SUBJECTS for element in HALF]
IDS = [f"{name}-{'float16' if element == FLOAT16 else 'bfloat16'}" for name, element in CASES]
each = pytest.mark.parametrize(("name", "element"), CASES, ids=IDS)


def measured(graph: Graph, taps: TapTable, samples: HeldSamples, segments: Any) -> str:
    """The digest of what observers of these segments record."""
    spec = ObserverSpec(
        segments=segments,
        data_folder=graph.model.data_folder,
        taps=taps,
        execution=EXECUTION,
        on_nan="error",
        statistics=StatisticsSpec(),
    )
    feeds = {k: np.stack([s[k] for s in samples.samples]) for k in samples.samples[0]}
    return Observer(spec).observe([(tuple(samples.keys()), lambda: [feeds])]).digest


@each
def test_calibration_says_the_same_however_it_is_taken_apart(
    name: str, element: int, tmp_path: Path
) -> None:
    """All taps at once or few, whole or in segments, here and by an observer: the same bits."""
    subject = SUBJECTS[name]
    graph = subject.graph(element, tmp_path)
    source = subject.samples(element, 3)
    records: list[CalibrationRecord] = []
    taps = find_taps(graph)
    some = taps.tensors[:: max(1, len(taps.tensors) // 3)]
    choices: list[str | tuple[str, ...]] = ["all", *((tensor,) for tensor in some)]
    for i, chosen in enumerate(choices):
        settings = CalibrationSettings(taps=chosen, micro_batch=3)
        job = prepare(graph.model, source, settings, EXECUTION, graph=graph)
        store = create_store(tmp_path / f"store{i}", job.identity)
        records.append(calibrate_here(job, source, store).record)
    everything, *single = records
    assert everything.tensors == taps.tensors
    for tensor, record in zip(some, single, strict=True):
        assert everything.histogram(tensor).n_values > 0
        assert record.digest == everything.select((tensor,)).digest
    feeds = {subject.input: (3, *source.samples[0][subject.input].shape)}
    n_steps = len(graph.nodes)
    segments = cut_at(graph, taps, feeds, range(0, 4 * n_steps, max(1, n_steps // 8)))
    assert len(segments) > 3
    expected = measured(graph, taps, source, (whole(graph, taps),))
    assert measured(graph, taps, source, segments) == expected


@each
def test_the_frozen_model_computes_what_the_given_one_does(
    name: str, element: int, tmp_path: Path
) -> None:
    subject = SUBJECTS[name]
    graph = subject.graph(element, tmp_path)
    (sample,) = subject.samples(element, 1).samples
    feeds = {subject.input: sample[subject.input][np.newaxis]}
    off = frozen_difference(graph.model, feeds, EXECUTION)
    assert off == 0
    if name == "stories":
        return
    assert frozen_difference(graph.model, feeds, EXECUTION, budget_bytes=1 << 30) == off
    raised = opset_difference(graph.model, 21, feeds, EXECUTION)
    assert raised <= HALF_TOLERANCES[element]


@pytest.mark.parametrize("element", HALF)
def test_a_folded_normalization_is_within_the_rounding_of_its_weights(
    element: int, tmp_path: Path
) -> None:
    constants = {"w": normal(8, 3, 3, 3), "g": normal(8, seed=1), "b": normal(8, seed=2)}
    constants |= {"m": normal(8, seed=3), "v": np.abs(normal(8, seed=4)) + floats(0.5)}
    nodes = [
        node("Conv", ["x", "w"], ["c"], "conv"),
        node("BatchNormalization", ["c", "g", "b", "m", "v"], ["n"], "norm"),
        node("Relu", ["n"], ["y"], "relu"),
    ]
    proto = model(nodes, [value("x", [1, 3, 9, 9])], [value("y", None)], constants, opset=15)
    graph = graph_of(in_half(proto, element), tmp_path)
    assert [step.op_type for step in graph.nodes.values()] == ["Conv", "Relu"]
    feeds = {"x": normal(1, 3, 9, 9, seed=9).astype(FED[element])}
    assert 0 < frozen_difference(graph.model, feeds, EXECUTION) <= HALF_TOLERANCES[element]
    broken = ModelProto.FromString(graph.model.graph_bytes)
    broken.graph.node[1].op_type = "Softplus"
    other = replace(graph.model, graph_bytes=broken.SerializeToString())
    with pytest.raises(ModelError, match="QD207"):
        frozen_difference(other, feeds, EXECUTION)


@pytest.mark.parametrize("element", HALF)
def test_constants_are_folded_with_the_rounding_of_every_step(element: int, tmp_path: Path) -> None:
    nodes = [
        node("Mul", ["a", "b"], ["ab"], "mul"),
        node("Sub", ["ab", "a"], ["d"], "sub"),
        node("Transpose", ["d"], ["t"], "turn"),
        node("MatMul", ["x", "t"], ["y"], "fc"),
    ]
    constants = {"a": normal(6, 8), "b": normal(6, 8, seed=1)}
    proto = in_half(model(nodes, [value("x", [2, 8])], [value("y", None)], constants), element)
    graph = graph_of(proto, tmp_path)
    assert [step.name for step in graph.nodes.values()] == ["fc"]
    a, b = (rounded(constants[name], element) for name in "ab")
    expected = rounded(rounded(a * b, element) - a, element).T
    folded = graph.weights.read("t")
    assert folded.dtype == DTYPES[element]
    np.testing.assert_array_equal(folded.astype(np.float32), expected)


@pytest.mark.parametrize("element", HALF)
@pytest.mark.parametrize("last_token", [3, 15])
def test_tensors_inside_branches_are_rounded_too(
    element: int, last_token: int, tmp_path: Path
) -> None:
    graph = SMALL.graph(element, tmp_path)
    ids = integers([[1, 2, 3, 0, last_token], [2, 2, 9, 1, 0]])
    found = {
        name: array.astype(np.float32)
        for name, array in assert_taps_change_nothing(graph, {"ids": ids}).items()
    }
    r1, r2 = found["r1"], found["r2"]
    if last_token > 12:
        squared = rounded(r1 * r1, element)
        np.testing.assert_array_equal(found["choice/then_branch/sq"].reshape(r1.shape), squared)
        np.testing.assert_allclose(r2, np.tanh(squared), rtol=0.01)
        np.testing.assert_array_equal(r2, rounded(r2, element))
    else:
        np.testing.assert_array_equal(r2, -r1)


@pytest.mark.parametrize("element", HALF)
def test_loops_carry_half_precision(element: int, tmp_path: Path) -> None:
    """State, scan outputs, a captured constant and a constant initial state."""
    step = body(
        [
            node("Mul", ["h", "w"], ["scaled"]),
            node("Add", ["scaled", "x"], ["next"]),
            node("Identity", ["next"], ["seen"]),
            node("Identity", ["go"], ["still"]),
        ],
        [value("i", [], TensorProto.INT64), value("go", [], TensorProto.BOOL), value("h", [4])],
        ["still", "next", "seen"],
        elements={"still": TensorProto.BOOL},
    )
    nodes = [node("Loop", ["n", "", "h0"], ["h_end", "all"], "loop", body=step)]
    nodes += [node("Neg", ["h_end"], ["y"], "neg"), node("Exp", ["all"], ["z"], "exp")]
    constants: dict[str, Array] = {
        "n": integers(3),
        "h0": normal(4, seed=1),
        "w": normal(4, seed=2),
    }
    outputs = [value("y", [4]), value("z", [3, 4])]
    proto = in_half(model(nodes, [value("x", [4])], outputs, constants, opset=16), element)
    graph = graph_of(proto, tmp_path)
    x = rounded(normal(4, seed=3), element)
    h, w = (rounded(constants[name], element) for name in ("h0", "w"))
    for _ in range(3):
        h = rounded(rounded(h * w, element) + x, element)
    fed = {"x": x.astype(FED[element])}
    found = assert_taps_change_nothing(graph, fed)
    np.testing.assert_array_equal(found["h_end"].astype(np.float32), h)
    np.testing.assert_array_equal(found["y"].astype(np.float32), -h)


def test_nothing_of_bfloat16_enters_or_leaves_a_widened_graph(tmp_path: Path) -> None:
    """Inputs are rounded; outputs that are moved weights, weights or inputs' views are float32."""
    nodes = [
        node("Gather", ["w", "rows"], ["taken"], "take"),
        node("Reshape", ["x", "shape"], ["flat"], "flat"),
        node("Concat", ["taken", "flat"], ["joined"], "join", axis=0),
        node("Cast", ["ids"], ["counts"], "counts", to=BFLOAT16),
        node("CastLike", ["counts", "w"], ["again"], "again"),
    ]
    constants: dict[str, Array] = {"w": normal(5, 4).astype(ml_dtypes.bfloat16)}
    constants |= {"rows": integers([3, 1]), "shape": integers([-1, 4])}
    names = ["taken", "flat", "joined", "counts", "again", "w"]
    proto = model(
        nodes,
        [value("x", [2, 2, 4], BFLOAT16), value("ids", [2], TensorProto.INT64)],
        [value(name, None, BFLOAT16) for name in names],
        constants,
        opset=15,
    )
    x, w = normal(2, 2, 4, seed=3), constants["w"].astype(np.float32)
    wide = widened(proto, None, EXECUTION)
    session = measuring_session(wide.SerializeToString(), None, EXECUTION)
    assert {entry.type for entry in (*session.get_inputs(), *session.get_outputs())} == {
        "tensor(float)",
        "tensor(int64)",
    }
    ids = integers([257, 7])
    found = dict(zip(names, run(session, names, {"x": x, "ids": ids}), strict=True))
    flat = rounded(x, BFLOAT16).reshape(4, 4)
    expected = {"taken": w[[3, 1]], "flat": flat, "joined": np.concatenate([w[[3, 1]], flat])}
    expected |= {"counts": floats([256, 7]), "again": floats([256, 7]), "w": w}
    for name in names:
        np.testing.assert_array_equal(found[name], expected[name], err_msg=name)
    feeds: dict[str, Array] = {"x": x, "ids": ids}
    given = proto.SerializeToString()
    within = run_within(given, None, feeds, names[:5], 1 << 20, EXECUTION, base_bytes=0)
    for name in names[:5]:
        assert within[name].tobytes() == found[name].tobytes()


def test_types_of_contributed_operators_inside_branches_are_found(tmp_path: Path) -> None:
    then = body([node("QuickGelu", ["x"], ["g"], "gelu", domain="com.microsoft")], [], ["g"])
    other = body([node("Neg", ["x"], ["n"])], [], ["n"])
    then.node.append(node("Neg", ["g"], ["m"]))
    then.output[0].name = "m"
    nodes = [
        node("ReduceMax", ["x"], ["top"], "top", keepdims=0),
        node("Greater", ["top", "one"], ["is_large"], "is_large"),
        node("If", ["is_large"], ["y"], "choice", then_branch=then, else_branch=other),
    ]
    inputs, outputs = [value("x", [4])], [value("y", [4])]
    proto = model(
        nodes, inputs, outputs, {"one": floats(1)}, opset=17, domains={"com.microsoft": 1}
    )
    for element in HALF:
        graph = graph_of(in_half(proto, element), tmp_path)
        taps = find_taps(graph)
        assert "choice/then_branch/g" in taps.tensors
        x = floats([-1, 0.5, 2, 3])
        found = tapped_values(graph, taps, {"x": x.astype(FED[element])})
        gelu = rounded(x / (1 + np.exp(-1.702 * x)), element)
        inner = found["choice/then_branch/g"].ravel()
        np.testing.assert_allclose(inner, gelu, rtol=0.01)
        np.testing.assert_array_equal(inner, rounded(inner, element))


def test_samples_are_wanted_in_what_can_be_fed(tmp_path: Path) -> None:
    """float16 as it is; bfloat16, which NumPy has not, as float32."""
    proto = model([node("Relu", ["x"], ["y"], "r")], [value("x", ["n", 4])], [value("y", None)])
    for element, dtype in ((FLOAT16, "float16"), (BFLOAT16, "float32")):
        graph = graph_of(in_half(proto, element), tmp_path)
        assert [spec.dtype for spec in input_specs(graph)] == [dtype]
        wrong = np.float32 if element == FLOAT16 else np.float16
        source = HeldSamples(samples=[{"x": normal(4).astype(wrong)}])
        with pytest.raises(DataError, match="QD304") as caught:
            prepare(graph.model, source, CalibrationSettings(), EXECUTION, graph=graph)
        assert f"preprocess.dtype={dtype}" in caught.value.mend


def test_the_runtime_is_asked_for_types_with_float16_in_the_place_of_bfloat16() -> None:
    nodes = [
        node("QuickGelu", ["x"], ["g"], "gelu", domain="com.microsoft"),
        node("Shape", ["g"], ["s"], "shape"),
    ]
    domains = {"com.microsoft": 1}
    for element in (*HALF, TensorProto.FLOAT):
        proto = model(
            nodes, [value("x", [4], element)], [value("g", None, element)], domains=domains
        )
        found = runtime_types(proto, ["g", "s"])
        assert {name: kind for name, (kind, _) in found.items()} == {
            "g": element,
            "s": TensorProto.INT64,
        }


@pytest.mark.parametrize("element", HALF)
def test_weights_are_in_single_precision_one_at_a_time(element: int, tmp_path: Path) -> None:
    """So a model in half precision needs about half of what it needs in float32."""
    width, n = 128, 10
    names = [f"w{i}" for i in range(n)]
    chain = ["x", *(f"h{i}" for i in range(n))]
    nodes = [node("MatMul", [chain[i], names[i]], [chain[i + 1]], f"m{i}") for i in range(n)]
    constants = {name: normal(width, width, seed=i) / 12 for i, name in enumerate(names)}
    proto = model(nodes, [value("x", ["b", width])], [value(chain[-1], None)], constants)
    path = tmp_path / "model.onnx"
    onnx.save(in_half(proto, element), path, save_as_external_data=True, size_threshold=0)
    graph = Graph(freeze(load_model(path)))
    taps = find_taps(graph, [chain[-1]])
    (found,) = cut(graph, taps, {"x": (2, width)}, 1 << 40, base_bytes=0)
    one = 4 * width * width
    assert found.weight_bytes == n * one // 2
    (tight,) = cut(graph, taps, {"x": (2, width)}, found.weight_bytes + 7 * one, base_bytes=0)
    assert tight.is_frugal
    assert tight.estimate_bytes <= found.weight_bytes + 7 * one
    for segments in ((tight,), cut_at(graph, taps, {"x": (2, width)}, range(100))):
        for segment in segments:
            order = [step.op_type for step in ModelProto.FromString(segment.graph_bytes).graph.node]
            first = order.index("MatMul") if "MatMul" in order else len(order)
            assert order[:first].count("Cast") <= 4


def test_what_the_estimate_cannot_know_is_named(tmp_path: Path) -> None:
    nodes = [
        node("NonZero", ["x"], ["places"], "places"),
        node("Cast", ["places"], ["numbers"], "numbers", to=FLOAT16),
        node("Exp", ["numbers"], ["grown"], "grow"),
        node("Relu", ["x"], ["y"], "relu"),
    ]
    outputs = [value("grown", None, FLOAT16), value("y", None)]
    graph = graph_of(model(nodes, [value("x", ["n", 4])], outputs), tmp_path)
    taps = find_taps(graph)
    for segments in (
        cut(graph, taps, {"x": (2, 4)}, 1 << 30),
        cut_at(graph, taps, {"x": (2, 4)}, range(20)),
    ):
        assert unknown_sizes(graph, segments) == ("places", "numbers", "grown")
    assert unknown_sizes(graph, [whole(graph, taps)]) == ()
