#!/usr/bin/env bash
# Makes .venv and installs this project into it, with CPU wheels only.
# usage: scripts/setup.sh [EXTRA]      EXTRA: export (default), test or dev, as in pyproject.toml
#   PYTHON=python3.12 picks the interpreter (3.10 to 3.13), VENV=DIR another place than .venv.
set -euo pipefail
cd "$(dirname "$0")/.."
extra=${1:-export}
venv=${VENV:-.venv}
torch=2.13.0

say() { printf '\n== %s\n' "$*" >&2; }

usable() { # true where $1 is a Python between 3.10 and 3.13
  "$1" -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null
}

find_python() {
  local candidate
  for candidate in ${PYTHON:-python3 python3.12 python3.11 python3.13 python3.10}; do
    if usable "$candidate"; then command -v "$candidate"; return; fi
  done
  echo "No Python between 3.10 and 3.13 was found${PYTHON:+ at PYTHON=$PYTHON}: install one (apt-get install python3)" >&2
  return 1
}

install_system_packages() { # compiler, venv module, headers of the SIMD library
  local missing=()
  command -v c++ >/dev/null || missing+=(g++)
  "$python" -c 'import ensurepip' 2>/dev/null || missing+=(python3-venv)
  [ ${#missing[@]} -gt 0 ] || return 0
  local sudo=()
  if [ "$(id -u)" -ne 0 ]; then
    if sudo -n true 2>/dev/null; then sudo=(sudo -n); else
      echo "These system packages are missing: run  sudo apt-get install ${missing[*]}  and start again" >&2
      return 1
    fi
  fi
  say "installing ${missing[*]}"
  "${sudo[@]}" apt-get update -qq && "${sudo[@]}" apt-get install -y -qq "${missing[@]}" >/dev/null
}

install_torch() { # a version with the local label +cpu exists only as a CPU build, so CUDA packages cannot slip in
  "$venv/bin/python" -c 'import torch' 2>/dev/null && return
  say "installing torch $torch (CPU build)"
  "$venv/bin/pip" install -q "torch==$torch+cpu" 2>/dev/null ||
    "$venv/bin/pip" install -q "torch==$torch+cpu" --extra-index-url https://download.pytorch.org/whl/cpu || {
    echo "No CPU build of torch $torch for $("$venv/bin/python" --version) could be had (from pip's own indexes or" \
      "download.pytorch.org): pick another Python with PYTHON=..., or install torch into $venv yourself" >&2
    return 1
  }
}

python=$(find_python)
install_system_packages
if [ ! -x "$venv/bin/python" ]; then
  say "making $venv with $("$python" --version)"
  "$python" -m venv "$venv"
  "$venv/bin/python" -m pip install -q --upgrade pip
fi
install_torch
say "building and installing relay-attention[$extra]"
"$venv/bin/pip" install -q ".[$extra]"
