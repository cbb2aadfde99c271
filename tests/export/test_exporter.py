from __future__ import annotations

import errno
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from relay_attention.errors import ExportError
from relay_attention.export import export_model
from relay_attention.runtime.artifact import Artifact
from relay_attention.runtime.text import SystemPrompt, Tokenizer


def _copy(source: Path, target: Path) -> Path:
    return Path(shutil.copytree(source, target))


def test_the_manifest_says_what_is_in_the_folder(tiny, llama_artifact: Path) -> None:
    artifact = Artifact.open(llama_artifact)
    artifact.check_hashes()
    manifest = artifact.manifest
    assert manifest.source == {"kind": "huggingface", "architecture": "LlamaForCausalLM"}
    geometry = manifest.geometry
    assert (geometry.num_heads, geometry.kv_num_heads, geometry.head_dim) == ((4, 4), (2, 2), (16, 16))
    assert (geometry.vocab_size, geometry.max_positions) == (384, 512)
    assert (manifest.dtype, manifest.logits, manifest.prefix.mode) == ("float32", "last", "static")
    assert (manifest.tokens.bos, manifest.tokens.eos, manifest.tokens.pad) == (0, (1,), 2)
    assert manifest.prefix.length + manifest.max_context == 512
    # all that the folder holds is listed, and nothing else
    assert {entry.name for entry in llama_artifact.iterdir()} == {*manifest.files, "relay.json"}
    assert (llama_artifact / "system_prompt.txt").read_text() == tiny.SYSTEM_PROMPT
    graph = onnx.load(llama_artifact / "model.onnx", load_external_data=False).graph
    assert [value.name for value in graph.input][:3] == ["input_ids", "context_lens", "query_lens"]
    assert {
        entry.value
        for tensor in graph.initializer
        for entry in tensor.external_data
        if entry.key == "location"
    } == {
        "weights.bin",
        "prefix.bin",
    }


def test_weights_are_aligned_and_identified_by_content(
    tiny, llama: Path, llama_artifact: Path, tmp_path: Path
) -> None:
    graph = onnx.load(llama_artifact / "model.onnx", load_external_data=False).graph
    offsets = [
        int(entry.value)
        for tensor in graph.initializer
        for entry in tensor.external_data
        if entry.key == "offset" and np.prod(tensor.dims) * 4 >= 4096
    ]
    assert offsets
    assert all(offset % 4096 == 0 for offset in offsets)
    again = Artifact.open(export_model(llama, "Another prompt.", tmp_path / "again"))
    other = tiny.make_model(tmp_path / "model", tiny.CONFIGS["llama"](), seed=1)
    different = Artifact.open(export_model(other, "Another prompt.", tmp_path / "other"))
    model_id = Artifact.open(llama_artifact).manifest.model_id
    assert again.manifest.model_id == model_id
    assert different.manifest.model_id != model_id


def test_a_chat_template_cuts_the_prefix_before_the_user(tiny, genai_llama: Path, tmp_path: Path) -> None:
    source = _copy(genai_llama, tmp_path / "model")
    tiny.edit_json(source / "tokenizer_config.json", chat_template=tiny.CHAT_TEMPLATE)
    output = export_model(source, tiny.SYSTEM_PROMPT, tmp_path / "out")
    artifact = Artifact.open(output)
    prompt = SystemPrompt.open(artifact, Tokenizer.open(output))
    assert artifact.manifest.prefix.template == "chat"
    # the template writes no space after <s>, but one before the text: where it ends depends on the tokenizer
    text = Tokenizer.open(output).backend.decode(list(prompt.token_ids), skip_special_tokens=False)
    assert text.startswith(f"<s>system: {tiny.SYSTEM_PROMPT}</s><s>user:")
    plain = export_model(source, tiny.SYSTEM_PROMPT, tmp_path / "plain", template="plain")
    assert Artifact.open(plain).manifest.prefix.template == "plain"


