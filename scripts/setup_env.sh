#!/usr/bin/env bash
# Makes, updates or repairs the virtual environment of this checkout; prints its path on stdout.
#
#   scripts/setup_env.sh runtime    what quickstart.sh needs: requirements.lock
#   scripts/setup_env.sh dev        what test.sh needs: requirements-dev.lock, a superset
#
# Environment:
#   PYTHON        the Python to use (3.11 to 3.14); unset: the first that fits on the PATH
#   QDIST_VENV    where the environment lies; unset: .venv in the checkout
#
# A stamp inside the environment is written last. While it matches the lock files, the Python and
# the place, a run starts no pip and needs no network.
set -euo pipefail

root=$(CDPATH='' cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd -P)
stamp_name=.qdist-setup
marker_name=.qdist-setup-unfinished

say() { printf 'setup: %s\n' "$*" >&2; }
fail() {
    printf 'setup: error: %s\n' "$*" >&2
    exit 1
}

# Prints why $1 cannot be used, or nothing if it can.
objection() {
    local version
    if ! version=$("$1" -c 'import sys; print("%d.%d.%d" % sys.version_info[:3])' 2>/dev/null); then
        echo "$1 does not run"
    elif ! "$1" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 14))'; then
        echo "$1 is Python $version; 3.11 to 3.14 is needed"
    elif ! "$1" -I -c 'import ensurepip, venv' 2>/dev/null; then
        echo "$1 lacks the venv module (Debian, Ubuntu: apt-get install python3-venv)"
    fi
}

find_python() {
    local candidate reason reasons=""
    if [ -n "${PYTHON:-}" ]; then
        reason=$(objection "$PYTHON")
        [ -z "$reason" ] || fail "PYTHON=$reason"
        echo "$PYTHON"
        return
    fi
    for candidate in python3 python3.14 python3.13 python3.12 python3.11; do
        command -v "$candidate" >/dev/null || continue
        reason=$(objection "$candidate")
        if [ -z "$reason" ]; then
            echo "$candidate"
            return
        fi
        reasons="$reasons; $reason"
    done
    fail "no usable Python on the PATH${reasons:-; found none at all}; install one or set PYTHON"
}

# Prints the stamp that the environment would carry once it is complete for "$1".
expected_stamp() {
    "$venv/bin/python" -I -S - "$1" "$root" "$venv" <<'PY'
import hashlib, pathlib, platform, sys, tomllib

kind, root, venv = sys.argv[1], pathlib.Path(sys.argv[2]), sys.argv[3]
project = tomllib.loads((root / "pyproject.toml").read_text("utf-8"))["project"]
print("python", platform.python_implementation(), platform.python_version())
print("venv", venv)
print("checkout", root)
print("project", project["name"], project["version"])
names = ["requirements-build.lock", "requirements.lock"]
for name in names + ["requirements-dev.lock"] * (kind == "dev"):
    print("lock", name, hashlib.sha256((root / name).read_bytes()).hexdigest())
PY
}

# A stamp for dev holds every line of one for runtime, so it serves both.
is_complete() {
    local expected line
    [ -f "$venv/$stamp_name" ] && [ ! -e "$venv/$marker_name" ] || return 1
    expected=$(expected_stamp "$1" 2>/dev/null) || return 1
    while IFS= read -r line; do
        grep -qxF -- "$line" "$venv/$stamp_name" || return 1
    done <<<"$expected"
    fits_wish
}

# Whether the environment's Python is the one that the user asked for, if any.
fits_wish() {
    local ask='import sys; print(sys.version_info[:3])'
    [ -z "${PYTHON:-}" ] || [ "$("$PYTHON" -c "$ask" 2>/dev/null)" = "$("$venv/bin/python" -c "$ask")" ]
}

# Whether pip can bring what is there up to date. If not, the environment is built from nothing:
# after a pip that was killed half-way a package may look installed and lack files.
is_sound() {
    [ ! -e "$venv/$marker_name" ] || { say "an earlier set-up was interrupted"; return 1; }
    "$venv/bin/python" -I -m pip --version >/dev/null 2>&1 || return 1
    [ -z "$(objection "$venv/bin/python")" ] && fits_wish || return 1
    # A moved environment keeps scripts that start with the path of its old Python.
    [ ! -f "$venv/$stamp_name" ] || grep -qxF -- "venv $venv" "$venv/$stamp_name"
}

