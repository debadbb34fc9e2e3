"""Samples come and go: what is there is measured, and nothing twice."""

from __future__ import annotations

import os
from functools import partial
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from qdist.calibration import (
    CalibrationJob,
    CalibrationSettings,
    Merged,
    calibrate_here,
    load_phases,
    open_shards,
    prepare,
)
from qdist.data.arrays import ArraySource
from qdist.data.manifest import SampleManifest
from qdist.data.source import DataSource
from qdist.data.subset import Excluded, Limited
from qdist.errors import DataError, StoreError
from qdist.model.freeze import FrozenModel, freeze
from qdist.model.loading import load_model
from qdist.stats.observer import Observer
from qdist.store.zarr_store import ZarrStore, create_store
from tests.onnx_models import EXECUTION, frozen_from, model, normal, value

SETTINGS = CalibrationSettings(micro_batch=2, shard_samples=4)


@pytest.fixture(scope="module")
def frozen(tmp_path_factory: pytest.TempPathFactory) -> FrozenModel:
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["h"], "matmul"),
        helper.make_node("Relu", ["h"], ["y"], "relu"),
    ]
    proto = model(
        nodes, [value("x", ["n", 4])], [value("y", ["n", 4])], {"w": normal(4, 4, seed=3)}
    )
    return frozen_from(proto, tmp_path_factory.mktemp("m") / "model.onnx")


class Session:
    """One store that a user calibrates into again and again."""

    def __init__(self, frozen: FrozenModel, folder: Path) -> None:
        self.frozen = frozen
        self.folder = folder
        self.store: ZarrStore | None = None
        self.manifest: SampleManifest | None = None

    def run(self, source: DataSource) -> tuple[Merged, list[str]]:
        """The statistics, and the keys of the samples that the model ran on."""
        job = prepare(self.frozen, source, SETTINGS, EXECUTION, earlier=self.manifest)
        self.manifest = SampleManifest.from_json(job.manifest.to_json())
        self.store = create_store(self.folder, job.identity)
        shards = open_shards(job, self.store)
        ran = [key for shard in shards for batch in shard.batches for key in batch.keys]
        merged = calibrate_here(job, source, self.store)
        assert merged.record.digest == self._afresh(job, source)
        assert self.store.latest().record.digest == merged.record.digest
        return merged, sorted(ran)

    def _afresh(self, job: CalibrationJob, source: DataSource) -> str:
        """The digest of the same grid measured at once, without a store."""
        batches = [
            (batch.keys, partial(load_phases, batch, source, job.inputs)) for batch in job.grid
        ]
        return Observer(job.observer).observe(batches).digest


@pytest.fixture
def session(frozen: FrozenModel, tmp_path: Path) -> Session:
    return Session(frozen, tmp_path / "store")


@pytest.fixture
def data(tmp_path: Path) -> Path:
    folder = tmp_path / "data"
    folder.mkdir()
    for i in range(8):
        write(folder, f"s{i}", i)
    return folder


def write(folder: Path, name: str, seed: int) -> None:
    np.save(folder / f"{name}.npy", normal(1, 4, seed=seed))


def source_of(folder: Path) -> ArraySource:
    return ArraySource(path=folder, inputs={"x": ""})


def keys_of(folder: Path, *names: str) -> list[str]:
    keys = source_of(folder).keys()
    return [key for key in keys if key.startswith(names)]


def test_a_file_that_sorts_first_is_the_only_one_to_run(session: Session, data: Path) -> None:
    merged, ran = session.run(source_of(data))
    assert (merged.record.n_samples, len(ran)) == (8, 8)
    write(data, "a", 100)
    assert source_of(data).keys()[0].startswith("a")
    merged, ran = session.run(source_of(data))
    assert merged.record.n_samples == 9
    assert ran == keys_of(data, "a")


def test_a_deleted_file_comes_back_for_nothing(session: Session, data: Path) -> None:
    whole, _ = session.run(source_of(data))
    kept = (data / "s3.npy").read_bytes()
    (data / "s3.npy").unlink()
    less, ran = session.run(source_of(data))
    assert less.record.n_samples == 7
    assert "1 samples of earlier runs are left out" in less.notes
    # Its neighbour in the micro-batch runs alone now; the other half of the shard runs again.
    assert set(ran) <= set(keys_of(data, "s0", "s1", "s2"))
    assert keys_of(data, "s2")[0] in ran
    (data / "s3.npy").write_bytes(kept)
    back, ran = session.run(source_of(data))
    assert ran == []
    assert back.record.digest == whole.record.digest
    assert not any("left out" in note for note in back.notes)


