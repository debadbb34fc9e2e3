"""What a plan comes to does not depend on what is said about it."""

from __future__ import annotations

from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st

from qdist.plan.choice import LayerChoice
from qdist.plan.plan import LayerPlan, QuantizationPlan, QuantizedInput
from qdist.plan.quantizer import Quantizer
from qdist.plan.resolved import resolved_digest

SCALES = st.floats(2**-13, 8, width=32)
WORDS = st.text(max_size=12)


def plan_of(scale: float, method: str, why: str, choice: LayerChoice) -> QuantizationPlan:
    quantizer = Quantizer(
        bits=8,
        low=-128,
        high=127,
        scales=(scale,),
        zero_points=(0,),
        axis=None,
        method=method,
        bounds=(-scale * 128, scale * 127),
    )
    entry = QuantizedInput(index=0, tensor="x", quantizer=quantizer)
    layer = LayerPlan(
        name="a", op_type="Conv", choice=choice, activations=(entry,), weights=(), why=why
    )
    return QuantizationPlan(model_digest="m", statistics_digest="s", layers=(layer,))


@given(scale=SCALES, words=st.tuples(WORDS, WORDS, WORDS, WORDS))
def test_reasons_and_methods_change_nothing(scale: float, words: tuple[str, str, str, str]) -> None:
    choice = LayerChoice()
    one = plan_of(scale, words[0], words[1], choice)
    two = plan_of(scale, words[2], words[3], replace(choice, saturation="kl"))
    assert resolved_digest(one) == resolved_digest(two)
    assert resolved_digest(replace(one, notes=(words[0],))) == resolved_digest(one)


@given(scales=st.tuples(SCALES, SCALES).filter(lambda pair: pair[0] != pair[1]))
def test_other_numbers_are_another_plan(scales: tuple[float, float]) -> None:
    one, two = (plan_of(scale, "mse", "", LayerChoice()) for scale in scales)
    assert resolved_digest(one) != resolved_digest(two)
    assert resolved_digest(replace(one, model_digest="other")) != resolved_digest(one)
    wide = plan_of(scales[0], "mse", "", LayerChoice(precision="w8a16"))
    assert resolved_digest(wide) != resolved_digest(one)
