"""ai.onnx Attention of opset 23 and 24: what torch.onnx.export writes at these opsets.

Heads in 3-D or 4-D; caches that the node appends to itself, that a Concat joins before it, or (24) that
TensorScatter writes into and nonpad_kv_seqlen bounds.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from relay_attention.export.core import Core
from relay_attention.export.graph import float_attribute, input_of, int_attribute, refuse
from relay_attention.export.probe import Array, Probe, Setting

QUERY, KEY, VALUE, MASK, PAST_KEY, PAST_VALUE, NONPAD = range(7)


def find(node: ir.Node, probe: Probe) -> Core | None:
    """The core that an Attention node is, None for other nodes.

    Raises: ExportError naming the node, for inputs and outputs that RelayAttention has not.
    """
    if (node.domain, node.op_type) != ("", "Attention"):
        return None
    query, key, value = (input_of(node, index) for index in (QUERY, KEY, VALUE))
    if query is None or key is None or value is None:
        raise refuse(node, "its query, key or value is missing")
    if len(node.outputs) > 3 and node.outputs[3].uses():
        raise refuse(node, "its attention scores are read by other nodes")
    past_key, past_value = input_of(node, PAST_KEY), input_of(node, PAST_VALUE)
    scale = float_attribute(node, "scale", float("nan"))
    return Core(
        node=node,
        query=query,
        key=key,
        value=value,
        output=node.outputs[0],
        bias=lambda probe, setting: _bias(node, probe, setting),
        num_heads=int_attribute(node, "q_num_heads") or None,
        kv_num_heads=int_attribute(node, "kv_num_heads") or None,
        past=(past_key, past_value) if past_key is not None and past_value is not None else None,
        scale=None if np.isnan(scale) else scale,
        softcap=float_attribute(node, "softcap"),
    )


def _bias(node: ir.Node, probe: Probe, setting: Setting) -> Array:
    mask, nonpad = input_of(node, MASK), input_of(node, NONPAD)
    keys = _keys(node, probe, setting)
    bias = np.zeros((1, 1, setting.sequence, keys), np.float32)
    lengths = None
    if nonpad is not None:
        lengths = probe.evaluate([nonpad], setting)[0].reshape(-1, 1, 1, 1)
        bias = np.where(np.arange(keys) < lengths, bias, -np.inf)
    if mask is not None:
        found = probe.evaluate([mask], setting)[0]
        added = np.where(found, 0.0, -np.inf) if found.dtype == np.bool_ else found.astype(np.float32)
        short = keys - added.shape[-1]
        if short > 0 and added.shape[-1] > 1:
            added = np.pad(added, [(0, 0)] * (added.ndim - 1) + [(0, short)], constant_values=-np.inf)
        bias = bias + added
    if int_attribute(node, "is_causal"):
        # aligned with what the node knows of the past, which is nothing where a Concat comes before it
        offset: int | Array = 0
        if input_of(node, PAST_KEY) is not None:
            offset = setting.past
        elif lengths is not None:
            offset = lengths - setting.sequence
        queries = np.arange(setting.sequence)[:, None]
        bias = np.where(np.arange(keys) <= queries + offset, bias, -np.inf)
    return bias


def _keys(node: ir.Node, probe: Probe, setting: Setting) -> int:
    """How many keys the node sees, free slots of a static cache included."""
    key = node.inputs[KEY]
    shape = probe.shape(key, setting) if key is not None else None
    if input_of(node, PAST_KEY) is not None or shape is None:
        return setting.total
    return shape[-2]
