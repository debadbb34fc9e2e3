"""A user's command, contained: whatever happens, no process that it started is left.

The command does not run as our child but under a small *supervisor* (`qdist.evaluate.supervisor`),
a Python started with nothing but the standard library, which leads a session of its own, so that
no signal of the terminal reaches the command twice. The kernel sends the supervisor SIGTERM when
the thread that started it dies (``PR_SET_PDEATHSIG``), even by SIGKILL, and hands it every
orphaned descendant (``PR_SET_CHILD_SUBREAPER``), even one that left the process group. On SIGTERM,
from us or from the kernel, and also when the command ends and leaves processes behind, it ends
them all: SIGTERM to the group, `GRACE_S` seconds, then SIGKILL to every descendant.

Why not ``preexec_fn``: it runs Python between fork and exec in a process that may have other
threads, as Ray's workers do, and deadlocks on any lock that one of those held. And the setting
covers only the process that makes it: the children of a shell script would live on.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

GRACE_S = 2.0
"""Seconds between SIGTERM and SIGKILL."""

_KILL_S = 3.0
"""Seconds that the supervisor has for the last of it, before it is killed with its group."""

_SUPERVISOR = Path(__file__).resolve().with_name("supervisor.py")


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """How a command ended.

    kind: "ended" (with ``code``, its exit status, or minus the signal that killed it), "late" (it
        was ended after its time), "unstarted" (for ``reason``), or "lost" (its supervisor was
        killed).
    seconds: wall-clock time.
    """

    kind: Literal["ended", "late", "unstarted", "lost"]
    seconds: float
    code: int = 0
    reason: str = ""

    def __str__(self) -> str:
        """In words, for a command that did start."""
        if self.kind != "ended":
            return "its supervisor was killed" if self.kind == "lost" else self.kind
        names = {number.value: number.name for number in signal.Signals}
        if self.code < 0:
            return f"killed by {names.get(-self.code, f'signal {-self.code}')}"
        hint = f" (in a shell, {names[self.code - 128]})" if self.code - 128 in names else ""
        return f"exit status {self.code}{hint}"


def run_supervised(
    command: Sequence[str],
    *,
    folder: Path,
    work: Path,
    environment: Mapping[str, str],
    timeout_s: float,
) -> Outcome:
    """Run ``command`` in ``work`` to its end, or for ``timeout_s`` seconds.

    Its output goes to the files ``stdout`` and ``stderr`` in ``folder``. Whatever is raised,
    `KeyboardInterrupt` included, no process that the command started is left.
    """
    file = folder / "outcome"
    argv = [sys.executable, "-I", "-S", str(_SUPERVISOR), str(os.getpid()), str(GRACE_S), str(file)]
    started = time.monotonic()
    # To files: a pipe would have to be drained into memory, and blocks when it is not.
    with (folder / "stdout").open("wb") as out, (folder / "stderr").open("wb") as err:
        try:
            process = subprocess.Popen(
                [*argv, *command],
                cwd=work,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=err,
                start_new_session=True,
            )
        except (OSError, ValueError) as error:
            return Outcome(kind="unstarted", seconds=0.0, reason=str(error))
    late = False
    try:
        process.wait(timeout_s)
    except subprocess.TimeoutExpired:
        late = not file.exists()  # else only what it left behind is still ending
    finally:
        _end(process)
    seconds = time.monotonic() - started
    return Outcome(kind="late", seconds=seconds) if late else _read_outcome(file, seconds)


def _read_outcome(file: Path, seconds: float) -> Outcome:
    """What the supervisor wrote."""
    kind, _, detail = (file.read_text() if file.exists() else "").partition(" ")
    if kind == "unstarted":
        return Outcome(kind="unstarted", seconds=seconds, reason=detail)
    if kind == "ended":
        return Outcome(kind="ended", seconds=seconds, code=int(detail))
    return Outcome(kind="lost", seconds=seconds)


def _end(process: subprocess.Popen[bytes]) -> None:
    """End a supervisor, and with it everything that it started. Returns once it is gone."""
    try:
        if process.poll() is None:
            process.terminate()
            process.wait(GRACE_S + _KILL_S)
    except subprocess.TimeoutExpired:
        pass
    finally:  # also when a second Ctrl-C cuts the wait short
        if process.poll() != 0:  # it did not finish its work: the group is left to us
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
