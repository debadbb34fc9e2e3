"""What a command's run left: its numbers, and its output."""

from __future__ import annotations

import json
import re
from contextlib import suppress
from pathlib import Path
from typing import Literal

from qdist.evaluate.evaluation_run import LOG_CHARACTERS
from qdist.evaluate.report import named_numbers, unusable

Read = Literal["auto", "stdout", "metrics.txt", "metrics.json"]
"""Where the numbers are; see `qdist.evaluate.command.CommandEvaluation`."""

RESULT_FILES = ("metrics.txt", "metrics.json")


def read_numbers(read: Read, *, trial: Path, work: Path, where: str) -> dict[str, float]:
    """The named numbers that a run gave in the folder ``work`` or on ``trial / "stdout"``.

    Raises `qdist.errors.EvaluationError` QD704 when there are none.
    """
    place = _place(work) if read == "auto" else read
    if place == "stdout":
        text = last_line(trial / "stdout")
    elif (work / place).is_file():
        text = _head(work / place, whole=place == "metrics.json")
    else:
        raise unusable(
            where,
            got=f"no file {place} in the working folder",
            expected="the file with the metric",
            mend=f"write {place} to the current folder, not to a fixed path: each run works "
            "in a copy of the evaluation folder",
        )
    numbers = parse_numbers(text)
    if not numbers:
        raise unusable(
            where,
            got=f"{text[:200]!r} from {place}",
            expected="a number, 'name: number', 'name=number' or a JSON object of numbers",
            mend="let the last line of stdout or the first of metrics.txt be the metric",
        )
    return numbers


def _place(work: Path) -> Read:
    if (work / "metrics.json").is_file():
        return "metrics.json"
    return "metrics.txt" if (work / "metrics.txt").is_file() else "stdout"


def parse_numbers(text: str) -> dict[str, float]:
    """The named numbers in a line (or a JSON text); a bare number is keyed ``score``.

    >>> parse_numbers("top1: 0.75"), parse_numbers("0.5"), parse_numbers('{"a": 1, "b": "x"}')
    ({'top1': 0.75}, {'score': 0.5}, {'a': 1.0})
    """
    with suppress(ValueError, RecursionError):
        return named_numbers(json.loads(text))
    with suppress(ValueError):
        return named_numbers(float(text))
    named = re.fullmatch(r"\s*(.*\S)\s*[:=]\s*(\S+)\s*", text)
    if named:
        with suppress(ValueError):
            return {named[1]: float(named[2])}
    return {}


def _tail(path: Path, characters: int) -> str:
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - 4 * characters))  # UTF-8: 4 bytes at most
        return file.read().decode("utf-8", "replace")[-characters:]


def last_line(path: Path) -> str:
    lines = [line.strip() for line in _tail(path, 1 << 16).splitlines() if line.strip()]
    return lines[-1] if lines else ""


def _head(path: Path, *, whole: bool) -> str:
    """The text of a result file, or its first line that is not empty."""
    with path.open("rb") as file:
        text = file.read(1 << 20).decode("utf-8-sig", "replace")
    return text if whole else next((line for line in text.splitlines() if line.strip()), "")


def read_log(trial: Path) -> str:
    """The tails of both outputs, stderr last; half of the room is for each if they need it."""
    err = _tail(trial / "stderr", LOG_CHARACTERS)
    out = _tail(trial / "stdout", LOG_CHARACTERS)
    err = err[-max(LOG_CHARACTERS // 2, LOG_CHARACTERS - len(out)) :]
    return (out + err)[-LOG_CHARACTERS:]