create() {
    local python
    if [ -e "$venv" ] && [ ! -f "$venv/pyvenv.cfg" ] && [ ! -e "$venv/$marker_name" ] &&
        { [ ! -d "$venv" ] || [ -n "$(ls -A -- "$venv")" ]; }; then
        fail "$venv exists and is no virtual environment; set QDIST_VENV to another place"
    fi
    python=$(find_python)
    say "making $venv with $("$python" --version)"
    "$python" -I -m venv --clear -- "$venv" || fail "cannot make a virtual environment in $venv"
}

install_lock() {
    local python=$venv/bin/python lock=requirements.lock count
    [ "$1" = runtime ] || lock=requirements-dev.lock
    count=$(sed -nE 's/^([A-Za-z0-9._-]+)==.*/\1/p' "$root/$lock" | sort -u | wc -l | tr -d ' ')
    say "installing $count packages from $lock; the first time this takes a minute or two"
    pip_install -r "$root/requirements-build.lock"
    # What comes as source is built with the pinned setuptools, not with the newest of the day.
    pip_install --no-build-isolation -r "$root/$lock"
    link_checkout
}

pip_install() {
    PIP_USER=0 "$venv/bin/python" -I -m pip install -qq --no-input \
        --disable-pip-version-check --require-hashes "$@" ||
        fail "pip could not install the packages (its reason is above); run this again to repair it"
}

# Makes the checkout importable and puts `qdist` on the environment's path. Written by hand rather
# than by `pip install -e`, which needs a README and a build of the project. Not with python -S: it
# would find the site-packages of the Python that the environment was made from.
link_checkout() {
    "$venv/bin/python" -I - "$root" <<'PY'
import pathlib, sys, sysconfig, tomllib

root = pathlib.Path(sys.argv[1])
project = tomllib.loads((root / "pyproject.toml").read_text("utf-8"))["project"]
site = pathlib.Path(sysconfig.get_path("purelib"))
(site / "qdist-checkout.pth").write_text(f"{root}\n")
for old in site.glob("qdist-*.dist-info"):
    for file in old.iterdir():
        file.unlink()
    old.rmdir()
info = site / f"qdist-{project['version']}.dist-info"
info.mkdir()
metadata = f"Metadata-Version: 2.1\nName: {project['name']}\nVersion: {project['version']}\n"
(info / "METADATA").write_text(metadata)
(info / "INSTALLER").write_text("scripts/setup_env.sh\n")
PY
    cat >"$venv/bin/qdist" <<'SH'
#!/bin/sh
exec "$(dirname -- "$0")/python" -m qdist.cli "$@"
SH
    chmod 755 "$venv/bin/qdist"
}

main() {
    local kind=${1:-}
    case $kind in
    runtime | dev) ;;
    *) fail "usage: setup_env.sh runtime|dev" ;;
    esac
    venv=${QDIST_VENV:-$root/.venv}
    case $venv in
    /*) ;;
    *) venv=$PWD/$venv ;;
    esac
    # Two set-ups at once wait for each other, where flock exists; the lock ends with this process.
    if command -v flock >/dev/null; then
        exec 9<"$root/scripts/setup_env.sh"
        flock -n 9 || { say "waiting for another set-up of this checkout"; flock 9; }
    fi

    if ! is_complete "$kind"; then
        is_sound || create
        : >"$venv/$marker_name"
        rm -f -- "$venv/$stamp_name"
        install_lock "$kind"
        say "compiling the loops"
        (cd / && "$venv/bin/python" -m qdist.stats.warm && "$venv/bin/python" -m qdist.threshold.warm) ||
            fail "the checkout's code does not run"
        expected_stamp "$kind" >"$venv/$stamp_name"
        rm -f -- "$venv/$marker_name"
        say "ready"
    fi
    printf '%s\n' "$venv"
}

main "$@"
