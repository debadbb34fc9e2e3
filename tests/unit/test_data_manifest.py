from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from qdist.data.arrays import ArraySource
from qdist.data.images import ImageSource
from qdist.data.manifest import SampleManifest, check_unchanged, default_probe
from qdist.data.shards import micro_batches
from qdist.errors import DataError, StoreError


def _image(path: Path, value: int, size: tuple[int, int] = (8, 8)) -> None:
    Image.new("RGB", size, (value, 0, 0)).save(path)


def _source(folder: Path, **settings: Any) -> ImageSource:
    return ImageSource(folder=folder, input_name="x", **settings)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for i in range(4):
        _image(tmp_path / f"m{i}.png", i)
    return tmp_path


def test_an_inserted_file_lands_in_a_new_generation(folder: Path) -> None:
    first = SampleManifest.first(_source(folder))
    _image(folder / "a.png", 100)
    second = first.extend(_source(folder))
    assert second.generations[0] == first.generations[0]
    assert [entry.key for entry in second.generations[1]] == ["a.png"]
    assert len(second) == 5
    assert second.digest != first.digest
    assert second.extend(_source(folder)) == second


def test_renaming_moves_the_key_and_nothing_else(folder: Path) -> None:
    first = SampleManifest.first(_source(folder))
    (folder / "m1.png").rename(folder / "z.png")
    second = first.extend(_source(folder))
    assert second.ids == first.ids
    assert second.digest == first.digest
    assert [entry.key for entry in second] == ["m0.png", "z.png", "m2.png", "m3.png"]
    assert second.absent == ()


def test_a_replaced_file_leaves_an_absent_sample_and_adds_a_new_one(folder: Path) -> None:
    first = SampleManifest.first(_source(folder))
    _image(folder / "m1.png", 77)
    second = first.extend(_source(folder))
    assert second.absent == (first.ids[1],)
    assert [entry.key for entry in second.generations[1]] == ["m1.png"]
    assert second.ids[:4] == first.ids


def test_a_sample_that_is_left_out_changes_the_digest_until_it_comes_back(folder: Path) -> None:
    first = SampleManifest.first(_source(folder))
    assert first.present == first.generations[0]
    (folder / "m2.png").rename(folder / "m2.hidden")
    less = first.extend(_source(folder))
    assert less.ids == first.ids
    assert [entry.key for entry in less.present] == ["m0.png", "m1.png", "m3.png"]
    assert less.digest != first.digest
    assert [batch.keys for batch in micro_batches(less, 2)] == [("m0.png", "m1.png"), ("m3.png",)]
    (folder / "m2.hidden").rename(folder / "z.png")
    back = less.extend(_source(folder))
    assert back.digest == first.digest
    assert [entry.key for entry in back.present] == ["m0.png", "m1.png", "z.png", "m3.png"]


def test_one_byte_changed_at_the_same_size_and_time_is_seen(folder: Path) -> None:
    path = folder / "m1.png"
    first, before = SampleManifest.first(_source(folder)), path.stat()
    content = path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert path.stat().st_size == before.st_size
    second = first.extend(_source(folder), probe="first")
    assert second.absent == (first.ids[1],)
    assert [entry.key for entry in second.generations[1]] == ["m1.png"]


def test_duplicates_are_kept_once_and_named(folder: Path) -> None:
    shutil.copy(folder / "m2.png", folder / "b.png")
    manifest = SampleManifest.first(_source(folder))
    assert [entry.key for entry in manifest] == ["b.png", "m0.png", "m1.png", "m3.png"]
    assert manifest.duplicates == ("m2.png",)
    shutil.copy(folder / "m3.png", folder / "n.png")
    assert manifest.extend(_source(folder)).duplicates == ("m2.png", "n.png")


def test_other_preprocessing_gives_other_ids_and_cannot_extend(folder: Path) -> None:
    first = SampleManifest.first(_source(folder))
    other = SampleManifest.first(_source(folder, color="BGR"))
    assert not set(first.ids) & set(other.ids)
    with pytest.raises(StoreError, match=r'QD401.*color="BGR".*color="RGB"'):
        first.extend(_source(folder, color="BGR"))


