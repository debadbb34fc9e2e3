"""Vendors' searches, made from ``search.options``."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from qdist.errors import ConfigError
from qdist.search.icraft import Icraft, Target
from qdist.search.icraft_config import TARGETS, from_table, read
from qdist.search.icraft_ladders import CHIPS
from qdist.search.problem import SearchProblem
from qdist.search.settings import SearchSettings
from qdist.search.slimai import SmartSearch, parse
from qdist.search.trial import Strategy

_WHERE = "search.options"


def icraft(problem: SearchProblem, settings: SearchSettings) -> Strategy:
    """Icraft's search. Options: ``chip`` (``buyi`` or ``zhuge``), and either ``config``, the path
    of the vendor's file, or the keys that it has.

    The target is that of the file or the keys; where these name none, ``search.target`` on the
    score, and with neither there is none. There are no more than ``search.max_trials`` trials.
    Raises QD104, QD107 and as `icraft_config.read`.
    """
    options = dict(settings.options)
    chip = options.pop("chip", "buyi")
    if chip not in CHIPS:
        raise _refuse("QD104", f"{_WHERE}.chip", repr(chip), " or ".join(CHIPS))
    if settings.max_trials < 2:
        raise _refuse("QD104", "search.max_trials", "1", "at least 2: the plain plan and a round")
    if "config" in options:
        path = Path(str(options.pop("config"))).expanduser()
        if options:
            raise _refuse("QD107", _WHERE, f"{', '.join(options)} beside config", "one of the two")
        found = read(path, chip).settings
    else:
        found = from_table(options, _WHERE, chip).settings
        if not set(options) & set(TARGETS):
            goal = settings.target
            target = None if goal is None else Target(measure="score", value=goal)
            found = replace(found, target=target)
    n_rounds = min(found.round_num, settings.max_trials - 1)
    return Icraft(problem, replace(found, round_num=n_rounds))


def smart_search(problem: SearchProblem, settings: SearchSettings) -> Strategy:
    """SlimAI's search. Options: ``accuracy_level`` (a number, or several as a list or ``0,1``) and
    ``range`` (``96:99:1``), as its cfg has them. Raises QD102, QD104, QD105."""
    _check_keys(settings.options, ("accuracy_level", "range"))
    lines = [f"{key} = {_listed(value)}" for key, value in settings.options.items()]
    text = "\n".join(["[quantization]", *lines])
    return SmartSearch(problem, parse(text, _WHERE, max_trials=settings.max_trials))


def _listed(value: Any) -> str:
    return ",".join(map(str, value)) if isinstance(value, list | tuple) else str(value)


def _check_keys(options: Mapping[str, Any], known: Collection[str]) -> None:
    for key in options:
        if key not in known:
            raise _refuse("QD102", f"{_WHERE}.{key}", repr(key), ", ".join(known))


def _refuse(code: str, where: str, got: str, expected: str) -> ConfigError:
    return ConfigError(code, where=where, got=got, expected=expected, mend="correct it there")
