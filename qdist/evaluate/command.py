"""Scoring by a command of the user's own: a script that is given the artifact and gives a number.

How it is contained: the command does not run as our child but under a small *supervisor*, a
Python started with nothing but the standard library, which leads a session of its own, so that
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

import json
import math
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

from qdist.errors import ArtifactError, ConfigError, EvaluationError
from qdist.evaluate.report import (
    LOG_CHARACTERS,
    EvalReport,
    choose_score,
    named_numbers,
    unusable,
)
from qdist.files import make_folder

Read = Literal["auto", "stdout", "metrics.txt", "metrics.json"]

GRACE_S = 2.0
"""Seconds between SIGTERM and SIGKILL."""

_KILL_S = 3.0
"""Seconds that the supervisor has for the last of it, before it is killed with its group."""

_PREFIX = "qdist-evaluation-"
"""How the names of scratch folders begin."""

_SUPERVISOR = """
import ctypes, os, signal, sys, time
parent, grace_s, status_file, *command = sys.argv[1:]
signal.signal(signal.SIGCHLD, signal.SIG_DFL)
signal.signal(signal.SIGTERM, signal.SIG_DFL)
waited = {signal.SIGTERM, signal.SIGCHLD}
signal.pthread_sigmask(signal.SIG_BLOCK, waited)
linux = sys.platform == "linux"
prctl = ctypes.CDLL(None).prctl if linux else None
if linux:
    prctl(1, signal.SIGTERM, 0, 0, 0)  # PR_SET_PDEATHSIG
    prctl(36, 1, 0, 0, 0)  # PR_SET_CHILD_SUBREAPER
if os.getppid() != int(parent):
    os._exit(1)

def report(text):
    with open(status_file, "w") as file:
        file.write(text)

child = os.fork()
if child == 0:
    if linux:
        prctl(1, signal.SIGKILL, 0, 0, 0)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, waited)
    try:
        os.execvp(command[0], command)
    except (OSError, ValueError) as error:
        report("unstarted " + (getattr(error, "strerror", None) or str(error)))
    os._exit(127)

def reap():
    # True once no descendant is left.
    while True:
        try:
            pid, status = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return True
        if pid == 0:
            return False
        ended.add(pid)
        if pid == child and not os.path.exists(status_file):
            report("ended %d" % os.waitstatus_to_exitcode(status))

ended = set()
while child not in ended:
    if signal.sigwaitinfo(waited).si_signo == signal.SIGTERM:
        break
    reap()
if not reap():
    os.killpg(0, signal.SIGTERM)  # blocked here
    deadline = time.monotonic() + float(grace_s)
    while not reap() and time.monotonic() < deadline:
        time.sleep(0.01)
while not reap():
    try:
        with open("/proc/self/task/%d/children" % os.getpid()) as file:
            orphans = [int(pid) for pid in file.read().split()]
    except OSError:  # no such list here: the group, this process included
        os.killpg(0, signal.SIGKILL)
    for pid in orphans:
        try:
            os.kill(pid, signal.SIGKILL)
        except OSError:
            pass
    time.sleep(0.01)
