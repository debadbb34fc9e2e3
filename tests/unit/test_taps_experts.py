"""Experts of a mixture, and how many tokens each one saw."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from onnx import ModelProto, NodeProto, TensorProto

from qdist.model.experts import expert_notes, routed, tokens_seen
from qdist.model.graph import Graph
from qdist.model.taps import find_taps
from tests.onnx_models import Array, floats, integers, model, normal, value
from tests.tapped import assert_taps_change_nothing, body, graph_of, node, tapped_values

N_EXPERTS, WIDTH, HIDDEN = 4, 8, 12


def expert(i: int, gather: str) -> list[NodeProto]:
    """One expert as exporters write it: where it is chosen, rows are gathered and added back."""
    at = f"/moe/expert{i}"
    rows = {
        "GatherND": [node("GatherND", ["tokens", f"{at}/at"], [f"{at}/x"], f"{at}/gather")],
        "Gather": [
            node("Squeeze", [f"{at}/at", "minus_one"], [f"{at}/flat"], f"{at}/squeeze"),
            node("Gather", ["tokens", f"{at}/flat"], [f"{at}/x"], f"{at}/gather", axis=0),
        ],
        "Compress": [
            node("Compress", ["tokens", f"{at}/any"], [f"{at}/x"], f"{at}/gather", axis=0)
        ],
    }
    return [
        node("Equal", ["chosen", f"number{i}"], [f"{at}/hit"], f"{at}/equal"),
        node("Cast", [f"{at}/hit"], [f"{at}/hits"], f"{at}/hits", to=TensorProto.INT64),
        node("ReduceMax", [f"{at}/hits"], [f"{at}/some"], f"{at}/some", axes=[1], keepdims=0),
        node("Cast", [f"{at}/some"], [f"{at}/any"], f"{at}/any", to=TensorProto.BOOL),
        node("NonZero", [f"{at}/any"], [f"{at}/places"], f"{at}/nonzero"),
        node("Transpose", [f"{at}/places"], [f"{at}/at"], f"{at}/turn", perm=[1, 0]),
        *rows[gather],
        node("MatMul", [f"{at}/x", f"up{i}"], [f"{at}/h"], f"{at}/fc1"),
        node("Relu", [f"{at}/h"], [f"{at}/a"], f"{at}/relu"),
        node("Gemm", [f"{at}/a", f"down{i}"], [f"{at}/y"], f"{at}/fc2", transB=1),
        node("ScatterND", [f"sum{i}", f"{at}/at", f"{at}/y"], [f"sum{i + 1}"], f"{at}/scatter",
             reduction="add"),
    ]  # fmt: skip


def mixture(top: int = 1, gather: str = "GatherND") -> ModelProto:
    """A mixture of experts between two dense layers; input ``x`` [batch, tokens, WIDTH]."""
    constants: dict[str, Array] = {
        "router": np.eye(WIDTH, N_EXPERTS, dtype=np.float32),
        "top": integers([top]),
        "rows": integers([-1, WIDTH]),
        "minus_one": integers([1]),
        "zero": floats(0),
        "w": normal(WIDTH, WIDTH, seed=9),
    }
    nodes = [
        node("Reshape", ["x", "rows"], ["tokens"], "/moe/rows"),
        node("MatMul", ["tokens", "router"], ["logits"], "/moe/router"),
        node("TopK", ["logits", "top"], ["best", "chosen"], "/moe/topk", axis=1),
        node("Mul", ["tokens", "zero"], ["sum0"], "/moe/start"),
    ]
    for i in range(N_EXPERTS):
        constants[f"number{i}"] = integers(i)
        constants[f"up{i}"] = normal(WIDTH, HIDDEN, seed=i)
        constants[f"down{i}"] = normal(WIDTH, HIDDEN, seed=10 + i)
        nodes += expert(i, gather)
    nodes.append(node("MatMul", [f"sum{N_EXPERTS}", "w"], ["y"], "/after"))
    inputs = [value("x", ["b", "s", WIDTH])]
    return model(nodes, inputs, [value("y", None)], constants, opset=16)


def tokens_for(*counts: int) -> Array:
    """Tokens of which the router sends so many to each expert, as a batch of one."""
    rows = []
    for i, n in enumerate(counts):
        block = normal(n, WIDTH, seed=i) * 0.01
        block[:, i] += 5
        rows.append(block)
    return np.concatenate(rows)[None]


def counter(graph: Graph, *samples: Array) -> Any:
    """Counts of values by tensor, as a record of these samples holds them."""
    taps = find_taps(graph)
    total = dict.fromkeys(taps.tensors, 0)
    for x in samples:
        for name, array in ({"x": x} | tapped_values(graph, taps, {"x": x})).items():
            total[name] += array.size
    return total.get


@pytest.mark.parametrize("gather", ["GatherND", "Gather", "Compress"])
def test_experts_are_found_and_their_tokens_counted(gather: str, tmp_path: Path) -> None:
    graph = graph_of(mixture(gather=gather), tmp_path)
    experts = routed(graph)
    expected = [f"/moe/expert{i}/fc{j}" for i in range(N_EXPERTS) for j in (1, 2)]
    assert list(experts) == expected
    # What stands before the router and after the sum is no expert.
    assert {e.entered for e in experts.values()} == {"x"}
    counts = (40, 3, 0, 57)
    count = counter(graph, tokens_for(*counts))
    taps = find_taps(graph)
    for i, n in enumerate(counts):
        for j, width in ((1, WIDTH), (2, HIDDEN)):
            found = experts[f"/moe/expert{i}/fc{j}"]
            assert found.width == width
            assert tokens_seen(found, taps, count) == (n, 100)
    assert expert_notes(graph, taps, count) == [
        "expert /moe/expert1/fc1 and 1 more of its layers saw 3 tokens of 100: "
        "their ranges rest on little",
        "expert /moe/expert2/fc1 and 1 more of its layers saw 0 tokens of 100: "
        "their ranges are not measured",
    ]


def test_counts_add_up_over_samples(tmp_path: Path) -> None:
    graph = graph_of(mixture(), tmp_path)
    count = counter(graph, tokens_for(40, 0, 0, 0), tokens_for(0, 50, 1, 33))
    taps = find_taps(graph)
    (note,) = expert_notes(graph, taps, count)
    assert "expert2/fc1" in note
    assert "saw 1 tokens of 124" in note
    assert expert_notes(graph, taps, count, least_tokens=1) == []


def test_two_experts_for_each_token(tmp_path: Path) -> None:
    graph = graph_of(mixture(top=2), tmp_path)
    taps = find_taps(graph)
    x = tokens_for(10, 20, 30, 40)
    count = counter(graph, x)
    seen = [tokens_seen(e, taps, count) for n, e in routed(graph).items() if n.endswith("fc1")]
    best = np.argsort(-x[0, :, :N_EXPERTS], axis=1)[:, :2]
    assert seen == [(int((best == i).sum()), 100) for i in range(N_EXPERTS)]


def test_an_expert_without_tokens_runs_and_changes_nothing(tmp_path: Path) -> None:
    graph = graph_of(mixture(), tmp_path)
    x = tokens_for(5, 0, 7, 0)
    found = assert_taps_change_nothing(graph, {"x": x})
    assert found["/moe/expert1/x"].shape == (0, WIDTH)
    assert found["/moe/expert1/y"].shape == (0, WIDTH)
    hidden = np.maximum(x[0, :5] @ normal(WIDTH, HIDDEN, seed=0), 0)
    expected = hidden @ normal(WIDTH, HIDDEN, seed=10).T @ normal(WIDTH, WIDTH, seed=9)
    np.testing.assert_allclose(found["y"][:5], expected, rtol=1e-3, atol=1e-4)


def test_where_nothing_was_measured_nothing_is_said(tmp_path: Path) -> None:
    graph = graph_of(mixture(), tmp_path)
    taps = find_taps(graph, ["/moe/expert1/x"])
    count = counter(graph, tokens_for(9, 2, 0, 0))
    assert expert_notes(graph, taps, count) == [
        "expert /moe/expert1/fc1 and 1 more of its layers saw 2 tokens: their ranges rest on little"
    ]
    assert expert_notes(graph, find_taps(graph), lambda tensor: None) == []


def test_dense_models_have_no_experts(tmp_path: Path) -> None:
    """Rows gathered at positions that the user gives are as many as these."""
    proto = model(
        [
            node("Gather", ["table", "ids"], ["x"], "embed"),
            node("MatMul", ["x", "w"], ["y"], "fc"),
        ],
        [value("ids", ["n"], TensorProto.INT64)],
        [value("y", None)],
        {"table": normal(9, 4), "w": normal(4, 4)},
    )
    graph = graph_of(proto, tmp_path)
    assert routed(graph) == {}
    assert expert_notes(graph, find_taps(graph), lambda tensor: 0) == []


def test_layers_of_a_branch_that_never_ran(tmp_path: Path) -> None:
    then = body(
        [node("MatMul", ["x", "w"], ["h"], "fc1"), node("MatMul", ["h", "w"], ["r"], "fc2")],
        [],
        ["r"],
    )
    other = body([node("MatMul", ["x", "v"], ["r"], "fc")], [], ["r"])
    proto = model(
        [node("If", ["flag"], ["y"], "if", then_branch=then, else_branch=other)],
        [value("x", ["n", 4]), value("flag", [], TensorProto.BOOL)],
        [value("y", None)],
        {"w": normal(4, 4), "v": normal(4, 4)},
    )
    graph = graph_of(proto, tmp_path)
    taps = find_taps(graph)
    x = normal(50, 4)
    found = {"x": x} | tapped_values(graph, taps, {"x": x, "flag": np.array(True)})
    assert expert_notes(graph, taps, lambda tensor: found[tensor].size) == [
        "layer if/else_branch/fc saw 0 tokens of 50: its ranges are not measured"
    ]


def test_contrib_mixtures_keep_their_counts_to_themselves(tmp_path: Path) -> None:
    proto = model(
        [
            node("MatMul", ["x", "router"], ["p"], "router"),
            node("MoE", ["x", "p", "up", "", "down"], ["y"], "moe", domain="com.microsoft", k=1),
        ],
        [value("x", ["n", 8])],
        [value("y", None)],
        {"router": normal(8, 2), "up": normal(2, 8, 16), "down": normal(2, 16, 8)},
        domains={"com.microsoft": 1},
    )
    graph = graph_of(proto, tmp_path)
    taps = find_taps(graph)
    assert "how many tokens each one saw" in taps.untapped["moe"]
    assert expert_notes(graph, taps, lambda tensor: 8) == [
        "moe (MoE): how many tokens each of its experts saw is not known"
    ]
