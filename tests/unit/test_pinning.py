"""How far stored bins pin down ranges on linear bins."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from qdist.plan.choice import LayerChoice
from qdist.plan.notes import pinning_notes
from qdist.plan.planner import Planner, PlanSettings
from qdist.stats.accumulator import Accumulator
from qdist.stats.histogram import Density
from qdist.stats.spec import StatisticsSpec
from qdist.threshold.clip import Levels
from qdist.threshold.divergence_kernels import fill_magnitudes
from qdist.threshold.pinning import DIVERGENCES, PAIRS, Pinning, pinning, placing_variance
from qdist.threshold.registry import METHODS, find_threshold
from tests.onnx_models import HeldSamples, frozen_from, model, normal, planner_for, value
from tests.unit.test_simulate_integers import node

SYMMETRIC = Levels(low=-127, high=127, symmetric=True)


def density_of(values: np.ndarray) -> Density:
    accumulator = Accumulator(("x",), StatisticsSpec(), {})
    accumulator.add(0, values.astype(np.float32))
    accumulator.add_samples(1)
    return accumulator.record().histogram("x").finite


@pytest.mark.parametrize("method", sorted(DIVERGENCES))
def test_other_placements_stand_around_the_bound(method: str) -> None:
    density = density_of(normal(50_000, seed=3))
    found = pinning(density, SYMMETRIC, method)
    assert found is not None
    taken = find_threshold(density, SYMMETRIC, method)
    assert found.bound == max(-taken.low, taken.high)
    assert found.least <= found.bound <= found.most
    assert found == pinning(density, SYMMETRIC, method)


ASYMMETRIC = Levels(low=-128, high=127, symmetric=False)


def test_a_pair_of_bounds_is_judged_by_the_end_that_moves_most() -> None:
    values = np.concatenate([normal(50_000, seed=3), -20.0 - np.arange(8.0)])
    density = density_of(values)
    taken = find_threshold(density, ASYMMETRIC, "improved_mse", {"bins": 2048})
    found = pinning(density, ASYMMETRIC, "improved_mse", {"bins": 2048})
    assert found is not None
    assert found == pinning(density, ASYMMETRIC, "improved_mse", {"bins": 2048})
    assert found.bound in (taken.low, taken.high)
    assert found.width == taken.high - taken.low
    assert found.least <= found.bound <= found.most
    # A single scale has one number to move, on whichever side.
    one = pinning(density, SYMMETRIC, "improved_mse", {"bins": 2048})
    assert one is not None
    assert one.least <= one.bound <= one.most


@pytest.mark.parametrize("method", ["kl", "improved_mse"])
def test_known_values_pin_a_range_down(method: str) -> None:
    density = density_of(np.repeat(np.linspace(-3, 5, 300), 40))
    found = pinning(density, SYMMETRIC, method)
    assert found is not None
    assert found.least == found.bound == found.most
    assert found.is_pinned


def test_other_methods_have_nothing_to_pin() -> None:
    density = density_of(normal(5_000, seed=3))
    for method in sorted(set(METHODS) - set(DIVERGENCES) - set(PAIRS)):
        assert pinning(density, SYMMETRIC, method) is None
    wide = Levels(low=-32767, high=32767, symmetric=True)
    assert pinning(density, wide, "kl") is None  # it is the maximum
    empty = Density(lower=np.zeros(0), upper=np.zeros(0), counts=np.zeros(0))
    assert pinning(empty, SYMMETRIC, "kl") is None
    zeros = Density(lower=np.zeros(1), upper=np.zeros(1), counts=np.ones(1))
    assert pinning(zeros, SYMMETRIC, "kl") is None


def test_the_variance_is_that_of_values_placed_by_chance() -> None:
    lower, upper = np.array([0.3, 1.0, 2.0]), np.array([1.0, 2.0, 2.0])
    counts = np.array([400.0, 900.0, 70.0])
    random = np.random.default_rng(5)
    draws = []
    for _ in range(2000):
        x = np.concatenate(
            [random.uniform(a, b, int(n)) for a, b, n in zip(lower, upper, counts, strict=True)]
        )
        draws.append(np.histogram(x, 8, (0.0, 2.0))[0])
    expected = fill_magnitudes(lower, upper, counts, 2.0, 8)
    variance = placing_variance(lower, upper, counts, 2.0, 8)
    assert np.allclose(np.mean(draws, axis=0), expected, atol=2.0)
    assert np.allclose(np.var(draws, axis=0), variance, rtol=0.15)
    mirrored = placing_variance(-upper[::-1], -lower[::-1], counts[::-1], 2.0, 8)
    assert np.allclose(mirrored, variance)


def planner_of(folder: Path) -> Planner:
    proto = model(
        [node("MatMul", ["x", "w"], ["y"], "layer")],
        [value("x", ["n", 64])],
        [value("y", ["n", 5])],
        {"w": normal(64, 5)},
    )
    frozen = frozen_from(proto, folder / "model.onnx")
    samples = [{"x": normal(64, seed=i)} for i in range(60)]
    return planner_for(frozen, HeldSamples(samples=samples), folder / "store", PlanSettings())


def test_a_plan_says_which_ranges_are_not_pinned_down(tmp_path: Path) -> None:
    planner = planner_of(tmp_path)
    choice = LayerChoice(saturation="kl")
    notes = planner.plan({"layer": choice}).notes
    row = planner.densities(planner.plan({"layer": choice}))["x"]
    levels = Levels(low=-128, high=127, symmetric=False)
    found = pinning(row, levels, "kl")
    assert found is not None
    assert any(text.startswith("kl: its divergence is so flat") for text in notes) == (
        not found.is_pinned
    )
    assert not found.is_pinned
    # Another method of the same planner has no such note.
    other = planner.plan({"layer": replace(choice, saturation="mse")}).notes
    assert not any("so flat" in text for text in other)


def test_a_note_names_what_is_flat_and_the_bounds(tmp_path: Path) -> None:
    planner = planner_of(tmp_path)
    plan = planner.plan({"layer": LayerChoice(saturation="improved_mse")})
    loose = Pinning(bound=-1.0, least=-1.5, most=-1.0, width=4.0)
    (note,) = pinning_notes(plan.layers, planner.taps, {("x", "improved_mse"): loose})
    assert note.startswith("improved_mse: its squared error is so flat for 1 of 1 tensors")
    assert note.endswith("x -1 (-1.5..-1)")
    # A hundredth of the width is within what counts as the same.
    pinned = replace(loose, least=-1.03)
    assert pinning_notes(plan.layers, planner.taps, {("x", "improved_mse"): pinned}) == ()
