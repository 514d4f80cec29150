#!/bin/sh
# Fetch SmolLM2-135M-Instruct and texts, and train its gates: OUT/gates. Stopped, it goes on where it was.
#
#     examples/smollm2/train.sh OUT [PYTHON]
#
# The model goes to examples/smollm2/HuggingFaceTB, where the gates look for it. `nice` leaves the machine to others, and
# threads that wait do not spin.
set -eu
here=$(cd "$(dirname "$0")" && pwd)
out=$1
python=${2:-python3}
mkdir -p "$out"
base=$("$python" "$here/fetch.py")
"$python" "$here/texts.py" "$out"
[ -e "$out/chats.jsonl" ] || "$python" "$here/chats.py" "$out/train" "$out/chats.jsonl"
set --
for text in "$out"/train/*.txt; do
  set -- "$@" --text "$text"
done
OMP_WAIT_POLICY=passive exec nice "$python" -m trimkv_export train --model "$base" "$@" --chat "$out/chats.jsonl" \
  --base-model HuggingFaceTB/SmolLM2-135M-Instruct --kind rg10 --budget 128 --context 1024 --width 128 \
  --chat-share 0.4 --start-rows 16 --steps 24 --learning-rate 1e-3 --save-every 3 --resume --output "$out/gates"
