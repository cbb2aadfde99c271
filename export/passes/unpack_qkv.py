"""Attention whose query, key and value come packed in one value gets them as three."""

from __future__ import annotations

import onnx_ir as ir
from onnx_ir import tape

from relay_attention.export.forms.group_query_attention import KEY, QUERY, VALUE
from relay_attention.export.graph import constant, find_nodes, input_of, int_attribute, last_dim, refuse


class UnpackQKV(ir.passes.InPlacePass):
    """Puts a Split before every GroupQueryAttention that takes packed QKV.

    The projection stays one matrix product, quantised or not, biased or not.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        packed_nodes = find_nodes(model, _is_packed)
        for node in packed_nodes:
            packed = node.inputs[QUERY]
            num_heads, kv_num_heads = int_attribute(node, "num_heads"), int_attribute(node, "kv_num_heads")
            width = last_dim(packed)
            if not width or not num_heads or not kv_num_heads or width % (num_heads + 2 * kv_num_heads):
                raise refuse(
                    node,
                    f"packed QKV of width {width} does not split into {num_heads} query heads and twice "
                    f"{kv_num_heads} key/value heads",
                )
            head_dim = width // (num_heads + 2 * kv_num_heads)
            sizes = [num_heads * head_dim, kv_num_heads * head_dim, kv_num_heads * head_dim]
            record = tape.Tape()
            parts = record.op_multi_out(
                "Split",
                [packed, constant(model, f"split.{'.'.join(map(str, sizes))}", ir.tensor(sizes))],
                {"axis": -1},
                num_outputs=3,
                name=f"{node.name}/split",
            )
            for part, size, suffix in zip(parts, sizes, ("query", "key", "value"), strict=True):
                part.name = f"{packed.name}/{suffix}"
                part.type = packed.type
                if packed.shape is not None:
                    part.shape = ir.Shape([*packed.shape[:-1], size])
            model.graph.insert_before(node, record.nodes)
            for index, part in zip((QUERY, KEY, VALUE), parts, strict=True):
                node.replace_input_with(index, part)
        return ir.passes.PassResult(model, bool(packed_nodes))

    def ensures(self, model: ir.Model) -> None:
        for node in find_nodes(model, _is_packed):
            raise ir.passes.PostconditionError(f"{node.name} still takes packed QKV")


def _is_packed(node: ir.Node) -> bool:
    return (
        (node.domain, node.op_type) == ("com.microsoft", "GroupQueryAttention")
        and input_of(node, QUERY) is not None
        and input_of(node, KEY) is None
        and input_of(node, VALUE) is None
    )
