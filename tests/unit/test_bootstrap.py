"""Bootstrap intervals over blocks of samples: of ranges, from a store, and as users see them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qdist.calibration import CalibrationSettings, calibrate_here, prepare
from qdist.calibration.blockwise import sample_blocks
from qdist.errors import ConfigError, StoreError
from qdist.stats.merger import merge_all
from qdist.store.zarr_store import ZarrStore, create_store
from qdist.threshold.bootstrap import Interval, bootstrap
from qdist.threshold.registry import METHODS, find_threshold
from tests.command_line import here, succeed
from tests.onnx_models import EXECUTION, frozen_from, samples_of
from tests.unit.test_blocks import histogram, normal
from tests.unit.test_plan_planner import small_model
from tests.unit.test_thresholds import INT8, SYMMETRIC


def student_blocks(seed: int, n: int, size: int = 2000) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    return [rng.standard_t(4, size).astype(np.float32) for _ in range(n)]


def interval_of(blocks: list[np.ndarray], method: str = "mse", **more: Any) -> Interval:
    histograms = [histogram(block) for block in blocks]
    return bootstrap(histograms, SYMMETRIC, method, n_samples=10 * len(blocks), **more)


@pytest.mark.parametrize("method", [m for m in METHODS if m != "max"])
def test_the_interval_holds_the_range_and_repeats_itself(method: str) -> None:
    blocks = student_blocks(0, 6, 500)
    one = interval_of(blocks, method, resamples=20)
    assert one == interval_of(blocks, method, resamples=20)
    assert one.low[0] <= one.low[1] <= 0 <= one.high[0] <= one.high[1]
    assert one.high[0] * 0.8 <= one.threshold.high <= one.high[1] * 1.25
    assert (one.n_blocks, one.n_samples) == (6, 60)


@given(st.integers(0, 2**32 - 1))
@settings(max_examples=20)
def test_equal_blocks_leave_no_doubt(seed: int) -> None:
    block = normal(seed, 300)
    found = interval_of([block] * 4, "percentile", resamples=10)
    assert found.high == pytest.approx((found.threshold.high,) * 2, rel=1e-12)
    assert found.relative_width == pytest.approx(0, abs=1e-12)
    assert found.more_samples_for(0.05) == 0


def test_the_interval_covers_what_other_samples_give() -> None:
    """About as often as it says, over forty other sets of the same size."""
    found = interval_of(student_blocks(1, 16), "percentile", confidence=0.9)
    others = [
        find_threshold(
            histogram(np.concatenate(student_blocks(seed, 16))).finite, SYMMETRIC, "percentile"
        ).high
        for seed in range(2, 42)
    ]
    inside = np.mean([found.high[0] <= other <= found.high[1] for other in others])
    assert 0.5 <= inside <= 1.0
    assert found.high[0] < float(np.median(others)) < found.high[1]


def test_four_times_the_samples_halve_it() -> None:
    few, many = (
        np.mean([interval_of(student_blocks(seed, n), "percentile").relative_width for seed in s])
        for n, s in ((8, range(50, 62)), (32, range(70, 82)))
    )
    assert many == pytest.approx(few / 2, rel=0.35)
    found = interval_of(student_blocks(3, 8), "percentile")
    more = found.more_samples_for(found.relative_width / 2)
    assert more == pytest.approx(3 * found.n_samples, abs=1)
    with pytest.raises(ValueError, match="width"):
        found.more_samples_for(0.0)


def test_sentinels_set_no_bound() -> None:
    blocks = [np.append(block, np.float32(-1e9)) for block in student_blocks(4, 6)]
    found = interval_of(blocks)
    assert found.low[0] > -100
    plain = interval_of(student_blocks(4, 6))
    assert found.high == pytest.approx(plain.high, rel=1e-2)


def test_blocks_without_a_value_take_part_and_are_not_counted() -> None:
    empty = histogram(np.zeros(0, np.float32))
    blocks = [histogram(block) for block in student_blocks(5, 5)]
    found = bootstrap([*blocks, empty], INT8, "mse", n_samples=6)
    assert found.n_blocks == 5
    nothing = bootstrap([empty, empty], INT8, "mse", n_samples=2, resamples=3)
    assert (nothing.low, nothing.high, nothing.relative_width) == ((0, 0), (0, 0), 0)


@pytest.mark.parametrize(
    ("method", "parameters"),
    [("max", {}), ("min_max", {}), ("percentile", {"percent": 100}), ("mse", {"threshold": 2.0})],
)
def test_extremes_have_no_interval(method: str, parameters: dict[str, float]) -> None:
    blocks = [histogram(block) for block in student_blocks(6, 4, 50)]
    with pytest.raises(ConfigError) as caught:
        bootstrap(blocks, INT8, method, parameters, n_samples=4)
    assert caught.value.code == "QD107"


def test_one_block_is_refused() -> None:
    block = histogram(normal(0))
    for blocks, resamples in (([block], 5), ([block] * 3, 0)):
        with pytest.raises(ValueError, match="blocks"):
            bootstrap(blocks, INT8, "mse", n_samples=3, resamples=resamples)
    with pytest.raises(ValueError, match="confidence"):
        bootstrap([block] * 3, INT8, "mse", n_samples=3, confidence=1.0)


# --- from a store -----------------------------------------------------------------------------


def calibrated(folder: Path, shard_samples: int, n_blocks: int = 1) -> ZarrStore:
    frozen = frozen_from(small_model(), folder / "model.onnx")
    source = samples_of("x", 6, n=24)
    options = CalibrationSettings(micro_batch=2, shard_samples=shard_samples, n_blocks=n_blocks)
    job = prepare(frozen, source, options, EXECUTION)
    store = create_store(folder / "store", job.identity)
    calibrate_here(job, source, store)
    return store


@pytest.mark.parametrize(("n_wanted", "n_found"), [(16, 12), (5, 5)])
def test_shards_make_blocks_that_are_all_of_the_samples(
    n_wanted: int, n_found: int, tmp_path: Path
) -> None:
    store = calibrated(tmp_path, 2)
    merge = store.latest()
    records, what = sample_blocks(store, merge, n_wanted)
    assert what == f"{n_found} blocks of neighbouring shards"
    assert merge_all(records, merge.record.tensors).digest == merge.record.digest


def test_the_blocks_of_the_calibration_come_first(tmp_path: Path) -> None:
    store = calibrated(tmp_path, 2, n_blocks=3)
    records, what = sample_blocks(store, store.latest())
    assert what == "3 blocks of calibration.blocks"
    assert [record.n_samples for record in records] == [8, 8, 8]


def test_one_shard_is_no_block(tmp_path: Path) -> None:
    store = calibrated(tmp_path, 24)
    with pytest.raises(StoreError) as caught:
        sample_blocks(store, store.latest())
    assert caught.value.code == "QD402"
    assert "calibration.blocks" in caught.value.mend


def test_show_thresholds_prints_the_least_certain_first(tmp_path: Path) -> None:
    place = calibrated(tmp_path, 4).location
    words = ("show", "thresholds", place, "--resamples", "5", "--method", "KL", "--symmetric")
    out = succeed(*words, "--rows", "3")
    assert "6 blocks of neighbouring shards, 24 samples" in out
    assert "ranges by KL, 8 bits" in out
    for more, code in (
        (("--method", "max"), "QD107"),
        (("--method", "guess"), "QD501"),
        (("--bits", "9"), "QD104"),
        (("--bits", "many"), "QD104"),
        (("--width", "2"), "QD104"),
        (("--what",), "QD105"),
        (("elsewhere",), "QD105"),
    ):
        result = here("show", "thresholds", place, "--resamples", "5", *more)
        assert (result.status, code in result.err) == (2, True), (more, result.err)
