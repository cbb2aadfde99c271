"""Rotary tables that a graph of onnxruntime-genai's builder chooses while it runs become those of one regime.

For longrope the builder writes If(Shape(attention_mask)[1] > length, long tables, short tables).
"""

from __future__ import annotations

import onnx_ir as ir

from relay_attention.errors import ExportError
from relay_attention.export.graph import constant, find_nodes, graph_input, made_by
from relay_attention.export.rotary_regime import LONGROPE, Regime, choose_regime


def choose_tables(model: ir.Model, prefix_length: int, max_context: int | None, max_positions: int) -> Regime:
    """Replaces every such choice, in place; any other If is left to be refused.

    Raises: ExportError if prefix and max_context lie across the length at which the tables change.
    """
    regime = Regime(max_positions)
    for node in find_nodes(model, lambda node: node.op_type == "If" and not node.domain):
        switch = _switch(model, node)
        if switch is None:
            continue
        try:
            regime = choose_regime(LONGROPE, switch, prefix_length, max_context, regime)
        except ExportError as error:
            raise ExportError(f"If node {node.name!r} chooses rotary tables: {error}") from error
        branch = node.attributes["then_branch" if regime.min_prefix else "else_branch"].as_graph()
        tables = [_constant_of(value) for value in branch.outputs]
        if any(table is None for table in tables):
            continue
        for output, table in zip(node.outputs, tables, strict=True):
            assert table is not None
            output.replace_all_uses_with(constant(model, f"{output.name}.chosen", table))
        model.graph.remove(node, safe=True)
    return regime


def _switch(model: ir.Model, node: ir.Node) -> int | None:
    """n where the condition is: more than n tokens, past and new."""
    greater = made_by(node.inputs[0], "Greater")
    gather = made_by(greater.inputs[0], "Gather") if greater is not None else None
    shape = made_by(gather.inputs[0], "Shape") if gather is not None else None
    if greater is None or gather is None or shape is None or shape.attributes:
        return None
    if shape.inputs[0] is not graph_input(model, "attention_mask") or _scalar(gather.inputs[1]) != 1:
        return None
    return _scalar(greater.inputs[1])


def _scalar(value: ir.Value | None) -> int | None:
    tensor = _constant_of(value)
    return int(tensor.numpy().item()) if tensor is not None and tensor.size == 1 else None


def _constant_of(value: ir.Value | None) -> ir.TensorProtocol | None:
    return None if value is None else ir.convenience.get_const_tensor(value)
