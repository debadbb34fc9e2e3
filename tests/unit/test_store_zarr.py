"""The contract of a calibration store, and what only the Zarr implementation can get wrong."""

from __future__ import annotations

import json
import multiprocessing
import shutil
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from multiprocessing.synchronize import Barrier
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from onnx import helper

from qdist.calibration import CalibrationJob, calibrate_here, finish, open_shards, prepare
from qdist.calibration import CalibrationSettings as Settings
from qdist.digest import digest_json
from qdist.errors import StoreError
from qdist.model.graph import Graph
from qdist.model.session import Execution
from qdist.model.taps import TapPoint, TapTable
from qdist.stats import grid
from qdist.stats.kernels import count_bits
from qdist.stats.record import CalibrationRecord
from qdist.store.identity import Identity
from qdist.store.protocol import CalibrationStore
from qdist.store.receipt import ShardReceipt
from qdist.store.zarr_store import ZarrStore
from tests import onnx_models
from tests.onnx_models import EXECUTION, HeldSamples, samples_of

TAPS = TapTable(
    points=(
        TapPoint(tensor="x", dtype="float32", is_input=True),
        TapPoint(tensor="y", dtype="float16", is_input=False),
    ),
    aliases={"y2": "y"},
    untapped={"z": "inside the body of If a"},
)
IDENTITY = Identity(
    model_digest="0" * 64,
    preprocessing={"scale": 0.5, "mean": [0.1]},
    fingerprint={"onnxruntime": "1", "cpu_flags": ["avx2"]},
    micro_batch=2,
    taps="1" * 64,
)
BATCHES = tuple((f"s{2 * i}", f"s{2 * i + 1}") for i in range(6))


def record_of(seed: int, n_samples: int = 2) -> CalibrationRecord:
    rng = np.random.default_rng(seed)
    tables = [np.zeros(grid.N_BINS, np.uint64) for _ in TAPS.tensors]
    extrema = np.tile(np.array([np.inf, -np.inf], np.float32), (len(tables), 1))
    for table, row in zip(tables, extrema, strict=True):
        count_bits(rng.normal(size=300).astype(np.float32).view(np.uint32), table, row)
    return CalibrationRecord.from_dense(TAPS.tensors, tables, extrema, n_samples)


def receipt_of(record: CalibrationRecord, *batches: tuple[str, ...]) -> ShardReceipt:
    return ShardReceipt(
        shard_id=digest_json(batches),
        batches=batches,
        record_digest=record.digest,
        made_by={"node": "here", "seconds": 0.5},
    )


def assert_same(one: CalibrationRecord, other: CalibrationRecord) -> None:
    assert one.digest == other.digest
    assert one.tensors == other.tensors
    assert one.n_samples == other.n_samples
    assert np.array_equal(one.keys, other.keys)
    assert np.array_equal(one.counts, other.counts)
    assert np.array_equal(one.extrema, other.extrema)
    assert one.keys.dtype == np.int64
    assert one.counts.dtype == np.uint64
    assert one.extrema.dtype == np.float32


def code_of(action: Callable[[], Any]) -> str:
    with pytest.raises(StoreError) as caught:
        action()
    return caught.value.code


