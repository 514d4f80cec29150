#!/usr/bin/env bash
# The image in one command: makes the demo package and its repository, starts the server, asks it, stops it.
#
#   docker/triton/smoke.sh
#
# Needs Docker with compose, and trimkv_export with the extras "export" and "runtime" in the active environment.
set -euo pipefail
cd "$(dirname "$0")/../.."
work=$(mktemp -d)
python=$(command -v python3 || command -v python)
"$python" examples/demo_checkpoint.py "$work" >/dev/null
"$python" -m trimkv_export build --model "$work/gates" --budget 64 --output "$work/package" >/dev/null
"$python" -m trimkv_export triton "$work/package" --output "$work/models" --name demo >/dev/null

compose=(docker compose -f docker/triton/compose.yaml)
export MODELS=$work/models
trap '"${compose[@]}" down --timeout 40; rm -rf "$work"' EXIT
"${compose[@]}" up --build --detach --wait
docker/triton/check.sh
