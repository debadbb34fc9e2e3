from __future__ import annotations

import os
import shutil
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from qdist.demo import demo_file
from qdist.errors import ModelError
from qdist.model.loading import load_model
from qdist.model.weights import Weights, external_range, n_bytes_of
from tests.onnx_models import model, normal, value

VIT = demo_file("digits_vit.onnx")
N_VIT = VIT.stat().st_size


def refused(path: Path, code: str) -> ModelError:
    with pytest.raises(ModelError) as caught:
        load_model(path)
    assert caught.value.code == code
    return caught.value


def external_model(folder: Path, name: str = "model") -> Path:
    """Two MatMuls with both weights in one file beside the graph."""
    nodes = [
        helper.make_node("MatMul", ["x", "w1"], ["h"], "first"),
        helper.make_node("MatMul", ["h", "w2"], ["y"], "second"),
    ]
    proto = model(
        nodes,
        [value("x", ["b", 32])],
        [value("y", ["b", 16])],
        {"w1": normal(32, 64), "w2": normal(64, 16, seed=1)},
    )
    onnx.save(
        proto,
        folder / f"{name}.onnx",
        save_as_external_data=True,
        location=f"{name}.data",
        size_threshold=0,
    )
    return folder / f"{name}.onnx"


def test_nothing_there_and_a_folder_are_not_found(tmp_path: Path) -> None:
    assert refused(tmp_path / "absent.onnx", "QD201").got == "nothing there"
    error = refused(tmp_path, "QD201")
    assert (error.where, error.got) == (str(tmp_path), "a folder")


@pytest.mark.parametrize(
    "text",
    [
        b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n",
        b"<html><body>404 Not Found</body></html>",
        "caf\u00e9 ".encode() * 50,
    ],
    ids=["lfs", "html", "accents"],
)
def test_text_is_no_model_and_the_error_shows_its_beginning(tmp_path: Path, text: bytes) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(text)
    error = refused(path, "QD202")
    assert text[:12].decode("utf-8", "ignore")[:8] in error.got
    assert "Git LFS" in error.mend


