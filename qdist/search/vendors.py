"""Vendors' searches, made from ``search.options``."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

from qdist.errors import ConfigError
from qdist.search.icraft import Icraft, IcraftSettings, Target
from qdist.search.icraft_config import TARGETS, from_table, read
from qdist.search.icraft_ladders import CHIPS
from qdist.search.knight import KnightSettings, Sweep
from qdist.search.problem import SearchProblem
from qdist.search.settings import SearchSettings
from qdist.search.slimai import SmartSearch, parse
from qdist.search.trial import Strategy

_WHERE = "search.options"
T = TypeVar("T")


def icraft(problem: SearchProblem, settings: SearchSettings) -> Strategy:
    """Icraft's search. Options: ``chip`` (``buyi`` or ``zhuge``), and either ``config``, the path
    of the vendor's file, or the keys that it has.

    The target is that of the file or the keys; where these name none, ``search.target`` on the
    score, and with neither there is none. There are no more than ``search.max_trials`` trials.
    Raises QD104, QD107 and as `icraft_config.read`.
    """
    if settings.max_trials < 2:
        raise _refuse("QD104", "search.max_trials", "1", "at least 2: the plain plan and a round")
    found = icraft_settings(settings.options)
    if "config" not in settings.options and not set(settings.options) & set(TARGETS):
        goal = settings.target
        target = None if goal is None else Target(measure="score", value=goal)
        found = replace(found, target=target)
    n_rounds = min(found.round_num, settings.max_trials - 1)
    return Icraft(problem, replace(found, round_num=n_rounds))


def icraft_settings(options: Mapping[str, Any]) -> IcraftSettings:
    """What the options of Icraft's search come to. Raises QD104, QD107 and as
    `icraft_config.read`."""
    left = dict(options)
    chip = left.pop("chip", "buyi")
    if chip not in CHIPS:
        raise _refuse("QD104", f"{_WHERE}.chip", repr(chip), " or ".join(CHIPS))
    if "config" not in left:
        return from_table(left, _WHERE, chip).settings
    path = Path(str(left.pop("config"))).expanduser()
    if left:
        raise _refuse("QD107", _WHERE, f"{', '.join(left)} beside config", "one of the two")
    return read(path, chip).settings


def smart_search(problem: SearchProblem, settings: SearchSettings) -> Strategy:
    """SlimAI's search. Options: ``accuracy_level`` (a number, or several as a list or ``0,1``) and
    ``range`` (``96:99:1``), as its cfg has them. Raises QD102, QD104, QD105."""
    _check_keys(settings.options, ("accuracy_level", "range"))
    lines = [f"{key} = {_listed(value)}" for key, value in settings.options.items()]
    text = "\n".join(["[quantization]", *lines])
    return SmartSearch(problem, parse(text, _WHERE, max_trials=settings.max_trials))


def knight(problem: SearchProblem, settings: SearchSettings) -> Strategy:
    """Knight's sweep. Options: ``modes`` (of the vendor's quant-mode, or ``all``), ``iterations``
    (a list), ``batch_size`` and ``percent`` (0..1), as its command line has them. Raises QD102,
    QD104."""
    options = dict(settings.options)
    _check_keys(options, ("modes", "iterations", "batch_size", "percent"))
    for key in ("modes", "iterations"):
        if key in options:
            given = options[key]
            options[key] = tuple(given if isinstance(given, list | tuple) else (given,))
    return Sweep(problem, _made(KnightSettings, {**options, "max_trials": settings.max_trials}))


def optuna(problem: SearchProblem, settings: SearchSettings) -> Strategy:
    """Optuna's study. Options: ``sampler`` (``tpe``, ``nsga2``), ``storage``, ``seed``,
    ``round_size``, and what is searched: ``saturations``, ``granularities``, ``percent`` (least and
    largest), ``bins``, ``n_samples``, ``smoothing`` (least and largest). Raises QD102, QD104,
    QD107."""
    from qdist.search.optuna_study import Space, Study, StudySettings

    options = dict(settings.options)
    own = ("sampler", "storage", "seed", "round_size")
    searched = ("saturations", "granularities", "percent", "bins", "n_samples", "smoothing")
    _check_keys(options, (*own, *searched))
    space = {key: tuple(options.pop(key)) for key in searched if key in options}
    made = _made(
        StudySettings,
        {**options, "space": _made(Space, space), "max_trials": settings.max_trials},
    )
    return Study(problem, made)


def _made(kind: Callable[..., T], values: Mapping[str, Any]) -> T:
    """The settings. Raises QD104 for values that they cannot have."""
    try:
        return kind(**values)
    except (TypeError, ValueError) as error:
        raise _refuse(
            "QD104", _WHERE, str(error), "values as docs/search-vendors.md has them"
        ) from error


def _listed(value: Any) -> str:
    return ",".join(map(str, value)) if isinstance(value, list | tuple) else str(value)


def _check_keys(options: Mapping[str, Any], known: Collection[str]) -> None:
    for key in options:
        if key not in known:
            raise _refuse("QD102", f"{_WHERE}.{key}", repr(key), ", ".join(known))


def _refuse(code: str, where: str, got: str, expected: str) -> ConfigError:
    return ConfigError(code, where=where, got=got, expected=expected, mend="correct it there")
