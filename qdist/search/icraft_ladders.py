"""Icraft's ladders: what a layer gets after the number format that it has."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from qdist.plan.choice import LayerChoice

CHIPS = ("buyi", "zhuge")
SPLIT = "int16 with a split bias"
"""The rung of a convolution in int16 whose bias is an Add of its own."""
_SIXTEEN = ("bf16", "fp16")
_INT16 = ("int16", "uint16", "w8a16", "w4a16")


def rung_of(choice: LayerChoice) -> str:
    """The rung on which a layer is: its precision, or `SPLIT`."""
    return SPLIT if choice.splits_bias else choice.precision


def rungs(
    chip: str, rung: str, used: Collection[str], *, float_cal: bool, splits: bool = False
) -> tuple[str, ...]:
    """The rungs above ``rung``, the next one first. ``used``: those that the layer has had.
    ``chip``: of `CHIPS`. ``splits``: whether the search may split a bias off.

    Zhuge (``ZG``): int8 to bf16; bf16 and fp16 to the one of the two that was not used; then tf32.
    Buyi (``BY``): int8 to int16; int16 to `SPLIT`, where that may be, before float32, which needs
    ``float_cal``. Of int8's kind are ``uint8`` and formats with fewer bits, of int16's ``w8a16``
    and ``uint16``, which have no split.
    """
    if chip == "zhuge":
        if rung in ("tf32", "float32"):
            return ()
        return (*(name for name in _SIXTEEN if name not in {*used, rung}), "tf32")
    above = ("float32",) if float_cal else ()
    if rung == "float32":
        return ()
    if rung == "int16" and splits:
        return (SPLIT, *above)
    return above if rung in (*_INT16, SPLIT) else ("int16", *above)


def raised(
    choice: LayerChoice, options: Sequence[LayerChoice], names: Sequence[str]
) -> LayerChoice | None:
    """The option of the first of the rungs ``names`` that there is one of, with as much as possible
    as in ``choice``: weights' granularity, then the threshold method. None without any."""
    for name in names:
        fitting = [option for option in options if rung_of(option) == name]
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
    """The other options of the same rung: another granularity (``per``), threshold method
    (``sat``), or both."""
    return tuple(o for o in options if rung_of(o) == rung_of(choice) and o != choice)