@pytest.mark.parametrize("precision", ["fp16", "fp32"])
def test_a_genai_folder_has_its_precision(genai_llama: Path, tmp_path: Path, precision: str) -> None:
    if precision == "fp32":
        output = export_model(genai_llama, "prompt", tmp_path / "out", precision=precision)
        assert Artifact.open(output).manifest.dtype == "float32"
    else:
        with pytest.raises(ExportError, match=r"KV cache of FLOAT; its precision cannot be changed to fp16"):
            export_model(genai_llama, "prompt", tmp_path / "out", precision=precision)


def test_a_window_that_the_builder_lost_is_spoken_of(
    tiny, genai_llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = _copy(genai_llama, tmp_path / "model")
    config = source / "genai_config.json"
    text = config.read_text().replace('"decoder": {', '"decoder": {"sliding_window": {"window_size": 24},', 1)
    config.write_text(text)
    export_model(source, "prompt", tmp_path / "out")
    assert "warning" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("remove", "reason"),
    [
        ("config.json", "neither a Hugging Face model"),
        ("model.safetensors", r"no \*\.safetensors"),
        ("tokenizer.json", "no tokenizer"),
    ],
)
def test_missing_files_are_named(llama: Path, tmp_path: Path, remove: str, reason: str) -> None:
    source = _copy(llama, tmp_path / "model")
    (source / remove).unlink()
    with pytest.raises(ExportError, match=reason):
        export_model(source, "prompt", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda folder: (folder / "model.onnx").unlink(), r"model\.onnx: missing"),
        (lambda folder: (folder / "model.onnx.data").unlink(), r"model\.onnx\.data: missing"),
        (lambda folder: (folder / "model.onnx").write_bytes(b"\xffnot"), "cannot be read as an ONNX model"),
        (lambda folder: (folder / "genai_config.json").write_text("{"), "not valid JSON"),
        (lambda folder: (folder / "genai_config.json").write_text('{"model": {}}'), "'decoder' is missing"),
        (lambda folder: (folder / "tokenizer.json").write_text("{}"), r"tokenizer\.json: cannot be read"),
    ],
)
def test_damaged_genai_folders_are_named(genai_llama: Path, tmp_path: Path, damage, reason: str) -> None:
    source = _copy(genai_llama, tmp_path / "model")
    damage(source)
    with pytest.raises(ExportError, match=reason) as found:
        export_model(source, "prompt", tmp_path / "out")
    assert str(source) in str(found.value)
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["model"]


def test_damaged_weights_are_named(llama: Path, tmp_path: Path) -> None:
    source = _copy(llama, tmp_path / "model")
    (source / "model.safetensors").write_bytes(b"\0" * 100)
    with pytest.raises(ExportError, match="transformers cannot load it"):
        export_model(source, "prompt", tmp_path / "out")


@pytest.mark.parametrize(
    ("text", "options", "reason"),
    [
        ("", {}, "empty"),
        ("word " * 600, {}, "must be shorter"),
        ("prompt", {"max_context": 512}, "leave only"),
        ("prompt", {"precision": "fp8"}, "one of fp32, fp16, bf16"),
        ("prompt", {"prefix": "dynamic"}, "'static' or 'input'"),
        ("prompt", {"template": "chat"}, "no chat template"),
    ],
)
def test_requests_that_cannot_be_met(
    genai_llama: Path, tmp_path: Path, text: str, options: dict, reason: str
) -> None:
    with pytest.raises(ExportError, match=reason):
        export_model(genai_llama, text, tmp_path / "out", **options)
    assert list(tmp_path.iterdir()) == []


def test_a_tokenizer_of_another_model_is_refused(genai_llama: Path, tmp_path: Path) -> None:
    import tokenizers

    source = _copy(genai_llama, tmp_path / "model")
    tokenizer = tokenizers.Tokenizer.from_file(str(source / "tokenizer.json"))
    tokenizer.add_special_tokens([f"<extra {i}>" for i in range(200)])
    tokenizer.save(str(source / "tokenizer.json"))
    with pytest.raises(ExportError, match="another model's"):
        export_model(source, "prompt <extra 199>", tmp_path / "out")


