"""An installed wheel finds its own groups, with no checkout in sight."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.command_line import CHECKOUT


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that the wheel of this checkout is installed to, without its dependencies."""
    folder = tmp_path_factory.mktemp("wheel")
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "-q"]
    offline = ["--no-deps", "--no-index"]
    for words in (
        ["wheel", *offline, "--no-build-isolation", "-w", str(folder), str(CHECKOUT)],
        [
            "install",
            *offline,
            "--target",
            str(folder / "site"),
            "--find-links",
            str(folder),
            "qdist",
        ],
    ):
        done = subprocess.run(
            [*pip, *words], cwd=folder, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
    return folder / "site"


def run(installed: Path, cwd: Path, *words: str) -> str:
    environment = {name: value for name, value in os.environ.items() if name != "QDIST_CONFIG"}
    done = subprocess.run(
        [sys.executable, *words],
        cwd=cwd,
        env={**environment, "PYTHONPATH": str(installed)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_command_composes_from_the_wheels_own_groups(installed: Path, tmp_path: Path) -> None:
    where = "import qdist, actors, qdist.cli.groups as g; print(qdist.__file__, g.config_folder())"
    assert run(installed, tmp_path, "-c", where).split() == [
        str(installed / "qdist/__init__.py"),
        str(installed / "qdist/_conf"),
    ]
    words = ("model=digits_vit", "data=digits", "cluster=ray", "--cfg", "job", "--resolve")
    printed = run(installed, tmp_path, "-m", "qdist.cli", "calibrate", *words)
    assert f"path: {installed}/qdist/demo/digits_vit.onnx" in printed
    assert "address: auto" in printed
    shown = run(installed, tmp_path, "-m", "qdist.cli", "calibrate", "--help")
    assert "model: digits_cnn, digits_vit, onnx" in shown


def test_everything_that_the_wheel_needs_at_run_time_is_in_it(
    installed: Path, tmp_path: Path
) -> None:
    """Files beside the code, and every group file of the checkout."""
    for folder, inside in (("conf", "qdist/_conf"), ("qdist/demo", "qdist/demo")):
        wanted = {p.relative_to(CHECKOUT / folder) for p in (CHECKOUT / folder).rglob("*.*")}
        wanted = {path for path in wanted if "__pycache__" not in path.parts}
        assert all((installed / inside / path).is_file() for path in wanted)
    assert "qdist" in run(installed, tmp_path, str(installed / "bin/qdist"), "--version")
