"""The store in a local folder: the contract, damage of any kind, and places that are not stores."""

from __future__ import annotations

import errno
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr
import zarr.storage
from numpy.typing import NDArray
from zarr.codecs import BloscCodec, Crc32cCodec

from qdist.errors import ConfigError, StoreError
from qdist.stats.record import CalibrationRecord
from qdist.store import chunks, container
from qdist.store.container import CHUNK_ITEMS, UNREADABLE, Container
from qdist.store.layout import sealed, unsealed
from qdist.store.local import LocalPlace
from qdist.store.location import full_location, is_url
from qdist.store.receipt import ShardReceipt
from qdist.store.records import pack_record
from qdist.store.sweep import sweep
from qdist.store.zarr_store import ZarrStore, create_store, open_store
from tests.records import BATCHES, IDENTITY, TAPS, receipt_of, record_of
from tests.store_contract import StoreContract, assert_same, code_of


class TestLocalStore(StoreContract):
    """The contract, in a folder."""

    @pytest.fixture
    def place(self, tmp_path: Path) -> str:
        return str(tmp_path / "store")


# --- damage -----------------------------------------------------------------------------------

Filled = tuple[ZarrStore, list[ShardReceipt]]


@pytest.fixture
def filled(tmp_path: Path) -> Filled:
    """A store with three committed shards, as it tells of them, and their merge."""
    store = create_store(tmp_path / "store", IDENTITY)
    for i, batch in enumerate(BATCHES[:3]):
        record = record_of(i)
        store.commit(receipt_of(record, batch), record)
    store.finish("all", record_of(9, 6), {"n": 1}, TAPS, BATCHES[:3])
    order = {batch: i for i, batch in enumerate(BATCHES)}
    return store, sorted(store.receipts(), key=lambda r: order[r.batches[0]])


def folder_of(store: ZarrStore) -> Path:
    return Path(store.location)


def record_file(store: ZarrStore, receipt: ShardReceipt) -> Path:
    return folder_of(store) / receipt.kept_in


def receipt_file(store: ZarrStore, receipt: ShardReceipt) -> Path:
    return folder_of(store) / "receipts" / f"{receipt.id}.json"


