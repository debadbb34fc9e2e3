"""Stages of a pipeline without Ray: what they hand on, and that they change no bit."""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from dataclasses import replace
from itertools import combinations, pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from onnx import TensorProto, helper

from qdist.calibration import CalibrationJob, calibrate_here
from qdist.calibration.boundary import Boundaries, LostBoundaryError, packed, unpacked
from qdist.calibration.merge import finish
from qdist.calibration.stage import (
    Stage,
    StageAnswer,
    StageObserver,
    StageTask,
    balance,
    run_stage,
    staged,
    stages_of,
)
from qdist.calibration.work import open_work
from qdist.data.source import DataSource, Feeds
from qdist.errors import ConfigError, ModelError
from qdist.model.graph import Graph
from qdist.model.taps import find_taps
from qdist.stats.observer import Observer, ObserverSpec, Padding
from qdist.stats.record import CalibrationRecord
from qdist.store.zarr_store import ZarrStore, create_store
from tests.onnx_models import frozen_from, model, normal, value
from tests.s3_server import BUCKET, s3_server
from tests.staged import cut_up, job_of, layers, samples, saved_apart
from tests.unit.test_observer import (
    PASTS,
    STATE,
    batch,
    decoder,
    in_many,
    in_one,
    prompts,
    spec_of,
)

WIDTH, N_LAYERS = 8, 5
SOURCE = samples(7, WIDTH)


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> CalibrationJob:
    return job_of(saved_apart(layers(N_LAYERS, WIDTH), tmp_path_factory.mktemp("m")), SOURCE)


@pytest.fixture(scope="module")
def expected(plain: CalibrationJob, tmp_path_factory: pytest.TempPathFactory) -> str:
    store = create_store(tmp_path_factory.mktemp("s") / "s", plain.identity)
    return calibrate_here(plain, SOURCE, store).record.digest


def run_all(
    job: CalibrationJob,
    stages: Sequence[Stage],
    store: ZarrStore,
    source: DataSource = SOURCE,
) -> list[StageAnswer]:
    """Every shard that the store lacks through every stage, stage by stage."""
    work = staged(job, open_work(job, store))
    answers = []
    for number, stage in enumerate(stages):
        observer = StageObserver(stage)
        for one in work:
            task = StageTask(
                shard=one.shard,
                wanted=tuple(t for part in one.wanted[stage.first : stage.stop] for t in part),
                sends=number + 1 < len(stages),
            )
            answers.append(run_stage(task, stage, observer, source, job.inputs, store, job.decoder))
    return answers


# --- dividing ---------------------------------------------------------------------------------


@given(st.lists(st.integers(0, 50), min_size=1, max_size=8), st.integers(1, 9))
def test_parts_are_as_even_as_can_be(weights: list[int], n_parts: int) -> None:
    parts = balance(weights, n_parts)
    assert len(parts) == min(n_parts, len(weights))
    assert [i for part in parts for i in part] == list(range(len(weights)))
    assert all(len(part) for part in parts)
    heaviest = max(sum(weights[i] for i in part) for part in parts)
    inner = range(1, len(weights))
    assert heaviest == min(
        max(sum(weights[a:b]) for a, b in pairwise((0, *ends, len(weights))))
        for ends in combinations(inner, len(parts) - 1)
    )


def test_a_stage_holds_its_sessions_only_where_they_fit_together(plain: CalibrationJob) -> None:
    job = cut_up(plain, range(100))
    weights = [segment.weight_bytes for segment in job.observer.segments]
    rest = max(s.estimate_bytes - s.weight_bytes for s in job.observer.segments)
    for budget, holds in ((sum(weights) + rest, True), (sum(weights) + rest - 1, False)):
        chosen = replace(job.settings, memory_budget_bytes=budget + job.observer.spool_bytes)
        (stage,) = stages_of(replace(job, measuring=replace(job.measuring, settings=chosen)), 1)
        assert stage.holds is holds
        assert stage.weight_bytes == sum(weights)


def test_what_cannot_be_divided_is_refused(plain: CalibrationJob) -> None:
    chosen = replace(plain.settings, memory_budget_bytes=None)
    with pytest.raises(ConfigError, match=r"QD107.*memory_budget"):
        stages_of(replace(plain, measuring=replace(plain.measuring, settings=chosen)), 2)


# --- measuring --------------------------------------------------------------------------------


