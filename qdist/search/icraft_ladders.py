"""Icraft's ladders: which number format a layer gets after the one that it has."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from qdist.plan.choice import LayerChoice

CHIPS = ("buyi", "zhuge")
_SIXTEEN = ("bf16", "fp16")


def rungs(chip: str, precision: str, used: Collection[str], *, float_cal: bool) -> tuple[str, ...]:
    """The precisions above ``precision``, the next one first. ``used``: those that the layer has
    had. ``chip``: of `CHIPS`.

    Zhuge (``ZG``): int8 to bf16; bf16 and fp16 to the one of the two that was not used; then tf32.
    Buyi (``BY``): int8 to int16; int16 to float32 with ``float_cal``. Of int8's kind are ``uint8``
    and formats with fewer bits, of int16's ``w8a16`` and ``uint16``.
    """
    if chip == "zhuge":
        if precision in ("tf32", "float32"):
            return ()
        return (*(name for name in _SIXTEEN if name not in {*used, precision}), "tf32")
    above = ("float32",) if float_cal else ()
    if precision == "float32":
        return ()
    return above if precision in ("int16", "uint16", "w8a16", "w4a16") else ("int16", *above)


def raised(
    choice: LayerChoice, options: Sequence[LayerChoice], precisions: Sequence[str]
) -> LayerChoice | None:
    """The option of the first of ``precisions`` that there is one of, with as much as possible as
    in ``choice``: weights' granularity, then the threshold method. None without any."""
    for name in precisions:
        fitting = [option for option in options if option.precision == name]
        if fitting:
            return max(
                fitting,
                key=lambda option: (
                    option.granularity == choice.granularity,
                    option.saturation == choice.saturation,
                    option.activation_granularity == choice.activation_granularity,
                ),
            )
    return None


def combinations(choice: LayerChoice, options: Sequence[LayerChoice]) -> tuple[LayerChoice, ...]:
    """The other options of the same precision: another granularity (``per``), threshold method
    (``sat``), or both."""
    return tuple(o for o in options if o.precision == choice.precision and o != choice)
