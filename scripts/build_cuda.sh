#!/usr/bin/env bash
# Compiles the CUDA kernels and the adapters that use them, with nvcc and no GPU, into build/cuda.
# usage: scripts/build_cuda.sh [ARCHITECTURES]      default 90; "80-real;86-real;89-real;90" for the fat library
set -euo pipefail
cd "$(dirname "$0")/.."
bin=${VENV:-.venv}/bin
# cmake and ninja from PyPI where the machine has none
command -v cmake >/dev/null || { "$bin/pip" install -q cmake ninja; export PATH="$PWD/$bin:$PATH"; }
generator=""
command -v ninja >/dev/null && generator="-GNinja"
cmake -S . -B build/cuda $generator -DRELAY_CUDA=ON -DRELAY_CUDA_ARCHITECTURES="${1:-90}" -DCMAKE_BUILD_TYPE=Release
cmake --build build/cuda --parallel "$(nproc)"
