"""Cutting a model: what goes into the segments, what is refused, what memory it really takes."""

from __future__ import annotations

import os
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from onnx import ModelProto, TensorProto, helper

from qdist.errors import ModelError
from qdist.model.channels import channel_axes
from qdist.model.cutting import plan_at, plan_cuts
from qdist.model.flow import Flow
from qdist.model.freeze import FrozenModel, freeze
from qdist.model.graph import Graph
from qdist.model.half import widened
from qdist.model.loading import load_model
from qdist.model.segments import cut, cut_at, whole
from qdist.model.session import Execution, measuring_session, run
from qdist.model.taps import find_taps
from qdist.model.within import run_within
from qdist.stats.observer import Observer, ObserverSpec
from tests.onnx_models import EXECUTION, frozen_from, integers, model, normal, samples_of, value

MIB = 1 << 20
WIDTH = 1024
N_LAYERS = 16


def chain(folder: Path, n_layers: int = 4, width: int = 64) -> FrozenModel:
    """h = h + relu(h @ w), with external weights of width * width * 4 bytes each."""
    rng = np.random.default_rng(0)
    nodes, weights = [], []
    with (folder / "model.data").open("wb") as file:
        for i in range(n_layers):
            weight = TensorProto(name=f"w{i}", data_type=TensorProto.FLOAT, dims=[width, width])
            weight.data_location = TensorProto.EXTERNAL
            n_bytes = str(width * width * 4)
            for key, text in (
                ("location", "model.data"),
                ("offset", str(file.tell())),
                ("length", n_bytes),
            ):
                weight.external_data.add(key=key, value=text)
            weights.append(weight)
            array = rng.normal(size=(width, width)).astype(np.float32) / np.float32(width**0.5)
            file.write(array.tobytes())
            nodes += [
                helper.make_node("MatMul", [f"h{i}", f"w{i}"], [f"m{i}"], f"matmul{i}"),
                helper.make_node("Relu", [f"m{i}"], [f"r{i}"], f"relu{i}"),
                helper.make_node("Add", [f"h{i}", f"r{i}"], [f"h{i + 1}"], f"add{i}"),
            ]
    ends = [value(name, ["b", width]) for name in ("h0", f"h{n_layers}")]
    graph = helper.make_graph(nodes, "chain", ends[:1], ends[1:], weights)
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8)
    (folder / "model.onnx").write_bytes(proto.SerializeToString())
    return freeze(load_model(folder / "model.onnx"))


def test_cuts_fall_on_the_residual_stream_and_copy_no_weight(tmp_path: Path) -> None:
    frozen = chain(tmp_path)
    graph = Graph(frozen)
    taps = find_taps(graph)
    (one,) = cut(graph, taps, {"h0": (2, 64)}, 1 << 30, base_bytes=0)
    assert not one.is_frugal
    segments = cut(graph, taps, {"h0": (2, 64)}, 29 * 80 * 1024, base_bytes=0)
    assert len(segments) > 2
    assert sum(segment.weight_bytes for segment in segments) == one.weight_bytes == 4 * 64 * 64 * 4
    for before, after in pairwise(segments):
        assert before.sends == after.receives
        assert len(before.sends) == 1
    assert all(segment.sends[0].startswith("h") for segment in segments[1:-1])
    assert [tensor for s in segments for tensor in s.tensors] == list(taps.tensors)
    for segment in segments:
        assert segment.is_frugal
        assert len(segment.graph_bytes) < 3000
        proto = ModelProto.FromString(segment.graph_bytes)
        for weight in proto.graph.initializer:
            assert weight.data_location == TensorProto.EXTERNAL


def test_a_budget_that_one_operator_breaks_is_refused_with_the_smallest_that_would_do(
    tmp_path: Path,
) -> None:
    graph = Graph(chain(tmp_path, width=2048))
    taps = find_taps(graph)
    shapes = {"h0": (1, 2048)}
    with pytest.raises(ModelError, match="QD211") as info:
        cut(graph, taps, shapes, 10 * MIB, base_bytes=MIB)
    assert "weight w" in info.value.where
    assert "MatMul matmul" in info.value.where
    wanted = int(info.value.mend.split(" MiB")[0].split()[-1])
    assert 16 < wanted < 64
    assert f"{wanted} MiB" in info.value.got
    segments = cut(graph, taps, shapes, wanted * MIB, base_bytes=MIB)
    assert max(segment.estimate_bytes for segment in segments) <= wanted * MIB
    with pytest.raises(ModelError, match="QD211"):
        cut(graph, taps, shapes, (wanted - 2) * MIB, base_bytes=MIB)


def test_a_tapped_tensor_that_is_too_large_is_named(tmp_path: Path) -> None:
    proto = model(
        [
            helper.make_node("Relu", ["x"], ["r"], "relu"),
            helper.make_node("Expand", ["r", "to"], ["big"], "expand"),
            helper.make_node("ReduceSum", ["big"], ["y"], "sum"),
        ],
        [value("x", [1, 16])],
        [value("y", None)],
        {"to": integers([1 << 20, 16])},
    )
    graph = Graph(frozen_from(proto, tmp_path / "m.onnx"))
    with pytest.raises(ModelError, match="QD211") as info:
        cut(graph, find_taps(graph), {"x": (1, 16)}, 32 * MIB, base_bytes=0)
    assert "tensor big" in info.value.where


