from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import onnx
import pytest

from relay_attention.errors import ArtifactError, ExportError
from relay_attention.export import make_prefix
from relay_attention.export import prefix as prefix_module
from relay_attention.export.prefix import choose_max_context, compute_prefix, open_session, read_system_prompt
from relay_attention.runtime.artifact import Artifact, PrefixFile, PrefixHeader

NEW = "Another system prompt, which is shorter."


@pytest.fixture
def artifact(llama_artifact: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(llama_artifact, tmp_path / "artifact"))


def _layers(folder: Path) -> list[np.ndarray]:
    return [np.array(tensor) for pair in Artifact.open(folder).prefix.read() for tensor in pair]


def test_the_prefix_is_what_transformers_caches(llama: Path, llama_artifact: Path) -> None:
    import torch
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(llama).eval()
    tokens = Artifact.open(llama_artifact).manifest.prefix.token_ids
    with torch.no_grad():
        cache = model(torch.tensor([tokens]), use_cache=True).past_key_values
    expected = [getattr(layer, name)[0].numpy() for layer in cache.layers for name in ("keys", "values")]
    for found, wanted in zip(_layers(llama_artifact), expected, strict=True):
        np.testing.assert_allclose(found, wanted, atol=2e-5)


def test_chunks_of_any_size_give_the_same(artifact: Path) -> None:
    opened = Artifact.open(artifact)
    whole = _layers(artifact)
    model = onnx.load(artifact / "model.onnx", load_external_data=False)
    manifest = opened.manifest
    prefix_module.set_prefix(model, manifest.io.prefix_key, manifest.io.prefix_value, manifest.geometry, None)
    onnx.save(model, artifact / "empty.onnx")
    session = open_session(artifact / "empty.onnx")
    for chunk in (7, 1000):
        file = compute_prefix(session, artifact, manifest, progress=False, chunk=chunk)
        found = [np.array(tensor) for pair in file.read() for tensor in pair]
        for one, other in zip(found, whole, strict=True):
            np.testing.assert_allclose(one, other, atol=1e-5)


def test_a_new_prompt_keeps_the_weights_where_they_are(artifact: Path) -> None:
    before = Artifact.open(artifact)
    inode = (artifact / "weights.bin").stat().st_ino
    assert make_prefix(artifact, NEW, max_context=100) == artifact
    after = Artifact.open(artifact)
    after.check_hashes()
    assert (artifact / "weights.bin").stat().st_ino == inode
    assert after.manifest.model_id == before.manifest.model_id
    assert after.manifest.prefix.length < before.manifest.prefix.length
    assert after.manifest.max_context == 100
    assert (artifact / "system_prompt.txt").read_text() == NEW
    graph = onnx.load(artifact / "model.onnx", load_external_data=False).graph
    dims = next(tensor.dims for tensor in graph.initializer if tensor.name == "prefix.1.value")
    assert list(dims) == [2, after.manifest.prefix.length, 16]
    onnx.checker.check_model(artifact / "model.onnx", full_check=True)


def test_a_new_prompt_is_the_same_as_an_export_with_it(tiny, artifact: Path, llama_artifact: Path) -> None:
    make_prefix(artifact, NEW)
    make_prefix(artifact, tiny.SYSTEM_PROMPT)
    assert (artifact / "model.onnx").read_bytes() == (llama_artifact / "model.onnx").read_bytes()
    for found, expected in zip(_layers(artifact), _layers(llama_artifact), strict=True):
        np.testing.assert_array_equal(found, expected)


def test_a_longer_prompt_makes_the_context_smaller_where_positions_end(artifact: Path) -> None:
    make_prefix(artifact, "word " * 90)
    manifest = Artifact.open(artifact).manifest
    assert manifest.prefix.length + manifest.max_context == manifest.geometry.max_positions


