"""A user's inference function, called once; the samples that it fed, kept."""

from __future__ import annotations

import json
import multiprocessing
import pickle
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from onnx import TensorProto, helper, numpy_helper

from qdist.data.captured import INDEX, Capture, Captured, CapturedSource, capture
from qdist.data.checks import InputSpec
from qdist.data.executor import Executor
from qdist.data.manifest import SampleManifest
from qdist.data.source import DataSource
from qdist.errors import ConfigError, DataError, ModelError
from qdist.model.freeze import freeze
from qdist.model.graph import Graph
from qdist.model.loading import load_model
from qdist.model.session import Execution

KNIGHT = """
import numpy as np

def infer_cls_model(executor):
    batch_size = executor.batch_size
    data = np.load(executor.dataset)
    shapes = executor.init_shape_info()
    assert shapes == executor.shape_dicts and executor.input_nodes == ["image"]
    assert executor.output_name_to_node_name()["logits"] == "classify"
    with open(executor.dataset + ".calls", "a") as calls:
        calls.write("x")
    hits = 0
    for i in range(100):
        batch = data[i * batch_size : (i + 1) * batch_size]
        if not len(batch):
            break
        output = executor.forward(batch)
        assert isinstance(output, list) and output[0].shape == (len(batch), 3)
        assert np.allclose(output[0], batch @ np.arange(12, dtype=np.float32).reshape(4, 3))
        hits += int((np.argmax(output[0], axis=1) == 2).sum())
        if i + 1 == executor.iteration:
            break
    return hits / len(data)
"""


@pytest.fixture(autouse=True)
def _clean_imports(tmp_path: Path) -> Iterator[None]:
    path, modules = list(sys.path), set(sys.modules)
    yield
    sys.path[:] = path
    # Of what came meanwhile, the user's modules alone: others' classes must stay what they are.
    for name in set(sys.modules) - modules:
        if str(getattr(sys.modules[name], "__file__", None) or "").startswith(str(tmp_path)):
            del sys.modules[name]


