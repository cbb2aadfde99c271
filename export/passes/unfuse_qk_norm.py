"""Attention that normalises its query and key itself gets them normalised."""

from __future__ import annotations

import onnx_ir as ir
from onnx_ir import tape

from relay_attention.export.forms.group_query_attention import KEY, QUERY
from relay_attention.export.graph import (
    constant,
    find_nodes,
    float_attribute,
    input_of,
    int_attribute,
    last_dim,
    refuse,
)

QUERY_NORM, KEY_NORM = 14, 15
_EPSILON = 1e-6  # the operator's default


class UnfuseQKNorm(ir.passes.InPlacePass):
    """Puts the RMS normalisation of each head, which a GroupQueryAttention does before it rotates, in front.

    onnxruntime-genai's builder fuses it for CUDA. `UnpackQKV` has run.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        nodes = find_nodes(model, _normalises)
        for node in nodes:
            epsilon = float_attribute(node, "qk_norm_epsilon", _EPSILON)
            for index, weight, heads, name in (
                (QUERY, QUERY_NORM, "num_heads", "q_norm"),
                (KEY, KEY_NORM, "kv_num_heads", "k_norm"),
            ):
                own = float_attribute(node, f"{name}_epsilon", epsilon)
                self._normalise(model, node, index, weight, int_attribute(node, heads), name, own)
        return ir.passes.PassResult(model, bool(nodes))

    def _normalise(
        self, model: ir.Model, node: ir.Node, index: int, weight: int, heads: int, name: str, epsilon: float
    ) -> None:
        value, scale = input_of(node, index), input_of(node, weight)
        width = last_dim(value) if value is not None else None
        if value is None or scale is None or not heads or not width or width % heads:
            raise refuse(node, f"its {name} of {width} features in {heads} heads lacks a weight or a shape")
        head_dim = width // heads
        by_heads = constant(model, f"shape.0.0.{heads}.{head_dim}", ir.tensor([0, 0, heads, head_dim]))
        flat = constant(model, f"shape.0.0.{width}", ir.tensor([0, 0, width]))
        record = tape.Tape()
        split = record.op("Reshape", [value, by_heads], name=f"{node.name}/{name}/by_heads")
        normal = record.op(
            "SimplifiedLayerNormalization",
            [split, scale],
            {"axis": -1, "epsilon": epsilon, "stash_type": 1},
            name=f"{node.name}/{name}",
        )
        result = record.op("Reshape", [normal, flat], name=f"{node.name}/{name}/flat")
        rows = value.shape[:-1] if value.shape is not None else [None, None]
        for each, dims in ((split, [heads, head_dim]), (normal, [heads, head_dim]), (result, [width])):
            each.type, each.shape = value.type, ir.Shape([*rows, *dims])
        model.graph.insert_before(node, record.nodes)
        node.replace_input_with(index, result)
        node.replace_input_with(weight, None)


def _normalises(node: ir.Node) -> bool:
    return (node.domain, node.op_type) == ("com.microsoft", "GroupQueryAttention") and (
        input_of(node, QUERY_NORM) is not None or input_of(node, KEY_NORM) is not None
    )
