"""Icraft's ``quant_autotune_config.toml``, read into our settings."""

from __future__ import annotations

import shlex
import tomllib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

from qdist.errors import ConfigError
from qdist.search.icraft import PRIORITIES, IcraftSettings, Target

TABLE = "AutoTune"
TARGETS: dict[str, str] = {
    "cos_targetvalue": "cosine",
    "dis_targetvalue": "relative_l2",
    "mae_targetvalue": "mae",
    "mse_targetvalue": "mse",
    "metrics_targetvalue": "score",
}
"""The vendor's key -> our measure."""
IDLE: dict[str, str] = {"skip_comfirm": "no search here asks before it starts"}
"""Keys that are read and have no effect -> why."""


@dataclass(frozen=True, slots=True, kw_only=True)
class IcraftConfig:
    """What the file comes to. ``folder`` and ``command``: of the evaluation script, whose first
    line of ``metrics.txt`` is the score; empty without one. ``notes``: what had no effect."""

    settings: IcraftSettings
    folder: str = ""
    command: str = ""
    notes: tuple[str, ...] = ()

    @property
    def words(self) -> tuple[str, ...]:
        """The command as a list of words, for a start without a shell."""
        return tuple(shlex.split(self.command))


def read(path: Path, chip: str) -> IcraftConfig:
    """The settings of a file, for a chip of `icraft_ladders.CHIPS`.

    Raises QD106 for a file that cannot be read or is no TOML, and as `parse`.
    """
    try:
        text = path.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            "QD106",
            where=str(path),
            got=str(error),
            expected="a file that this user can read, in UTF-8",
            mend="check search.config",
        ) from error
    return parse(text, str(path), chip)


def parse(text: str, file: str, chip: str) -> IcraftConfig:
    """The same from its text. Raises QD106 for what is no TOML or has no table ``AutoTune``, QD102
    for an unknown key, QD104 for a value out of range, QD105 for a score as target without a
    script, QD107 for more than one target."""
    try:
        # A byte-order mark is what Windows editors leave.
        tables = tomllib.loads(text.removeprefix("\ufeff"))
    except tomllib.TOMLDecodeError as error:
        raise _refuse("QD106", file, str(error), "TOML", "correct the file there") from error
    table = tables.get(TABLE)
    if not isinstance(table, Mapping):
        raise _refuse("QD106", file, f"tables {list(tables)}", f"[{TABLE}]", "add this table")
    return from_table(table, file, chip)


def from_table(table: Mapping[str, Any], file: str, chip: str) -> IcraftConfig:
    """The same from the keys of the table, that ``file`` is named for. Raises as `parse`."""
    known = (*_KEYS, *TARGETS, *IDLE)
    for key in table:
        if key not in known:
            raise _refuse("QD102", f"{file}, {key}", repr(key), ", ".join(known), "leave it out")
    values = {key: _checked(file, key, value) for key, value in table.items()}
    target = _target(file, values)
    folder, command = values.get("evalscript_path", ""), values.get("evalscript_cmd", "")
    if bool(folder) != bool(command) or (target.measure == "score" and not command):
        missing = "evalscript_path" if not folder else "evalscript_cmd"
        raise _refuse(
            "QD105",
            f"{file}, {missing}",
            "nothing",
            "the script's folder and its command",
            "add it",
        )
    settings = IcraftSettings(
        priority=values.get("priority", "accuracy"),
        chip=chip,
        threshold_level=values.get("threshold_level", 1),
        round_num=values.get("round_num", 50),
        float_cal=bool(values.get("float_cal", 0)),
        target=target,
    )
    notes = [f"{file}: {key} has no effect: {why}" for key, why in IDLE.items() if key in values]
    if "threshold_level" in values and settings.priority != "accuracy":
        notes.append(f"{file}: threshold_level has no effect: priority is {settings.priority}")
    if values.get("float_cal") and chip != "buyi":
        notes.append(f"{file}: float_cal has no effect: it is about Buyi, and the chip is {chip}")
    return IcraftConfig(settings=settings, folder=folder, command=command, notes=tuple(notes))


def render(config: IcraftConfig) -> str:
    """The text of a file that reads as ``config``; its notes left out."""
    settings = config.settings
    target = settings.target
    lines = [
        f"[{TABLE}]",
        f'priority = "{settings.priority}"',
        f"threshold_level = {settings.threshold_level}",
        f"round_num = {settings.round_num}",
        f"float_cal = {int(settings.float_cal)}",
    ]
    if target is not None:
        key = next(key for key, measure in TARGETS.items() if measure == target.measure)
        lines.append(f"{key} = {target.value!r}")
    if config.command:
        lines.append(f"evalscript_path = {_quoted(config.folder)}")
        lines.append(f"evalscript_cmd = {_quoted(config.command)}")
    return "\n".join(lines) + "\n"


def _target(file: str, values: Mapping[str, Any]) -> Target:
    found = [key for key in TARGETS if key in values]
    if len(found) > 1:
        raise _refuse(
            "QD107", file, " and ".join(found), "at most one target", "leave the others out"
        )
    if not found:
        return Target(measure="cosine", value=0.99)
    return Target(measure=TARGETS[found[0]], value=float(values[found[0]]))


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    return _is_int(value) or (isinstance(value, float) and abs(value) < float("inf"))


_Check: TypeAlias = tuple[Callable[[Any], bool], str]
_FLAG: _Check = (lambda v: _is_int(v) and v in (0, 1), "0 or 1")
_SHARE: _Check = (
    lambda v: _is_number(v) and 0 <= v <= 1,
    "a number from 0 to 1",
)
_TEXT: _Check = (lambda v: isinstance(v, str), "a string")
_KEYS: dict[str, _Check] = {
    "priority": (lambda v: v in PRIORITIES, ", ".join(PRIORITIES)),
    "threshold_level": (lambda v: _is_int(v) and v in (1, 2, 3), "1, 2 or 3"),
    "round_num": (lambda v: _is_int(v) and v >= 1, "an integer of at least 1"),
    "float_cal": _FLAG,
    "evalscript_path": _TEXT,
    "evalscript_cmd": _TEXT,
}


def _checked(file: str, key: str, value: Any) -> Any:
    check: _Check
    if key == "metrics_targetvalue":
        check = _is_number, "a number"
    else:
        check = _SHARE if key in TARGETS else _KEYS.get(key, _FLAG)
    fits, expected = check
    if not fits(value):
        raise _refuse("QD104", f"{file}, {key}", repr(value), expected, "correct the file there")
    return value


def _quoted(text: str) -> str:
    """A TOML basic string."""
    marks = {'"': '\\"', "\\": "\\\\"}
    return (
        '"'
        + "".join(
            marks.get(c) or (f"\\u{ord(c):04x}" if ord(c) < 32 or ord(c) == 127 else c)
            for c in text
        )
        + '"'
    )


def _refuse(code: str, where: str, got: str, expected: str, mend: str) -> ConfigError:
    return ConfigError(code, where=where, got=got, expected=expected, mend=mend)
