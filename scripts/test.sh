#!/usr/bin/env bash
# Everything that has to pass: scripts/check.sh, then pytest. Arguments go to pytest:
#
#   scripts/test.sh                  all of it
#   scripts/test.sh -m 'not slow'    what takes longer left out
#   scripts/test.sh tests/unit -x    one folder, up to the first failure
#
# pytest runs even if a check failed, and its closing line comes last; the exit status tells of
# both. PYTHON and QDIST_VENV: see setup_env.sh.
set -euo pipefail

root=$(CDPATH='' cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd -P)
venv=$("$root/scripts/setup_env.sh" dev)
printf 'test: set-up took %s s\n' "$SECONDS"

start=$SECONDS
check_status=0
QDIST_VENV=$venv "$root/scripts/check.sh" || check_status=$?
printf 'test: the checks took %s s\n' "$((SECONDS - start))"
if [ "$check_status" -ne 0 ]; then
    echo "test: error: the checks failed, so this run fails whatever pytest says" >&2
fi

cd -- "$root"
pytest_status=0
RAY_USAGE_STATS_ENABLED=0 RAY_ENABLE_UV_RUN_RUNTIME_ENV=0 MLFLOW_DISABLE_TELEMETRY=true \
    "$venv/bin/python" -m pytest "$@" || pytest_status=$?

if [ "$pytest_status" -ne 0 ]; then
    exit "$pytest_status"
fi
exit "$check_status"
