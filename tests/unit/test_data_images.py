from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from qdist.data.images import ImageSource
from qdist.data.preprocess import Preprocess
from qdist.errors import ConfigError, DataError

SHARED = Path(__file__).resolve().parents[2].parent / "shared" / "assets"
RAW = Preprocess(dtype="keep")


def _save(path: Path, height: int = 20, width: int = 30, seed: int = 0) -> np.ndarray[Any, Any]:
    """A smooth picture, so that resampling has something to average."""
    path.parent.mkdir(parents=True, exist_ok=True)
    small = np.random.default_rng(seed).integers(0, 256, (4, 5, 3), dtype=np.uint8)
    image = Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC)
    image.save(path)
    return np.asarray(image)


def test_stored_pixels_come_out_in_layout_and_colour_order(tmp_path: Path) -> None:
    pixels = _save(tmp_path / "a.png")
    settings: dict[str, Any] = {"folder": tmp_path, "input_name": "x", "preprocess": RAW}
    nchw = ImageSource(**settings).load("a.png")["x"]
    np.testing.assert_array_equal(nchw, pixels.transpose(2, 0, 1), strict=True)
    nhwc = ImageSource(**settings, layout="NHWC").load("a.png")["x"]
    np.testing.assert_array_equal(nhwc, pixels, strict=True)
    bgr = ImageSource(**settings, color="BGR").load("a.png")["x"]
    np.testing.assert_array_equal(bgr, pixels[:, :, ::-1].transpose(2, 0, 1), strict=True)
    gray = ImageSource(**settings, color="GRAY").load("a.png")["x"]
    luma = np.asarray(Image.fromarray(pixels).convert("L"))
    np.testing.assert_array_equal(gray, luma[None], strict=True)
    assert all(array.flags.c_contiguous for array in (nchw, nhwc, bgr, gray))


@pytest.mark.parametrize("layout", ["NCHW", "NHWC"])
def test_mean_and_std_follow_the_channel_order_of_the_result(tmp_path: Path, layout: Any) -> None:
    pixels = _save(tmp_path / "a.png").astype(np.float32)
    source = ImageSource(
        folder=tmp_path,
        input_name="x",
        color="BGR",
        layout=layout,
        preprocess=Preprocess(mean=(1, 2, 3), std=(2, 4, 8)),
    )
    expected = (pixels[:, :, ::-1] - [1, 2, 3]) / [2, 4, 8]
    result = source.load("a.png")["x"]
    result = result.transpose(1, 2, 0) if layout == "NCHW" else result
    np.testing.assert_allclose(result, expected)


@pytest.mark.parametrize(
    ("stored", "resize", "crop", "expected"),
    [
        ((20, 30), 10, None, (10, 15)),
        ((30, 20), 10, None, (15, 10)),
        ((20, 31), 10, None, (10, 15)),
        ((20, 20), 8, None, (8, 8)),
        ((20, 30), (7, 9), None, (7, 9)),
        ((20, 30), None, 16, (16, 16)),
        ((20, 30), 10, 8, (8, 8)),
    ],
)
def test_sizes_after_resize_and_crop(
    tmp_path: Path, stored: tuple[int, int], resize: Any, crop: int | None, expected: Any
) -> None:
    _save(tmp_path / "a.png", *stored)
    source = ImageSource(folder=tmp_path, input_name="x", resize=resize, crop=crop)
    assert source.load("a.png")["x"].shape == (3, *expected)
    assert source.uniform == (crop is not None or isinstance(resize, tuple))


def test_the_crop_is_central_and_the_resize_averages(tmp_path: Path) -> None:
    pixels = np.zeros((20, 30, 3), np.uint8)
    pixels[5:15, 10:20] = 200
    Image.fromarray(pixels).save(tmp_path / "a.png")
    source = ImageSource(folder=tmp_path, input_name="x", crop=10, preprocess=RAW)
    assert (source.load("a.png")["x"] == 200).all()
    stripes = np.zeros((32, 32, 3), np.uint8)
    stripes[:, ::2] = 255
    Image.fromarray(stripes).save(tmp_path / "b.png")
    source = ImageSource(folder=tmp_path, input_name="x", resize=4, preprocess=RAW)
    inner = source.load("b.png")["x"][:, :, 1:-1]
    assert np.abs(inner.astype(int) - 127).max() <= 12


