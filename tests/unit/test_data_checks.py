from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest

from qdist.data.checks import InputSpec, check_sample, fixed_batch, stackable
from qdist.errors import DataError

IMAGE = InputSpec(name="input", dtype="float32", shape=("N", 3, 8, 8))
IDS = InputSpec(name="ids", dtype="int64", shape=(None, "S"))
RATE = InputSpec(name="sr", dtype="int64", shape=())


def _image(*shape: int) -> np.ndarray[Any, Any]:
    return np.zeros(shape or (3, 8, 8), np.float32)


def test_samples_with_and_without_batch_axis_fit() -> None:
    check_sample("k", {"input": _image()}, [IMAGE])
    check_sample("k", {"input": _image(2, 3, 8, 8)}, [IMAGE])
    check_sample("k", {"ids": np.arange(5)}, [IDS])
    check_sample("k", {"ids": np.arange(5)[None], "sr": np.array(1)}, [IDS, RATE])


def test_stackable_means_without_batch_axis() -> None:
    assert stackable({"input": _image()}, [IMAGE])
    assert not stackable({"input": _image(1, 3, 8, 8)}, [IMAGE])
    with pytest.raises(DataError, match=r"QD303.*sr.*ids"):
        check_sample("k", {"ids": np.arange(5), "sr": np.array(1)}, [IDS, RATE])


def test_an_input_of_unknown_rank_takes_any_shape_and_follows_the_others() -> None:
    free = InputSpec(name="free", dtype="float32", shape=None)
    for shape in ((), (3,), (1, 2, 3, 4)):
        array = np.zeros(shape, np.float32)
        check_sample("k", {"free": array}, [free])
        assert stackable({"free": array}, [free])
        assert stackable({"free": array, "input": _image()}, [free, IMAGE])
        assert not stackable({"free": array, "input": _image(1, 3, 8, 8)}, [free, IMAGE])
    assert fixed_batch([free]) is None
    with pytest.raises(DataError, match="QD304"):
        check_sample("k", {"free": np.zeros(3)}, [free])


def test_missing_and_unknown_inputs_are_listed() -> None:
    with pytest.raises(DataError, match=r"QD307.*k7.*missing ids; .*model: images") as caught:
        check_sample("k7", {"images": _image(), "input": _image()}, [IMAGE, IDS])
    assert "input, ids" in caught.value.expected


@pytest.mark.parametrize("shape", [(8, 8, 3), (3, 8), (3, 8, 9), (1, 4, 8, 8), (1, 1, 3, 8, 8), ()])
def test_wrong_shapes(shape: tuple[int, ...]) -> None:
    array = np.zeros(shape, np.float32)
    with pytest.raises(DataError, match=r"QD303.*k, input input.*\[N, 3, 8, 8\].*\[3, 8, 8\]"):
        check_sample("k", {"input": array}, [IMAGE])


def test_a_fixed_batch_axis_has_to_match_when_the_sample_carries_one() -> None:
    fixed = InputSpec(name="input", dtype="float32", shape=(1, 3, 8, 8))
    check_sample("k", {"input": _image()}, [fixed])
    with pytest.raises(DataError, match="QD303"):
        check_sample("k", {"input": _image(2, 3, 8, 8)}, [fixed])
    assert fixed_batch([fixed, IDS, RATE]) == 1
    assert fixed_batch([IMAGE, IDS]) is None
    with pytest.raises(DataError, match="QD303"):
        fixed_batch([fixed, InputSpec(name="h", dtype="float32", shape=(2, 1, 8))])


@pytest.mark.parametrize("dtype", ["float64", "uint8", "float16", ">f4"])
def test_wrong_dtypes_say_how_to_mend(dtype: str) -> None:
    with pytest.raises(DataError, match="QD304") as caught:
        check_sample("k", {"input": _image().astype(dtype)}, [IMAGE])
    assert "data.calibration.preprocess.dtype=float32" in caught.value.mend


def test_dtypes_beyond_numpy_and_other_spellings() -> None:
    half = InputSpec(name="x", dtype="bfloat16", shape=(None, 2))
    check_sample("k", {"x": np.zeros(2, ml_dtypes.bfloat16)}, [half])
    with pytest.raises(DataError, match="QD304"):
        check_sample("k", {"x": np.zeros(2, np.float16)}, [half])
    with pytest.raises(DataError, match="QD305"):
        check_sample("k", {"x": np.array([0, np.nan], ml_dtypes.bfloat16)}, [half])
    short = InputSpec(name="x", dtype="<f4", shape=(None, 2))
    check_sample("k", {"x": np.zeros(2, np.float32)}, [short])


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_values_that_are_not_finite_are_counted_and_located(value: float) -> None:
    image = _image()
    image[1, 2, 3] = image[2, 0, 0] = value
    with pytest.raises(DataError, match="QD305") as caught:
        check_sample("cat.jpg", {"input": image}, [IMAGE])
    assert "cat.jpg" in caught.value.where
    assert "input input" in caught.value.where
    assert caught.value.got == f"2 of 192 values, the first {value} at index [1, 2, 3]"
