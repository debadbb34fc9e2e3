"""Law 1 on the demo models: the merged statistics do not depend on how the work was divided."""

from __future__ import annotations

import random
from functools import cache, partial
from pathlib import Path

import numpy as np
import pytest

from qdist.calibration import (
    CalibrationJob,
    CalibrationSettings,
    Merged,
    calibrate_here,
    finish,
    load_phases,
    open_shards,
    prepare,
    run_shard,
)
from qdist.data.arrays import ArraySource
from qdist.data.preprocess import Preprocess
from qdist.data.shards import Shard, cut_shards
from qdist.errors import StoreError
from qdist.model.freeze import FrozenModel, freeze
from qdist.model.graph import Graph
from qdist.model.loading import load_model
from qdist.plan.choice import LayerChoice
from qdist.plan.planner import Planner
from qdist.stats import grid
from qdist.stats.observer import Observer
from qdist.store.zarr_store import ZarrStore, create_store
from tests.onnx_models import EXECUTION

DEMO = Path(__file__).resolve().parents[2] / "qdist" / "demo"
N_SAMPLES = 42
"""No multiple of the micro-batch, nor of any shard size below."""
SOURCE = ArraySource(
    path=DEMO / "digits.npz",
    inputs={"images": "calibration_images"},
    preprocess=Preprocess(scale=1 / 16, mean=(0.3,), std=(0.37,)),
    limit=N_SAMPLES,
)
PRECISIONS = ("int8", "w4a8", "int16")

each_model = pytest.mark.parametrize("name", ["digits_vit.onnx", "digits_cnn.onnx"])


@cache
def frozen_demo(name: str) -> tuple[FrozenModel, Graph]:
    frozen = freeze(load_model(DEMO / name))
    return frozen, Graph(frozen, EXECUTION)


def job_for(name: str, shard_samples: int | None) -> CalibrationJob:
    frozen, graph = frozen_demo(name)
    settings = CalibrationSettings(micro_batch=4, shard_samples=shard_samples)
    return prepare(frozen, SOURCE, settings, EXECUTION, graph=graph)


def measure(job: CalibrationJob, store: ZarrStore, shards: list[Shard]) -> None:
    """Each shard in a session of its own, as if on a worker of its own."""
    for shard in shards:
        run_shard(shard, Observer(job.observer), SOURCE, job.inputs, store)


def digests(name: str, job: CalibrationJob, merged: Merged) -> list[str]:
    """Of the record, and of the plans that follow from it."""
    _, graph = frozen_demo(name)
    planner = Planner(graph, merged.record, job.taps)
    plans = [
        planner.plan({layer.name: LayerChoice(precision=p) for layer in planner.layers})
        for p in PRECISIONS
    ]
    return [merged.record.digest, *(plan.digest for plan in plans)]


@cache
def expected(name: str) -> list[str]:
    """No shards, no store, no merge: one observer sees every micro-batch in order."""
    job = job_for(name, N_SAMPLES)
    record = Observer(job.observer).observe(
        [(batch.keys, partial(load_phases, batch, SOURCE, job.inputs)) for batch in job.grid]
    )
    return digests(name, job, Merged(record=record, n_shards=1, notes=()))


@each_model
@pytest.mark.parametrize("shard_samples", [4, 16, 40, None])
def test_shards_of_any_size_in_any_order_give_the_same_bits(
    name: str, shard_samples: int | None, tmp_path: Path
) -> None:
    job = job_for(name, shard_samples)
    store = create_store(tmp_path / "store", job.identity)
    shards = list(open_shards(job, store))
    assert len(shards) == -(-N_SAMPLES // (shard_samples or 64))
    random.Random(shard_samples or 0).shuffle(shards)
    measure(job, store, shards)
    merged = finish(job, store)
    assert merged.n_shards == len(shards)
    assert digests(name, job, merged) == expected(name)
    latest = store.latest()
    record, about = latest.record, latest.about
    assert record.digest == merged.record.digest
    assert record.n_samples == N_SAMPLES
    assert about["n_shards"] == len(shards)


@each_model
def test_a_calibration_that_was_interrupted_goes_on_to_the_same_bits(
    name: str, tmp_path: Path
) -> None:
    """Interrupted twice, and resumed with another shard size each time."""
    for shard_samples, n_done in ((16, 1), (4, 3)):
        job = job_for(name, shard_samples)
        store = create_store(tmp_path / "store", job.identity)
        measure(job, store, list(open_shards(job, store))[-n_done:])
        with pytest.raises(StoreError) as caught:
            finish(job, store)
        assert caught.value.code == "QD402"
    job = job_for(name, 40)
    store = create_store(tmp_path / "store", job.identity)
    n_left = sum(shard.n_samples for shard in open_shards(job, store))
    assert n_left == N_SAMPLES - 10 - 12
    merged = calibrate_here(job, SOURCE, store)
    assert digests(name, job, merged) == expected(name)
    assert open_shards(job, store) == ()
    assert calibrate_here(job, SOURCE, store).record.digest == merged.record.digest


@each_model
def test_shards_that_were_measured_twice_count_once(name: str, tmp_path: Path) -> None:
    job = job_for(name, 16)
    store = create_store(tmp_path / "store", job.identity)
    shards = list(open_shards(job, store))
    measure(job, store, [*shards[:2], *shards[:2]])
    # As another driver with another shard size does at the same time.
    wider = job_for(name, 40)
    measure(wider, store, list(cut_shards(wider.grid, wider.n_per_shard))[:1])
    merged = calibrate_here(job, SOURCE, store)
    assert merged.record.n_samples == N_SAMPLES
    assert digests(name, job, merged) == expected(name)


@each_model
def test_the_record_of_the_input_is_that_of_the_samples(name: str, tmp_path: Path) -> None:
    """Against the data itself, in plain NumPy."""
    job = job_for(name, 16)
    store = create_store(tmp_path / "store", job.identity)
    histogram = calibrate_here(job, SOURCE, store).record.histogram("images")
    with np.load(DEMO / "digits.npz") as archive:
        images = archive["calibration_images"][:N_SAMPLES].astype(np.float32)
    values = (images * np.float32(1 / 16) - np.float32(0.3)) / np.float32(0.37)
    bins, counts = np.unique(grid.bin_of(values), return_counts=True)
    assert np.array_equal(histogram.bins, bins)
    assert np.array_equal(histogram.counts, counts)
    assert (histogram.minimum, histogram.maximum) == (float(values.min()), float(values.max()))


@each_model
def test_fewer_samples_give_other_statistics(name: str, tmp_path: Path) -> None:
    """So that equal digests above mean something."""
    job = job_for(name, 16)
    store = create_store(tmp_path / "store", job.identity)
    (first, *_) = open_shards(job, store)
    record = Observer(job.observer).observe(
        [(batch.keys, partial(load_phases, batch, SOURCE, job.inputs)) for batch in first.batches]
    )
    found = digests(name, job, Merged(record=record, n_shards=1, notes=()))
    assert all(one != other for one, other in zip(found, expected(name), strict=True))
