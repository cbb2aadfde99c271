"""Attention that a graph spells out around caches of its own: described by its form, proved by running it.

A form (`forms/decomposed.py`, `forms/onnx_attention.py`, `forms/multi_head_attention.py`) says which values
enter an attention and which leave it: a `Core`. That description is a guess until `describe` has run the
nodes between these values, and found that they compute causal attention, with one scale, softcap and window,
over past and new tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import onnx_ir as ir

from relay_attention.errors import ExportError
from relay_attention.export.graph import refuse
from relay_attention.export.probe import SPARE, Array, Probe, ProbeError, Setting, fed_dtype, is_cache
from relay_attention.plugins.reference import attention

# operators that lay values out anew: where keys and values pass only these, they stay what they are
_LAYOUT = {"Identity", "Reshape", "Squeeze", "Transpose", "Unsqueeze"}
_REPEAT = {"Expand", "Gather", "Slice", "Tile", "Cast"}
_DEQUANTIZE = {"DequantizeLinear", "DynamicQuantizeLinear", "QuantizeLinear"}
_LONGEST_WITHOUT_PAST = 2048
_HIDDEN = -1e4  # what masks add to hide a key is at most this
_TOLERANCE = {np.dtype(np.float32): 1e-4, np.dtype(np.float16): 2e-2}


class _NotRunnable(ExportError):
    """A mask does not run at a setting."""


@dataclass
class Core:
    """Values that enter and leave one attention, as its form has them.

    node: what messages name. query, key, value: in any layout, behind the caches or before them.
    output: [batch, num_heads, sequence, head_dim], [batch, sequence, num_heads, head_dim] or
        [batch, sequence, num_heads * head_dim].
    bias: what is added to the scores [..., sequence, keys] at a setting, -inf for a hidden key.
    num_heads, kv_num_heads: where the node says so. past: caches that the node itself appends to.
    scale: None for 1 / sqrt(head_dim). projection_bias: [3 * num_heads * head_dim], added to the three.
    """

    node: ir.Node
    query: ir.Value
    key: ir.Value
    value: ir.Value
    output: ir.Value
    bias: Callable[[Probe, Setting], Array]
    num_heads: int | None = None
    kv_num_heads: int | None = None
    past: tuple[ir.Value, ir.Value] | None = None
    scale: float | None = None
    softcap: float = 0.0
    projection_bias: ir.Value | None = None


@dataclass
class Tokens:
    """The new tokens' queries, keys or values.

    layout: "bhsd", "bshd" or "bse". factor: what they are multiplied by before the scores.
    cache: the input they are joined to.
    """

    value: ir.Value
    layout: str
    heads: int
    head_dim: int
    factor: float = 1.0
    cache: ir.Value | None = None

    def random(self, setting: Setting, generator: np.random.Generator) -> Array:
        sizes = {"b": setting.batch, "h": self.heads, "s": setting.sequence, "d": self.head_dim}
        sizes["e"] = self.heads * self.head_dim
        return generator.standard_normal([sizes[axis] for axis in self.layout]).astype(fed_dtype(self.value))

    def as_heads(self, array: Array) -> Array:
        """[batch, heads, sequence, head_dim] of an array in this layout."""
        if self.layout == "bse":
            array = array.reshape(*array.shape[:2], self.heads, self.head_dim)
        return array if self.layout == "bhsd" else array.transpose(0, 2, 1, 3)


@dataclass
class Description:
    """A core that was proved: what RelayAttention has to compute in its place."""

    core: Core
    query: Tokens
    key: Tokens
    value: Tokens
    output: Tokens
    scale: float
    softcap: float
    local_window_size: int
    caches: list[ir.Value] = field(default_factory=list)


def describe(core: Core, probe: Probe) -> Description:
    """Finds the new tokens behind a core's operands, its window, and proves the whole.

    Raises: ExportError naming the node and what is not causal attention about it.
    """
    query = _locate(core.query, probe, core.num_heads, core, "query")
    key = _locate(core.key, probe, core.kv_num_heads, core, "keys", cached=True)
    value = _locate(core.value, probe, core.kv_num_heads, core, "values", cached=True)
    if core.past:
        key.cache, value.cache = core.past
    if (key.cache is None) != (value.cache is None):
        raise refuse(core.node, "only one of its keys and values is joined to a cache")
    if (key.heads, key.head_dim) != (value.heads, value.head_dim) or query.head_dim != key.head_dim:
        raise refuse(
            core.node,
            f"queries of size {query.head_dim}, keys of {key.heads} x {key.head_dim} and values of "
            f"{value.heads} x {value.head_dim} (heads x size); RelayAttention needs one size of head",
        )
    if query.heads % key.heads:
        raise refuse(core.node, f"{query.heads} query heads do not share {key.heads} key heads evenly")
    for tokens in (key, value):
        if tokens.cache is not None and tokens.cache.dtype not in (
            ir.DataType.FLOAT,
            ir.DataType.FLOAT16,
            ir.DataType.BFLOAT16,
        ):
            raise refuse(core.node, f"its KV cache {tokens.cache.name!r} is quantised ({tokens.cache.dtype})")
    described = Description(
        core=core,
        query=query,
        key=key,
        value=value,
        output=_output(core, probe, query),
        scale=(query.head_dim**-0.5 if core.scale is None else core.scale) * query.factor * key.factor,
        softcap=core.softcap,
        local_window_size=_find_window(core, probe),
        caches=[tokens.cache for tokens in (key, value) if tokens.cache is not None],
    )
    if value.factor != 1.0:
        raise refuse(core.node, f"its values are multiplied by {value.factor}")
    _prove(described, probe)
    return described


def _locate(
    operand: ir.Value, probe: Probe, heads: int | None, core: Core, what: str, cached: bool = False
) -> Tokens:
    """Follows an operand back to the new tokens, through layout changes, scalar factors and the cache."""
    value, factor, cache = operand, 1.0, None
    best: Tokens | None = None
    while True:
        found = _layout(value, probe, heads)
        if found is not None:
            best = Tokens(value, *found, factor=factor, cache=cache)
            heads = best.heads
        node = value.producer()
        if node is None:
            break
        if node.op_type in _DEQUANTIZE:
            raise refuse(core.node, f"its {what} are quantised ({node.op_type} node {node.name!r})")
        if not node.domain and node.op_type in _LAYOUT | (_REPEAT if cached and cache is None else set()):
            value = node.inputs[0]
        # in front of a cache a factor is in the cached keys too, and stays in the graph
        elif (
            cache is None and node.op_type in ("Mul", "Div") and (scaled := _scaled(node, probe)) is not None
        ):
            value, factor = scaled[0], factor * scaled[1]
        elif cached and cache is None and (joined := _joined(node)) is not None:
            cache, value = joined
            best = heads = None  # behind it there may be more heads, which share these
        else:
            break
    if best is None:
        maker = value.producer()
        at = f"{maker.op_type} node {maker.name!r}" if maker is not None else f"input {value.name!r}"
        raise refuse(
            core.node,
            f"its {what} come from {at} as {probe.axes(value)}: no tokens by heads, whole or joined to a "
            "cache, can be told there",
        )
    return best


def _layout(value: ir.Value, probe: Probe, heads: int | None) -> tuple[str, int, int] | None:
    axes = probe.axes(value)
    if axes is None or len(axes) not in (3, 4):
        return None
    if len(axes) == 3:
        width = axes[2]
        if heads and axes[1] == "S" and isinstance(width, int) and width % heads == 0:
            return "bse", heads, width // heads
        return None
    size = axes[3]
    for layout, head_axis, sequence_axis in (("bhsd", 1, 2), ("bshd", 2, 1)):
        count = axes[head_axis]
        if isinstance(count, int) and axes[sequence_axis] == "S" and isinstance(size, int):
            return layout, count, size
    return None


def _scaled(node: ir.Node, probe: Probe) -> tuple[ir.Value, float] | None:
    """(x, factor) of x * factor or x / divisor."""
    left, right = node.inputs
    if left is None or right is None:
        return None
    by = probe.scalar(right)
    if by:
        return left, by if node.op_type == "Mul" else 1.0 / by
    by = probe.scalar(left) if node.op_type == "Mul" else None
    return (right, by) if by else None


def _joined(node: ir.Node) -> tuple[ir.Value, ir.Value] | None:
    """(cache, new) of a Concat or TensorScatter."""
    if node.domain or node.op_type not in ("Concat", "TensorScatter") or len(node.inputs) < 2:
        return None
    if node.op_type == "Concat" and len(node.inputs) != 2:
        return None
    cache, new = node.inputs[0], node.inputs[1]
    while cache is not None and (maker := cache.producer()) is not None:
        if maker.op_type not in _LAYOUT | _DEQUANTIZE | {"Cast"}:
            return None
        cache = maker.inputs[0]
    return (cache, new) if cache is not None and new is not None and is_cache(cache) else None


def _output(core: Core, probe: Probe, query: Tokens) -> Tokens:
    """Follows the output through layout changes to tokens by heads."""
    value = core.output
    while True:
        found = _layout(value, probe, query.heads)
        if found is not None and found[1:] == (query.heads, query.head_dim):
            return Tokens(value, *found)
        users = [user for user in value.consumers() if user.op_type != "Shape"]
        if len(users) != 1 or users[0].op_type not in _LAYOUT | {"Cast"}:
            raise refuse(
                core.node,
                f"its output {value.name!r} is {probe.axes(value)}, not tokens by {query.heads} heads of "
                f"{query.head_dim}",
            )
        value = users[0].outputs[0]


def _find_window(core: Core, probe: Probe) -> int:
    """The window of a core's mask, -1 for none, proved at settings with and without past.

    Raises: ExportError if the mask is anything but causal with one window for all positions.
    """
    longest = probe.longest
    if probe.has_past:
        last = probe.setting(1, 1, longest - 1)
    else:
        if longest > _LONGEST_WITHOUT_PAST:
            raise refuse(
                core.node,
                "the graph takes no past keys and values, so that its mask would have to be computed "
                "whole for "
                f"{longest} positions: export it with past key values",
            )
        last = probe.setting(1, longest, 0)
    window = int(_visible(core, probe, last)[..., -1, : last.total].reshape(-1, last.total)[0].sum())
    if window == last.total:
        window = -1
    if window == 0:
        raise refuse(core.node, "its mask hides every key")
    settings = [last, probe.setting(2, 5, 0), probe.setting(1, 3, 4), probe.setting(2, 1, 6)]
    settings.append(probe.setting(1, min(longest, 256), 0))
    if probe.has_past and longest > 64:
        settings += [probe.setting(1, 1, longest // 2), probe.setting(1, 7, longest // 3)]
        if window > 0:
            around = (window - 2, window - 1, window, window + 3)
            pasts = [past for past in around if 0 <= past < longest - 3]
            settings += [probe.setting(1, sequence, past) for past in pasts for sequence in (1, 3)]
    several = False  # whether a setting of several tokens has run
    failed: _NotRunnable | None = None
    for setting in settings:
        try:
            visible = _visible(core, probe, setting)
        except _NotRunnable as error:
            # a graph may be for later calls only, or take several tokens with empty caches only
            if (setting.past and setting.sequence == 1) or not probe.has_past:
                raise
            failed = error
            continue
        several |= setting.sequence > 1
        queries = np.arange(setting.past, setting.total)[:, None]
        keys = np.arange(visible.shape[-1])[None]
        expected = keys <= queries
        if window > 0:
            expected &= queries - keys < window
        wrong = np.argwhere(np.broadcast_to(expected, visible.shape) != visible)
        if len(wrong):
            row, column = (int(item) for item in wrong[0][-2:])
            sees = "sees" if not expected[row, column] else "does not see"
            raise refuse(
                core.node,
                "its mask is not causal with a fixed window: with all of attention_mask 1 and "
                f"{setting.past} tokens cached, the query at position {setting.past + row} {sees} the key at "
                f"{column}",
            )
    if failed is not None and not several:
        raise failed
    return window


def _visible(core: Core, probe: Probe, setting: Setting) -> Array:
    """bool [..., sequence, keys].

    Raises: ExportError if the mask cannot be evaluated, or adds anything to the scores of a visible key.
    """
    try:
        bias = np.asarray(core.bias(probe, setting))
    except ProbeError as error:
        reason = refuse(core.node, f"its mask cannot be evaluated by itself: {error}")
        raise _NotRunnable(str(reason)) from error
    if np.isnan(bias).any():
        raise refuse(core.node, "its mask is NaN at some places")
    bias = np.broadcast_to(bias, np.broadcast_shapes(bias.shape, (setting.sequence, bias.shape[-1])))
    visible = bias > _HIDDEN
    added = bias[visible]
    if added.size and float(np.abs(added).max()) > 1e-6:
        worst = float(added.reshape(-1)[np.abs(added).argmax()])
        raise refuse(
            core.node,
            f"what is added to its scores is more than a mask: {worst:.3g} at a visible key (ALiBi, a "
            "relative "
            "position bias, or a bias of its own)",
        )
    return np.asarray(visible)


def _prove(described: Description, probe: Probe) -> None:
    """Runs the nodes from the new tokens to the output on random numbers, beside the reference."""
    core = described.core
    generator = np.random.default_rng(0)
    query, key, value = described.query, described.key, described.value
    for setting in (_several_tokens(described, probe), probe.setting(2, 1, 6)):
        feeds: dict[ir.Value, Array] = {}
        for tokens in (query, key, value):
            feeds.setdefault(tokens.value, tokens.random(setting, generator))
        past = []
        for tokens in (key, value):
            if tokens.cache is None:
                continue
            shape = probe.shape(tokens.cache, setting)
            if shape is None or len(shape) != 4:
                raise refuse(core.node, f"its cache {tokens.cache.name!r} is not of 4 dimensions")
            cache = generator.standard_normal(shape).astype(fed_dtype(tokens.cache))
            feeds[tokens.cache] = cache
            past.append(_cache_as_heads(core, cache, tokens, setting))
        try:
            found = probe.evaluate([described.output.value], setting, feeds)[0]
        except ProbeError as error:
            raise refuse(core.node, f"it cannot be run by itself: {error}") from error
        parts = [tokens.as_heads(feeds[tokens.value]).astype(np.float64) for tokens in (query, key, value)]
        if core.projection_bias is not None:
            sizes3 = [tokens.heads * tokens.head_dim for tokens in (query, key, value)]
            pieces = np.split(probe.evaluate([core.projection_bias], setting)[0], np.cumsum(sizes3)[:2])
            parts = [
                part + piece.reshape(1, part.shape[1], 1, part.shape[3])
                for part, piece in zip(parts, pieces, strict=True)
            ]
        if past:
            parts[1:] = [np.concatenate([old, new], axis=2) for old, new in zip(past, parts[1:], strict=True)]
        expected = _reference(described, parts, setting)
        if found.size != expected.size:
            raise refuse(core.node, f"run by itself, its output is of shape {found.shape}")
        found = described.output.as_heads(found)
        off = float(np.abs(found - expected).max() / max(1.0, np.abs(expected).max()))
        dtype = feeds[query.value].dtype
        if not off <= _TOLERANCE.get(dtype, 2e-2):
            raise refuse(
                core.node,
                f"run by itself, it is not attention of {query.heads} query and {key.heads} key heads "
                "with scale "
                f"{described.scale:.6g}, softcap {described.softcap:.6g} and window "
                f"{described.local_window_size} over past and new tokens (off by {off:.2g})",
            )


def _several_tokens(described: Description, probe: Probe) -> Setting:
    """Several tokens behind cached ones, or with empty caches where a graph's mask runs with these only."""
    setting = probe.setting(2, 3, 4)
    try:
        described.core.bias(probe, setting)
    except ProbeError:
        return probe.setting(2, 3, 0)
    return setting


