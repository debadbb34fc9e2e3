from __future__ import annotations

import pickle
from typing import Any

import numpy as np
import pytest
from onnx import TensorProto, helper

from qdist.data.checks import InputSpec, check_sample
from qdist.data.manifest import SampleManifest
from qdist.data.random_source import RANDOM_WARNING, RandomSource
from qdist.data.source import DataSource
from qdist.errors import ConfigError, DataError

IMAGE = InputSpec(name="image", dtype="float32", shape=("batch", 3, "high", None))
IDS = InputSpec(name="ids", dtype="int64", shape=("batch", 7))
FLAG = InputSpec(name="flag", dtype="bool", shape=("batch", 4))
SIZES = {"high": 5, "image.3": 6}


def _source(*inputs: InputSpec, **settings: Any) -> RandomSource:
    return RandomSource(inputs=inputs or (IMAGE, FLAG), **{"sizes": SIZES, **settings})


def test_samples_fit_the_model_and_are_the_same_every_time() -> None:
    source = _source(IMAGE, IDS, FLAG, n_samples=9, ranges={"ids": (3, 8)})
    assert isinstance(source, DataSource)
    again = pickle.loads(pickle.dumps(source))
    ids = []
    for key in source.keys():  # noqa: SIM118
        feeds = source.load(key)
        check_sample(key, feeds, source.inputs)
        assert feeds["image"].shape == (3, 5, 6)
        assert all((again.load(key)[name] == array).all() for name, array in feeds.items())
        ids.append(feeds["ids"])
    assert {int(n) for n in np.concatenate(ids)} == {3, 4, 5, 6, 7}
    manifest = SampleManifest.first(source)
    assert len(manifest) == 9
    more = _source(IMAGE, IDS, FLAG, n_samples=12, ranges={"ids": (3, 8)})
    assert manifest.extend(more).ids[:9] == manifest.ids
    other = _source(IMAGE, IDS, FLAG, n_samples=9, ranges={"ids": (3, 8)}, seed=1)
    assert not set(SampleManifest.first(other).ids) & set(manifest.ids)
    assert "RANDOM" in RANDOM_WARNING


BFLOAT16 = helper.tensor_dtype_to_np_dtype(TensorProto.BFLOAT16).name


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64", BFLOAT16])
def test_uniform_numbers_lie_below_one_and_normal_ones_around_zero(dtype: str) -> None:
    spec = InputSpec(name="x", dtype=dtype, shape=(1, 20000))
    uniform = RandomSource(inputs=(spec,), n_samples=1).load("000000")["x"]
    assert uniform.dtype.name == dtype
    values = uniform.astype(np.float64)
    assert 0 <= values.min() < 0.01
    assert 0.99 < values.max() < 1
    assert abs(values.mean() - 0.5) < 0.02
    normal = RandomSource(inputs=(spec,), n_samples=1, distribution="normal").load("000000")["x"]
    assert abs(normal.astype(np.float64).mean()) < 0.05
    assert abs(normal.astype(np.float64).std() - 1) < 0.05


def test_inputs_of_different_batches_carry_their_own() -> None:
    one = InputSpec(name="a", dtype="float32", shape=(1, 4))
    two = InputSpec(name="b", dtype="float32", shape=(2, 4))
    feeds = RandomSource(inputs=(one, two)).load("000000")
    assert (feeds["a"].shape, feeds["b"].shape) == ((1, 4), (2, 4))
    number = InputSpec(name="n", dtype="float32", shape=())
    feeds = RandomSource(inputs=(IMAGE, number), sizes={**SIZES, "batch": 2}).load("000001")
    assert (feeds["image"].shape, feeds["n"].shape) == ((2, 3, 5, 6), ())


@pytest.mark.parametrize(
    ("inputs", "settings", "match"),
    [
        ((IMAGE,), {"sizes": {"high": 5}}, r"QD303.*input image, dimension image\.3"),
        ((IMAGE,), {"sizes": {"image.3": 5}}, "QD303.*dimension high.*sizes={high: SIZE}"),
        ((IMAGE,), {"sizes": {**SIZES, "wide": 1}}, "QD104.*wide.*high"),
        ((IMAGE,), {"sizes": {**SIZES, "high": 0}}, "QD104.*high"),
        ((IDS,), {"sizes": {}}, "QD105.*input ids"),
        ((IDS,), {"sizes": {}, "ranges": {"ids": (5, 5)}}, "QD104.*ranges, input ids"),
        ((IDS,), {"sizes": {}, "ranges": {"ids": (0, 2**63 + 1)}}, "QD104.*ranges, input ids"),
        ((IMAGE,), {"ranges": {"image": (0, 5)}}, "QD104.*ranges, input image"),
        ((IMAGE,), {"ranges": {"ids": (0, 5)}}, "QD104.*ids.*image"),
        ((IMAGE,), {"n_samples": 0}, "QD104"),
        ((IMAGE,), {"distribution": "cauchy"}, "QD104"),
        ((InputSpec(name="x", dtype="float32", shape=None),), {"sizes": {}}, "QD303.*input x"),
        ((InputSpec(name="x", dtype="complex64", shape=(1, 2)),), {"sizes": {}}, "QD304"),
    ],
)
def test_settings_that_cannot_be_used(
    inputs: tuple[InputSpec, ...], settings: dict[str, Any], match: str
) -> None:
    with pytest.raises((ConfigError, DataError), match=match):
        _source(*inputs, **settings)


def test_keys_that_are_not_there() -> None:
    with pytest.raises(DataError, match="QD306"):
        _source(n_samples=2).load("000002")
