"""The rewrite itself: every attention site becomes a RelayAttention node with caches and a prefix."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from relay_attention.export.forms import match
from relay_attention.export.graph import add_input, constant, find_nodes, refuse
from relay_attention.export.site import AttentionSite
from relay_attention.plugins.schema import DOMAIN, MAX_HEAD_DIM, OP_TYPE, PLUGIN_VERSION, SINCE_VERSION
from relay_attention.runtime.artifact import IoNames

_NAMES = IoNames()
_DTYPES = {ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16}


def is_relay_attention(node: ir.Node) -> bool:
    return (node.domain, node.op_type) == (DOMAIN, OP_TYPE)


class ReplaceAttention(ir.passes.InPlacePass):
    """Replaces every attention that a matcher knows by RelayAttention, numbered in graph order.

    Adds the inputs context_lens and query_lens, each layer's past and present, and each layer's prefix of
    length 0 (an initializer, or an input of symbolic length).
    """

    def __init__(self, prefix_mode: str = "static"):
        super().__init__()
        if prefix_mode not in ("static", "input"):
            raise ValueError(f"prefix_mode is {prefix_mode!r}, not 'static' or 'input'")
        self.prefix_mode = prefix_mode

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        sites = [site for node in find_nodes(model, lambda _: True) if (site := match(node)) is not None]
        for site in sites:
            _check(site)
        for site in sites:
            _release_names(model, site)
        for layer, site in enumerate(sites):
            self._replace(model, layer, site)
        if sites:
            model.graph.opset_imports[DOMAIN] = SINCE_VERSION
        return ir.passes.PassResult(model, bool(sites))

    def ensures(self, model: ir.Model) -> None:
        if any(match(node) for node in model.graph):
            raise ir.passes.PostconditionError("an attention that a matcher knows is still in the graph")

    def _replace(self, model: ir.Model, layer: int, site: AttentionSite) -> None:
        graph, dtype = model.graph, site.query.dtype
        assert dtype is not None
        kv_shape: list[int | str] = ["batch", site.kv_num_heads, "max_context", site.head_dim]
        past = [
            add_input(model, name.format(layer=layer), dtype, kv_shape)
            for name in (_NAMES.past_key, _NAMES.past_value)
        ]
        prefix = [
            self._prefix(model, name.format(layer=layer), dtype, site)
            for name in (_NAMES.prefix_key, _NAMES.prefix_value)
        ]
        lengths = [
            add_input(model, name, ir.DataType.INT32, ["batch"])
            for name in (_NAMES.context_lens, _NAMES.query_lens)
        ]
        rotary = [site.rotary.cos_cache, site.rotary.sin_cache] if site.rotary else []
        name = site.output.name if site.output.is_graph_output() else f"{DOMAIN}.{layer}.output"
        output = ir.Value(name=name, shape=site.output.shape, type=site.query.type)
        present = [
            ir.Value(name=name.format(layer=layer), shape=ir.Shape(kv_shape), type=ir.TensorType(dtype))
            for name in (_NAMES.present_key, _NAMES.present_value)
        ]
        node = ir.node(
            OP_TYPE,
            [site.query, site.key, site.value, *past, *lengths, *prefix, *rotary],
            {
                "num_heads": site.num_heads,
                "kv_num_heads": site.kv_num_heads,
                "scale": site.scale,
                "softcap": site.softcap,
                "local_window_size": site.local_window_size if site.local_window_size > 0 else -1,
                "do_rotary": int(site.rotary is not None),
                "rotary_interleaved": int(site.rotary is not None and site.rotary.interleaved),
                # TensorRT's parser finds the plugin by these two
                "plugin_version": PLUGIN_VERSION,
                "plugin_namespace": DOMAIN,
            },
            domain=DOMAIN,
            outputs=[output, *present],
            name=f"{OP_TYPE}.{layer}",
        )
        graph.insert_after(site.node, node)
        site.output.replace_all_uses_with(output, replace_graph_outputs=True)
        graph.remove(site.node, safe=True)
        graph.outputs.extend(present)

    def _prefix(self, model: ir.Model, name: str, dtype: ir.DataType, site: AttentionSite) -> ir.Value:
        if self.prefix_mode == "input":
            return add_input(model, name, dtype, [site.kv_num_heads, "prefix_length", site.head_dim])
        empty = np.zeros((site.kv_num_heads, 0, site.head_dim), dtype.numpy())
        return constant(model, name, ir.Tensor(empty, name=name))


def _check(site: AttentionSite) -> None:
    """Refuses what the op's schema cannot hold."""
    dtypes = {value.dtype for value in (site.query, site.key, site.value)}
    if site.rotary:
        dtypes |= {site.rotary.cos_cache.dtype, site.rotary.sin_cache.dtype}
    if len(dtypes) > 1 or not dtypes <= _DTYPES:
        found = ", ".join(sorted(str(dtype) for dtype in dtypes))
        raise refuse(
            site.node, f"its inputs are of type {found}; all must be FLOAT, FLOAT16 or BFLOAT16, all the same"
        )
    if site.head_dim % 8 or not 8 <= site.head_dim <= MAX_HEAD_DIM:
        raise refuse(site.node, f"head_dim {site.head_dim} is not a multiple of 8 up to {MAX_HEAD_DIM}")
    if site.num_heads % site.kv_num_heads:
        raise refuse(
            site.node, f"num_heads {site.num_heads} is not a multiple of kv_num_heads {site.kv_num_heads}"
        )


def _release_names(model: ir.Model, site: AttentionSite) -> None:
    """Takes the site's own caches off the graph's inputs and outputs, whose names the new ones may take."""
    graph = model.graph
    for value in site.node.outputs:
        if value is site.output:
            continue
        while value in graph.outputs:
            graph.outputs.remove(value)
        if value.name:
            value.name = f"source.{value.name}"
    for cache in site.caches:
        if cache.is_graph_input() and list(cache.consumers()) == [site.node]:
            site.node.replace_input_with(list(site.node.inputs).index(cache), None)
            graph.inputs.remove(cache)
