"""What shares a scale."""

from __future__ import annotations

import re
from dataclasses import dataclass

_SIZED = re.compile(r"(group|block)[=:]([1-9][0-9]*)")


@dataclass(frozen=True, slots=True, kw_only=True)
class Granularity:
    """``kind``: ``tensor``, ``channel`` (of a weight: output channels), ``group`` (``size`` groups
    of neighbouring channels), ``block`` (``size`` values along the axis that is summed over, for
    every output channel) or ``token`` (every row of the last axis, found while the model runs)."""

    kind: str
    size: int = 1


WEIGHT_KINDS = ("tensor", "channel", "group", "block")
ACTIVATION_KINDS = ("tensor", "channel", "group", "token")
WEIGHT_FORMS = "tensor, channel, group=N or block=N"
ACTIVATION_FORMS = "tensor, channel, group=N or token"


def parse_granularity(text: str) -> Granularity | None:
    """From its text, ``block=32`` or ``block:32``, which a command line takes unquoted; None for
    anything else."""
    if text in ("tensor", "channel", "token"):
        return Granularity(kind=text)
    found = _SIZED.fullmatch(text)
    return Granularity(kind=found[1], size=int(found[2])) if found else None


MATRIX_PRODUCTS = ("MatMul", "Gemm", "FusedMatMul", "FusedGemm")


def summed_axis(op_type: str, channel_axis: int | None, rank: int) -> int | None:
    """The axis of a weight that the layer sums over, along which blocks lie: the other one of the
    last two of a matrix. None for other operators, whose weights have a scale per channel then."""
    if op_type not in MATRIX_PRODUCTS or channel_axis is None or rank < 2:
        return None
    return rank - 2 if channel_axis == rank - 1 else rank - 1
