"""Histograms per channel and per group, through a whole calibration."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from onnx import helper

from qdist.calibration import CalibrationJob, CalibrationSettings, calibrate_here, prepare
from qdist.calibration.estimate import group_sizes
from qdist.errors import ModelError, StoreError
from qdist.model.graph import Graph
from qdist.stats import grid
from qdist.stats.spec import GroupRequest, StatisticsSpec
from qdist.store.zarr_store import create_store
from tests.onnx_models import EXECUTION, frozen_from, model, normal, samples_of, value

N, CHANNELS = 6, 10
SOURCE = samples_of("x", CHANNELS, 5, n=N)
VALUES = np.stack([feeds["x"] for feeds in SOURCE.samples])


@pytest.fixture(scope="module")
def graph(tmp_path_factory: pytest.TempPathFactory) -> Graph:
    nodes = [
        helper.make_node("Relu", ["x"], ["r"], "relu"),
        helper.make_node("MatMul", ["r", "w"], ["y"], "matmul"),
        helper.make_node("Flatten", ["y"], ["flat"], "flatten"),
        helper.make_node("Sigmoid", ["flat"], ["z"], "sigmoid"),
    ]
    proto = model(
        nodes,
        [value("x", ["n", CHANNELS, 5])],
        [value("z", ["n", CHANNELS * 3])],
        {"w": normal(5, 3, seed=3)},
    )
    return Graph(frozen_from(proto, tmp_path_factory.mktemp("m") / "model.onnx"), EXECUTION)


def job_of(graph: Graph, *requests: GroupRequest, taps: str = "all") -> CalibrationJob:
    settings = CalibrationSettings(
        micro_batch=2, shard_samples=2, taps=taps, statistics=StatisticsSpec(groups=requests)
    )
    return prepare(graph.model, SOURCE, settings, EXECUTION, graph=graph)


PER_CHANNEL = GroupRequest(match="x", axis=1, group_size=1, mantissa_bits=3)
IN_THREES = GroupRequest(match="x", axis=1, group_size=3, mantissa_bits=7)
FOUR = GroupRequest(match="x", axis=-2, group_count=4, mantissa_bits=7)


@pytest.mark.parametrize(
    ("request_", "size"), [(PER_CHANNEL, 1), (IN_THREES, 3), (FOUR, 3)], ids=["one", "3", "four"]
)
def test_groups_hold_what_numpy_counts(
    graph: Graph, request_: GroupRequest, size: int, tmp_path: Path
) -> None:
    job = job_of(graph, request_)
    store = create_store(tmp_path / "s", job.identity)
    calibrate_here(job, SOURCE, store)
    record = store.latest().record
    (found,) = record.groups("x")
    assert (found.n_channels, found.group_size) == (CHANNELS, size)
    assert record.groups("y") == ()
    shift = grid.MANTISSA_BITS - request_.mantissa_bits
    for group, start in enumerate(range(0, CHANNELS, size)):
        bins = grid.bin_of(VALUES[:, start : start + size].ravel()) >> shift
        wanted, counts = np.unique(bins, return_counts=True)
        mine = (found.keys >> 16) == group
        np.testing.assert_array_equal(found.keys[mine] & 0xFFFF, wanted)
        np.testing.assert_array_equal(found.counts[mine], counts)
    assert int(found.keys.max() >> 16) == -(-CHANNELS // size) - 1


def test_several_requests_and_patterns(graph: Graph, tmp_path: Path) -> None:
    everything = GroupRequest(match="*", axis=1, group_count=2)
    job = job_of(graph, PER_CHANNEL, everything)
    store = create_store(tmp_path / "s", job.identity)
    merged = calibrate_here(job, SOURCE, store)
    assert len(merged.record.groups("x")) == 2
    assert all(len(merged.record.groups(t)) == 1 for t in job.taps.tensors if t != "x")
    plain = job_of(graph)
    with pytest.raises(StoreError) as caught:
        create_store(tmp_path / "s", plain.identity)
    assert caught.value.code == "QD401"
    assert "groups" in str(caught.value)


def test_taps_added_later_have_their_groups_too(graph: Graph, tmp_path: Path) -> None:
    request = GroupRequest(match="*", axis=1, group_size=1)
    some = job_of(graph, request, taps="compute")
    store = create_store(tmp_path / "s", some.identity)
    calibrate_here(some, SOURCE, store)
    job = job_of(graph, request)
    merged = calibrate_here(job, SOURCE, store)
    at_once = calibrate_here(job, SOURCE, create_store(tmp_path / "o", job.identity))
    assert merged.record.digest == at_once.record.digest
    assert all(merged.record.groups(tensor) for tensor in job.taps.tensors)


def test_the_estimate_is_told_before_and_is_near_the_truth(graph: Graph, tmp_path: Path) -> None:
    request = GroupRequest(match="*", axis=1, group_size=1)
    job = job_of(graph, request)
    sizes = group_sizes(job, SOURCE)
    assert sizes.n_tensors == len(job.taps.tensors)
    assert (sizes.unknown, sizes.without_axis) == ((), ())
    store = create_store(tmp_path / "s", job.identity)
    merged = calibrate_here(job, SOURCE, store)
    found = [groups for t in job.taps.tensors for groups in merged.record.groups(t)]
    assert sizes.estimate.n_groups == sum(each.n_channels or 0 for each in found)
    n_entries = sum(len(each.keys) for each in found)
    assert 0 < n_entries * 16 <= sizes.estimate.stored_bytes <= sizes.estimate.most_bytes


def test_an_axis_that_a_tensor_lacks_is_told(graph: Graph) -> None:
    sizes = group_sizes(job_of(graph, GroupRequest(match="*", axis=2, group_size=1)), SOURCE)
    assert sizes.without_axis == ("z",)
    assert sizes.n_tensors > 1


@pytest.mark.parametrize(("match", "hint"), [("nope", "lists them"), ("flat", "y"), ("yy", "y")])
def test_a_request_that_fits_no_measured_tensor_is_refused(
    graph: Graph, match: str, hint: str
) -> None:
    """An alias is measured under the name of its source."""
    with pytest.raises(ModelError) as caught:
        job_of(graph, GroupRequest(match=match, axis=1, group_size=1))
    assert caught.value.code == "QD208"
    assert match in str(caught.value)
    assert hint in str(caught.value).rsplit("to mend it:")[1]


def test_a_request_for_a_tensor_that_other_taps_measure_is_kept(graph: Graph) -> None:
    """So that taps can be added to the same store later."""
    job = job_of(graph, GroupRequest(match="y", axis=1, group_size=1), taps="compute")
    assert "y" not in job.taps.tensors
    assert group_sizes(job, SOURCE).estimate.n_groups == 0
