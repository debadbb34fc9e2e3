"""Sums of twins inside the graph, beside whole tensors in NumPy; and what keeps them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from onnx import helper, numpy_helper

from qdist.demo import demo_file
from qdist.evaluate import sensitivity as module
from qdist.evaluate.compare import Deviation, Sums, compare_layers
from qdist.evaluate.sensitivity import sensitivities, sensitivity, sensitivity_identity
from qdist.model.freeze import FrozenModel, freeze
from qdist.model.loading import load_model
from qdist.plan.planner import Planner
from qdist.plan.target import ProjectedPlan
from qdist.simulate.twin_sums import twin_key, twin_sums
from qdist.store.location import open_place
from qdist.store.sensitivities import SensitivityStore
from tests.onnx_models import (
    EXECUTION,
    HeldSamples,
    floats,
    frozen_from,
    model,
    normal,
    planner_for,
    projected,
    samples_of,
    value,
)

PRECISIONS = ("int8", "w4a8", "w8a16")


@pytest.fixture(scope="module")
def vit(tmp_path_factory: pytest.TempPathFactory) -> tuple[FrozenModel, Planner, HeldSamples]:
    frozen = freeze(load_model(demo_file("digits_vit.onnx")))
    source = samples_of("images", 1, 8, 8, n=6)
    return frozen, planner_for(frozen, source, tmp_path_factory.mktemp("vit") / "store"), source


def assert_close(found: Deviation, expected: Deviation, rel: float = 2e-3) -> None:
    """To within what the last bit of a float activation can do to a rounding."""
    assert found.cosine == pytest.approx(expected.cosine, abs=2e-6)
    assert found.relative_l2 == pytest.approx(expected.relative_l2, rel=rel)
    assert found.mse == pytest.approx(expected.mse, rel=2 * rel)
    assert found.mae == pytest.approx(expected.mae, rel=rel)


def test_several_plans_at_once_are_as_each_layer_by_itself(
    vit: tuple[FrozenModel, Planner, HeldSamples],
) -> None:
    frozen, planner, source = vit
    plans = [projected(planner, name) for name in PRECISIONS]
    found = sensitivities(frozen, plans, source, EXECUTION, batch=4)
    for plan, deviations in zip(plans, found, strict=True):
        rows = {row.name: row.alone for row in compare_layers(frozen, plan, source, EXECUTION)}
        assert deviations.keys() == rows.keys()
        for name, expected in rows.items():
            assert_close(deviations[name], expected)
    # Layers without weights are the same twin at 8-bit activations, whatever weights have.
    keys = [{twin_key(x) for x in plan.plan.layers if x.is_quantized} for plan in plans]
    assert len(keys[0] & keys[1]) > 5
    assert len(twin_sums(frozen, plans).keys) == len(set.union(*keys))


def test_parts_of_a_small_budget_give_the_same(
    vit: tuple[FrozenModel, Planner, HeldSamples], monkeypatch: pytest.MonkeyPatch
) -> None:
    frozen, planner, source = vit
    plans = [projected(planner, name) for name in PRECISIONS]
    whole = sensitivities(frozen, plans, source, EXECUTION)
    sizes: list[int] = []
    original = twin_sums

    def counted(*args: object, **options: object) -> object:
        made = original(*args, **options)  # type: ignore[arg-type]
        sizes.append(len(made.keys))
        return made

    monkeypatch.setattr(module, "twin_sums", counted)
    parts = sensitivities(frozen, plans, source, EXECUTION, budget_bytes=20_000)
    assert len(sizes) > 3
    for one, other in zip(whole, parts, strict=True):
        for name, deviation in one.items():
            # Operators that are fused in one part may not be in another.
            assert_close(other[name], deviation, rel=2e-2)


def test_values_that_are_infinite_or_too_large_to_square(tmp_path: Path) -> None:
    """What is infinite in the float model does not count; what overflows float32 is summed in
    float64; what is infinite in the quantized model alone makes the deviation infinite."""
    proto = model(
        [
            helper.make_node("Log", ["x"], ["logs"], "log"),
            helper.make_node("MatMul", ["x", "w"], ["wide"], "large"),
            helper.make_node("Relu", ["logs"], ["end"], "relu"),
        ],
        [value("x", ["n", 4])],
        [value("end", ["n", 4]), value("wide", ["n", 3])],
        {"w": normal(4, 3) * np.float32(5e18)},
    )
    frozen = frozen_from(proto, tmp_path / "model.onnx")
    samples = [{"x": floats([0, 1, 2, 3.3])}, {"x": floats([0.5, 0, 7, 1])}]
    source = HeldSamples(samples=samples)
    planner = planner_for(frozen, source, tmp_path / "store")
    plan = projected(planner)
    (layer,) = (x for x in plan.plan.layers if x.name == "large")
    assert layer.is_quantized
    found = sensitivity(frozen, plan, source, EXECUTION, batch=1)
    rows = {row.name: row.alone for row in compare_layers(frozen, plan, source, EXECUTION)}
    assert rows["large"].mse > 1e30
    for name, expected in rows.items():
        if np.isfinite(expected.relative_l2):
            assert_close(found[name], expected)
        else:
            assert found[name] == expected


def test_totals_without_an_axis_are_summed_too(tmp_path: Path) -> None:
    proto = model(
        [
            helper.make_node("MatMul", ["x", "w"], ["h"], "layer"),
            helper.make_node("ReduceMean", ["h"], ["m"], "mean", keepdims=0),
            helper.make_node("Mul", ["m", "m"], ["y"], "square"),
        ],
        [value("x", ["n", 3])],
        [value("y", [])],
        {"w": normal(3, 3)},
    )
    frozen = frozen_from(proto, tmp_path / "model.onnx")
    source = samples_of("x", 3, n=4)
    plan = projected(planner_for(frozen, source, tmp_path / "store"))
    found = sensitivity(frozen, plan, source, EXECUTION, batch=2)
    expected = {
        row.name: row.alone for row in compare_layers(frozen, plan, source, EXECUTION, batch=2)
    }
    assert found.keys() == expected.keys()
    for name in found:
        assert_close(found[name], expected[name])


class Counting:
    """Keeps sums in memory, and says how many were kept; ends after ``limit`` parts."""

    def __init__(self, store: SensitivityStore, limit: int = 1000) -> None:
        self.store = store
        self.n_kept = 0
        self._limit = limit

    def known(self) -> dict[str, NDArray[np.float64]]:
        return self.store.known()

    def keep(self, totals: Mapping[str, NDArray[np.float64]]) -> None:
        if self._limit == 0:
            raise KeyboardInterrupt
        self._limit -= 1
        self.n_kept += len(totals)
        self.store.keep(totals)


def test_finished_parts_are_kept_and_a_second_run_finds_all_done(
    vit: tuple[FrozenModel, Planner, HeldSamples], tmp_path: Path
) -> None:
    frozen, planner, source = vit
    plans = [projected(planner, name) for name in PRECISIONS]
    place = open_place(tmp_path / "kept")
    place.make()
    identity = sensitivity_identity(frozen, plans, source, EXECUTION)
    first = Counting(SensitivityStore(place, identity), limit=2)
    with pytest.raises(KeyboardInterrupt):
        sensitivities(frozen, plans, source, EXECUTION, budget_bytes=20_000, kept=first)
    assert first.n_kept > 0
    second = Counting(SensitivityStore(place, identity))
    found = sensitivities(frozen, plans, source, EXECUTION, budget_bytes=20_000, kept=second)
    assert first.n_kept + second.n_kept == len(twin_sums(frozen, plans).keys)
    third = Counting(SensitivityStore(place, identity))
    assert sensitivities(frozen, plans, source, EXECUTION, kept=third) == found
    assert third.n_kept == 0
    # Another choice measures what is new alone.
    more = [*plans, projected(planner, "int16")]
    fourth = Counting(SensitivityStore(place, identity))
    sensitivities(frozen, more, source, EXECUTION, kept=fourth)
    assert 0 < fourth.n_kept < first.n_kept + second.n_kept


def test_a_damaged_object_is_measured_again(
    vit: tuple[FrozenModel, Planner, HeldSamples], tmp_path: Path
) -> None:
    frozen, planner, source = vit
    plans = [projected(planner)]
    place = open_place(tmp_path / "kept")
    place.make()
    store = SensitivityStore(place, sensitivity_identity(frozen, plans, source, EXECUTION))
    sensitivities(frozen, plans, source, EXECUTION, kept=store)
    (file,) = (tmp_path / "kept" / "sensitivities").iterdir()
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(bytes(data))
    assert store.known() == {}


def plan_of(frozen: FrozenModel, source: HeldSamples, folder: Path) -> ProjectedPlan:
    return projected(planner_for(frozen, source, folder))


def test_whatever_changes_a_score_is_in_its_identity(tmp_path: Path) -> None:
    """A changed weight, sample, batch or thread count never meets an old score."""

    def built(weight: NDArray[np.float32], name: str) -> FrozenModel:
        proto = model(
            [helper.make_node("MatMul", ["x", "w"], ["y"], "layer")],
            [value("x", ["n", 3])],
            [value("y", ["n", 3])],
            {"w": weight},
        )
        return frozen_from(proto, tmp_path / name)

    weight = normal(3, 3)
    tuned = weight.copy()
    tuned[1, 2] = np.nextafter(tuned[1, 2], np.float32(9))
    one, other = built(weight, "one.onnx"), built(tuned, "other.onnx")
    assert numpy_helper.to_array(one.proto().graph.initializer[0]).shape == (3, 3)
    source = samples_of("x", 3, n=4)
    plans = [plan_of(one, source, tmp_path / "store")]
    base = sensitivity_identity(one, plans, source, EXECUTION)
    assert base == sensitivity_identity(one, plans, source, EXECUTION)
    moved = HeldSamples(samples=[*source.samples[:3], {"x": source.samples[3]["x"] + 1}])
    threads = replace(EXECUTION, n_threads=2)
    others = [
        sensitivity_identity(other, plans, source, EXECUTION),
        sensitivity_identity(one, plans, moved, EXECUTION),
        sensitivity_identity(one, plans, source, EXECUTION, n_samples=3),
        sensitivity_identity(one, plans, source, EXECUTION, batch=2),
        sensitivity_identity(one, plans, source, threads),
    ]
    place = open_place(tmp_path / "kept")
    place.make()
    store = SensitivityStore(place, base)
    store.keep({"key": np.arange(5.0)})
    assert list(store.known()) == ["key"]
    for changed in others:
        assert SensitivityStore(place, changed).known() == {}
    # And a quantizer that moved has another key.
    layers = plans[0].plan.layers
    entry = layers[0].activations[0]
    finer = replace(entry.quantizer, scales=(entry.quantizer.scales[0] * (1 + 1e-6),))
    changed_layer = replace(layers[0], activations=(replace(entry, quantizer=finer),))
    assert twin_key(changed_layer) != twin_key(layers[0])


def test_sums_in_two_steps_are_those_of_numpy() -> None:
    f, q = (
        normal(7, 300, seed=3),
        normal(7, 300, seed=3) + normal(7, 300, seed=4) * np.float32(0.01),
    )
    whole = Sums()
    whole.add(f, q)
    d = (q - f).astype(np.float64)
    ff, qq = ((t.astype(np.float64) ** 2).sum() for t in (f, q))
    totals = np.array([ff, qq, (d**2).sum(), np.abs(d).sum(), f.size])
    assert_close(module.deviation_of_totals(totals), whole.deviation())
