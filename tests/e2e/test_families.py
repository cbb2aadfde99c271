"""Model families, each a tiny random model made here, beside transformers running every request in full.

A case is exported with a system prompt that is longer than any window, decoded by RelayDecoder over a ragged
batch, and held against transformers by the rule of `verify`: every token is the reference's best (or a tie
within the tolerance), every logit is close. A refusal is a case too: its reason is part of docs/models.md.

`pytest tests/e2e/test_families.py --models-table` writes docs/models.md from what ran.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import torch
import transformers

from relay_attention.errors import ExportError
from relay_attention.export import export_model, verify
from relay_attention.export.passes import run
from relay_attention.export.passes.tensorrt import tensorrt_passes
from relay_attention.runtime import RelayDecoder, SamplingParams
from relay_attention.runtime.artifact import Artifact

HIDDEN, HEADS, KV_HEADS, HEAD_DIM = 64, 4, 2, 16
LAYERS, VOCAB, POSITIONS, WINDOW = 2, 384, 512, 24
PROMPTS = (1, 29, 2, 17)  # tokens: ragged, more requests than cache slots
NEW_TOKENS = 6
MIXED = ["sliding_attention", "full_attention"]

_TOKENS = {"vocab_size": VOCAB, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
# wide enough that attention decides which token comes next
_COMMON = {
    **_TOKENS,
    "hidden_size": HIDDEN,
    "intermediate_size": 128,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KV_HEADS,
    "max_position_embeddings": POSITIONS,
    "initializer_range": 0.2,
}
_ONE_KIND_OF_HEAD = {name: value for name, value in _COMMON.items() if name != "num_key_value_heads"}
_LONG = {
    "rope_type": "longrope",
    "rope_theta": 1e4,
    "short_factor": [1.0 + 0.05 * i for i in range(HEAD_DIM // 2)],
    "long_factor": [1.5 + 0.4 * i for i in range(HEAD_DIM // 2)],
}


def _rope(rope_type: str, **parameters: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": rope_type, "rope_theta": 1e4, **parameters}}


def _make(config: type, *bases: dict[str, Any], **fields: Any) -> Callable[[], Any]:
    merged: dict[str, Any] = {}
    for each in (*(bases or (_COMMON,)), fields):
        merged |= each
    return lambda: config(**merged)


t = transformers
FAMILIES: dict[str, tuple[str, Callable[[], Any]]] = {
    "llama3": (
        "Llama 3: llama3 rotary scaling",
        _make(
            t.LlamaConfig,
            _COMMON,
            _rope(
                "llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
                original_max_position_embeddings=64,
            ),
        ),
    ),
    "llama-linear": (
        "Llama: linear rotary scaling", _make(t.LlamaConfig, _COMMON, _rope("linear", factor=4.0))
    ),
    "llama-yarn": (
        "Llama: yarn rotary scaling",
        _make(t.LlamaConfig, _COMMON, _rope("yarn", factor=4.0, original_max_position_embeddings=128)),
    ),
    "llama-dynamic": (
        "Llama: dynamic-NTK rotary scaling, up to max_position_embeddings",
        _make(t.LlamaConfig, _COMMON, _rope("dynamic", factor=2.0)),
    ),
    "mistral": ("Mistral: sliding window", _make(t.MistralConfig, sliding_window=WINDOW, **_COMMON)),
    "qwen2": ("Qwen2: biased QKV", _make(t.Qwen2Config)),
    "qwen3": ("Qwen3: q/k norm", _make(t.Qwen3Config, head_dim=HEAD_DIM, **_COMMON)),
    "qwen3-moe": (
        "Qwen3-MoE: routed experts",
        _make(
            t.Qwen3MoeConfig, head_dim=HEAD_DIM, num_experts=4, num_experts_per_tok=2,
            moe_intermediate_size=32, **_COMMON,
        ),
    ),
    "mixtral": (
        "Mixtral: routed experts",
        _make(t.MixtralConfig, num_local_experts=3, num_experts_per_tok=2, **_COMMON),
    ),
    "phi3": (
        "Phi-3: fused QKV, longrope, short regime",
        _make(t.Phi3Config, _COMMON, rope_parameters=_LONG, original_max_position_embeddings=256),
    ),
    "phi3-long": (
        "Phi-3: fused QKV, longrope, long regime, window",
        _make(
            t.Phi3Config, _COMMON, rope_parameters=_LONG, original_max_position_embeddings=64,
            sliding_window=WINDOW,
        ),
    ),
    "gemma2": (
        "Gemma 2: softcap, alternating window",
        _make(
            t.Gemma2Config, head_dim=HEAD_DIM, query_pre_attn_scalar=24, sliding_window=WINDOW,
            layer_types=MIXED, attn_logit_softcapping=5.0, final_logit_softcapping=15.0, **_COMMON,
        ),
    ),
    "gemma3": (
        "Gemma 3 (text): alternating window, a rotary embedding for each kind of layer",
        _make(
            t.Gemma3TextConfig, head_dim=HEAD_DIM, query_pre_attn_scalar=24, sliding_window=WINDOW,
            layer_types=MIXED, **_COMMON,
        ),
    ),
    "gpt2": (
        "GPT-2: learned positions",
        _make(
            t.GPT2Config, _TOKENS, n_positions=POSITIONS, n_embd=HIDDEN, n_layer=LAYERS, n_head=HEADS,
            initializer_range=0.2,
        ),
    ),
    "opt": (
        "OPT: learned positions with an offset",
        _make(
            t.OPTConfig, _TOKENS, hidden_size=HIDDEN, word_embed_proj_dim=HIDDEN, ffn_dim=128,
            num_hidden_layers=LAYERS, num_attention_heads=HEADS, max_position_embeddings=POSITIONS,
            init_std=0.2,
        ),
    ),
    "gpt-neox": ("GPT-NeoX: partial rotary", _make(t.GPTNeoXConfig, _ONE_KIND_OF_HEAD, rotary_pct=0.5)),
    "falcon": (
        "Falcon: multi-query, torch's own attention call",
        _make(
            t.FalconConfig, _TOKENS, hidden_size=HIDDEN, num_hidden_layers=LAYERS, num_attention_heads=HEADS,
            max_position_embeddings=POSITIONS, initializer_range=0.2,
        ),
    ),
    "falcon-gqa": (
        "Falcon, new decoder: grouped queries (cached once per query head)",
        _make(
            t.FalconConfig, _TOKENS, hidden_size=HIDDEN, num_hidden_layers=LAYERS, num_attention_heads=HEADS,
            new_decoder_architecture=True, num_kv_heads=KV_HEADS, max_position_embeddings=POSITIONS,
            initializer_range=0.2,
        ),
    ),
    "stablelm": ("StableLM: partial rotary", _make(t.StableLmConfig, partial_rotary_factor=0.5, **_COMMON)),
    "smollm3": ("SmolLM3: layers without rotary", _make(t.SmolLM3Config, no_rope_layers=[1, 0], **_COMMON)),
    "granite": (
        "Granite: multipliers of attention, residual and logits",
        _make(
            t.GraniteConfig, attention_multiplier=0.3, residual_multiplier=0.5, embedding_multiplier=2.0,
            logits_scaling=1.5, **_COMMON,
        ),
    ),
    "olmo2": ("OLMo2: norms behind the blocks", _make(t.Olmo2Config)),
}  # fmt: skip

REFUSALS: dict[str, tuple[str, Callable[[], Any], str]] = {
    "llama-dynamic-beyond": (
        "Llama: dynamic-NTK, beyond max_position_embeddings",
        _make(t.LlamaConfig, {**_COMMON, "max_position_embeddings": 64}, _rope("dynamic", factor=2.0)),
        "changes its frequencies after 64 tokens",
    ),
    "phi3-across": (
        "Phi-3: longrope, max_context across the switch",
        _make(t.Phi3Config, _COMMON, rope_parameters=_LONG, original_max_position_embeddings=256),
        "changes its frequencies after 256 tokens",
    ),
    "gpt-oss": (
        "gpt-oss: attention sinks",
        _make(t.GptOssConfig, head_dim=HEAD_DIM, num_local_experts=2, num_experts_per_tok=1, **_COMMON),
        "attention sinks",
    ),
    "bloom": ("BLOOM: ALiBi", _make(t.BloomConfig, _TOKENS, hidden_size=32, n_layer=1, n_head=2), "ALiBi"),
    "mpt": (
        "MPT: ALiBi",
        _make(t.MptConfig, _TOKENS, d_model=32, n_layers=1, n_heads=2, max_seq_len=POSITIONS),
        "ALiBi",
    ),
    "falcon-alibi": (
        "Falcon: ALiBi",
        _make(
            t.FalconConfig, _TOKENS, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, alibi=True,
            max_position_embeddings=POSITIONS,
        ),
        "ALiBi",
    ),
    "gpt-j": (
        "GPT-J: attention written out by hand",
        _make(t.GPTJConfig, _TOKENS, n_embd=32, n_layer=1, n_head=2, rotary_dim=8, n_positions=POSITIONS),
        "attend in code of their own",
    ),
    "t5": ("T5: encoder-decoder", _make(t.T5Config, _TOKENS, d_model=8, num_layers=1), "encoder-decoder"),
    "bart": (
        "BART: encoder-decoder",
        _make(
            t.BartConfig, _TOKENS, d_model=16, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2,
            decoder_attention_heads=2, is_encoder_decoder=True,
        ),
        "encoder-decoder",
    ),
    "qwen3-next": (
        "Qwen3-Next: linear attention in between",
        _make(
            t.Qwen3NextConfig, head_dim=HEAD_DIM, num_experts=2, num_experts_per_tok=1,
            moe_intermediate_size=16, shared_expert_intermediate_size=16, linear_num_value_heads=2,
            linear_num_key_heads=2,
            linear_key_head_dim=8, linear_value_head_dim=8,
            layer_types=["linear_attention", "full_attention"], **_COMMON,
        ),
        "linear attention",
    ),
    "mamba": (
        "Mamba: state space",
        _make(t.MambaConfig, _TOKENS, hidden_size=32, num_hidden_layers=1, max_position_embeddings=POSITIONS),
        "state-space",
    ),
    "jamba": (
        "Jamba: state space in between",
        _make(
            t.JambaConfig, num_experts=2, num_experts_per_tok=1, attn_layer_period=2, attn_layer_offset=1,
            use_mamba_kernels=False, mamba_d_state=8, mamba_dt_rank=8, **_COMMON,
        ),
        "state-space",
    ),
    "deepseek-v2": (
        "DeepSeek-V2: multi-head latent attention",
        _make(
            t.DeepseekV2Config, n_routed_experts=2, num_experts_per_tok=1, first_k_dense_replace=2,
            kv_lora_rank=16, q_lora_rank=16, qk_rope_head_dim=8, qk_nope_head_dim=16, v_head_dim=16,
            **{**_COMMON, "num_key_value_heads": HEADS},
        ),
        "latent attention",
    ),
    "deepseek-v3": (
        "DeepSeek-V3: multi-head latent attention",
        _make(
            t.DeepseekV3Config, n_routed_experts=2, num_experts_per_tok=1, first_k_dense_replace=2,
            kv_lora_rank=16, q_lora_rank=16, qk_rope_head_dim=8, qk_nope_head_dim=16, v_head_dim=16,
            n_group=1, topk_group=1,
            **{**_COMMON, "num_key_value_heads": HEADS},
        ),
        "latent attention",
    ),
    "llama4": (
        "Llama 4 (text): chunked attention",
        _make(
            t.Llama4TextConfig, head_dim=HEAD_DIM, num_local_experts=2, intermediate_size_mlp=32,
            attention_chunk_size=16, **_COMMON,
        ),
        "not causal with a fixed window",
    ),
}  # fmt: skip
UNWINDOWED = "right but for the window, which the builder leaves out (the export warns of it)"
UNSCALED = "the builder's graph, which has no such scaling, is kept as it is"
GENAI = {
    **dict.fromkeys(("llama3", "llama-dynamic", "mistral", "qwen2", "qwen3", "gemma2", "granite"), "right"),
    **dict.fromkeys(("llama-linear", "llama-yarn"), UNSCALED),
    "phi3": "right",
    "phi3-long": UNWINDOWED,
}
# a prompt of ordinary length and a wish that cannot be met
_MAX_CONTEXT = {"phi3-across": POSITIONS // 2}


def _prompts() -> list[list[int]]:
    generator = np.random.default_rng(0)
    return [generator.integers(3, VOCAB, length).tolist() for length in PROMPTS]


@pytest.mark.parametrize("family", FAMILIES)
def test_family(tiny: ModuleType, family: str, tmp_path: Path, models_table: Any) -> None:
    title, config = FAMILIES[family]
    folder = tiny.make_model(tmp_path / family, config())
    output = export_model(folder, tiny.SYSTEM_PROMPT, tmp_path / "out", template="plain", threads=1)
    manifest = Artifact.open(output).manifest
    assert manifest.prefix.length > 3 * WINDOW
    report = verify(output, folder, requests=len(PROMPTS), new_tokens=NEW_TOKENS, threads=1)
    assert report.ok, report.table()

    model = transformers.AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()
    prompts = _prompts()
    sampling = SamplingParams(max_new_tokens=NEW_TOKENS, ignore_eos=True)
    with RelayDecoder.load(output, max_batch=3, threads=1, prefill_chunk=16) as decoder:
        answers = [result.token_ids for result in decoder.generate(prompts, sampling)]
    for prompt, answer in zip(prompts, answers, strict=True):
        _check_greedy(model, [*manifest.prefix.token_ids, *prompt], answer)
    row = models_table.row(family, title)
    row.architecture = manifest.source["architecture"]
    row.results["Hugging Face folder"] = "right"
    row.tensorrt = _tensorrt_checks(output)


def _tensorrt_checks(output: Path) -> str:
    """Whether the graph could be put in the forms that TensorRT takes."""
    try:
        run(ir.load(output / "model.onnx"), tensorrt_passes())
    except ExportError as error:
        return f"refused: {str(error).splitlines()[0]}"
    return "checks passed"


@pytest.mark.parametrize("family", FAMILIES)
def test_genai_folder(tiny: ModuleType, family: str, tmp_path: Path, models_table: Any) -> None:
    """The same families as onnxruntime-genai's builder makes them, as far as it does."""
    title, config = FAMILIES[family]
    row = models_table.row(family, title)
    folder = tiny.make_model(tmp_path / "model", config())
    expected = GENAI.get(family)
    if expected is None:
        with pytest.raises((NotImplementedError, KeyError)):
            tiny.make_genai(tmp_path / "genai", folder)
        row.results["onnxruntime-genai folder"] = "not built"
        return
    built = tiny.make_genai(tmp_path / "genai", _for_builder(tiny, folder, tmp_path / "prepared"))
    output = export_model(built, tiny.SYSTEM_PROMPT, tmp_path / "out", template="plain", threads=1)
    if expected == UNSCALED:
        folder = tiny.make_model(tmp_path / "reference", _make(t.LlamaConfig)())
    elif expected == UNWINDOWED:
        unwindowed = config()
        unwindowed.sliding_window = None
        folder = tiny.make_model(tmp_path / "reference", unwindowed)
    report = verify(output, folder, requests=len(PROMPTS), new_tokens=NEW_TOKENS, threads=1)
    assert report.ok, report.table()
    row.results["onnxruntime-genai folder"] = expected


