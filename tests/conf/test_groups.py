"""Every choice of every group, with every command that has the group, gives valid settings."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from qdist.cli import domain, schema
from qdist.cli.compose import register_resolvers, validated
from qdist.cli.groups import choices, config_folder
from qdist.cli.help import EXAMPLES, command_help
from qdist.cli.schema import COMMANDS, IDENTITY_KEYS, NOT_IDENTITY_KEYS, CalibrateSettings
from qdist.errors import ConfigError
from tests.command_line import CHECKOUT, check_error, here, left_behind, succeed

GROUPS = sorted(path.name for path in (CHECKOUT / "conf").iterdir() if path.is_dir())


def rows_of(command: str) -> list[list[str]]:
    """Words that select the first choice of every group of a command, then the second, ...

    Groups do not depend on each other, so every choice is tried without trying all pairs.
    """
    groups = {name: list(choices(name)) for name in GROUPS if name in _fields(command)}
    n_rows = max(map(len, groups.values()))
    return [
        [f"{name}={known[i % len(known)]}" for name, known in groups.items()] for i in range(n_rows)
    ]


def _fields(command: str) -> list[str]:
    return list(COMMANDS[command].model_fields)


CASES = [
    pytest.param(command, words, id=f"{command}-{i}")
    for command in COMMANDS
    for i, words in enumerate(rows_of(command))
]
DUMMIES: dict[str, Any] = {
    "model.path": "model.onnx",
    "data.path": "data.npz",
    "data.tokenizer": "tokenizer.model",
    "data.calibration.inputs": {"images": "x"},
    "data.calibration.target": "samples.py:make",
    "evaluation.command": ["python", "score.py", "{model}"],
    "evaluation.target": "score.py:accuracy",
    "evaluation.metric_cls": "accuracy",
}


@pytest.fixture
def hydra_folder(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Hydra's compose function finds our groups."""
    register_resolvers()
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:5000")
    monkeypatch.setenv("CUSTOM_METRIC_PATH", "plugins")
    with initialize_config_dir(str(config_folder()), version_base="1.3"):
        yield


def settings_of(command: str, words: list[str]) -> schema.CommandSettings:
    """The settings that ``words`` give, with a value for whatever the groups leave open."""
    config = compose(command, words)
    for key, value in DUMMIES.items():
        group, _, name = key.rpartition(".")
        found = OmegaConf.select(config, group)
        # An empty command is one of two names for what has to be given.
        if found and (OmegaConf.is_missing(found, name) or found.get(name) == []):
            OmegaConf.update(config, key, value, force_add=True)
    return validated(config, COMMANDS[command])


@pytest.mark.usefixtures("hydra_folder")
@pytest.mark.parametrize(("command", "words"), CASES)
def test_every_choice_is_valid(command: str, words: list[str]) -> None:
    _domain_values(settings_of(command, words))


def _domain_values(settings: schema.CommandSettings) -> None:
    """Domain values are what the commands run on; making them is half of the validation."""
    domain.execution(settings.model)
    domain.tracking(settings.tracking)
    data = getattr(settings, "data", None)
    brings_own = isinstance(
        getattr(data, "calibration", None), schema.CapturedSamples | schema.RandomSamples
    )
    if data is not None and not brings_own:
        domain.source(data.calibration)
        domain.evaluation_source(data)
    if data is not None and brings_own:
        # Captured and random samples are of one model's inputs, and no evaluation set.
        with pytest.raises(ConfigError, match=r"QD105.*data\.evaluation"):
            domain.evaluation_source(data)
        data = None
    for name, make in (
        ("calibration", domain.calibration),
        ("quantization", domain.default_choice),
        ("quantization", domain.plan_settings),
        ("target", domain.target),
        ("search", domain.greedy),
        ("cluster", domain.cluster),
        ("evaluation", lambda config: domain.evaluation(config, data)),
    ):
        if brings_own and name == "evaluation":
            continue
        if hasattr(settings, name):
            make(getattr(settings, name))


