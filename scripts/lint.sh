#!/usr/bin/env bash
# Style and types: ruff and mypy for Python, clang-format for C++ and CUDA.
set -euo pipefail
cd "$(dirname "$0")/.."
bin=${VENV:-.venv}/bin
"$bin/ruff" check .
"$bin/ruff" format --check .
# mypy reads the installed package: the folders here get their names from the wheel's table in pyproject.toml
"$bin/mypy" -p relay_attention
git ls-files '*.h' '*.cc' '*.cpp' '*.cu' '*.cuh' | xargs -r "$bin/clang-format" --dry-run -Werror
