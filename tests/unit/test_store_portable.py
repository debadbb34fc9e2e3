"""A finished calibration in one file: what comes back, and what is refused."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import zarr
import zarr.storage

from qdist.errors import StoreError
from qdist.store.coverage import cover
from qdist.store.gathering import gather
from qdist.store.portable import export_statistics, import_statistics, read_statistics
from qdist.store.zarr_store import ZarrStore, create_store, open_store
from tests.records import BATCHES, IDENTITY, TAPS, receipt_of, record_of
from tests.store_contract import assert_same, code_of


@pytest.fixture
def store(tmp_path: Path) -> ZarrStore:
    made = create_store(tmp_path / "store", IDENTITY)
    made.finish("old", record_of(1, 2), {"n": 1}, TAPS, BATCHES[:1])
    made.finish("new", record_of(2, 4), {"manifest": {"ids": ["s0"]}}, TAPS, BATCHES[:2])
    return made


@pytest.fixture
def file(store: ZarrStore, tmp_path: Path) -> Path:
    return export_statistics(store, tmp_path / "out" / "statistics.zip")


def test_the_latest_merge_is_exported_and_any_other_by_name(
    store: ZarrStore, file: Path, tmp_path: Path
) -> None:
    found = read_statistics(file)
    assert found.identity == IDENTITY
    assert (found.merge.name, found.merge.taps, found.merge.batches) == ("new", TAPS, BATCHES[:2])
    assert_same(found.merge.record, record_of(2, 4))
    old = read_statistics(export_statistics(store, tmp_path / "old.zip", "old"))
    assert_same(old.merge.record, record_of(1, 2))
    assert [path.name for path in file.parent.iterdir()] == [file.name]


def test_the_file_is_a_zarr_group(file: Path) -> None:
    group = zarr.open_group(zarr.storage.ZipStore(file, mode="r"), mode="r")
    counts = np.asarray(group["count"][...])  # type: ignore[index]
    assert np.array_equal(counts, record_of(2, 4).arrays()["count"])


def test_exporting_what_is_not_there_is_refused(store: ZarrStore, tmp_path: Path) -> None:
    with pytest.raises(StoreError, match=r"QD402.*no finished merge other.*new, old"):
        export_statistics(store, tmp_path / "a.zip", "other")
    empty = create_store(tmp_path / "empty", IDENTITY)
    assert code_of(lambda: export_statistics(empty, tmp_path / "a.zip")) == "QD402"
    assert not (tmp_path / "a.zip").exists()


def test_a_calibration_with_more_samples_goes_on_from_an_import(file: Path, tmp_path: Path) -> None:
    done = import_statistics(file, tmp_path / "elsewhere", IDENTITY)
    assert (done.n_samples, done.n_tensors, done.is_new) == (4, 2, True)
    store = open_store(done.location)
    coverage = cover(BATCHES[:3], TAPS.tensors, store.receipts())
    assert coverage.missing == ((TAPS.tensors, BATCHES[2:3]),)
    rest = record_of(3)
    store.commit(receipt_of(rest, BATCHES[2]), rest)
    coverage = cover(BATCHES[:3], TAPS.tensors, store.receipts())
    merged = gather(coverage.parts, TAPS.tensors, store.read)
    assert merged is not None
    assert_same(merged, record_of(2, 4).merge(rest))


def test_importing_into_a_store_keeps_what_it_holds(file: Path, tmp_path: Path) -> None:
    store = create_store(tmp_path / "other", IDENTITY)
    record = record_of(5)
    store.commit(receipt_of(record, BATCHES[4]), record)
    store.finish("mine", record, {}, TAPS, BATCHES[4:5])
    assert import_statistics(file, tmp_path / "other", None).is_new is True
    assert store.finished() == ["mine", "new"]
    assert store.latest().name == "new"
    assert len(store.receipts()) == 2
    before = sorted((tmp_path / "other").rglob("*"))
    assert import_statistics(file, tmp_path / "other", None).is_new is False
    assert sorted((tmp_path / "other").rglob("*")) == before


def test_an_import_that_was_cut_short_is_completed(file: Path, tmp_path: Path) -> None:
    merge = read_statistics(file).merge
    store = create_store(tmp_path / "other", IDENTITY)
    store.commit(receipt_of(merge.record, *merge.batches), merge.record)
    assert code_of(store.latest) == "QD402"
    assert import_statistics(file, tmp_path / "other", None).is_new is False
    assert_same(store.latest().record, merge.record)


def test_statistics_of_another_calibration_are_refused(file: Path, tmp_path: Path) -> None:
    other = replace(IDENTITY, micro_batch=3, model_digest="2" * 64)
    with pytest.raises(StoreError) as caught:
        import_statistics(file, tmp_path / "new", other)
    assert caught.value.code == "QD401"
    assert caught.value.where == str(file)
    assert "the model" in caught.value.got
    assert "calibration.micro_batch (stored 2, now 3)" in caught.value.got
    assert not (tmp_path / "new").exists()
    create_store(tmp_path / "new", other)
    with pytest.raises(StoreError) as caught:
        import_statistics(file, tmp_path / "new", None)
    assert caught.value.code == "QD401"
    assert open_store(tmp_path / "new").receipts() == []


def test_a_flipped_bit_never_gives_other_statistics(file: Path, tmp_path: Path) -> None:
    """Dates and the like in the archive's own headers say nothing; all else is found."""
    sound, expected = file.read_bytes(), read_statistics(file)
    codes = []
    for place in range(0, len(sound), 13):
        damaged = bytearray(sound)
        damaged[place] ^= 1 << (place % 8)
        file.write_bytes(bytes(damaged))
        try:
            found = read_statistics(file)
        except StoreError as error:
            codes.append(error.code)
        else:
            assert found.identity == expected.identity
            assert found.merge.about == expected.merge.about
            assert_same(found.merge.record, expected.merge.record)
    assert set(codes) == {"QD409"}
    assert len(codes) > len(sound) // 26


