"""The vendors' names in evaluation settings, and what stands for them."""

from __future__ import annotations

import os
import shlex
from pathlib import Path

from qdist.cli.evaluation_schema import ClassConfig, CommandConfig, EvaluationConfig
from qdist.errors import ConfigError

CUSTOM_METRIC_PATH = "CUSTOM_METRIC_PATH"
"""SlimAI's variable: folders of metric classes."""


def command_words(config: CommandConfig) -> tuple[list[str], str | None]:
    """The command's words and its folder, by our names or by Icraft's.

    ``evalscript_cmd`` is split as a shell would, and left whole where a shell gets it. Raises
    QD105 where there is no command, QD107 for one given twice, QD104 for quotes that do not close.
    """
    for ours, theirs in (("command", "evalscript_cmd"), ("folder", "evalscript_path")):
        if getattr(config, ours) and getattr(config, theirs):
            raise ConfigError(
                "QD107",
                where=f"evaluation.{theirs}",
                got=f"evaluation.{ours} too",
                expected="one of the two: they mean the same",
                mend="remove one",
            )
    folder = config.folder or config.evalscript_path
    line = config.evalscript_cmd
    if not config.command and not line:
        raise ConfigError(
            "QD105",
            where="evaluation.command",
            got="no command",
            expected="a program and its arguments",
            mend="set evaluation.command=[python,eval.py,'{model}'], or evaluation.evalscript_cmd",
        )
    if not line:
        return config.command, folder
    if config.shell:
        return [line], folder
    try:
        return shlex.split(line), folder
    except ValueError as error:
        raise ConfigError(
            "QD104",
            where="evaluation.evalscript_cmd",
            got=f"{line!r}: {error}",
            expected="a command line whose quotes close",
            mend="close them, or give the words as evaluation.command",
        ) from error


def plugin_folders(folder: str | None) -> tuple[Path, ...]:
    """Where classes are looked for: ``folder``, else those in CUSTOM_METRIC_PATH. Absolute, since
    workers have neither this folder nor this environment. Raises QD105 where there is neither."""
    places = [folder] if folder else os.environ.get(CUSTOM_METRIC_PATH, "").split(os.pathsep)
    found = tuple(Path(place).expanduser().absolute() for place in places if place)
    if not found:
        raise ConfigError(
            "QD105",
            where="evaluation.folder",
            got=f"no folder, and no {CUSTOM_METRIC_PATH} in the environment",
            expected="the folder of the metric's file",
            mend="set evaluation.folder=FOLDER",
        )
    return found


def evaluation_dump(config: EvaluationConfig) -> str:
    """The folder of dumped outputs to score; empty for none."""
    return (config.dumped or "") if isinstance(config, ClassConfig) else ""
