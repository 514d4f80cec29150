#!/usr/bin/env bash
# Builds the image, and in it the engine of a small model, which has to agree with ONNX Runtime: on a Jetson with JetPack 7.2.
#
#   docker/jetpack7/smoke.sh
set -euo pipefail
cd "$(dirname "$0")/../.."
# shellcheck source=docker/versions.env
. docker/versions.env
docker/build.sh jetpack7
docker run --rm --runtime nvidia trimkv-export:jetpack7 /opt/trimkv/share/check.sh "$JETPACK7_TENSORRT"
