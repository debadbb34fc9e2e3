#!/usr/bin/env bash
# Everything that has to pass: scripts/check.sh, then pytest. Arguments go to pytest:
#
#   scripts/test.sh                  all of it
#   scripts/test.sh -m 'not slow'    what takes longer left out
#   scripts/test.sh tests/unit -x    one folder, up to the first failure
#
# Without arguments the tests run in two halves at once, one a core. pytest runs even if a check
# failed, and its closing line comes last; the exit status tells of both. PYTHON and QDIST_VENV: see
# setup_env.sh.
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
export RAY_USAGE_STATS_ENABLED=0 RAY_ENABLE_UV_RUN_RUNTIME_ENV=0 MLFLOW_DISABLE_TELEMETRY=true
pytest_status=0
if [ $# -gt 0 ]; then
    "$venv/bin/python" -m pytest "$@" || pytest_status=$?
else
    # The tests of whole commands wait much of the time, so all others run beside them, and a few of
    # those that do not. A shell has what runs in the background ignore Ctrl-C, which some tests are
    # about.
    moved=(tests/e2e/test_large_model.py tests/e2e/test_shared_models.py)
    log=$(mktemp)
    trap 'rm -f -- "$log"; kill "$beside" 2>/dev/null || true' EXIT
    "$venv/bin/python" -c 'import signal, sys, pytest
signal.signal(signal.SIGINT, signal.default_int_handler)
sys.exit(pytest.main(sys.argv[1:]))' -p no:cacheprovider \
        tests/unit tests/laws tests/conf tests/actors "${moved[@]}" >"$log" 2>&1 &
    beside=$!
    "$venv/bin/python" -m pytest tests/e2e "${moved[@]/#/--ignore=}" || pytest_status=$?
    echo "test: all other tests, which ran beside these:"
    wait "$beside" || pytest_status=$?
    cat -- "$log"
fi

if [ "$pytest_status" -ne 0 ]; then
    exit "$pytest_status"
fi
exit "$check_status"
