#!/usr/bin/env bash
# Writes the lock files anew from pyproject.toml. Needs uv (python3 -m pip install uv) and the network.
#
#   scripts/lock.sh                            keep every pin that still fits
#   scripts/lock.sh --upgrade                  take the newest versions that fit
#   scripts/lock.sh --upgrade-package numpy    take the newest numpy that fits
#
# requirements.lock        what runs
# requirements-dev.lock    the same versions, and what tests
# requirements-build.lock  what builds the few packages that come as source, and the project's own
#                          wheel; without it pip would fetch whatever setuptools is newest
#
# The locks name no index: each user's own pip settings decide where packages come from, and the
# hashes decide what is accepted.
set -euo pipefail

root=$(CDPATH='' cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd -P)
cd -- "$root"

if ! command -v uv >/dev/null; then
    echo "lock: error: uv is not installed; python3 -m pip install uv" >&2
    exit 1
fi

compile() {
    uv pip compile --universal --python-version 3.11 --generate-hashes \
        --no-emit-index-url --no-header -q "$@"
}

compile pyproject.toml -o requirements.lock "$@"
compile pyproject.toml --extra dev -c requirements.lock -o requirements-dev.lock "$@"
printf '%s\n' 'hatchling>=1.27,<2' 'setuptools>=80,<85' |
    compile - -c requirements-dev.lock -o requirements-build.lock "$@"

for lock in requirements.lock requirements-dev.lock requirements-build.lock; do
    echo "lock: $lock: $(grep -cE '^[a-zA-Z0-9]' "$lock") pins"
done
