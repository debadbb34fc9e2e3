#!/usr/bin/env bash
# Sets up what is needed and tunes the two demo models on this machine. After the set-up nothing
# needs the network. Arguments go to both runs, as in: scripts/quickstart.sh cluster.workers=1
#
# Environment:
#   QDIST_WORKSPACE       where the results go; unset: qdist-runs in the current folder
#   PYTHON, QDIST_VENV    see setup_env.sh
set -euo pipefail

root=$(CDPATH='' cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd -P)
workspace=${QDIST_WORKSPACE:-$PWD/qdist-runs}
venv=$("$root/scripts/setup_env.sh" runtime)

if ! mkdir -p -- "$workspace" || ! [ -w "$workspace" ]; then
    echo "quickstart: error: cannot write to $workspace; set QDIST_WORKSPACE to another folder" >&2
    exit 1
fi
cd -- "$workspace"
workspace=$PWD
export RAY_USAGE_STATS_ENABLED=0 RAY_ENABLE_UV_RUN_RUNTIME_ENV=0 MLFLOW_DISABLE_TELEMETRY=true

export QDIST_WORKSPACE=$workspace

start=$SECONDS
for model in digits_cnn digits_vit; do
    echo "quickstart: calibrating, quantizing and tuning $model"
    "$venv/bin/qdist" tune model="$model" data=digits evaluation=accuracy search.max_trials=10 "$@"
done

cat <<END
quickstart: done in $((SECONDS - start)) s; reports, plans and models are in $workspace
Go on with:
  export PATH="$venv/bin:\$PATH" QDIST_WORKSPACE="$workspace"
  qdist show "$workspace/digits_vit/plan.json"
  qdist compare model=digits_vit data=digits
  qdist quantize --help
END
