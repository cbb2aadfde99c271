"""NumPy reference of relay::RelayAttention in float64: slow and plain, what kernels are tested against."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

Float = NDArray[np.float64]
Array = NDArray[Any]


def attention(
    query: Float, key: Float, value: Float, visible: NDArray[np.bool_], softcap: float = 0.0
) -> tuple[Float, Float]:
    """Attention of some query rows over some keys.

    Args: query [rows, D], already scaled; key, value [keys, D]; visible [rows, keys].
    Returns: output [rows, D], logsumexp [rows] (natural logarithm); 0 and -inf for a row that sees no key.
    """
    scores = query @ key.T
    if softcap:
        scores = softcap * np.tanh(scores / softcap)
    scores = np.where(visible, scores, -np.inf)
    largest = scores.max(axis=-1, initial=-np.inf)
    weights = np.exp(scores - np.where(np.isneginf(largest), 0.0, largest)[:, None])
    total = weights.sum(axis=-1)
    with np.errstate(divide="ignore"):
        logsumexp = largest + np.log(total)
    return weights @ value / np.where(total == 0.0, 1.0, total)[:, None], logsumexp


def merge(output_a: Float, logsumexp_a: Float, output_b: Float, logsumexp_b: Float) -> tuple[Float, Float]:
    """Relay fusion: attention over two disjoint sets of keys from the attention over each of them, exactly.

    Args: outputs [rows, D], logsumexps [rows]; -inf where a side has no key.
    """
    largest = np.maximum(logsumexp_a, logsumexp_b)
    base = np.where(np.isneginf(largest), 0.0, largest)
    weight_a, weight_b = np.exp(logsumexp_a - base), np.exp(logsumexp_b - base)
    total = weight_a + weight_b
    divisor = np.where(total == 0.0, 1.0, total)[:, None]
    with np.errstate(divide="ignore"):
        return (weight_a[:, None] * output_a + weight_b[:, None] * output_b) / divisor, base + np.log(total)


def rotate(x: Float, cos: Float, sin: Float, interleaved: bool) -> Float:
    """Rotary embedding of the first R dims of x [..., D]; cos, sin [..., R/2] broadcast over the rest."""
    rotary_dim = 2 * cos.shape[-1]
    if interleaved:
        first, second = slice(0, rotary_dim, 2), slice(1, rotary_dim, 2)
    else:
        first, second = slice(0, rotary_dim // 2), slice(rotary_dim // 2, rotary_dim)
    rotated: Float = x.copy()
    rotated[..., first] = x[..., first] * cos - x[..., second] * sin
    rotated[..., second] = x[..., second] * cos + x[..., first] * sin
    return rotated


def relay_attention(
    query: Array,
    key: Array,
    value: Array,
    past_key: Array,
    past_value: Array,
    context_lens: Array,
    query_lens: Array,
    prefix_key: Array,
    prefix_value: Array,
    cos_cache: Array | None = None,
    sin_cache: Array | None = None,
    *,
    num_heads: int,
    kv_num_heads: int,
    scale: float = 0.0,
    softcap: float = 0.0,
    local_window_size: int = -1,
    do_rotary: int = 0,
    rotary_interleaved: int = 0,
) -> tuple[Float, Float, Float]:
    """The op as plugins/schema.py defines it: shapes, attributes and outputs are those given there.

    Inputs of any floating type are computed in float64. Inputs are not changed.
    Returns: output, present_key, present_value, all float64.
    """
    batch, sequence, hidden = query.shape
    head_dim = hidden // num_heads
    group = num_heads // kv_num_heads
    prefix_length = prefix_key.shape[1]
    scale = scale or head_dim**-0.5
    new_query = query.reshape(batch, sequence, num_heads, head_dim).astype(np.float64)
    new_key = key.reshape(batch, sequence, kv_num_heads, head_dim).astype(np.float64)
    new_value = value.reshape(batch, sequence, kv_num_heads, head_dim).astype(np.float64)
    prefix_key, prefix_value = prefix_key.astype(np.float64), prefix_value.astype(np.float64)
    present_key, present_value = past_key.astype(np.float64), past_value.astype(np.float64)
    output = np.zeros((batch, sequence, num_heads, head_dim))

    for b in range(batch):
        context, count = int(context_lens[b]), int(query_lens[b])
        end = context + count
        positions = prefix_length + np.arange(context, end)
        q, k = new_query[b, :count], new_key[b, :count]
        if do_rotary:
            assert cos_cache is not None
            assert sin_cache is not None
            cos = cos_cache[positions].astype(np.float64)[:, None, :]
            sin = sin_cache[positions].astype(np.float64)[:, None, :]
            q, k = (
                rotate(q, cos, sin, bool(rotary_interleaved)),
                rotate(k, cos, sin, bool(rotary_interleaved)),
            )
        present_key[b, :, context:end] = k.transpose(1, 0, 2)
        present_value[b, :, context:end] = new_value[b, :count].transpose(1, 0, 2)

        distance = positions[:, None] - np.arange(prefix_length + end)[None, :]
        visible = distance >= 0
        if local_window_size >= 0:
            visible &= distance < local_window_size
        in_prefix, in_context = visible[:, :prefix_length], visible[:, prefix_length:]
        for head in range(num_heads):
            kv = head // group
            rows = q[:, head] * scale
            relay = attention(rows, prefix_key[kv], prefix_value[kv], in_prefix, softcap)
            own = attention(rows, present_key[b, kv, :end], present_value[b, kv, :end], in_context, softcap)
            output[b, :count, head] = merge(*relay, *own)[0]
    return output.reshape(batch, sequence, hidden), present_key, present_value
