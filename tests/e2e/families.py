"""Model families as configs of tiny models: what is exported, what is refused, what exporters leave out."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import transformers

HIDDEN, HEADS, KV_HEADS, HEAD_DIM = 64, 4, 2, 16
LAYERS, VOCAB, POSITIONS, WINDOW = 2, 384, 512, 24
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
UNSCALED = "right but for the scaling, which the builder leaves out (its folder does not tell)"
GENAI = {
    **dict.fromkeys(("llama3", "llama-dynamic", "mistral", "qwen2", "qwen3", "gemma2", "granite"), "right"),
    **dict.fromkeys(("llama-linear", "llama-yarn"), UNSCALED),
    "phi3": "right",
    "phi3-long": UNWINDOWED,
}
BARE = "right but for window and softcap, which the builder leaves out (the export warns of the window)"
UNCAPPED = "right but for the softcap, which it leaves out (the export warns of it)"

# as ONNX files
RIGHT, REFUSED, NOT_MADE, WRONG = "right", "refused", "not made", "wrong"
OWN = "as the builder's graph, which is not the model (it rotates the other layers)"
# what is left out, and the config that came with the file says so
SPOKEN_OF = (UNWINDOWED, UNCAPPED, BARE)
OPTIMUM = "optimum"
# column of the table: what its tool is told
SOURCES: dict[str, dict[str, Any]] = {
    "genai fp16": {"precision": "fp16", "provider": "cuda"},
    "genai fp16 for CPU": {"precision": "fp16", "provider": "cpu"},
    "genai int4": {"precision": "int4", "provider": "cpu"},
    OPTIMUM: {},
    "torch 17": {"opset": 17},
    "torch 18": {"opset": 18},
    "torch 23": {"opset": 23},
    "torch 24": {"opset": 24},
    "TorchScript 17": {"opset": 17, "dynamo": False},
}


def for_builder(folder: Path, copy: Path) -> Path:
    """A copy of a folder, its config with what genai's builder looks for and transformers does not save."""
    shutil.copytree(folder, copy)
    file = copy / "config.json"
    config = json.loads(file.read_text())
    if config["model_type"] == "mistral":  # without layer_types the builder takes it for full attention
        config["layer_types"] = ["sliding_attention"] * LAYERS
    scaling = config.get("rope_parameters") or {}
    if scaling.get("rope_type") == "longrope":
        config["rope_parameters"] = scaling | {"type": "longrope"}
    file.write_text(json.dumps(config))
    return copy


def omissions(family: str) -> list[str]:
    """What an exporter may leave out of a family."""
    config = FAMILIES[family][1]()
    rope_type = (getattr(config, "rope_parameters", None) or {}).get("rope_type")
    if getattr(config, "attn_logit_softcapping", None):
        return [UNCAPPED, BARE]
    found = [UNWINDOWED] if getattr(config, "sliding_window", None) else []
    return found + ([UNSCALED] if rope_type in ("linear", "yarn") else [])


def without(family: str, what: str) -> Any:
    """The config of a family without what an exporter leaves out of it; the weights drawn are the same."""
    config = FAMILIES[family][1]()
    if what == UNSCALED:
        return _make(t.LlamaConfig)()
    if what in (UNCAPPED, BARE):
        config.attn_logit_softcapping = None
    if what == BARE:
        config.layer_types = ["full_attention"] * LAYERS
    elif what == UNWINDOWED:
        config.sliding_window = None
    return config
