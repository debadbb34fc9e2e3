from __future__ import annotations

import hashlib
import os
import resource
import signal
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.checker
import pytest
from onnx import TensorProto, helper, numpy_helper

from qdist.demo import demo_file
from qdist.emit import writer
from qdist.emit.qdq import check_artifact, emit_qdq
from qdist.emit.writer import WrittenModel, write_model
from qdist.errors import ArtifactError, ConfigError
from qdist.model.freeze import FrozenModel, freeze
from qdist.model.loading import load_model
from qdist.model.session import run, scoring_session
from qdist.model.weights import Weights
from qdist.plan.planner import Planner
from qdist.simulate.assemble import QuantizedGraph, assemble
from tests.onnx_models import (
    EXECUTION,
    Array,
    HeldSamples,
    frozen_from,
    model,
    normal,
    planner_for,
    projected,
    samples_of,
    value,
)

PRECISIONS = ("int8", "w8a16", "int16", "w4a8", "w4a16")


def node(op_type: str, inputs: list[str], outputs: list[str], name: str = "", **kw: Any) -> Any:
    return helper.make_node(op_type, inputs, outputs, name, **kw)


@pytest.fixture(scope="module")
def cnn(tmp_path_factory: pytest.TempPathFactory) -> tuple[FrozenModel, Planner]:
    """A model of opset 13."""
    frozen = freeze(load_model(demo_file("digits_cnn.onnx")))
    folder = tmp_path_factory.mktemp("cnn")
    return frozen, planner_for(frozen, samples_of("images", 1, 8, 8, n=8), folder / "store")


FEEDS = {"images": normal(8, 1, 8, 8, seed=1)}
"""The calibration samples, so that nothing lies beyond the ranges."""


def outputs_of(path: Path) -> Array:
    (found,) = run(scoring_session(path, EXECUTION), None, FEEDS)
    return found


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def external(proto: onnx.ModelProto) -> dict[str, dict[str, str]]:
    return {
        tensor.name: {entry.key: entry.value for entry in tensor.external_data}
        for tensor in proto.graph.initializer
        if tensor.data_location == TensorProto.EXTERNAL
    }


@pytest.mark.parametrize("precision", PRECISIONS)
def test_artifact_is_valid_and_near_the_float_model(
    cnn: tuple[FrozenModel, Planner], precision: str, tmp_path: Path
) -> None:
    frozen, planner = cnn
    plan = projected(planner, precision)
    artifact = emit_qdq(frozen, plan, tmp_path / "sub" / "model.onnx")
    assert artifact.path == tmp_path / "sub" / "model.onnx"
    assert artifact.data_path is None
    assert artifact.n_bytes == artifact.path.stat().st_size
    assert artifact.target == "any"
    proto = onnx.load(artifact.path)
    onnx.checker.check_model(proto, full_check=True)
    opset = {e.domain: e.version for e in proto.opset_import}[""]
    assert artifact.opset == opset == (13 if precision == "int8" else 21)
    assert proto.producer_name == "qdist"
    recorded = {p.key: p.value for p in proto.metadata_props}
    assert recorded == {"qdist.plan": plan.plan.digest} == {"qdist.plan": artifact.plan_digest}
    expected, found = outputs_of(frozen.source), outputs_of(artifact.path)
    error = np.linalg.norm(found - expected) / np.linalg.norm(expected)
    assert 0 < error < {"w4a8": 0.4, "w4a16": 0.4, "int16": 1e-3}.get(precision, 0.1)
    assert [p.name for p in artifact.path.parent.iterdir()] == ["model.onnx"]


@pytest.mark.parametrize("precision", ["int8", "w4a16"])
def test_emitting_and_scoring_repeat_to_the_last_bit(
    cnn: tuple[FrozenModel, Planner], precision: str, tmp_path: Path
) -> None:
    frozen, planner = cnn
    paths = [tmp_path / "a" / "model.onnx", tmp_path / "b" / "model.onnx"]
    for path in paths:
        emit_qdq(frozen, projected(planner, precision), path)
    assert digest(paths[0]) == digest(paths[1])
    first, second, again = outputs_of(paths[0]), outputs_of(paths[0]), outputs_of(paths[1])
    np.testing.assert_array_equal(first, second, strict=True)
    np.testing.assert_array_equal(first, again, strict=True)
    emit_qdq(frozen, projected(planner, precision), paths[0], check=False)
    assert digest(paths[0]) == digest(paths[1])