def _for_builder(tiny: ModuleType, folder: Path, copy: Path) -> Path:
    """The folder, its config with what the builder looks for and transformers does not save."""
    shutil.copytree(folder, copy)
    config = json.loads((copy / "config.json").read_text())
    if config["model_type"] == "mistral":  # without layer_types the builder takes it for full attention
        tiny.edit_json(copy / "config.json", layer_types=["sliding_attention"] * LAYERS)
    scaling = config.get("rope_parameters") or {}
    if scaling.get("rope_type") == "longrope":
        tiny.edit_json(copy / "config.json", rope_parameters=scaling | {"type": "longrope"})
    return copy


def _check_greedy(model: Any, prompt: list[int], answer: list[int]) -> None:
    """Every token is the best of the full prompt's logits, which are spread wide enough to tell."""
    with torch.no_grad():
        logits = model(torch.tensor([[*prompt, *answer[:-1]]]), use_cache=False).logits[0, len(prompt) - 1 :]
    tolerance = 2e-4 * max(1.0, float(logits.abs().max()))
    gap = logits.max(dim=-1).values - logits[torch.arange(len(answer)), answer]
    assert gap.max() <= tolerance
    ranked = logits.sort(dim=-1, descending=True).values
    decided = (ranked[:, 0] - ranked[:, 1] > 10 * tolerance).float().mean()
    assert decided >= 0.5, "the test's model gives near-ties: it could not tell right from wrong"


