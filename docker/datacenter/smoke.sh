#!/usr/bin/env bash
# Builds the image, and in it the engine of a small model, which has to agree with ONNX Runtime: on a machine with an NVIDIA GPU.
#
#   docker/datacenter/smoke.sh
set -euo pipefail
cd "$(dirname "$0")/../.."
# shellcheck source=docker/versions.env
. docker/versions.env
docker/build.sh datacenter
docker run --rm --gpus all trimkv-export:datacenter /opt/trimkv/share/check.sh "$DATACENTER_TENSORRT"