def test_what_is_scored_is_the_graph_in_the_file(
    cnn: tuple[FrozenModel, Planner], tmp_path: Path
) -> None:
    frozen, planner = cnn
    plan = projected(planner)
    artifact = emit_qdq(frozen, plan, tmp_path / "model.onnx")
    graph = assemble(frozen, plan)
    written = write_model(graph, tmp_path / "simulated.onnx")
    np.testing.assert_array_equal(outputs_of(written.path), outputs_of(artifact.path))
    # The integers in the file are those of the plan's own quantizers.
    stored = Weights(onnx.load(artifact.path).graph.initializer, None)
    for entry in graph.integer_weights:
        expected = entry.quantizer.quantize(frozen.weights().read(entry.source))
        np.testing.assert_array_equal(stored.read(entry.name).astype(np.int32), expected)


def test_float_artifact_is_bit_equal_to_the_model(
    cnn: tuple[FrozenModel, Planner], tmp_path: Path
) -> None:
    frozen, planner = cnn
    artifact = emit_qdq(frozen, projected(planner, "float32"), tmp_path / "model.onnx")
    np.testing.assert_array_equal(outputs_of(artifact.path), outputs_of(frozen.source))
    assert artifact.opset == 13


def test_artifact_shrinks_with_its_weights(
    cnn: tuple[FrozenModel, Planner], tmp_path: Path
) -> None:
    frozen, planner = cnn
    sizes = [
        emit_qdq(frozen, projected(planner, p), tmp_path / f"{p}.onnx", check=False).n_bytes
        for p in ("float32", "int16", "int8", "w4a8")
    ]
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[2] < 0.5 * sizes[0]


