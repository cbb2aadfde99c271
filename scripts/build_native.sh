#!/bin/sh
# Builds the native libraries into plugins/lib/ of this checkout. usage: build_native.sh [-DNAME=VALUE ...]
# RELAY_CUDA=ON|OFF|AUTO (environment or -D) says whether the CUDA kernels are built; the default is OFF.
set -eu
root=$(cd "$(dirname "$0")/.." && pwd)
build="$root/build/native"
generator=""
command -v ninja >/dev/null && generator="-GNinja"
cmake -S "$root" -B "$build" $generator -DCMAKE_BUILD_TYPE=Release -DRELAY_CUDA="${RELAY_CUDA:-OFF}" "$@"
cmake --build "$build" --parallel "$(nproc)"
cmake --install "$build" --prefix "$root"
