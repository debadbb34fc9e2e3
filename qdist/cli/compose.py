"""Hydra's errors in our words, and validation of what Hydra composed."""

from __future__ import annotations

import argparse
import difflib
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args, get_origin

from hydra._internal.utils import get_args_parser
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails
from yaml import YAMLError  # type: ignore[import-untyped]

from qdist.cli.groups import choices
from qdist.cli.schema import CommandSettings
from qdist.demo import demo_file
from qdist.errors import ConfigError

COMPOSE_ERRORS = (HydraException, OmegaConfBaseException, YAMLError)
"""What Hydra lets through when it cannot compose a configuration."""


def register_resolvers() -> None:
    """``${qdist.demo:FILE}``, ``${qdist.stem:PATH}`` and ``${qdist.absolute:PATH}``."""
    for name, function in {
        "qdist.demo": lambda file: str(demo_file(file)),
        "qdist.stem": lambda path: Path(str(path)).stem,
        "qdist.absolute": lambda path: str(Path(str(path)).expanduser().absolute()),
    }.items():
        OmegaConf.register_new_resolver(name, function, replace=True)


def spelled_out(command: str, words: Sequence[str]) -> list[str]:
    """``quantize --template FORM`` as the key that it stands for. Raises QD105 without a form."""
    left = list(words)
    if command != "quantize":
        return left
    for i, word in enumerate(left):
        if word.startswith("--template="):
            left[i] = "template=" + word.partition("=")[2]
        elif word == "--template":
            if i + 1 == len(left):
                raise ConfigError(
                    "QD105",
                    where="--template",
                    got="no form",
                    expected="icraft, knight, slimai or sophgo",
                    mend="write --template knight",
                )
            left[i : i + 2] = [f"template={left[i + 1]}"]
    return left


def hydra_words(words: Sequence[str], schema: type[CommandSettings]) -> list[str]:
    """The user's words as Hydra takes them.

    Overrides come first, since Hydra's parser wants them in one piece; and keys that exist but
    stand in no group file (``data.calibration.limit``) are added rather than refused. Raises QD106
    for options that Hydra does not have.
    """
    parser = get_args_parser()
    parser.exit_on_error = False  # it would print the usage of Hydra, and end the process
    try:
        parsed, unknown = parser.parse_known_intermixed_args(list(words))
    except argparse.ArgumentError as error:
        raise _bad_option(str(error)) from error
    if unknown:
        raise _bad_option(f"unknown options: {' '.join(unknown)}")
    options = list(words)
    for word in parsed.overrides:
        options.remove(word)
    return [*(_added(word, schema) for word in parsed.overrides), *options]


def _added(word: str, schema: type[CommandSettings]) -> str:
    path = word.partition("=")[0].split(".")
    return f"++{word}" if len(path) > 1 and _exists(schema, path) else word


def _exists(schema: type[BaseModel], path: Sequence[str]) -> bool:
    """Whether a configuration may have this key; a mapping may have any key."""
    models: list[type[BaseModel]] = [schema]
    for i, part in enumerate(path):
        fields = [m.model_fields[part] for m in models if part in m.model_fields]
        models = [model for field in fields for model in _models_of(field.annotation)]
        if not models:
            is_last = i == len(path) - 1
            return any(is_last or get_origin(f.annotation) is dict for f in fields)
    return True


def _bad_option(got: str) -> ConfigError:
    return ConfigError(
        "QD106",
        where="the command line",
        got=got,
        expected="--cfg job, --multirun, --config-dir FOLDER or another option of Hydra's",
        mend="correct the option; settings are written key=value, without dashes",
    )


def validated(config: DictConfig, schema: type[CommandSettings]) -> CommandSettings:
    """The configuration as frozen settings. Raises QD102, QD104, QD105, QD106."""
    raw = OmegaConf.to_container(config, resolve=False)
    missing = sorted(_unset(raw))
    if missing:
        raise _misspelt(raw, schema) or ConfigError(
            "QD105",
            where=missing[0],
            got="no value",
            expected=_expected(schema, missing[0].split(".")),
            mend=f"add {missing[0]}=VALUE to the command"
            + (f" (also missing: {', '.join(missing[1:])})" if missing[1:] else ""),
        )
    try:
        plain = OmegaConf.to_container(config, resolve=True)
    except OmegaConfBaseException as error:
        raise ConfigError(
            "QD106",
            where=str(error.full_key or "the configuration"),
            got=_first_line(error),
            expected="values that refer to keys that exist",
            mend="correct the reference ${...} in that key",
        ) from error
    try:
        return schema.model_validate(plain)
    except ValidationError as error:
        raise _mismatch(error.errors()[0], schema) from error


def _misspelt(raw: Any, schema: type[CommandSettings]) -> ConfigError | None:
    """The error for an unknown key: it may be what was meant to give a missing value."""
    try:
        schema.model_validate(raw)
    except ValidationError as error:
        for details in error.errors():
            if details["type"] == "extra_forbidden":
                return _mismatch(details, schema)
    return None


def _unset(value: Any, path: str = "") -> list[str]:
    """Keys whose value is ``???``. Those that merely refer to one are left out."""
    if isinstance(value, dict):
        inner = [(f"{path}.{k}" if path else str(k), v) for k, v in value.items()]
        return [name for key, item in inner for name in _unset(item, key)]
    return [path] if value == "???" else []