def test_a_renamed_file_is_the_same_sample(session: Session, data: Path) -> None:
    whole, _ = session.run(source_of(data))
    (data / "s3.npy").rename(data / "zz.npy")
    (data / "s0.npy").rename(data / "00.npy")
    again, ran = session.run(source_of(data))
    assert ran == []
    assert again.record.digest == whole.record.digest


def test_a_file_with_other_content_is_another_sample(session: Session, data: Path) -> None:
    whole, _ = session.run(source_of(data))
    times = (data / "s7.npy").stat()
    write(data, "s7", 700)
    os.utime(data / "s7.npy", ns=(times.st_atime_ns, times.st_mtime_ns))
    other, ran = session.run(source_of(data))
    assert keys_of(data, "s7")[0] in ran
    assert other.record.digest != whole.record.digest
    assert other.record.n_samples == 8


def test_excluded_samples_leave_and_come_back(session: Session, data: Path) -> None:
    inner = source_of(data)
    whole, _ = session.run(inner)
    pair = keys_of(data, "s4", "s5")
    less, ran = session.run(Excluded(source=inner, exclude=tuple(pair)))
    assert less.record.n_samples == 6
    # A whole micro-batch is gone: the other of its shard runs in a shard of its own.
    assert set(ran) <= set(keys_of(data, "s6", "s7"))
    again, ran = session.run(inner)
    assert ran == []
    assert again.record.digest == whole.record.digest


def test_fewer_and_then_more_samples(session: Session, data: Path) -> None:
    inner = source_of(data)
    few, ran = session.run(Limited(source=inner, max_samples=3))
    assert ran == inner.keys()[:3]
    more, ran = session.run(Limited(source=inner, max_samples=6))
    assert (more.record.n_samples, ran) == (6, inner.keys()[3:6])
    fewer, ran = session.run(Limited(source=inner, max_samples=3))
    assert (fewer.record.digest, ran) == (few.record.digest, [])
    every, ran = session.run(Limited(source=inner, max_samples=100))
    assert (every.record.n_samples, ran) == (8, inner.keys()[6:])


def test_the_same_image_twice_counts_once(session: Session, data: Path) -> None:
    whole, _ = session.run(source_of(data))
    (data / "copy.npy").write_bytes((data / "s1.npy").read_bytes())
    again, ran = session.run(source_of(data))
    assert ran == []
    assert again.record.digest == whole.record.digest
    assert any("repeats another" in note for note in again.notes)


def test_a_sample_that_changes_while_it_is_calibrated_is_named(
    frozen: FrozenModel, data: Path, tmp_path: Path
) -> None:
    source = source_of(data)
    job = prepare(frozen, source, SETTINGS, EXECUTION)
    write(data, "s5", 55)
    with pytest.raises(DataError) as caught:
        calibrate_here(job, source_of(data), create_store(tmp_path / "store", job.identity))
    assert caught.value.code == "QD306"
    assert "s5" in str(caught.value)


def external(folder: Path) -> Path:
    """A model whose weight lies beside it."""
    weight = normal(64, 64, seed=1)
    tensor = TensorProto(name="w", data_type=TensorProto.FLOAT, dims=[64, 64])
    tensor.data_location = TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value="w.data")
    (folder / "w.data").write_bytes(weight.tobytes())
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["y"], "matmul")],
        "g",
        [value("x", ["n", 64])],
        [value("y", ["n", 64])],
        [tensor],
    )
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8)
    (folder / "model.onnx").write_bytes(proto.SerializeToString())
    onnx.checker.check_model(str(folder / "model.onnx"))
    return folder / "model.onnx"


def test_one_byte_of_a_weight_is_another_model(tmp_path: Path) -> None:
    """Of the same size and time stamp, inside external data."""
    path = external(tmp_path)
    source = ArraySource(path=tmp_path / "x.npy", inputs={"x": ""})
    np.save(source.path, normal(4, 64))
    job = prepare(freeze(load_model(path)), source, SETTINGS, EXECUTION)
    create_store(tmp_path / "store", job.identity)
    data = tmp_path / "w.data"
    before = data.stat()
    content = bytearray(data.read_bytes())
    content[-4] ^= 1
    with data.open("r+b") as file:
        file.write(content)
    os.utime(data, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert (data.stat().st_size, data.stat().st_mtime_ns) == (before.st_size, before.st_mtime_ns)
    changed = prepare(freeze(load_model(path)), source, SETTINGS, EXECUTION)
    with pytest.raises(StoreError) as caught:
        create_store(tmp_path / "store", changed.identity)
    assert caught.value.code == "QD401"
    assert "model" in str(caught.value)
    content[-4] ^= 1
    data.write_bytes(content)
    again = prepare(freeze(load_model(path)), source, SETTINGS, EXECUTION)
    assert create_store(tmp_path / "store", again.identity).identity == job.identity
