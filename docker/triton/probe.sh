#!/usr/bin/env bash
# Whether models answer: has each compute a step, within 5 seconds. Triton's own readiness does not see one that failed.
#
#   docker/triton/probe.sh [http://localhost:8000 [MODEL …]]
#
# Without models it asks all that are in the folder MODELS, /models by default.
set -euo pipefail
server=${1:-http://localhost:8000}
shift || true
if [ $# -eq 0 ]; then
  for folder in "${MODELS:-/models}"/*/1/package; do
    [ -d "$folder" ] || { echo "there is no model in ${MODELS:-/models}" >&2; exit 1; }
    folder=${folder%/1/package}
    set -- "$@" "${folder##*/}"
  done
fi
for model in "$@"; do
  curl --fail --silent --show-error --max-time 5 --output /dev/null "$server/v2/models/$model/generate" \
    -d '{"text_input": "", "probe": true}' || { echo "$model does not answer" >&2; exit 1; }
done
