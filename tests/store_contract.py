"""What every `CalibrationStore` must do. Each implementation has a test class of its own."""

from __future__ import annotations

import multiprocessing
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import replace
from multiprocessing.synchronize import Barrier
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from onnx import helper

from qdist.calibration import CalibrationSettings, calibrate_here, prepare
from qdist.digest import digest_json
from qdist.errors import StoreError
from qdist.model.taps import TapPoint, TapTable
from qdist.stats.record import CalibrationRecord
from qdist.store.portable import export_statistics, import_statistics
from qdist.store.protocol import CalibrationStore
from qdist.store.sweep import sweep
from qdist.store.zarr_store import ZarrStore, create_store, open_store
from tests.onnx_models import EXECUTION, frozen_from, model, samples_of, value
from tests.records import (
    BATCHES,
    IDENTITY,
    SPEC,
    TAPS,
    receipt_of,
    record_of,
    with_samples,
)

OTHER_TAPS = TapTable(
    points=(TapPoint(tensor="y", dtype="float16", is_input=False),), aliases={}, untapped={}
)


def assert_same(one: CalibrationRecord, other: CalibrationRecord) -> None:
    assert one.tensors == other.tensors
    assert one.n_samples == other.n_samples
    mine, theirs = one.arrays(), other.arrays()
    assert mine.keys() == theirs.keys()
    for name, array in mine.items():
        assert array.dtype == theirs[name].dtype
        assert np.array_equal(array, theirs[name])
    assert one.digest == other.digest


def code_of(action: Callable[[], Any]) -> str:
    with pytest.raises(StoreError) as caught:
        action()
    return caught.value.code


def assert_a_calibration_goes_there(place: str, folder: Path) -> None:
    """A calibration, done twice, of which nothing differs from one in a folder."""
    node = helper.make_node("Relu", ["x"], ["y"], name="relu")
    proto = model([node], [value("x", ["n", 3])], [value("y", ["n", 3])])
    source = samples_of("x", 3, n=12)
    settings = CalibrationSettings(micro_batch=2, shard_samples=4)
    job = prepare(frozen_from(proto, folder / "model.onnx"), source, settings, EXECUTION)
    local = calibrate_here(job, source, create_store(folder / "store", job.identity))
    store = create_store(place, job.identity)
    for _ in range(2):
        assert_same(calibrate_here(job, source, store).record, local.record)
        found = open_store(store.location)
        assert_same(found.latest().record, local.record)
        assert len(found.receipts()) == len(found.place.entries("records")) == 3