def test_every_kind_of_input_shapes_has_to_fit(tmp_path: Path) -> None:
    graph = Graph(chain(tmp_path))
    taps = find_taps(graph)
    small, large = {"h0": (1, 64)}, {"h0": (5000, 64)}
    estimates = [
        cut(graph, taps, kinds, 1 << 30, base_bytes=0)[0].estimate_bytes
        for kinds in (small, large, [small, large])
    ]
    assert estimates[0] < estimates[1] == estimates[2]


def test_weights_inside_the_graph_count_whichever_segment_runs(tmp_path: Path) -> None:
    nodes = [helper.make_node("MatMul", [f"h{i}", f"w{i}"], [f"h{i + 1}"]) for i in range(4)]
    constants = {f"w{i}": normal(512, 512, seed=i) for i in range(4)}
    proto = model(nodes, [value("h0", ["b", 512])], [value("h4", None)], constants)
    plan = plan_cuts(
        proto, [{"h0": (1, 512)}], 12 * MIB, folder=None, execution=EXECUTION, base_bytes=0
    )
    assert plan.estimate.inline_bytes == 4 * MIB
    assert len(plan.needs) > 1
    assert max(need.peak_bytes for need in plan.needs) + 4 * MIB <= 12 * MIB
    assert plan.estimate.held_bytes == 4 * MIB


def test_a_weight_counts_for_each_kernel_that_packs_it(tmp_path: Path) -> None:
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["a"]),
        helper.make_node("MatMul", ["a", "w"], ["b"]),
        helper.make_node("Add", ["b", "w"], ["y"]),
    ]
    proto = model(nodes, [value("x", [64, 64])], [value("y", None)], {"w": normal(64, 64)})
    plan = plan_at(proto, [{"x": (64, 64)}], [], folder=None, execution=EXECUTION)
    assert plan.needs[0].weight_bytes == 3 * 64 * 64 * 4


def test_what_depends_on_constants_alone_goes_with_its_readers() -> None:
    nodes = [
        helper.make_node("Transpose", ["w"], ["wt"]),
        helper.make_node("MatMul", ["x", "wt"], ["a"]),
        helper.make_node("Relu", ["a"], ["r"]),
        helper.make_node("MatMul", ["r", "wt"], ["y"]),
    ]
    proto = model(nodes, [value("x", [4, 4])], [value("y", None)], {"w": normal(4, 4)})
    flow = Flow(proto)
    assert [step.node.op_type for step in flow.steps] == ["MatMul", "Relu", "MatMul"]
    assert flow.steps[2].constants == ("wt",)
    assert flow.steps[2].weights == ("w",)
    assert flow.crossing() == [[], ["a"], ["r"], []]


def test_an_unknown_output_is_refused(tmp_path: Path) -> None:
    frozen = chain(tmp_path)
    feeds = {"h0": normal(1, 64)}
    with pytest.raises(ModelError, match="QD208"):
        run_within(frozen.graph_bytes, frozen.data_folder, feeds, ["nothing"], 1 << 30, EXECUTION)


@pytest.mark.parametrize("budget", [400_000, 150_000, 110_000])
def test_half_precision_is_rounded_whether_or_not_there_is_a_cut(budget: int) -> None:
    """The runtime leaves the rounding out between two operators without a float16 kernel."""
    nodes, constants, h = [], {}, "x"
    for i in range(6):
        constants[f"w{i}"] = (normal(64, 64, seed=i) / 8).astype(np.float16)
        nodes.append(helper.make_node("MatMul", [h, f"w{i}"], [f"m{i}"], f"matmul{i}"))
        nodes.append(helper.make_node("Sigmoid", [f"m{i}"], [h := f"s{i}"], f"sigmoid{i}"))
    element = TensorProto.FLOAT16
    proto = model(nodes, [value("x", ["b", 64], element)], [value(h, None, element)], constants)
    feeds = {"x": normal(2, 64).astype(np.float16)}
    wide = widened(proto, None, EXECUTION)
    (expected,) = run(measuring_session(wide.SerializeToString(), None, EXECUTION), [h], feeds)
    plan = plan_cuts(wide, [{"x": (2, 64)}], budget, folder=None, execution=EXECUTION, base_bytes=0)
    assert (len(plan.needs) > 1) == (budget < 400_000)
    found = run_within(proto.SerializeToString(), None, feeds, [h], budget, EXECUTION, base_bytes=0)
    assert found[h].tobytes() == expected.tobytes()


