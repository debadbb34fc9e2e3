from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from qdist.data.arrays import ArraySource
from qdist.data.preprocess import Preprocess
from qdist.errors import ConfigError, DataError

SHARED = Path(__file__).resolve().parents[2].parent / "shared" / "assets"


def test_sample_i_is_row_i_of_every_mapped_array(tmp_path: Path) -> None:
    x = np.arange(12, dtype=np.int8).reshape(4, 3)
    h = np.arange(4, dtype=np.float64)
    np.savez(tmp_path / "a.npz", x=x, h=h, y=np.array([3, 2, 1, 0], np.uint8))
    source = ArraySource(
        path=tmp_path / "a.npz",
        inputs={"input": "x", "state": "h"},
        labels="y",
        preprocess={"input": Preprocess(mean=(1,))},
    )
    assert source.keys() == ["000000", "000001", "000002", "000003"]
    feeds = source.load("000002")
    np.testing.assert_array_equal(feeds["input"], x[2].astype(np.float32) - 1, strict=True)
    np.testing.assert_array_equal(feeds["state"], h[2, ...], strict=True)
    assert source.label("000002") == 1


@pytest.mark.parametrize("order", ["C", "F"])
@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_stored_and_compressed_archives_give_the_same(
    tmp_path: Path, save: Any, order: Any
) -> None:
    x = np.asarray(np.random.default_rng(0).normal(size=(5, 3, 4)), order=order)
    save(tmp_path / "a.npz", other=np.zeros(7), x=x)
    source = ArraySource(
        path=tmp_path / "a.npz", inputs={"x": "x"}, preprocess=Preprocess(dtype="keep")
    )
    for i, key in enumerate(source.keys()):
        np.testing.assert_array_equal(source.load(key)["x"], x[i], strict=True)


