"""The main job as a user does it: the trained demo model, a directory it has never seen, requests in a batch.

The answers stand only in the shared prefix, so accuracy checks the whole path.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from relay_attention.export import export_model, verify
from relay_attention.runtime import RelayDecoder, SamplingParams

ROOT = Path(__file__).parents[2]
DEMO = ROOT / "examples" / "directory"
MODEL = DEMO / "model"
COMMAND = [sys.executable, "-m", "relay_attention"]
SEED = 90210
REQUESTS = 40
# what the model itself gets wrong (see examples/directory/README.md) is not the prefix path's fault
MOST_WRONG = 2


def run(*command: object) -> str:
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """system_prompt.txt and requests.jsonl of a fresh directory."""
    folder = tmp_path_factory.mktemp("directory")
    run(sys.executable, DEMO / "make_directory.py", "--seed", SEED, "--requests", REQUESTS, "-o", folder)
    return folder


@pytest.fixture(scope="module")
def artifact(directory: Path) -> Path:
    output = directory / "artifact"
    run(*COMMAND, "export", MODEL, "--system-prompt", directory / "system_prompt.txt", "-o", output)
    return output


def wrong(results: list[dict[str, str]]) -> list[dict[str, str]]:
    return [result for result in results if result["text"] != result["expected"]]


@pytest.mark.parametrize("max_batch", [32, 7])
def test_answers_come_from_the_prefix(artifact: Path, directory: Path, max_batch: int) -> None:
    prompts = directory / "requests.jsonl"
    lines = run(*COMMAND, "generate", artifact, "--prompts", prompts, "--max-batch", max_batch).splitlines()
    results = [json.loads(line) for line in lines]
    assert len(results) == REQUESTS
    assert len(wrong(results)) <= MOST_WRONG, wrong(results)


def test_another_directory_answers_differently(artifact: Path, directory: Path, tmp_path: Path) -> None:
    """The same requests after `relay-attention prefix` with other numbers: the old answers are gone."""
    text = (directory / "system_prompt.txt").read_text(encoding="utf-8")
    swap = str.maketrans("0123456789", "3456789012")
    (tmp_path / "other.txt").write_text(text.translate(swap), encoding="utf-8")
    other = tmp_path / "artifact"
    export_model(MODEL, text, other)
    run(*COMMAND, "prefix", other, "--system-prompt", tmp_path / "other.txt")
    requests = [json.loads(line) for line in (directory / "requests.jsonl").read_text().splitlines()]
    with RelayDecoder.load(other, threads=2) as decoder:
        results = decoder.generate([request["prompt"] for request in requests], SamplingParams())
    right = [
        result.text == request["expected"].translate(swap)
        for result, request in zip(results, requests, strict=True)
    ]
    assert right.count(False) <= MOST_WRONG


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_equals_transformers(directory: Path, tmp_path: Path, precision: str) -> None:
    text = (directory / "system_prompt.txt").read_text(encoding="utf-8")
    output = export_model(MODEL, text, tmp_path / "artifact", precision=precision)
    report = verify(output, MODEL, requests=6, new_tokens=8, threads=2)
    assert report.ok, report
    assert sum(request.matches for request in report.requests) > 0


def test_comparison_without_relay_attention(artifact: Path, directory: Path) -> None:
    """GroupQueryAttention over full prompts gives the same tokens, in more memory."""
    output = directory / "compare.json"
    table = run(
        sys.executable,
        ROOT / "scripts" / "compare.py",
        artifact,
        directory / "requests.jsonl",
        "--json",
        output,
    )
    numbers = json.loads(output.read_text(encoding="utf-8"))
    assert numbers["agreement"] == 1
    assert numbers["accuracy"] >= 1 - MOST_WRONG / REQUESTS
    assert numbers["relay"]["kv_bytes"] * 8 < numbers["without"]["kv_bytes"]
    assert "tokens/s" in table
    assert not list(artifact.glob(".baseline*"))
