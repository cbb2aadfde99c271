"""Mixtures of experts: routing that torch can trace, each expert computing the tokens that chose it.

transformers lets one register an experts function. Its own either loop over the experts that were hit (which
cannot be traced), call a grouped product that ONNX has not, or copy an expert's weights for every token.
"""

from __future__ import annotations

from typing import Any

import torch

IMPLEMENTATION = "relay"
_WEIGHTS = ("gate_up_proj", "up_proj", "down_proj")


def split_experts(model: Any) -> None:
    """Makes every expert's weights parameters of their own (views, no copies), and the model use them.

    A graph with one weight for all experts would copy an expert out of it at every step.
    """
    found = False
    for module in model.modules():
        if not hasattr(module, "_is_expert_parallel"):  # what transformers marks a layer of experts with
            continue
        found = True
        for name in [each for weight in _WEIGHTS for each in (weight, f"{weight}_bias")]:
            stacked = getattr(module, name, None)
            if isinstance(stacked, torch.nn.Parameter):
                delattr(module, name)
                parts = (torch.nn.Parameter(part, requires_grad=False) for part in stacked.detach())
                setattr(module, name, torch.nn.ParameterList(parts))
    if found:
        from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

        ALL_EXPERTS_FUNCTIONS.register(IMPLEMENTATION, _forward)
        model.set_experts_implementation(IMPLEMENTATION)


def _forward(
    self: Any, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
) -> torch.Tensor:
    """Experts function of the interface.

    hidden_states: [tokens, hidden]; top_k_index, top_k_weights: [tokens, experts of each token].
    Returns: [tokens, hidden], the weighted sum of each token's experts.
    """
    result = torch.zeros_like(hidden_states)
    up = "gate_up_proj" if self.has_gate else "up_proj"
    for expert in range(len(self.down_proj)):
        token, choice = torch.where(top_k_index == expert)
        values = _linear(self, up, expert, hidden_states[token])
        values = self._apply_gate(values) if self.has_gate else self.act_fn(values)
        values = _linear(self, "down_proj", expert, values)
        if getattr(self, "has_post_expert_norm", False):
            values = self.post_expert_norm(values)
        values = values * top_k_weights[token, choice].unsqueeze(-1)
        result = result.index_put((token,), values.to(result.dtype), accumulate=True)
    return result


def _linear(self: Any, name: str, expert: int, values: torch.Tensor) -> torch.Tensor:
    weight = getattr(self, name)[expert]
    bias = getattr(self, f"{name}_bias")[expert] if self.has_bias else None
    return torch.nn.functional.linear(values, weight.T if self.is_transposed else weight, bias)
