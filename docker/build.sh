#!/usr/bin/env bash
# Builds the image trimkv-export:NAME with the versions of docker/versions.env.
#
#   docker/build.sh jetpack6|jetpack7|datacenter [option of docker build …]
#
# The Jetson images are for aarch64, and are built on a Jetson with that JetPack: what they compile, they compile there.
set -euo pipefail
cd "$(dirname "$0")/.."
name=${1:?jetpack6, jetpack7 or datacenter}
file=docker/$name/Dockerfile
# shellcheck source=docker/versions.env
. docker/versions.env
arguments=()
while read -r version; do
  arguments+=(--build-arg "$version=${!version}")
done < <(sed -n 's/^ARG //p' "$file" | sort -u)
docker build --file "$file" --tag "trimkv-export:$name" "${arguments[@]}" "${@:2}" .
