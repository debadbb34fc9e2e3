"""One contract for every implementation of DataSource."""

from __future__ import annotations

import json
import pickle
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from qdist.data.arrays import ArraySource
from qdist.data.function import FunctionSource
from qdist.data.images import ImageSource
from qdist.data.manifest import SampleManifest
from qdist.data.preprocess import Preprocess
from qdist.data.source import DataSource
from qdist.data.text import TextSource

N = 5


def _npz(folder: Path) -> DataSource:
    x = np.arange(N * 6, dtype=np.uint8).reshape(N, 2, 3)
    np.savez(folder / "set.npz", x=x, y=np.arange(N))
    return ArraySource(path=folder / "set.npz", inputs={"input": "x"}, labels="y")


def _compressed_npz(folder: Path) -> DataSource:
    x = np.arange(N * 6, dtype=np.uint8).reshape(N, 2, 3)
    np.savez_compressed(folder / "set.npz", x=x)
    return ArraySource(path=folder / "set.npz", inputs={"input": "x"})


def _npy(folder: Path) -> DataSource:
    np.save(folder / "set.npy", np.arange(N * 6, dtype=np.float32).reshape(N, 6))
    return ArraySource(path=folder / "set.npy", inputs={"input": ""})


def _folder_of_npz(folder: Path) -> DataSource:
    for i in range(N):
        np.savez(folder / f"{i}.npz", ids=np.arange(3 + i), y=np.int32(i))
    return ArraySource(path=folder, inputs={"input": "ids"}, labels="y")


def _images(folder: Path) -> DataSource:
    for i in range(N):
        pixels = np.full((10, 12, 3), 20 * i, np.uint8)
        Image.fromarray(pixels).save(folder / f"{i}.png")
    rows = "".join(f"{i}.png,{i}\n" for i in range(N))
    (folder / "labels.csv").write_text(rows)
    return ImageSource(
        folder=folder,
        input_name="x",
        crop=8,
        labels_file=folder / "labels.csv",
        preprocess=Preprocess(dtype="keep"),
        layout="NHWC",
    )


def _text(folder: Path) -> DataSource:
    pieces = [b"<unk>", b"\n<s>\n", b"\n</s>\n", *(f"<0x{b:02X}>".encode() for b in range(256))]
    content = struct.pack("<i", 7)
    for piece in pieces:
        content += struct.pack("<fi", 0.0, len(piece)) + piece
    (folder / "tok.bin").write_bytes(content)
    (folder / "text.txt").write_text("One line.\nAnother line, which is longer.\n")
    return TextSource(
        path=folder / "text.txt",
        tokenizer_path=folder / "tok.bin",
        input_name="ids",
        lengths=(4, 8),
        n_samples=N,
    )


def _function(folder: Path) -> DataSource:
    (folder / "mine.py").write_text(
        "import numpy as np\n"
        "def samples(n):\n"
        "    for i in range(n):\n"
        "        yield {'x': np.full((2, 2), i, np.float32)}, i\n"
    )
    return FunctionSource(target=f"{folder / 'mine.py'}:samples", arguments={"n": N})


SOURCES = [_npz, _compressed_npz, _npy, _folder_of_npz, _images, _text, _function]


@pytest.mark.parametrize("make", SOURCES)
class TestDataSourceContract:
    def test_follows_the_protocol(self, make: Callable[[Path], DataSource], tmp_path: Path) -> None:
        assert isinstance(make(tmp_path), DataSource)

    def test_keys_are_unique_and_stable(
        self, make: Callable[[Path], DataSource], tmp_path: Path
    ) -> None:
        source = make(tmp_path)
        keys = source.keys()
        assert len(set(keys)) == N
        keys.clear()
        assert len(source.keys()) == N

    def test_loading_twice_gives_the_same_arrays_which_callers_may_change(
        self, make: Callable[[Path], DataSource], tmp_path: Path
    ) -> None:
        source = make(tmp_path)
        keys = source.keys()
        for key in keys:
            first, second = source.load(key), source.load(key)
            assert first.keys() == second.keys()
            for name in first:
                assert type(first[name]) is np.ndarray
                assert first[name].dtype.isnative
                np.testing.assert_array_equal(first[name], second[name], strict=True)
                before = second[name].copy()
                first[name][...] = 0
                np.testing.assert_array_equal(second[name], before, strict=True)
                np.testing.assert_array_equal(source.load(key)[name], before, strict=True)

    def test_content_digests_tell_samples_apart(
        self, make: Callable[[Path], DataSource], tmp_path: Path
    ) -> None:
        source = make(tmp_path)
        keys = source.keys()
        digests = [source.content_digest(key) for key in keys]
        assert len(set(digests)) == N
        assert all(len(digest) == 64 for digest in digests)

    def test_a_pickled_source_is_small_and_gives_the_same(
        self, make: Callable[[Path], DataSource], tmp_path: Path
    ) -> None:
        source = make(tmp_path)
        untouched = len(pickle.dumps(source))
        manifest = SampleManifest.first(source)
        pickled = pickle.dumps(source)
        assert len(pickled) == untouched
        other = pickle.loads(pickled)
        assert SampleManifest.first(other) == manifest
        keys = source.keys()
        for key in keys:
            for name, array in source.load(key).items():
                np.testing.assert_array_equal(other.load(key)[name], array, strict=True)
            np.testing.assert_array_equal(other.label(key), source.label(key))

    def test_preprocessing_is_json(
        self, make: Callable[[Path], DataSource], tmp_path: Path
    ) -> None:
        value = make(tmp_path).preprocessing()
        assert json.loads(json.dumps(value)) == value

    def test_labels_are_int64_or_none(
        self, make: Callable[[Path], DataSource], tmp_path: Path
    ) -> None:
        source = make(tmp_path)
        has_labels = make in (_npz, _folder_of_npz, _images, _function)
        for i, key in enumerate(source.keys()):
            label = source.label(key)
            if has_labels:
                assert label is not None
                assert label.dtype == np.int64
                assert label == i
            else:
                assert label is None

    def test_a_source_that_claims_equal_shapes_has_them(
        self, make: Callable[[Path], DataSource], tmp_path: Path
    ) -> None:
        source = make(tmp_path)
        by_all = SampleManifest.first(source, probe="all")
        assert SampleManifest.first(source) == by_all
        if getattr(source, "uniform", False):
            assert SampleManifest.first(source, probe="first") == by_all
