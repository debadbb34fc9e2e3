"""What targets refuse, and what they do to numbers."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qdist.errors import PlanError
from qdist.plan.choice import LayerChoice
from qdist.plan.plan import LayerPlan, QuantizationPlan, QuantizedInput
from qdist.plan.quantizer import BlockScales, Quantizer
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


# --- granularities ------------------------------------------------------------------------------

BLOCKS = replace(
    WEIGHT,
    scales=(0.5,),
    zero_points=(0,),
    axis=None,
    blocks=BlockScales.of(np.array([[0.5, 0.1], [0.3, 0.2]], np.float32), 0, 16),
)


@pytest.mark.parametrize(
    ("changes", "weight", "got"),
    [
        ({"blocks": False}, BLOCKS, "scales for blocks"),
        ({"per_channel": False}, BLOCKS, "scales per channel"),
        ({"block_sizes": (32, 64)}, BLOCKS, "blocks of 16"),
        ({"per_tensor_operators": ("MatMul",)}, WEIGHT, "MatMul with scales per channel"),
    ],
)
def test_what_shares_a_scale_must_be_what_the_target_has(
    changes: dict[str, Any], weight: Quantizer, got: str
) -> None:
    assert refusal(target(**changes), plan(weight=weight)).got == got
    target(block_sizes=(16,)).project(plan(weight=weight))


def test_activations_per_token_and_channel_are_refused_where_they_are_unknown() -> None:
    token = replace(ACTIVATION, low=-127, zero_points=(0,), token_length=8)
    channel = replace(ACTIVATION, scales=(0.1, 0.2), zero_points=(0, 0), axis=1)
    for chip, activation, what in (
        (target(tokens=False), token, "token"),
        (target(activation_channels=False), channel, "channel"),
    ):
        error = refusal(chip, plan(activation))
        assert error.got == f"a scale per {what} for x"
        assert error.expected == "quantization.activation_granularity=tensor"
        target().project(plan(activation))


def test_blocks_are_snapped_to_the_grid_too() -> None:
    found = target(scale_grid="power_of_two").project(plan(weight=BLOCKS)).plan.layers[0]
    blocks = found.weights[0].quantizer.blocks
    assert blocks is not None
    assert blocks.values.tolist() == [[0.5, 0.125], [0.5, 0.25]]
    kept = target().project(plan(weight=BLOCKS)).plan.layers[0].weights[0].quantizer
    assert kept.blocks == BLOCKS.blocks


def test_weights_are_rounded_as_the_target_rounds() -> None:
    halves = np.array([[0.125, -0.125, 0.375], [0.05, -0.15, 0.25]], np.float32)
    halves[1] = np.float32(0.1) * np.array([0.5, -1.5, 2.5], np.float32)
    for rounding, expected in (
        ("half_even", [[0, 0, 2], [0, -2, 2]]),
        ("half_away", [[1, -1, 2], [1, -2, 3]]),
    ):
        chip = target(rounding=rounding)
        found = chip.project(plan()).plan.layers[0]
        assert found.weights[0].quantizer.quantize(halves).tolist() == expected
        assert found.activations[0].quantizer.rounding == "half_even"
        assert chip.project(chip.project(plan()).plan).plan == chip.project(plan()).plan
    with pytest.raises(ValueError, match="half_away"):
        target(rounding="up")


# --- cuts ---------------------------------------------------------------------------------------


def cut_plan(
    weights: tuple[float, ...], source: float, result: float, op_type: str, depthwise: bool = False
) -> QuantizationPlan:
    whole = replace(ACTIVATION, zero_points=(0,))
    one = len(weights) == 1
    layer = LayerPlan(
        name="mm",
        op_type=op_type,
        choice=LayerChoice(),
        activations=(
            QuantizedInput(index=0, tensor="x", quantizer=replace(whole, scales=(source,))),
        ),
        weights=(
            QuantizedInput(
                index=1,
                tensor="w",
                quantizer=replace(
                    WEIGHT,
                    scales=weights,
                    zero_points=(0,) * len(weights),
                    axis=None if one else 0,
                ),
            ),
        ),
        outputs=(QuantizedInput(index=0, tensor="y", quantizer=replace(whole, scales=(result,))),),
        why="default",
        is_depthwise=depthwise,
    )
    return QuantizationPlan(model_digest="a", statistics_digest="b", layers=(layer,))


ICRAFT = target(scale_grid="m*2^-n", rounding="half_away", symmetric_only=True)


@given(
    st.lists(st.floats(1e-4, 1.0), min_size=1, max_size=5).map(tuple),
    st.floats(1e-3, 10),
    st.floats(1e-3, 10),
    st.sampled_from([("Conv", False), ("Conv", True), ("MatMul", False), ("Mul", False)]),
)
@settings(max_examples=200)
def test_weights_over_input_and_output_are_what_the_hardware_multiplies_with(
    weights: tuple[float, ...], source: float, result: float, kind: tuple[str, bool]
) -> None:
    projected = ICRAFT.project(cut_plan(weights, source, result, *kind)).plan
    (layer,) = projected.layers
    quantizer = layer.weights[0].quantizer
    ratio = layer.activations[0].quantizer.scales[0] / layer.outputs[0].quantizer.scales[0]
    shifts = {shift for _, _, shift in quantizer.cuts}
    assert len(shifts) == 1
    (shift,) = shifts
    assert 0 <= shift <= (0 if kind[1] or kind[0] == "Mul" else 5)
    for scale, (m, n, _), before in zip(quantizer.scales, quantizer.cuts, weights, strict=True):
        assert 0 < m <= 255
        assert 8 <= n - shift <= 16
        assert scale * ratio == pytest.approx(np.ldexp(m, -n), rel=1e-6)
        if not projected.notes:
            assert scale == pytest.approx(before, rel=0.5)
    assert ICRAFT.project(projected).plan == projected


def test_scales_that_the_cuts_do_not_reach_are_reported() -> None:
    projected = ICRAFT.project(cut_plan((0.5, 4.0), 1.0, 1.0, "Conv")).plan
    assert projected.notes == ("mm: 1 scales of w lie beyond what the cuts reach",)
    assert projected.layers[0].weights[0].quantizer.scales[1] == 255 * 2.0**-8


def test_without_a_measured_output_there_is_nothing_to_cut_to() -> None:
    whole = cut_plan((0.3,), 1.0, 1.0, "Conv")
    (layer,) = whole.layers
    projected = ICRAFT.project(replace(whole, layers=(replace(layer, outputs=()),))).plan
    assert projected.layers[0].weights[0].quantizer.scales == (float(np.float32(0.3)),)
    assert projected.layers[0].weights[0].quantizer.cuts == ()