def test_channels_are_second_in_images_and_heads_and_last_in_tokens(tmp_path: Path) -> None:
    nodes = [
        helper.make_node("Conv", ["x", "k"], ["c"], "conv"),
        helper.make_node("GlobalAveragePool", ["c"], ["g"], "pool"),
        helper.make_node("Reshape", ["g", "to"], ["t"], "reshape"),
        helper.make_node("Sigmoid", ["t"], ["s"], "sigmoid"),
        helper.make_node("Softmax", ["s"], ["p"], "softmax"),
        helper.make_node("ReduceMax", ["p"], ["m"], "max", keepdims=0),
        helper.make_node("Exp", ["m"], ["e"], "exp"),
    ]
    proto = model(
        nodes,
        [value("x", ["b", 3, 32])],
        [value("e", None)],
        {"k": normal(8, 3, 3), "to": integers([-1, 8])},
    )
    graph = Graph(frozen_from(proto, tmp_path / "m.onnx"))
    axes = channel_axes(graph, find_taps(graph))
    assert axes == {"x": 1, "c": 1, "g": 1, "s": 1, "p": 1}
    four = model(
        [helper.make_node("Relu", ["x"], ["y"], "relu")],
        [value("x", ["b", 2, 5, 7])],
        [value("y", None)],
    )
    graph = Graph(frozen_from(four, tmp_path / "four.onnx"))
    assert channel_axes(graph, find_taps(graph)) == {"x": 1, "y": 1}
    three = model(
        [helper.make_node("Tanh", ["x"], ["y"], "tanh")],
        [value("x", ["b", 5, 7])],
        [value("y", None)],
    )
    graph = Graph(frozen_from(three, tmp_path / "three.onnx"))
    assert channel_axes(graph, find_taps(graph)) == {"x": 2, "y": 2}


# The real peak, in a process of its own (this file as a program).


def observe(folder: Path, extra_bytes: int) -> None:
    """Calibrate a chain of 64 MiB within what this process holds and ``extra_bytes``."""
    from qdist.memory import resident_bytes

    frozen = freeze(load_model(folder / "model.onnx"))
    graph = Graph(frozen)
    taps = find_taps(graph)
    batches = [((str(i),), lambda i=i: [{"h0": normal(16, WIDTH, seed=i)}]) for i in range(4)]
    warm = whole_observer(folder / "small", 8)
    warm.observe([(("w",), lambda: [{"h0": normal(16, 8)}])])
    base = resident_bytes()
    assert base is not None
    segments = cut(graph, taps, {"h0": (16, WIDTH)}, base + extra_bytes, base_bytes=base)
    spec = ObserverSpec(
        segments=segments,
        data_folder=frozen.data_folder,
        taps=taps,
        execution=Execution(),
        spool_bytes=0,
    )
    record = Observer(spec).observe(batches)
    status = Path("/proc/self/status").read_text().splitlines()
    peak = next(int(line.split()[1]) for line in status if line.startswith("VmHWM:")) * 1024
    print(len(segments), peak - base, record.digest)


def whole_observer(folder: Path, width: int) -> Observer:
    frozen = freeze(load_model(folder / "model.onnx"))
    graph = Graph(frozen)
    taps = find_taps(graph)
    return Observer(
        ObserverSpec(
            segments=(whole(graph, taps),),
            data_folder=frozen.data_folder,
            taps=taps,
            execution=Execution(),
        )
    )


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's /proc")
def test_the_real_peak_stays_within_the_budget(tmp_path: Path) -> None:
    chain(tmp_path, N_LAYERS, WIDTH)
    (tmp_path / "small").mkdir()
    chain(tmp_path / "small", 2, 8)
    found = []
    for extra in (40 * MIB, 1 << 30):
        result = subprocess.run(
            [sys.executable, "-m", "tests.unit.test_segments", str(tmp_path), str(extra)],
            cwd=Path(__file__).resolve().parents[2],
            env={**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert result.returncode == 0, result.stderr[-3000:]
        n_segments, peak, digest = result.stdout.split()
        found.append((int(n_segments), int(peak), digest))
    (n_cut, cut_peak, cut_digest), (n_whole, whole_peak, whole_digest) = found
    assert n_whole == 1 < n_cut
    # Without the cut the weights alone are more.
    assert cut_peak <= 40 * MIB < 64 * MIB < whole_peak
    assert cut_digest == whole_digest


def test_a_segment_of_inputs_alone_measures_them(tmp_path: Path) -> None:
    frozen = chain(tmp_path, 1)
    graph = Graph(frozen)
    taps = find_taps(graph, ["h0"])
    assert taps.tensors == ("h0",)
    (segment,) = cut(graph, taps, {"h0": (1, 64)}, 1 << 30)
    assert segment.tensors == ("h0",)
    (again,) = cut_at(graph, taps, {"h0": (1, 64)}, [1])
    assert again.tensors == ("h0",)
    source = samples_of("h0", 64, n=1)
    spec = ObserverSpec(
        segments=(again,), data_folder=frozen.data_folder, taps=taps, execution=EXECUTION
    )
    record = Observer(spec).observe([(("0",), lambda: [source.load("0000")])])
    assert record.histogram("h0").n_values == 64


if __name__ == "__main__":
    observe(Path(sys.argv[1]), int(sys.argv[2]))
