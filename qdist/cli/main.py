"""Finds the command, runs it, turns errors into one line and exit status 2."""

from __future__ import annotations

import difflib
import importlib
import os
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

from rich.console import Console

from qdist import __version__
from qdist.errors import ConfigError, QdistError

BAD_INPUT = 2
INTERRUPTED = 130
_MAX_NAME = 120  # file systems end at 255 bytes


def main(argv: Sequence[str] | None = None) -> int:
    """Run ``qdist``; the exit status: 0, 2 for what the user can mend, 130 for Ctrl-C."""
    words = list(sys.argv[1:] if argv is None else argv)
    try:
        return _dispatch(words)
    except QdistError as error:
        Console(stderr=True).print(
            f"error: {error}",
            style="red",
            highlight=False,
            markup=False,
            emoji=False,
            soft_wrap=True,
        )
        return BAD_INPUT
    except KeyboardInterrupt:
        Console(stderr=True).print(
            "stopped; what was measured is kept, and calibration goes on from there",
            style="yellow",
        )
        return INTERRUPTED
    except BrokenPipeError:
        # Whoever read our output went away, as in `qdist show ... | head`.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


def _dispatch(words: list[str]) -> int:
    from qdist.cli.help import PLAIN, SUMMARIES, command_help, overview

    if not words or words[0] in ("-h", "--help", "help"):
        print(overview())
        return 0
    if words[0] == "--version":
        print(f"qdist {__version__}")
        return 0
    command, rest = words[0], words[1:]
    if command not in SUMMARIES:
        near = difflib.get_close_matches(command, list(SUMMARIES), n=1)
        raise ConfigError(
            "QD101",
            where="qdist",
            got=repr(command),
            expected=f"one of {', '.join(SUMMARIES)}",
            mend=f"did you mean qdist {near[0]}?" if near else "see qdist --help",
        )
    if any(word in ("-h", "--help") for word in rest):
        print(command_help(command, _extra_folder(rest)))
        return 0
    if command in PLAIN:
        importlib.import_module(f"qdist.cli.commands.{command}").run(rest, Console())
        return 0
    _run_hydra(command, rest)
    return 0


def _run_hydra(command: str, words: list[str]) -> None:
    """Compose the configuration with Hydra and run the command, once or for a whole sweep."""
    # Hydra would print its own many-line messages and exit with 1; ours are one line.
    os.environ["HYDRA_FULL_ERROR"] = "1"
    import hydra
    from hydra.core.hydra_config import HydraConfig
    from hydra.types import RunMode
    from omegaconf import DictConfig, OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    from qdist.cli.compose import (
        COMPOSE_ERRORS,
        from_hydra,
        hydra_words,
        register_resolvers,
        spelled_out,
        validated,
    )
    from qdist.cli.context import Context
    from qdist.cli.groups import config_folder
    from qdist.cli.schema import COMMANDS

    register_resolvers()
    schema = COMMANDS[command]
    given = hydra_words(spelled_out(command, words), schema)
    module = importlib.import_module(f"qdist.cli.commands.{command}")

    # Hydra prints a traceback's worth of text for an exception, so errors go around it.
    failed: list[QdistError | OmegaConfBaseException | KeyboardInterrupt] = []

    def job(config: DictConfig) -> None:
        if failed:
            return
        try:
            run_one(config)
        except (QdistError, OmegaConfBaseException, KeyboardInterrupt) as error:
            failed.append(error)

    def run_one(config: DictConfig) -> None:
        sweeping = HydraConfig.get().mode == RunMode.MULTIRUN
        # What the jobs of a sweep differ in: the words that are not the user's own any more.
        plain_words: Any = OmegaConf.to_container(HydraConfig.get().overrides.task, resolve=False)
        label = ",".join(word for word in plain_words if word not in given).replace("++", "")
        if sweeping:
            _separate(config, label)
        _drop_unused_data(command, config)
        settings = validated(config, schema)
        console = Console()
        if sweeping:
            console.rule(label or command)
        plain = cast(Mapping[str, Any], OmegaConf.to_container(config, resolve=True))
        module.run(
            Context(
                command=command,
                settings=settings,
                config=plain,
                console=console,
                begin=time.monotonic(),
            )
        )

    main_of = hydra.main(version_base="1.3", config_path=str(config_folder()), config_name=command)
    before = sys.argv
    sys.argv = [f"qdist {command}", *given]
    try:
        # Hydra leaves a multirun.yaml of its own settings behind; ours are saved with the results.
        with tempfile.TemporaryDirectory(prefix="qdist-sweep-") as scratch:
            sys.argv.insert(1, f"hydra.sweep.dir={scratch}")
            main_of(job)()
        if failed:
            raise failed[0]
    except COMPOSE_ERRORS as error:
        raise from_hydra(error, schema, _extra_folder(words)) from error
    finally:
        sys.argv = before


def _separate(config: Any, label: str) -> None:
    """In a sweep every job gets its own output folder, so that none overwrites another's."""
    from omegaconf import open_dict

    from qdist.digest import digest_json

    name = label.replace("/", "_") or "job"
    if len(name) > _MAX_NAME:
        name = f"{name[:_MAX_NAME]}-{digest_json(label)[:8]}"
    with open_dict(config):
        config.output.folder = str(Path(str(config.output.folder)) / "sweep" / name)


def _drop_unused_data(command: str, config: Any) -> None:
    """A script or function brings its own data, so ``evaluate`` need not be told of any."""
    from omegaconf import OmegaConf, open_dict

    if command != "evaluate" or config.get("data") is None:
        return
    brings_own = OmegaConf.select(config, "evaluation.kind") in ("command", "function")
    if brings_own and OmegaConf.is_missing(config.data, "path"):
        with open_dict(config):
            config.data = None


def _extra_folder(words: Sequence[str]) -> Path | None:
    for i, word in enumerate(words):
        if word.startswith("--config-dir="):
            return Path(word.split("=", 1)[1])
        if word in ("--config-dir", "-cd") and i + 1 < len(words):
            return Path(words[i + 1])
    return None
