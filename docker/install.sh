#!/usr/bin/env bash
# Inside an image that is built: trimkv-export and its TensorRT plugin, compiled here, in the virtual environment /opt/trimkv.
#
#   docker/install.sh PYTHON CUDA_ARCHITECTURES TENSORRT [requirement …]
#
# PYTHON has venv. CUDA_ARCHITECTURES: as CMake takes them; "" for all that plugins/cuda names. TENSORRT: the folder with
# NvInferRuntime.h, or the release of NVIDIA/TensorRT whose headers are fetched. Requirements: besides our own.
set -euo pipefail
cd "$(dirname "$0")/.."
python=$1 architectures=$2 tensorrt=$3
target=${TARGET:-/opt/trimkv}

"$python" -m venv --system-site-packages "$target"
pip=("$target/bin/python" -m pip install --no-cache-dir --constraint constraints.txt)
"${pip[@]}" --upgrade pip
# safetensors: for the demo checkpoint of docker/check.sh.
"${pip[@]}" --build-constraint constraints.txt '.[export,vision,tensorrt]' safetensors "${@:4}"

headers=-DTENSORRT_INCLUDE_DIR=$tensorrt
case $tensorrt in v*) headers=-DTRIMKV_FETCH_TENSORRT=$tensorrt ;; esac
"$python" -m venv /tmp/tools
/tmp/tools/bin/pip install --no-cache-dir --constraint constraints.txt cmake
PATH=/tmp/tools/bin:/usr/local/cuda/bin:$PATH
cmake -S plugins -B /tmp/plugins -DTRIMKV_CUDA=ON "$headers" ${architectures:+"-DCMAKE_CUDA_ARCHITECTURES=$architectures"}
cmake --build /tmp/plugins --parallel "${WORKERS:-$(nproc)}" --target trimkv_plugin trimkv_plugin_autoreg
# -I: the package that was installed, not the source tree in this folder.
native=$("$target/bin/python" -I -c 'import pathlib, trimkv_export; print(pathlib.Path(trimkv_export.__file__).parent / "native")')
mkdir -p "$native"
cp /tmp/plugins/libtrimkv_plugin*.so "$native"
rm -rf /tmp/plugins /tmp/tools