def test_letterbox_keeps_proportions_and_pads_below_and_right(tmp_path: Path) -> None:
    Image.new("RGB", (40, 20), (10, 20, 30)).save(tmp_path / "a.png")
    source = ImageSource(folder=tmp_path, input_name="x", letterbox=(16, 16, 114), preprocess=RAW)
    x = source.load("a.png")["x"]
    assert x.shape == (3, 16, 16)
    assert (x[:, :8] == np.reshape([10, 20, 30], (3, 1, 1))).all()
    assert (x[:, 8:] == 114).all()
    gray = ImageSource(
        folder=tmp_path, input_name="x", letterbox=(16, 8, 9), color="GRAY", preprocess=RAW
    ).load("a.png")["x"]
    assert gray.shape == (1, 16, 8)
    assert (gray[:, 4:] == 9).all()


def test_keys_are_sorted_paths_below_the_folder(tmp_path: Path) -> None:
    for name in ("b/2.JPG", "b/1.jpeg", "a.png", ".hidden.png"):
        _save(tmp_path / name)
    (tmp_path / "labels.csv").write_text("")
    source = ImageSource(folder=tmp_path, input_name="x")
    assert source.keys() == ["a.png", "b/1.jpeg", "b/2.JPG"]
    assert ImageSource(folder=tmp_path, input_name="x", limit=2).keys() == ["a.png", "b/1.jpeg"]


def test_a_list_file_gives_the_samples_and_their_order(tmp_path: Path) -> None:
    for name in ("a.png", "b/1.jpg", "c.png"):
        _save(tmp_path / name)
    (tmp_path / "list.txt").write_text("c.png\n\nb/1.jpg\r\n")
    source = ImageSource(folder=tmp_path, input_name="x", list_file=tmp_path / "list.txt")
    assert source.keys() == ["c.png", "b/1.jpg"]


@pytest.mark.parametrize(
    ("lines", "code", "where"),
    [
        ("a.png\nnone.png\n", "QD301", "none.png"),
        ("a.png\na.png\n", "QD306", "line 2"),
        ("\n", "QD302", "list.txt"),
    ],
)
def test_list_files_that_cannot_be_used(tmp_path: Path, lines: str, code: str, where: str) -> None:
    _save(tmp_path / "a.png")
    (tmp_path / "list.txt").write_text(lines)
    with pytest.raises(DataError, match=code) as caught:
        ImageSource(folder=tmp_path, input_name="x", list_file=tmp_path / "list.txt").keys()
    assert where in caught.value.where


@pytest.mark.parametrize("header", ["", "file,label\n"])
def test_labels_with_and_without_a_header(tmp_path: Path, header: str) -> None:
    for name in ("a.png", "b.png"):
        _save(tmp_path / name)
    (tmp_path / "l.csv").write_text(f"{header}b.png, 7\na.png,0\nnot-in-the-set.png,3\n")
    source = ImageSource(folder=tmp_path, input_name="x", labels_file=tmp_path / "l.csv")
    keys = source.keys()
    labels = [source.label(key) for key in keys]
    assert labels == [0, 7]
    assert all(label is not None and label.shape == () for label in labels)


@pytest.mark.parametrize(
    "rows", ["b.png,1\n", "a.png,cat\n", "a.png\n", "a.png,1\na.png,2\n", "a.png,1,2\n", ""]
)
def test_labels_that_do_not_fit(tmp_path: Path, rows: str) -> None:
    _save(tmp_path / "a.png")
    (tmp_path / "l.csv").write_text(rows)
    source = ImageSource(folder=tmp_path, input_name="x", labels_file=tmp_path / "l.csv")
    with pytest.raises(DataError, match="QD308"):
        source.label("a.png")


def test_damaged_and_missing_files_are_named(tmp_path: Path) -> None:
    _save(tmp_path / "a.jpg", 64, 64)
    whole = (tmp_path / "a.jpg").read_bytes()
    (tmp_path / "half.jpg").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "text.jpg").write_text("hello")
    (tmp_path / "empty.png").write_bytes(b"")
    Image.fromarray(np.full((4, 4), 40000, np.uint16)).save(tmp_path / "deep.png")
    source = ImageSource(folder=tmp_path, input_name="x")
    for key in ("half.jpg", "text.jpg", "empty.png", "deep.png", "gone.png"):
        with pytest.raises(DataError, match="QD306") as caught:
            source.load(key)
        assert caught.value.where.endswith(key)
    with pytest.raises(DataError, match="QD306"):
        source.content_digest("gone.png")


