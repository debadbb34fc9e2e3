"""What targets refuse, and what they do to numbers."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from qdist.errors import PlanError
from qdist.plan.choice import LayerChoice
from qdist.plan.plan import LayerPlan, QuantizationPlan, QuantizedInput
from qdist.plan.quantizer import Quantizer
from qdist.plan.target import Target

ACTIVATION = Quantizer(
    bits=8,
    low=-128,
    high=127,
    scales=(0.3,),
    zero_points=(-20,),
    axis=None,
    method="max",
    bounds=(-32.4, 44.1),
)
WEIGHT = replace(
    ACTIVATION, low=-127, scales=(0.25, 0.1), zero_points=(0, 0), axis=0, bounds=(-31.75, 31.75)
)
TINY = float(np.finfo(np.float32).tiny)


def plan(
    activation: Quantizer = ACTIVATION, weight: Quantizer = WEIGHT, precision: str = "int8"
) -> QuantizationPlan:
    layer = LayerPlan(
        name="mm",
        op_type="MatMul",
        choice=LayerChoice(precision=precision),
        activations=(QuantizedInput(index=0, tensor="x", quantizer=activation),),
        weights=(QuantizedInput(index=1, tensor="w", quantizer=weight),),
        why="default",
    )
    still = replace(layer, name="still", activations=(), weights=())
    still = replace(still, choice=LayerChoice(precision="float32"))
    return QuantizationPlan(model_digest="a", statistics_digest="b", layers=(layer, still))


def target(**changes: Any) -> Target:
    return Target(**{"name": "chip", "precisions": ("int8",), **changes})


def refusal(chip: Target, of: QuantizationPlan) -> PlanError:
    with pytest.raises(PlanError) as caught:
        chip.project(of)
    assert caught.value.code == "QD507"
    assert caught.value.where == "layer mm on target chip"
    return caught.value


def test_a_precision_that_the_target_lacks_is_refused() -> None:
    error = refusal(target(precisions=("int8", "int16")), plan(precision="w4a8"))
    assert (error.got, error.expected) == ("w4a8", "int8, int16")


def test_a_layer_that_stays_float_needs_no_precision() -> None:
    projected = target().project(plan())
    assert projected.plan.layers[1] == plan().layers[1]
    assert projected.target == target()


def test_a_zero_point_is_refused_where_only_symmetric_ranges_are_known() -> None:
    error = refusal(target(symmetric_only=True), plan())
    assert error.got == "a zero point for x"
    assert error.expected == "quantization.symmetric=true"
    target(symmetric_only=True).project(plan(replace(ACTIVATION, zero_points=(0,))))


def test_scales_per_channel_are_refused_where_there_is_one_per_tensor() -> None:
    error = refusal(target(per_channel=False), plan())
    assert error.got == "scales per channel"
    assert error.expected == "quantization.granularity=tensor"
    whole = replace(WEIGHT, scales=(0.25,), zero_points=(0,), axis=None)
    target(per_channel=False).project(plan(weight=whole))


def test_an_unknown_grid_of_scales_is_refused() -> None:
    with pytest.raises(ValueError, match="'float', 'power_of_two'"):
        target(scale_grid="log")


def test_float_scales_become_float32_and_zero_points_stay() -> None:
    projected = target().project(plan()).plan.layers[0]
    found = projected.activations[0].quantizer
    assert found.scales == (float(np.float32(0.3)),)
    assert found.zero_points == (-20,)
    assert projected.weights[0].quantizer.scales == (0.25, float(np.float32(0.1)))


def test_powers_of_two_are_rounded_up_and_zero_points_follow() -> None:
    projected = target(scale_grid="power_of_two").project(plan()).plan.layers[0]
    found = projected.activations[0].quantizer
    assert found.scales == (0.5,)
    # Zero lies where it did: 20 steps of 0.3 are 12 of 0.5.
    assert found.zero_points == (-12,)
    assert projected.weights[0].quantizer.scales == (0.25, 0.125)


def test_a_scale_that_float32_cannot_hold_is_raised_and_reported() -> None:
    small = replace(WEIGHT, scales=(1e-44, 1.0))
    projected = target().project(plan(weight=small)).plan
    assert projected.layers[0].weights[0].quantizer.scales == (TINY, 1.0)
    assert projected.notes == (f"mm: 1 scales of w raised to {TINY:.3g}",)
    assert target().project(projected).plan == projected


def test_notes_of_the_plan_are_kept() -> None:
    assert target().project(replace(plan(), notes=("said",))).plan.notes == ("said",)
