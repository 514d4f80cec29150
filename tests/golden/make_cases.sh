#!/usr/bin/env bash
# Remakes the recorded cases of this folder with a script that runs the official package `trimkv` on a CPU.
#
#   tests/golden/make_cases.sh PYTHON ORACLE_SCRIPT [CASE...]
#
# PYTHON is an environment with torch 2.13.0, trimkv 0.1.5, transformers 4.57.1 and triton. ORACLE_SCRIPT is a path: the
# script stands in for what needs a GPU, and is not in this repository; record_text.py and record_visual.py say what they
# use of it. A case names its family, then itself, and is a folder: base/, gates/, trace.npz, case.json. The cases with images (visual_cases.py) go to ../golden_visual, and share base/
# and gates/ of ../golden_visual/checkpoints.
set -euo pipefail
python=$1 oracle=$2
shift 2
here=$(cd "$(dirname "$0")" && pwd)
wanted=" $* "

case_() {
  local arch=$1 name=$2 folder=$here
  shift 2
  [[ $wanted == "  " || $wanted == *" $name "* ]] || return 0
  [[ $arch == qwen2_5_vl || $arch == llava ]] && folder=$here/../golden_visual
  "$python" "$here/record_text.py" "$oracle" --arch "$arch" --out "$folder/$name" "$@" 2>/dev/null | tail -n 1
}

small=(--hidden 32 --head-dim 8)
case_ qwen3 rg10_default          "${small[@]}" --gate rg10 --budget 8 --buffer 4 --chunks 40 --decode 24
case_ qwen3 rg10_every_token      "${small[@]}" --gate rg10 --seed 1 --budget 4 --buffer 1 --chunks 1,7,3 --decode 40
case_ qwen3 rg10_large            "${small[@]}" --gate rg10 --seed 2 --budget 64 --buffer 16 --chunks 90,30,50 --decode 60
case_ qwen3 rg10_one_kv_head      "${small[@]}" --gate rg10 --seed 3 --kv-heads 1 --budget 16 --buffer 8 --chunks 33,5,2 --decode 40
case_ qwen3 rg10_min_per_head     "${small[@]}" --gate rg10 --seed 4 --budget 8 --buffer 4 --min-per-head 2 --chunks 9,30 --decode 30
case_ qwen3 rg10_lookahead        "${small[@]}" --gate rg10 --seed 5 --budget 8 --buffer 5 --lookahead 8 --chunks 25,4 --decode 30
case_ qwen3 rg10_min_lookahead    "${small[@]}" --gate rg10 --seed 6 --budget 6 --buffer 3 --min-per-head 3 --lookahead 4 --chunks 17,2,21 --decode 30
case_ qwen3 rg10_mixed_chunks     "${small[@]}" --gate rg10 --seed 7 --budget 12 --buffer 6 --chunks 20,1,1,1,15,1,1,9,1,3 --decode 20
case_ qwen3 rg10_empty_heads      "${small[@]}" --gate rg10 --seed 8 --layers 4 --kv-heads 4 --budget 4 --buffer 2 --chunks 50,1,20 --decode 30
case_ qwen3 rg10_odd_shapes       --gate rg10 --seed 9 --hidden 40 --head-dim 16 --heads 6 --kv-heads 3 --budget 10 --buffer 16 --chunks 3,3,3,30 --decode 40
case_ qwen3 rg10_buffer_zero      "${small[@]}" --gate rg10 --seed 10 --budget 8 --buffer 0 --chunks 11,6 --decode 20
case_ qwen3 rg_default            "${small[@]}" --gate rg --seed 11 --budget 8 --buffer 4 --chunks 40 --decode 24
case_ qwen3 rg_one_kv_head        "${small[@]}" --gate rg --seed 12 --kv-heads 1 --budget 16 --buffer 1 --chunks 30,1,1,12 --decode 30
case_ qwen3 rg_large              "${small[@]}" --gate rg --seed 13 --budget 32 --buffer 16 --chunks 5,60,7 --decode 60
case_ qwen3 rg_lookahead          "${small[@]}" --gate rg --seed 14 --budget 4 --buffer 2 --lookahead 16 --chunks 13 --decode 40
case_ qwen3 rg_buffer_zero        "${small[@]}" --gate rg --seed 15 --budget 4 --buffer 0 --chunks 2,9 --decode 20

