from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import onnx_ir as ir
import pytest
import torch
import transformers
from transformers import masking_utils

from relay_attention.errors import ExportError
from relay_attention.export.huggingface import load_huggingface, probe_window


def _copy(source: Path, target: Path) -> Path:
    return Path(shutil.copytree(source, target))


def test_attention_is_one_node_a_layer_and_no_mask_is_left(llama: Path) -> None:
    source = load_huggingface(llama, "float32")
    operators = [node.op_type for node in source.model.graph]
    assert operators.count("AttentionForm") == source.num_layers == 2
    assert not {"Softmax", "Where", "Trilu", "Range", "GatherND"} & set(operators)
    assert (source.architecture, source.max_positions, source.eos) == ("LlamaForCausalLM", 512, (1,))


def test_weights_keep_their_names_and_their_memory(llama: Path) -> None:
    initializers = load_huggingface(llama, "float16").model.graph.initializers
    weight = initializers["model.layers.1.self_attn.q_proj.weight"].const_value
    assert weight.dtype == ir.DataType.FLOAT16
    assert isinstance(weight, ir.LazyTensor)


@pytest.mark.parametrize(
    ("mask", "window"),
    [
        (masking_utils.causal_mask_function, -1),
        (masking_utils.sliding_window_causal_mask_function(1), 1),
        (masking_utils.sliding_window_causal_mask_function(24), 24),
        (masking_utils.sliding_window_causal_mask_function(127), 127),
        (masking_utils.sliding_window_causal_mask_function(4096), -1),  # beyond the positions there are
    ],
)
def test_windows_are_found_by_asking_the_mask(mask: Callable[..., torch.Tensor], window: int) -> None:
    assert probe_window(mask, 128) == window


@pytest.mark.parametrize(
    "mask",
    [
        masking_utils.bidirectional_mask_function,
        masking_utils.sliding_window_bidirectional_mask_function(8),
        masking_utils.chunked_causal_mask_function(16, torch.zeros(1, dtype=torch.int64)),
        # a prefix that sees all of itself
        masking_utils.or_masks(
            masking_utils.causal_mask_function, lambda batch, head, query, key: (query < 8) & (key < 8)
        ),
        # a token that nobody sees
        masking_utils.and_masks(masking_utils.causal_mask_function, lambda batch, head, query, key: key != 3),
    ],
)
def test_masks_that_are_no_causal_window_are_refused(mask: Callable[..., torch.Tensor]) -> None:
    with pytest.raises(ExportError, match="not causal with a fixed window"):
        probe_window(mask, 128)


def test_windows_differ_by_layer(tiny, tmp_path: Path) -> None:
    config = tiny.CONFIGS["qwen2"]()
    config.use_sliding_window, config.sliding_window = True, 24
    config.layer_types = ["full_attention", "sliding_attention"]
    graph = load_huggingface(tiny.make_model(tmp_path / "model", config), "float32").model.graph
    sites = [node for node in graph if node.op_type == "AttentionForm"]
    assert [site.attributes["local_window_size"].value for site in sites] == [-1, 24]


def _small(config: type, **fields: object) -> transformers.PretrainedConfig:
    sizes = {"vocab_size": 64, "hidden_size": 32, "num_attention_heads": 2, "num_hidden_layers": 1}
    return config(**sizes, intermediate_size=32, max_position_embeddings=64, **fields)


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (
            lambda: _small(
                transformers.GptOssConfig, head_dim=16, num_key_value_heads=1, num_local_experts=2,
                num_experts_per_tok=1,
            ),
            "attention sinks",
        ),
        (lambda: transformers.BloomConfig(vocab_size=64, hidden_size=32, n_layer=1, n_head=2), "ALiBi"),
        (
            lambda: transformers.MambaConfig(
                vocab_size=64, hidden_size=32, num_hidden_layers=1, max_position_embeddings=64
            ),
            "state-space.*0 attentions",
        ),
    ],
)  # fmt: skip
def test_models_that_cannot_be_right_are_refused_by_name(
    config: Callable[[], transformers.PretrainedConfig], reason: str, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    transformers.AutoModelForCausalLM.from_config(config()).save_pretrained(tmp_path / "model")
    with pytest.raises(ExportError, match=reason) as found:
        load_huggingface(tmp_path / "model", "float32")
    assert str(tmp_path / "model") in str(found.value)


def test_encoder_decoders_are_refused(tmp_path: Path) -> None:
    transformers.T5Config(vocab_size=8, d_model=8, num_layers=1).save_pretrained(tmp_path)
    with pytest.raises(ExportError, match="encoder-decoder"):
        load_huggingface(tmp_path, "float32")


def test_quantised_weights_are_refused(tiny, llama: Path, tmp_path: Path) -> None:
    folder = _copy(llama, tmp_path / "model")
    tiny.edit_json(folder / "config.json", quantization_config={"quant_method": "gptq", "bits": 4})
    with pytest.raises(ExportError, match="quantised weights"):
        load_huggingface(folder, "float32")


def test_weights_that_are_missing_are_not_made_up(llama: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    folder = _copy(llama, tmp_path / "model")
    weights = load_file(folder / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(ExportError, match=r"lack 1 tensors.*model\.layers\.1\.mlp\.up_proj\.weight"):
        load_huggingface(folder, "float32")


def test_a_model_with_code_of_its_own_is_not_run(tiny, llama: Path, tmp_path: Path) -> None:
    folder = _copy(llama, tmp_path / "model")
    (folder / "modeling_evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    tiny.edit_json(
        folder / "config.json",
        model_type="evil",
        architectures=["EvilForCausalLM"],
        auto_map={"AutoConfig": "modeling_evil.EvilConfig", "AutoModelForCausalLM": "modeling_evil.Evil"},
    )
    with pytest.raises(ExportError, match="transformers cannot read it"):
        load_huggingface(folder, "float32")
    assert not (tmp_path / "ran").exists()


def test_transformers_is_left_as_it_was(llama: Path) -> None:
    load_huggingface(llama, "float32")
    model = transformers.AutoModelForCausalLM.from_pretrained(llama)
    assert model.config._attn_implementation == "sdpa"


def test_attention_that_does_more_than_it_says_is_refused(
    llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Such as sinks that a model's own attention reads from its module."""
    modeling = transformers.models.llama.modeling_llama
    own = modeling.eager_attention_forward

    def more(*arguments: object, **options: object) -> tuple[torch.Tensor, object]:
        output, weights = own(*arguments, **options)
        return output * 0.9, weights

    monkeypatch.setattr(modeling, "eager_attention_forward", more)
    with pytest.raises(ExportError, match="its own attention gives other logits"):
        load_huggingface(llama, "float32")


def test_what_torch_cannot_export_is_said_with_its_root_cause(
    llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*arguments: object, **options: object) -> None:
        raise RuntimeError("step 3 of 3 failed") from NotImplementedError("no function for aten::strange")

    monkeypatch.setattr(torch.onnx, "export", fail)
    with pytest.raises(
        ExportError, match=r"cannot export LlamaForCausalLM.*NotImplementedError: no function for"
    ):
        load_huggingface(llama, "float32")