def _cache_as_heads(core: Core, cache: Array, tokens: Tokens, setting: Setting) -> Array:
    """[batch, heads, past, head_dim] of a cache input, in float64."""
    slots = (setting.past, setting.total + SPARE)
    for perm in ((0, 1, 2, 3), (0, 2, 1, 3), (0, 1, 3, 2)):
        turned = cache.transpose(perm)
        if (turned.shape[1], turned.shape[3]) == (tokens.heads, tokens.head_dim) and turned.shape[2] >= slots[
            0
        ]:
            return np.asarray(turned[:, :, : setting.past], np.float64)
    raise refuse(
        core.node,
        f"its cache {tokens.cache.name if tokens.cache else ''!r} of shape {cache.shape} does not hold "
        f"{tokens.heads} heads of {tokens.head_dim}",
    )


def _reference(described: Description, parts: list[Array], setting: Setting) -> Array:
    query, key, value = parts
    queries = np.arange(setting.past, setting.total)[:, None]
    keys = np.arange(setting.total)[None]
    visible = keys <= queries
    if described.local_window_size > 0:
        visible &= queries - keys < described.local_window_size
    group = described.query.heads // described.key.heads
    output = np.empty_like(query)
    for row in range(setting.batch):
        for head in range(described.query.heads):
            output[row, head] = attention(
                query[row, head] * described.scale,
                key[row, head // group],
                value[row, head // group],
                visible,
                described.softcap,
            )[0]
    return output
