"""Artifacts in bfloat16: weights, prefix, logits, what refuses them. Computed in float32: NO GPU is used."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
import transformers
from safetensors import safe_open

from relay_attention.cli import main
from relay_attention.errors import BackendError, ExportError
from relay_attention.export import export_model, float32_form, make_prefix, verify
from relay_attention.export import verification as verification_module
from relay_attention.export.build import BuildOptions, _check
from relay_attention.export.float32_form import computed_here, to_float32
from relay_attention.export.pieces import _Rows
from relay_attention.export.prefix import load_graph, open_session, set_prefix
from relay_attention.export.verification import not_finite_tensors
from relay_attention.runtime import bfloat16
from relay_attention.runtime.artifact import Artifact
from relay_attention.runtime.backend import load_backend

NEW = "Another system prompt, which is shorter."


@pytest.fixture(scope="module")
def checkpoint(tiny: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Qwen3 (norms of queries and keys, beside the others) saved in bfloat16."""
    folder = tmp_path_factory.mktemp("bfloat16") / "model"
    tiny.make_model(folder, tiny.CONFIGS["qwen3"]())
    transformers.AutoModelForCausalLM.from_pretrained(folder).to(torch.bfloat16).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def made(tiny: ModuleType, checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its artifact. Not to be changed: copy it first."""
    output = tmp_path_factory.mktemp("artifact") / "static"
    return export_model(checkpoint, tiny.SYSTEM_PROMPT, output, precision="bf16", threads=2)


@pytest.fixture
def artifact(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "artifact"))


def in_float32(checkpoint: Path) -> transformers.PreTrainedModel:
    """transformers in float32 with the checkpoint's weights, and rotary tables rounded as the op has them."""
    model = transformers.AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).eval()
    tables = model.model.rotary_emb.forward

    def rounded(*args: torch.Tensor, **options: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return tuple(table.to(torch.bfloat16).float() for table in tables(*args, **options))

    model.model.rotary_emb.forward = rounded
    return model


def without_prefix(folder: Path) -> onnxruntime.InferenceSession:
    """The float32 form of an artifact's graph with an empty prefix."""
    manifest = Artifact.open(folder).manifest
    model = load_graph(folder / "model.onnx")
    set_prefix(model, manifest.io.prefix_key, manifest.io.prefix_value, manifest.geometry, None)
    onnx.save(to_float32(model), folder / "empty.onnx")
    return open_session(folder / "empty.onnx", threads=2)


def bits_of(folder: Path, name: str) -> np.ndarray:
    tensor = next(each for each in load_graph(folder / "model.onnx").graph.initializer if each.name == name)
    if tensor.data_location != onnx.TensorProto.EXTERNAL:
        return np.frombuffer(tensor.raw_data, np.uint16).reshape(tensor.dims)
    entries = {entry.key: entry.value for entry in tensor.external_data}
    return np.memmap(folder / entries["location"], np.uint16, "r", int(entries["offset"]), tuple(tensor.dims))


def test_a_checkpoint_keeps_its_weights_bit_for_bit(checkpoint: Path, made: Path) -> None:
    with safe_open(checkpoint / "model.safetensors", "pt") as weights:
        names = set(weights.keys())
        for name in names:
            expected = weights.get_tensor(name).view(torch.uint16).numpy()
            found = bits_of(made, name)
            turned = expected.ndim == 2 and "embed" not in name  # stored as MatMul takes it
            assert np.array_equal(found, expected.T if turned else expected), name
    assert len(names) == 25
    graph = load_graph(made / "model.onnx").graph
    held = {tensor.name for tensor in graph.initializer if tensor.data_type == onnx.TensorProto.FLOAT}
    assert not held & names


def test_types_of_the_interface(made: Path) -> None:
    artifact = Artifact.open(made)
    artifact.check_hashes()
    manifest = artifact.manifest
    assert manifest.dtype == artifact.prefix.header.dtype == "bfloat16"
    assert manifest.kv_bytes_per_token == 2 * 2 * 2 * 16 * 2
    graph = load_graph(made / "model.onnx").graph
    types = {value.name: value.type.tensor_type.elem_type for value in (*graph.input, *graph.output)}
    assert types.pop("logits") == onnx.TensorProto.FLOAT
    for name in ("input_ids", "context_lens", "query_lens"):
        assert types.pop(name) == onnx.TensorProto.INT32
    assert set(types.values()) == {onnx.TensorProto.BFLOAT16}
    tables = [tensor for tensor in graph.initializer if tensor.name.startswith("rotary.")]
    assert [tensor.data_type for tensor in tables] == [onnx.TensorProto.BFLOAT16] * 2
    assert {entry.name for entry in made.iterdir()} == {*manifest.files, "relay.json"}
    onnx.checker.check_model(made / "model.onnx", full_check=True)


def test_logits_are_those_of_transformers_in_float32(checkpoint: Path, artifact: Path) -> None:
    """The graph with its weights widened, one call and two ragged ones; no rounding is in it."""
    manifest = computed_here(Artifact.open(artifact).manifest)
    session = without_prefix(artifact)
    tokens = np.int32([5, 200, 17, 44, 300, 9])
    with torch.no_grad():
        expected = in_float32(checkpoint)(torch.tensor([tokens.tolist()])).logits[0, -1].numpy()
    rows = _Rows(session, manifest, 2)
    rows.step([tokens[:2], tokens[:5]])
    for found in (*_Rows(session, manifest, 1).step([tokens]), *rows.step([tokens[2:], tokens[5:]])):
        np.testing.assert_allclose(found, expected, atol=2e-5 * np.abs(expected).max())


def test_the_prefix_is_what_transformers_caches_rounded(checkpoint: Path, made: Path) -> None:
    artifact = Artifact.open(made)
    with torch.no_grad():
        ids = torch.tensor([artifact.manifest.prefix.token_ids])
        cache = in_float32(checkpoint)(ids, use_cache=True).past_key_values
    found = [np.array(tensor) for pair in artifact.prefix.read() for tensor in pair]
    exact = [getattr(layer, name)[0].numpy() for layer in cache.layers for name in ("keys", "values")]
    for bits, values in zip(found, exact, strict=True):
        assert bits.dtype == np.uint16
        rounded = bfloat16.narrow(values)
        assert (bits == rounded).mean() > 0.99  # else float32's own rounding lies across a tie
        np.testing.assert_allclose(bfloat16.widen(bits), values, rtol=2**-8, atol=1e-4)


def test_a_new_prompt_is_the_same_as_an_export_with_it(tiny: ModuleType, made: Path, artifact: Path) -> None:
    before = Artifact.open(artifact).manifest
    make_prefix(artifact, NEW)
    other = Artifact.open(artifact)
    other.check_hashes()
    assert other.manifest.model_id == before.model_id
    assert other.manifest.prefix.length < before.prefix.length
    make_prefix(artifact, tiny.SYSTEM_PROMPT)
    for name in ("model.onnx", "prefix.bin", "weights.bin"):
        assert (artifact / name).read_bytes() == (made / name).read_bytes(), name


@pytest.mark.parametrize("options", [{}, {"prefix": "input", "all_logits": True}])
def test_it_agrees_with_its_model(
    tiny: ModuleType, checkpoint: Path, made: Path, tmp_path: Path, options: dict
) -> None:
    """What is left is the rounding of the prefix and of the rotary tables."""
    folder = made
    if options:
        folder = export_model(checkpoint, tiny.SYSTEM_PROMPT, tmp_path / "out", precision="bf16", **options)
    report = verify(folder, checkpoint, requests=5, new_tokens=8)
    assert report.ok
    assert all(request.max_abs_diff < request.tolerance / 2 for request in report.requests)
    assert (report.dtype, report.arithmetic) == ("bfloat16", "float32")
    assert "(bfloat16 computed in float32, onnxruntime)" in report.table()


def test_the_float32_form_without_memory_for_it(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights cast in every step, and no node fused: the same but for the order of sums."""
    artifact, prompts = Artifact.open(made), [[5, 200, 17], [44]]
    _, expected = verification_module._decode(artifact, "onnxruntime", prompts, 3, 2)
    monkeypatch.setattr(float32_form, "available_memory", lambda: 1)
    _, found = verification_module._decode(artifact, "onnxruntime", prompts, 3, 2)
    np.testing.assert_allclose(found, expected, atol=1e-5 * np.abs(expected).max())


def test_another_model_does_not_agree(tiny: ModuleType, made: Path, tmp_path: Path) -> None:
    other = tiny.make_model(tmp_path / "other", tiny.CONFIGS["qwen3"](), seed=1)
    assert not verify(made, other, requests=3, new_tokens=4).ok


def test_an_engine_is_compared_with_the_float32_form(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stand-in for an engine: the float32 form itself."""
    from relay_attention.export import compare as module

    monkeypatch.setattr(module, "load_backend", lambda name, artifact: module.load_on_cpu(artifact))
    report = module.compare(made, "engine", requests=3, new_tokens=4)
    assert report.ok
    assert "against onnxruntime, computed in float32" in report.table()
    assert all(layer.largest > 0.1 for layer in report.layers)


def test_weights_that_are_not_finite_are_named(artifact: Path, checkpoint: Path) -> None:
    name = "model.layers.1.mlp.up_proj.weight"
    bits = bits_of(artifact, name)
    assert list(not_finite_tensors(Artifact.open(artifact))) == []
    with (artifact / "weights.bin").open("r+b") as stream:
        stream.seek(bits.offset + 10)
        stream.write(b"\x80\x7f")  # infinity
    assert list(not_finite_tensors(Artifact.open(artifact))) == [name]


def test_weights_in_float32_are_rounded_to_nearest(llama: Path, tmp_path: Path) -> None:
    output = export_model(llama, "Be kind.", tmp_path / "out", precision="bf16")
    name = "model.layers.0.self_attn.q_proj.weight"
    with safe_open(llama / "model.safetensors", "np") as weights:
        expected = bfloat16.narrow(weights.get_tensor(name))
    np.testing.assert_array_equal(bits_of(output, name).T, expected)


def dequantized(model: onnx.ModelProto, folder: Path) -> onnx.ModelProto:
    """The float32 form of a graph, every MatMulNBits (4 bits, no zero points) a MatMul with its weights."""
    wide = to_float32(model)
    whole = onnx.load(folder / "model.onnx")
    held = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in whole.graph.initializer}
    nodes = [node for node in wide.graph.node if node.op_type == "MatMulNBits"]
    assert nodes
    for node, original in zip(
        nodes, [node for node in whole.graph.node if node.op_type == "MatMulNBits"], strict=True
    ):
        size = {item.name: item.i for item in node.attribute}
        packed, scales = held[original.input[1]], held[original.input[2]].astype(np.float32)
        assert len(node.input) == 3
        assert size["bits"] == 4
        levels = np.stack([packed & 15, packed >> 4], -1).reshape(size["N"], -1, size["block_size"])
        weight = ((levels.astype(np.float32) - 8) * scales.reshape(size["N"], -1, 1)).reshape(size["N"], -1)
        name = f"{node.output[0]}.weight"
        wide.graph.initializer.append(
            onnx.numpy_helper.from_array(np.ascontiguousarray(weight[:, : size["K"]].T), name)
        )
        node.CopyFrom(onnx.helper.make_node("MatMul", [node.input[0], name], list(node.output)))
    return wide


def test_genai_folders_in_4_bits(
    tiny: ModuleType, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Weights in 4 bits, scales and caches in bfloat16: as if they were dequantized."""
    source = tiny.make_genai(tmp_path / "genai", checkpoint, "int4", "cuda", use_cuda_bf16=1)
    artifact = Artifact.open(export_model(source, tiny.SYSTEM_PROMPT, tmp_path / "out"))
    assert artifact.manifest.dtype == "bfloat16"
    prompts = [[5, 200, 17], [44], [300, 9]]
    _, found = verification_module._decode(artifact, "onnxruntime", prompts, 1, 2)
    monkeypatch.setattr(float32_form, "to_float32", lambda model: dequantized(model, artifact.path))
    _, expected = verification_module._decode(artifact, "onnxruntime", prompts, 1, 2)
    np.testing.assert_allclose(found, expected, atol=1e-4 * np.abs(expected).max())


def test_genai_folders(tiny: ModuleType, checkpoint: Path, tmp_path: Path) -> None:
    source = tiny.make_genai(tmp_path / "genai", checkpoint, "bf16", "cuda")
    output = export_model(source, tiny.SYSTEM_PROMPT, tmp_path / "out", precision="bf16")
    assert Artifact.open(output).manifest.dtype == "bfloat16"
    assert verify(output, checkpoint, requests=3, new_tokens=4).ok
    with pytest.raises(ExportError, match="KV cache of BFLOAT16; its precision cannot be changed to fp16"):
        export_model(source, "prompt", tmp_path / "half", precision="fp16")


@pytest.mark.parametrize(("opset", "attention"), [(18, "eager"), (23, "sdpa")])
def test_onnx_decoders(
    tiny: ModuleType, checkpoint: Path, made: Path, tmp_path: Path, opset: int, attention: str
) -> None:
    """With past keys and values; attention written out, and as a node; proved in float32."""
    import torch_exports

    source = torch_exports.make_onnx(tmp_path / "onnx", checkpoint, opset, attention, dtype=torch.bfloat16)
    output = export_model(source, tiny.SYSTEM_PROMPT, tmp_path / "out")
    artifact = Artifact.open(output)
    assert artifact.manifest.dtype == "bfloat16"
    report = verify(output, checkpoint, requests=3, new_tokens=4)
    assert report.ok
    for pair, expected in zip(artifact.prefix.read(), Artifact.open(made).prefix.read(), strict=True):
        for bits, others in zip(pair, expected, strict=True):
            assert (bits == others).mean() > 0.99
    with pytest.raises(ExportError, match="its attention is of type BFLOAT16; it cannot be changed to fp16"):
        export_model(source, "prompt", tmp_path / "half", precision="fp16")


def refusals() -> list[tuple[Callable[[Path, Path], object], type[Exception], str]]:
    def cpu(checkpoint: Path, made: Path) -> object:
        return load_backend("onnxruntime", Artifact.open(made))

    def build(checkpoint: Path, made: Path) -> object:
        return _check(Artifact.open(made), BuildOptions())

    def target(checkpoint: Path, made: Path) -> object:
        return export_model(checkpoint, "x", made.parent / "no", precision="bf16", target="tensorrt")

    return [
        (cpu, BackendError, r"is bfloat16, .* 'onnxruntime-cuda', or export .* --precision fp16 or fp32"),
        (build, ExportError, r"is bfloat16; the plugin's kernels take float16: export with --precision fp16"),
        (target, ExportError, r"--target tensorrt takes no bfloat16.*--precision fp16"),
    ]


@pytest.mark.parametrize(("ask", "kind", "message"), refusals())
def test_what_takes_no_bfloat16_says_so(
    checkpoint: Path, made: Path, ask: Callable[[Path, Path], object], kind: type[Exception], message: str
) -> None:
    with pytest.raises(kind, match=message):
        ask(checkpoint, made)


def test_the_command(checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    prompt = tmp_path / "prompt.txt"
    prompt.write_text(NEW)
    command = ["export", str(checkpoint), "--system-prompt", str(prompt), "-o", str(tmp_path / "out")]
    assert main([*command, "--precision", "bf16"]) == 0
    assert "bfloat16" in capsys.readouterr().err
    assert main(["generate", str(tmp_path / "out"), "--prompts", str(prompt)]) == 2
    assert "is bfloat16" in capsys.readouterr().err
    assert main([*command, "--precision", "bf16", "--target", "tensorrt"]) == 2
    assert "takes no bfloat16" in capsys.readouterr().err


def test_arithmetic_is_float32_on_the_cpu_only() -> None:
    found = [verification_module.arithmetic("bfloat16", name) for name in ("onnxruntime", "onnxruntime-cuda")]
    assert found == ["float32", "bfloat16"]
