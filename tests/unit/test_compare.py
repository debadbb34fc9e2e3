from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from onnx import helper

from qdist.demo import demo_file
from qdist.errors import DataError
from qdist.evaluate.compare import Deviation, Sums, compare_layers
from qdist.evaluate.sensitivity import sensitivity
from qdist.model.freeze import FrozenModel, freeze
from qdist.model.loading import load_model
from qdist.plan.planner import Planner
from qdist.plan.quantizer import Quantizer
from qdist.plan.target import ProjectedPlan
from qdist.simulate.twins import only
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


def with_steps(plan: ProjectedPlan, steps: dict[str, tuple[float, float]]) -> ProjectedPlan:
    """The plan with these steps for the activation and the weight of the layers named."""
    layers = []
    for layer in plan.plan.layers:
        if layer.name in steps:
            x, w = (
                Quantizer(
                    bits=8,
                    low=-128,
                    high=127,
                    scales=(step,),
                    zero_points=(0,),
                    axis=None,
                    method="max",
                    bounds=(-128 * step, 127 * step),
                )
                for step in steps[layer.name]
            )
            layer = replace(
                layer,
                activations=tuple(replace(e, quantizer=x) for e in layer.activations),
                weights=tuple(replace(e, quantizer=w) for e in layer.weights),
            )
        layers.append(layer)
    return replace(plan, plan=replace(plan.plan, layers=tuple(layers)))


def two_products(folder: Path) -> tuple[FrozenModel, Planner, HeldSamples]:
    """Y = 2 (3 x), of single numbers, so that every error can be worked out."""
    proto = model(
        [
            helper.make_node("MatMul", ["x", "w1"], ["h"], "first"),
            helper.make_node("MatMul", ["h", "w2"], ["y"], "second"),
        ],
        [value("x", ["n", 2])],
        [value("y", ["n", 2])],
        {"w1": floats([[3, 0], [0, 3]]), "w2": floats([[2, 0], [0, 2]])},
    )
    frozen = frozen_from(proto, folder / "model.onnx")
    source = HeldSamples(samples=[{"x": floats([1, -2])}, {"x": floats([2.25, 0.5])}])
    return frozen, planner_for(frozen, source, folder / "store"), source


def test_known_steps_give_known_numbers(tmp_path: Path) -> None:
    frozen, planner, source = two_products(tmp_path)
    # x in steps of 0.5: 2.25 becomes 2 (half to even). h in steps of 1, w2 exact.
    plan = with_steps(projected(planner), {"first": (0.5, 1.0), "second": (1.0, 1.0)})
    rows = {row.name: row for row in compare_layers(frozen, plan, source, EXECUTION)}
    first, second = rows["first"], rows["second"]
    assert (first.op_type, first.precision, first.tensor) == ("MatMul", "int8", "h")
    # h = [3, -6, 6.75, 1.5] becomes [3, -6, 6, 1.5].
    ff, error = 9 + 36 + 6.75**2 + 2.25, 0.75
    for deviation in (first.alone, first.in_place):
        assert deviation.mse == pytest.approx(error**2 / 4)
        assert deviation.mae == pytest.approx(error / 4)
        assert deviation.relative_l2 == pytest.approx(error / np.sqrt(ff))
        assert deviation.sqnr_db == pytest.approx(10 * np.log10(ff / error**2))
        qq, fq = 9 + 36 + 36 + 2.25, 9 + 36 + 6.75 * 6 + 2.25
        assert deviation.cosine == pytest.approx(fq / np.sqrt(ff * qq))
    # Alone: h = [3, -6, 6.75, 1.5] becomes [3, -6, 7, 2]; in place: [3, -6, 6, 1.5] -> [.., 6, 2].
    assert second.alone.mae == pytest.approx(2 * (0.25 + 0.5) / 4)
    assert second.alone.mse == pytest.approx(4 * (0.25**2 + 0.5**2) / 4)
    assert second.in_place.mae == pytest.approx(2 * (0.75 + 0.5) / 4)
    assert second.in_place.mse == pytest.approx(4 * (0.75**2 + 0.5**2) / 4)


def assert_close(found: Deviation, expected: Deviation) -> None:
    """Sums taken inside the graph, beside those of whole tensors in NumPy."""
    assert found.cosine == pytest.approx(expected.cosine, abs=2e-6)
    assert found.relative_l2 == pytest.approx(expected.relative_l2, rel=2e-3)
    assert found.mse == pytest.approx(expected.mse, rel=4e-3)
    assert found.mae == pytest.approx(expected.mae, rel=2e-3)


def test_worst_layer_in_place_comes_first(tmp_path: Path) -> None:
    frozen, planner, source = two_products(tmp_path)
    plan = projected(planner)
    coarse = with_steps(plan, {"first": (0.5, 1.0), "second": (4.0, 1.0)})
    rows = compare_layers(frozen, coarse, source, EXECUTION)
    assert [row.name for row in rows] == ["second", "first"]
    assert rows[0].in_place.sqnr_db < rows[1].in_place.sqnr_db - 1
    exact = with_steps(plan, {"first": (0.5, 1.0), "second": (0.25, 1.0)})
    some = [{"x": floats([1, -2])}]
    rows = compare_layers(frozen, exact, HeldSamples(samples=some), EXECUTION)
    assert [row.in_place.sqnr_db for row in rows] == [float("inf")] * 2