@given(
    positions=st.sets(st.integers(1, 3 * N_LAYERS), max_size=6),
    n_workers=st.integers(1, 6),
    holds=st.booleans(),
    spool_bytes=st.sampled_from([0, 1 << 20]),
)
@settings(max_examples=12)
def test_stages_change_no_bit(
    positions: set[int],
    n_workers: int,
    holds: bool,
    spool_bytes: int,
    plain: CalibrationJob,
    expected: str,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    job = cut_up(plain, sorted(positions))
    job = replace(job, observer=replace(job.observer, spool_bytes=spool_bytes))
    stages = [replace(stage, holds=holds) for stage in stages_of(job, n_workers)]
    store = create_store(tmp_path_factory.mktemp("s") / "s", job.identity)
    answers = run_all(job, stages, store)
    assert not any(answer.is_lost for answer in answers)
    assert sum(answer.receipt is not None for answer in answers) == len(store.receipts())
    assert finish(job, store).record.digest == expected
    assert len(store.receipts()) == 4 * sum(bool(s.observer.taps.points) for s in stages)


def test_only_what_is_missing_is_committed(
    plain: CalibrationJob, expected: str, tmp_path: Path
) -> None:
    job = cut_up(plain, range(100))
    stages = stages_of(job, 3)
    store = create_store(tmp_path / "s", job.identity)
    run_all(job, stages, store)
    kept = store.receipts()
    (lost,) = [r for r in kept if r.tensors[0] == "h0" and len(r.batches) == 1]
    store.discard(lost)
    (one,) = staged(job, open_work(job, store))
    assert one.shard.id == lost.shard_id
    assert tuple(t for wanted in one.wanted for t in wanted) == lost.tensors
    answers = run_all(job, stages, store)
    receipts = [answer.receipt for answer in answers]
    assert [receipt and receipt.id for receipt in receipts] == [lost.id, None, None]
    assert finish(job, store).record.digest == expected


def test_no_weight_of_another_stage_is_read(
    plain: CalibrationJob, expected: str, tmp_path: Path
) -> None:
    job = cut_up(plain, range(100))
    stages, folder = stages_of(job, N_LAYERS), plain.observer.data_folder
    store = create_store(tmp_path / "s", job.identity)
    alone, seen = [], set()
    for number, stage in enumerate(stages):
        own = [f"w{i}.bin" for i in range(N_LAYERS) if reads(stage, f"w{i}.bin")]
        seen.update(own)
        assert 0 < len(own) < N_LAYERS - 1
        (part := tmp_path / str(number)).mkdir()
        for name in own:
            shutil.copy(folder / name, part)
        alone.append(replace(stage, observer=replace(stage.observer, data_folder=part)))
    assert len(seen) == N_LAYERS
    run_all(job, alone, store)
    assert finish(job, store).record.digest == expected
    # Without a file of its own it fails, so that the files are what it reads.
    next((tmp_path / "0").iterdir()).unlink()
    with pytest.raises(ModelError, match="QD205"):
        StageObserver(alone[0]).load()


def reads(stage: Stage, name: str) -> bool:
    return any(name.encode() in segment.graph_bytes for segment in stage.observer.segments)


# --- phases and padding -----------------------------------------------------------------------


def decoding(
    plain: CalibrationJob, folder: Path, carry: tuple[tuple[str, str], ...]
) -> tuple[CalibrationJob, ObserverSpec]:
    """A decoder in many segments as a job, and the specification of it in one."""
    graph = Graph(frozen_from(decoder(), folder / "m.onnx"))
    taps = find_taps(graph)
    hands = [output for _, output in carry]
    shapes = {name: a.shape for name, a in prompts(0, 0, carries_state=False)[0].items()}
    spec = spec_of(graph, in_one(graph, taps, shapes, hands), taps, carry=carry)
    segments = in_many(graph, taps, shapes, hands)
    return replace(plain, taps=taps, observer=replace(spec, segments=segments)), spec


@pytest.mark.parametrize("n_workers", [2, 3, 5, 99])
def test_phases_go_through_the_stages(
    n_workers: int, plain: CalibrationJob, tmp_path: Path
) -> None:
    job, spec = decoding(plain, tmp_path, PASTS)
    feeds = [prompts(seed, seed, carries_state=False) for seed in (0, 2, 1)]
    expected = Observer(spec).observe([batch([str(i)] * 2, *f) for i, f in enumerate(feeds)])
    stages = stages_of(job, n_workers)
    assert len(stages) == min(n_workers, len(job.observer.segments))
    records = []
    for stage in stages:
        sent: dict[int, list[Feeds]] = {}
        records.append(
            StageObserver(stage).measure(
                [batch([str(i)] * 2, *f) for i, f in enumerate(feeds)], sent.__setitem__
            )
        )
        feeds = list(sent.values())
    assert feeds == []
    assert CalibrationRecord.join(records, job.taps.tensors).digest == expected.digest


def test_what_goes_back_to_an_earlier_segment_is_refused(
    plain: CalibrationJob, tmp_path: Path
) -> None:
    job, _ = decoding(plain, tmp_path, (*PASTS, STATE))
    with pytest.raises(ConfigError, match=r"QD107.*decode steps"):
        stages_of(job, 2)


def test_padded_positions_count_in_no_stage(plain: CalibrationJob, tmp_path: Path) -> None:
    nodes = [
        helper.make_node("Relu", ["x"], ["r"], "relu"),
        helper.make_node("Exp", ["r"], ["e"], "exp"),
        helper.make_node("Neg", ["e"], ["y"], "neg"),
        helper.make_node("Cast", ["mask"], ["m"], "cast", to=TensorProto.FLOAT),
    ]
    ends = [value("y", ["b", "s", 7]), value("m", ["b", "s"])]
    starts = [value("x", ["b", "s", 7]), value("mask", ["b", "s"], TensorProto.INT64)]
    graph = Graph(frozen_from(model(nodes, starts, ends), tmp_path / "m.onnx"))
    taps = find_taps(graph, ["x", "r", "e", "y"])
    segments = in_many(graph, taps, {"x": (2, 5, 7), "mask": (2, 5)})
    spec = spec_of(graph, segments, taps, padding=Padding(mask="mask"))
    mask = np.array([[1, 1, 1, 0, 0], [1, 1, 1, 1, 0]])
    feeds = [[{"x": normal(2, 5, 7), "mask": mask}]]
    for stage in stages_of(replace(plain, taps=taps, observer=spec), 99):
        sent: dict[int, list[Feeds]] = {}
        record = StageObserver(stage).measure([batch(["a", "b"], *feeds[0])], sent.__setitem__)
        assert all(record.histogram(t).n_values == 7 * 7 for t in record.tensors)
        feeds = list(sent.values())


# --- boundaries -------------------------------------------------------------------------------

ARRAYS = hnp.arrays(
    st.sampled_from([np.float32, np.float16, np.int64, np.bool_, np.uint8]),
    hnp.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=3),
)


