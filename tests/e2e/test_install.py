"""The wheel in an environment of its own: no torch, no compiler, only the engine and small packages."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest

from relay_attention.export import export_model
from relay_attention.runtime import RelayDecoder, SamplingParams

ROOT = Path(__file__).parents[2]
PROMPTS = ["Alice Stone", "Who is there?", "x"]
DECODE = """
import json, sys
from relay_attention.runtime import RelayDecoder, SamplingParams
with RelayDecoder.load(sys.argv[1], threads=1) as decoder:
    results = decoder.generate(json.loads(sys.argv[2]), SamplingParams(temperature=0.0, max_new_tokens=6))
heavy = [name for name in ("torch", "transformers", "onnx") if name in sys.modules]
print(json.dumps({"token_ids": [result.token_ids for result in results], "heavy": heavy}))
"""

pytestmark = pytest.mark.install


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    subprocess.run([sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "-w", folder, ROOT], check=True)
    return next(folder.glob("*.whl"))


def test_wheel_fits_any_python_and_holds_no_sources(wheel: Path) -> None:
    assert wheel.name.split("-")[2:4] == ["py3", "none"]
    assert wheel.name.endswith(f"-linux_{os.uname().machine}.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert "relay_attention/plugins/lib/librelay_attention_ort.so" in names
    assert "relay_attention/cli.py" in names
    ours = [name for name in names if name.startswith("relay_attention/")]
    assert not [name for name in ours if name.endswith((".cc", ".h", ".cu", ".cuh", ".txt"))]


def test_decodes_without_torch_and_compiler(wheel: Path, tmp_path: Path) -> None:
    model = ROOT / "examples" / "directory" / "model"
    artifact = export_model(model, "Alice Stone 4821\nBob Reed 7003", tmp_path / "artifact", max_context=64)
    environment = tmp_path / "environment"
    venv.create(environment, with_pip=True)
    python = environment / "bin" / "python"
    subprocess.run([python, "-m", "pip", "install", "-q", f"{wheel}[cpu]"], check=True)

    bare = {"PATH": str(environment / "bin"), "HOME": str(tmp_path), "LANG": "C.UTF-8"}
    for absent in ("torch", "transformers", "onnx"):
        found = subprocess.run([python, "-c", f"import {absent}"], env=bare, capture_output=True)
        assert found.returncode != 0, f"{absent} is there: the environment is not clean"
    command = [python, "-c", DECODE, artifact, json.dumps(PROMPTS)]
    run = subprocess.run(command, env=bare, cwd=tmp_path, check=True, capture_output=True, text=True)
    answer = json.loads(run.stdout)
    assert answer["heavy"] == []

    with RelayDecoder.load(artifact, threads=1) as decoder:
        here = decoder.generate(PROMPTS, SamplingParams(temperature=0.0, max_new_tokens=6))
    assert answer["token_ids"] == [result.token_ids for result in here]
    command = [environment / "bin" / "relay-attention", "inspect", artifact]
    assert "prefix" in subprocess.run(command, env=bare, check=True, capture_output=True, text=True).stdout
