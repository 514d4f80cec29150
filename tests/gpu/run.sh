#!/usr/bin/env bash
# Everything that needs an NVIDIA GPU, in one command: builds the CUDA kernels, tests them against the reference and the
# CPU kernels, runs the sanitizers over them, runs the TensorRT plugins as TensorRT would, runs packages on ONNX Runtime's
# CUDA provider and on TensorRT, measures, and holds the results against the limits. Markdown goes to stdout, all else to
# stderr.
#
#   tests/gpu/run.sh [work folder [folder with NvInferRuntime.h]] > results.md
#
# Exit status 1 if anything failed or did not run. TensorRT's headers are also looked for where its packages put them.
#
# Needs a GPU of compute capability 8.0 or newer, CUDA 12 or newer (nvcc, compute-sanitizer), CMake 3.24, a C++ compiler
# and Python 3.10. For all of it, in a virtual environment that is active:
#
#   pip install cmake torch -e '.[dev]' && pip uninstall -y onnxruntime && pip install onnxruntime-gpu
#   pip install --no-deps trimkv==0.1.5 && pip install einops
set -euo pipefail
cd "$(dirname "$0")/../.."

die() {
  echo "error: $*" >&2
  exit 1
}
PATH=$PATH:/usr/local/cuda/bin
python=$(command -v python3 || command -v python) || die "no Python here"
has_gpu='import sys; sys.path.insert(0, "benchmarks"); import gpu_attention; sys.exit(not gpu_attention.has_gpu())'
"$python" -c "$has_gpu" || die "no NVIDIA GPU here"
command -v nvcc >/dev/null || die "nvcc is not here: install the CUDA toolkit, 12 or newer"
command -v cmake >/dev/null || die "cmake is not here: pip install cmake"

work=${1:-$(mktemp -d)}
build=$work/build
tensorrt=${2:-}
for folder in /usr/include /usr/include/*-linux-gnu /usr/local/tensorrt/include; do
  if [ -z "$tensorrt" ] && [ -e "$folder/NvInferRuntime.h" ]; then tensorrt=$folder; fi
done
echo "Building in $build" >&2
configure() {
  cmake -S plugins -B "$build" -DTRIMKV_TESTS=ON -DTRIMKV_CUDA=ON -DCMAKE_CUDA_ARCHITECTURES=native \
    -DCMAKE_CUDA_FLAGS=-lineinfo -DTENSORRT_INCLUDE_DIR="$tensorrt" -DTRIMKV_FETCH_ONNXRUNTIME="$1" >&2
}
headers=yes
configure ON || { headers= && configure OFF; }
targets=(test_cuda_kernels bench_cuda_kernels ${headers:+trimkv_onnxruntime})
if [ -n "$tensorrt" ]; then
  targets+=(trimkv_plugin trimkv_plugin_autoreg trimkv_oracle test_tensorrt_{library,tensors,enqueue}_cuda)
fi
cmake --build "$build" --parallel --target "${targets[@]}" >&2
programs=$build/tests/cuda

status=0
failed() {
  echo "- $*"
  status=1
}

echo "## CUDA kernels"
echo
echo "$(nvidia-smi --query-gpu=name,driver_version --format=csv,noheader 2>/dev/null | head -n 1 | sed 's/, /, driver /'), \
$(nvcc --version | sed -n 's/.*release \([0-9.]*\),.*/CUDA \1/p'), commit $(git rev-parse --short HEAD 2>/dev/null || echo unknown)."
echo
what="Against the reference and the CPU kernels, launch by launch and in CUDA graphs"
if "$programs/test_cuda_kernels" >&2; then
  echo "- $what: passed."
else
  failed "$what: **FAILED**."
