#!/usr/bin/env bash
# Everything that TensorRT has to show on a GPU machine without internet, in one table.
#
# On a machine with internet, nvcc, g++, CMake, a Python 3.10 (PYTHON310) and this project's environment (PYTHON):
#   TENSORRT_ROOT=/path/8.6:/path/10:/path/11 scripts/test_tensorrt.sh prepare DIR
#     DIR/lib: the plugin for every TensorRT whose headers are named, a test host for each, the ONNX Runtime library;
#     DIR/site: what Python 3.10 needs beside TensorRT; DIR/work: small artifacts to build engines of, and the graph
#     of a model of 2 GB (10 GB of memory to make). site and work are kept where they are there; BUILD: CMake's folder.
# On the GPU machine, in the checkout, with DIR's folders in $STAGE (default /dev/shm/relay), and beside them
#   runtime/env.sh, which sets RELAY_PY310 to a Python 3.10 with TensorRT, cuda-bindings and NumPy, and, if there is
#   one, ort/env.sh, which lets PYTHON import onnxruntime-gpu:
#   scripts/test_tensorrt.sh check [--seconds N] [--level N] [--only NAME[,NAME...]]
#     scripts/check_tensorrt.py; its logs go to $OUT too. --only: these steps and what they need that is not there:
#     names adapters fill build:large peer large large2 build:input bind build:small agree:small refit refused
#     no_cudnn build:demo demo build:large@3 large@3 levels
#   scripts/test_tensorrt.sh adapters   the test host of every major alone
# GPU times, and those of a build too, are only as good as the machine is idle.
set -euo pipefail
cd "$(dirname "$0")/.."
stage=${STAGE:-/dev/shm/relay}
python=${PYTHON:-python3}

# The package under its own name, out of the checkout's folders.
link_package() {
  mkdir -p "$1/relay_attention"
  ln -sfn "$PWD"/package/* "$1/relay_attention/"
  ln -sfn "$PWD/plugins" "$PWD/export" "$PWD/runtime" "$1/relay_attention/"
}

prepare() {
  local out build=${BUILD:-build/tensorrt} python310=${PYTHON310:-python3.10}
  mkdir -p "$1"
  out=$(cd "$1" && pwd)
  cmake -S . -B "$build" -DCMAKE_BUILD_TYPE=Release -DRELAY_CUDA=ON \
    ${RELAY_CUDA_ARCHITECTURES:+"-DRELAY_CUDA_ARCHITECTURES=$RELAY_CUDA_ARCHITECTURES"} \
    "-DTENSORRT_ROOT=${TENSORRT_ROOT//:/;}"
  cmake --build "$build" --parallel "${JOBS:-2}"
  cmake --install "$build" --prefix "$build/installed"
  rm -rf "$out/lib"
  mkdir -p "$out/lib"
  cp "$build"/installed/plugins/lib/*.so "$out/lib/"
  PYTHONPATH=tests/tensorrt "$python" - "$out/lib" <<'P'
import pathlib, sys
import adapter_host
for headers in adapter_host.header_folders():
    print(adapter_host.build_host(headers, adapter_host.cuda_include(), pathlib.Path(sys.argv[1])))
P
  if [[ ! -d $out/work ]]; then
    link_package "$out/dev"
    export RELAY_ATTENTION_LIBRARY="$out/lib/librelay_attention_ort.so"
    PYTHONPATH="$out/dev" "$python" scripts/check_tensorrt.py make "$out/making"
    PYTHONPATH="$out/dev" "$python" scripts/large_model.py make "$out/making/large"
    rm -rf "$out/dev"
    mv "$out/making" "$out/work"
  fi
  if [[ ! -d $out/site ]]; then
    "$python310" -m pip download -q --only-binary=:all: -d "$out/wheels" "numpy<2" onnx "onnx-ir>=1.1" \
      "onnxruntime<1.24" tokenizers jinja2 tqdm pytest pytest-timeout
    rm -f "$out"/wheels/numpy-* # comes with TensorRT
    for wheel in "$out"/wheels/*.whl; do "$python310" -m zipfile -e "$wheel" "$out/site"; done
    rm -rf "$out/wheels"
  fi
  du -sh "$out"/*
}

# $stage/peer: the Python that has torch, and onnxruntime-gpu, whatever Python 3.10's wrapper has set.
make_peer() {
  local path
  path=$([[ ! -f $stage/ort/env.sh ]] || { . "$stage/ort/env.sh" >&2 && echo "$PYTHONPATH"; })
  cat >"$stage/peer" <<W
#!/usr/bin/env bash
export PYTHONPATH="$stage/dev${path:+:$path}" LD_LIBRARY_PATH="${LD_LIBRARY_PATH:-}"
export RELAY_ATTENTION_LIBRARY="$stage/lib/librelay_attention_ort.so" RELAY_TENSORRT_ADAPTERS="$stage/lib"
unset PYTHONHOME PYTHONPATH310
exec "$(command -v "$python")" "\$@"
W
  chmod +x "$stage/peer"
}

adapters() {
  link_package "$stage/dev"
  make_peer
  "$stage/peer" -m pytest -p no:cacheprovider -q -m gpu tests/tensorrt/test_adapter_gpu.py
}

check() {
  link_package "$stage/dev"
  make_peer
  # shellcheck disable=SC1091
  . "$stage/runtime/env.sh"
  export PYTHONPATH310="$stage/dev:$stage/site"
  export RELAY_ATTENTION_LIBRARY="$stage/lib/librelay_attention_ort.so"
  export RELAY_ATTENTION_TENSORRT_LIBRARY="$stage/lib/librelay_attention_tensorrt8.so"
  local status=0
  PYTHONUNBUFFERED=1 "$RELAY_PY310" scripts/check_tensorrt.py check "$stage/work" --peer "$stage/peer" "$@" || status=$?
  if [[ -n ${OUT:-} ]]; then
    tar -C "$stage/work" -czf "$OUT/tensorrt-logs.tar.gz" logs $(cd "$stage/work" && ls build-*.log 2>/dev/null) || true
  fi
  return "$status"
}

step=${1:-}
shift || true
case $step in
  prepare) prepare "$@" ;;
  adapters) adapters ;;
  check) check "$@" ;;
  *)
    sed -n '2,20s/^# \{0,1\}//p' "$0" >&2
    exit 2
    ;;
esac
