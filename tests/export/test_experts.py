from __future__ import annotations

import pytest
import torch
import transformers

from relay_attention.export.experts import split_experts


@pytest.mark.parametrize("config", ["Qwen3MoeConfig", "MixtralConfig", "GptOssConfig"])
def test_experts_compute_what_transformers_computes(config: str) -> None:
    """With gates and without, biased and transposed or not; some experts get no token."""
    torch.manual_seed(0)
    made = getattr(transformers, config)(
        vocab_size=64, hidden_size=32, intermediate_size=48, moe_intermediate_size=48, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=1, head_dim=16, num_local_experts=6, num_experts=6,
        num_experts_per_tok=2, initializer_range=0.3,
    )  # fmt: skip
    model = transformers.AutoModelForCausalLM.from_config(made, experts_implementation="eager").eval()
    experts = next(module for module in model.modules() if hasattr(module, "_is_expert_parallel"))
    states, weights = torch.randn(5, 32), torch.rand(5, 2)
    index = torch.tensor([[0, 1], [1, 5], [5, 0], [1, 0], [3, 1]])
    with torch.no_grad():
        expected = experts(states, index, weights)
        storage = experts.down_proj.untyped_storage().data_ptr()
        split_experts(model)
        assert experts.down_proj[0].untyped_storage().data_ptr() == storage  # views, no copies
        torch.testing.assert_close(experts(states, index, weights), expected)


def test_models_without_experts_are_left_alone(tiny) -> None:
    model = transformers.AutoModelForCausalLM.from_config(tiny.CONFIGS["llama"]())
    names = [name for name, _ in model.named_parameters()]
    split_experts(model)
    assert [name for name, _ in model.named_parameters()] == names