def test_layers_that_are_no_attention_are_refused(tiny, genai_llama: Path, tmp_path: Path) -> None:
    source = _copy(genai_llama, tmp_path / "model")
    config = (source / "genai_config.json").read_text()
    (source / "genai_config.json").write_text(
        config.replace('"num_hidden_layers": 2', '"num_hidden_layers": 3')
    )
    with pytest.raises(ExportError, match="3 layers, but 2 attentions"):
        export_model(source, "prompt", tmp_path / "out")


def test_a_model_with_a_memory_of_its_own_is_refused(genai_llama: Path, tmp_path: Path) -> None:
    """Adds to each token the one before it: right in one piece, wrong in two."""
    source = _copy(genai_llama, tmp_path / "model")
    model = ir.load(source / "model.onnx")
    ir.external_data.load_to_model(model)
    embedding = next(node for node in model.graph if node.name == "/model/embed_tokens/Gather")
    pads = ir.Value(name="pads", type=ir.TensorType(ir.DataType.INT64), shape=ir.Shape([6]))
    pads.const_value = ir.tensor(np.array([0, 1, 0, 0, -1, 0]), name="pads")
    model.graph.register_initializer(pads)
    new_pad = ir.node("Pad", [embedding.outputs[0], pads])
    new_add = ir.node("Add", [embedding.outputs[0], new_pad.outputs[0]])
    new_add.outputs[0].type, new_add.outputs[0].shape = embedding.outputs[0].type, embedding.outputs[0].shape
    embedding.outputs[0].replace_all_uses_with(new_add.outputs[0])
    for node in (new_pad, new_add):
        node.replace_input_with(0, embedding.outputs[0])
    model.graph.insert_after(embedding, [new_pad, new_add])
    (source / "model.onnx.data").unlink()
    ir.save(model, source / "model.onnx")
    with pytest.raises(
        ExportError, match=r"other logits when the same tokens come in two pieces \(off by \d\d+%"
    ):
        export_model(source, "prompt", tmp_path / "out")


def test_weights_that_are_not_finite_are_found_by_the_prefix(genai_llama: Path, tmp_path: Path) -> None:
    source = _copy(genai_llama, tmp_path / "model")
    model = ir.load(source / "model.onnx")
    ir.external_data.load_to_model(model)
    weight = model.graph.initializers["model.layers.0.attn.qkv_proj.MatMul.weight"]
    values = weight.const_value.numpy().copy()
    values[0, 70] = np.nan  # of the key
    weight.const_value = ir.tensor(values, name=weight.name)
    (source / "model.onnx.data").unlink()
    ir.save(model, source / "model.onnx")
    with pytest.raises(ExportError, match="layer 0: the keys of the system prompt are not finite"):
        export_model(source, "prompt", tmp_path / "out")


def test_a_full_disk_while_the_weights_are_written(
    genai_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = export_model(genai_llama, "old prompt", tmp_path / "out")

    def full(*arguments: object, **options: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(ir, "save", full)
    with pytest.raises(ExportError, match="disk full"):
        export_model(genai_llama, "new prompt", output)
    artifact = Artifact.open(output)
    artifact.check_hashes()
    assert (output / "system_prompt.txt").read_text() == "old prompt"
    assert [entry.name for entry in tmp_path.iterdir()] == ["out"]


KILLED = """
import os, signal, sys
from pathlib import Path
from relay_attention.export import export_model, prefix
compute = prefix.compute_prefix
def computed_and_killed(*arguments, **options):
    compute(*arguments, **options)
    os.kill(os.getpid(), signal.SIGKILL)
prefix.compute_prefix = computed_and_killed
export_model(sys.argv[1], "new prompt", sys.argv[2])
"""


def test_an_export_that_is_killed_leaves_the_old_artifact(genai_llama: Path, tmp_path: Path) -> None:
    output = export_model(genai_llama, "old prompt", tmp_path / "out")
    process = subprocess.run([sys.executable, "-c", KILLED, str(genai_llama), str(output)], check=False)
    assert process.returncode == -signal.SIGKILL
    Artifact.open(output).check_hashes()
    assert (output / "system_prompt.txt").read_text() == "old prompt"
    export_model(genai_llama, "newest prompt", output)
    assert (output / "system_prompt.txt").read_text() == "newest prompt"
    assert [entry.name for entry in tmp_path.iterdir()] == ["out"]
