"""What every attention of a source graph is described as before it is rewritten."""

from __future__ import annotations

from dataclasses import dataclass

import onnx_ir as ir


@dataclass(frozen=True)
class Rotary:
    """Rotary embedding that the attention node itself applies.

    cos_cache, sin_cache: [max_positions, rotary_dims / 2], row = absolute position.
    interleaved: rotate even/odd pairs instead of the two halves.
    """

    cos_cache: ir.Value
    sin_cache: ir.Value
    interleaved: bool


@dataclass(frozen=True)
class AttentionSite:
    """One causal self-attention of a source graph; layers are numbered in graph order.

    node: the source's node, which goes. output: its value [batch, sequence, num_heads * head_dim].
    query: [batch, sequence, num_heads * head_dim]; key, value: [batch, sequence, kv_num_heads * head_dim].
    scale: factor of query @ key, 0 for 1/sqrt(head_dim). softcap: 0 for none.
    local_window_size: keys that a query sees, its own included; -1 for all.
    rotary: None where query and key arrive rotated, or the model has no rotary embedding.
    caches: the graph inputs that hold the source's own keys and values, which go.
    """

    node: ir.Node
    query: ir.Value
    key: ir.Value
    value: ir.Value
    output: ir.Value
    num_heads: int
    kv_num_heads: int
    head_dim: int
    scale: float
    softcap: float = 0.0
    local_window_size: int = -1
    rotary: Rotary | None = None
    caches: tuple[ir.Value, ...] = ()