def test_every_group_belongs_to_a_command_and_is_described() -> None:
    used = {name for settings in COMMANDS.values() for name in settings.model_fields}
    assert set(GROUPS) <= used
    for group in GROUPS:
        assert all(choices(group).values()), f"a choice of {group} has no comment on its first line"


@pytest.mark.parametrize("command", list(COMMANDS))
def test_help_names_every_group_choice_and_key(command: str) -> None:
    text = command_help(command)
    for name, field in COMMANDS[command].model_fields.items():
        known = choices(name)
        if known:
            assert f"  {name}: {', '.join(known)}" in text
        elif field.description:
            assert f"  {name} " in text
    assert "--config-dir" in text
    assert "--multirun" in text


@pytest.mark.usefixtures("hydra_folder")
@pytest.mark.parametrize("command", list(COMMANDS))
def test_the_example_in_the_help_is_valid_as_it_stands(command: str) -> None:
    program, name, *words = EXAMPLES[command].split()
    assert (program, name) == ("qdist", command)
    assert EXAMPLES[command] in command_help(command)
    _domain_values(validated(compose(command, words), COMMANDS[command]))


def test_every_key_of_a_calibration_is_classed_as_part_of_its_identity_or_not() -> None:
    keys = {
        f"{group}.{key}"
        for group, field in CalibrateSettings.model_fields.items()
        for key in _keys(field.annotation)
    }
    assert keys == IDENTITY_KEYS | NOT_IDENTITY_KEYS
    assert not IDENTITY_KEYS & NOT_IDENTITY_KEYS


def _keys(group: object) -> list[str]:
    assert isinstance(group, type), f"{group} is no group of keys: class its members too"
    assert issubclass(group, schema.Group)
    return list(group.model_fields)


def test_cfg_job_prints_what_the_words_give(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for words in (
        ["--cfg", "job", "model=digits_cnn", "data=digits", "calibration.micro_batch=7"],
        ["model=digits_cnn", "--cfg", "job", "data=digits", "calibration.micro_batch=7"],
    ):
        printed = OmegaConf.create(succeed("calibrate", *words))
        assert printed.calibration.micro_batch == 7
        assert printed.model.name == "digits_cnn"
    assert left_behind(tmp_path) == []


def test_a_folder_of_groups_named_by_the_environment_is_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(CHECKOUT / "conf", tmp_path / "groups")
    (tmp_path / "groups/calibration/tiny.yaml").write_text(
        "# Ours.\ndefaults:\n  - default\nmicro_batch: 1\n"
    )
    monkeypatch.setenv("QDIST_CONFIG", str(tmp_path / "groups"))
    printed = OmegaConf.create(succeed("calibrate", "calibration=tiny", "--cfg", "job"))
    assert printed.calibration == {
        "micro_batch": 1,
        "shard_samples": None,
        "taps": "all",
        "on_nan": "error",
        "memory_budget": None,
        "groups": [],
        "blocks": 1,
        "sequence_axes": {},
        "smoothing": [],
        "early_stop": None,
    }
    assert "default, tiny" in succeed("calibrate", "--help").replace("compute, ", "")
    monkeypatch.setenv("QDIST_CONFIG", str(tmp_path))
    check_error(here("calibrate"), "QD106", str(tmp_path), "unset QDIST_CONFIG")


def test_the_users_own_group_file_is_found_and_shown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine/model").mkdir(parents=True)
    (tmp_path / "mine/model/detector.yaml").write_text(
        "# Our detector.\ndefaults:\n  - onnx\n\nname: detector\npath: /models/detector.onnx\n"
    )
    for option in (["--config-dir", "mine"], ["--config-dir=mine"], ["-cd", "mine"]):
        printed = OmegaConf.create(succeed("emit", "model=detector", *option, "--cfg", "job"))
        assert printed.model.path == "/models/detector.onnx"
        assert printed.model.threads == 1
        assert "model: digits_cnn, digits_vit, onnx, detector" in succeed("emit", *option, "--help")