class StoreContract(ABC):
    """The contract of a store of records; `place` is a location that nothing else uses."""

    @pytest.fixture
    @abstractmethod
    def place(self, tmp_path: Path) -> str:
        """Where there is no store yet."""

    @pytest.fixture
    def store(self, place: str) -> ZarrStore:
        return create_store(place, IDENTITY)

    def test_it_is_a_calibration_store(self, store: ZarrStore, place: str) -> None:
        assert isinstance(store, CalibrationStore)
        assert store.location == place

    def test_identity_survives_reopening(self, store: ZarrStore, place: str) -> None:
        again = open_store(place)
        assert again.identity == store.identity == IDENTITY
        assert again.identity.digest == IDENTITY.digest

    def test_no_store_is_no_finished_calibration(self, place: str) -> None:
        assert code_of(lambda: open_store(place)) == "QD402"

    def test_making_it_again_keeps_what_it_holds(self, store: ZarrStore, place: str) -> None:
        record = record_of(1)
        store.commit(receipt_of(record, BATCHES[0]), record)
        assert len(create_store(place, IDENTITY).receipts()) == 1

    def test_a_committed_record_reads_back_as_it_was(self, store: ZarrStore, place: str) -> None:
        record = record_of(1)
        receipt = receipt_of(record, BATCHES[0])
        assert store.commit(receipt, record) is True
        assert store.receipts() == [receipt]
        for reader in (store, open_store(place)):
            assert_same(reader.read(receipt), record)
            (found,) = reader.receipts()
            assert_same(reader.read(found), record)

    def test_rows_are_read_in_the_order_asked_for(self, store: ZarrStore) -> None:
        record = record_of(1, tensors=("a", "b", "c"))
        receipt = receipt_of(record, BATCHES[0])
        store.commit(receipt, record)
        assert_same(store.read(receipt, ("c", "a")), record.select(("c", "a")))
        with pytest.raises(KeyError):
            store.read(receipt, ("d",))

    @pytest.mark.parametrize("n_samples", [0, 3])
    def test_a_record_without_values_reads_back(self, store: ZarrStore, n_samples: int) -> None:
        record = with_samples(CalibrationRecord.empty(TAPS.tensors), n_samples)
        receipt = receipt_of(record, tuple(f"s{i}" for i in range(n_samples)))
        assert store.commit(receipt, record)
        assert_same(store.read(receipt), record)

    def test_a_second_commit_changes_nothing(self, store: ZarrStore) -> None:
        first, second = record_of(1), record_of(2)
        receipt, other = receipt_of(first, BATCHES[0]), receipt_of(second, BATCHES[0])
        assert store.commit(receipt, first) is True
        n_objects = len(store.place.entries("records"))
        assert store.commit(receipt, first) is False
        assert store.commit(other, second) is False
        assert store.receipts() == [receipt]
        assert_same(store.read(receipt), first)
        assert len(store.place.entries("records")) == n_objects == 1

    def test_a_receipt_of_another_record_is_not_committed(self, store: ZarrStore) -> None:
        receipt = receipt_of(record_of(1), BATCHES[0])
        for wrong in (record_of(2), record_of(1, 3), record_of(1, tensors=("x", "z"))):
            with pytest.raises(ValueError, match="another record"):
                store.commit(receipt, wrong)
        assert store.receipts() == []

    def test_tap_sets_of_the_same_samples_live_side_by_side(
        self, store: ZarrStore, place: str
    ) -> None:
        records = [record_of(i, tensors=t) for i, t in enumerate([("x", "y"), ("y", "x"), ("w",)])]
        receipts = [receipt_of(record, BATCHES[0]) for record in records]
        for receipt, record in zip(receipts, records, strict=True):
            assert store.commit(receipt, record) is True
        assert len({receipt.shard_id for receipt in store.receipts()}) == 1
        reader = open_store(place)
        assert {r.id: r.tensors for r in reader.receipts()} == {r.id: r.tensors for r in receipts}
        for receipt, record in zip(receipts, records, strict=True):
            assert_same(reader.read(receipt), record)
        assert len(store.place.entries("tapsets")) == 3
        store.discard(receipts[0])
        assert {r.id for r in store.receipts()} == {r.id for r in receipts[1:]}

    def test_receipts_are_sorted_by_id(self, store: ZarrStore) -> None:
        assert store.receipts() == []
        record = record_of(1)
        for batch in BATCHES:
            store.commit(receipt_of(record, batch), record)
        ids = [receipt.id for receipt in store.receipts()]
        assert ids == sorted(receipt_of(record, batch).id for batch in BATCHES)

    def test_a_shards_commit_takes_two_objects(self, store: ZarrStore) -> None:
        def n_objects() -> int:
            folders = ("", "tapsets", "records", "receipts", "merges", "finished", "documents")
            return sum(len(store.place.entries(folder)) for folder in folders)

        before, record = n_objects(), record_of(1)
        store.commit(receipt_of(record, BATCHES[0]), record)
        assert n_objects() == before + 3, "with the tap set"
        store.commit(receipt_of(record, BATCHES[1]), record)
        assert n_objects() == before + 5

    def test_a_discarded_shard_is_gone_and_can_be_redone(self, store: ZarrStore) -> None:
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

    def test_discarding_an_unknown_shard_does_nothing(self, store: ZarrStore) -> None:
        store.discard(receipt_of(record_of(1), BATCHES[0]))
        assert store.receipts() == []

    def test_a_shard_that_was_redone_meanwhile_is_not_discarded(
        self, store: ZarrStore, place: str
    ) -> None:
        one, other = record_of(1), record_of(2)
        store.commit(receipt_of(one, BATCHES[0]), one)
        (stale,) = store.receipts()
        first = open_store(place)
        first.discard(first.receipts()[0])
        again = receipt_of(other, BATCHES[0])
        assert first.commit(again, other) is True
        store.discard(stale)
        store.discard(stale)
        assert store.receipts() == [again]
        assert_same(store.read(again), other)
        assert code_of(lambda: store.read(stale)) == "QD403"

    def test_a_record_other_than_the_receipt_says_is_damaged(self, store: ZarrStore) -> None:
        record = record_of(1)
        receipt = receipt_of(record, BATCHES[0])
        store.commit(receipt, record)
        lying = replace(receipt, record_digest="f" * 64)
        assert code_of(lambda: store.read(lying)) == "QD403"

    def test_a_damaged_object_is_found(self, store: ZarrStore) -> None:
        record = record_of(1)
        store.commit(receipt_of(record, BATCHES[0]), record)
        (receipt,) = store.receipts()
        data = bytearray(store.place.get(receipt.kept_in) or b"")
        data[len(data) // 2] ^= 4
        store.place.put(receipt.kept_in, bytes(data))
        assert code_of(lambda: store.read(receipt)) == "QD403"
        store.place.delete(receipt.kept_in)
        assert code_of(lambda: store.read(receipt)) == "QD403"
        store.discard(receipt)
        assert store.commit(receipt_of(record, BATCHES[0]), record) is True

    def test_nothing_is_latest_before_the_first_finish(self, store: ZarrStore) -> None:
        record = record_of(1)
        store.commit(receipt_of(record, BATCHES[0]), record)
        with pytest.raises(StoreError) as caught:
            store.latest()
        assert caught.value.code == "QD402"
        assert "1 finished shards" in caught.value.got

    def test_the_last_finished_merge_is_the_latest(self, store: ZarrStore, place: str) -> None:
        one, other = record_of(1, 4), record_of(2, 8, tensors=("y",))
        store.finish("a", one, {"n": 1, "notes": ["x"]}, TAPS, BATCHES[:2])
        store.finish("b", other, {"n": 2}, OTHER_TAPS, BATCHES[:4])
        for reader in (store, open_store(place)):
            found = reader.latest()
            assert_same(found.record, other)
            assert (found.name, found.about, found.taps) == ("b", {"n": 2}, OTHER_TAPS)
            assert found.batches == BATCHES[:4]
        store.finish("a", one, {"n": 3}, TAPS, BATCHES[:2])
        assert_same(store.latest().record, one)
        assert (store.latest().about, store.latest().taps) == ({"n": 3}, TAPS)

    def test_a_merge_may_leave_the_latest_alone(self, store: ZarrStore, place: str) -> None:
        one, other = record_of(1, 4), record_of(2, 8)
        store.finish("a", one, {}, TAPS, BATCHES[:2], make_latest=False)
        # There was none.
        assert store.latest().name == "a"
        store.finish("b", other, {}, TAPS, BATCHES[:4], make_latest=False)
        reader = open_store(place)
        assert reader.latest().name == "a"
        found = reader.find("b")
        assert found is not None
        assert_same(found.record, other)

    def test_finished_merges_are_found_by_name(self, store: ZarrStore, place: str) -> None:
        assert store.finished() == []
        assert store.find("a") is None
        one, other = record_of(1, 4), record_of(2, 8)
        store.finish("b", one, {"n": 1}, TAPS, BATCHES[:2])
        store.finish("a", other, {"n": 2}, TAPS, BATCHES[:4])
        reader = open_store(place)
        assert reader.finished() == ["a", "b"]
        found = reader.find("b")
        assert found is not None
        assert_same(found.record, one)
        assert found.about == {"n": 1}
        assert_same(store.latest().record, other)
        reader.make_latest("b")
        assert_same(store.latest().record, one)

    def test_a_merge_whose_parts_do_not_fit_is_not_kept(self, store: ZarrStore) -> None:
        record = record_of(1, 4)
        with pytest.raises(ValueError, match="other samples"):
            store.finish("a", record, {}, TAPS, BATCHES[:3])
        with pytest.raises(ValueError, match="other rows"):
            store.finish("a", record, {}, OTHER_TAPS, BATCHES[:2])
        for name in ("", "../a", "a/b", ".a", "a b", "a" * 129):
            with pytest.raises(ValueError, match="make a name"):
                store.finish(name, record, {}, TAPS, BATCHES[:2])
        assert store.finished() == []

    def test_documents_are_kept_by_name(self, store: ZarrStore, place: str) -> None:
        assert store.document("checks") is None
        store.put_document("checks", {"n": 1})
        store.put_document("checks", {"n": 2, "with": ["a", None, 0.5, "ü"]})
        assert open_store(place).document("checks") == {"n": 2, "with": ["a", None, 0.5, "ü"]}
        assert store.document("other") is None
        store.place.put("documents/checks.json", b'{"value": {"n": 3}, "sha256": ""}')
        assert store.document("checks") is None
        with pytest.raises(ValueError, match="make a name"):
            store.document("../head")

    def test_a_store_of_another_identity_is_refused_and_says_what_differs(
        self, store: ZarrStore, place: str
    ) -> None:
        statistics = replace(SPEC, n_largest=9).to_json()
        changes: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
            "the model": ({"model_digest": "2" * 64}, ("000000000000", "222222222222")),
            "the preprocessing": (
                {"preprocessing": {"scale": 0.25, "mean": [0.1]}},
                ("0.5", "0.25"),
            ),
            "the execution fingerprint": (
                {"fingerprint": {"onnxruntime": "2", "gpu": "none"}},
                ("onnxruntime stored 1, now 2", "cpu_flags stored", "gpu now none"),
            ),
            "calibration.micro_batch": ({"micro_batch": 3}, ("stored 2", "now 3")),
            "the statistics gathered": (
                {"statistics": statistics},
                ("(n_largest stored 8, now 9)",),
            ),
            "the histogram grid": ({"grid_version": 9}, ("now 9",)),
        }
        for title, (change, shown) in changes.items():
            with pytest.raises(StoreError) as caught:
                create_store(place, replace(IDENTITY, **change))
            assert caught.value.code == "QD401"
            assert all(part in caught.value.got for part in (title, *shown))
            assert not any(t in caught.value.got for t in changes if t != title)

    def test_a_place_with_other_things_in_it_is_refused(self, store: ZarrStore) -> None:
        store.place.put("records/notes.txt", b"mine")
        inside = f"{store.location}/records"
        assert code_of(lambda: create_store(inside, IDENTITY)) == "QD405"
        assert [entry.name for entry in store.place.entries("records")] == ["notes.txt"]

    def test_a_store_that_was_taken_away_is_not_begun_anew(self, store: ZarrStore) -> None:
        record = record_of(1)
        receipt = receipt_of(record, BATCHES[0])
        store.commit(receipt, record)
        store.place.delete("zarr.json")
        before = {f: store.place.entries(f) for f in ("", "records", "receipts", "merges")}
        other = receipt_of(record, BATCHES[1])
        for action in (
            lambda: store.commit(other, record),
            lambda: store.finish("a", record, {}, TAPS, BATCHES[:1]),
            lambda: store.make_latest("a"),
            lambda: store.put_document("a", {}),
            lambda: store.read(other),
            lambda: store.find("a"),
            lambda: store.document("a"),
            store.finished,
            store.latest,
        ):
            assert code_of(action) == "QD408"
        assert {f: store.place.entries(f) for f in before} == before

    def test_a_store_that_comes_back_goes_on(self, store: ZarrStore) -> None:
        root = store.place.get("zarr.json")
        assert root is not None
        store.place.delete("zarr.json")
        record = record_of(1)
        receipt = receipt_of(record, BATCHES[0])
        assert code_of(lambda: store.commit(receipt, record)) == "QD408"
        store.place.put("zarr.json", root)
        assert store.commit(receipt, record) is True

    def test_a_store_that_another_took_the_place_of_is_left_alone(
        self, store: ZarrStore, place: str
    ) -> None:
        store.place.delete("zarr.json")
        create_store(place, replace(IDENTITY, micro_batch=3))
        record = record_of(1)
        receipt = receipt_of(record, BATCHES[0])
        assert code_of(lambda: store.commit(receipt, record)) == "QD401"
        assert open_store(place).receipts() == []

    def test_of_many_creations_of_one_object_the_first_stays(self, store: ZarrStore) -> None:
        assert store.place.create("records/a", b"1") is True
        assert store.place.create("records/a", b"2") is False
        assert store.place.get("records/a") == b"1"
        store.place.delete("records/a")
        assert store.place.create("records/a", b"2") is True

    def test_sweeping_removes_what_nothing_refers_to(self, store: ZarrStore) -> None:
        record = record_of(1)
        for batch in BATCHES[:2]:
            store.commit(receipt_of(record, batch), record)
        lost = store.receipts()[0]
        store.place.delete(f"receipts/{lost.id}.json")
        store.place.put("records/0123.partial", b"half")
        for name in ("a", "b", "c", "c"):
            store.finish(name, record, {}, TAPS, BATCHES[:1])
        store.make_latest("a")
        assert sweep(store).removed == (), "all of it is new"
        swept = sweep(store, older_than_s=0, keep_merges=1)
        assert {lost.kept_in, "records/0123.partial", "finished/b.json"} <= set(swept.removed)
        assert sorted(key.split(".")[0] for key in swept.removed if key.startswith("merges/")) == [
            "merges/b",
            "merges/c",
        ]
        assert len(swept.removed) == 5
        assert swept.n_bytes > 2000
        assert store.finished() == ["a", "c"]
        assert_same(store.latest().record, record)
        assert store.find("c") is not None
        (kept,) = store.receipts()
        assert_same(store.read(kept), record)
        assert sweep(store, older_than_s=0, keep_merges=1).removed == ()

    def test_an_inner_node_is_kept_once(self, store: ZarrStore, place: str) -> None:
        assert store.nodes() == frozenset()
        assert store.node("n1", TAPS.tensors) is None
        record = record_of(1, 4)
        assert store.keep_node("n1", record) is True
        assert store.keep_node("n1", record_of(2, 4)) is False
        for reader in (store, open_store(place)):
            assert reader.nodes() == {"n1"}
            found = reader.node("n1", TAPS.tensors)
            assert found is not None
            assert_same(found, record)
        assert len(store.place.entries("inner")) == 1, "the second one's is removed"
        assert store.receipts() == []
        assert store.finished() == []
        with pytest.raises(ValueError, match="make a name"):
            store.keep_node("../n", record)

    def test_a_damaged_inner_node_is_absent_and_may_be_kept_again(self, store: ZarrStore) -> None:
        record = record_of(1, 4)
        for damage in ("flipped", "gone", "pointer", "other rows"):
            assert store.keep_node("n1", record) is True
            key = store.node_kept_in("n1") or ""
            data = bytearray(store.place.get(key) or b"")
            tensors = TAPS.tensors
            match damage:
                case "flipped":
                    data[len(data) // 2] ^= 4
                    store.place.put(key, bytes(data))
                case "gone":
                    store.place.delete(key)
                case "pointer":
                    store.place.put("nodes/n1.json", b"{")
                case _:
                    tensors = ("x", "z")
            assert store.node("n1", tensors) is None
            assert store.nodes() == frozenset()
        assert store.keep_node("n1", record) is True
        found = store.node("n1", TAPS.tensors)
        assert found is not None
        assert_same(found, record)
        # The one whose name was lost is for `sweep` to find.
        assert len(sweep(store, older_than_s=0).removed) == 3

    def test_sweeping_keeps_the_merges_that_a_document_lists(self, store: ZarrStore) -> None:
        record = record_of(1)
        for name in ("a", "b", "c"):
            store.finish(name, record, {}, TAPS, BATCHES[:1])
        store.put_document("blocks", {"merges": ["a"], "n": 1})
        sweep(store, older_than_s=0, keep_merges=0)
        assert store.finished() == ["a", "c"]
        assert store.find("a") is not None

    def test_an_exported_merge_goes_on_elsewhere(
        self, store: ZarrStore, place: str, tmp_path: Path
    ) -> None:
        record = record_of(1, 4)
        store.finish("all", record, {"manifest": {"n": 2}}, TAPS, BATCHES[:2])
        file = export_statistics(store, tmp_path / "statistics.qdist")
        elsewhere = f"{place}-imported"
        done = import_statistics(file, elsewhere, IDENTITY)
        assert (done.location, done.name, done.is_new) == (elsewhere, "all", True)
        other = open_store(elsewhere)
        found = other.latest()
        assert_same(found.record, record)
        assert (found.about, found.taps, found.batches) == (
            {"manifest": {"n": 2}},
            TAPS,
            BATCHES[:2],
        )
        (receipt,) = other.receipts()
        assert receipt.batches == BATCHES[:2]
        assert receipt.shard_id == digest_json(BATCHES[:2])
        assert_same(other.read(receipt), record)
        assert import_statistics(file, elsewhere, None).is_new is False

    def test_two_processes_that_commit_one_shard_agree_on_a_winner(self, place: str) -> None:
        """Each brings a record of its own, so that a mixture would show."""
        create_store(place, IDENTITY)
        context = multiprocessing.get_context("spawn")
        n_rounds = 8
        barrier, results = context.Barrier(2), context.SimpleQueue()
        workers = [
            context.Process(target=_race, args=(place, seed, n_rounds, barrier, results))
            for seed in (1, 2)
        ]
        for worker in workers:
            worker.start()
        outcomes: dict[int, dict[int, bool]] = dict(results.get() for _ in workers)
        for worker in workers:
            worker.join(timeout=60)
            assert worker.exitcode == 0
        store = open_store(place)
        kept = {receipt.batches: receipt for receipt in store.receipts()}
        assert len(kept) == n_rounds
        for i in range(n_rounds):
            winners = [seed for seed, outcome in outcomes.items() if outcome[i]]
            assert len(winners) == 1
            receipt = kept[((f"r{i}",),)]
            assert_same(store.read(receipt), record_of(winners[0], 1))
        assert len(store.place.entries("records")) == n_rounds, "the losers' are removed"


def _race(place: str, seed: int, n: int, barrier: Barrier, results: Any) -> None:
    store, record = open_store(place), record_of(seed, 1)
    outcome = {}
    for i in range(n):
        receipt = receipt_of(record, (f"r{i}",))
        barrier.wait(timeout=60)
        outcome[i] = store.commit(receipt, record)
    results.put((seed, outcome))
