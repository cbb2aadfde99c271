"""Rotary embedding whose frequencies depend on how long a request is, fixed for one prefix.

transformers' "longrope" has two sets of frequencies and takes the long one once prompt and answer exceed the
length the model was first trained for; "dynamic" stretches its frequencies with every token beyond the
model's positions. Rotated keys of a shared prefix serve requests of any length, so an artifact holds one
regime: the one in which prefix and max_context lie as a whole.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from relay_attention.errors import ExportError

LONGROPE, _DYNAMIC = "longrope", "dynamic"


@dataclass(frozen=True)
class Regime:
    """max_positions: of prefix and request together. min_prefix: tokens that a prefix must have at least."""

    max_positions: int
    min_prefix: int = 0


def fix_regime(model: Any, prefix_length: int, max_context: int | None, max_positions: int) -> Regime:
    """Freezes a model's rotary frequencies to those for this prefix; most models have one set only.

    max_context: what the user asked for, or None. max_positions: what the model's config states.
    Raises: ExportError if prefix and max_context lie across the length at which the frequencies change.
    """
    modules = [module for module in model.modules() if any(_types(module))]
    regime = Regime(max_positions)
    for module in modules:
        for layer_type, rope_type in _types(module):
            switch = _switch(module, layer_type, rope_type)
            regime = choose_regime(rope_type, switch, prefix_length, max_context, regime)
    for module in modules:
        _freeze(module, min(prefix_length + 1, regime.max_positions), regime.max_positions)
    return regime


def _types(module: Any) -> Iterator[tuple[str | None, str]]:
    """(layer type or None, rope type) of a module's rotary embeddings that depend on the length."""
    types = getattr(module, "rope_type", None)
    pairs = types.items() if isinstance(types, dict) else [(None, types)]
    for layer_type, rope_type in pairs:
        if isinstance(rope_type, str) and (_DYNAMIC in rope_type or rope_type == LONGROPE):
            yield layer_type, rope_type


def _switch(module: Any, layer_type: str | None, rope_type: str) -> int:
    """Tokens up to which the short, or unstretched, frequencies hold."""
    if rope_type != LONGROPE:
        return int(module.original_max_seq_len)
    parameters = module.config.rope_parameters
    parameters = parameters[layer_type] if layer_type is not None else parameters
    return int(
        parameters.get("original_max_position_embeddings") or module.config.original_max_position_embeddings
    )


def choose_regime(
    rope_type: str, switch: int, prefix_length: int, max_context: int | None, regime: Regime
) -> Regime:
    """The regime of frequencies that change after `switch` tokens, within one that is given.

    Raises: ExportError if prefix and max_context lie across that length.
    """
    if rope_type == LONGROPE and prefix_length >= switch:  # every request has a token more
        return Regime(regime.max_positions, max(regime.min_prefix, switch))
    if prefix_length + (max_context or 1) > switch:
        context = "a prompt" if max_context is None else f"max_context {max_context}"
        remedies = [f"a max_context of at most {switch - prefix_length}"] if prefix_length < switch else []
        if rope_type == LONGROPE:
            remedies.append(f"a system prompt of at least {switch} tokens")
        raise ExportError(
            f"rotary embedding of type {rope_type!r} changes its frequencies after {switch} tokens, and the "
            f"system prompt's {prefix_length} tokens with {context} reach past that: keys of a shared prefix "
            f"cannot be both; give {' or '.join(remedies) or f'one shorter than {switch} tokens'}"
        )
    return Regime(min(regime.max_positions, switch), regime.min_prefix)


def _freeze(module: Any, shortest: int, longest: int) -> None:
    """Lets the module itself set its frequencies for these lengths, which must agree, and keeps them."""
    import torch

    layer_types = [layer_type for layer_type, _ in _types(module)]
    for layer_type in layer_types:
        name = "inv_freq" if layer_type is None else f"{layer_type}_inv_freq"
        extra = () if layer_type is None else (layer_type,)
        found = []
        for length in (longest, shortest):
            with torch.no_grad():
                module(torch.zeros(1), torch.tensor([[0, length - 1]]), *extra)
            found.append(getattr(module, name).clone())
        if not torch.equal(*found):
            raise ExportError(
                f"its rotary embedding has other frequencies for {shortest} tokens than for {longest}: keys "
                "of a shared prefix cannot be both"
            )
    if isinstance(module.rope_type, dict):
        module.rope_type = {
            key: "default" if key in layer_types else value for key, value in module.rope_type.items()
        }
    else:
        module.rope_type = "default"
