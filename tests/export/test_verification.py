from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import onnx
import pytest

from relay_attention.cli import main
from relay_attention.errors import ArtifactError, ExportError, PromptError
from relay_attention.export import verify
from relay_attention.export.verification import RequestReport, VerifyReport, _compare, not_finite_tensors
from relay_attention.runtime.artifact import Artifact, FileEntry

QUICK = {"requests": 3, "new_tokens": 4}


@pytest.fixture
def artifact(llama_artifact: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(llama_artifact, tmp_path / "artifact"))


def _damage(folder: Path, name: str, change) -> None:
    """Changes the values of one weight, and the manifest's hash with it."""
    tensor = next(
        tensor
        for tensor in onnx.load(folder / "model.onnx", load_external_data=False).graph.initializer
        if tensor.name == name
    )
    entries = {entry.key: entry.value for entry in tensor.external_data}
    path = folder / entries["location"]
    values = np.memmap(path, np.float32, "r+", int(entries["offset"]), tuple(tensor.dims))
    change(values)
    values.flush()
    manifest = Artifact.open(folder).manifest
    files = manifest.files | {path.name: FileEntry.of(path)}
    dataclasses.replace(manifest, files=files).write(folder / "relay.json")


def test_an_artifact_agrees_with_its_model(llama: Path, llama_artifact: Path) -> None:
    report = verify(llama_artifact, llama, requests=5, new_tokens=8)
    assert report.ok
    assert [request.status for request in report.requests] == ["match"] * 5
    assert sorted(request.prompt_tokens for request in report.requests) == [1, 13, 24, 36, 48]
    assert all(request.max_abs_diff < 1e-3 for request in report.requests)


def test_a_weight_that_is_off_is_found(llama: Path, artifact: Path) -> None:
    def double(values: np.ndarray) -> None:
        values *= 2

    _damage(artifact, "model.layers.0.self_attn.o_proj.weight", double)
    report = verify(artifact, llama, **QUICK)
    assert not report.ok
    assert {request.status for request in report.requests} <= {"mismatch", "logits differ"}
    assert any(request.first_mismatch is not None for request in report.requests)


def test_weights_that_are_not_finite_are_named(llama: Path, artifact: Path) -> None:
    def spoil(values: np.ndarray) -> None:
        values[3, 5] = np.nan

    name = "model.layers.1.mlp.down_proj.weight"
    _damage(artifact, name, spoil)
    report = verify(artifact, llama, **QUICK)
    assert report.not_finite == [name]
    assert {request.status for request in report.requests} == {"not finite"}
    assert not report.ok
    assert f"NaN or Inf in: {name}" in report.table()


def test_a_prefix_that_is_not_finite_is_named(artifact: Path) -> None:
    def spoil(values: np.ndarray) -> None:
        values[0, 0, 0] = np.inf

    _damage(artifact, "prefix.1.value", spoil)
    assert list(not_finite_tensors(Artifact.open(artifact))) == ["prefix.1.value"]


def test_damaged_files_are_found_before_anything_runs(llama: Path, artifact: Path) -> None:
    with (artifact / "weights.bin").open("r+b") as stream:
        stream.write(b"\x01")
    with pytest.raises(ArtifactError, match=r"weights\.bin.*damaged"):
        verify(artifact, llama, **QUICK)


def test_references_that_are_none(tiny, llama_artifact: Path, tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="no such folder"):
        verify(llama_artifact, tmp_path / "none", **QUICK)
    with pytest.raises(ExportError, match="transformers cannot load the reference"):
        verify(llama_artifact, tmp_path, **QUICK)
    config = tiny.CONFIGS["llama"]()
    config.vocab_size = 400
    other = tiny.make_model(tmp_path / "other", config)
    with pytest.raises(ExportError, match=r"vocabulary of 400.*it is another model"):
        verify(llama_artifact, other, **QUICK)
    with pytest.raises(PromptError, match="do not fit in max_context"):
        verify(llama_artifact, other, new_tokens=512)
    with pytest.raises(PromptError, match="at least 1 request"):
        verify(llama_artifact, other, requests=0)


REFERENCE = np.array([[0.0, 10.0, 9.9995], [4.0, 3.0, -10.0]], np.float32)


@pytest.mark.parametrize(
    ("tokens", "off", "status", "counts"),
    [
        ([1, 0], 0.0, "match", (2, 0, 0)),
        ([2, 0], 0.0, "tie", (1, 1, 0)),  # the reference's second best is as good within tolerance
        ([1, 1], 0.0, "mismatch", (1, 0, 1)),
        ([2, 1], 0.0, "mismatch", (0, 1, 1)),
        ([1, 0], 0.01, "logits differ", (2, 0, 0)),
        ([1, 0], np.nan, "not finite", (2, 0, 0)),
    ],
)
def test_the_rule_for_ties(tokens: list[int], off: float, status: str, counts: tuple[int, int, int]) -> None:
    found = REFERENCE.copy()
    found[1, 2] += off
    report = _compare(7, tokens, found, REFERENCE, 2e-4)
    assert report.tolerance == pytest.approx(2e-3)
    assert report.status == status
    assert (report.matches, report.ties, report.mismatches) == counts


def test_a_report_agrees_only_if_all_of_it_does() -> None:
    good = RequestReport(3, 4, 4, 0, 0, None, 1e-5, 1e-3)
    report = VerifyReport("out", "model", "float32", "onnxruntime", 10, "float32", requests=[good])
    assert report.ok
    assert not dataclasses.replace(report, not_finite=["weight"]).ok
    bad = dataclasses.replace(good, mismatches=1)
    assert not dataclasses.replace(report, requests=[good, bad]).ok


def test_the_command_prints_a_table_and_fails_on_a_mismatch(
    llama: Path, artifact: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["verify", str(artifact), "--reference", str(llama), "--requests", "2", "--new-tokens", "3"]
    assert main(command) == 0
    assert "ok: 2 of 2 requests agree" in capsys.readouterr().out

    def negate(values: np.ndarray) -> None:
        values *= -1

    _damage(artifact, "lm_head.weight", negate)
    assert main([*command, "--json"]) == 1
    data = json.loads(capsys.readouterr().out)
    assert data["ok"] is False
    assert len(data["requests"]) == 2