def test_no_folder_no_images_too_small(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="QD301"):
        ImageSource(folder=tmp_path / "none", input_name="x").keys()
    with pytest.raises(DataError, match="QD302"):
        ImageSource(folder=tmp_path, input_name="x").keys()
    _save(tmp_path / "a.png", 20, 30)
    with pytest.raises(DataError, match=r"QD303.*20 x 30.*24 x 24"):
        ImageSource(folder=tmp_path, input_name="x", crop=24).load("a.png")
    with pytest.raises(DataError, match="QD301"):
        ImageSource(folder=tmp_path, input_name="x", labels_file=tmp_path / "none").label("a.png")


@pytest.mark.parametrize(
    ("settings", "code"),
    [
        ({"letterbox": (8, 8, 0), "crop": 4}, "QD107"),
        ({"letterbox": (8, 8, 0), "resize": 4}, "QD107"),
        ({"preprocess": Preprocess(transpose=(2, 0, 1))}, "QD107"),
        ({"crop": 0}, "QD104"),
        ({"resize": (8, 0)}, "QD104"),
        ({"letterbox": (8, 8, 256)}, "QD104"),
        ({"limit": 0}, "QD104"),
        ({"color": "rgb"}, "QD104"),
        ({"layout": "CHW"}, "QD104"),
    ],
)
def test_settings_that_cannot_be(tmp_path: Path, settings: dict[str, Any], code: str) -> None:
    with pytest.raises(ConfigError, match=code):
        ImageSource(folder=tmp_path, input_name="x", **settings)


def test_digest_is_of_the_file_and_settings_are_told_apart(tmp_path: Path) -> None:
    _save(tmp_path / "a.jpg")
    variants: list[dict[str, Any]] = [
        {},
        {"resize": 10},
        {"resize": (10, 10)},
        {"crop": 10},
        {"letterbox": (10, 10, 0)},
        {"color": "BGR"},
        {"layout": "NHWC"},
        {"preprocess": Preprocess(scale=2)},
    ]
    sources = [ImageSource(folder=tmp_path, input_name="x", **variant) for variant in variants]
    expected = hashlib.sha256((tmp_path / "a.jpg").read_bytes()).hexdigest()
    assert {source.content_digest("a.jpg") for source in sources} == {expected}
    assert len({str(source.preprocessing()) for source in sources}) == len(sources)


@pytest.mark.shared
@pytest.mark.skipif(not SHARED.is_dir(), reason="no folder of real data")
def test_squeezenet_reaches_its_float_accuracy() -> None:
    import onnxruntime as ort

    folder = SHARED / "data" / "imagenet100"
    source = ImageSource(
        folder=folder,
        input_name="input",
        labels_file=folder / "labels.csv",
        crop=224,
        preprocess=Preprocess(scale=1 / 255, mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225)),
    )
    session = ort.InferenceSession(SHARED / "models" / "squeezenet1.1.onnx")
    keys = source.keys()
    logits = [session.run(None, {"input": source.load(key)["input"][None]})[0] for key in keys]
    order = np.concatenate(logits).reshape(100, -1).argsort(1)
    labels = np.array([source.label(key) for key in keys])
    assert np.mean(order[:, -1] == labels) == pytest.approx(0.63, abs=0.011)
    assert np.mean((order[:, -5:] == labels[:, None]).any(1)) == pytest.approx(0.87, abs=0.011)


@pytest.mark.shared
@pytest.mark.skipif(not SHARED.is_dir(), reason="no folder of real data")
def test_yolox_sees_what_is_annotated_best_in_the_colour_order_it_was_trained_on() -> None:
    import onnxruntime as ort

    folder = SHARED / "data" / "coco8"
    session = ort.InferenceSession(SHARED / "models" / "yolox_nano_coco.onnx")
    certainty = {"BGR": 0.0, "RGB": 0.0}
    n_right = {"BGR": 0, "RGB": 0}
    for color in ("BGR", "RGB"):
        source = ImageSource(
            folder=folder / "images", input_name="x", letterbox=(416, 416, 114), color=color
        )
        keys = source.keys()
        for key in keys:
            out = session.run(None, {"images": source.load(key)["x"][None]})[0][0]
            scores = (out[:, 4:5] * out[:, 5:]).max(0)
            rows = (folder / "labels" / key).with_suffix(".txt").read_text().splitlines()
            annotated = sorted({int(row.split()[0]) for row in rows})
            n_right[color] += int(scores.argmax()) in annotated
            certainty[color] += float(scores[annotated].sum())
    # The model misses two of the eight images, with another bilinear resampling too.
    assert n_right["BGR"] >= 6
    assert certainty["BGR"] > certainty["RGB"] + 1
