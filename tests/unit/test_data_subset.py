from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from qdist.data.arrays import ArraySource
from qdist.data.manifest import SampleManifest
from qdist.data.shards import micro_batches
from qdist.data.source import DataSource
from qdist.data.subset import Excluded, Limited, Listed, Subset
from qdist.errors import ConfigError, DataError


@pytest.fixture
def source(tmp_path: Path) -> ArraySource:
    rows = np.arange(24, dtype=np.float32).reshape(12, 2)
    np.savez(tmp_path / "a.npz", x=rows, y=np.arange(12))
    return ArraySource(path=tmp_path / "a.npz", inputs={"x": "x"}, labels="y")


@pytest.fixture
def folder(tmp_path: Path) -> ArraySource:
    place = tmp_path / "files"
    place.mkdir()
    for name in ("cat_1", "cat_2", "dog_1", "Dog_2", "odd[1]"):
        np.savez(place / f"{name}.npz", x=np.frombuffer(name.ljust(8).encode(), np.float64))
    return ArraySource(path=place, inputs={"x": "x"})


def _list(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


def test_every_subset_gives_the_sources_samples_unchanged(
    source: ArraySource, tmp_path: Path
) -> None:
    chosen: list[Subset] = [
        Limited(source=source, max_samples=3),
        Excluded(source=source, exclude=("00000[3-9]", "00001?")),
        Listed(source=source, list_file=_list(tmp_path / "l", "000000\n000001\n000002\n")),
    ]
    whole = SampleManifest.first(source)
    for subset in chosen:
        assert isinstance(subset, DataSource)
        assert subset.uniform
        assert subset.keys() == ["000000", "000001", "000002"]
        assert SampleManifest.first(subset).ids == whole.ids[:3]
        again = pickle.loads(pickle.dumps(subset))
        for key in again.keys():  # noqa: SIM118
            assert (again.load(key)["x"] == source.load(key)["x"]).all()
            assert again.label(key) == int(key)
        with pytest.raises(DataError, match=r"QD306.*000007"):
            subset.load("000007")
        with pytest.raises(DataError, match=r"QD306.*000007"):
            subset.label("000007")
        with pytest.raises(DataError, match=r"QD306.*000007"):
            subset.content_digest("000007")


def test_more_samples_of_the_same_source_extend_the_first(source: ArraySource) -> None:
    first = SampleManifest.first(Limited(source=source, max_samples=5))
    second = first.extend(Limited(source=source, max_samples=100))
    assert second.generations[0] == first.generations[0]
    assert len(second) == 12
    before, after = micro_batches(first, 2), micro_batches(second, 2)
    assert after[: len(before)] == before
    third = second.extend(Excluded(source=source, exclude=("000001", "000011")))
    assert third.absent == (second.ids[1], second.ids[11])
    assert len(third.present) == 10


def test_a_list_gives_its_own_order(folder: ArraySource, tmp_path: Path) -> None:
    list_file = _list(tmp_path / "list", "dog_1.npz\n\n  cat_1.npz\r\nodd[1].npz\n")
    listed = Listed(source=folder, list_file=list_file)
    assert listed.keys() == ["dog_1.npz", "cat_1.npz", "odd[1].npz"]
    two = Limited(source=listed, max_samples=2)
    assert two.keys() == ["dog_1.npz", "cat_1.npz"]


def test_patterns_and_keys(folder: ArraySource) -> None:
    def left(*exclude: str) -> list[str]:
        return Excluded(source=folder, exclude=exclude).keys()

    assert left("cat_*", "Dog_*") == ["dog_1.npz", "odd[1].npz"]
    assert left("odd[1].npz", "?at_2.npz") == ["Dog_2.npz", "cat_1.npz", "dog_1.npz"]
    assert len(left()) == 5


@pytest.mark.parametrize(
    ("entry", "near"), [("cat_3.npz", "cat_1.npz|cat_2.npz"), ("cow*", "such as"), ("", "such as")]
)
def test_an_exclusion_that_matches_nothing_is_an_error(
    folder: ArraySource, entry: str, near: str
) -> None:
    with pytest.raises(ConfigError, match=f"QD104.*({near})"):
        Excluded(source=folder, exclude=("dog_1.npz", entry)).keys()


def test_lists_that_cannot_be_used(folder: ArraySource, tmp_path: Path) -> None:
    def keys(text: str) -> Any:
        return Listed(source=folder, list_file=_list(tmp_path / "list", text)).keys()

    with pytest.raises(DataError, match=r"QD306.*list, line 3.*dog_9.*dog_1"):
        keys("cat_1.npz\n\ndog_9.npz\n")
    with pytest.raises(DataError, match=r"QD306.*list, line 2.*second time, after line 1"):
        keys("cat_1.npz\ncat_1.npz\n")
    with pytest.raises(DataError, match="QD302"):
        keys("\n")
    with pytest.raises(DataError, match="QD301"):
        Listed(source=folder, list_file=tmp_path / "none").keys()


def test_nothing_left_and_bad_numbers(source: ArraySource) -> None:
    with pytest.raises(DataError, match="QD302"):
        Excluded(source=source, exclude=("*",)).keys()
    with pytest.raises(ConfigError, match="QD104"):
        Limited(source=source, max_samples=0)