def files_of(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def flips(path: Path, step: int) -> Iterator[int]:
    """Flip one bit of every ``step``-th byte in turn, with the file mended again afterwards."""
    sound = path.read_bytes()
    for place in range(0, len(sound), step):
        damaged = bytearray(sound)
        damaged[place] ^= 1 << (place % 8)
        path.write_bytes(bytes(damaged))
        yield place
    path.write_bytes(sound)


def test_a_flipped_bit_anywhere_in_a_record_is_found(filled: Filled) -> None:
    store, receipts = filled
    for _ in flips(record_file(store, receipts[0]), 61):
        assert code_of(lambda: store.read(receipts[0])) == "QD403"
    assert_same(store.read(receipts[0]), record_of(0))


@pytest.mark.parametrize("kind", ["truncated", "empty", "deleted", "of another shard"])
def test_a_record_that_is_not_what_was_written_is_found(filled: Filled, kind: str) -> None:
    store, receipts = filled
    file = record_file(store, receipts[0])
    match kind:
        case "truncated":
            file.write_bytes(file.read_bytes()[:-5])
        case "empty":
            file.write_bytes(b"")
        case "deleted":
            file.unlink()
        case _:
            shutil.copy(record_file(store, receipts[1]), file)
    with pytest.raises(StoreError) as caught:
        store.read(receipts[0])
    assert caught.value.code == "QD403"
    assert receipts[0].id in caught.value.where
    for sound in receipts[1:]:
        store.read(sound)


def test_deleted_records_are_found(filled: Filled) -> None:
    store, receipts = filled
    shutil.rmtree(folder_of(store) / "records")
    for receipt in receipts:
        assert code_of(partial(store.read, receipt)) == "QD403"


def test_a_record_without_a_receipt_does_not_count(filled: Filled) -> None:
    """What a worker leaves that died between the record and its receipt."""
    store, receipts = filled
    receipt_file(store, receipts[0]).unlink()
    assert {r.id for r in store.receipts()} == {r.id for r in receipts[1:]}
    assert store.commit(receipts[0], record_of(0)) is True
    (again,) = (r for r in store.receipts() if r.id == receipts[0].id)
    assert_same(store.read(again), record_of(0))


@pytest.mark.parametrize(
    "content", [b"", b"{", b"[]", b"null", b"{}", b'{"value": {}, "sha256": ""}', b"\xff\xfe"]
)
def test_a_damaged_receipt_counts_as_absent_and_is_replaced(filled: Filled, content: bytes) -> None:
    store, receipts = filled
    receipt_file(store, receipts[0]).write_bytes(content)
    assert {r.id for r in store.receipts()} == {r.id for r in receipts[1:]}
    wanted = receipt_of(record_of(0), BATCHES[0])
    assert code_of(lambda: store.read(wanted)) == "QD403"
    assert store.commit(wanted, record_of(0)) is True
    assert len(store.receipts()) == 3
    assert_same(store.read(wanted), record_of(0))


def test_a_flipped_bit_anywhere_in_a_receipt_makes_it_absent(filled: Filled) -> None:
    store, receipts = filled
    n_absent = 0
    for _ in flips(receipt_file(store, receipts[0]), 7):
        found = {r.id: r for r in store.receipts()}
        # White space between the parts of a document says nothing.
        if receipts[0].id in found:
            assert found[receipts[0].id] == receipts[0]
        else:
            n_absent += 1
    assert n_absent > 50


def test_a_damaged_tap_set_hides_its_receipts_until_it_is_written_again(filled: Filled) -> None:
    store, receipts = filled
    (file,) = files_of(folder_of(store) / "tapsets")
    for damage in (lambda: file.write_bytes(b"{"), file.unlink):
        damage()
        assert open_store(store.location).receipts() == []
        reader, record = open_store(store.location), record_of(5)
        reader.commit(receipt_of(record, BATCHES[4]), record)
        assert len(open_store(store.location).receipts()) == 4
    assert_same(open_store(store.location).read(receipts[0]), record_of(0))


def test_a_shard_is_not_redone_because_its_tap_set_is_damaged(filled: Filled) -> None:
    store, receipts = filled
    (file,) = files_of(folder_of(store) / "tapsets")
    whole = file.read_bytes()
    for damage in (lambda: file.write_bytes(b"{"), file.unlink):
        damage()
        assert open_store(store.location).commit(receipts[0], record_of(0)) is False
        assert file.read_bytes() == whole
        kept = {receipt.kept_in for receipt in open_store(store.location).receipts()}
        assert kept == {receipt.kept_in for receipt in receipts}


@pytest.mark.parametrize("kept_in", ["", "records", "..", "records/..", "zarr.json", "OTHER"])
def test_a_receipt_that_names_no_write_of_its_shard_deletes_nothing(
    filled: Filled, kept_in: str
) -> None:
    store, receipts = filled
    path = receipt_file(store, receipts[0])
    told = unsealed(path.read_bytes())
    told["record"] = receipts[1].kept_in if kept_in == "OTHER" else kept_in
    path.write_bytes(sealed(told))
    before = files_of(folder_of(store) / "records")
    wanted = receipt_of(record_of(0), BATCHES[0])
    assert code_of(lambda: store.read(wanted)) == "QD403"
    store.discard(wanted)
    assert files_of(folder_of(store) / "records") == before
    assert (folder_of(store) / "zarr.json").exists()
    assert {r.id for r in store.receipts()} == {r.id for r in receipts[1:]}


def test_a_damaged_merge_is_found_and_written_anew(filled: Filled) -> None:
    store, _ = filled
    folder, sound = folder_of(store), record_of(9, 6)
    for damage in (
        lambda: [path.write_bytes(b"x") for path in files_of(folder / "merges")],
        lambda: (folder / "finished" / "all.json").write_bytes(b"{"),
        lambda: (folder / "head.json").write_bytes(b"{"),
        lambda: (folder / "head.json").write_bytes(b'{"finished": "other"}'),
        lambda: shutil.rmtree(folder / "merges"),
    ):
        damage()
        assert code_of(store.latest) == "QD403"
        store.finish("all", sound, {"n": 2}, TAPS, BATCHES[:3])
        assert_same(store.latest().record, sound)


def test_a_flipped_bit_anywhere_in_a_merge_is_found(filled: Filled) -> None:
    store, _ = filled
    (file,) = files_of(folder_of(store) / "merges")
    for _ in flips(file, 97):
        assert code_of(store.latest) == "QD403"
        assert store.find("all") is None
    assert_same(store.latest().record, record_of(9, 6))


def test_finishing_again_leaves_what_others_may_be_reading(filled: Filled) -> None:
    store, _ = filled
    before = {path: path.read_bytes() for path in files_of(folder_of(store) / "merges")}
    store.finish("all", record_of(8, 6), {"n": 2}, TAPS, BATCHES[:3])
    assert_same(store.latest().record, record_of(8, 6))
    assert {path: path.read_bytes() for path in before} == before


# --- containers -------------------------------------------------------------------------------


def test_zarr_itself_reads_a_record(filled: Filled) -> None:
    store, receipts = filled
    held = zarr.storage.ZipStore(record_file(store, receipts[0]), mode="r")
    group = zarr.open_group(held, mode="r")
    expected = record_of(0).arrays()
    assert sorted(group.array_keys()) == sorted(expected)
    for name, array in expected.items():
        assert np.array_equal(np.asarray(group[name][...]), array)  # type: ignore[index]
    assert group.attrs["qdist"]["n_samples"] == 2  # type: ignore[index, call-overload]


def test_arrays_of_any_size_come_back_and_equal_contents_make_equal_bytes() -> None:
    arrays: dict[str, NDArray[Any]] = {
        "none": np.zeros((0, 6), np.int64),
        "one": np.array([2**64 - 2], np.uint64),
        "chunks": np.arange(CHUNK_ITEMS + 5, dtype=np.uint8),
        "rows": np.arange(2 * 7, dtype=np.float32).reshape(7, 2),
    }
    packed = Container(arrays=arrays, attributes={"n": 1}, documents={"said": ["ü", None]})
    data = packed.pack()
    assert packed.pack() == data
    again = Container.unpack(data)
    assert (again.attributes, again.documents) == ({"n": 1}, {"said": ["ü", None]})
    assert again.arrays.keys() == arrays.keys()
    for name, array in arrays.items():
        assert again.arrays[name].dtype == array.dtype
        assert np.array_equal(again.arrays[name], array)


def members_of(data: bytes) -> dict[str, bytes]:
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        return {key: archive.read(key) for key in archive.namelist()}


@pytest.mark.parametrize("n_items", [1, 4, 10, CHUNK_ITEMS])
def test_chunks_are_decoded_as_zarr_decodes_them(
    n_items: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(container, "CHUNK_ITEMS", n_items)
    arrays = record_of(5).arrays() | {
        "none": np.zeros((0, 6), np.int64),
        "rows": np.arange(2 * 7, dtype=np.float32).reshape(7, 2),
        "deep": np.arange(2 * 3 * 5, dtype=np.uint64).reshape(5, 3, 2),
    }
    members = members_of(Container(arrays=arrays, attributes={}).pack())
    for name, array in arrays.items():
        found = chunks.decoded(name, members)
        assert found is not None
        assert found.dtype == array.dtype
        assert np.array_equal(found, array)
        assert np.array_equal(found, container._by_zarr(name, members))
        keys = [key for key in members if key.startswith(f"{name}/c/")]
        assert bool(keys) == bool(array.size)
        for key in keys[:2]:
            for damaged in (members[key][:-1], members[key][:3], b"\0" + members[key][1:]):
                with pytest.raises(ValueError, match="another checksum"):
                    chunks.decoded(name, {**members, key: damaged})
            # Zarr knows what a missing chunk stands for.
            assert chunks.decoded(name, {k: m for k, m in members.items() if k != key}) is None


def by_zarr(arrays: dict[str, NDArray[Any]], n_items: int) -> dict[str, bytes]:
    """The members of a group that Zarr itself writes with the settings of `Container.pack`."""
    members: dict[str, Any] = {}
    group = zarr.create_group(zarr.storage.MemoryStore(members), attributes={"n": {"of": [1, "ü"]}})
    for name, values in arrays.items():
        row = max(1, int(np.prod(values.shape[1:])))
        n_rows = max(1, min(values.shape[0], n_items // row))
        group.create_array(
            name,
            shape=values.shape,
            dtype=values.dtype,
            chunks=(n_rows, *(max(1, n) for n in values.shape[1:])),
            compressors=(
                BloscCodec(
                    cname="zstd",
                    clevel=1,
                    shuffle="shuffle",
                    blocksize=chunks.BLOCK_BYTES,
                    typesize=values.dtype.itemsize,
                ),
                Crc32cCodec(),
            ),
            fill_value=np.nan if values.dtype.kind == "f" else np.array(-1).astype(values.dtype),
            config={"write_empty_chunks": True},
        )[...] = values
    return {key: buffer.to_bytes() for key, buffer in members.items()}


@pytest.mark.parametrize("n_items", [1, 4, 10, CHUNK_ITEMS])
def test_members_are_what_zarr_would_write(n_items: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(container, "CHUNK_ITEMS", n_items)
    arrays = record_of(5).arrays() | {
        "none": np.zeros((0, 6), np.int64),
        "empty": np.zeros((3, 0, 2), np.float32),
        "rows": np.arange(2 * 7, dtype=np.float32).reshape(7, 2),
        "turned": np.arange(2 * 7, dtype=np.float64).reshape(7, 2).T,
        "big-endian": np.arange(7, dtype=">i4"),
        "deep": np.arange(2 * 3 * 5, dtype=np.uint64).reshape(5, 3, 2),
        "bytes": np.arange(11, dtype=np.uint8),
    }
    ours = Container(arrays=arrays, attributes={"n": {"of": [1, "ü"]}})
    theirs = by_zarr(arrays, n_items)
    found = members_of(ours.pack())
    assert found.keys() == theirs.keys()
    for key, content in theirs.items():
        assert found[key] == content, key


def test_a_chunk_of_another_size_is_refused() -> None:
    one, other = (
        members_of(Container(arrays={"a": np.arange(n)}, attributes={}).pack()) for n in (5, 6)
    )
    with pytest.raises(ValueError, match="another size"):
        chunks.decoded("a", {**one, "a/c/0": other["a/c/0"]})


def test_what_zarr_wrote_in_another_way_is_read_by_zarr() -> None:
    members: dict[str, Any] = {}
    group = zarr.create_group(zarr.storage.MemoryStore(members), attributes={"n": 1})
    array = np.arange(24, dtype=np.int64).reshape(6, 4)
    group.create_array("a", data=array, chunks=(4, 3))
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w") as archive:
        for key, content in members.items():
            archive.writestr(key, content.to_bytes())
    found = Container.unpack(packed.getvalue())
    assert found.attributes == {"n": 1}
    assert np.array_equal(found.arrays["a"], array)
    held = members_of(packed.getvalue())
    assert chunks.decoded("a", held) is None


def test_damaged_containers_raise_what_they_are_said_to_raise() -> None:
    """Without the checksum of the whole: codecs and metadata meet the damage themselves."""
    record = record_of(3)
    data = Container(arrays=record.arrays(), attributes={}).pack()
    n_found = 0
    for place in range(0, len(data), 11):
        damaged = bytearray(data)
        damaged[place] ^= 1 << (place % 8)
        try:
            arrays = Container.unpack(bytes(damaged)).arrays
            found = CalibrationRecord.from_arrays(record.tensors, record.n_samples, arrays)
        except UNREADABLE:
            n_found += 1
        else:
            assert found.digest == record.digest
    assert n_found > 100


# --- places -----------------------------------------------------------------------------------


def test_locations_mean_the_same_in_any_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert full_location("runs/s.zarr") == str(tmp_path / "runs" / "s.zarr")
    assert full_location(Path("s")) == str(tmp_path / "s")
    assert full_location("file:///runs/s") == "/runs/s"
    assert full_location("S3://bucket/a/b/") == "s3://bucket/a/b"
    assert full_location("gs://bucket") == "gs://bucket"
    assert is_url("az://box/a")
    assert not is_url("runs/s.zarr")
    for wrong in ("http://host/s", "s3://", "s3:///a", "file://host/s", "ftp://a/b"):
        with pytest.raises(ConfigError, match=r"QD104.*s3://BUCKET/PREFIX"):
            full_location(wrong)


def test_an_incomplete_environment_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(os.environ):
        if name.startswith("AZURE_"):
            monkeypatch.delenv(name)
    with pytest.raises(StoreError, match=r"QD404.*Account must be specified"):
        open_store("az://box/s")


def test_a_folder_with_other_files_is_refused(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    assert code_of(lambda: create_store(tmp_path, IDENTITY)) == "QD405"
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_a_file_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("mine")
    assert code_of(lambda: create_store(file, IDENTITY)) == "QD405"
    assert file.read_text() == "mine"


def test_an_empty_folder_is_taken(tmp_path: Path) -> None:
    assert create_store(tmp_path, IDENTITY).receipts() == []


def test_what_a_killed_process_left_of_a_new_store_is_no_foreign_file(tmp_path: Path) -> None:
    (tmp_path / "0123456789abcdef.partial").write_bytes(b"{")
    assert create_store(tmp_path, IDENTITY).receipts() == []


@pytest.mark.parametrize(
    "own",
    [
        None,
        {"schema": 99, "kind": "calibration"},
        {"schema": 1, "kind": "calibration", "identity": {}, "taps": {}},
        {"schema": 2, "kind": "calibration"},
        {"schema": 2, "kind": "calibration", "identity": {"later": 1}},
        {"schema": 2, "kind": "other", "identity": IDENTITY.to_json()},
    ],
)
def test_a_group_that_this_version_does_not_read_is_refused(tmp_path: Path, own: Any) -> None:
    document = {"zarr_format": 3, "node_type": "group", "attributes": {"qdist": own}}
    _refused(tmp_path, json.dumps(document).encode())


@pytest.mark.parametrize("content", [b"", b"[]", b"{}", b"\xff", b'{"attributes": {}}'])
def test_a_root_that_is_no_group_is_refused(tmp_path: Path, content: bytes) -> None:
    _refused(tmp_path, content)


def _refused(folder: Path, content: bytes) -> None:
    (folder / "zarr.json").write_bytes(content)
    assert code_of(lambda: open_store(folder)) == "QD405"
    assert code_of(lambda: create_store(folder, IDENTITY)) == "QD405"
    assert (folder / "zarr.json").read_bytes() == content


def test_a_place_below_a_file_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    place = tmp_path / "file" / "store"
    with pytest.raises(StoreError) as caught:
        create_store(place, IDENTITY)
    assert caught.value.code == "QD404"
    assert caught.value.where == str(place)


@pytest.mark.parametrize("in_its_place", ["nothing", "an empty folder", "a file"])
def test_a_folder_that_was_taken_away_is_not_begun_anew(tmp_path: Path, in_its_place: str) -> None:
    store = create_store(tmp_path / "store", IDENTITY)
    record = record_of(1)
    receipt = receipt_of(record, BATCHES[0])
    store.commit(receipt, record)
    aside = folder_of(store).rename(tmp_path / "aside")
    if in_its_place == "an empty folder":
        folder_of(store).mkdir()
    elif in_its_place == "a file":
        folder_of(store).write_text("")
    other = receipt_of(record, BATCHES[1])
    for action in (
        lambda: store.commit(other, record),
        lambda: store.read(receipt),
        store.receipts,
        store.latest,
    ):
        assert code_of(action) == "QD408"
    left = [path.name for path in tmp_path.rglob("*") if aside not in path.parents]
    assert sorted(left) == ["aside"] if in_its_place == "nothing" else ["aside", "store"]
    if in_its_place == "a file":
        folder_of(store).unlink()
    elif in_its_place == "an empty folder":
        folder_of(store).rmdir()
    aside.rename(folder_of(store))
    assert_same(store.read(receipt), record)
    assert store.commit(other, record) is True


_OUT_OF_SPACE = """
import resource, signal, sys
from qdist.errors import StoreError
from qdist.store.sweep import sweep
from qdist.store.zarr_store import open_store
from tests.records import BATCHES, receipt_of, record_of
store, record = open_store(sys.argv[1]), record_of(7)
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
for n_bytes in (0, 100, 700, 1000, 3000):
    resource.setrlimit(resource.RLIMIT_FSIZE, (n_bytes, resource.RLIM_INFINITY))
    for action in (
        lambda: store.commit(receipt_of(record, BATCHES[5]), record),
        lambda: store.put_document("big", {"a": "b" * 5000}),
    ):
        try:
            action()
        except StoreError as error:
            print(error.code)
        else:
            print("written")
"""


def test_where_space_runs_out_nothing_is_half_written(filled: Filled) -> None:
    """A limit on the size of files stops every write at another place, as a full disk does."""
    store, receipts = filled
    before = {path: path.read_bytes() for path in files_of(folder_of(store))}
    done = subprocess.run(
        [sys.executable, "-c", _OUT_OF_SPACE, store.location],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[2],
        check=True,
    )
    assert done.stdout.split() == ["QD404"] * 10, done.stderr
    assert {path: path.read_bytes() for path in files_of(folder_of(store))} == before
    assert {r.id for r in store.receipts()} == {r.id for r in receipts}


@pytest.mark.parametrize(
    ("number", "code"),
    [
        (errno.ENOSPC, "QD404"),
        (errno.EROFS, "QD404"),
        (errno.EACCES, "QD404"),
        (errno.ESTALE, "QD408"),
        (errno.ENOTCONN, "QD408"),
        (errno.ETIMEDOUT, "QD408"),
    ],
)
def test_what_the_file_system_answers_decides_whether_to_wait(
    filled: Filled, monkeypatch: pytest.MonkeyPatch, number: int, code: str
) -> None:
    """The receipt cannot be linked; its record goes where it is sure that no receipt came."""
    store, _ = filled
    before = files_of(folder_of(store))
    record = record_of(7)
    receipt = receipt_of(record, BATCHES[5])

    def refused(source: Any, target: Any) -> None:
        raise OSError(number, os.strerror(number), str(target))

    with monkeypatch.context() as patched:
        patched.setattr("qdist.store.local.os.link", refused)
        assert code_of(lambda: store.commit(receipt, record)) == code
    if code == "QD404":
        assert files_of(folder_of(store)) == before
    assert not [path for path in files_of(folder_of(store)) if path.suffix == ".partial"]
    assert store.commit(receipt, record) is True
    assert_same(store.read(receipt), record)


_KILLED = """
import os, signal, sys
import qdist.store.local as local
from qdist.store.sweep import sweep
from qdist.store.zarr_store import open_store
from tests.records import BATCHES, receipt_of, record_of
store, record = open_store(sys.argv[1]), record_of(7)
name, left = sys.argv[2], [int(sys.argv[3])]
real = getattr(os, name)
def killing(*arguments):
    left[0] -= 1
    if left[0] < 0:
        os.kill(os.getpid(), signal.SIGKILL)
    real(*arguments)
setattr(local.os, name, killing)
store.commit(receipt_of(record, BATCHES[5]), record)
"""


def killed_in(call: str, n_before: int, store: ZarrStore) -> None:
    """Commit a record in a process that is killed in one of its system calls."""
    done = subprocess.run(
        [sys.executable, "-c", _KILLED, store.location, call, str(n_before)],
        cwd=Path(__file__).parents[2],
        check=False,
    )
    assert done.returncode == -signal.SIGKILL


@pytest.mark.parametrize(
    ("call", "n_before"), [("fsync", 0), ("fsync", 1), ("replace", 0), ("link", 0)]
)
def test_a_process_that_is_killed_while_it_writes_leaves_nothing_that_counts(
    filled: Filled, call: str, n_before: int
) -> None:
    store, receipts = filled
    killed_in(call, n_before, store)
    assert {r.id for r in store.receipts()} == {r.id for r in receipts}
    record = record_of(7)
    assert store.commit(receipt_of(record, BATCHES[5]), record) is True
    swept = sweep(store, older_than_s=0)
    # The record and the receipt, each under its own name or that of an unfinished file.
    assert len(swept.removed) == 2
    assert len(store.receipts()) == 4
    for receipt in store.receipts():
        store.read(receipt)


def test_what_is_linked_counts_though_its_folder_was_not_synced(filled: Filled) -> None:
    store, receipts = filled
    killed_in("fsync", 2, store)
    assert len(store.receipts()) == len(receipts) + 1
    for receipt in store.receipts():
        store.read(receipt)
    assert store.commit(receipt_of(record_of(7), BATCHES[5]), record_of(7)) is False


def test_many_writers_of_one_local_object_have_one_winner(tmp_path: Path) -> None:
    """Threads, for they come closer together than processes do."""
    place = LocalPlace(tmp_path)
    with ThreadPoolExecutor(8) as pool:
        for i in range(20):
            create: Callable[[bytes], bool] = partial(place.create, f"receipts/{i}")
            contents = [bytes([n]) * 1000 for n in range(8)]
            won = list(pool.map(create, contents))
            assert won.count(True) == 1
            assert place.get(f"receipts/{i}") == contents[won.index(True)]
    assert len(place.entries("receipts")) == 20


def test_a_folder_that_goes_while_it_is_made_is_gone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, away = tmp_path / "store", tmp_path / "away"
    place = LocalPlace(folder)
    place.make()
    place.put("records/one", b"1")
    make = os.mkdir

    def and_take_away(path: Any, mode: int = 0o777) -> None:
        try:
            make(path, mode)
        finally:
            if folder.exists():
                folder.rename(away)

    with monkeypatch.context() as patch:
        patch.setattr(os, "mkdir", and_take_away)
        with pytest.raises(StoreError, match="the folder is gone") as caught:
            place.put("records/two", b"2")
    assert caught.value.code == "QD408"
    away.rename(folder)
    place.put("records/two", b"2")
    assert place.get("records/two") == b"2"
    (folder / "file").write_bytes(b"")
    with pytest.raises(StoreError, match="File exists") as caught:
        place.put("file/three", b"3")
    assert caught.value.code == "QD404"


def test_a_record_that_was_read_is_packed_into_the_bytes_of_one_that_was_made(
    tmp_path: Path,
) -> None:
    store, record = create_store(str(tmp_path / "store"), IDENTITY), record_of(1)
    receipt = receipt_of(record, BATCHES[0])
    store.commit(receipt, record)
    read = store.read(receipt)
    assert read.encoded
    assert not record.encoded
    assert pack_record(read) == pack_record(record)
    # Of some of its rows nothing is known.
    part = read.select(read.tensors[:1])
    assert not part.encoded
    assert pack_record(part) == pack_record(record.select(record.tensors[:1]))
