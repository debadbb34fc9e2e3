"""The benchmark of threshold methods, and how well re-binned counts stand for true ones."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

SCRIPTS = Path(__file__).resolve().parents[2] / "scripts"
sys.path.insert(0, str(SCRIPTS))

from bench_rows import Row, collect_rows  # noqa: E402
from bench_thresholds import (  # noqa: E402
    Timed,
    against_ort,
    agreement,
    markdown,
    time_channels,
    time_floats,
    time_methods,
    timed_methods,
)

from qdist.threshold.entropy import linear_bins  # noqa: E402
from qdist.threshold.registry import METHODS  # noqa: E402


def quiet(text: str) -> None:
    pass


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> list[Row]:
    """Rows of the demo models, which every checkout has."""
    folder = tmp_path_factory.mktemp("rows")
    said: list[str] = []
    found = collect_rows(folder / "absent", folder, 100, said.append)
    assert any("squeezenet is absent" in text for text in said)
    assert len(found) == 100
    return found


def test_rows_are_what_the_values_are(rows: list[Row]) -> None:
    for row in rows[::10]:
        assert row.density.total == row.n_values == row.linear[2048].sum() == row.signed[2048].sum()
        assert row.halved[4096].sum() == -(-row.n_values // 2)
    assert any(len(row.channels) > 1 for row in rows)


def test_every_method_is_timed() -> None:
    assert {timed.method for timed in timed_methods()} == set(METHODS)
    assert all(isinstance(timed, Timed) for timed in timed_methods())


def test_figures_and_their_table(rows: list[Row]) -> None:
    few = rows[:2]
    figures = {
        "n_rows": len(few),
        "methods": time_methods(few, quiet),
        "floats": time_floats(few, quiet),
        "channels": time_channels(rows[:30], quiet),
        "linear_agreement": agreement(few, quiet),
        **against_ort(few, 1, quiet),
    }
    assert figures["speedup_vs_ort_entropy"] > 10
    text = markdown(figures)
    assert "| auto | " in text
    assert "| mse, fp8_e4m3 | " in text
    assert "`speedup_vs_ort_entropy`: " in text


@pytest.fixture(scope="module")
def agreed(rows: list[Row]) -> dict[str, Any]:
    return agreement(rows, quiet)


@pytest.mark.parametrize("bins", [2048, 4096])
def test_re_binned_counts_stand_for_a_true_linear_histogram(
    bins: int, agreed: dict[str, Any]
) -> None:
    """Where the divergence has one clear least, its place; where it has not, its value."""
    kl, joint = agreed[f"kl, {bins} bins"], agreed[f"improved_mse, {bins} bins"]
    assert joint["within_1_percent"] >= 0.95
    assert kl["within_1_percent"] >= 0.75
    # What chance does to a true histogram is more than what re-binning does.
    assert kl["within_1_percent"] > kl["halves_within_1_percent"] + 0.1
    # Rows where the place is a matter of chance are told, and how far it may be off.
    assert kl["within_1_percent_without_note"] >= 0.9
    assert kl["within_placements"] >= 0.9
    assert kl["within_1_percent_without_note"] > kl["within_1_percent"]
    assert kl["median_excess_nats"] < 1e-9
    assert kl["most_excess_nats"] < 0.005


def test_counts_up_to_every_edge_are_true_to_one_percent_of_all(rows: list[Row]) -> None:
    for row in rows:
        for bins, true in row.linear.items():
            top = max(-row.density.minimum, row.density.maximum)
            found = linear_bins(row.density, bins, top)
            apart = np.abs(np.cumsum(found) - np.cumsum(true)).max()
            assert apart <= 0.01 * row.n_values, row.name
