"""Tensors that wait in memory or on disk."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from qdist.errors import ArtifactError
from qdist.model.spool import Spool
from tests.onnx_models import normal

ARRAYS: list[Any] = [
    normal(3, 4),
    normal(4, 3).T,
    np.zeros((0, 5), np.float16),
    np.float64(2.5) * np.ones(()),
    np.array([True, False]),
    np.arange(6, dtype=np.int64).reshape(2, 3),
    np.array([1.5, -2], ml_dtypes.bfloat16),
]


@pytest.mark.parametrize("limit", [None, 0, 60])
def test_arrays_come_back_as_they_went_in(limit: int | None, tmp_path: Path) -> None:
    with Spool(limit, tmp_path) as spool:
        for i, array in enumerate(ARRAYS):
            spool.put(i, array)
        assert len(spool) == len(ARRAYS)
        for i, array in enumerate(ARRAYS):
            found = spool.get(i)
            assert (found.dtype, found.shape) == (array.dtype, array.shape)
            assert np.array_equal(found, array)
        total = sum(array.nbytes for array in ARRAYS)
        assert spool.n_held_bytes + spool.n_written_bytes == total
        assert spool.n_read_bytes == spool.n_written_bytes
        if limit is not None:
            assert spool.n_held_bytes <= limit
    assert list(tmp_path.iterdir()) == []


def test_dropping_makes_room_in_memory_and_on_disk(tmp_path: Path) -> None:
    with Spool(100, tmp_path) as spool:
        spool.put("a", np.zeros(100, np.int8))
        spool.put("b", np.zeros(50, np.int8))
        assert (spool.n_held_bytes, spool.n_written_bytes) == (100, 50)
        (scratch,) = tmp_path.iterdir()
        assert len(list(scratch.iterdir())) == 1
        spool.drop("a")
        spool.drop("b")
        assert list(scratch.iterdir()) == []
        spool.put("c", np.zeros(100, np.int8))
        assert spool.n_written_bytes == 50
        assert "c" in spool
        assert "a" not in spool
        with pytest.raises(KeyError):
            spool.get("a")
        with pytest.raises(ValueError, match="already"):
            spool.put("c", np.zeros(1))


def test_the_scratch_folder_goes_after_an_error_too(tmp_path: Path) -> None:
    def fail() -> None:
        with Spool(0, tmp_path) as spool:
            spool.put("a", normal(3))
            assert list(tmp_path.iterdir()) != []
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert list(tmp_path.iterdir()) == []


def test_text_stays_in_memory(tmp_path: Path) -> None:
    words = np.array(["a", "bc"], object)
    with Spool(0, tmp_path) as spool:
        spool.put("w", words)
        assert spool.get("w").tolist() == ["a", "bc"]
        assert spool.n_written_bytes == 0


def test_a_folder_that_is_none_is_an_error_of_ours(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="QD603") as info, Spool(0, tmp_path / "no") as spool:
        spool.put("a", normal(3))
    assert "12 bytes" in str(info.value)
