"""com.microsoft.MultiHeadAttention: what ONNX Runtime's own optimiser and model builder write."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from relay_attention.export.core import Core
from relay_attention.export.graph import float_attribute, input_of, int_attribute, refuse
from relay_attention.export.probe import Array, Probe, ProbeError, Setting

QUERY, KEY, VALUE, BIAS, PADDING_MASK, ATTENTION_BIAS, PAST_KEY, PAST_VALUE = range(8)
_REFUSED_INPUTS = {
    8: "it takes past_sequence_length: its cache is a buffer shared in ONNX Runtime's own way",
    9: "it takes cache_indirection (beam search)",
}


def find(node: ir.Node, probe: Probe) -> Core | None:
    """The core that a MultiHeadAttention node is, None for other nodes.

    Raises: ExportError naming the node, for inputs and outputs that RelayAttention has not.
    """
    if (node.domain, node.op_type) != ("com.microsoft", "MultiHeadAttention"):
        return None
    for index, reason in _REFUSED_INPUTS.items():
        if input_of(node, index) is not None:
            raise refuse(node, reason)
    query, key, value = (input_of(node, index) for index in (QUERY, KEY, VALUE))
    if query is None or key is None or value is None:
        raise refuse(node, "its key or value is missing (packed QKV or KV), which is not supported")
    if len(node.outputs) > 3 and node.outputs[3].uses():
        raise refuse(node, "its attention scores are read by other nodes")
    past_key, past_value = input_of(node, PAST_KEY), input_of(node, PAST_VALUE)
    heads = int_attribute(node, "num_heads")
    return Core(
        node=node,
        query=query,
        key=key,
        value=value,
        output=node.outputs[0],
        bias=lambda probe, setting: _bias(node, probe, setting),
        num_heads=heads,
        kv_num_heads=heads,
        past=(past_key, past_value) if past_key is not None and past_value is not None else None,
        scale=float_attribute(node, "scale") or None,
        projection_bias=input_of(node, BIAS),
    )


def _bias(node: ir.Node, probe: Probe, setting: Setting) -> Array:
    bias = np.zeros((1, 1, setting.sequence, setting.total), np.float32)
    added = input_of(node, ATTENTION_BIAS)
    if added is not None:
        bias = bias + probe.evaluate([added], setting)[0].astype(np.float32)
    padding = input_of(node, PADDING_MASK)
    if padding is not None:
        valid = probe.evaluate([padding], setting)[0]
        if valid.shape == (setting.batch, setting.total):
            valid = valid[:, None, None]
        elif valid.shape == (setting.batch, setting.sequence, setting.total):
            valid = valid[:, None]
        else:
            raise ProbeError(f"key_padding_mask of shape {valid.shape} is not known here")
        bias = np.where(valid != 0, bias, -np.inf)
    if int_attribute(node, "unidirectional"):
        queries = np.arange(setting.past, setting.total)[:, None]
        bias = np.where(np.arange(setting.total) <= queries, bias, -np.inf)
    return bias
