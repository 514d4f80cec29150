#!/usr/bin/env bash
# The native libraries for 64-bit ARM, built on another Linux: sm_87 (Orin) and sm_110 (Thor), CUDA 13 (JetPack 7). The
# tests that need no GPU run in an emulator.
#
#   plugins/cross_aarch64.sh BUILD_FOLDER [folder with NvInferRuntime.h]
#
# Needs nvcc 13.0, cmake, pip, g++-aarch64-linux-gnu and qemu-user-static. What they link to of CUDA is fetched from the
# package index. BUILD_FOLDER is no folder right in build/, where the Python tests look for programs of this machine.
# JetPack 6.2 has CUDA 12.6 and TensorRT 10.3: compile there.
set -euo pipefail
build=$(realpath -m "${1:?the folder to build in}")
cd "$(dirname "$0")"
for tool in nvcc cmake aarch64-linux-gnu-g++ qemu-aarch64-static; do
  command -v $tool >/dev/null || { echo "error: $tool is not here" >&2; exit 1; }
done

# A toolkit with the tools of this machine and the target's headers and libraries: nvcc looks beside itself.
toolkit=$build/toolkit target=$build/toolkit/targets/sbsa-linux
if [ ! -e "$target" ]; then
  here=$(nvcc --dryrun -x cu -E /dev/null 2>&1 | sed -n 's/^#\$ TOP=//p')
  mkdir -p "$toolkit" "$target.part"
  cp -r "$here/bin" "$here/nvvm" "$toolkit"
  python3 -m pip install --quiet --no-deps --only-binary :all: --platform manylinux2014_aarch64 --target "$build/wheels" \
    nvidia-cuda-{runtime,crt,nvcc,cccl,culibos}==13.0.*
  cp -r "$build"/wheels/nvidia/cu13/{include,lib} "$target.part"
  ln -s libcudart.so.13 "$target.part/lib/libcudart.so"
  mv "$target.part" "$target"
fi

cmake -S . -B "$build" -DCMAKE_TOOLCHAIN_FILE=cmake/aarch64.cmake -DCMAKE_CUDA_COMPILER="$toolkit/bin/nvcc" \
  -DTRIMKV_CUDA=ON -DCMAKE_CUDA_ARCHITECTURES="87-real;110" -DTENSORRT_INCLUDE_DIR="${2:-}" \
  -DTRIMKV_FETCH_ONNXRUNTIME=ON -DTRIMKV_TESTS=ON
cmake --build "$build" --parallel "${WORKERS:-2}"
ctest --test-dir "$build" --output-on-failure
