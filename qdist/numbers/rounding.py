"""Rounding, in NumPy: the definition that graphs and files are checked against."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from qdist.numbers.dtype import FloatType

ROUNDINGS = ("half_even", "half_away")
"""Where a value lies midway: to the even neighbour (ONNX, IEEE 754) or away from zero (C's
``round``, Icraft)."""


def round_integer(values: NDArray[Any], rounding: str = "half_even") -> NDArray[Any]:
    """The nearest whole numbers, in the dtype given (a float). Raises `ValueError` for an unknown
    rounding."""
    if rounding == "half_even":
        return np.rint(values)
    if rounding != "half_away":
        raise ValueError(f"rounding must be one of {ROUNDINGS}, got {rounding!r}")
    # floor(|x| + 0.5) would round 0.49999997 in float32 to 1.
    magnitude = np.abs(values)
    whole = np.floor(magnitude)
    with np.errstate(invalid="ignore"):
        up = magnitude - whole >= 0.5
    return np.copysign(whole + up, values)


def round_float(
    values: NDArray[Any], to: FloatType, *, saturate: bool = False, rounding: str = "half_even"
) -> NDArray[np.float32]:
    """The nearest values that ``to`` has, as float32.

    ``values`` are float32 or narrower. What is beyond the largest after rounding becomes infinity
    (NaN in a type without), or with ``saturate`` the largest, as ONNX has it. So do infinities. NaN
    stays NaN, zeros keep their sign.
    """
    with np.errstate(invalid="ignore"):  # a signalling NaN becomes a quiet one
        x = np.asarray(values, np.float32).astype(np.float64)
    finite = np.isfinite(x)
    safe = np.where(finite, np.abs(x), 0.0)
    exponent = np.frexp(safe)[1] - 1
    # Exact: float64 holds every float32, shifted, and every multiple of the step in between.
    step = np.maximum(exponent, to.least_exponent) - to.mantissa_bits
    rounded = np.ldexp(round_integer(np.ldexp(safe, -step), rounding), step)
    beyond = np.inf if to.has_infinity else np.nan
    limit = to.largest if saturate else beyond
    rounded = np.where(rounded > to.largest, limit, rounded)
    rounded = np.where(finite, rounded, np.where(np.isnan(x), np.nan, limit))
    return np.copysign(rounded, x).astype(np.float32)
