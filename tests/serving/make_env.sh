#!/usr/bin/env bash
# What tests of the real Triton need, in one folder: the server (out of the wheel nvidia-pytriton, which carries it), a
# virtual environment for the model and one for the tests, all made once, from PyPI; and two demo packages.
#
#   tests/serving/make_env.sh FOLDER [PYTHON]
#
# PYTHON: one in which trimkv_export can build a package.
set -euo pipefail
cd "$(dirname "$0")/../.."
python=${2:-python3}
mkdir -p "$1"
folder=$(cd "$1" && pwd)
stamp=$folder/.made

if [ ! "$stamp" -nt tests/serving/make_env.sh ]; then
  version=$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])')
  for name in server model client; do "$python" -m venv --clear "$folder/$name"; done
  "$folder/server/bin/pip" install --quiet --no-deps nvidia-pytriton==0.7.0
  # The Python backend of this server (24.10) passes wrong values with numpy 2.
  "$folder/model/bin/pip" install --quiet --constraint <(grep -v '^numpy' constraints.txt) \
    'numpy<2' onnxruntime tokenizers jinja2 pillow
  # The client, the test runner, and what single runs need.
  "$folder/client/bin/pip" install --quiet --constraint <(grep -Ev '^(numpy|protobuf|grpc)' constraints.txt) \
    'tritonclient[grpc]==2.51.0' pytest pytest-xdist psutil onnxruntime tokenizers jinja2 pillow

  wheel=$folder/server/lib/python$version/site-packages
  server=$wheel/pytriton/tritonserver
  ln -sfn "$server" "$folder/tritonserver"
  mkdir -p "$folder/backends/python" "$folder/libraries"
  for file in backends/python/libtriton_python.so backends/python/triton_python_backend_utils.py \
    "python_backend_stubs/$version/triton_python_backend_stub"; do
    ln -sf "$server/$file" "$folder/backends/python/"
  done
  # perf_analyzer of the client's wheel wants two libraries that the server's wheel has under other names.
  for name in libb64.so.0d libcudart.so.12; do
    found=("$wheel/nvidia_pytriton.libs/${name%%.*}"-*)
    ln -sf "${found[0]}" "$folder/libraries/$name"
  done
  "$python" -c 'import sysconfig; print(sysconfig.get_config_var("LIBDIR"))' >"$folder/libdir"
  touch "$stamp"
fi

for model in demo:qwen3 seeing:qwen3_vl; do
  out=$folder/${model%%:*}
  rm -rf "$out"
  "$python" examples/demo_checkpoint.py "$out" --family "${model##*:}" >/dev/null
  "$python" -m trimkv_export build --model "$out/gates" --budget 64 --output "$out/package" >/dev/null
done
