"""The defaults that ``--help`` prints are those that a command starts with."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from qdist.cli.compose import register_resolvers
from qdist.cli.groups import config_folder
from qdist.cli.help import command_help
from qdist.cli.keys import keys_of
from qdist.cli.schema import COMMANDS, CalibrateSettings


@pytest.fixture
def hydra_folder() -> Iterator[None]:
    register_resolvers()
    with initialize_config_dir(str(config_folder()), version_base="1.3"):
        yield


def leaves(value: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Keys with values, as users name them."""
    if not isinstance(value, dict) or not value:
        yield prefix, value
        return
    for key, inner in value.items():
        yield from leaves(inner, f"{prefix}.{key}" if prefix else key)


@pytest.mark.usefixtures("hydra_folder")
@pytest.mark.parametrize("command", list(COMMANDS))
def test_defaults_are_those_that_hydra_composes(command: str) -> None:
    config = OmegaConf.to_container(compose(command), resolve=False)
    shown = {
        (key.name, kind): key.default
        for key in keys_of(command, COMMANDS[command])
        for kind in key.kinds or ("arrays", "metric", "")
    }
    n_compared = 0
    for name, value in leaves(config):
        if name.endswith(".kind") or name.startswith("data.evaluation."):
            continue
        kinds = {"data": "arrays", "evaluation": "metric"}
        expected = value if isinstance(value, str) else json.dumps(value)
        default = shown[name, kinds.get(name.partition(".")[0], "")]
        assert default == (None if value == "???" else expected), name
        n_compared += 1
    assert n_compared > 10


def test_keys_of_several_kinds_say_which() -> None:
    found = {(key.name, key.kinds): key for key in keys_of("calibrate", CalibrateSettings)}
    assert found["data.calibration.exclude", ()].default == "[]"
    assert found["data.calibration.limit", ("arrays", "images")].default == "null"
    assert found["data.calibration.preprocess.dtype", ("arrays",)].default == "keep"
    assert found["data.calibration.preprocess.dtype", ("images",)].default == "float32"
    assert found["data.calibration.target", ("captured",)].default is None
    assert found["calibration.early_stop", ()].default == "null"
    assert found["calibration.early_stop.patience", ()].default == "2"
    assert not any(name.startswith("data.evaluation.") for name, _ in found)


def test_help_prints_defaults_and_what_is_required() -> None:
    lines = command_help("calibrate").splitlines()
    (workers,) = [line for line in lines if line.startswith("  cluster.workers ")]
    assert workers.endswith("(default: 2)")
    (path,) = [line for line in lines if line.startswith("  model.path ")]
    assert path.endswith("(required)")
