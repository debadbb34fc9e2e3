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

from qdist.calibration import (
    CalibrationJob,
    calibrate_here,
    complete,
    finish,
    input_specs,
    load_batch,
    open_shards,
    prepare,
    run_shard,
)
from qdist.calibration import CalibrationSettings as Settings
from qdist.data.shards import Shard
from qdist.data.source import Feeds
from qdist.digest import digest_json
from qdist.errors import DataError, StoreError
from qdist.model.graph import Graph
from qdist.model.session import Execution
from qdist.model.taps import TapPoint, TapTable
from qdist.stats import grid
from qdist.stats.kernels import count_bits
from qdist.stats.observer import Observer
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
        store.discard(dropped)
        assert store.receipts() == [kept]
        assert code_of(lambda: store.read(dropped)) == "QD403"
        again = receipt_of(other, BATCHES[1])
        assert store.commit(again, other) is True
        assert_same(store.read(again), other)
        assert_same(store.read(kept), one)

    def test_discarding_an_unknown_shard_does_nothing(self, store: CalibrationStore) -> None:
        store.discard(receipt_of(record_of(1), BATCHES[0]))
        assert store.receipts() == []

    def test_a_shard_that_was_redone_meanwhile_is_not_discarded(
        self, store: CalibrationStore, tmp_path: Path
    ) -> None:
        one, other = record_of(1), record_of(2)
        store.commit(receipt_of(one, BATCHES[0]), one)
        (stale,) = store.receipts()
        first = self.reopen(tmp_path / "store")
        first.discard(first.receipts()[0])
        again = receipt_of(other, BATCHES[0])
        assert first.commit(again, other) is True
        store.discard(stale)
        store.discard(stale)
        assert store.receipts() == [again]
        assert_same(store.read(again), other)
        assert code_of(lambda: store.read(stale)) == "QD403"

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
        assert store.latest()[1] == {"n": 3}

    def test_finished_merges_are_found_by_name(
        self, store: CalibrationStore, tmp_path: Path
    ) -> None:
        assert store.finished() == []
        assert store.find("a") is None
        one, other = record_of(1, 4), record_of(2, 8)
        store.finish("b", one, {"n": 1})
        store.finish("a", other, {"n": 2})
        reader = self.reopen(tmp_path / "store")
        assert reader.finished() == ["a", "b"]
        found = reader.find("b")
        assert found is not None
        assert_same(found[0], one)
        assert found[1] == {"n": 1}
        assert_same(store.latest()[0], other)
        reader.make_latest("b")
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


def test_finishing_again_leaves_what_others_may_be_reading(
    filled: tuple[ZarrStore, list[ShardReceipt]],
) -> None:
    store, _ = filled
    before = {path: path.read_bytes() for path in files_of(store.path / "merged")}
    store.finish("all", record_of(8, 6), {"n": 2})
    assert_same(store.latest()[0], record_of(8, 6))
    assert {path: path.read_bytes() for path in before} == before


@pytest.mark.parametrize("folder", ["", "records", "..", "records/SHARD/..", "receipts/SHARD/a"])
def test_a_receipt_that_names_no_write_of_its_shard_deletes_nothing(
    filled: tuple[ZarrStore, list[ShardReceipt]], folder: str
) -> None:
    store, receipts = filled
    path = store.path / "receipts" / receipts[0].shard_id / "zarr.json"
    document = json.loads(path.read_text())
    document["attributes"]["record"] = folder.replace("SHARD", receipts[0].shard_id)
    path.write_text(json.dumps(document))
    before = files_of(store.path / "records")
    assert code_of(lambda: store.read(receipts[0])) == "QD403"
    store.discard(receipts[0])
    assert files_of(store.path / "records") == before
    assert {r.shard_id for r in store.receipts()} == {r.shard_id for r in receipts[1:]}


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


def small_job(
    tmp_path: Path, shard_samples: int = 4, name: str = "model.onnx"
) -> tuple[CalibrationJob, HeldSamples]:
    node = helper.make_node("Relu", ["x"], ["y"], name="relu")
    proto = onnx_models.model(
        [node], [onnx_models.value("x", ["n", 3])], [onnx_models.value("y", ["n", 3])]
    )
    frozen = onnx_models.frozen_from(proto, tmp_path / name)
    source = samples_of("x", 3, n=12)
    settings = Settings(micro_batch=2, shard_samples=shard_samples)
    return prepare(frozen, source, settings, EXECUTION), source


