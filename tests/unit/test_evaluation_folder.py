"""Copies of the user's folder: equal, and of their own, with reflinks or without."""

from __future__ import annotations

import fcntl
import os
from pathlib import Path
from typing import Any

import pytest

from qdist.cli.evaluation_schema import CommandConfig
from qdist.cli.evaluation_words import command_words, plugin_folders
from qdist.errors import ConfigError
from qdist.evaluate.folder import clone_or_copy


def refuse(*_: Any) -> None:
    raise OSError(95, "Operation not supported")


@pytest.mark.parametrize("has_reflinks", [True, False])
def test_a_copy_is_equal_and_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, has_reflinks: bool
) -> None:
    if not has_reflinks:
        monkeypatch.setattr(fcntl, "ioctl", refuse)
    source, copy = tmp_path / "source", tmp_path / "copy"
    source.write_bytes(os.urandom(100_001))
    source.chmod(0o750)
    before = source.read_bytes()
    clone_or_copy(str(source), str(copy))
    assert copy.read_bytes() == before
    assert copy.stat().st_mode == source.stat().st_mode
    assert copy.stat().st_mtime_ns == source.stat().st_mtime_ns
    with copy.open("r+b") as file:
        file.write(b"changed")
    assert source.read_bytes() == before


def test_an_empty_file_is_copied(tmp_path: Path) -> None:
    (tmp_path / "a").touch()
    clone_or_copy(str(tmp_path / "a"), str(tmp_path / "b"))
    assert (tmp_path / "b").read_bytes() == b""


def config(**fields: Any) -> CommandConfig:
    return CommandConfig(kind="command", **fields)


def test_icrafts_names_mean_ours() -> None:
    theirs = config(evalscript_cmd="python 'my test.py' {model}", evalscript_path="folder")
    ours = config(command=["python", "my test.py", "{model}"], folder="folder")
    assert command_words(theirs) == command_words(ours)
    assert command_words(config(evalscript_cmd="a && b", shell=True)) == (["a && b"], None)


@pytest.mark.parametrize(
    ("fields", "code"),
    [
        ({}, "QD105"),
        ({"evalscript_cmd": "a", "command": ["a"]}, "QD107"),
        ({"evalscript_path": "a", "folder": "b", "command": ["a"]}, "QD107"),
        ({"evalscript_cmd": "a 'b"}, "QD104"),
    ],
)
def test_names_that_do_not_fit(fields: dict[str, Any], code: str) -> None:
    with pytest.raises(ConfigError) as caught:
        command_words(config(**fields))
    assert caught.value.code == code


def test_plugins_come_from_the_setting_or_the_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("CUSTOM_METRIC_PATH", raising=False)
    with pytest.raises(ConfigError) as caught:
        plugin_folders(None)
    assert caught.value.code == "QD105"
    monkeypatch.setenv("CUSTOM_METRIC_PATH", f"{tmp_path}/a{os.pathsep}{tmp_path}/b")
    assert plugin_folders(None) == (tmp_path / "a", tmp_path / "b")
    assert plugin_folders(str(tmp_path)) == (tmp_path,)