class StoreContract(ABC):
    """What every `CalibrationStore` must do. A subclass per implementation says how to make one."""

    @abstractmethod
    def create(self, place: Path, identity: Identity = IDENTITY) -> CalibrationStore:
        """Open the store at ``place``, making it where there is none."""

    @abstractmethod
    def reopen(self, place: Path) -> CalibrationStore:
        """Open the store that is there, as another process would."""

    @pytest.fixture
    def store(self, tmp_path: Path) -> CalibrationStore:
        return self.create(tmp_path / "store")

    def test_it_is_a_calibration_store(self, store: CalibrationStore) -> None:
        assert isinstance(store, CalibrationStore)

    def test_identity_and_taps_survive_reopening(
        self, store: CalibrationStore, tmp_path: Path
    ) -> None:
        again = self.reopen(tmp_path / "store")
        assert again.identity == store.identity == IDENTITY
        assert again.identity.digest == IDENTITY.digest
        assert again.taps == store.taps == TAPS

    def test_making_it_again_keeps_what_it_holds(
        self, store: CalibrationStore, tmp_path: Path
    ) -> None:
        record = record_of(1)
        store.commit(receipt_of(record, BATCHES[0]), record)
        assert len(self.create(tmp_path / "store").receipts()) == 1

    def test_a_committed_record_reads_back_as_it_was(
        self, store: CalibrationStore, tmp_path: Path
    ) -> None:
        record = record_of(1)
        receipt = receipt_of(record, BATCHES[0])
        assert store.commit(receipt, record) is True
        assert store.receipts() == [receipt]
        for reader in (store, self.reopen(tmp_path / "store")):
            assert_same(reader.read(receipt), record)

    @pytest.mark.parametrize("n_samples", [0, 3])
    def test_a_record_without_values_reads_back(
        self, store: CalibrationStore, n_samples: int
    ) -> None:
        record = replace_samples(CalibrationRecord.empty(TAPS.tensors), n_samples)
        batch = tuple(f"s{i}" for i in range(n_samples))
        receipt = receipt_of(record, batch)
        assert store.commit(receipt, record)
        assert_same(store.read(receipt), record)

    def test_a_second_commit_changes_nothing(self, store: CalibrationStore) -> None:
        first, second = record_of(1), record_of(2)
        receipt = receipt_of(first, BATCHES[0])
        other = replace(receipt, record_digest=second.digest, made_by={"node": "there"})
        assert store.commit(receipt, first) is True
        assert store.commit(receipt, first) is False
        assert store.commit(other, second) is False
        assert store.receipts() == [receipt]
        assert_same(store.read(receipt), first)

    def test_receipts_are_sorted_by_id(self, store: CalibrationStore) -> None:
        assert store.receipts() == []
        record = record_of(1)
        for batch in BATCHES:
            store.commit(receipt_of(record, batch), record)
        ids = [receipt.shard_id for receipt in store.receipts()]
        assert ids == sorted(digest_json([batch]) for batch in BATCHES)

    def test_a_discarded_shard_is_gone_and_can_be_redone(self, store: CalibrationStore) -> None:
        one, other = record_of(1), record_of(2)
        kept, dropped = receipt_of(one, BATCHES[0]), receipt_of(one, BATCHES[1])
        for receipt in (kept, dropped):
            store.commit(receipt, one)
        store.discard(dropped.shard_id)
        assert store.receipts() == [kept]
        assert code_of(lambda: store.read(dropped)) == "QD403"
        again = receipt_of(other, BATCHES[1])
        assert store.commit(again, other) is True
        assert_same(store.read(again), other)
        assert_same(store.read(kept), one)

    def test_discarding_an_unknown_shard_does_nothing(self, store: CalibrationStore) -> None:
        store.discard("f" * 64)
        assert store.receipts() == []

    def test_a_record_other_than_the_receipt_says_is_damaged(self, store: CalibrationStore) -> None:
        record = record_of(1)
        receipt = receipt_of(record, BATCHES[0])
        store.commit(receipt, record)
        lying = replace(receipt, record_digest="f" * 64)
        assert code_of(lambda: store.read(lying)) == "QD403"

    def test_nothing_is_latest_before_the_first_finish(self, store: CalibrationStore) -> None:
        record = record_of(1)
        store.commit(receipt_of(record, BATCHES[0]), record)
        with pytest.raises(StoreError) as caught:
            store.latest()
        assert caught.value.code == "QD402"
        assert "1 finished shards" in caught.value.got

    def test_the_last_finished_merge_is_the_latest(
        self, store: CalibrationStore, tmp_path: Path
    ) -> None:
        one, other = record_of(1, 4), record_of(2, 8)
        store.finish("a", one, {"n": 1, "notes": ["x"]})
        store.finish("b", other, {"n": 2})
        for reader in (store, self.reopen(tmp_path / "store")):
            record, about = reader.latest()
            assert_same(record, other)
            assert about == {"n": 2}
        store.finish("a", one, {"n": 3})
        assert_same(store.latest()[0], one)

    def test_a_store_of_another_identity_is_refused_and_says_what_differs(
        self, store: CalibrationStore, tmp_path: Path
    ) -> None:
        changes: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
            "the model": ({"model_digest": "2" * 64}, ("000000000000", "222222222222")),
            "the preprocessing": ({"preprocessing": {"scale": 0.25}}, ("0.5", "0.25")),
            "the execution fingerprint": ({"fingerprint": {"onnxruntime": "2"}}, ('"1"', '"2"')),
            "calibration.micro_batch": ({"micro_batch": 3}, ("stored 2", "now 3")),
            "the measured tensors": ({"taps": "3" * 64}, ("111111111111", "333333333333")),
            "the histogram grid": ({"grid_version": 9}, ("now 9",)),
        }
        for title, (change, shown) in changes.items():
            other = replace(IDENTITY, **change)
            with pytest.raises(StoreError) as caught:
                self.create(tmp_path / "store", other)
            assert caught.value.code == "QD401"
            assert all(part in caught.value.got for part in (title, *shown))
            assert not any(t in caught.value.got for t in changes if t != title)

    def test_two_processes_that_commit_one_shard_agree_on_a_winner(self, tmp_path: Path) -> None:
        """Each brings a record of its own, so that a mixture would show."""
        place = tmp_path / "store"
        self.create(place)
        context = multiprocessing.get_context("spawn")
        n_rounds = 8
        barrier, results = context.Barrier(2), context.SimpleQueue()
        workers = [
            context.Process(target=self._race, args=(place, seed, n_rounds, barrier, results))
            for seed in (1, 2)
        ]
        for worker in workers:
            worker.start()
        outcomes: dict[int, dict[int, bool]] = dict(results.get() for _ in workers)
        for worker in workers:
            worker.join(timeout=60)
            assert worker.exitcode == 0
        store = self.reopen(place)
        kept = {receipt.batches: receipt for receipt in store.receipts()}
        assert len(kept) == n_rounds
        for i in range(n_rounds):
            winners = [seed for seed, outcome in outcomes.items() if outcome[i]]
            assert len(winners) == 1
            receipt = kept[((f"r{i}",),)]
            assert_same(store.read(receipt), record_of(winners[0], 1))

    def _race(self, place: Path, seed: int, n: int, barrier: Barrier, results: Any) -> None:
        store, record = self.reopen(place), record_of(seed, 1)
        outcome = {}
        for i in range(n):
            receipt = receipt_of(record, (f"r{i}",))
            barrier.wait(timeout=60)
            outcome[i] = store.commit(receipt, record)
        results.put((seed, outcome))


