"""com.microsoft.GroupQueryAttention: what onnxruntime-genai's model builder writes.

The operator is causal, its keys start at position 0 of each row, and its window counts the query's own key,
as RelayAttention's does. Its caches and length inputs are replaced by RelayAttention's. `UnpackQKV` and
`UnfuseQKNorm` have run, so query, key and value are inputs of their own, normalised already.
"""

from __future__ import annotations

import onnx_ir as ir

from relay_attention.export.graph import (
    float_attribute,
    input_of,
    int_attribute,
    is_constant,
    last_dim,
    refuse,
)
from relay_attention.export.site import AttentionSite, Rotary

QUERY, KEY, VALUE, PAST_KEY, PAST_VALUE = 0, 1, 2, 3, 4
COS_CACHE, SIN_CACHE, POSITION_IDS = 7, 8, 9
# optional inputs that change the result, and what they are
_REFUSED_INPUTS = {
    POSITION_IDS: "it takes position_ids of its own",
    10: "it takes an attention_bias (ALiBi or a mask of its own)",
    11: "it has attention sinks (head_sink), which RelayAttention has not",
    12: "its KV cache is quantised; build the model without kv_cache_quant_scheme",
    13: "its KV cache is quantised; build the model without kv_cache_quant_scheme",
    14: "it normalises the query itself, which UnfuseQKNorm has left",
    15: "it normalises the key itself, which UnfuseQKNorm has left",
    16: "it takes query_seqlens: the graph batches prompts in a way of its own",
}
# attributes that change the result: name -> (value when absent, what any other means); -1 stands for "off"
# too
_REFUSED_ATTRIBUTES = {
    "smooth_softmax": (0, "it uses smooth softmax (a sink of logit 0), which RelayAttention has not"),
    "qk_output": (0, "its attention scores are an output of the node"),
    "kv_cache_bit_width": (0, "its KV cache is quantised; build the model without kv_cache_quant_scheme"),
    "causal": (1, "it is not causal"),
}


def match(node: ir.Node) -> AttentionSite:
    """Describes a GroupQueryAttention node.

    Raises: ExportError if an input or attribute asks for what RelayAttention cannot do.
    """
    for index, reason in _REFUSED_INPUTS.items():
        if input_of(node, index) is not None:
            raise refuse(node, reason)
    for name, (absent, reason) in _REFUSED_ATTRIBUTES.items():
        if int_attribute(node, name, absent) not in (absent, -1):
            raise refuse(node, reason)
    query, key, value = (node.inputs[index] for index in (QUERY, KEY, VALUE))
    if query is None or key is None or value is None:
        raise refuse(node, "its key or value is missing")
    num_heads, kv_num_heads = int_attribute(node, "num_heads"), int_attribute(node, "kv_num_heads")
    width = last_dim(query)
    if not num_heads or not kv_num_heads or not width or width % num_heads:
        raise refuse(
            node,
            f"query of width {width} does not split into num_heads {num_heads} (kv_num_heads {kv_num_heads})",
        )
    return AttentionSite(
        node=node,
        query=query,
        key=key,
        value=value,
        output=node.outputs[0],
        num_heads=num_heads,
        kv_num_heads=kv_num_heads,
        head_dim=width // num_heads,
        scale=float_attribute(node, "scale"),
        softcap=float_attribute(node, "softcap"),
        local_window_size=int_attribute(node, "local_window_size", -1),
        rotary=_rotary(node),
        caches=tuple(
            cache for index in (PAST_KEY, PAST_VALUE) if (cache := input_of(node, index)) is not None
        ),
    )


def _rotary(node: ir.Node) -> Rotary | None:
    if not int_attribute(node, "do_rotary"):
        return None
    cos_cache, sin_cache = input_of(node, COS_CACHE), input_of(node, SIN_CACHE)
    if cos_cache is None or sin_cache is None:
        raise refuse(node, "do_rotary is set, but cos_cache or sin_cache is missing")
    if not (is_constant(cos_cache) and is_constant(sin_cache)):
        raise refuse(
            node,
            f"its rotary tables ({cos_cache.name!r}) are chosen while running (longrope, dynamic scaling): "
            "which one is right depends on the length of each request",
        )
    return Rotary(cos_cache, sin_cache, bool(int_attribute(node, "rotary_interleaved")))
