"""The threshold methods by name, and the one function that applies them."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

from qdist.errors import PlanError
from qdist.stats.histogram import Density
from qdist.threshold.clip import Levels, Threshold
from qdist.threshold.entropy import entropy
from qdist.threshold.error import expected_mse
from qdist.threshold.maximum import maximum
from qdist.threshold.mse import mse
from qdist.threshold.percentile import percentile

METHODS: dict[str, Callable[..., tuple[float, float]]] = {
    "max": maximum,
    "percentile": percentile,
    "mse": mse,
    "kl": entropy,
}
"""Name -> function of (density, levels, parameters) that gives the bounds."""


def check_method(method: str, parameters: Mapping[str, Any] | None = None) -> None:
    """Raise QD501 for an unknown method, QD502 for a parameter that it does not take."""
    if method not in METHODS:
        raise PlanError(
            "QD501",
            where="quantization.saturation",
            got=repr(method),
            expected=f"one of {', '.join(METHODS)}",
            mend="choose one of these, for example quantization.saturation=mse",
        )
    taken = [
        name
        for name, parameter in inspect.signature(METHODS[method]).parameters.items()
        if parameter.kind is inspect.Parameter.KEYWORD_ONLY
    ]
    for name in parameters or {}:
        if name not in taken:
            raise PlanError(
                "QD502",
                where=f"method {method}",
                got=f"a parameter {name!r}",
                expected=f"one of {', '.join(taken)}" if taken else "no parameter",
                mend="remove it from quantization.saturation_parameters",
            )


def find_threshold(
    density: Density,
    levels: Levels,
    method: str,
    parameters: Mapping[str, Any] | None = None,
) -> Threshold:
    """The range that ``method`` chooses for a tensor. Raises QD501, QD502."""
    check_method(method, parameters)
    low, high = METHODS[method](density, levels, **(parameters or {}))
    low, high = min(low, 0.0), max(high, 0.0)
    return Threshold(
        low=low,
        high=high,
        method=method,
        clipped_share=density.share_outside(low, high),
        expected_mse=expected_mse(density, low, high, levels),
    )