def from_hydra(
    error: HydraException | OmegaConfBaseException | YAMLError,
    schema: type[CommandSettings],
    extra: Path | None = None,
) -> ConfigError:
    """One line for whatever Hydra refused."""
    if isinstance(error, YAMLError):
        return ConfigError(
            "QD106",
            where="a group file",
            got=" ".join(str(error).split()),
            expected="YAML",
            mend="correct the file at that line",
        )
    text = str(error)
    cause = str(error.__cause__ or "")
    key = re.search(r"Could not override '([^']+)'", text)
    if (key is not None and "not in struct" in text + cause) or (key and "Key '" in text):
        return _unknown_key(schema, key.group(1))
    group = re.search(r"Could not (?:find|load) '([^']+)'", text)
    if group is not None:
        return _unknown_choice(group.group(1), schema, extra)
    wanted = re.search(r"You must specify '([^']+)'", text)
    if wanted is not None:
        name = wanted.group(1)
        return _unknown_choice(f"{name}/", schema, extra)
    if key is not None:
        return _unknown_key(schema, key.group(1))
    if "Additional config directory" in text:
        return ConfigError(
            "QD106",
            where="--config-dir",
            got=_first_line(error),
            expected="a folder with group files: FOLDER/model/mine.yaml",
            mend="correct the folder; a relative one starts at the current folder",
        )
    return ConfigError(
        "QD106",
        where=str(getattr(error, "override", None) or "the command line").lstrip("+"),
        got=_first_line(error),
        expected="overrides of the form key=value or group=choice",
        mend="quote values that hold spaces or braces, as in 'key={a: 1}' and "
        """'evaluation.command=[python, eval.py, "{model}"]'""",
    )


def _unknown_choice(path: str, schema: type[CommandSettings], extra: Path | None) -> ConfigError:
    group, _, choice = path.rpartition("/")
    known = choices(group, extra)
    if not known:
        return _unknown_key(schema, group or choice)
    return ConfigError(
        "QD103",
        where=f"group {group}",
        got=repr(choice),
        expected=f"one of {', '.join(known)}",
        mend=f"choose one of these: {group}={_nearest(choice, known) or next(iter(known))}",
    )


def _unknown_key(schema: type[CommandSettings], key: str) -> ConfigError:
    # Pydantic counts the entries of a list; the keys that users write have no numbers in them.
    path = [part for part in key.split("@")[0].split(".") if not part.isdigit()]
    inside, known = _keys_beside(schema, path)
    bad = path[len(inside)] if len(inside) < len(path) else path[-1]
    near = _nearest(bad, known)
    prefix = ".".join(inside)
    return ConfigError(
        "QD102",
        where=key,
        got=f"a key {bad!r}",
        expected=f"one of {', '.join(known)}" + (f" in {prefix}" if prefix else ""),
        mend=f"did you mean {'.'.join([*inside, near])}?" if near else "correct the key",
    )


def _mismatch(details: ErrorDetails, schema: type[CommandSettings]) -> ConfigError:
    location = [str(part) for part in details["loc"]]
    path = _without_tags(schema, location)
    where = ".".join(path)
    if details["type"] == "extra_forbidden":
        return _unknown_key(schema, where)
    if details["type"] == "missing":
        return ConfigError(
            "QD105",
            where=where,
            got="no value",
            expected=_expected(schema, path),
            mend=f"add {where}=VALUE to the command",
        )
    message = details["msg"].removeprefix("Input should be ")
    got = details["input"]
    if "expected_tags" in details.get("ctx", {}):
        got = details["ctx"].get("tag")
        where = f"{where}.kind"
        message = f"one of {details['ctx']['expected_tags']}"
    return ConfigError(
        "QD104",
        where=where,
        got=f"{got!r} ({type(got).__name__})",
        expected=message,
        mend=f"correct {where} ({_expected(schema, path)})",
    )


def _without_tags(schema: type[BaseModel], location: Sequence[str]) -> list[str]:
    """Pydantic names the chosen member of a union in an error's path; users never wrote it."""
    tags = {"arrays", "images", "text", "function", "captured", "random", "metric", "command"}
    kept: list[str] = []
    for i, part in enumerate(location):
        parent = location[i - 1] if i else ""
        if part in tags and parent in ("calibration", "evaluation"):
            continue
        kept.append(part)
    return kept


def _models_of(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for part in get_args(annotation) for model in _models_of(part)]


def _keys_beside(schema: type[BaseModel], path: Sequence[str]) -> tuple[list[str], list[str]]:
    """The longest part of ``path`` that exists, and the keys that exist there."""
    models: list[type[BaseModel]] = [schema]
    inside: list[str] = []
    for part in path:
        fields = {n: f for model in models for n, f in model.model_fields.items()}
        if part not in fields:
            break
        deeper = [
            m
            for model in models
            if part in model.model_fields
            for m in _models_of(model.model_fields[part].annotation)
        ]
        if not deeper:
            break
        inside.append(part)
        models = deeper
    known = list(dict.fromkeys(n for model in models for n in model.model_fields))
    return inside, known


def _expected(schema: type[BaseModel], path: Sequence[str]) -> str:
    """What a key is for, from its description."""
    models: list[type[BaseModel]] = [schema]
    description = ""
    for part in path:
        fields = [m.model_fields[part] for m in models if part in m.model_fields]
        if not fields:
            break
        description = fields[0].description or description
        models = [model for field in fields for model in _models_of(field.annotation)]
    return description or "a value"


def _nearest(word: str, known: Sequence[str] | dict[str, str]) -> str | None:
    found = difflib.get_close_matches(word, list(known), n=1, cutoff=0.5)
    return found[0] if found else None


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0][:300] if lines else type(error).__name__
