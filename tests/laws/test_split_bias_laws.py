"""Laws of biases that are Adds of their own."""

from __future__ import annotations

import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from onnx import helper

from qdist.emit.writer import write_model
from qdist.model.session import run, scoring_session
from qdist.plan.bias_adds import range_before
from qdist.plan.choice import LayerChoice
from qdist.plan.plan import BiasAdd, LayerPlan, QuantizationPlan, QuantizedInput
from qdist.plan.quantizer import Quantizer
from qdist.simulate.assemble import assemble
from qdist.simulate.integers import integer_graph
from qdist.stats.channels import Channels
from tests.onnx_models import ANY_TARGET, EXECUTION, frozen_from, model, value

TARGET = replace(ANY_TARGET, split_bias=True)
seeds = st.integers(0, 2**32 - 1)

STEP = Quantizer(
    bits=16,
    low=-32768,
    high=32767,
    scales=(1.0,),
    zero_points=(0,),
    axis=None,
    method="max",
    bounds=(-32767.0, 32767.0),
)
"""Whole numbers are their own numbers."""


def entry(index: int, tensor: str) -> QuantizedInput:
    return QuantizedInput(index=index, tensor=tensor, quantizer=STEP)


def split_plan(digest: str, channels: int, n_axes: int) -> QuantizationPlan:
    layer = LayerPlan(
        name="layer",
        op_type="Conv",
        choice=LayerChoice(precision="int16", split_bias=True),
        activations=(entry(0, "x"),),
        weights=(entry(1, "w"),),
        why="",
        outputs=(entry(0, "y"),),
        bias_add=BiasAdd(
            result=entry(0, "y.before_bias"),
            bias=entry(2, "b"),
            shape=(channels, *[1] * n_axes),
        ),
    )
    return QuantizationPlan(model_digest=digest, statistics_digest="", layers=(layer,))


@settings(max_examples=25)
@given(
    seeds,
    st.sampled_from(["Conv", "ConvTranspose"]),
    st.integers(1, 3),
    st.sampled_from([1, 2, 4]),
    st.integers(1, 2),
)
def test_where_nothing_is_rounded_the_split_convolution_is_the_convolution(
    seed: int, op_type: str, n_axes: int, group: int, stride: int
) -> None:
    """Whole numbers below 2**15: artifact-exact and target-exact give what the float model gives,
    bit for bit."""
    rng = np.random.default_rng(seed)

    def whole(high: int, *shape: int) -> NDArray[np.float32]:
        return rng.integers(-high, high + 1, shape).astype(np.float32)

    kernel = [2] * n_axes
    weight = whole(20, 4, 4 // group, *kernel)
    bias = whole(9000, weight.shape[1] * group if op_type == "ConvTranspose" else 4)
    attributes: dict[str, Any] = {"group": group, "strides": [stride] * n_axes}
    proto = model(
        [helper.make_node(op_type, ["x", "w", "b"], ["y"], "layer", **attributes)],
        [value("x", ["n", 4, *[5] * n_axes])],
        [value("y", [None] * (n_axes + 2))],
        {"w": weight, "b": bias},
    )
    feeds = {"x": whole(20, 2, 4, *[5] * n_axes)}
    with tempfile.TemporaryDirectory() as folder:
        frozen = frozen_from(proto, Path(folder) / "model.onnx")
        plan = TARGET.project(split_plan(frozen.digest, bias.size, n_axes))
        exact = run(scoring_session(frozen.graph_bytes, EXECUTION), ["y"], feeds)[0]
        assert np.abs(exact).max() < 32767
        for i, graph in enumerate((assemble(frozen, plan), integer_graph(frozen, plan).graph)):
            names = {node.name for node in graph.proto.graph.node}
            path = write_model(graph, Path(folder) / f"{i}.onnx").path
            found = run(scoring_session(path, EXECUTION), ["y"], feeds)[0]
            assert np.array_equal(found, exact)
            assert ("layer.bias_add" in names) == (i == 0)


@given(seeds, st.integers(1, 6), st.floats(-6, 6))
def test_the_range_before_a_bias_holds_every_value_and_no_more(
    seed: int, n: int, exponent: float
) -> None:
    """The extrema are of float32 sums, whose rounding is the bias's own."""
    rng = np.random.default_rng(seed)
    before = rng.normal(size=(n, 30)).astype(np.float32)
    bias = (rng.normal(size=n) * 10.0**exponent).astype(np.float32)
    after = before + bias[:, None]
    found = range_before(bias, Channels(minimum=after.min(axis=1), maximum=after.max(axis=1)))
    slack = float(np.abs(after).max()) * 2.0**-23
    assert found.low == pytest.approx(min(0.0, float(before.min())), abs=slack)
    assert found.high == pytest.approx(max(0.0, float(before.max())), abs=slack)