fi
for tool in memcheck racecheck synccheck; do
  if ! command -v compute-sanitizer >/dev/null; then
    failed "compute-sanitizer $tool: not run, the tool is not here."
    continue
  fi
  log=$work/$tool.log
  if timeout 1800 compute-sanitizer --tool "$tool" --error-exitcode 9 "$programs/test_cuda_kernels" short >"$log" 2>&1; then
    echo "- compute-sanitizer $tool, 0 findings at most: passed."
  else
    failed "compute-sanitizer $tool, 0 findings at most: **FAILED**, $(sed -n 's/^=* *\(.*SUMMARY.*\)/\1/p' "$log" | head -n 1)"
    tail -n 40 "$log" >&2
  fi
done

what="TensorRT plugins: enqueue on 200 random states, recorded runs and 2,000 tokens, plain and in CUDA graphs"
if [ -z "$tensorrt" ]; then
  failed "$what: not run, TensorRT's headers are not here; name their folder."
else
  plugin=$build/libtrimkv_plugin.so
  hosts=$build/tests/tensorrt
  if "$hosts/test_tensorrt_library_cuda" "$plugin" >&2 && "$hosts/test_tensorrt_tensors_cuda" "$plugin" >&2 &&
    "$hosts/test_tensorrt_enqueue_cuda" "$plugin" "$hosts/oracle.bin" >"$work/enqueue.log" 2>&1; then
    echo "- $what: passed ($(tail -n 1 "$work/enqueue.log"))."
  else
    failed "$what: **FAILED**."
  fi
  cat "$work/enqueue.log" >&2 || true
  if command -v compute-sanitizer >/dev/null; then
    if timeout 1800 compute-sanitizer --tool memcheck --error-exitcode 9 "$hosts/test_tensorrt_enqueue_cuda" "$plugin" \
      "$hosts/oracle.bin" short >"$work/enqueue-memcheck.log" 2>&1; then
      echo "- compute-sanitizer memcheck on the plugins, 0 findings at most: passed."
    else
      failed "compute-sanitizer memcheck on the plugins, 0 findings at most: **FAILED**."
      tail -n 40 "$work/enqueue-memcheck.log" >&2
    fi
  fi
fi

what="Packages on ONNX Runtime's CUDA provider (tests/gpu/test_gpu_engine.py)"
has_provider='import onnxruntime, pytest; assert "CUDAExecutionProvider" in onnxruntime.get_available_providers()'
if [ -z "$headers" ]; then
  failed "$what: not run, ONNX Runtime's C headers cannot be had."
elif ! "$python" -c "$has_provider" 2>/dev/null; then
  failed "$what: not run, it needs pytest and onnxruntime-gpu."
else
  mkdir -p trimkv_export/native
  cp "$build/libtrimkv_onnxruntime.so" trimkv_export/native/
  if "$python" -m pytest tests/gpu/test_gpu_engine.py -rs >"$work/engine.log" 2>&1 && ! grep -q skipped "$work/engine.log"; then
    echo "- $what: passed."
  else
    failed "$what: **FAILED**: $(tail -n 1 "$work/engine.log")"
  fi
  cat "$work/engine.log" >&2
fi

what="Packages on TensorRT (tests/gpu/test_gpu_tensorrt.py)"
if [ -z "$tensorrt" ] || ! "$python" -c 'import tensorrt, cuda.bindings, pytest' 2>/dev/null; then
  failed "$what: not run, it needs TensorRT's headers, its Python module, cuda-bindings and pytest (docs/tensorrt.md)."
else
  mkdir -p trimkv_export/native
  cp "$build"/libtrimkv_plugin*.so trimkv_export/native/
  if "$python" -m pytest tests/gpu/test_gpu_tensorrt.py -rs >"$work/tensorrt.log" 2>&1 &&
    ! grep -q skipped "$work/tensorrt.log"; then
    echo "- $what: passed."
  else
    failed "$what: **FAILED**: $(tail -n 1 "$work/tensorrt.log")"
  fi
  cat "$work/tensorrt.log" >&2
fi
echo
"$python" benchmarks/gpu_attention.py --kernels "$programs/bench_cuda_kernels" --json "$work/gpu_attention.json" || status=1
exit $status