@pytest.mark.parametrize(
    ("text", "options", "reason"),
    [
        (" \n", {}, "is empty"),
        ("word " * 600, {}, r"has \d+ tokens, the model has 512 positions"),
        (NEW, {"max_context": 0}, "at least 1 token"),
        (NEW, {"max_context": 510}, r"leave only \d+ of the model's 512"),
        (NEW, {"template": "chat"}, "no chat template"),
    ],
)
def test_prompts_that_do_not_fit_change_nothing(
    artifact: Path, text: str, options: dict, reason: str
) -> None:
    with pytest.raises(ExportError, match=reason):
        make_prefix(artifact, text, **options)
    Artifact.open(artifact).check_hashes()
    assert [entry.name for entry in artifact.parent.iterdir()] == ["artifact"]


def test_a_full_disk_while_the_prefix_is_computed(artifact: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int, offset: int, length: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(prefix_module.os, "posix_fallocate", full)
    with pytest.raises(ExportError, match="disk full"):
        make_prefix(artifact, NEW)
    Artifact.open(artifact).check_hashes()
    assert [entry.name for entry in artifact.parent.iterdir()] == ["artifact"]


def test_no_artifact_no_prefix(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="not a relay-attention artifact"):
        make_prefix(tmp_path, NEW)


def test_a_damaged_graph_is_named(artifact: Path) -> None:
    size = (artifact / "model.onnx").stat().st_size
    (artifact / "model.onnx").write_bytes(b"\xff" * size)
    with pytest.raises(ArtifactError, match=r"model\.onnx: cannot be read as an ONNX model"):
        make_prefix(artifact, NEW)


def test_the_file_is_one_that_the_runtime_reads(llama_artifact: Path) -> None:
    manifest = Artifact.open(llama_artifact).manifest
    file = PrefixFile.open(llama_artifact / "prefix.bin")
    assert file.header == PrefixHeader.of(manifest)
    extents = {name: (offset, nbytes) for name, offset, nbytes in _external(llama_artifact / "model.onnx")}
    for layer, (key, value, nbytes) in enumerate(file.extents()):
        assert extents[f"prefix.{layer}.key"] == (key, nbytes)
        assert extents[f"prefix.{layer}.value"] == (value, nbytes)


def _external(path: Path) -> list[tuple[str, int, int]]:
    found = []
    for tensor in onnx.load(path, load_external_data=False).graph.initializer:
        entries = {entry.key: entry.value for entry in tensor.external_data}
        if entries.get("location") == "prefix.bin":
            found.append((tensor.name, int(entries["offset"]), int(entries["length"])))
    return found


def test_max_context() -> None:
    assert choose_max_context(100, 8192, None) == 4096
    assert choose_max_context(100, 512, None) == 412
    assert choose_max_context(100, 512, 412) == 412
    with pytest.raises(ExportError, match="leave only 412"):
        choose_max_context(100, 512, 413)
    with pytest.raises(ExportError, match="at least 1"):
        choose_max_context(100, 512, 0)
    with pytest.raises(ExportError, match="must be shorter"):
        choose_max_context(512, 512, None)


def test_system_prompt_files(tmp_path: Path) -> None:
    path = tmp_path / "prompt.txt"
    path.write_bytes(b"\xef\xbb\xbfgr\xc3\xbc\xc3\x9f dich\r\n")
    assert read_system_prompt(path) == "grüß dich\r\n"
    path.write_bytes(b"gr\xfc\xdf")
    with pytest.raises(ExportError, match=r"prompt\.txt: not UTF-8 text: .* at byte 2"):
        read_system_prompt(path)
    path.write_bytes(b" \n\t")
    with pytest.raises(ExportError, match="the system prompt is empty"):
        read_system_prompt(path)
    with pytest.raises(ExportError, match="cannot be read: No such file"):
        read_system_prompt(tmp_path / "none.txt")
    with pytest.raises(ExportError, match="cannot be read: Is a directory"):
        read_system_prompt(tmp_path)