@given(st.lists(st.dictionaries(st.text(max_size=5), ARRAYS, max_size=3), max_size=3))
def test_arrays_come_back_as_they_were(phases: list[dict[str, np.ndarray]]) -> None:
    found = unpacked(packed(phases))
    assert [list(phase) for phase in found] == [list(phase) for phase in phases]
    for phase, before in zip(found, phases, strict=True):
        for name, array in phase.items():
            assert (array.dtype, array.shape) == (before[name].dtype, before[name].shape)
            assert array.tobytes() == before[name].tobytes()


def test_strings_come_back_as_they_were() -> None:
    words = np.array([["a", "ü"], ["", "b" * 300]], object)
    ((found,),) = [list(phase.values()) for phase in unpacked(packed([{"x": words}]))]
    assert found.tolist() == words.tolist()


@given(st.integers(0, 10_000), st.integers(0, 7))
def test_a_flipped_bit_is_seen(place: int, bit: int) -> None:
    data = bytearray(packed([{"x": np.arange(20, dtype=np.float32)}]))
    data[place % len(data)] ^= 1 << bit
    with pytest.raises(LostBoundaryError):
        unpacked(bytes(data))


@given(st.binary(max_size=80))
def test_other_bytes_are_seen(data: bytes) -> None:
    with pytest.raises(LostBoundaryError):
        unpacked(data)


def test_what_is_left_is_found_and_swept(tmp_path: Path, plain: CalibrationJob) -> None:
    store = create_store(tmp_path / "s", plain.identity)
    mine, other = Boundaries(store.location, "a" * 64), Boundaries(store.location, "b" * 64)
    for boundaries in (mine, other):
        for number in range(3):
            boundaries.put("shard", 2, number, [{"x": np.array([number])}])
    (found,) = mine.get("shard", 2, 1)
    assert found["x"].tolist() == [1]
    for missing in (("shard", 2, 3), ("shard", 1, 0), ("other", 2, 0)):
        with pytest.raises(LostBoundaryError):
            mine.get(*missing)
    assert mine.counts() == {mine.name("shard", 2): 3}
    mine.drop("shard", 2, 2)
    assert mine.counts() == {mine.name("shard", 2): 1}
    old = tmp_path / "s/spool" / f"{'c' * 16}-{'0' * 40}-0"
    old.write_bytes(b"")
    os.utime(old, (0, 0))
    mine.sweep()
    assert not mine.counts()
    assert not old.exists()
    assert other.counts() == {other.name("shard", 2): 3}
    assert store.receipts() == []


def test_stages_meet_in_an_object_store(
    plain: CalibrationJob, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with s3_server() as server:
        for name, text in server.environment.items():
            monkeypatch.setenv(name, text)
        job = cut_up(plain, range(100))
        store = create_store(f"s3://{BUCKET}/s", job.identity)
        stages = stages_of(job, 2)
        run_all(job, stages, store)
        assert finish(job, store).record.digest == expected
        boundaries = Boundaries(store.location, stages[0].plan)
        assert sum(boundaries.counts().values()) == 7
        boundaries.sweep()
        assert not boundaries.counts()
