"""Scoring by a command of the user's own: a script that is given the artifact and gives a number.

Every run works in a folder of its own, and its processes are contained by
`qdist.evaluate.supervised`.
"""

from __future__ import annotations

import math
import os
import re
import shlex
import shutil
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args

from qdist.errors import ArtifactError, ConfigError, EvaluationError
from qdist.evaluate.evaluation_run import EvaluationRun
from qdist.evaluate.folder import copy_folder
from qdist.evaluate.report import EvalReport, choose_score
from qdist.evaluate.result import Read, last_line, read_log, read_numbers
from qdist.evaluate.supervised import run_supervised
from qdist.files import make_folder

_PREFIX = "qdist-evaluation-"
"""How the names of scratch folders begin."""


class CommandError(EvaluationError):
    """A command that failed. ``run``: how it went."""

    def __init__(
        self, code: str, *, where: str, got: str, expected: str, mend: str, run: EvaluationRun
    ) -> None:
        super().__init__(code, where=where, got=got, expected=expected, mend=mend)
        self.run = run

    def __reduce__(self) -> tuple[Any, ...]:
        names = ("where", "got", "expected", "mend", "run")
        return _rebuild, (self.code, {name: getattr(self, name) for name in names})


def _rebuild(code: str, fields: dict[str, Any]) -> CommandError:
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
            run = self._execute(model_path.absolute(), trial, work)
            return self._report(trial, work, run)
        finally:
            if not self.keep:
                shutil.rmtree(trial, ignore_errors=True)

    def _report(self, trial: Path, work: Path, run: EvaluationRun) -> EvalReport:
        try:
            found = read_numbers(self.read, trial=trial, work=work, where=self._where)
            name, numbers = choose_score(found, self.metric, self._where)
        except EvaluationError as error:
            raise self._failed(
                error.code, got=error.got, expected=error.expected, mend=error.mend, run=run
            ) from None
        return EvalReport(
            score=numbers[name],
            metric=name,
            higher_is_better=self.higher_is_better,
            metrics=numbers,
            n_samples=None,
            seconds=run.seconds,
            log=run.output_tail,
            exit_status=run.exit_status,
        )

    def _copy_folder(self, work: Path, root: Path) -> Path:
        """The working folder: a copy of the user's, without results of earlier runs."""
        if self.folder is None:
            work.mkdir()
            return work

        def is_ours(path: Path) -> bool:
            # The scratch folders may lie somewhere in the user's folder.
            return path.parent == root and path.name.startswith(_PREFIX)

        source = self.folder.expanduser().resolve()
        try:
            copy_folder(source, work, leave_out=is_ours)
        except OSError as error:
            raise self._failed(
                "QD707",
                got=f"folder {source}: {error.strerror or error}",
                expected="an evaluation folder that can be copied",
                mend="correct the folder's path or its permissions",
            ) from error
        return work

    def _execute(self, model: Path, trial: Path, work: Path) -> EvaluationRun:
        """Run the command to its end. Raises `CommandError` unless its exit status is 0."""
        paths = {"model": str(model), "work": str(work)}
        variables = {"QDIST_MODEL": paths["model"], "QDIST_WORK": paths["work"]}
        outcome = run_supervised(
            self._argv(paths),
            folder=trial,
            work=work,
            environment={**_own_python_first(), **self.environment, **variables},
            timeout_s=self.timeout_s,
        )
        if outcome.kind == "unstarted":
            raise self._unstarted(outcome.reason)
        run = EvaluationRun(
            exit_status=outcome.code if outcome.kind == "ended" else None,
            seconds=outcome.seconds,
            output_tail=read_log(trial),
        )
        if outcome.kind == "late":
            raise self._failed(
                "QD703",
                got=f"no end after {self.timeout_s:g} s",
                expected="an end within timeout_s",
                mend="raise timeout_s, or evaluate fewer samples",
                run=run,
            )
        if outcome.kind == "lost" or outcome.code != 0:
            said = last_line(trial / "stderr") or last_line(trial / "stdout")
            raise self._failed(
                "QD702",
                got=f"{outcome}; its last line: {said!r}" if said else f"{outcome}, and no output",
                expected="exit status 0",
                mend="run it by hand; evaluation.keep=true keeps its working folder, which is a "
                "copy of evaluation.folder and not the current folder",
                run=run,
            )
        return run

    def _argv(self, paths: Mapping[str, str]) -> list[str]:
        quote = shlex.quote if self.shell else str

        def fill(part: str) -> str:
            return re.sub(r"\{(model|work)\}", lambda found: quote(paths[found[1]]), part)

        parts = [fill(part) for part in self.command]
        return ["/bin/sh", "-c", " ".join(parts)] if self.shell else parts

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
        self, code: str, *, got: str, expected: str, mend: str, run: EvaluationRun | None = None
    ) -> CommandError:
        """``run``: None for a command that did not start."""
        run = run or EvaluationRun(exit_status=None, seconds=0.0)
        return CommandError(code, where=self._where, got=got, expected=expected, mend=mend, run=run)


def _own_python_first() -> dict[str, str]:
    """This environment, in which ``python`` is the Python that runs qdist, packages and all."""
    own = str(Path(sys.executable).parent)
    return {**os.environ, "PATH": os.pathsep.join([own, os.environ.get("PATH", os.defpath)])}