def _model(path: Path, batch: int | str = "batch", factor: float = 1.0) -> Graph:
    """logits = image @ w."""
    weight = (np.arange(12, dtype=np.float32) * factor).reshape(4, 3)
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["image", "w"], ["logits"], name="classify")],
        "model",
        [helper.make_tensor_value_info("image", TensorProto.FLOAT, [batch, 4])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, [batch, 3])],
        [numpy_helper.from_array(weight, "w")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    path.write_bytes(model.SerializeToString())
    return Graph(freeze(load_model(path)))


def _inputs(batch: int | str = "batch") -> tuple[InputSpec, ...]:
    return (InputSpec(name="image", dtype="float32", shape=(batch, 4)),)


def _data(folder: Path, n: int = 10) -> Path:
    np.save(folder / "data.npy", np.random.default_rng(0).random((n, 4)).astype(np.float32))
    return folder / "data.npy"


def _script(folder: Path, text: str = KNIGHT) -> str:
    (folder / "infer.py").write_text(text)
    return f"{folder / 'infer.py'}:infer_cls_model"


def _capture(folder: Path, graph: Graph | None = None, **settings: Any) -> Captured:
    if "target" not in settings:
        settings["target"] = _script(folder)
    if "dataset" not in settings:
        settings["dataset"] = str(_data(folder))
    graph = graph or _model(folder / "m.onnx")
    return capture(Capture(**settings), graph, _inputs(), Execution(), folder / "kept")


def test_a_function_in_knights_style_is_called_once_and_its_samples_are_kept(
    tmp_path: Path,
) -> None:
    captured = _capture(tmp_path, batch_size=3)
    rows = np.load(tmp_path / "data.npy")
    assert (captured.n_samples, captured.n_forwards, captured.n_repeated) == (10, 4, 0)
    assert not captured.reused
    assert isinstance(captured.source, DataSource)
    source = pickle.loads(pickle.dumps(captured.source))
    stored = [source.load(key)["image"] for key in source.keys()]  # noqa: SIM118
    assert all((row == kept).all() for row, kept in zip(rows, stored, strict=True))
    assert stored[0].dtype == np.float32
    assert source.label(source.keys()[0]) is None
    assert len(SampleManifest.first(source)) == 10


def test_no_more_than_the_iterations_asked_for(tmp_path: Path) -> None:
    captured = _capture(tmp_path, batch_size=2, iteration=3)
    assert (captured.n_samples, captured.n_forwards) == (6, 3)
    # One that pays no heed, whatever it catches.
    target = _script(
        tmp_path,
        "import numpy as np\n"
        "def infer_cls_model(executor):\n"
        "    for i in range(1000):\n"
        "        try:\n"
        "            executor.forward(np.full((1, 4), i, np.float32))\n"
        "        except Exception:\n"
        "            pass\n",
    )
    captured = _capture(tmp_path, target=target, iteration=5)
    assert (captured.n_samples, captured.n_forwards) == (5, 5)
    # One that leaves when it is told that enough was fed.
    target = _script(
        tmp_path,
        "import numpy as np\n"
        "def infer_cls_model(executor, done):\n"
        "    i = 0\n"
        "    while not executor.early_stop_flag:\n"
        "        executor.forward(np.full((2, 4), i, np.float32))\n"
        "        i += 1\n"
        "    open(done, 'w').close()\n",
    )
    done = tmp_path / "done"
    captured = _capture(tmp_path, target=target, iteration=4, arguments={"done": str(done)})
    assert (captured.n_forwards, captured.n_samples, captured.n_repeated) == (4, 4, 4)
    assert done.exists()


def test_what_was_captured_is_used_again_until_something_changes(tmp_path: Path) -> None:
    calls = tmp_path / "data.npy.calls"
    graph, data = _model(tmp_path / "m.onnx"), str(_data(tmp_path))

    def again(**settings: Any) -> bool:
        return _capture(tmp_path, **{"graph": graph, "dataset": data, **settings}).reused

    assert [again(), again()] == [False, True]
    assert calls.read_text() == "x"
    assert [again(batch_size=2), again(batch_size=2)] == [False, True]
    target = _script(tmp_path, KNIGHT + "\n# another\n")
    assert [again(target=target), again(target=target)] == [False, True]
    other = _model(tmp_path / "other.onnx", factor=1.0000001)
    assert [again(graph=other), again(graph=other)] == [False, True]
    _data(tmp_path, 11)
    assert [again(graph=other), again(graph=other)] == [False, True]
    assert calls.read_text() == "x" * 5
    # A capture that was broken off leaves no index.
    with pytest.raises(DataError, match="QD310"):
        again(target=_script(tmp_path, "def infer_cls_model(executor): 1 / 0"))
    assert not (tmp_path / "kept" / INDEX).exists()
    with pytest.raises(DataError, match=r"QD301.*captured\.json"):
        CapturedSource(folder=tmp_path / "kept").keys()


@pytest.mark.parametrize("batch", ["batch", 1, 2])
def test_models_of_fixed_batches_get_them_whole(tmp_path: Path, batch: int | str) -> None:
    graph, data = _model(tmp_path / "m.onnx", batch), str(_data(tmp_path, 6))
    size = 1 if batch == "batch" else int(batch)
    call = Capture(target=_script(tmp_path), dataset=data, batch_size=size)
    captured = capture(call, graph, _inputs(batch), Execution(), tmp_path / "kept")
    key = captured.source.keys()[0]
    assert captured.source.load(key)["image"].shape == ((2, 4) if batch == 2 else (4,))
    assert captured.n_samples == (3 if batch == 2 else 6)


@pytest.mark.parametrize(
    ("body", "code", "match"),
    [
        ("    y = 1\n    raise RuntimeError('no\\nluck')", "QD310", r"infer\.py:4.*no luck"),
        ("    import sys; sys.exit(3)", "QD310", r"infer\.py:3.*SystemExit"),
        ("    np.zeros(3).reshape(5)", "QD310", r"infer\.py:3.*ValueError"),
        ("    return 1", "QD302", "never called executor.forward"),
        ("    executor.forward()", "QD307", "image"),
        ("    executor.forward(np.zeros((1, 4)))", "QD205", "image"),
    ],
)
def test_functions_that_fail_say_where(tmp_path: Path, body: str, code: str, match: str) -> None:
    text = f"import numpy as np\ndef infer_cls_model(executor):\n{body}\n"
    with pytest.raises((DataError, ModelError), match=f"{code}.*{match}"):
        _capture(tmp_path, target=_script(tmp_path, text))


def test_calls_that_cannot_be_made(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="QD108"):
        _capture(tmp_path, target=f"{tmp_path / 'none.py'}:f")
    with pytest.raises(DataError, match=r"QD310.*unexpected keyword"):
        _capture(tmp_path, arguments={"colour": 1})
    for name in ("batch_size", "iteration"):
        settings: dict[str, Any] = {name: 0}
        with pytest.raises(ConfigError, match="QD104"):
            _capture(tmp_path, **settings)


def test_damaged_folders_are_noticed(tmp_path: Path) -> None:
    captured = _capture(tmp_path)
    key = captured.source.keys()[0]
    manifest = SampleManifest.first(captured.source)
    with pytest.raises(DataError, match="QD306"):
        captured.source.load("none")
    other = captured.source.keys()[1]
    (tmp_path / "kept" / f"{key}.npz").write_bytes(
        (tmp_path / "kept" / f"{other}.npz").read_bytes()
    )
    assert SampleManifest.first(captured.source).ids != manifest.ids
    (tmp_path / "kept" / f"{key}.npz").unlink()
    with pytest.raises(DataError, match="QD301"):
        captured.source.load(key)
    index = tmp_path / "kept" / INDEX
    for text in ("{", "{}", "3", json.dumps({"made_from": 1})):
        index.write_text(text)
        with pytest.raises(DataError, match="QD306"):
            CapturedSource(folder=tmp_path / "kept").keys()


def _in_a_process(folder: str, data: str, target: str) -> bool:
    call = Capture(target=target, dataset=data)
    graph = Graph(freeze(load_model(Path(folder, "m.onnx"))))
    return capture(call, graph, _inputs(), Execution(), Path(folder, "kept")).reused


def test_two_processes_call_the_function_once(tmp_path: Path) -> None:
    _model(tmp_path / "m.onnx")
    arguments = (str(tmp_path), str(_data(tmp_path)), _script(tmp_path))
    with multiprocessing.get_context("spawn").Pool(2) as pool:
        reused = pool.starmap(_in_a_process, [arguments] * 2)
    assert sorted(reused) == [False, True]
    assert (tmp_path / "data.npy.calls").read_text() == "x"


def test_the_executor_has_what_the_contract_names() -> None:
    executor = Executor(
        run=lambda feeds: [feeds["a"]],
        input_nodes=["a"],
        output_nodes=["b"],
        model_path=Path("m.onnx"),
        node_shapes={"layer": ["batch", 3]},
        node_of_output={"b": "layer"},
    )
    assert executor.shape_dicts == {}
    executor.init_shape_info()
    assert executor.shape_dicts == {"layer": ["batch", 3]}
    assert executor.output_name_to_node_name() == {"b": "layer"}
    assert (executor.iteration, executor.batch_size, executor.dataset) == (None, 1, None)
    assert executor.early_stop_flag is False