def replace_samples(record: CalibrationRecord, n_samples: int) -> CalibrationRecord:
    return CalibrationRecord(
        tensors=record.tensors,
        keys=record.keys,
        counts=record.counts,
        extrema=record.extrema,
        n_samples=n_samples,
    )


class TestZarrStore(StoreContract):
    """The contract, for `ZarrStore`."""

    def create(self, place: Path, identity: Identity = IDENTITY) -> CalibrationStore:
        return ZarrStore.create(place, identity, TAPS)

    def reopen(self, place: Path) -> CalibrationStore:
        return ZarrStore.open(place)


# --- damage -----------------------------------------------------------------------------------


@pytest.fixture
def filled(tmp_path: Path) -> tuple[ZarrStore, list[ShardReceipt]]:
    """A store with three committed shards and their merge."""
    store = ZarrStore.create(tmp_path / "store", IDENTITY, TAPS)
    receipts = []
    for i, batch in enumerate(BATCHES[:3]):
        record = record_of(i)
        receipts.append(receipt_of(record, batch))
        store.commit(receipts[-1], record)
    store.finish("all", record_of(9, 6), {"n": 1})
    return store, receipts


def files_of(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def chunks_of(folder: Path) -> list[Path]:
    found = [path for path in files_of(folder) if path.name != "zarr.json"]
    assert len(found) == 3
    return found


def flips(path: Path, step: int) -> Iterator[int]:
    """Flip one bit of every ``step``-th byte in turn, with the file mended again afterwards."""
    sound = path.read_bytes()
    for place in range(0, len(sound), step):
        damaged = bytearray(sound)
        damaged[place] ^= 1 << (place % 8)
        path.write_bytes(bytes(damaged))
        yield place
    path.write_bytes(sound)


def read_or_none(store: ZarrStore, receipt: ShardReceipt) -> CalibrationRecord | None:
    """The record, or None where it is found to be damaged. Any other error passes."""
    try:
        return store.read(receipt)
    except StoreError as error:
        if error.code != "QD403":
            raise
        return None


def test_a_flipped_bit_in_any_chunk_is_found(
    filled: tuple[ZarrStore, list[ShardReceipt]],
) -> None:
    store, receipts = filled
    for chunk in chunks_of(store.path / "records" / receipts[0].shard_id):
        for _ in flips(chunk, 29):
            assert code_of(lambda: store.read(receipts[0])) == "QD403"
    assert_same(store.read(receipts[0]), record_of(0))


def test_damaged_metadata_never_gives_a_wrong_record(
    filled: tuple[ZarrStore, list[ShardReceipt]],
) -> None:
    """A flip may fall on white space or a name that nobody reads; then the record is right."""
    store, receipts = filled
    expected, n_found = record_of(0), 0
    for path in files_of(store.path / "records" / receipts[0].shard_id):
        if path.name != "zarr.json":
            continue
        for _ in flips(path, 17):
            record = read_or_none(store, receipts[0])
            if record is None:
                n_found += 1
            else:
                assert_same(record, expected)
    assert n_found > 20


@pytest.mark.parametrize("which", [0, 1, 2])
@pytest.mark.parametrize("kind", ["truncated", "empty", "deleted", "of another shard"])
def test_a_chunk_that_is_not_what_was_written_is_found(
    filled: tuple[ZarrStore, list[ShardReceipt]], which: int, kind: str
) -> None:
    store, receipts = filled
    chunk = chunks_of(store.path / "records" / receipts[0].shard_id)[which]
    match kind:
        case "truncated":
            chunk.write_bytes(chunk.read_bytes()[:-5])
        case "empty":
            chunk.write_bytes(b"")
        case "deleted":
            chunk.unlink()
        case _:
            shutil.copy(chunks_of(store.path / "records" / receipts[1].shard_id)[which], chunk)
    with pytest.raises(StoreError) as caught:
        store.read(receipts[0])
    assert caught.value.code == "QD403"
    assert receipts[0].shard_id in caught.value.where
    for sound in receipts[1:]:
        store.read(sound)


def test_a_deleted_record_is_found(filled: tuple[ZarrStore, list[ShardReceipt]]) -> None:
    store, receipts = filled
    shutil.rmtree(store.path / "records")
    for receipt in receipts:
        assert code_of(partial(store.read, receipt)) == "QD403"


def test_a_record_without_a_receipt_does_not_count(
    filled: tuple[ZarrStore, list[ShardReceipt]],
) -> None:
    """What a worker leaves that died between the record and its receipt, or half-way through."""
    store, receipts = filled
    shutil.rmtree(store.path / "receipts" / receipts[0].shard_id)
    chunks_of(store.path / "records" / receipts[0].shard_id)[0].unlink()
    assert {r.shard_id for r in store.receipts()} == {r.shard_id for r in receipts[1:]}
    assert store.commit(receipts[0], record_of(0)) is True
    assert_same(store.read(receipts[0]), record_of(0))


@pytest.mark.parametrize(
    "content", [b"", b"{", b"[]", b"null", b"{}", b'{"zarr_format": 3}', b"\xff\xfe"]
)
def test_a_damaged_receipt_counts_as_absent_and_is_replaced(
    filled: tuple[ZarrStore, list[ShardReceipt]], content: bytes
) -> None:
    store, receipts = filled
    (store.path / "receipts" / receipts[0].shard_id / "zarr.json").write_bytes(content)
    assert {r.shard_id for r in store.receipts()} == {r.shard_id for r in receipts[1:]}
    assert code_of(lambda: store.read(receipts[0])) == "QD403"
    assert store.commit(receipts[0], record_of(0)) is True
    assert len(store.receipts()) == 3
    assert_same(store.read(receipts[0]), record_of(0))


@pytest.mark.parametrize(
    ("array", "old", "new"),
    [
        ("count", b'"fill_value": 18446744073709551615', b'"fill_value": 38446744073709551615'),
        ("extrema", b'"chunk_shape": [\n        2,', b'"chunk_shape": [\n        0,'),
        ("key", b'"data_type": "int64"', b'"data_type": "int24"'),
    ],
)
def test_metadata_that_zarr_cannot_compute_with_is_damage(
    filled: tuple[ZarrStore, list[ShardReceipt]], array: str, old: bytes, new: bytes
) -> None:
    store, receipts = filled
    folder = store.path / "records" / receipts[0].shard_id
    (path,) = (p for p in files_of(folder) if p.parent.name == array and p.name == "zarr.json")
    content = path.read_bytes()
    assert content.count(old) == 1
    path.write_bytes(content.replace(old, new))
    assert code_of(lambda: store.read(receipts[0])) == "QD403"


def test_flips_in_a_receipt_never_pass_for_another_shard(
    filled: tuple[ZarrStore, list[ShardReceipt]],
) -> None:
    store, receipts = filled
    path = store.path / "receipts" / receipts[0].shard_id / "zarr.json"
    ids = {receipt.shard_id for receipt in receipts}
    for _ in flips(path, 7):
        found = store.receipts()
        assert {r.shard_id for r in found} <= ids
        for receipt in found:
            if receipt.shard_id == receipts[0].shard_id:
                record = read_or_none(store, receipt)
                assert record is None or record.digest == receipts[0].record_digest


def test_a_damaged_merge_is_found_and_written_anew(
    filled: tuple[ZarrStore, list[ShardReceipt]],
) -> None:
    store, _ = filled
    sound = record_of(9, 6)
    for damage in (
        lambda: chunks_of(store.path / "merged" / "all")[1].write_bytes(b"x"),
        lambda: (store.path / "finished" / "all" / "zarr.json").write_bytes(b"{"),
        lambda: (store.path / "head.json").write_bytes(b"{"),
        lambda: (store.path / "head.json").write_bytes(b'{"finished": "other"}'),
        lambda: shutil.rmtree(store.path / "merged"),
    ):
        damage()
        assert code_of(store.latest) == "QD403"
        store.finish("all", sound, {"n": 2})
        assert_same(store.latest()[0], sound)


# --- places -----------------------------------------------------------------------------------


def test_a_folder_with_other_files_is_refused(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    assert code_of(lambda: ZarrStore.create(tmp_path, IDENTITY, TAPS)) == "QD405"
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_a_file_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("mine")
    assert code_of(lambda: ZarrStore.create(file, IDENTITY, TAPS)) == "QD405"
    assert file.read_text() == "mine"


def test_an_empty_folder_is_taken(tmp_path: Path) -> None:
    assert ZarrStore.create(tmp_path, IDENTITY, TAPS).receipts() == []


def test_what_a_killed_process_left_of_a_new_store_is_no_foreign_file(tmp_path: Path) -> None:
    (tmp_path / "zarr.0123456789abcdef.partial").write_bytes(b"{")
    assert ZarrStore.create(tmp_path, IDENTITY, TAPS).receipts() == []


@pytest.mark.parametrize(
    "document",
    [
        b"",
        b"[]",
        b"{}",
        b"\xff",
        {"zarr_format": 3, "node_type": "group", "attributes": {}},
        {"zarr_format": 3, "node_type": "group", "attributes": {"qdist": None}},
        {"zarr_format": 3, "node_type": "group", "attributes": {"qdist": {"schema": 99}}},
        {"zarr_format": 3, "node_type": "group", "attributes": {"qdist": {"schema": 1}}},
        {
            "zarr_format": 3,
            "node_type": "group",
            "attributes": {
                "qdist": {"schema": 1, "identity": IDENTITY.to_json(), "taps": {"points": [["x"]]}}
            },
        },
        {
            "zarr_format": 3,
            "node_type": "group",
            "attributes": {"qdist": {"schema": 1, "identity": {"later": 1}, "taps": {}}},
        },
    ],
)
def test_a_group_that_this_version_does_not_read_is_refused(
    tmp_path: Path, document: bytes | dict[str, Any]
) -> None:
    content = document if isinstance(document, bytes) else json.dumps(document).encode()
    (tmp_path / "zarr.json").write_bytes(content)
    assert code_of(lambda: ZarrStore.open(tmp_path)) == "QD405"
    assert code_of(lambda: ZarrStore.create(tmp_path, IDENTITY, TAPS)) == "QD405"
    assert (tmp_path / "zarr.json").read_bytes() == content


def test_a_place_below_a_file_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    place = tmp_path / "file" / "store"
    with pytest.raises(StoreError) as caught:
        ZarrStore.create(place, IDENTITY, TAPS)
    assert caught.value.code == "QD404"
    assert caught.value.where == str(place)


def test_commit_and_finish_say_that_they_cannot_write(tmp_path: Path) -> None:
    store = ZarrStore.create(tmp_path / "store", IDENTITY, TAPS)
    shutil.rmtree(store.path)
    store.path.write_text("")
    record = record_of(1)
    assert code_of(lambda: store.commit(receipt_of(record, BATCHES[0]), record)) == "QD404"
    assert code_of(lambda: store.finish("a", record, {})) == "QD404"


def test_no_store_is_no_finished_calibration(tmp_path: Path) -> None:
    assert code_of(lambda: ZarrStore.open(tmp_path / "none")) == "QD402"


# --- a calibration on a store ----------------------------------------------------------------


def small_job(tmp_path: Path) -> tuple[CalibrationJob, HeldSamples]:
    node = helper.make_node("Relu", ["x"], ["y"], name="relu")
    proto = onnx_models.model(
        [node], [onnx_models.value("x", ["n", 3])], [onnx_models.value("y", ["n", 3])]
    )
    frozen = onnx_models.frozen_from(proto, tmp_path / "model.onnx")
    source = samples_of("x", 3, n=12)
    settings = Settings(micro_batch=2, shard_samples=4)
    return prepare(frozen, source, settings, EXECUTION), source


def test_only_the_damaged_shard_is_measured_anew(tmp_path: Path) -> None:
    job, source = small_job(tmp_path)
    store = ZarrStore.create(tmp_path / "store", job.identity, job.taps)
    merged = calibrate_here(job, source, store)
    assert merged.n_shards == 3
    assert open_shards(job, store) == ()
    damaged = store.receipts()[1]
    next(flips(chunks_of(store.path / "records" / damaged.shard_id)[0], 10_000))
    before = {p: p.stat().st_mtime_ns for p in files_of(store.path / "records")}
    (shard,) = open_shards(job, store)
    assert shard.id == damaged.shard_id
    assert len(store.receipts()) == 2
    again = calibrate_here(job, source, store)
    assert again.record.digest == merged.record.digest
    assert_same(store.latest()[0], merged.record)
    kept = {p: t for p, t in before.items() if damaged.shard_id not in p.parts}
    assert {p: p.stat().st_mtime_ns for p in kept} == kept


def test_a_damaged_receipt_is_measured_anew(tmp_path: Path) -> None:
    job, source = small_job(tmp_path)
    store = ZarrStore.create(tmp_path / "store", job.identity, job.taps)
    merged = calibrate_here(job, source, store)
    lost = store.receipts()[2].shard_id
    (store.path / "receipts" / lost / "zarr.json").write_bytes(b"{")
    assert [shard.id for shard in open_shards(job, store)] == [lost]
    assert calibrate_here(job, source, store).record.digest == merged.record.digest


def test_finishing_early_says_how_much_is_missing(tmp_path: Path) -> None:
    job, _ = small_job(tmp_path)
    store = ZarrStore.create(tmp_path / "store", job.identity, job.taps)
    with pytest.raises(StoreError) as caught:
        finish(job, store)
    assert caught.value.code == "QD402"
    assert "6 of 6 micro-batches missing" in caught.value.got


def test_everything_that_can_change_a_count_changes_the_identity(tmp_path: Path) -> None:
    nodes = [
        helper.make_node("Relu", ["x"], ["y"], name="relu"),
        helper.make_node("MatMul", ["y", "w"], ["z"], name="mm"),
        helper.make_node("Sigmoid", ["z"], ["out"], name="s"),
    ]

    def frozen_with(weight: float) -> Any:
        proto = onnx_models.model(
            nodes,
            [onnx_models.value("x", ["n", 3])],
            [onnx_models.value("out", ["n", 2])],
            {"w": np.full((3, 2), weight, np.float32)},
        )
        return onnx_models.frozen_from(proto, tmp_path / f"{weight}.onnx")

    class Other(HeldSamples):
        def preprocessing(self) -> dict[str, Any]:
            return {"kind": "held", "scale": 2}

    source = samples_of("x", 3, n=8)

    def identity(
        weight: float = 1.0,
        data: HeldSamples = source,
        execution: Execution = EXECUTION,
        **settings: Any,
    ) -> str:
        frozen = frozen_with(weight)
        graph = Graph(frozen, execution)
        job = prepare(frozen, data, Settings(**settings), execution, graph=graph)
        return job.identity.digest

    base = identity()
    assert identity() == base
    assert identity(shard_samples=4) == base
    # The policy decides what is refused, not what is counted.
    assert identity(on_nan="report") == base
    assert identity(data=HeldSamples(samples=source.samples[:5])) == base
    changed = [
        identity(weight=1.5),
        identity(data=Other(samples=source.samples)),
        identity(execution=Execution(n_threads=2)),
        identity(micro_batch=2),
        identity(taps="compute"),
    ]
    assert len({base, *changed}) == 1 + len(changed)
    assert Identity.from_json(json.loads(json.dumps(IDENTITY.to_json()))) == IDENTITY
    with pytest.raises(TypeError):
        Identity.from_json({**IDENTITY.to_json(), "later": 1})
