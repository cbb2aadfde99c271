#!/usr/bin/env bash
# Installs the project into .venv and runs its tests on the CPU, on the installed package.
# usage: scripts/test.sh [pytest arguments]
set -euo pipefail
cd "$(dirname "$0")/.."
scripts/setup.sh "${EXTRA:-test}"
# one thread pool for every library: two cores are what CI has
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-2} HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
.venv/bin/pytest "$@"
