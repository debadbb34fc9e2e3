"""Models without the weights that they have in common: whole again, they compute the same."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
from onnx import TensorProto, helper, numpy_helper

from qdist.emit.shared_weights import SharedWeights

WEIGHTS = np.random.default_rng(3).normal(size=(64, 48)).astype(np.float32)


def model_at(path: Path, scale: float, *, outside: bool = False) -> Path:
    """x [n, 64] -> x @ W * scale; with ``outside``, W in a file beside."""
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["h"]),
        helper.make_node("Mul", ["h", "s"], ["y"]),
    ]
    constants = [
        numpy_helper.from_array(WEIGHTS, "w"),
        numpy_helper.from_array(np.float32(scale), "s"),
    ]
    ends = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n", width])
        for name, width in (("x", 64), ("y", 48))
    ]
    graph = helper.make_graph(nodes, "g", ends[:1], ends[1:], constants)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    path.parent.mkdir(parents=True)
    if outside:
        onnx.save(model, path, save_as_external_data=True, location=f"{path.name}.12345678.data")
    else:
        onnx.save(model, path)
    return path


def run(path: Path) -> list[float]:
    x = np.random.default_rng(4).normal(size=(2, 64)).astype(np.float32)
    (y,) = ort.InferenceSession(path, providers=["CPUExecutionProvider"]).run(None, {"x": x})
    return list(np.asarray(y).ravel())


def test_weights_of_several_models_are_kept_once(tmp_path: Path) -> None:
    shared = SharedWeights(tmp_path / "weights", small_bytes=1000)
    kept = tmp_path / "kept"
    (kept / "weights").mkdir(parents=True)
    fresh = []
    for i, outside in enumerate((False, False, True)):
        path = model_at(tmp_path / str(i) / "model.onnx", 1.0 + i, outside=outside)
        found = shared.split(path)
        assert found is not None
        assert len(found.names) == 1
        assert found.graph.stat().st_size < WEIGHTS.nbytes / 4
        fresh.append(len(found.fresh))
        for blob in found.fresh:
            shutil.copy(blob, kept / "weights" / blob.name)
        shutil.copy(found.graph, kept / "model.onnx")
        shared.forget(found)
        assert list((tmp_path / "weights").iterdir()) == []
        assert run(kept / "model.onnx") == run(path)
    assert fresh == [1, 0, 0]


def test_small_models_stay_whole(tmp_path: Path) -> None:
    path = model_at(tmp_path / "a" / "model.onnx", 1.0)
    assert SharedWeights(tmp_path / "weights").split(path) is None
    assert not (tmp_path / "weights").exists()