def test_what_is_no_statistics_file_is_refused(
    store: ZarrStore, file: Path, tmp_path: Path
) -> None:
    sound = file.read_bytes()
    (merge, *_) = store.place.entries("merges")
    wrong = {
        "absent": None,
        "empty": b"",
        "text": b"model: resnet",
        "cut": sound[: len(sound) // 2],
        "merge": store.place.get(f"merges/{merge.name}"),
    }
    for name, content in wrong.items():
        path = tmp_path / name
        if content is not None:
            path.write_bytes(content)
        with pytest.raises(StoreError) as caught:
            import_statistics(path, tmp_path / "new", None)
        assert (caught.value.code, caught.value.where) == ("QD409", str(path))
    assert code_of(lambda: import_statistics(tmp_path, tmp_path / "new", None)) == "QD409"
    assert not (tmp_path / "new").exists()


def rewritten(file: Path, change: Mapping[str, object], target: Path) -> Path:
    """A copy whose archive is sound, with other values in what the export said."""
    with zipfile.ZipFile(file) as old, zipfile.ZipFile(target, "w") as new:
        for name in old.namelist():
            content = old.read(name)
            if name == "documents/export.json":
                content = json.dumps({**json.loads(content), **change}).encode()
            new.writestr(name, content)
    return target


def test_a_file_of_another_version_or_with_changed_contents_is_refused(
    file: Path, tmp_path: Path
) -> None:
    same = rewritten(file, {}, tmp_path / "same.zip")
    assert_same(read_statistics(same).merge.record, read_statistics(file).merge.record)
    changed = replace(IDENTITY, micro_batch=4).to_json()
    for change, got in (
        ({"schema": 9}, "schema 9"),
        ({"format": "other"}, "format 'other'"),
        ({"identity": changed}, "changed since the export"),
    ):
        path = rewritten(file, change, tmp_path / "other.zip")
        with pytest.raises(StoreError, match="QD409") as caught:
            read_statistics(path)
        assert got in caught.value.got
