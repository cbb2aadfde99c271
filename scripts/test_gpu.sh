#!/usr/bin/env bash
# Builds the CUDA kernels and tests and times them on a machine with an NVIDIA GPU.
# usage: scripts/test_gpu.sh [build | test | ort | sanitize | bench | all]   (all = build, test, ort, sanitize, bench --quick)
#   ort: the backend onnxruntime-cuda; needs onnxruntime-gpu and the op library with the CUDA kernels, and is skipped
#   where there is no such onnxruntime
# environment: PYTHON (python3 with torch, numpy, pytest), OUT (results, default build/gpu), RELAY_CUDA_LIBRARY (skips the
#   build), RELAY_CUDA_ARCHITECTURES (default: native); for ort: RELAY_ATTENTION_LIBRARY (default: the one in
#   plugins/lib), RELAY_GPU_ARTIFACTS (what scripts/gpu_artifacts.py has made, where this machine cannot export)
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
    local target=(-arch="$arch")
    [[ $source != */hopper_* ]] || target=(-gencode "arch=compute_90a,code=sm_90a")
    nvcc -std=c++17 -O3 "${target[@]}" -Xcompiler -fPIC -I. -c "$source" -o "$object" &
    pids+=($!)
  done
  for pid in "${pids[@]}"; do wait "$pid"; done
  nvcc -arch="$arch" -shared -cudart static "${objects[@]}" -o "$folder/librelay_attention_cuda.so"
  export RELAY_CUDA_LIBRARY=$PWD/$folder/librelay_attention_cuda.so
  echo "built $RELAY_CUDA_LIBRARY"
}

run_pytest() { "$python" -m pytest -p no:cacheprovider -q "$@" tests/gpu; }

run_tests() { run_pytest -m gpu; }

run_ort() {
  # torch first, where there is one: it brings the CUDA libraries that ONNX Runtime needs
  local run='
try:
    import torch
except ImportError:
    pass
import sys, onnxruntime'
  if ! "$python" -c "$run
sys.exit('CUDAExecutionProvider' not in onnxruntime.get_available_providers())" 2>/dev/null; then
    echo "skipped: tests/runtime/test_onnxruntime_cuda.py: $python has no onnxruntime with CUDAExecutionProvider"
    return
  fi
  if ! "$python" -c "import relay_attention.runtime" 2>/dev/null; then # the package under its own name
    mkdir -p build/gpu/dev/relay_attention
    ln -sfn "$PWD"/package/* "$PWD/plugins" "$PWD/export" "$PWD/runtime" build/gpu/dev/relay_attention/
    export PYTHONPATH="$PWD/build/gpu/dev${PYTHONPATH:+:$PYTHONPATH}"
  fi
  "$python" -c "$run, pytest
sys.exit(pytest.main(sys.argv[1:]))" -p no:cacheprovider -q -rs -s -m gpu tests/runtime/test_onnxruntime_cuda.py
}

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
[[ $step == ort ]] || build
case $step in
  build) ;;
  test) run_tests ;;
  ort) run_ort ;;
  sanitize) sanitize ;;
  bench) bench "${@:2}" ;;
  all)
    run_tests
    run_ort
    sanitize
    bench --quick
    ;;
  *)
    echo "test_gpu.sh: no step '$step'; see its head" >&2
    exit 2
    ;;
esac