@pytest.mark.parametrize("precision", ["int8", "w4a8", "float32"])
def test_external_data_holds_the_same_model(
    cnn: tuple[FrozenModel, Planner],
    precision: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    frozen, planner = cnn
    plan = projected(planner, precision)
    inline = emit_qdq(frozen, plan, tmp_path / "inline.onnx")
    monkeypatch.setattr(writer, "INLINE_LIMIT_BYTES", 10_000)
    artifact = emit_qdq(frozen, plan, tmp_path / "outside" / "model.onnx")
    name = f"model.onnx.{plan.plan.digest[:8]}.data"
    data = tmp_path / "outside" / name
    assert artifact.data_path == data
    assert artifact.n_bytes == artifact.path.stat().st_size + data.stat().st_size
    assert sorted(p.name for p in data.parent.iterdir()) == ["model.onnx", name]
    proto = onnx.load(artifact.path, load_external_data=False)
    places = external(proto)
    assert places
    end = 0
    for tensor in proto.graph.initializer:
        if tensor.name not in places:
            assert len(tensor.SerializeToString()) < 1200
            continue
        place = places[tensor.name]
        assert place["location"] == name
        assert int(place["offset"]) % 4096 == 0
        assert int(place["offset"]) >= end
        end = int(place["offset"]) + int(place["length"])
        assert not tensor.raw_data
    assert end == data.stat().st_size
    ours, theirs = (
        {t.name: (t.data_type, list(t.dims), t.raw_data) for t in onnx.load(path).graph.initializer}
        for path in (artifact.path, inline.path)
    )
    assert ours == theirs
    np.testing.assert_array_equal(outputs_of(artifact.path), outputs_of(inline.path))
    again = emit_qdq(frozen, plan, tmp_path / "again" / "model.onnx")
    assert again.data_path is not None
    assert (digest(again.path), digest(again.data_path)) == (digest(artifact.path), digest(data))


def outside_model(folder: Path) -> FrozenModel:
    """Weights of 4 KB outside, one in a body, one of four-bit integers, one of strings inline."""
    body = helper.make_graph(
        [node("MatMul", ["h", "w2"], ["m"]), node("Add", ["m", "inner"], ["then"])],
        "then",
        [],
        [value("then", None)],
        [numpy_helper.from_array(normal(32, 32, seed=3), "inner")],
    )
    other = helper.make_graph([node("Neg", ["h"], ["else"])], "else", [], [value("else", None)])
    proto = model(
        [
            node("MatMul", ["x", "w1"], ["h"], "matmul"),
            node("If", ["flag"], ["y"], "if", then_branch=body, else_branch=other),
            node("Equal", ["text", "text"], ["same"], "equal"),
        ],
        [value("x", [32, 32]), value("flag", [], TensorProto.BOOL)],
        [
            value("y", [32, 32]),
            value("same", [300], TensorProto.BOOL),
            value("text", [300], TensorProto.STRING),
        ],
        {"w1": normal(32, 32), "w2": normal(32, 32, seed=1)},
        opset=21,
    )
    proto.graph.initializer.append(
        helper.make_tensor("text", TensorProto.STRING, [300], [b"word"] * 300)
    )
    proto.ir_version = 10
    path = folder / "model.onnx"
    onnx.save(proto, path, save_as_external_data=True, location="model.data", size_threshold=1000)
    return freeze(load_model(path))


@pytest.mark.parametrize("limit", [0, 1 << 30], ids=["outside", "inline"])
@pytest.mark.parametrize("precision", ["float32", "w4a8"])
def test_external_source_weights_come_along_wherever_they_are(
    limit: int, precision: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "source").mkdir()
    frozen = outside_model(tmp_path / "source")
    feeds = {"x": normal(32, 32, seed=5), "flag": np.array(True)}
    expected = run(scoring_session(frozen.source, EXECUTION), None, feeds)
    source = HeldSamples(samples=[feeds])
    planner = planner_for(frozen, source, tmp_path / "store")
    plan = projected(planner, precision)
    monkeypatch.setattr(writer, "INLINE_LIMIT_BYTES", limit)
    artifact = emit_qdq(frozen, plan, tmp_path / "out" / "model.onnx")
    (tmp_path / "source" / "model.data").unlink()
    found = run(scoring_session(artifact.path, EXECUTION), None, feeds)
    error = np.linalg.norm(found[0] - expected[0]) / np.linalg.norm(expected[0])
    assert error < 0.2 if precision == "w4a8" else error == 0
    assert list(found[2]) == list(expected[2])
    assert (artifact.data_path is not None) == (limit == 0)


def test_inline_int4_constants_are_written_packed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As ``int32_data`` they are a value per element, outside two to a byte."""
    values = [(i % 15) - 7 for i in range(64 * 65)]
    proto = model(
        [
            node("DequantizeLinear", ["w", "s"], ["f"], "dq"),
            node("MatMul", ["x", "f"], ["y"], "matmul"),
        ],
        [value("x", [1, 64])],
        [value("y", [1, 65])],
        {"s": np.asarray(0.25, np.float32)},
        opset=21,
    )
    proto.graph.initializer.append(helper.make_tensor("w", TensorProto.INT4, [64, 65], values))
    proto.ir_version = 10
    frozen = frozen_from(proto, tmp_path / "model.onnx")
    graph = QuantizedGraph(
        proto=frozen.proto(),
        integer_weights=(),
        weights=frozen.weights(),
        data_folder=frozen.data_folder,
    )
    monkeypatch.setattr(writer, "INLINE_LIMIT_BYTES", 0)
    written = write_model(graph, tmp_path / "out.onnx")
    assert written.data_path is not None
    assert written.data_path.stat().st_size == 64 * 65 // 2
    x = normal(1, 64)
    (found,) = run(scoring_session(written.path, EXECUTION), None, {"x": x})
    expected = x @ (np.asarray(values, np.float32).reshape(64, 65) * 0.25)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


# Failures on disk.


def test_folder_that_cannot_be_made_is_refused(
    cnn: tuple[FrozenModel, Planner], tmp_path: Path
) -> None:
    frozen, planner = cnn
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(ArtifactError) as caught:
        emit_qdq(frozen, projected(planner), tmp_path / "file" / "model.onnx")
    assert caught.value.code == "QD603"
    assert [p.name for p in tmp_path.iterdir()] == ["file"]
    assert (tmp_path / "file").read_text() == "not a folder"


@pytest.mark.parametrize(
    ("name", "limit"), [("model.onnx", 0), ("model.onnx", 1 << 30), ("model.onnx.{}.data", 0)]
)
def test_folder_in_the_place_of_a_file_is_refused_and_nothing_is_left(
    cnn: tuple[FrozenModel, Planner],
    name: str,
    limit: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    frozen, planner = cnn
    monkeypatch.setattr(writer, "INLINE_LIMIT_BYTES", limit)
    name = name.format(projected(planner).plan.digest[:8])
    (tmp_path / name).mkdir()
    with pytest.raises(ArtifactError) as caught:
        emit_qdq(frozen, projected(planner), tmp_path / "model.onnx")
    assert caught.value.code == "QD603"
    assert [p.name for p in tmp_path.iterdir()] == [name]


@pytest.mark.parametrize("limit", [0, 1 << 30])
def test_full_disk_leaves_the_old_artifact_alone(
    cnn: tuple[FrozenModel, Planner],
    limit: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    frozen, planner = cnn
    monkeypatch.setattr(writer, "INLINE_LIMIT_BYTES", limit)
    path = tmp_path / "model.onnx"
    emit_qdq(frozen, projected(planner, "w4a8"), path)
    before = {p.name: digest(p) for p in tmp_path.iterdir()}
    assert len(before) == (2 if limit == 0 else 1)
    # A limit on file size makes writing fail part of the way, as a full disk does.
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    old = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, hard))
    try:
        with pytest.raises(ArtifactError) as caught:
            emit_qdq(frozen, projected(planner, "int16"), path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, old)
    assert caught.value.code == "QD603"
    assert {p.name: digest(p) for p in tmp_path.iterdir()} == before


def test_artifact_that_moves_inside_leaves_no_old_data_behind(
    cnn: tuple[FrozenModel, Planner], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    frozen, planner = cnn
    path = tmp_path / "model.onnx"
    with monkeypatch.context() as patched:
        patched.setattr(writer, "INLINE_LIMIT_BYTES", 0)
        assert emit_qdq(frozen, projected(planner), path).data_path is not None
    assert emit_qdq(frozen, projected(planner), path).data_path is None
    assert os.listdir(tmp_path) == ["model.onnx"]


# The checks themselves.


def written_as(proto: onnx.ModelProto, path: Path) -> WrittenModel:
    onnx.save(proto, path)
    return WrittenModel(path=path, data_path=None, n_bytes=path.stat().st_size)


def test_checker_and_runtime_speak_for_themselves(tmp_path: Path) -> None:
    good = model([node("Relu", ["x"], ["y"], "n")], [value("x", [1])], [value("y", [1])])
    check_artifact(written_as(good, tmp_path / "good.onnx"), EXECUTION)

    twice = model(
        [node("Relu", ["x"], ["y"], "a"), node("Neg", ["x"], ["y"], "b")],
        [value("x", [1])],
        [value("y", [1])],
    )
    with pytest.raises(ArtifactError, match="QD601"):
        check_artifact(written_as(twice, tmp_path / "twice.onnx"), EXECUTION)

    shapes = model(
        [node("MatMul", ["x", "x"], ["y"], "n")], [value("x", [2, 3])], [value("y", [2, 3])]
    )
    with pytest.raises(ArtifactError, match="QD601"):
        check_artifact(written_as(shapes, tmp_path / "shapes.onnx"), EXECUTION)

    unknown = model(
        [node("Nothing", ["x"], ["y"], "n", domain="nowhere")],
        [value("x", [1])],
        [value("y", [1])],
        domains={"nowhere": 1},
    )
    with pytest.raises(ArtifactError, match="QD602"):
        check_artifact(written_as(unknown, tmp_path / "unknown.onnx"), EXECUTION)


def planner_of(frozen: FrozenModel, folder: Path) -> Planner:
    feeds = {"x": normal(32, 32, seed=5), "flag": np.array(True)}
    return planner_for(frozen, HeldSamples(samples=[feeds]), folder / "statistics")


def test_the_float_model_is_never_overwritten(tmp_path: Path) -> None:
    (tmp_path / "source").mkdir()
    frozen = outside_model(tmp_path / "source")
    planner = planner_of(frozen, tmp_path)
    before = {p.name: digest(p) for p in frozen.source.parent.iterdir()}
    (tmp_path / "link.onnx").symlink_to(frozen.source)
    for path in (frozen.source, frozen.source.with_name("model.data"), tmp_path / "link.onnx"):
        with pytest.raises(ConfigError) as caught:
            emit_qdq(frozen, projected(planner), path)
        assert caught.value.code == "QD107"
    assert {p.name: digest(p) for p in frozen.source.parent.iterdir()} == before


def test_an_artifact_beside_the_model_leaves_the_models_data_alone(tmp_path: Path) -> None:
    (tmp_path / "source").mkdir()
    frozen = outside_model(tmp_path / "source")
    beside = frozen.source.with_name(frozen.source.name + ".data")
    beside.write_bytes(b"somebody's")
    emit_qdq(frozen, projected(planner_of(frozen, tmp_path)), frozen.source.with_name("other.onnx"))
    assert beside.read_bytes() == b"somebody's"
    assert frozen.source.with_name("model.data").exists()


def test_an_artifact_that_fails_its_check_does_not_replace_a_good_one(
    cnn: tuple[FrozenModel, Planner], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    frozen, planner = cnn
    path = tmp_path / "model.onnx"
    emit_qdq(frozen, projected(planner), path)
    good = digest(path)

    def refuse(*arguments: Any, **options: Any) -> None:
        raise onnx.checker.ValidationError("not today")

    monkeypatch.setattr(onnx.checker, "check_model", refuse)
    with pytest.raises(ArtifactError) as caught:
        emit_qdq(frozen, projected(planner, "w4a8"), path)
    assert caught.value.code == "QD601"
    assert caught.value.where == str(path)
    assert digest(path) == good
    assert [p.name for p in tmp_path.iterdir()] == ["model.onnx"]