def test_float_plan_gives_no_rows(tmp_path: Path) -> None:
    frozen, planner, source = two_products(tmp_path)
    plan = projected(planner, "float32")
    assert compare_layers(frozen, plan, source, EXECUTION) == ()
    assert sensitivity(frozen, plan, source, EXECUTION) == {}


@pytest.fixture(scope="module")
def vit(tmp_path_factory: pytest.TempPathFactory) -> tuple[FrozenModel, Planner, HeldSamples]:
    frozen = freeze(load_model(demo_file("digits_vit.onnx")))
    source = samples_of("images", 1, 8, 8, n=10)
    return frozen, planner_for(frozen, source, tmp_path_factory.mktemp("v") / "store"), source


def test_every_quantized_layer_is_compared(
    vit: tuple[FrozenModel, Planner, HeldSamples],
) -> None:
    frozen, planner, source = vit
    plan = projected(planner)
    rows = compare_layers(frozen, plan, source, EXECUTION)
    quantized = {layer.name for layer in plan.plan.layers if layer.is_quantized}
    assert len(rows) == len(quantized)
    assert {row.name for row in rows} == quantized
    alone = sensitivity(frozen, plan, source, EXECUTION)
    assert alone.keys() == quantized
    for row in rows:
        assert_close(alone[row.name], row.alone)
    # Errors add up on the way: the last layers are off by more than their own share.
    last = next(row for row in rows if row.tensor == "logits")
    assert last.in_place.relative_l2 > last.alone.relative_l2
    assert all(0 < row.in_place.cosine <= 1 + 1e-12 for row in rows)


def test_a_layer_quantized_by_itself_is_as_far_off_in_place_as_alone(
    vit: tuple[FrozenModel, Planner, HeldSamples],
) -> None:
    frozen, planner, source = vit
    plan = projected(planner)
    alone = sensitivity(frozen, plan, source, EXECUTION)
    for name in list(alone)[::9]:
        (row,) = compare_layers(frozen, only(plan, {name}), source, EXECUTION)
        assert row.name == name
        assert row.alone == row.in_place
        assert_close(alone[name], row.alone)


def test_batches_change_nothing_beyond_rounding_and_samples_are_counted(
    vit: tuple[FrozenModel, Planner, HeldSamples],
) -> None:
    frozen, planner, source = vit
    plan = projected(planner)
    whole = sensitivity(frozen, plan, source, EXECUTION, batch=8)
    single = sensitivity(frozen, plan, source, EXECUTION, batch=1)
    for name, deviation in whole.items():
        assert deviation.sqnr_db == pytest.approx(single[name].sqnr_db, abs=0.1)
    three = HeldSamples(samples=source.samples[:3])
    expected = sensitivity(frozen, plan, three, EXECUTION)
    assert sensitivity(frozen, plan, source, EXECUTION, n_samples=3) == expected
    assert sensitivity(frozen, plan, source, EXECUTION, n_samples=4) != expected


def test_fixed_batches_are_whole(tmp_path: Path) -> None:
    proto = model(
        [helper.make_node("MatMul", ["x", "w"], ["y"], "layer")],
        [value("x", [4, 3])],
        [value("y", [4, 3])],
        {"w": normal(3, 3)},
    )
    frozen = frozen_from(proto, tmp_path / "model.onnx")
    source = samples_of("x", 3, n=8)
    plan = projected(planner_for(frozen, source, tmp_path / "store"))
    whole = sensitivity(frozen, plan, HeldSamples(samples=source.samples[:4]), EXECUTION)
    assert sensitivity(frozen, plan, source, EXECUTION, n_samples=2) == whole
    with pytest.raises(DataError, match="QD303"):
        sensitivity(frozen, plan, HeldSamples(samples=source.samples[:6]), EXECUTION)


def test_sums_add_up_over_batches() -> None:
    f, q = normal(6, 5), normal(6, 5) + normal(6, 5, seed=2) * 0.1
    whole, parts = Sums(), Sums()
    whole.add(f, q)
    for i in range(0, 6, 2):
        parts.add(f[i : i + 2], q[i : i + 2])
    a, b = whole.deviation(), parts.deviation()
    assert a.mse == pytest.approx(float(np.mean(np.square(q.astype(float) - f))))
    for key, number in a.to_json().items():
        assert number == pytest.approx(b.to_json()[key])


def test_values_that_are_no_numbers() -> None:
    inf, nan = float("inf"), float("nan")
    nothing = Sums().deviation()
    assert (nothing.cosine, nothing.relative_l2, nothing.sqnr_db) == (1.0, 0.0, inf)

    masked = Sums()
    masked.add(floats([1, -inf, nan]), floats([1.5, -1e30, 0]))
    assert masked.deviation().mae == pytest.approx(0.5)

    for bad in (inf, -inf, nan):
        broken = Sums()
        broken.add(floats([1, 2]), floats([1, bad]))
        broken.add(floats([1, 2]), floats([1, 2]))
        assert broken.deviation().sqnr_db == -inf
        assert broken.deviation().mse == inf

    from_nothing = Sums()
    from_nothing.add(floats([0, 0]), floats([0, 1]))
    deviation = from_nothing.deviation()
    assert (deviation.cosine, deviation.relative_l2, deviation.sqnr_db) == (0.0, inf, -inf)
    text = json.dumps(deviation.to_json(), allow_nan=False)
    assert json.loads(text)["sqnr_db"] == "-inf"
