from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest

from qdist.data.preprocess import Preprocess
from qdist.errors import ConfigError, DataError


def test_no_settings_and_keep_pass_the_array_through_unchanged() -> None:
    for dtype in ("uint8", "int64", "float64", "float16", "bool"):
        array = np.ones((2, 3), dtype)
        assert Preprocess(dtype="keep").apply(array, where="s") is array


def test_scale_comes_first_then_mean_and_std_per_channel_in_float32() -> None:
    image = np.arange(12, dtype=np.uint8).reshape(3, 2, 2)
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    result = Preprocess(scale=1 / 255, mean=mean, std=std).apply(image, where="s")
    exact = (image / 255 - np.reshape(mean, (3, 1, 1))) / np.reshape(std, (3, 1, 1))
    assert result.dtype == np.float32
    np.testing.assert_allclose(result, exact, rtol=1e-6, atol=1e-7)


def test_single_mean_and_std_serve_every_channel() -> None:
    stored = np.array([[83, 84], [-128, 127]], np.int8)
    result = Preprocess(mean=(83,), std=(1 / 0.5847029,)).apply(stored, where="s")
    np.testing.assert_allclose(result, (stored.astype(float) - 83) * 0.5847029, rtol=1e-6)


def test_transpose_turns_stored_hwc_into_chw_before_the_channels_are_looked_up() -> None:
    stored = np.arange(24, dtype=np.uint8).reshape(2, 4, 3)
    settings = Preprocess(transpose=(2, 0, 1), mean=(0, 1, 2))
    result = settings.apply(stored, where="s")
    assert result.shape == (3, 2, 4)
    assert result.flags.c_contiguous
    np.testing.assert_array_equal(result[2], stored[:, :, 2].astype(np.float32) - 2)


def test_channel_axis_may_be_the_last() -> None:
    stored = np.zeros((2, 4, 3), np.uint8)
    result = Preprocess(channel_axis=-1, mean=(1, 2, 3)).apply(stored, where="s")
    np.testing.assert_array_equal(result[0, 0], [-1, -2, -3])


def test_default_casts_to_float32_and_integer_casts_must_be_exact() -> None:
    assert Preprocess().apply(np.ones(2, np.float64), where="s").dtype == np.float32
    tokens = Preprocess(dtype="int64").apply(np.array([7, 9], np.uint16), where="s")
    assert tokens.dtype == np.int64
    with pytest.raises(DataError, match="QD304") as caught:
        Preprocess(dtype="int32").apply(np.array([2**40]), where="sample 7")
    assert caught.value.where == "sample 7"
    with pytest.raises(DataError, match="QD304"):
        Preprocess(dtype="int64").apply(np.array([0.5]), where="s")


@pytest.mark.parametrize("array", [np.array(["a"]), np.array([None]), np.array([1j])])
def test_what_is_no_number_is_refused(array: Any) -> None:
    with pytest.raises(DataError, match="QD304"):
        Preprocess().apply(array, where="s")


@pytest.mark.parametrize(
    ("settings", "shape"),
    [
        ({"mean": (1, 2, 3)}, (2, 3)),
        ({"std": (1, 2)}, (3, 2)),
        ({"mean": (1, 2), "channel_axis": 5}, (2, 2)),
        ({"mean": (1, 2), "channel_axis": -3}, (2, 2)),
        ({"transpose": (1, 0)}, (2, 2, 2)),
    ],
)
def test_settings_that_do_not_fit_the_sample(
    settings: dict[str, Any], shape: tuple[int, ...]
) -> None:
    with pytest.raises(DataError, match="QD303"):
        Preprocess(**settings).apply(np.zeros(shape), where="s")


@pytest.mark.parametrize(
    ("settings", "code"),
    [
        ({"std": (1.0, 0.0)}, "QD104"),
        ({"std": (-1.0,)}, "QD104"),
        ({"scale": float("nan")}, "QD104"),
        ({"mean": (float("inf"),)}, "QD104"),
        ({"dtype": "complex64"}, "QD104"),
        ({"transpose": (0, 2)}, "QD104"),
        ({"mean": (1, 2, 3), "std": (1, 2)}, "QD107"),
        ({"scale": 0.5, "dtype": "keep"}, "QD107"),
        ({"mean": (1,), "dtype": "int8"}, "QD107"),
    ],
)
def test_settings_that_cannot_be_are_refused_at_construction(
    settings: dict[str, Any], code: str
) -> None:
    with pytest.raises(ConfigError, match=code):
        Preprocess(**settings)


def test_as_json_names_every_setting_and_is_json() -> None:
    settings = Preprocess(scale=2, mean=(1,), transpose=(0,))
    value = settings.as_json()
    assert set(value) == set(Preprocess.__dataclass_fields__)
    assert json.loads(json.dumps(value)) == value
