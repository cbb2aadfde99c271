#!/usr/bin/env bash
# Builds the CUDA kernels and tests and times them on a machine with an NVIDIA GPU.
# usage: scripts/test_gpu.sh [build | test | sanitize | bench | all]   (all = build, test, sanitize, bench --quick)
# environment: PYTHON (python3 with torch, numpy, pytest), OUT (results, default build/gpu), RELAY_CUDA_LIBRARY (skips the
#   build), RELAY_CUDA_ARCHITECTURES (default: native)
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
out=${OUT:-build/gpu}
mkdir -p "$out"

build() {
  if [[ -n ${RELAY_CUDA_LIBRARY:-} ]]; then
    echo "using $RELAY_CUDA_LIBRARY"
    return
  fi
  # without CMake and headers of any engine: nvcc alone
  local arch=${RELAY_CUDA_ARCHITECTURES:-native} folder=build/gpu_library objects=() pids=()
  mkdir -p "$folder"
  for source in plugins/cuda/*.cu plugins/cuda/*.cpp; do
    local object="$folder/$(basename "$source").o"
    objects+=("$object")
    nvcc -std=c++17 -O3 -arch="$arch" -Xcompiler -fPIC -I. -c "$source" -o "$object" &
    pids+=($!)
  done
  for pid in "${pids[@]}"; do wait "$pid"; done
  nvcc -arch="$arch" -shared -cudart static "${objects[@]}" -o "$folder/librelay_attention_cuda.so"
  export RELAY_CUDA_LIBRARY=$PWD/$folder/librelay_attention_cuda.so
  echo "built $RELAY_CUDA_LIBRARY"
}

run_pytest() { "$python" -m pytest -p no:cacheprovider -q "$@" tests/gpu; }

run_tests() { run_pytest -m gpu; }

sanitize() {
  # each tool over the small calls only: they are hundreds of times slower than the kernels
  for tool in memcheck racecheck synccheck; do
    echo "compute-sanitizer $tool"
    compute-sanitizer --tool "$tool" --error-exitcode 86 --target-processes all \
      "$python" -m pytest -p no:cacheprovider -q -k test_small tests/gpu
  done
}

bench() { "$python" scripts/bench_gpu.py --out "$out" "$@"; }

step=${1:-all}
build
case $step in
  build) ;;
  test) run_tests ;;
  sanitize) sanitize ;;
  bench) bench "${@:2}" ;;
  all)
    run_tests
    sanitize
    bench --quick
    ;;
  *)
    echo "test_gpu.sh: no step '$step'; see its head" >&2
    exit 2
    ;;
esac
