"""Rules of the house that no other tool checks: locks, layout, scripts, the wheel, stray paths."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[2]
LOCKS = ("requirements.lock", "requirements-dev.lock", "requirements-build.lock")
SCRIPTS = sorted([*(ROOT / "scripts").glob("*.sh"), ROOT / ".ci" / "run"])
TOP_LEVEL = {
    *("conf", "qdist", "actors", "tests", "scripts", "docs"),
    *("pyproject.toml", "Dockerfile", "README.md", "LICENSE", *LOCKS),
}

# In pieces, so that this file does not find itself.
PACKAGE_HOSTS = ("pypi" + ".org", "python" + "hosted.org", "/opt/" + "pypi", "/opt/" + "wheels")
LOCAL_PATHS = (
    "/work" + "/main",
    "/work" + "/shared",
    "/work" + "/.",
    "/root" + "/",
    "/tmp" + "/brief",
)

Pins = dict[tuple[str, str], tuple[str, int]]
"""(name, marker) -> (version, number of hashes)."""


def read_lock(name: str) -> Pins:
    """Parse a lock; anything but pins, their hashes and comments is an error."""
    pins: Pins = {}
    logical = (ROOT / name).read_text("utf-8").replace("\\\n", " ")
    for line in logical.splitlines():
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        spec, *hashes = re.split(r"\s+--hash=", line.strip())
        requirement = Requirement(spec)
        found = re.fullmatch(r"==([^,*]+)", str(requirement.specifier))
        assert found, f"{name}: {spec!r} is not pinned"
        assert all(re.fullmatch(r"sha256:[0-9a-f]{64}", h) for h in hashes), f"{name}: {spec}"
        key = canonicalize_name(requirement.name), str(requirement.marker or "")
        assert key not in pins, f"{name}: {spec} twice"
        pins[key] = found[1], len(hashes)
    return pins


def direct_requirements() -> dict[str, list[Requirement]]:
    """Group ("" for what runs) -> what pyproject.toml asks for, the build backend included."""
    text = (ROOT / "pyproject.toml").read_text("utf-8")
    pyproject: dict[str, Any] = tomllib.loads(text)
    groups: dict[str, list[str]] = {
        "": pyproject["project"]["dependencies"],
        "build": pyproject["build-system"]["requires"],
        **pyproject["project"]["optional-dependencies"],
    }
    return {name: [Requirement(line) for line in lines] for name, lines in groups.items()}


def project_files() -> list[Path]:
    """Files that git tracks, or would track, where nothing is committed yet; relative paths."""

    def listed(*options: str) -> list[Path]:
        command = ["git", "-C", str(ROOT), "ls-files", "-z", *options]
        done = subprocess.run(command, capture_output=True, check=False, text=True)
        if done.returncode:
            pytest.skip(f"not a git checkout: {done.stderr.strip()}")
        paths = (Path(name) for name in done.stdout.split("\0") if name)
        return sorted(path for path in paths if (ROOT / path).is_file())

    files = listed() or listed("--others", "--exclude-standard")
    assert Path("pyproject.toml") in files
    return files


@pytest.mark.parametrize("name", LOCKS)
def test_lock_names_no_place_to_fetch_from(name: str) -> None:
    text = (ROOT / name).read_text("utf-8")
    options = r"--index-url|--extra-index-url|--find-links|--trusted-host|-i |-f "
    assert re.findall(rf"^\s*(?:{options}).*|https?://\S*|file:\S*| @ \S*", text, re.M) == []


@pytest.mark.parametrize("name", LOCKS)
def test_lock_pins_and_hashes_everything(name: str) -> None:
    pins = read_lock(name)
    assert len(pins) >= 5
    assert [key for key, (_, n_hashes) in pins.items() if n_hashes == 0] == []


def test_locks_agree_on_versions() -> None:
    runtime, dev, build = (read_lock(name) for name in LOCKS)
    assert {key: dev.get(key) for key in runtime} == runtime
    assert {key: pin for key, pin in build.items() if key in dev and dev[key] != pin} == {}


def test_locks_answer_pyproject() -> None:
    wanted = direct_requirements()
    for name, groups in zip(LOCKS, (("",), ("", "dev"), ("build",)), strict=True):
        versions: dict[str, list[str]] = {}
        for (package, _), (version, _) in read_lock(name).items():
            versions.setdefault(package, []).append(version)
        for requirement in (r for group in groups for r in wanted[group]):
            found = versions.get(canonicalize_name(requirement.name), [])
            assert found, f"{name} lacks {requirement}; run scripts/lock.sh"
            assert all(requirement.specifier.contains(version) for version in found), requirement


def test_direct_dependencies_are_bounded_on_both_sides() -> None:
    for group, requirements in direct_requirements().items():
        for requirement in requirements:
            operators = {part.operator for part in requirement.specifier}
            assert operators >= {">=", "<"}, f"{group or 'dependencies'}: {requirement}"


def test_top_level_holds_only_what_belongs_there() -> None:
    top = {path.parts[0] for path in project_files()}
    assert {name for name in top - TOP_LEVEL if not name.startswith(".")} == set()


def test_no_module_is_a_drawer_for_odds_and_ends() -> None:
    code = [path for path in project_files() if path.parts[0] in {"qdist", "actors"}]
    assert code
    drawers = {"util", "utils", "helper", "helpers", "misc", "common"}
    assert [path for path in code if drawers & {*path.parts, path.stem}] == []


def test_no_file_names_local_paths_or_package_hosts() -> None:
    found = []
    for path in project_files():
        data = (ROOT / path).read_bytes()
        if b"\0" in data:
            continue
        text = data.decode("utf-8")
        found += [f"{path}: {word}" for word in (*PACKAGE_HOSTS, *LOCAL_PATHS) if word in text]
    assert found == []


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_shell_script_is_sound(script: Path) -> None:
    assert os.access(script, os.X_OK)
    lines = script.read_text("utf-8").splitlines()
    assert lines[0] == "#!/usr/bin/env bash"
    assert "set -euo pipefail" in lines
    done = subprocess.run(["bash", "-n", str(script)], capture_output=True, check=False, text=True)
    assert (done.returncode, done.stderr) == (0, "")


def run_setup(**environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["bash", str(ROOT / "scripts" / "setup_env.sh"), "runtime"],
        capture_output=True,
        check=False,
        text=True,
        timeout=60,
        env={**os.environ, **environment},
    )


def test_setup_leaves_a_folder_alone_that_is_no_environment(tmp_path: Path) -> None:
    (tmp_path / "precious").write_text("data")
    done = run_setup(QDIST_VENV=str(tmp_path), PYTHON=sys.executable)
    assert done.returncode == 1
    assert f"{tmp_path} exists and is no virtual environment" in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["precious"]


def test_setup_names_what_is_wrong_with_the_python(tmp_path: Path) -> None:
    old = tmp_path / "old python"
    # Answers the question for its version and says no to everything else, as Python 3.9 does.
    old.write_text('#!/bin/sh\ncase "$2" in *print*) echo 3.9.18 ;; *) exit 1 ;; esac\n')
    old.chmod(0o755)
    done = run_setup(QDIST_VENV=str(tmp_path / "env"), PYTHON=str(old))
    assert done.returncode == 1
    assert f"{old} is Python 3.9.18; 3.11 to 3.14 is needed" in done.stderr
    done = run_setup(QDIST_VENV=str(tmp_path / "env"), PYTHON=str(tmp_path / "absent"))
    assert done.returncode == 1
    assert "absent does not run" in done.stderr
    assert not (tmp_path / "env").exists()


def test_dockerfile_copies_what_exists_and_dockerignore_lets_it_through() -> None:
    allowed = set(re.findall(r"^!(\S+)$", (ROOT / ".dockerignore").read_text("utf-8"), re.M))
    copies = re.findall(r"^COPY (.+) \S+$", (ROOT / "Dockerfile").read_text("utf-8"), re.M)
    sources = {source for line in copies for source in line.split()}
    assert sources == allowed
    assert [source for source in sorted(sources) if not (ROOT / source).exists()] == []


def test_wheel_holds_library_actors_and_configuration(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-index"]
    command += ["--no-build-isolation", "--disable-pip-version-check", "-w", str(tmp_path), "."]
    done = subprocess.run(command, capture_output=True, check=False, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    (wheel,) = tmp_path.glob("qdist-*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    for path in project_files():
        if path.parts[0] in {"qdist", "actors"}:
            assert path.as_posix() in names
        elif path.parts[0] == "conf":
            assert f"qdist/_conf/{path.relative_to('conf').as_posix()}" in names
    assert any(name.startswith("qdist/_conf/") for name in names)
    assert any(name.startswith("actors/") for name in names)
    assert not [name for name in names if "__pycache__" in name or name.startswith("tests/")]