os._exit(0)
"""
"""Arguments: our process id, grace in seconds, the file for the outcome, and the command. The
outcome is "ended CODE" (negative: minus the signal) or "unstarted REASON"."""


class CommandError(EvaluationError):
    """A command that failed. ``log`` is the tail of its output, at most `LOG_CHARACTERS`."""

    def __init__(
        self, code: str, *, where: str, got: str, expected: str, mend: str, log: str = ""
    ) -> None:
        super().__init__(code, where=where, got=got, expected=expected, mend=mend)
        self.log = log

    def __reduce__(self) -> tuple[Any, ...]:
        names = ("where", "got", "expected", "mend", "log")
        return _rebuild, (self.code, {name: getattr(self, name) for name in names})


def _rebuild(code: str, fields: dict[str, str]) -> CommandError:
    return CommandError(code, **fields)


@dataclass(frozen=True, slots=True, kw_only=True)
class CommandEvaluation:
    """A command that scores one artifact. Safe to run in parallel: every run has its own folder.

    command: the program and its arguments, in which ``{model}`` stands for the artifact's path
        and ``{work}`` for the scratch folder. The program also finds them in the environment, as
        QDIST_MODEL and QDIST_WORK. Other braces are left as they are.
    shell: join the command with spaces and give it to /bin/sh; the two paths come quoted.
    folder: the user's evaluation folder; each run works in a copy of it. Links that lead out of
        it still do, so a data set belongs outside, or behind a link. None: an empty folder.
    timeout_s: wall-clock seconds after which the command and all it started are ended.
    read: where the result is. "auto": metrics.json if the run wrote it, else metrics.txt (its
        first line), else the last line of stdout. A line is a number, ``name: number``,
        ``name=number`` or a JSON object of named numbers.
    metric: which of several named numbers is the score; None when there is only one.
    environment: variables set for the command, beside those of this process.
    keep: leave the scratch folder in place.

    Raises `qdist.errors.ConfigError` QD104 or QD105 for values that cannot be run.
    """

    command: tuple[str, ...]
    timeout_s: float
    higher_is_better: bool
    folder: Path | None = None
    read: Read = "auto"
    metric: str | None = None
    environment: Mapping[str, str] = field(default_factory=dict)
    shell: bool = False
    keep: bool = False

    def __post_init__(self) -> None:
        if not any(part.strip() for part in self.command[:1]):
            raise ConfigError(
                "QD105",
                where="evaluation command",
                got=repr(self.command),
                expected="a program and its arguments",
                mend="give the command as a list, for example [python, evaluate.py, '{model}']",
            )
        if self.read not in get_args(Read):
            raise ConfigError(
                "QD104",
                where="evaluation command: read",
                got=repr(self.read),
                expected=f"one of {', '.join(get_args(Read))}",
                mend="choose one of these",
            )
        if not (math.isfinite(self.timeout_s) and self.timeout_s > 0):
            raise ConfigError(
                "QD104",
                where="evaluation command: timeout_s",
                got=repr(self.timeout_s),
                expected="seconds above 0",
                mend="give the longest time that one evaluation may take",
            )
        object.__setattr__(self, "environment", dict(self.environment))

    def run(self, model_path: Path, scratch_root: Path) -> EvalReport:
        """Score one artifact, working in a new folder below ``scratch_root``.

        Raises `qdist.errors.ArtifactError` QD604 (no such artifact) or QD603 (``scratch_root``
        cannot be written), and `CommandError`: QD707 it cannot be started, QD702 it failed,
        QD703 it ran out of time, QD704 it gave no usable metric. Whatever is raised,
        `KeyboardInterrupt` included, no process that the command started is left.
        """
        if not model_path.exists():
            raise ArtifactError(
                "QD604",
                where=str(model_path),
                got="no such file",
                expected="the artifact to evaluate",
                mend="emit it first, or correct the path",
            )
        root = make_folder(scratch_root).resolve()
        trial = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=root))
        try:
            work = self._copy_folder(trial / "work", root)
            seconds = self._execute(model_path.absolute(), trial, work)
            log = _log(trial)
            try:
                name, numbers = choose_score(self._numbers(trial, work), self.metric, self._where)
            except EvaluationError as error:
                raise self._failed(
                    error.code, got=error.got, expected=error.expected, mend=error.mend, log=log
                ) from None
            return EvalReport(
                score=numbers[name],
                metric=name,
                higher_is_better=self.higher_is_better,
                metrics=numbers,
                n_samples=None,
                seconds=seconds,
                log=log,
            )
        finally:
            if not self.keep:
                shutil.rmtree(trial, ignore_errors=True)

    def _copy_folder(self, work: Path, root: Path) -> Path:
        """The working folder: a copy of the user's, without results of earlier runs."""
        if self.folder is None:
            work.mkdir()
            return work

        def ours(folder: str, names: list[str]) -> set[str]:
            # The scratch folders may lie somewhere in the user's folder.
            return {name for name in names if Path(folder) == root and name.startswith(_PREFIX)}

        source = self.folder.expanduser().resolve()
        try:
            shutil.copytree(source, work, symlinks=True, ignore=ours)
            _mend_copy(source, work)
            for name in ("metrics.txt", "metrics.json"):
                (work / name).unlink(missing_ok=True)
        except OSError as error:
            raise self._failed(
                "QD707",
                got=f"folder {source}: {error.strerror or error}",
                expected="an evaluation folder that can be copied",
                mend="correct the folder's path or its permissions",
            ) from error
        return work

    def _execute(self, model: Path, trial: Path, work: Path) -> float:
        """Run the command to its end, and give the seconds it took."""
        paths = {"model": str(model), "work": str(work)}
        outcome = trial / "outcome"
        supervisor = [sys.executable, "-I", "-S", "-c", _SUPERVISOR]
        argv = [*supervisor, str(os.getpid()), str(GRACE_S), str(outcome), *self._argv(paths)]
        variables = {"QDIST_MODEL": paths["model"], "QDIST_WORK": paths["work"]}
        started = time.monotonic()
        # To files: a pipe would have to be drained into memory, and blocks when it is not.
        with (trial / "stdout").open("wb") as out, (trial / "stderr").open("wb") as err:
            try:
                process = subprocess.Popen(
                    argv,
                    cwd=work,
                    env={**os.environ, **self.environment, **variables},
                    stdin=subprocess.DEVNULL,
                    stdout=out,
                    stderr=err,
                    start_new_session=True,
                )
            except (OSError, ValueError) as error:
                raise self._unstarted(str(error)) from error
        late = False
        try:
            process.wait(self.timeout_s)
        except subprocess.TimeoutExpired:
            late = not outcome.exists()  # else only what it left behind is still ending
        finally:
            _end(process)
        if late:
            raise self._failed(
                "QD703",
                got=f"no end after {self.timeout_s:g} s",
                expected="an end within timeout_s",
                mend="raise timeout_s, or evaluate fewer samples",
                log=_log(trial),
            )
        self._check(outcome, trial)
        return time.monotonic() - started

    def _argv(self, paths: Mapping[str, str]) -> list[str]:
        quote = shlex.quote if self.shell else str

        def fill(part: str) -> str:
            return re.sub(r"\{(model|work)\}", lambda found: quote(paths[found[1]]), part)

        parts = [fill(part) for part in self.command]
        return ["/bin/sh", "-c", " ".join(parts)] if self.shell else parts

    def _check(self, outcome: Path, trial: Path) -> None:
        """Raise unless the command started, and ended with status 0."""
        text = outcome.read_text() if outcome.exists() else ""
        kind, _, detail = text.partition(" ")
        if kind == "unstarted":
            raise self._unstarted(detail)
        if kind == "ended" and detail == "0":
            return
        status = _status(int(detail)) if kind == "ended" else "its supervisor was killed"
        said = _last_line(trial / "stderr") or _last_line(trial / "stdout")
        raise self._failed(
            "QD702",
            got=f"{status}; its last line: {said!r}" if said else f"{status}, and no output",
            expected="exit status 0",
            mend="run the command by hand; SIGKILL often means that memory ran out",
            log=_log(trial),
        )

    def _numbers(self, trial: Path, work: Path) -> dict[str, float]:
        """The named numbers that the run gave. Raises QD704 when there are none."""
        place = self.read
        if place == "auto":
            written = [name for name in ("metrics.json", "metrics.txt") if (work / name).is_file()]
            place = "metrics.json" if "metrics.json" in written else "stdout"
            place = "metrics.txt" if written == ["metrics.txt"] else place
        if place == "stdout":
            text = _last_line(trial / "stdout")
        elif (work / place).is_file():
            text = _head(work / place, whole=place == "metrics.json")
        else:
            raise unusable(
                self._where,
                got=f"no file {place} in the working folder",
                expected="the file with the metric",
                mend=f"write {place} to the current folder, not to a fixed path: each run works "
                "in a copy of the evaluation folder",
            )
        numbers = parse_numbers(text)
        if not numbers:
            raise unusable(
                self._where,
                got=f"{text[:200]!r} from {place}",
                expected="a number, 'name: number', 'name=number' or a JSON object of numbers",
                mend="let the last line of stdout or the first of metrics.txt be the metric",
            )
        return numbers

    @property
    def _where(self) -> str:
        return f"command {shlex.join(self.command)}"

    def _unstarted(self, reason: str) -> CommandError:
        return self._failed(
            "QD707",
            got=f"{self.command[0]}: {reason}",
            expected="a program that can be run",
            mend="check its name and its x permission; a program in the evaluation folder is "
            "named with ./ in front",
        )

    def _failed(
        self, code: str, *, got: str, expected: str, mend: str, log: str = ""
    ) -> CommandError:
        return CommandError(code, where=self._where, got=got, expected=expected, mend=mend, log=log)


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


