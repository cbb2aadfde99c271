"""relay.AttentionForm: what `huggingface.py` traces a transformers model's attention as."""

from __future__ import annotations

import onnx_ir as ir

from relay_attention.export.graph import float_attribute, int_attribute
from relay_attention.export.site import AttentionSite


def match(node: ir.Node) -> AttentionSite:
    """Describes a traced attention; `huggingface.py` has refused what the op cannot do."""
    query, key, value = node.inputs
    return AttentionSite(
        node=node,
        query=query,
        key=key,
        value=value,
        output=node.outputs[0],
        num_heads=int_attribute(node, "num_heads"),
        kv_num_heads=int_attribute(node, "kv_num_heads"),
        head_dim=int_attribute(node, "head_dim"),
        scale=float_attribute(node, "scale"),
        softcap=float_attribute(node, "softcap"),
        local_window_size=int_attribute(node, "local_window_size", -1),
    )
