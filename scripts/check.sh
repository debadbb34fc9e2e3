#!/usr/bin/env bash
# Lint, format, import rules and types, in that order. Runs all four even if one fails, so that one
# run shows everything there is to mend. PYTHON and QDIST_VENV: see setup_env.sh.
set -euo pipefail

root=$(CDPATH='' cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd -P)
venv=$("$root/scripts/setup_env.sh" dev)
cd -- "$root"

failed=""
check() {
    local name=$1 start=$SECONDS
    shift
    printf '== %s\n' "$name"
    if "$@"; then
        printf '== %s: ok (%s s)\n' "$name" "$((SECONDS - start))"
    else
        printf '== %s: FAILED (%s s)\n' "$name" "$((SECONDS - start))"
        failed="$failed, $name"
    fi
}

check "ruff check" "$venv/bin/python" -m ruff check .
check "ruff format" "$venv/bin/python" -m ruff format --check .
check "import rules" "$venv/bin/lint-imports"
check "mypy" "$venv/bin/python" -m mypy

if [ -n "$failed" ]; then
    printf 'check: error: failed: %s\n' "${failed#, }" >&2
    exit 1
fi