def _mend_copy(source: Path, work: Path) -> None:
    """Give the links in a copied folder their meaning back, and make its folders writable."""
    for folder, folders, files in os.walk(work):
        os.chmod(folder, os.stat(folder).st_mode | 0o700)
        for name in (*folders, *files):
            link = Path(folder, name)
            if not link.is_symlink():
                continue
            place = source / link.relative_to(work)
            target = Path(os.path.normpath(place.parent / os.readlink(place)))
            if target.is_relative_to(source):  # within the folder: to the copy
                target = work / target.relative_to(source)
            link.unlink()
            link.symlink_to(target)


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


def _status(code: int) -> str:
    names = {number.value: number.name for number in signal.Signals}
    if code < 0:
        return f"killed by {names.get(-code, f'signal {-code}')}"
    hint = f" (in a shell, {names[code - 128]})" if code - 128 in names else ""
    return f"exit status {code}{hint}"


def _tail(path: Path, characters: int) -> str:
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - 4 * characters))  # UTF-8: 4 bytes at most
        return file.read().decode("utf-8", "replace")[-characters:]


def _last_line(path: Path) -> str:
    lines = [line.strip() for line in _tail(path, 1 << 16).splitlines() if line.strip()]
    return lines[-1] if lines else ""


def _head(path: Path, *, whole: bool) -> str:
    """The text of a result file, or its first line that is not empty."""
    with path.open("rb") as file:
        text = file.read(1 << 20).decode("utf-8-sig", "replace")
    return text if whole else next((line for line in text.splitlines() if line.strip()), "")


def _log(trial: Path) -> str:
    """The tails of both outputs, stderr last; half of the room is for each if they need it."""
    err = _tail(trial / "stderr", LOG_CHARACTERS)
    out = _tail(trial / "stdout", LOG_CHARACTERS)
    err = err[-max(LOG_CHARACTERS // 2, LOG_CHARACTERS - len(out)) :]
    return (out + err)[-LOG_CHARACTERS:]
