"""The readers of a tensor as ``auto`` is told of them, against the outputs of a real run."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from onnx import helper

from qdist.plan.consumers import consumers_of
from qdist.plan.planner import Planner
from qdist.threshold.consumer import Consumer
from tests.onnx_models import Array, HeldSamples, frozen_from, model, normal, planner_for, value

LEFT = normal(5, 4, seed=1)
RIGHT = normal(6, 3, seed=2)
TURNED = normal(7, 6, seed=3)
BIAS = 3 * normal(7, seed=4)
KERNEL = normal(8, 2, 3, 3, seed=5)


@pytest.fixture
def planner(tmp_path: Path) -> Planner:
    """x [n, 4, 6] and its products from either side; c [n, 4, 5, 5] through a grouped Conv."""
    node = helper.make_node
    proto = model(
        [
            node("Relu", ["x"], ["r"], name="relu"),
            node("MatMul", ["r", "right"], ["a"], name="from the right"),
            node("MatMul", ["left", "r"], ["b"], name="from the left"),
            node("Transpose", ["r"], ["t"], name="turn", perm=[0, 2, 1]),
            node("MatMul", ["r", "t"], ["s"], name="with itself"),
            node("Relu", ["v"], ["w"], name="relu v"),
            node("Gemm", ["w", "turned", "bias"], ["g"], name="gemm", transB=1),
            node("Relu", ["c"], ["d"], name="relu c"),
            node("Conv", ["d", "kernel"], ["e"], name="conv", group=2),
        ],
        [value("x", ["n", 4, 6]), value("v", ["n", 6]), value("c", ["n", 4, 5, 5])],
        [value(name, None) for name in ("a", "b", "s", "g", "e")],
        {"left": LEFT, "right": RIGHT, "turned": TURNED, "bias": BIAS, "kernel": KERNEL},
    )
    shapes = {"x": (4, 6), "v": (6,), "c": (4, 5, 5)}
    drawn = {name: normal(64, *shape, seed=9) for name, shape in shapes.items()}
    source = HeldSamples(samples=[{k: v[i] for k, v in drawn.items()} for i in range(64)])
    return planner_for(frozen_from(proto, tmp_path / "model.onnx"), source, tmp_path / "store")


def readers(planner: Planner, row: str) -> dict[str, Consumer]:
    found = consumers_of(row, planner.graph, planner.layers, planner.taps, planner._record)
    return {each.name: each for each in found}


def widths(planner: Planner, tensor: str) -> Array:
    """How wide the range of each channel of an output is."""
    channels = planner.record.channels(tensor)
    assert channels is not None
    return channels.maximum.astype(np.float64) - channels.minimum


def test_matmuls_weigh_inputs_from_either_side(planner: Planner) -> None:
    found = readers(planner, "r")
    assert found.keys() >= {"from the right", "from the left"}
    right, left = found["from the right"], found["from the left"]
    # Each output by its own range; those of the left operand lie along no channels.
    scaled = RIGHT / widths(planner, "a")
    assert right.gains == pytest.approx((scaled**2).mean(axis=1), rel=1e-6)
    assert left.gains == pytest.approx((LEFT**2).mean(axis=0), rel=1e-6)
    assert right.mean_gain == pytest.approx((scaled.sum(axis=0) ** 2).mean(), rel=1e-6)
    output = planner._record.histogram("a").finite.second_moment
    output /= float((widths(planner, "a") ** 2).mean())
    assert right.output_square == pytest.approx(output)
    # The last axis of r has six channels, as the right one has inputs; the left one has four.
    channels = planner._record.channels("r")
    assert channels is not None
    assert right.maximum == pytest.approx(channels.maximum)
    assert left.maximum is None


def test_a_product_of_activations_weighs_by_the_other(planner: Planner) -> None:
    found = readers(planner, "r")["with itself"]
    square = planner._record.histogram("r").finite.second_moment
    assert found.gains.tolist() == pytest.approx([6 * square])


def test_a_turned_weight_and_a_bias(planner: Planner) -> None:
    found = readers(planner, "w")["gemm"]
    wide = widths(planner, "g")
    assert found.gains == pytest.approx(((TURNED.T / wide) ** 2).mean(axis=1), rel=1e-6)
    output = planner._record.histogram("g").finite.second_moment
    square = (output - float((BIAS**2).mean())) / float((wide**2).mean())
    assert found.output_square == pytest.approx(square, rel=1e-4)


def test_a_grouped_convolution_has_all_channels(planner: Planner) -> None:
    found = readers(planner, "d")["conv"]
    assert found.gains.size == 4
    scaled = KERNEL / widths(planner, "e").reshape(-1, 1, 1, 1)
    assert found.gain() == pytest.approx(float((scaled**2).sum()) / 8, rel=1e-6)
    assert found.maximum is not None


def test_what_no_product_reads_is_unknown(planner: Planner) -> None:
    assert readers(planner, "x") == {}
    assert readers(planner, "absent") == {}