def test_shapes_are_probed_for_all_samples_unless_the_source_knows_better(folder: Path) -> None:
    _image(folder / "wide.png", 9, size=(16, 8))
    varied = _source(folder)
    assert default_probe(varied) == "all"
    shapes = [dict(entry.shapes)["x"] for entry in SampleManifest.first(varied)]
    assert shapes == [(3, 8, 8)] * 4 + [(3, 8, 16)]
    cropped = _source(folder, crop=8)
    assert default_probe(cropped) == "first"
    (folder / "m3.png").write_bytes(b"not an image: only a probe of all samples notices")
    assert len(SampleManifest.first(cropped)) == 5
    with pytest.raises(DataError, match="QD306"):
        SampleManifest.first(cropped, probe="all")


def test_progress_is_told_after_every_sample(folder: Path) -> None:
    told: list[tuple[int, int]] = []
    manifest = SampleManifest.first(
        _source(folder), on_progress=lambda done, total: told.append((done, total))
    )
    assert told == [(1, 4), (2, 4), (3, 4), (4, 4)]
    manifest.extend(_source(folder), on_progress=lambda done, total: told.append((done, total)))
    assert len(told) == 8


def test_json_round_trip_through_text(folder: Path) -> None:
    manifest = SampleManifest.first(_source(folder, resize=(4, 4)))
    _image(folder / "a.png", 100)
    (folder / "m0.png").unlink()
    shutil.copy(folder / "m1.png", folder / "z.png")
    manifest = manifest.extend(_source(folder, resize=(4, 4)))
    assert manifest.absent
    assert manifest.duplicates
    again = SampleManifest.from_json(json.loads(json.dumps(manifest.to_json())))
    assert again == manifest
    assert again.digest == manifest.digest
    assert again.extend(_source(folder, resize=(4, 4))) == again


def test_damaged_manifests_are_refused(folder: Path) -> None:
    good = SampleManifest.first(_source(folder)).to_json()
    entry = good["generations"][0][0]
    bad: list[Any] = [
        None,
        [],
        {},
        {**good, "kind": "other"},
        {**good, "schema": "1"},
        {**good, "generations": []},
        {**good, "generations": [[]]},
        {**good, "generations": [[entry, entry]]},
        {**good, "generations": [[{**entry, "id": 3}]]},
        {**good, "generations": [[{**entry, "shapes": [1]}]]},
        {name: value for name, value in good.items() if name != "duplicates"},
        {**good, "absent": ["0" * 64]},
        {**good, "absent": [entry["id"] for entry in good["generations"][0]]},
    ]
    for value in bad:
        with pytest.raises(StoreError, match="QD403"):
            SampleManifest.from_json(value)
    with pytest.raises(StoreError, match=r"QD405.*schema 2"):
        SampleManifest.from_json({**good, "schema": 2})


def test_a_sample_that_changed_since_is_noticed(folder: Path) -> None:
    manifest = SampleManifest.first(_source(folder))
    entry = manifest.generations[0][2]
    check_unchanged(_source(folder), id=entry.id, key=entry.key)
    _image(folder / entry.key, 200)
    with pytest.raises(DataError, match=f"QD306.*{entry.key}"):
        check_unchanged(_source(folder), id=entry.id, key=entry.key)


def test_rows_inserted_into_an_array_shift_keys_but_no_ids(tmp_path: Path) -> None:
    rows = np.arange(8, dtype=np.float32).reshape(4, 2)
    source = ArraySource(path=tmp_path / "a.npy", inputs={"x": ""})
    np.save(tmp_path / "a.npy", rows)
    first = SampleManifest.first(source)
    np.save(tmp_path / "a.npy", np.insert(rows, 1, 99, axis=0))
    longer = ArraySource(path=tmp_path / "a.npy", inputs={"x": ""})
    second = first.extend(longer)
    assert second.ids[:4] == first.ids
    assert [entry.key for entry in second.generations[0]] == [
        "000000",
        "000002",
        "000003",
        "000004",
    ]
    assert [entry.key for entry in second.generations[1]] == ["000001"]
    for entry in second:
        check_unchanged(longer, id=entry.id, key=entry.key)