def test_only_the_damaged_shard_is_measured_anew(tmp_path: Path) -> None:
    """Damaged before the merge, by a flipped bit in a stored chunk."""
    job, source = small_job(tmp_path)
    sound = calibrate_here(job, source, ZarrStore.create(tmp_path / "s", job.identity, job.taps))
    assert sound.n_shards == 3
    store = ZarrStore.create(tmp_path / "store", job.identity, job.taps)
    observer = Observer(job.observer)
    for shard in open_shards(job, store):
        run_shard(shard, observer, source, job.inputs, store)
    assert open_shards(job, store) == ()
    damaged = store.receipts()[1]
    next(flips(chunks_of(store.path / "records" / damaged.shard_id)[0], 10_000))
    before = {p: p.stat().st_mtime_ns for p in files_of(store.path / "records")}
    seen: list[tuple[int, int]] = []
    assert code_of(lambda: finish(job, store, on_progress=lambda *at: seen.append(at))) == "QD403"
    assert seen == [(1, 3), (2, 3), (3, 3)]
    (shard,) = open_shards(job, store)
    assert shard.id == damaged.shard_id
    assert len(store.receipts()) == 2
    merged = calibrate_here(job, source, store)
    assert merged.record.digest == sound.record.digest
    assert_same(store.latest()[0], sound.record)
    kept = {p: t for p, t in before.items() if damaged.shard_id not in p.parts}
    assert {p: p.stat().st_mtime_ns for p in kept} == kept


def test_a_calibration_measures_again_what_it_finds_damaged(tmp_path: Path) -> None:
    """All in one call: the merge is lost, and so is a record that its receipt vouches for."""
    job, source = small_job(tmp_path)
    store = ZarrStore.create(tmp_path / "store", job.identity, job.taps)
    merged = calibrate_here(job, source, store)
    shutil.rmtree(store.path / "merged")
    shutil.rmtree(store.path / "records" / store.receipts()[0].shard_id)
    loaded: list[str] = []

    class Watched(HeldSamples):
        def load(self, key: str) -> Feeds:
            loaded.append(key)
            return HeldSamples.load(self, key)

    again = calibrate_here(job, Watched(samples=source.samples), store)
    assert again.record.digest == merged.record.digest
    assert len(loaded) == 4


def test_shards_of_another_driver_that_do_not_fit_are_passed_over(tmp_path: Path) -> None:
    """While this one measures 0-1, 2-3 and 4-5, another commits 1-3, larger, and then dies."""
    job, source = small_job(tmp_path)
    store = ZarrStore.create(tmp_path / "store", job.identity, job.taps)
    observer = Observer(job.observer)
    rounds = []

    def measure(shards: tuple[Shard, ...]) -> None:
        rounds.append(len(shards))
        other = Shard(index=0, batches=job.grid[1:4])
        for shard in (*shards, other):
            run_shard(shard, observer, source, job.inputs, store)

    merged = complete(job, store, measure)
    assert rounds == [3]
    assert (merged.n_shards, merged.record.n_samples) == (3, 12)
    assert len(open_shards(job, store)) == 1, "by size alone, it would not have been enough"


def test_a_finished_calibration_is_recalled_without_its_shards(tmp_path: Path) -> None:
    job, source = small_job(tmp_path)
    store = ZarrStore.create(tmp_path / "store", job.identity, job.taps)
    merged = calibrate_here(job, source, store)
    _, about = store.latest()
    assert about["n_samples"] == 12
    assert about["manifest_digest"] == job.manifest.digest
    store.finish("another", replace_samples(merged.record, 1), {})
    shutil.rmtree(store.path / "records")
    shutil.rmtree(store.path / "receipts")
    again = calibrate_here(job, HeldSamples(samples=[]), store)
    assert again.record.digest == merged.record.digest
    assert (again.n_shards, again.notes) == (3, merged.notes)
    assert_same(store.latest()[0], merged.record)


def test_what_nothing_can_mend_ends(tmp_path: Path) -> None:
    """A store that loses every record: measured a few times, then the damage is reported."""
    job, source = small_job(tmp_path)

    class Losing(ZarrStore):
        def commit(self, receipt: ShardReceipt, record: CalibrationRecord) -> bool:
            first = ZarrStore.commit(self, receipt, record)
            shutil.rmtree(self.path / "records" / receipt.shard_id)
            return first

    ZarrStore.create(tmp_path / "store", job.identity, job.taps)
    store = Losing(tmp_path / "store", job.identity, job.taps)
    assert code_of(lambda: calibrate_here(job, source, store)) == "QD403"


