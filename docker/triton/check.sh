#!/usr/bin/env bash
# Asks a running server for text in one piece and as a stream, which must be the same, and for an error.
#
#   docker/triton/check.sh [http://localhost:8000 [MODEL [http://localhost:8002]]]
set -euo pipefail
server=${1:-http://localhost:8000}
model=${2:-demo}
metrics=${3:-http://localhost:8002}
url=$server/v2/models/$model

for _ in $(seq 240); do
  if curl --fail --silent "$server/v2/health/ready"; then break; fi
  sleep 0.5
done
text='"text_input": "Once upon a time", "max_tokens": 16'
field='import json, sys; print("".join(json.loads(line)["text_output"] for line in sys.stdin if line.strip()), end="")'
whole=$(curl --fail --silent "$url/generate" -d "{$text}" | python3 -c "$field")
streamed=$(curl --fail --silent --no-buffer "$url/generate_stream" -d "{$text, \"stream\": true}" | sed -n 's/^data: //p' |
  python3 -c "$field")
[ -n "$whole" ] && [ "$whole" = "$streamed" ] || { echo "'$whole' is not '$streamed'" >&2; exit 1; }
curl --silent "$url/generate" -d '{"text_input": "x", "max_tokens": -1}' | grep -q 'max_tokens must be'
curl --fail --silent "$metrics/metrics" | grep -q '^trimkv_cache_bytes{'
echo "$model answers"
