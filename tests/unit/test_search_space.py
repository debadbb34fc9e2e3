"""What layers may become on a target, what it costs, and latency tables."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from onnx import helper

from qdist.errors import PlanError
from qdist.plan.choice import LayerChoice
from qdist.plan.planner import Planner
from qdist.search.building import (
    build_problem,
    measured,
    measuring_choices,
    n_multiplies,
)
from qdist.search.latency import read_latency_table
from qdist.search.probing import group_probes, interactions, pair_probes, with_divergences
from qdist.search.space import SpaceSettings
from tests.onnx_models import ANY_TARGET, frozen_from, model, normal, planner_for, samples_of, value
from tests.unit.test_search_pareto import problem_of

SPACE = SpaceSettings(
    precisions=("w4a8", "w8a16", "bf16", "float32"),
    granularities=("tensor", "block=2"),
    saturations=("max",),
)


@pytest.fixture(scope="module")
def planner(tmp_path_factory: pytest.TempPathFactory) -> Planner:
    """Conv 2 -> 4 channels on 6 x 6, Relu, Flatten, Gemm to 3, Sigmoid."""
    folder = tmp_path_factory.mktemp("space")
    proto = model(
        [
            helper.make_node("Conv", ["x", "k"], ["c"], "conv", pads=[1, 1, 1, 1]),
            helper.make_node("Sigmoid", ["c"], ["s"], "sigmoid"),
            helper.make_node("Flatten", ["s"], ["f"], "flatten"),
            helper.make_node("MatMul", ["f", "w"], ["y"], "head"),
        ],
        [value("x", ["n", 2, 6, 6])],
        [value("y", ["n", 3])],
        {"k": normal(4, 2, 3, 3), "w": normal(144, 3)},
    )
    frozen = frozen_from(proto, folder / "model.onnx")
    return planner_for(frozen, samples_of("x", 2, 6, 6), folder / "store")


def plain_of(planner: Planner) -> dict[str, LayerChoice]:
    return {layer.name: LayerChoice() for layer in planner.layers}


def test_every_option_is_one_that_the_target_takes_and_measured_once(planner: Planner) -> None:
    narrow = replace(
        ANY_TARGET,
        precisions=("int8", "w4a8", "w8a16"),
        blocks=False,
        per_tensor_operators=("Conv",),
    )
    coarse = {**plain_of(planner), "conv": LayerChoice(granularity="tensor")}
    for target, plain in ((ANY_TARGET, plain_of(planner)), (narrow, coarse)):
        problem = build_problem(planner, target, plain, SPACE)
        assert [layer.name for layer in problem.layers] == ["conv", "sigmoid", "head"]
        for name, options in problem.options.items():
            assert options[0] == plain[name]
            assert len(set(options)) == len(options), name
            for choice in options[1:]:
                # Refused choices raise QD507.
                target.project(planner.plan({**plain, name: choice}))
        tried = measuring_choices(problem)
        for name, options in problem.options.items():
            assert [a[name] for a in tried][: len(options)] == list(options)
    grains = {choice.granularity for choice in problem.options["conv"][1:]}
    assert grains == {"tensor"}
    assert len(problem.options["sigmoid"]) < len(problem.options["head"])
    low = replace(SPACE, max_opset=20)
    problem = build_problem(planner, ANY_TARGET, plain_of(planner), low, pinned=["conv"])
    assert "conv" not in problem.options
    precisions = {choice.precision for choice in problem.options["head"]}
    assert precisions == {"int8", "bf16", "float32"}
    assert measured(problem, (), ()) == {}


def test_costs_in_bytes_operations_and_microseconds(planner: Planner, tmp_path: Path) -> None:
    plain = plain_of(planner)
    layers = {layer.name: layer for layer in planner.layers}
    assert n_multiplies(planner.graph, layers["conv"]) == 4 * 36 * 2 * 9
    assert n_multiplies(planner.graph, layers["head"]) == 144 * 3
    assert n_multiplies(planner.graph, layers["sigmoid"]) == 0
    n_bytes = build_problem(planner, ANY_TARGET, plain, SPACE)
    assert n_bytes.cost(plain) == (72 + 4 * 4) + (432 + 4 * 3)
    low = {**plain, "head": LayerChoice(precision="w4a8")}
    assert n_bytes.cost(low) == n_bytes.cost(plain) - 216
    operations = build_problem(planner, ANY_TARGET, plain, SPACE, unit="bit_operations")
    assert operations.cost(plain) == (2592 + 432) * 64
    wide = {**plain, "head": LayerChoice(precision="w8a16")}
    # The sigmoid's 144 values are rescaled from 8 to 16 bits.
    assert operations.cost(wide) == 2592 * 64 + 432 * 128 + 144 * 8 * 16
    table = tmp_path / "latency.csv"
    rows = [
        f"{op},{dtype},{us}"
        for op in ("Conv", "MatMul", "Sigmoid")
        for dtype, us in (("int8", 2), ("w4a8", 1), ("w8a16", 4), ("bf16", 5), ("float32", 9))
    ]
    header = "operator,dtype,us,us_per_million"
    table.write_text("\n".join([header, *rows, "head,w8a16,3,1000", "convert,int8>int16,0.5"]))
    known = read_latency_table(table)
    timed = build_problem(planner, ANY_TARGET, plain, SPACE, unit="latency", table=known)
    assert timed.cost(plain) == 6
    assert timed.cost(wide) == pytest.approx(4 + 3 + 432 / 1000 + 0.5)
    table.write_text("\n".join([header, *rows[:5]]))
    with pytest.raises(PlanError, match="QD512"):
        build_problem(
            planner, ANY_TARGET, plain, SPACE, unit="latency", table=read_latency_table(table)
        )


@pytest.mark.parametrize(
    "text",
    [
        "",
        "operator,us\nConv,3\n",
        "operator,dtype,us\n",
        "operator,dtype,us\nConv,int7,3\n",
        "operator,dtype,us\nConv,int8,-3\n",
        "operator,dtype,us\nConv,int8,fast\n",
        "operator,dtype,us\nConv,int8,nan\n",
        "operator,dtype,us\nConv,int8,1\nConv,int8,2\n",
        "operator,dtype,us\nconvert,int8,1\n",
        "operator,dtype,us,us_per_million\nConv,int8,1,inf\n",
    ],
)
def test_tables_that_cannot_be_used_are_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "latency.csv"
    path.write_text(text)
    with pytest.raises(PlanError, match="QD511"):
        read_latency_table(path)
    with pytest.raises(PlanError, match="QD511"):
        read_latency_table(tmp_path / "none.csv")


def test_probes_of_groups_and_of_neighbours_become_divergences_and_interactions() -> None:
    problem = problem_of(6, 1, group=2)
    chain = tuple(
        replace(layer, sources=(f"layer{i - 1}",) if i else ())
        for i, layer in enumerate(problem.layers)
    )
    problem = replace(problem, layers=chain)
    probes = group_probes(problem)
    assert [probe.groups for probe in probes] == [("layer0",), ("layer2",), ("layer4",)]
    assert {choice.precision for p in probes for _, choice in p.choices} == {"w4a8"}
    alone = dict(zip(probes, (0.1, 0.2, 0.3), strict=True))
    found = with_divergences(problem, alone)
    assert [list(known.values()) for known in found.divergence.values()] == [[0.1], [0.2], [0.3]]
    pairs = pair_probes(problem, alone, 1)
    ((one, other, both),) = pairs
    assert both.groups == ("layer2", "layer4")
    assert set(both.names) == {"layer2", "layer3", "layer4", "layer5"}
    (interaction,) = interactions(pairs, {**alone, both: 0.8})
    assert interaction.layers == (one.groups[0], other.groups[0])
    assert interaction.value == pytest.approx(0.3)
    assert len(pair_probes(problem, alone, 9)) == 2