def test_two_drivers_on_damaged_stores_both_come_to_the_end(tmp_path: Path) -> None:
    """They find it, discard it, measure with shards of two sizes, and merge, at the same time."""
    job, source = small_job(tmp_path)
    n_rounds = 4
    for i in range(n_rounds):
        store = ZarrStore.create(tmp_path / str(i), job.identity, job.taps)
        expected = calibrate_here(job, source, store).record.digest
        for folder in ("records", "merged"):
            for path in files_of(store.path / folder):
                if path.name != "zarr.json":
                    path.write_bytes(b"x")
    context = multiprocessing.get_context("spawn")
    barrier, results = context.Barrier(2), context.SimpleQueue()
    drivers = [
        context.Process(target=_drive, args=(tmp_path, n_rounds, n_samples, barrier, results))
        for n_samples in (4, 6)
    ]
    for driver in drivers:
        driver.start()
    for driver in drivers:
        driver.join(timeout=60)
        assert driver.exitcode == 0
    assert [results.get() for _ in drivers] == [[expected] * n_rounds] * 2


def _drive(folder: Path, n_rounds: int, n_samples: int, barrier: Barrier, results: Any) -> None:
    job, source = small_job(folder, n_samples, name=f"{n_samples}.onnx")
    digests = []
    for i in range(n_rounds):
        store = ZarrStore.open(folder / str(i))
        barrier.wait(timeout=60)
        digests.append(calibrate_here(job, source, store).record.digest)
    results.put(digests)


# --- samples and shards ----------------------------------------------------------------------


def test_samples_that_differ_in_the_batch_axis_are_not_dropped(tmp_path: Path) -> None:
    """Of several that carry it, in one micro-batch, only the first used to be measured."""
    proto = onnx_models.model(
        [helper.make_node("Relu", ["x"], ["y"], name="relu")],
        [onnx_models.value("x", ["n", 3])],
        [onnx_models.value("y", ["n", 3])],
    )
    frozen = onnx_models.frozen_from(proto, tmp_path / "model.onnx")
    arrays = [feeds["x"] for feeds in samples_of("x", 3, n=4).samples]
    mixed = HeldSamples(samples=[{"x": a if i < 2 else a[None]} for i, a in enumerate(arrays)])
    job = prepare(frozen, mixed, Settings(micro_batch=2), EXECUTION)
    with pytest.raises(DataError, match=r"QD303.*batch axis of its own") as caught:
        load_batch(job.grid[1], mixed, job.inputs)
    assert job.grid[1].keys[0] in caught.value.where
    assert "calibration.micro_batch=1" in caught.value.mend
    alone = prepare(frozen, mixed, Settings(micro_batch=1), EXECUTION)
    store = ZarrStore.create(tmp_path / "store", alone.identity, alone.taps)
    assert calibrate_here(alone, mixed, store).record.histogram("x").n_values == 4 * 3


def test_an_input_of_unknown_rank_takes_any_sample(tmp_path: Path) -> None:
    proto = onnx_models.model(
        [helper.make_node("Relu", ["x"], ["y"], name="relu")],
        [onnx_models.value("x", None)],
        [onnx_models.value("y", None)],
    )
    frozen = onnx_models.frozen_from(proto, tmp_path / "model.onnx")
    (spec,) = input_specs(Graph(frozen, EXECUTION))
    assert spec.shape is None
    source = samples_of("x", 3, 5, n=6)
    job = prepare(frozen, source, Settings(micro_batch=4), EXECUTION)
    store = ZarrStore.create(tmp_path / "store", job.identity, job.taps)
    assert calibrate_here(job, source, store).record.histogram("y").n_values == 6 * 15
    assert load_batch(job.grid[0], source, job.inputs)["x"].shape == (4, 3, 5)


def test_shards_are_sized_by_the_number_of_samples() -> None:
    auto = Settings()
    assert [auto.samples_per_shard(n) for n in (1, 8192, 8193, 100_000)] == [16, 16, 17, 196]
    assert Settings(shard_samples=5).samples_per_shard(100_000) == 5
    with pytest.raises(ValueError, match="at least 1"):
        Settings(shard_samples=0)


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