# The official Phi-3 has rg gates only; Phi-3 and Qwen2 take hidden / heads as the head dimension.
two=(--layers 2 --hidden 24 --head-dim 8)
case_ llama llama_rg10_default      "${two[@]}" --gate rg10 --seed 20 --heads 3 --kv-heads 1 --budget 8 --buffer 4 --chunks 30 --decode 20
case_ llama llama_rg10_odd_head     --layers 2 --hidden 24 --head-dim 10 --gate rg10 --seed 21 --budget 6 --buffer 3 --min-per-head 2 --chunks 5,1,18 --decode 20
case_ llama llama_rg_no_gqa         "${two[@]}" --gate rg --seed 22 --heads 3 --kv-heads 3 --budget 12 --buffer 5 --chunks 20,9 --decode 20
case_ llama llama_rg_lookahead      --layers 3 --hidden 24 --head-dim 12 --gate rg --seed 23 --budget 5 --buffer 1 --lookahead 8 --chunks 1,1,14 --decode 20
case_ qwen2 qwen2_rg10_no_gqa       "${two[@]}" --gate rg10 --seed 30 --heads 3 --kv-heads 3 --budget 8 --buffer 0 --chunks 25,3 --decode 20
case_ qwen2 qwen2_rg10_lookahead    --layers 3 --hidden 32 --head-dim 8 --gate rg10 --seed 31 --budget 5 --buffer 4 --min-per-head 1 --lookahead 6 --chunks 12,2,9 --decode 20
case_ qwen2 qwen2_rg_default        --layers 2 --hidden 32 --head-dim 8 --gate rg --seed 32 --budget 8 --buffer 4 --chunks 30 --decode 20
case_ qwen2 qwen2_rg_one_kv_head    "${two[@]}" --gate rg --seed 33 --heads 3 --kv-heads 1 --budget 16 --buffer 2 --chunks 7,1,20 --decode 20
case_ phi3  phi3_rg_default         --layers 2 --hidden 32 --head-dim 8 --gate rg --seed 40 --budget 8 --buffer 4 --chunks 30 --decode 20
case_ phi3  phi3_rg_one_kv_head     "${two[@]}" --gate rg --seed 41 --heads 3 --kv-heads 1 --budget 12 --buffer 1 --chunks 17,1,1,6 --decode 20
case_ phi3  phi3_rg_no_gqa          "${two[@]}" --gate rg --seed 42 --heads 3 --kv-heads 3 --budget 4 --buffer 0 --chunks 2,19 --decode 20
case_ phi3  phi3_rg_lookahead       --layers 3 --hidden 24 --head-dim 12 --heads 2 --gate rg --seed 43 --budget 6 --buffer 3 --lookahead 12 --chunks 9,9,9 --decode 20

# One image in the first step, of 24 tokens and of 25.
seen=(--layers 2 --hidden 32 --head-dim 8)
case_ qwen2_5_vl qwen2_5_vl_rg_default     "${seen[@]}" --gate rg --seed 50 --budget 8 --buffer 4 --chunks 40,3 --decode 16
case_ qwen2_5_vl qwen2_5_vl_rg10_lookahead "${seen[@]}" --gate rg10 --seed 51 --budget 6 --buffer 3 --min-per-head 2 --lookahead 4 --chunks 33,1,9 --decode 16
case_ llava      llava_rg_lookahead        "${seen[@]}" --gate rg --seed 62 --budget 6 --buffer 2 --lookahead 8 --chunks 30,1,12 --decode 16
case_ llava      llava_rg10_default        "${seen[@]}" --gate rg10 --seed 61 --kv-heads 1 --budget 12 --buffer 5 --chunks 36,4 --decode 16

"$python" "$here/record_visual.py" "$oracle" "$@"
