"""Statistics are bit-identical however a model is cut."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import ModelProto, NodeProto, TensorProto, ValueInfoProto, helper

from qdist.data.source import Feeds
from qdist.errors import ModelError
from qdist.model.channels import channel_axes
from qdist.model.freeze import FrozenModel
from qdist.model.graph import Graph
from qdist.model.half import widened
from qdist.model.segments import Segment, cut, cut_at, whole
from qdist.model.session import measuring_session, run
from qdist.model.stretches import Stretches
from qdist.model.taps import TapTable, find_taps
from qdist.model.within import run_within
from qdist.stats.observer import Observer, ObserverSpec
from tests.onnx_models import EXECUTION, Array, floats, frozen_from, integers, model, normal, value

Op = Callable[..., str]


class Writer:
    """Nodes and constants of a model, written down as they are called for."""

    def __init__(self) -> None:
        self.nodes: list[NodeProto] = []
        self.constants: dict[str, Array] = {}

    def __call__(self, op_type: str, *inputs: str, out: str, **attributes: Any) -> str:
        node = helper.make_node(op_type, list(inputs), [out], f"{out}_node", **attributes)
        self.nodes.append(node)
        return out

    def constant(self, name: str, array: Array) -> str:
        self.constants[name] = array
        return name


def transformer(n_blocks: int = 2, width: int = 16, n_heads: int = 2) -> ModelProto:
    """Token ids to logits; attention written out, the head's weight tied to the embedding."""
    w = Writer()
    w.constant("split", integers([0, 0, n_heads, width // n_heads]))
    w.constant("join", integers([0, 0, width]))
    w.constant("scale", floats(width**-0.5))
    w.constant("two", floats(2))
    w.constant("eps", floats(1e-5))
    mask = w("Unsqueeze", w("Cast", "mask", out="m0", to=TensorProto.FLOAT), "ax", out="m1")
    w.constant("ax", integers([1, 2]))
    mask = w("Mul", w("Sub", mask, w.constant("one", floats(1)), out="m2"), "big", out="m3")
    w.constant("big", floats(1e4))
    h = w("Gather", w.constant("emb", normal(32, width, seed=9)), "ids", out="h0")
    for i in range(n_blocks):
        p = f"b{i}."
        centred = w("Sub", h, w("ReduceMean", h, out=p + "mean", axes=[-1]), out=p + "c")
        var = w("ReduceMean", w("Pow", centred, "two", out=p + "sq"), out=p + "var", axes=[-1])
        std = w("Sqrt", w("Add", var, "eps", out=p + "ve"), out=p + "std")
        x = w("Div", centred, std, out=p + "x")
        heads = {}
        for j, (s, perm) in enumerate(
            (("q", [0, 2, 1, 3]), ("k", [0, 2, 3, 1]), ("v", [0, 2, 1, 3]))
        ):
            weight = w.constant(p + "w" + s, normal(width, width, seed=10 * i + j))
            split = w("Reshape", w("MatMul", x, weight, out=p + s), "split", out=p + s + "r")
            heads[s] = w("Transpose", split, out=p + s + "t", perm=perm)
        scores = w("MatMul", heads["q"], heads["k"], out=p + "s")
        scores = w("Add", w("Mul", scores, "scale", out=p + "ss"), mask, out=p + "sm")
        mixed = w("MatMul", w("Softmax", scores, out=p + "p", axis=-1), heads["v"], out=p + "a")
        mixed = w("Transpose", mixed, out=p + "at", perm=[0, 2, 1, 3])
        weight = w.constant(p + "wo", normal(width, width, seed=10 * i + 3))
        mixed = w("MatMul", w("Reshape", mixed, "join", out=p + "ar"), weight, out=p + "o")
        h = w("Add", h, mixed, out=f"h{i + 1}")
    # A constant that freezing would fold; here it stays, since the graph is not frozen further.
    tied = w("Transpose", "emb", out="embT", perm=[1, 0])
    w("MatMul", h, tied, out="logits")
    w.nodes.sort(key=lambda node: node.output[0] != "embT")
    ints = TensorProto.INT64
    return model(
        w.nodes,
        [value("ids", ["b", "s"], ints), value("mask", ["b", "s"], ints)],
        [value("logits", ["b", "s", 32])],
        w.constants,
    )


def branches() -> ModelProto:
    """A convolutional net whose branches join, with one weight in two places."""
    w = Writer()
    kernel = w.constant("k", normal(8, 8, 3, 3, seed=1))
    x = w("Conv", "x", w.constant("k0", normal(8, 3, 3, 3)), out="c0", pads=[1, 1, 1, 1])
    left = w("Relu", w("Conv", x, kernel, out="c1", pads=[1, 1, 1, 1]), out="r1")
    right = w("Sigmoid", w("Conv", x, kernel, out="c2", pads=[1, 1, 1, 1]), out="r2")
    joined = w("Concat", w("Mul", left, right, out="j"), x, out="cat", axis=1)
    pooled = w("GlobalAveragePool", joined, out="gap")
    flat = w("Flatten", pooled, out="flat")
    w("Gemm", flat, w.constant("g", normal(16, 5, seed=3)), out="y")
    return model(w.nodes, [value("x", ["b", 3, 8, 8])], [value("y", ["b", 5])], w.constants)


def choice() -> ModelProto:
    """An ``If`` whose branches read tensors and weights of the outer graph."""
    w = Writer()
    w("MatMul", "x", w.constant("w", normal(6, 6)), out="a")
    w("Relu", "a", out="r")
    w("ReduceSum", "a", out="sum", keepdims=0)
    w("Greater", "sum", w.constant("zero", floats(0)), out="positive")
    w.constant("u", normal(6, 6, seed=4))

    def body(name: str, op_type: str, other: str) -> Any:
        node = helper.make_node(op_type, ["r", other], [f"{name}_out"], f"{name}_node")
        return helper.make_graph([node], name, [], [value(f"{name}_out", None)])

    w(
        "If",
        "positive",
        out="chosen",
        then_branch=body("then", "MatMul", "u"),
        else_branch=body("else", "Add", "a"),
    )
    w("Add", "chosen", "x", out="z")
    w("Tanh", "z", out="y")
    return model(w.nodes, [value("x", ["b", 6])], [value("y", ["b", 6])], w.constants)


def half() -> ModelProto:
    """Float16 throughout."""
    w = Writer()
    h = "x"
    for i in range(3):
        weight = w.constant(f"w{i}", (normal(8, 8, seed=i) / 3).astype(np.float16))
        h = w("Sigmoid", w("MatMul", h, weight, out=f"m{i}"), out=f"s{i}")
        h = w("Softmax", h, out=f"p{i}", axis=-1)
    element = TensorProto.FLOAT16
    return model(
        w.nodes, [value("x", ["b", 8], element)], [value(h, ["b", 8], element)], w.constants
    )


def token_feeds(seed: int, n: int) -> Feeds:
    rng = np.random.default_rng(seed)
    mask = np.ones((n, 6), np.int64)
    mask[:, 5] = seed % 2
    return {"ids": rng.integers(0, 32, (n, 6)), "mask": mask}


def sampler(shape: tuple[int, ...], dtype: Any = np.float32) -> Callable[[int, int], Feeds]:
    return lambda seed, n: {"x": normal(n, *shape, seed=seed + 50).astype(dtype)}


@dataclass(frozen=True, kw_only=True)
class Case:
    frozen: FrozenModel
    graph: Graph
    taps: TapTable
    feeds: Callable[[int, int], Feeds]

    def shapes(self, n: int) -> Mapping[str, tuple[int, ...]]:
        return {name: array.shape for name, array in self.feeds(0, n).items()}


MAKERS: dict[str, tuple[Callable[[], ModelProto], Callable[[int, int], Feeds]]] = {
    "transformer": (transformer, token_feeds),
    "branches": (branches, sampler((3, 8, 8))),
    "choice": (choice, sampler((6,))),
    "half": (half, sampler((8,), np.float16)),
}


@cache
def case(name: str) -> Case:
    make, feeds = MAKERS[name]
    frozen = frozen_from(make(), Path(mkdtemp()) / "model.onnx")
    graph = Graph(frozen)
    return Case(frozen=frozen, graph=graph, taps=find_taps(graph), feeds=feeds)


def digest(
    case: Case, segments: Sequence[Segment], seeds: Sequence[int], n: int, **more: Any
) -> str:
    spec = ObserverSpec(
        segments=tuple(segments),
        data_folder=case.frozen.data_folder,
        taps=case.taps,
        execution=EXECUTION,
        channel_axes=channel_axes(case.graph, case.taps),
        **more,
    )
    batches = [
        (tuple(f"{seed}.{i}" for i in range(n)), lambda seed=seed: [case.feeds(seed, n)])
        for seed in seeds
    ]
    record = Observer(spec).observe(batches)
    assert record.n_samples == len(seeds) * n
    assert record.tensors == case.taps.tensors
    return record.digest


def is_refused(action: Callable[[], object]) -> bool:
    """Whether the budget is too small; any other error is one."""
    try:
        action()
    except ModelError as error:
        if error.code != "QD211":
            raise
        return True
    return False


@pytest.mark.parametrize("name", list(MAKERS))
@given(
    positions=st.lists(st.integers(1, 80), max_size=12),
    seeds=st.lists(st.integers(0, 9), min_size=1, max_size=3, unique=True),
    n=st.integers(1, 3),
    spool_bytes=st.sampled_from([0, 1000, 1 << 20]),
)
@settings(max_examples=12)
def test_records_are_the_same_wherever_a_model_is_cut(
    name: str, positions: list[int], seeds: list[int], n: int, spool_bytes: int
) -> None:
    it = case(name)
    segments = cut_at(it.graph, it.taps, it.shapes(n), positions)
    expected = digest(it, [whole(it.graph, it.taps)], seeds, n)
    assert digest(it, segments, seeds, n, spool_bytes=spool_bytes) == expected


@pytest.mark.parametrize("name", list(MAKERS))
@given(
    stretch_bytes=st.one_of(st.just(1), st.integers(1, 4000)),
    turns=st.lists(st.tuples(st.integers(0, 9), st.integers(1, 2)), min_size=1, max_size=6),
    wanted=st.lists(st.integers(0, 99), max_size=6),
)
@settings(max_examples=12)
def test_stretches_put_out_the_bits_of_one_session(
    name: str, stretch_bytes: int, turns: list[tuple[int, int]], wanted: list[int]
) -> None:
    it = case(name)
    graph_bytes, folder = whole(it.graph, it.taps).graph_bytes, it.frozen.data_folder
    session = measuring_session(graph_bytes, folder, EXECUTION)
    every = [output.name for output in session.get_outputs()]
    outputs = list(dict.fromkeys(every[i % len(every)] for i in wanted)) or every
    runner = Stretches(graph_bytes, outputs, folder, EXECUTION, stretch_bytes=stretch_bytes)
    for seed, n in turns:
        # The first feeds decide where to divide; others may have another batch. Those shaped like
        # the ones before run on memory where earlier outputs lay.
        feeds = it.feeds(seed, n)
        found = {
            name: (array.dtype, array.tobytes())
            for part in runner.parts(feeds)
            for name, array in part.arrays.items()
        }
        assert sorted(found) == sorted(outputs)
        for output, array in zip(outputs, run(session, outputs, feeds), strict=True):
            assert found[output] == (array.dtype, array.tobytes())
    if stretch_bytes == 1 and outputs == every:
        assert len(runner) > len(every) // 2


@pytest.mark.parametrize("name", list(MAKERS))
def test_records_are_the_same_when_every_step_is_a_segment(name: str) -> None:
    it = case(name)
    segments = cut_at(it.graph, it.taps, it.shapes(2), range(1000))
    assert len(segments) >= len(it.graph.nodes) * 3 // 4
    assert digest(it, segments, [1, 2], 2) == digest(it, [whole(it.graph, it.taps)], [1, 2], 2)


@pytest.mark.parametrize("name", list(MAKERS))
@given(share=st.floats(0, 1))
@settings(max_examples=8)
def test_every_budget_that_is_accepted_is_kept_and_gives_the_same_record(
    name: str, share: float
) -> None:
    it = case(name)
    shapes = it.shapes(2)
    (most,) = cut(it.graph, it.taps, shapes, 1 << 30, base_bytes=0)
    budget = int(share * most.estimate_bytes)
    if is_refused(lambda: cut(it.graph, it.taps, shapes, budget, base_bytes=0)):
        return
    segments = cut(it.graph, it.taps, shapes, budget, base_bytes=0)
    assert all(segment.estimate_bytes <= budget for segment in segments)
    assert len(segments) > 1 or share > 0.4
    assert digest(it, segments, [3], 2) == digest(it, [whole(it.graph, it.taps)], [3], 2)


SMALL = {"transformer": 1 << 16, "branches": 1 << 16, "choice": 2048, "half": 4096}
"""Bytes at which a model that runs without taps is one segment; about half as many make several."""


@pytest.mark.parametrize("name", list(MAKERS))
@given(share=st.floats(0.3, 1))
@settings(max_examples=6)
def test_running_within_a_budget_gives_the_bits_of_the_whole(name: str, share: float) -> None:
    it = case(name)
    feeds = it.feeds(4, 2)
    made = list(dict.fromkeys([*it.graph.output_names, *list(it.graph.maker)[::3]]))
    proto = it.frozen.proto()
    del proto.graph.output[:]
    proto.graph.output.extend(ValueInfoProto(name=tensor) for tensor in made)
    wide = widened(proto, it.frozen.data_folder, EXECUTION)
    session = measuring_session(wide.SerializeToString(), it.frozen.data_folder, EXECUTION)
    expected = run(session, made, feeds)
    budget = int(share * SMALL[name])
    outputs = [*made, next(iter(feeds))]
    given_model = (it.frozen.graph_bytes, it.frozen.data_folder, feeds, outputs, budget, EXECUTION)
    if is_refused(lambda: run_within(*given_model, base_bytes=0)):
        return
    found = run_within(*given_model, base_bytes=0)
    assert list(found) == outputs
    for tensor, array in zip(made, expected, strict=True):
        assert found[tensor].tobytes() == array.tobytes()
