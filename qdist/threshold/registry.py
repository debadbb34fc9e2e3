"""The threshold methods by name, and the one function that applies them."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

from qdist.errors import ConfigError, PlanError
from qdist.stats.histogram import Density
from qdist.threshold.clip import Levels, Threshold
from qdist.threshold.entropy import BINS, entropy, n_halves
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

_LIMITS: dict[str, tuple[int, int] | tuple[float, float]] = {
    "percent": (1.0, 100.0),
    "rounds": (1, 100),
    "bins": (2, 1 << 16),
    "stride": (1, 1 << 16),
}
"""Parameter -> least and largest value. Integers where these are."""


def check_method(method: str, parameters: Mapping[str, Any] | None = None) -> None:
    """Raise QD501 for an unknown method, QD502 for a parameter that it does not take, QD104 for a
    value that the parameter cannot have."""
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
    for name, value in (parameters or {}).items():
        if name not in taken:
            raise PlanError(
                "QD502",
                where=f"method {method}",
                got=f"a parameter {name!r}",
                expected=f"one of {', '.join(taken)}" if taken else "no parameter",
                mend="remove it from quantization.saturation_parameters",
            )
        _check_value(name, value)


def _check_value(name: str, value: Any) -> None:
    low, high = _LIMITS[name]
    kinds = (int,) if isinstance(low, int) else (int, float)
    if isinstance(value, bool) or not isinstance(value, kinds) or not low <= value <= high:
        raise ConfigError(
            "QD104",
            where=f"quantization.saturation_parameters.{name}",
            got=repr(value),
            expected=f"{'an integer' if isinstance(low, int) else 'a number'} from {low} to {high}",
            mend="change it, or remove it for the method's own value",
        )


def find_threshold(
    density: Density,
    levels: Levels,
    method: str,
    parameters: Mapping[str, Any] | None = None,
) -> Threshold:
    """The range that ``method`` chooses for a tensor, under the name of the method really used:
    ``kl`` is ``max`` where it has no more bins than levels. Raises QD501, QD502, QD104.
    """
    check_method(method, parameters)
    given = dict(parameters or {})
    if method == "kl" and n_halves(levels) >= given.get("bins", BINS):
        method, given = "max", {}
    low, high = METHODS[method](density, levels, **given)
    low, high = min(low, 0.0), max(high, 0.0)
    return Threshold(
        low=low,
        high=high,
        method=method,
        clipped_share=density.share_outside(low, high),
        expected_mse=expected_mse(density, low, high, levels),
    )