@pytest.mark.parametrize("family", REFUSALS)
def test_refusal(tiny: ModuleType, family: str, tmp_path: Path, models_table: Any) -> None:
    title, config, reason = REFUSALS[family]
    made = config()
    folder = tmp_path / family
    architecture = type(made).__name__.removesuffix("Config")
    if made.is_encoder_decoder:  # refused before anything is loaded
        made.save_pretrained(folder)
        (folder / "model.safetensors").write_bytes(b"")
        tiny.make_tokenizer(folder)
    else:
        tiny.make_model(folder, made)
        architecture = json.loads((folder / "config.json").read_text())["architectures"][0]
    with pytest.raises(ExportError, match=reason) as found:
        export_model(
            folder,
            tiny.SYSTEM_PROMPT,
            tmp_path / "out",
            template="plain",
            max_context=_MAX_CONTEXT.get(family),
        )
    assert not (tmp_path / "out").exists()
    message = str(found.value)
    assert str(folder) in message
    row = models_table.row(family, title)
    row.architecture = architecture
    row.refusal = message.replace(f"{folder}: ", "").replace(str(folder), "the folder")


def test_docs_are_what_was_found(
    models_table: Any, table_module: ModuleType, pytestconfig: pytest.Config
) -> None:
    """Last in this file: by now every case has said how it went."""
    cases = {*FAMILIES, *REFUSALS}
    if set(models_table.rows) != cases or any(
        len(models_table.rows[family].results) < 2 for family in FAMILIES
    ):
        pytest.skip("not all families were tested, or some failed")
    packages = ("transformers", "torch", "onnxruntime", "onnxruntime-genai")
    versions = {name: metadata.version(name).partition("+")[0] for name in packages}
    found = models_table.markdown(versions)
    if pytestconfig.getoption("models_table", False):
        table_module.PATH.write_text(found)
    written = table_module.PATH.read_text()
    if written.rpartition("Made with")[2] != found.rpartition("Made with")[2]:
        pytest.skip("docs/models.md was made with other versions of the libraries")
    assert written == found, "docs/models.md is out of date: run these tests with --models-table"