def test_uncompressed_arrays_are_mapped_rather_than_read(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", x=np.ones((4, 8)))
    np.save(tmp_path / "a.npy", np.ones((4, 8)))
    for path, key in ((tmp_path / "a.npz", "x"), (tmp_path / "a.npy", "")):
        source = ArraySource(path=path, inputs={"x": key})
        source.keys()
        assert isinstance(source._arrays[key], np.memmap)


def test_foreign_byte_order_is_brought_home_without_changing_values(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.array([[1.5, -2.0]], ">f4"))
    source = ArraySource(
        path=tmp_path / "a.npy", inputs={"x": ""}, preprocess=Preprocess(dtype="keep")
    )
    expected = np.array([1.5, -2.0], np.float32)
    np.testing.assert_array_equal(source.load("000000")["x"], expected, strict=True)


def test_start_and_limit_keep_the_keys_of_the_file(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.arange(10))
    source = ArraySource(path=tmp_path / "a.npy", inputs={"x": ""}, start=3, limit=2)
    assert source.keys() == ["000003", "000004"]
    assert source.load("000004")["x"] == 4
    with pytest.raises(DataError, match="QD306"):
        source.load("000005")
    rest = ArraySource(path=tmp_path / "a.npy", inputs={"x": ""}, start=8, limit=50)
    assert rest.keys() == ["000008", "000009"]


def test_a_folder_holds_one_sample_per_file_of_any_shape(tmp_path: Path) -> None:
    for name, n in (("b", 2), ("a", 5)):
        np.savez(tmp_path / f"{name}.npz", ids=np.arange(n), sr=np.int64(16000), y=np.int8(n))
    (tmp_path / "notes.txt").write_text("not a sample")
    source = ArraySource(
        path=tmp_path,
        inputs={"ids": "ids", "sr": "sr"},
        labels="y",
        preprocess=Preprocess(dtype="keep"),
    )
    assert source.keys() == ["a.npz", "b.npz"]
    assert source.load("a.npz")["ids"].shape == (5,)
    assert source.load("b.npz")["sr"].shape == ()
    assert source.label("b.npz") == 2


def test_arrays_of_different_lengths_are_refused_with_both_numbers(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", x=np.zeros(4), h=np.zeros(3), y=np.zeros(5, int))
    with pytest.raises(DataError, match=r"QD306.*'h'.*3 entries beside 4"):
        ArraySource(path=tmp_path / "a.npz", inputs={"x": "x", "h": "h"}).keys()
    with pytest.raises(DataError, match=r"QD308.*'y'.*5 entries beside 4"):
        ArraySource(path=tmp_path / "a.npz", inputs={"x": "x"}, labels="y").keys()


def test_a_missing_key_lists_those_there(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", pixels=np.zeros(4), labels=np.zeros(4))
    with pytest.raises(DataError, match=r"QD307.*'x'.*labels, pixels"):
        ArraySource(path=tmp_path / "a.npz", inputs={"input": "x"}).keys()


def test_labels_that_are_no_integers_are_refused(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", x=np.zeros(4), y=np.zeros(4))
    source = ArraySource(path=tmp_path / "a.npz", inputs={"x": "x"}, labels="y")
    with pytest.raises(DataError, match=r"QD308.*float64"):
        source.label("000000")


def test_nothing_there_and_nothing_in_it(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="QD301"):
        ArraySource(path=tmp_path / "none.npz", inputs={"x": "x"}).keys()
    np.savez(tmp_path / "a.npz", x=np.zeros((0, 3)))
    np.save(tmp_path / "a.npy", np.zeros((0, 3)))
    for path, key in ((tmp_path / "a.npz", "x"), (tmp_path / "a.npy", "")):
        with pytest.raises(DataError, match="QD302"):
            ArraySource(path=path, inputs={"x": key}).keys()
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="QD302"):
        ArraySource(path=tmp_path / "empty", inputs={"x": "x"}).keys()
    np.save(tmp_path / "b.npy", np.zeros(3))
    with pytest.raises(DataError, match=r"QD302.*first 3"):
        ArraySource(path=tmp_path / "b.npy", inputs={"x": ""}, start=3).keys()


def _damage(path: Path, kind: str) -> None:
    whole = path.read_bytes()
    if kind == "truncated":
        path.write_bytes(whole[: len(whole) // 2])
    elif kind == "text":
        path.write_text("hello")
    elif kind == "empty":
        path.write_bytes(b"")
    else:
        middle = len(whole) // 2
        path.write_bytes(whole[:middle] + bytes(64) + whole[middle + 64 :])


@pytest.mark.parametrize("kind", ["truncated", "text", "empty"])
@pytest.mark.parametrize("suffix", ["npz", "npy"])
def test_damaged_files_are_refused(tmp_path: Path, kind: str, suffix: str) -> None:
    path = tmp_path / f"a.{suffix}"
    x = np.random.default_rng(1).normal(size=(50, 3))
    np.savez(path, x=x) if suffix == "npz" else np.save(path, x)
    _damage(path, kind)
    with pytest.raises(DataError, match="QD306") as caught:
        ArraySource(path=path, inputs={"x": "x" if suffix == "npz" else ""}).keys()
    assert caught.value.where == str(path)


def test_a_damaged_compressed_member_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.npz"
    np.savez_compressed(path, x=np.random.default_rng(1).normal(size=(50, 3)))
    _damage(path, "overwritten")
    with pytest.raises(DataError, match="QD306"):
        ArraySource(path=path, inputs={"x": "x"}).keys()


def test_pickled_objects_other_endings_and_scalars_are_refused(tmp_path: Path) -> None:
    np.save(tmp_path / "o.npy", np.array([{"a": 1}]), allow_pickle=True)
    np.savez(tmp_path / "o.npz", x=np.array([{"a": 1}]), s=np.float32(1))
    (tmp_path / "a.csv").write_text("1,2")
    for name, key in (("o.npy", ""), ("o.npz", "x"), ("o.npz", "s"), ("a.csv", "x")):
        with pytest.raises(DataError, match="QD306"):
            ArraySource(path=tmp_path / name, inputs={"x": key}).keys()


def test_an_npy_file_takes_one_input_and_no_labels(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.zeros(3))
    with pytest.raises(DataError, match="QD307"):
        ArraySource(path=tmp_path / "a.npy", inputs={"x": "x"}).keys()
    with pytest.raises(DataError, match="QD307"):
        ArraySource(path=tmp_path / "a.npy", inputs={"x": ""}, labels="y").keys()


def test_bad_settings(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="QD104"):
        ArraySource(path=tmp_path, inputs={"x": "x"}, limit=0)
    with pytest.raises(ConfigError, match="QD104"):
        ArraySource(path=tmp_path, inputs={"x": "x"}, start=-1)
    with pytest.raises(DataError, match=r"QD307.*for z"):
        ArraySource(path=tmp_path, inputs={"x": "x"}, preprocess={"z": Preprocess()})
    with pytest.raises(DataError, match="QD307"):
        ArraySource(path=tmp_path, inputs={})


def test_the_content_digest_ignores_preprocessing_and_other_samples(tmp_path: Path) -> None:
    x = np.arange(12, dtype=np.float32).reshape(4, 3)
    np.save(tmp_path / "a.npy", x)
    np.save(tmp_path / "b.npy", x[2:])
    a = ArraySource(path=tmp_path / "a.npy", inputs={"x": ""})
    b = ArraySource(path=tmp_path / "b.npy", inputs={"x": ""}, preprocess=Preprocess(scale=2))
    assert a.content_digest("000002") == b.content_digest("000000")
    assert a.preprocessing() != b.preprocessing()


@pytest.mark.shared
@pytest.mark.skipif(not SHARED.is_dir(), reason="no folder of real data")
@pytest.mark.parametrize(
    ("model", "file", "inputs", "labels", "preprocess", "least"),
    [
        (
            "cifar10_resnet20.onnx",
            "cifar10_clean242_vnncomp.npz",
            "x",
            "y",
            Preprocess(
                scale=1 / 255,
                mean=(0.485, 0.456, 0.406),
                std=(0.229, 0.224, 0.225),
                transpose=(2, 0, 1),
            ),
            0.9255,
        ),
        (
            "mlperf_tiny_kws_dscnn.onnx",
            "kws01_mfcc.npz",
            "x_int8",
            "y",
            Preprocess(mean=(83,), std=(1 / 0.5847029,)),
            0.912,
        ),
    ],
)
def test_real_models_reach_their_float_accuracy(
    model: str, file: str, inputs: str, labels: str, preprocess: Preprocess, least: float
) -> None:
    import onnxruntime as ort

    session = ort.InferenceSession(SHARED / "models" / model)
    name = session.get_inputs()[0].name
    source = ArraySource(
        path=SHARED / "data" / file, inputs={name: inputs}, labels=labels, preprocess=preprocess
    )
    keys = source.keys()
    x = np.stack([source.load(key)[name] for key in keys])
    y = [source.label(key) for key in keys]
    accuracy = np.mean(session.run(None, {name: x})[0].argmax(1) == np.array(y))
    assert accuracy >= least
