"""The two parts of an evaluation set: by content alone, nothing lost, nothing twice."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from qdist.data.arrays import ArraySource
from qdist.data.halves import Part
from qdist.errors import ConfigError, DataError


def source(path: Path, rows: np.ndarray) -> ArraySource:
    np.savez(path, x=rows.astype(np.float32))
    return ArraySource(path=path, inputs={"x": "x"})


def rows_of(part: Part) -> set[tuple[float, ...]]:
    keys = part.keys()
    return {tuple(part.load(key)["x"].tolist()) for key in keys}


def test_every_sample_is_in_one_part_and_order_moves_none(tmp_path: Path) -> None:
    rng = np.random.default_rng(3)
    rows = rng.normal(size=(400, 3)).astype(np.float32)
    plain = source(tmp_path / "a.npz", rows)
    seen, told = (Part(source=plain, part=part, share=0.5) for part in ("search", "report"))
    assert sorted([*seen.keys(), *told.keys()]) == sorted(plain.keys())
    assert 150 < len(seen.keys()) < 250
    shuffled = source(tmp_path / "b.npz", rng.permutation(np.concatenate([rows, rows[:50]])))
    again = Part(source=shuffled, part="search", share=0.5)
    assert rows_of(again) == rows_of(seen)


def test_a_greater_share_sees_what_the_smaller_saw(tmp_path: Path) -> None:
    plain = source(tmp_path / "a.npz", np.random.default_rng(4).normal(size=(100, 3)))
    small, large = (Part(source=plain, part="search", share=share) for share in (0.3, 0.6))
    assert set(small.keys()) < set(large.keys())


def test_an_empty_part_is_an_error(tmp_path: Path) -> None:
    plain = source(tmp_path / "a.npz", np.zeros((5, 3)))
    # Equal samples are in one part, so the other is empty.
    codes = []
    for part in ("search", "report"):
        try:
            Part(source=plain, part=part, share=0.5).keys()
        except DataError as error:
            codes.append(error.code)
    assert codes == ["QD302"]


@pytest.mark.parametrize("share", [0.0, 1.0, -1.0, float("nan")])
def test_a_share_that_leaves_a_part_empty(tmp_path: Path, share: float) -> None:
    with pytest.raises(ConfigError) as caught:
        Part(source=source(tmp_path / "a.npz", np.zeros((5, 3))), part="search", share=share)
    assert caught.value.code == "QD104"
