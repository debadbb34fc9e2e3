"""The calibration benchmark: its encoder, its figures, and that like is compared with like."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

SCRIPTS = Path(__file__).resolve().parents[2] / "scripts"
sys.path.insert(0, str(SCRIPTS))

from bench_cluster import Cluster, _merge_s, pipeline, spread  # noqa: E402
from bench_engine import Subject, user_session  # noqa: E402
from bench_estimate import (  # noqa: E402
    Constants,
    DecoderShape,
    Measured,
    decoder_workload,
    encoder_workload,
    fit,
    predicted_s,
    record_s,
)
from bench_models import EncoderShape, build_encoder, encoder_case  # noqa: E402
from bench_ort import SampleReader, collect, make_calibrator  # noqa: E402
from bench_table import FIGURES, markdown, with_bounds  # noqa: E402
from bench_timing import Lap, paired, ratio  # noqa: E402

SMALL = EncoderShape(n_layers=2, width=24, n_heads=3, feed_forward=96, vocabulary=50, length=16)
KNOWN = Constants(
    flop_s=2e-11,
    element_s=1e-9,
    tensor_s=1e-5,
    commit_s=1e-4,
    merge_s=2e-4,
    merge_channel_s=1e-8,
    finish_s=3e-4,
    row_bytes=4000.0,
    channel_bytes=6.0,
)


@pytest.fixture(scope="module")
def subject(tmp_path_factory: pytest.TempPathFactory) -> Subject:
    return Subject(encoder_case(tmp_path_factory.mktemp("encoder"), 12, SMALL), 8)


def test_the_encoder_is_sound_and_always_the_same() -> None:
    model = build_encoder(SMALL)
    onnx.checker.check_model(model, full_check=True)
    assert model.SerializeToString() == build_encoder(SMALL).SerializeToString()
    kinds = {node.op_type for node in model.graph.node}
    assert kinds >= {"LayerNormalization", "Erf", "Softmax", "MatMul"}
    assert model.opset_import[0].version >= 17


def test_the_default_encoder_is_the_one_that_the_bounds_are_for() -> None:
    shape = EncoderShape()
    assert (shape.n_layers, shape.width, shape.feed_forward, shape.length) == (6, 384, 1536, 128)


def test_the_encoder_gives_finite_hidden_states_that_depend_on_the_tokens(subject: Subject) -> None:
    feeds = subject.feeds(subject.batches()[0])
    (hidden,) = user_session(subject.case).run(None, feeds)
    assert hidden.shape == (4, SMALL.length, SMALL.width)
    assert np.isfinite(hidden).all()
    assert not np.array_equal(hidden[0], hidden[1])


def test_the_workload_counts_what_the_taps_return(subject: Subject) -> None:
    keys = subject.batches()[0]
    outputs = subject.tapped_session(optimized=False).run(None, subject.feeds(keys))
    workload = encoder_workload(SMALL)
    assert sum(array.size for array in outputs) == workload.elements * len(keys)
    assert len(outputs) == workload.n_tensors
    assert sum(array.shape[-1] for array in outputs) == workload.n_channels


def test_weights_of_the_workload_are_those_of_the_file() -> None:
    model = build_encoder(SMALL)
    matrices = [weight for weight in model.graph.initializer if len(weight.dims) == 2]
    n = sum(int(np.prod(weight.dims)) for weight in matrices)
    assert encoder_workload(SMALL).weight_bytes == 4 * n


def test_the_decoder_of_the_estimate_has_70_billion_parameters() -> None:
    assert decoder_workload(DecoderShape()).weight_bytes / 4 == pytest.approx(70.6e9, rel=0.01)


# --- like with like -----------------------------------------------------------------------


def test_both_sides_read_the_same_micro_batches(subject: Subject) -> None:
    reader = SampleReader(subject)
    theirs = list(iter(reader.get_next, None))
    job = subject.job("all")
    assert [len(feeds["input_ids"]) for feeds in theirs] == [len(batch) for batch in job.grid]
    for feeds, batch in zip(theirs, job.grid, strict=True):
        expected = np.stack([subject.source.load(key)["input_ids"] for key in batch.keys])
        np.testing.assert_array_equal(feeds["input_ids"], expected)


@pytest.mark.parametrize("method", ["percentile", "entropy"])
def test_both_sides_measure_the_same_tensors(method: str, subject: Subject, tmp_path: Path) -> None:
    names = subject.job("all").taps.tensors
    calibrator = make_calibrator(method, subject.case.model, tmp_path, names)
    assert calibrator.tensors_to_calibrate == set(names)
    assert calibrator.infer_session.get_session_options().intra_op_num_threads == 1
    assert collect(calibrator, subject) == len(names)


def test_left_to_itself_onnxruntime_measures_views_too(subject: Subject, tmp_path: Path) -> None:
    by_itself = make_calibrator("percentile", subject.case.model, tmp_path)
    assert by_itself.tensors_to_calibrate > set(subject.job("all").taps.tensors)


def test_the_users_session_has_one_thread_and_the_default_optimizations(subject: Subject) -> None:
    options = user_session(subject.case).get_session_options()
    assert options.intra_op_num_threads == 1
    default = type(options)().graph_optimization_level
    assert options.graph_optimization_level == default


def test_every_round_begins_with_another_action() -> None:
    seen: list[str] = []
    actions = {name: (lambda name=name: seen.append(name)) for name in "abc"}
    laps = paired(actions, 4, lambda text: None)
    assert "".join(seen) == "abc" + "bca" + "cab" + "abc"
    assert {name: len(found) for name, found in laps.items()} == dict.fromkeys("abc", 4)
    assert all(isinstance(lap, Lap) and lap.wall_s >= 0 for lap in laps["a"])


def test_a_ratio_is_the_median_of_pairs_and_not_the_quotient_of_medians() -> None:
    assert ratio([1.0, 20.0, 3.0], [1.0, 10.0, 1.0]) == 2.0


# --- the figures --------------------------------------------------------------------------


def test_every_figure_has_a_name_of_its_own_and_bounds_point_the_right_way() -> None:
    assert len({figure.key for figure in FIGURES}) == len(FIGURES)
    values = {figure.key: 1.0 for figure in FIGURES}
    bounds = with_bounds("encoder", values)["bounds"]
    assert bounds["two_worker_speedup"] == {"bound": 1.8, "kind": "at least", "holds": False}
    assert bounds["ratio_all_taps"] == {"bound": 1.5, "kind": "at most", "holds": True}
    assert bounds["merge_s_per_1000_shards"]["holds"] is None
    assert with_bounds("squeezenet", values)["bounds"]["ratio_all_taps"]["holds"] is None


def test_the_table_marks_what_misses_its_bound_and_leaves_out_what_is_not_there() -> None:
    found: dict[str, Any] = {"encoder": {"ratio_all_taps": 2.0, "commit_share": 0.01}}
    text = markdown({**found, "squeezenet": {"skipped": "absent"}})
    assert "| `ratio_all_taps` | <= 1.5 | **2** |" in text
    assert "| `commit_share` | <= 0.05 | 0.01 |" in text
    assert "| `rss_growth` | <= 1.03 | - |" in text
    assert "squeezenet" not in text


def test_keys_help_and_json_from_outside(tmp_path: Path) -> None:
    script = str(SCRIPTS / "bench_calibration.py")
    words = ["--quick", "--only", "encoder", "--only", "squeezenet", "--part", "kernel"]
    words += ["--assets", str(tmp_path / "none"), "--json", str(tmp_path / "f.json")]
    done = subprocess.run([sys.executable, script, *words], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "f.json").read_text("utf-8"))
    assert set(found) == {"encoder", "squeezenet"}
    assert found["encoder"]["kernel_vs_copy"] > 0
    assert found["encoder"]["bounds"]["kernel_vs_copy"]["bound"] == 2.5
    assert found["encoder"]["quick"] is True
    assert found["encoder"]["machine"]["cores"] >= 1
    assert "skipped" in found["squeezenet"]
    assert "kernel: copy" in done.stderr
    assert "`kernel_vs_copy`" in done.stdout


# --- the estimate -------------------------------------------------------------------------


def test_constants_that_made_the_times_are_found_again() -> None:
    shapes = [SMALL, replace(SMALL, length=64), replace(SMALL, n_layers=8, width=48)]
    cases = []
    for shape in shapes:
        workload = encoder_workload(shape)
        seconds = predicted_s(workload, KNOWN, n_samples=1, shard_samples=1, batch=4)
        sample_s = seconds["total"] - seconds["commits"] - seconds["merge"]
        cases.append(
            Measured(
                workload=workload,
                micro_batch=4,
                sample_s=sample_s,
                commit_s=KNOWN.commit_s,
                record_s=record_s(workload, KNOWN),
                finish_s=KNOWN.finish_s,
                total_s=seconds["total"],
                record_bytes=KNOWN.row_bytes * workload.n_tensors
                + KNOWN.channel_bytes * workload.n_channels,
            )
        )
    found = fit(cases, KNOWN.flop_s)
    for name, value in asdict(KNOWN).items():
        assert getattr(found, name) == pytest.approx(value, rel=1e-6), name


def test_a_tree_merges_many_shards_in_the_time_of_few() -> None:
    """Beyond what one process merges at once, time grows with the levels, not with the shards."""
    workload, cluster = decoder_workload(DecoderShape()), Cluster()
    few, many = (_merge_s(workload, KNOWN, cluster, n) for n in (32, 512))
    assert few < many < 2 * few
    alone = replace(cluster, n_nodes=1, n_workers=1)
    assert _merge_s(workload, KNOWN, alone, 512) > 16 * few


def test_more_samples_cost_in_proportion_and_weights_are_read_once() -> None:
    workload, cluster = decoder_workload(DecoderShape()), Cluster()
    few, many = (spread(workload, KNOWN, cluster, n) for n in (512, 4096))
    assert many.seconds["elements"] == pytest.approx(8 * few.seconds["elements"])
    assert many.node_bytes["weights read"] == few.node_bytes["weights read"]


def test_a_pipeline_reads_each_weight_on_one_node_only() -> None:
    workload, cluster = decoder_workload(DecoderShape()), Cluster()
    found = pipeline(workload, KNOWN, cluster, 512)
    assert found.node_bytes["weights read"] * cluster.n_nodes == pytest.approx(
        workload.weight_bytes
    )
    assert found.memory_bytes < cluster.memory_bytes
