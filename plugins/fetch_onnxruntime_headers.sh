#!/usr/bin/env bash
# Puts ONNX Runtime's C headers into a folder and prints it. The Python wheels carry none.
#
#   plugins/fetch_onnxruntime_headers.sh FOLDER
#
# From Debian's libonnxruntime-dev (nothing is installed; the C API is ABI-stable, so these headers serve newer
# versions), or where that cannot be had from the release on GitHub.
set -euo pipefail
folder=$(realpath -m "$1")
headers=$folder/usr/include/onnxruntime
if [[ ! -f $headers/onnxruntime_c_api.h ]]; then
  mkdir -p "$folder"
  work=$(mktemp -d)
  trap 'rm -rf "$work"' EXIT
  from_debian() {
    command -v apt-get >/dev/null && command -v dpkg >/dev/null || return 1
    mkdir -p "$work/lists/partial"
    printf 'Types: deb\nURIs: http://deb.debian.org/debian\nSuites: trixie\nComponents: main\nSigned-By: %s\n' \
      /usr/share/keyrings/debian-archive-keyring.gpg >"$work/trixie.sources"
    local options=(-qq -o Dir::Etc::sourcelist="$work/trixie.sources" -o Dir::Etc::sourceparts=/dev/null
      -o Dir::State::Lists="$work/lists" -o APT::Sandbox::User=root)
    apt-get "${options[@]}" update && (cd "$work" && apt-get "${options[@]}" download libonnxruntime-dev) &&
      dpkg -x "$work"/libonnxruntime-dev_*.deb "$folder"
  }
  from_github() {
    command -v curl >/dev/null || return 1
    local version=1.21.0
    curl -fsSL "https://github.com/microsoft/onnxruntime/releases/download/v$version/onnxruntime-linux-x64-$version.tgz" |
      tar -xz -C "$work" && mkdir -p "$headers" && cp "$work"/onnxruntime-linux-x64-"$version"/include/*.h "$headers"
  }
  from_debian >&2 || from_github >&2 || {
    echo "error: ONNX Runtime's headers cannot be had; name a folder with onnxruntime_c_api.h: make plugins ONNXRUNTIME_INCLUDE_DIR=…" >&2
    exit 1
  }
fi
echo "$headers"
