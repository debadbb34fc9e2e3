"""Exported statistics: another place goes on from them, and another model does not."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
from onnx import helper

from qdist.calibration import (
    CalibrationJob,
    CalibrationSettings,
    calibrate_here,
    open_shards,
    prepare,
)
from qdist.data.manifest import SampleManifest
from qdist.data.subset import Limited
from qdist.errors import StoreError
from qdist.model.freeze import FrozenModel
from qdist.store.portable import export_statistics, import_statistics
from qdist.store.zarr_store import create_store, open_store
from tests.onnx_models import EXECUTION, frozen_from, model, normal, samples_of, value

SOURCE = samples_of("x", 4, n=14)
N_BEFORE = 10


def frozen_of(folder: Path, seed: int = 3) -> FrozenModel:
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["h"], "matmul"),
        helper.make_node("Relu", ["h"], ["y"], "relu"),
    ]
    weight = {"w": normal(4, 4, seed=seed)}
    proto = model(nodes, [value("x", ["n", 4])], [value("y", ["n", 4])], weight)
    return frozen_from(proto, folder / f"model{seed}.onnx")


def job_of(
    frozen: FrozenModel, n: int, earlier: SampleManifest | None = None, taps: str = "all"
) -> tuple[CalibrationJob, Limited]:
    source = Limited(source=SOURCE, max_samples=n)
    settings = CalibrationSettings(micro_batch=2, shard_samples=4, taps=taps)
    return prepare(frozen, source, settings, EXECUTION, earlier=earlier), source


@pytest.fixture
def exported(tmp_path: Path) -> Path:
    job, source = job_of(frozen_of(tmp_path), N_BEFORE)
    store = create_store(tmp_path / "first", job.identity)
    calibrate_here(job, source, store)
    return export_statistics(store, tmp_path / "run.qdist")


def test_a_calibration_goes_on_from_what_was_imported(exported: Path, tmp_path: Path) -> None:
    found = import_statistics(exported, tmp_path / "second", None)
    assert (found.n_samples, found.is_new) == (N_BEFORE, True)
    store = open_store(tmp_path / "second")
    latest = store.latest()
    earlier = SampleManifest.from_json(latest.about["manifest"])
    frozen = frozen_of(tmp_path)
    job, source = job_of(frozen, N_BEFORE, earlier)
    assert open_shards(job, store) == ()
    same = calibrate_here(job, source, store)
    assert same.record.digest == latest.record.digest
    job, source = job_of(frozen, 14, earlier)
    ran = [key for shard in open_shards(job, store) for b in shard.batches for key in b.keys]
    assert ran == [f"{i:04d}" for i in range(N_BEFORE, 14)]
    merged = calibrate_here(job, source, store)
    # As if nothing had been imported.
    fresh, _ = job_of(frozen, 14)
    alone = calibrate_here(fresh, source, create_store(tmp_path / "alone", fresh.identity))
    assert merged.record.digest == alone.record.digest
    assert merged.record.n_samples == 14
    # And again out of it: all of it, in one file.
    again = export_statistics(store, tmp_path / "again.qdist")
    assert import_statistics(again, tmp_path / "third", None).n_samples == 14


def test_importing_into_a_store_that_is_part_of_the_way(exported: Path, tmp_path: Path) -> None:
    """Its own shards overlap with what is imported; no sample counts twice."""
    frozen = frozen_of(tmp_path)
    few, source = job_of(frozen, 6)
    store = create_store(tmp_path / "second", few.identity)
    calibrate_here(few, source, store)
    assert import_statistics(exported, tmp_path / "second", few.identity).is_new
    earlier = SampleManifest.from_json(store.latest().about["manifest"])
    job, source = job_of(frozen, N_BEFORE, earlier)
    assert open_shards(job, store) == ()
    merged = calibrate_here(job, source, store)
    assert merged.record.n_samples == N_BEFORE
    assert merged.record.histogram("x").n_values == N_BEFORE * 4
    assert not import_statistics(exported, tmp_path / "second", None).is_new
    # The smaller set is still answered for by its own shards.
    less, source = job_of(frozen, 6, earlier)
    assert open_shards(less, store) == ()
    assert calibrate_here(less, source, store).record.histogram("x").n_values == 6 * 4


def test_taps_that_the_file_lacks_are_added(tmp_path: Path) -> None:
    frozen = frozen_of(tmp_path)
    some, source = job_of(frozen, N_BEFORE, taps="compute")
    store = create_store(tmp_path / "first", some.identity)
    calibrate_here(some, source, store)
    path = export_statistics(store, tmp_path / "run.qdist")
    import_statistics(path, tmp_path / "second", None)
    second = open_store(tmp_path / "second")
    job, source = job_of(frozen, N_BEFORE)
    merged = calibrate_here(job, source, second)
    tap_sets = Counter(receipt.tensors for receipt in second.receipts())
    assert set(tap_sets) == {("x", "y"), ("h",)}
    alone = calibrate_here(job, source, create_store(tmp_path / "alone", job.identity))
    assert merged.record.digest == alone.record.digest


def test_another_model_refuses_them(exported: Path, tmp_path: Path) -> None:
    job, _ = job_of(frozen_of(tmp_path, seed=4), N_BEFORE)
    for location in ("fresh", "other"):
        if location == "other":
            create_store(tmp_path / location, job.identity)
        with pytest.raises(StoreError) as caught:
            import_statistics(exported, tmp_path / location, job.identity)
        assert caught.value.code == "QD401"
        assert "the model" in str(caught.value)
    assert not (tmp_path / "fresh").exists()
    import_statistics(exported, tmp_path / "imported", None)
    with pytest.raises(StoreError) as caught:
        create_store(tmp_path / "imported", job.identity)
    assert caught.value.code == "QD401"


@pytest.mark.parametrize("harm", ["cut", "flip", "empty", "text", "missing"])
def test_a_damaged_file_is_refused_and_leaves_no_store(
    exported: Path, harm: str, tmp_path: Path
) -> None:
    content = bytearray(exported.read_bytes())
    if harm == "missing":
        exported.unlink()
    else:
        for at in range(len(content) // 3, len(content) // 3 + 40):
            content[at] ^= 0x55 if harm == "flip" else 0
        harmed = {"cut": content[:-100], "flip": content, "empty": b"", "text": b"hello"}[harm]
        exported.write_bytes(bytes(harmed))
    with pytest.raises(StoreError) as caught:
        import_statistics(exported, tmp_path / "second", None)
    assert caught.value.code == "QD409"
    assert str(exported) in str(caught.value)
    assert not (tmp_path / "second").exists()


def test_an_unfinished_store_has_nothing_to_export(tmp_path: Path) -> None:
    job, _ = job_of(frozen_of(tmp_path), 4)
    store = create_store(tmp_path / "s", job.identity)
    with pytest.raises(StoreError) as caught:
        export_statistics(store, tmp_path / "run.qdist")
    assert caught.value.code == "QD402"
    assert not (tmp_path / "run.qdist").exists()
