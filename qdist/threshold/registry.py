"""The threshold methods by name, and the functions that apply them."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from qdist.errors import ConfigError, PlanError
from qdist.stats.histogram import Density
from qdist.threshold.aciq import DISTRIBUTIONS, aciq
from qdist.threshold.adjust import fixed_threshold, scale_threshold
from qdist.threshold.admm import admm
from qdist.threshold.auto import Reader, auto, choose
from qdist.threshold.clip import Levels, Threshold
from qdist.threshold.entropy import entropy, jsd, kl_v2, kld, n_halves, n_levels_of, symkl
from qdist.threshold.error import measured
from qdist.threshold.improved import improved_kl, improved_mse, n_joint_levels
from qdist.threshold.maximum import maximum
from qdist.threshold.mse import mse
from qdist.threshold.percentile import percentile

METHODS: dict[str, Callable[..., tuple[float, float]]] = {
    "max": maximum,
    "percentile": percentile,
    "mse": mse,
    "kl": entropy,
    "kl_v2": kl_v2,
    "symkl": symkl,
    "jsd": jsd,
    "kld": kld,
    "aciq": aciq,
    "admm": admm,
    "improved_mse": improved_mse,
    "improved_kl": improved_kl,
    "auto": auto,
}
"""Name -> function of (density, levels, parameters) that gives the bounds."""

VENDOR_NAMES: dict[str, tuple[str, Mapping[str, Any]]] = {
    "null": ("max", {}),
    "min_max": ("max", {}),
    "use_max": ("max", {}),
    "ems": ("mse", {}),
    "use_kl": ("kl", {}),
    "percentile9999": ("percentile", {"percent": 99.99}),
    "improvedmse": ("improved_mse", {}),
    "improvedkl": ("improved_kl", {}),
}
"""What vendors call a method, in small letters -> the method, with parameters that the name means.
Sophgo's KL, SYMKL, JSD, ADMM, ACIQ and MAX are the methods' own names in capitals."""

EVERY_METHOD = ("th_scale", "threshold")
"""Parameters that go with any method, see `qdist.threshold.adjust`."""

_LIMITS: dict[str, tuple[int, int] | tuple[float, float]] = {
    "percent": (1.0, 100.0),
    "rounds": (1, 100),
    "bins": (2, 1 << 16),
    "stride": (1, 1 << 16),
    "starts": (1, 100),
    "iterations": (1, 10_000),
    "th_scale": (1e-3, 1e3),
    "threshold": (1e-30, 1e38),
}
"""Parameter -> least and largest value. Integers where these are."""
_CHOICES = {"distribution": DISTRIBUTIONS}
_TAKEN = {
    name: tuple(
        parameter.name
        for parameter in inspect.signature(method).parameters.values()
        if parameter.kind is inspect.Parameter.KEYWORD_ONLY
    )
    for name, method in METHODS.items()
}
_DEFAULTS = {
    name: {
        parameter.name: parameter.default
        for parameter in inspect.signature(method).parameters.values()
    }
    for name, method in METHODS.items()
}
_LEVELS: dict[str, Callable[[Density, Levels], int]] = {
    "kl": lambda density, levels: n_halves(levels),
    "symkl": lambda density, levels: n_halves(levels),
    "jsd": lambda density, levels: n_halves(levels),
    "kld": lambda density, levels: n_halves(levels),
    "kl_v2": n_levels_of,
    "improved_kl": lambda density, levels: n_joint_levels(levels),
}
"""Methods that squeeze bins into levels -> how many levels there are to squeeze them into."""


def resolve(
    method: str,
    parameters: Mapping[str, Any] | None = None,
    *,
    where: str = "quantization.saturation",
) -> tuple[str, dict[str, Any]]:
    """The method's own name and all parameters, from that or a vendor's name in any case.

    Parameters may stand behind the name: ``percentile:99.9`` (the method's first one), or
    ``kl:bins=4096,stride=1``. They win over given ones, and these over what a vendor's name stands
    for. Raises QD501, and QD502 for text behind a name that is no parameter.
    """
    small, has_own, text = method.lower().partition(":")
    name, meant = small, dict[str, Any]()
    if small in VENDOR_NAMES:
        name, meant = VENDOR_NAMES[small][0], dict(VENDOR_NAMES[small][1])
    if name in METHODS:
        own = _own_parameters(name, text, where) if has_own else {}
        return name, {**meant, **(parameters or {}), **own}
    raise PlanError(
        "QD501",
        where=where,
        got=repr(method),
        expected=f"one of {', '.join(METHODS)}, or a vendor's name: {', '.join(VENDOR_NAMES)}",
        mend=f"choose one of these, for example {where}=mse",
    )


def _own_parameters(method: str, text: str, where: str) -> dict[str, Any]:
    """Parameters that stand behind a method's name."""
    found: dict[str, Any] = {}
    for part in text.split(","):
        name, is_named, value = part.partition("=")
        if not is_named:
            name, value = next(iter(_TAKEN[method]), ""), part
        if not name.strip() or not value.strip() or name.strip() in found:
            first = next(iter(_TAKEN[method]), "th_scale")
            raise PlanError(
                "QD502",
                where=where,
                got=f"{text!r} behind {method}",
                expected=f"parameters as {method}:{first}=VALUE"
                + (f" or {method}:VALUE" if _TAKEN[method] else ""),
                mend=f"write one of {', '.join((*_TAKEN[method], *EVERY_METHOD))}, once",
            )
        found[name.strip()] = _number(value.strip())
    return found


def _number(text: str) -> int | float | str:
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


def applicable(method: str, parameters: Mapping[str, Any]) -> dict[str, Any]:
    """Those of the parameters that the method takes: for layers whose method a rule has changed,
    while the parameters were given for the others. Raises QD501."""
    name, _ = resolve(method)
    taken = (*_TAKEN[name], *EVERY_METHOD)
    return {key: value for key, value in parameters.items() if key in taken}


def check_method(
    method: str,
    parameters: Mapping[str, Any] | None = None,
    *,
    where: str = "quantization.saturation",
) -> None:
    """Raise QD501 for an unknown method, QD502 for a parameter that it does not take, QD104 for a
    value that the parameter cannot have."""
    _checked(method, parameters, where=where)


def _checked(
    method: str,
    parameters: Mapping[str, Any] | None,
    *,
    where: str = "quantization.saturation",
) -> tuple[str, dict[str, Any]]:
    name, given = resolve(method, parameters, where=where)
    taken = (*_TAKEN[name], *EVERY_METHOD)
    for key, value in given.items():
        if key not in taken:
            raise PlanError(
                "QD502",
                where=f"method {method}",
                got=f"a parameter {key!r}",
                expected=f"one of {', '.join(taken)}",
                mend="remove it from quantization.saturation_parameters",
            )
        _check_value(key, value)
    return name, given


def _check_value(name: str, value: Any) -> None:
    if name in _CHOICES:
        known = _CHOICES[name]
        fits, expected = value in known, f"one of {', '.join(known)}"
    else:
        low, high = _LIMITS[name]
        kinds = (int,) if isinstance(low, int) else (int, float)
        fits = not isinstance(value, bool) and isinstance(value, kinds) and low <= value <= high
        kind = "an integer" if isinstance(low, int) else "a number"
        expected = f"{kind} from {low} to {high}"
    if not fits:
        raise ConfigError(
            "QD104",
            where=f"quantization.saturation_parameters.{name}",
            got=repr(value),
            expected=expected,
            mend="change it, or remove it for the method's own value",
        )


def find_threshold(
    density: Density,
    levels: Levels,
    method: str,
    parameters: Mapping[str, Any] | None = None,
    consumers: Sequence[Reader] = (),
) -> Threshold:
    """The range that ``method`` chooses for a tensor, under the name of the method really used.

    That is ``max`` for a divergence with no more bins than levels, the chosen one for ``auto``,
    and ``fixed`` with the parameter ``threshold``. ``consumers``: the layers that read the tensor,
    which ``auto`` asks. Raises QD501, QD502, QD104.
    """
    name, given = _checked(method, parameters)
    return _found(density, levels, name, given, consumers)


def find_thresholds(
    densities: Sequence[Density],
    levels: Levels,
    method: str,
    parameters: Mapping[str, Any] | None = None,
) -> tuple[Threshold, ...]:
    """`find_threshold` for many rows, such as the channels of a tensor, in their order.

    What does not depend on the row is done once. ``auto`` judges each row by itself.
    """
    name, given = _checked(method, parameters)
    return tuple(_found(density, levels, name, given, ()) for density in densities)


def _found(
    density: Density,
    levels: Levels,
    name: str,
    parameters: Mapping[str, Any],
    consumers: Sequence[Reader],
) -> Threshold:
    given = dict(parameters)
    factor, bound = given.pop("th_scale", None), given.pop("threshold", None)
    if bound is not None:
        found = fixed_threshold(float(bound), density, levels)
    elif name == "auto":
        chosen = choose(density, levels, consumers)
        found = measured(
            density, chosen.low, chosen.high, levels, method=chosen.method, note=chosen.note
        )
    else:
        if name in _LEVELS:
            bins = given.get("bins", _DEFAULTS[name]["bins"])
            if _LEVELS[name](density, levels) >= bins:
                name, given = "max", {}
        low, high = METHODS[name](density, levels, **given)
        found = measured(density, min(low, 0.0), max(high, 0.0), levels, method=name)
    return found if factor is None else scale_threshold(found, float(factor), density, levels)
