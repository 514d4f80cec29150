#!/bin/sh
# The Python bindings of TensorRT 10.3 (JetPack 6.2), 10.13 and 11.1, and of CUDA 12 and 13, each in a folder of FOLDER,
# for tests/unit/backends/test_backends_tensorrt_api.py. TensorRT's own libraries cannot be had like this: stubs take their
# place, enough for the bindings to be imported and looked at.
#
#   tests/bindings/fetch_bindings.sh FOLDER [PYTHON]
set -eu
folder=$1 python=${2:-python3}
for package in tensorrt-cu12-bindings==10.3.0 tensorrt-cu12-bindings==10.13.3.9 tensorrt-cu13-bindings==11.1.0.106 \
  cuda-bindings==12.9.4 cuda-bindings==13.0.3; do
  target=$folder/$package
  [ -e "$target" ] && continue
  "$python" -m pip install --quiet --only-binary :all: --target "$target.part" "$package"
  case $package in tensorrt-*)
    major=$(expr "$package" : '.*==\([0-9]*\)')
    for name in nvinfer nvinfer_plugin nvonnxparser; do
      cc -shared -fPIC -o "$target.part/lib$name.so.$major" "$(dirname "$0")/stub.c"
    done
    ;;
  esac
  mv "$target.part" "$target"
done
