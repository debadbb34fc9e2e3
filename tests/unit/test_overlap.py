"""How many evaluation samples are calibration samples."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from qdist.data.arrays import ArraySource
from qdist.demo import demo_file
from qdist.evaluate import overlap as module
from qdist.evaluate.overlap import overlap, overlap_text
from tests.onnx_models import HeldSamples, samples_of


def digits(start: int = 0, limit: int = 30, name: str = "calibration_images") -> ArraySource:
    return ArraySource(
        path=demo_file("digits.npz"), inputs={"images": name}, start=start, limit=limit
    )


def test_samples_are_counted_by_content(tmp_path: Path) -> None:
    stored = np.load(demo_file("digits.npz"))["calibration_images"][20:40]
    np.savez(tmp_path / "copy.npz", other=stored)
    copy = ArraySource(path=tmp_path / "copy.npz", inputs={"images": "other"})
    assert overlap(copy, digits()) == (10, 20)
    assert overlap_text(copy, digits()) == "10 of 20"


def test_nothing_is_said_of_sets_apart() -> None:
    assert overlap(digits(30), digits()) == (0, 30)
    assert overlap_text(digits(30), digits()) is None


def test_the_calibration_set_itself_is_not_read() -> None:
    class Unread(HeldSamples):
        def content_digest(self, key: str) -> str:
            raise AssertionError(key)

    source = Unread(samples=["same"] * 3)  # type: ignore[list-item]
    assert overlap(source, Unread(samples=source.samples)) == (3, 3)


def test_what_takes_long_is_not_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    assert overlap(digits(), samples_of("images", 1, 8, 8)) is None
    monkeypatch.setattr(module, "MOST_SAMPLES", 29)
    assert overlap(digits(), digits(15)) is None
    assert overlap_text(digits(), digits(15)) is None
