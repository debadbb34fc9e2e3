"""Running ``qdist`` as a user would: in this process where that is sound, else as a process."""

from __future__ import annotations

import io
import os
import subprocess
import sys
from collections.abc import Mapping
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path

from qdist.cli.main import main

CHECKOUT = Path(__file__).resolve().parents[1]


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """How a command ended."""

    status: int
    out: str
    err: str


def here(*words: str) -> Result:
    """Run the command in this process; its working folder and environment are this process's."""
    out, err = io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(err):
        status = main(words)
    return Result(status=status, out=out.getvalue(), err=err.getvalue())


def succeed(*words: str) -> str:
    """`here`, for a command that has to succeed; what it printed."""
    result = here(*words)
    assert result.status == 0, result.err or result.out
    return result.out


def environment(extra: Mapping[str, str] | None = None) -> dict[str, str]:
    """The environment of a `qdist` process that finds the checkout."""
    return {**os.environ, "PYTHONPATH": str(CHECKOUT), "COLUMNS": "300", **(extra or {})}


def command(*words: str) -> list[str]:
    """What starts `qdist` as a process."""
    return [sys.executable, "-m", "qdist.cli", *words]


def process(
    *words: str, cwd: Path, extra: Mapping[str, str] | None = None, timeout_s: float = 90
) -> Result:
    """Run the command as a process of its own."""
    done = subprocess.run(
        command(*words),
        cwd=cwd,
        env=environment(extra),
        capture_output=True,
        text=True,
        timeout=timeout_s,
        check=False,
    )
    return Result(status=done.returncode, out=done.stdout, err=done.stderr)


def check_error(result: Result, code: str, *parts: str) -> None:
    """The command ended with one line that has ``code`` and all ``parts``, and nothing else."""
    assert result.status == 2, result
    assert result.err.startswith(f"error: {code} "), result.err
    assert result.err.count("\n") == 1, result.err
    assert "Traceback" not in result.err + result.out
    for part in parts:
        assert part in result.err, result.err


def left_behind(folder: Path) -> list[str]:
    """Files below ``folder`` that hold results, or halves of them; stores count as one."""
    found = set()
    for path in folder.rglob("*"):
        name = path.relative_to(folder)
        if path.is_file() and ".lock" not in path.name:
            store = next((part for part in name.parents if part.suffix == ".zarr"), None)
            found.add(str(store or name))
    return sorted(found)