def test_empty_file_is_no_model(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    path.touch()
    assert refused(path, "QD202").got == "an empty file"


@pytest.mark.parametrize(
    "n", [1, 2, 5, 16, 40, 1000, N_VIT // 2, N_VIT - 4096, N_VIT - 2, N_VIT - 1]
)
def test_truncated_model_is_called_truncated(tmp_path: Path, n: int) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(VIT.read_bytes()[:n])
    assert str(n) in refused(path, "QD203").got


def test_model_cut_anywhere_is_refused(tmp_path: Path) -> None:
    data = demo_file("digits_cnn.onnx").read_bytes()
    path = tmp_path / "model.onnx"
    for n in np.random.default_rng(0).integers(1, len(data), 40):
        path.write_bytes(data[:n])
        refused(path, "QD203")


def test_other_binary_files_are_no_models(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    rng = np.random.default_rng(1)
    for first in (0x00, 0x1C, 0x50, 0x80, 0xFF):
        path.write_bytes(bytes([first]) + rng.bytes(5000))
        refused(path, "QD202")
    np.savez(tmp_path / "arrays.npz", x=np.ones(3))
    refused(tmp_path / "arrays.npz", "QD202")


def test_protobuf_of_another_kind_is_no_model(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(numpy_helper.from_array(normal(4, 4), "w").SerializeToString())
    with pytest.raises(ModelError, match=r"QD20[23]"):
        load_model(path)


def test_model_without_nodes_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    onnx.save(model([], [value("x", [1])], []), path)
    refused(path, "QD203")


def test_loading_keeps_the_graph_and_counts_its_bytes() -> None:
    found = load_model(str(VIT))
    assert found.path == VIT
    assert found.n_bytes == N_VIT
    assert found.proto() == onnx.load(VIT)
    assert found.digest == load_model(VIT).digest


def test_relative_path_is_the_same_model(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    shutil.copy(VIT, tmp_path / "m.onnx")
    monkeypatch.chdir(tmp_path)
    assert load_model("m.onnx").path == tmp_path / "m.onnx"


def test_external_data_stays_outside_and_is_counted(tmp_path: Path) -> None:
    path = external_model(tmp_path)
    seen: list[tuple[int, int]] = []
    found = load_model(path, on_progress=lambda done, total: seen.append((done, total)))
    n_data = 4 * (32 * 64 + 64 * 16)
    assert len(found.graph_bytes) < 1000
    assert found.n_bytes == len(found.graph_bytes) + n_data
    assert seen[-1] == (found.n_bytes, found.n_bytes)
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)


def test_missing_external_data_is_named(tmp_path: Path) -> None:
    path = external_model(tmp_path)
    (tmp_path / "model.data").unlink()
    error = refused(path, "QD204")
    assert error.where == "weight w1"
    assert str(tmp_path / "model.data") in error.got


def test_short_external_data_names_the_weight_that_breaks_off(tmp_path: Path) -> None:
    path = external_model(tmp_path)
    data = tmp_path / "model.data"
    os.truncate(data, data.stat().st_size - 1)
    assert "weight w2" in refused(path, "QD204").where
    os.truncate(data, 100)
    assert "weight w1" in refused(path, "QD204").where


def test_external_length_below_the_shape_is_refused(tmp_path: Path) -> None:
    path = external_model(tmp_path)
    proto = onnx.load(path, load_external_data=False)
    (entry,) = (e for e in proto.graph.initializer[0].external_data if e.key == "length")
    entry.value = "100"
    onnx.save(proto, path)
    assert "weight w1" in refused(path, "QD204").where


def test_one_changed_byte_of_external_data_is_another_model(tmp_path: Path) -> None:
    path = external_model(tmp_path)
    before = load_model(path).digest
    data = tmp_path / "model.data"
    stat = data.stat()
    for position in (0, stat.st_size // 2, stat.st_size - 1):
        content = bytearray(data.read_bytes())
        content[position] ^= 1
        data.write_bytes(content)
        os.utime(data, ns=(stat.st_atime_ns, stat.st_mtime_ns))
        assert (data.stat().st_size, data.stat().st_mtime_ns) == (stat.st_size, stat.st_mtime_ns)
        assert load_model(path).digest != before
        content[position] ^= 1
        data.write_bytes(content)
        assert load_model(path).digest == before


def test_external_weights_of_bodies_and_constants_count_too(tmp_path: Path) -> None:
    weight = numpy_helper.from_array(normal(8, 8), "inner")
    constant = numpy_helper.from_array(normal(8, 8, seed=2), "value")
    body = helper.make_graph(
        [
            helper.make_node("Constant", [], ["c"], value=constant),
            helper.make_node("MatMul", ["x", "inner"], ["m"]),
            helper.make_node("MatMul", ["m", "c"], ["then"]),
        ],
        "then",
        [],
        [value("then", None)],
        [weight],
    )
    other = helper.make_graph(
        [helper.make_node("Identity", ["x"], ["else"])], "else", [], [value("else", None)]
    )
    proto = model(
        [helper.make_node("If", ["flag"], ["y"], then_branch=body, else_branch=other)],
        [value("x", ["b", 8]), value("flag", [], TensorProto.BOOL)],
        [value("y", ["b", 8])],
    )
    path = tmp_path / "model.onnx"
    onnx.save(
        proto,
        path,
        save_as_external_data=True,
        location="model.data",
        size_threshold=0,
        convert_attribute=True,
    )
    data = tmp_path / "model.data"
    assert data.stat().st_size >= 512
    before = load_model(path)
    assert before.n_bytes == path.stat().st_size + 512
    for position in (3, data.stat().st_size - 1):
        content = bytearray(data.read_bytes())
        content[position] ^= 4
        data.write_bytes(content)
        assert load_model(path).digest != before.digest
        content[position] ^= 4
        data.write_bytes(content)
    data.unlink()
    refused(path, "QD204")


@pytest.mark.parametrize(
    "array",
    [
        normal(3, 5),
        normal(7).astype(np.float16),
        np.arange(6, dtype=np.int64).reshape(2, 3),
        np.float32(3.5),
        np.zeros((0, 4), np.float32),
    ],
    ids=["matrix", "half", "integers", "scalar", "empty"],
)
def test_external_weights_read_as_inline_ones(tmp_path: Path, array: np.ndarray) -> None:
    inline = numpy_helper.from_array(np.asarray(array), "w")
    outside = TensorProto.FromString(inline.SerializeToString())
    (tmp_path / "w.data").write_bytes(b"\1" * 8 + inline.raw_data + b"\2" * 8)
    outside.ClearField("raw_data")
    outside.data_location = TensorProto.EXTERNAL
    outside.external_data.add(key="location", value="w.data")
    outside.external_data.add(key="offset", value="8")
    for tensor, folder in ((inline, None), (outside, tmp_path)):
        found = Weights([tensor], folder)
        assert found.names() == ["w"]
        assert "w" in found
        assert found.shape("w") == np.shape(array)
        assert found.n_bytes("w") == n_bytes_of(tensor) == np.asarray(array).nbytes
        np.testing.assert_array_equal(found.read("w"), array, strict=True)
        assert found.read_float32("w").dtype == np.float32


def test_four_bit_weights_read_the_same_outside(tmp_path: Path) -> None:
    inline = helper.make_tensor("w", TensorProto.INT4, [3, 3], list(range(-4, 5)))
    packed = numpy_helper.from_array(numpy_helper.to_array(inline), "w").raw_data
    (tmp_path / "w.data").write_bytes(packed)
    outside = TensorProto(name="w", data_type=TensorProto.INT4, dims=[3, 3])
    outside.data_location = TensorProto.EXTERNAL
    outside.external_data.add(key="location", value="w.data")
    assert n_bytes_of(outside) == 5
    found = Weights([outside], tmp_path).read("w").astype(np.int8)
    np.testing.assert_array_equal(found, np.arange(-4, 5, dtype=np.int8).reshape(3, 3))


def test_external_range_is_what_the_weight_needs_of_a_longer_entry(tmp_path: Path) -> None:
    (tmp_path / "w.data").write_bytes(bytes(100))
    tensor = TensorProto(name="w", data_type=TensorProto.FLOAT, dims=[5])
    assert external_range(tensor, tmp_path) is None
    tensor.data_location = TensorProto.EXTERNAL
    for key, text in (("location", "w.data"), ("offset", "4"), ("length", "64")):
        tensor.external_data.add(key=key, value=text)
    place = external_range(tensor, tmp_path)
    assert place is not None
    assert (place.path, place.offset, place.n_bytes) == (tmp_path / "w.data", 4, 20)
