#!/usr/bin/env bash
# Compiles the CUDA kernels for the GPU at hand, tests them, runs the sanitizers, then the benchmark.
# Markdown for docs/gpu-results.md goes to stdout, everything else to stderr.
#
#   tests/gpu/run.sh [work folder]      needs nvcc 12 or newer and a GPU of compute capability 8.0 or newer
set -euo pipefail
cd "$(dirname "$0")/../.."

work=${1:-$(mktemp -d)}
mkdir -p "$work"
nvcc=$(command -v nvcc || echo /usr/local/cuda/bin/nvcc)
capability=$(nvidia-smi --query-gpu=compute_cap --format=csv,noheader | head -n 1 | tr -d '. ')
flags=(-std=c++17 -O3 -lineinfo "-gencode=arch=compute_$capability,code=sm_$capability" -cudart static
  -Xcompiler -Wall,-Wextra -Iplugins/core/include -Iplugins/cuda)

echo "Compiling for sm_$capability" >&2
"$nvcc" "${flags[@]}" -c plugins/cuda/pool_attention.cu -o "$work/pool_attention.o" >&2 &
attention=$!
"$nvcc" "${flags[@]}" --fmad=false -c plugins/cuda/pool_update.cu -o "$work/pool_update.o" >&2 &
update=$!
wait $attention
wait $update
for program in test_cuda_kernels bench_cuda_kernels; do
  "$nvcc" "${flags[@]}" "plugins/tests/cuda/$program.cu" plugins/core/check.cc "$work/pool_attention.o" \
    "$work/pool_update.o" -o "$work/$program" >&2
done

echo "## CUDA kernels"
echo
nvidia-smi --query-gpu=name,driver_version --format=csv,noheader | head -n 1 |
  sed "s/\(.*\), \(.*\)/\1, driver \2, $("$nvcc" --version | sed -n 's/.*release \([0-9.]*\),.*/CUDA \1/p')./"
echo
if "$work/test_cuda_kernels" >&2; then
  echo "- Against the host reference, launch by launch and in a CUDA graph: passed."
else
  echo "- Against the host reference: **failed**."
  exit 1
fi
sanitizer=$(command -v compute-sanitizer || ls /usr/local/cuda/bin/compute-sanitizer 2>/dev/null || true)
for tool in memcheck racecheck synccheck; do
  if [ -z "$sanitizer" ]; then
    echo "- compute-sanitizer $tool: not run, the tool is not here."
  elif timeout 600 "$sanitizer" --tool "$tool" --error-exitcode 9 "$work/test_cuda_kernels" short >"$work/$tool.log" 2>&1; then
    echo "- compute-sanitizer $tool: no errors."
  else
    echo "- compute-sanitizer $tool: **failed** (or could not run here)."
    tail -n 20 "$work/$tool.log" >&2
  fi
done
echo
"$work/bench_cuda_kernels"
