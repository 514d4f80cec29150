#!/usr/bin/env bash
# Inside an image that is built: NVIDIA's package repository for Jetson, from which TensorRT is then always taken; the
# repository in the image, of CUDA for servers, has other builds of it.
#
#   jetson_repository.sh r39.2
set -euo pipefail
key=/usr/share/keyrings/jetson.asc
apt-get update
apt-get install --yes --no-install-recommends ca-certificates curl
curl -fsSL https://repo.download.nvidia.com/jetson/jetson-ota-public.asc -o $key
echo "deb [signed-by=$key] https://repo.download.nvidia.com/jetson/common $1 main" >/etc/apt/sources.list.d/jetson.list
cat >/etc/apt/preferences.d/jetson <<'EOF'
Package: *nvinfer* *nvonnxparsers* tensorrt*
Pin: origin repo.download.nvidia.com
Pin-Priority: 1001
EOF
apt-get update
