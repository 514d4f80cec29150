#!/usr/bin/env bash
# Inside a container with a GPU: the TensorRT version, then from a checkpoint to tokens with a small model, whose engine has
# to agree with ONNX Runtime.
#
#   docker/check.sh TENSORRT_VERSION
set -euo pipefail
folder=$(dirname "$0")
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

trimkv-export doctor
found=$(python -c 'import tensorrt; print(tensorrt.__version__)')
case $found in "$1" | "$1".*) ;; *) echo "error: TensorRT is $found, not $1" >&2; exit 1 ;; esac
python "$folder/demo_checkpoint.py" "$work"
trimkv-export build --model "$work/gates" --budget 64 --precision fp16 --target tensorrt --output "$work/package"
trimkv-export verify "$work/package" --backend tensorrt
trimkv-export run "$work/package" --provider tensorrt --prompt "Once upon a time" --max-new-tokens 16
echo "TensorRT $found: the engine agrees"
