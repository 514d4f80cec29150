#!/bin/sh
# Fetch SmolLM2-135M-Instruct and texts, and train its gates: OUT/gates. Stopped, it goes on where it was.
#
#     examples/smollm2/train.sh OUT [PYTHON]
#
# The model goes to examples/smollm2/HuggingFaceTB, where the gates look for it. `nice` leaves the machine to others.
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
exec nice "$python" -m trimkv_export train --model "$base" --base-model HuggingFaceTB/SmolLM2-135M-Instruct "$@" \
  --chat "$out/chats.jsonl" --kind rg10 --budget 64 --context 1024 --width 128 --chat-share 0.4 \
  --start-rows 20 --steps 30 --learning-rate 5e-4 --resume --save-every 5 --output "$out/gates"
