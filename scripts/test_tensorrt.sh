#!/usr/bin/env bash
# Everything that TensorRT has to show on a GPU machine without internet, in one table.
#
# On a machine with internet, nvcc, g++, CMake, a Python 3.10 (PYTHON310) and this project's environment (PYTHON):
#   TENSORRT_ROOT=/path/8.6:/path/10:/path/11 scripts/test_tensorrt.sh prepare DIR
#     DIR/lib: the plugin for every TensorRT whose headers are named, a test host for each, the ONNX Runtime library;
#     DIR/wheels: what Python 3.10 needs beside TensorRT; DIR/work: small artifacts to build engines of
# On the GPU machine, in the checkout:
#   scripts/test_tensorrt.sh stage DIR...     copies what was carried to $STAGE (default /tmp/relay_tensorrt), also the
#     parts p00, p01, ... of a TensorRT 8.6 runtime with Python 3.10 (join.sh, env.sh, which sets RELAY_PY310)
#   scripts/test_tensorrt.sh adapters         the adapters of every major through the test host, with the real kernels
#   scripts/test_tensorrt.sh engine [--large] real TensorRT: names and registry, then scripts/check_tensorrt.py
# GPU times are only as good as the machine is idle.
set -euo pipefail
cd "$(dirname "$0")/.."
stage=${STAGE:-/tmp/relay_tensorrt}
python=${PYTHON:-python3}

# The package under its own name, out of the checkout's folders.
link_package() {
  mkdir -p "$1/relay_attention"
  ln -sfn "$PWD"/package/* "$1/relay_attention/"
  ln -sfn "$PWD/plugins" "$PWD/export" "$PWD/runtime" "$1/relay_attention/"
}

prepare() {
  local out majors=()
  mkdir -p "$1"; out=$(cd "$1" && pwd)
  mkdir -p "$out/lib" "$out/wheels" "$out/dev"
  cmake -S . -B build/tensorrt -DCMAKE_BUILD_TYPE=Release -DRELAY_CUDA=ON \
    -DRELAY_CUDA_ARCHITECTURES="${RELAY_CUDA_ARCHITECTURES:-90}" "-DTENSORRT_ROOT=${TENSORRT_ROOT//:/;}"
  cmake --build build/tensorrt --parallel "${JOBS:-2}"
  cmake --install build/tensorrt --prefix build/tensorrt/installed
  cp build/tensorrt/installed/plugins/lib/*.so "$out/lib/"
  PYTHONPATH=tests/tensorrt "$python" - "$out/lib" <<'P'
import pathlib, sys
import adapter_host
for headers in adapter_host.header_folders():
    print(adapter_host.build_host(headers, adapter_host.cuda_include(), pathlib.Path(sys.argv[1])))
P
  link_package "$out/dev"
  RELAY_ATTENTION_LIBRARY="$out/lib/librelay_attention_ort.so" PYTHONPATH="$out/dev" \
    "$python" scripts/check_tensorrt.py make "$out/work" ${DEMO:+--demo $DEMO}
  rm -rf "$out/dev" "$out/work"/hf_*
  "${PYTHON310:-python3.10}" -m pip download -q --only-binary=:all: -d "$out/wheels" "numpy<2" onnx onnx-ir \
    "onnxruntime<1.24" tokenizers jinja2 tqdm pytest pytest-timeout
  rm -f "$out"/wheels/numpy-*  # comes with the TensorRT runtime
  du -sh "$out"/*
}

copy_parts() {
  mkdir -p "$stage/parts"
  for folder in "$@"; do
    if compgen -G "$folder/part.*" >/dev/null; then cp "$folder"/* "$stage/parts/"; else cp -r "$folder"/. "$stage/"; fi
  done
  ls "$stage" "$stage/parts"
}

adapters() {
  link_package "$stage/dev"
  RELAY_TENSORRT_ADAPTERS="$stage/lib" PYTHONPATH="$stage/dev" \
    "$python" -m pytest -p no:cacheprovider -q -m gpu tests/tensorrt/test_adapter_gpu.py
}

engine() {
  link_package "$stage/dev"
  [[ -e $stage/runtime/env.sh ]] || bash "$stage/parts/join.sh" "$stage/parts" "$stage/runtime"
  # shellcheck disable=SC1091
  . "$stage/runtime/env.sh"
  if [[ ! -d $stage/site ]]; then
    # NumPy comes with the TensorRT runtime
    for wheel in "$stage"/wheels/*.whl; do
      [[ $wheel == */numpy-* ]] || "$python" -m zipfile -e "$wheel" "$stage/site"
    done
  fi
  export PYTHONPATH310="$stage/dev:$stage/site"
  export RELAY_ATTENTION_LIBRARY="$stage/lib/librelay_attention_ort.so"
  export RELAY_ATTENTION_TENSORRT_LIBRARY="$stage/lib/librelay_attention_tensorrt8.so"
  "$RELAY_PY310" -m pytest -p no:cacheprovider -q tests/tensorrt/test_real_tensorrt.py
  if [[ ${1:-} == --large && ! -d $stage/work/large ]]; then
    PYTHONPATH="$stage/dev" "$python" scripts/check_tensorrt.py make "$stage/large" --large
    mv "$stage/large/large" "$stage/work/large"
  fi
  PYTHONUNBUFFERED=1 "$RELAY_PY310" scripts/check_tensorrt.py check "$stage/work" "$@"
}

step=${1:-}
shift || true
case $step in
  prepare) prepare "$@" ;;
  stage) copy_parts "$@" ;;
  adapters) adapters ;;
  engine) engine "$@" ;;
  *)
    sed -n '2,17s/^# \{0,1\}//p' "$0" >&2
    exit 2
    ;;
esac
