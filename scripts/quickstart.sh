#!/usr/bin/env bash
# From a fresh machine to answered requests: installs into .venv, exports the demo model with a fresh directory as its
# system prompt, decodes 32 requests that only the directory can answer, and compares with the same model without
# relay attention. Needs no GPU and no server; about 4 minutes, most of it downloads.
# usage: scripts/quickstart.sh [SEED]      another seed, another directory
set -euo pipefail
cd "$(dirname "$0")/.."
seed=${1:-$((RANDOM * 32768 + RANDOM))}
out=build/quickstart
export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false

scripts/setup.sh export
python=.venv/bin/python
echo; echo "== a fresh directory as the system prompt (seed $seed)"
mkdir -p "$out"
"$python" examples/directory/make_directory.py --seed "$seed" --requests 32 -o "$out"
head -n 4 "$out/system_prompt.txt"; echo "... $(wc -l < "$out/system_prompt.txt") lines"
echo; echo "== exporting examples/directory/model with it"
.venv/bin/relay-attention export examples/directory/model --system-prompt "$out/system_prompt.txt" -o "$out/artifact"
.venv/bin/relay-attention inspect "$out/artifact"
echo; echo "== 32 requests in one batch"
"$python" scripts/compare.py "$out/artifact" "$out/requests.jsonl" --json "$out/compare.json"
