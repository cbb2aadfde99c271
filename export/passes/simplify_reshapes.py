"""Reshapes that end where they began go; the others get constant shapes."""

from __future__ import annotations

import onnx_ir as ir

from relay_attention.export.graph import constant, find_nodes, is_constant


class SimplifyReshapes(ir.passes.InPlacePass):
    """Replaces the end of a chain of Reshapes by the value in it that has the same shape already, and shapes
    that are
    computed from batch and sequence by constants that copy these (0) or leave one to be found (-1).

    Attention needs [batch, sequence, heads * head_dim], which is what projections give and take; exporters
    split the heads off in between, with shapes computed while running.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        modified = False
        for node in find_nodes(model, _is_reshape):
            output = node.outputs[0]
            source = _same_shape(node)
            if source is not None and not output.is_graph_output():
                output.replace_all_uses_with(source)
                modified = True
                continue
            shape = node.inputs[1]
            dims = _constant_dims(node)
            if dims is None or shape is None or is_constant(shape):
                continue
            name = f"reshape.{'x'.join(map(str, dims))}"
            node.replace_input_with(1, constant(model, name, ir.tensor(dims)))
            node.attributes.pop("allowzero", None)
            modified = True
        return ir.passes.PassResult(model, modified)


def _is_reshape(node: ir.Node) -> bool:
    return node.op_type == "Reshape" and not node.domain


def _same_shape(reshape: ir.Node) -> ir.Value | None:
    """The furthest value before a chain of Reshapes whose shape is that of its end, by size and by symbol."""
    target = _dims(reshape.outputs[0])
    found = None
    node: ir.Node | None = reshape
    while node is not None and _is_reshape(node):
        source = node.inputs[0]
        assert source is not None
        if target is not None and _dims(source) == target:
            found = source
        node = source.producer()
    return found


def _constant_dims(reshape: ir.Node) -> list[int] | None:
    """The shape as Reshape takes it: 0 where the input's dimension is kept, -1 for at most one other
    symbol."""
    source, target = reshape.inputs[0], _dims(reshape.outputs[0])
    before = _dims(source) if source is not None else None
    if before is None or target is None:
        return None
    dims = []
    for axis, dim in enumerate(target):
        kept = axis < len(before) and before[axis] == dim
        dims.append(dim if isinstance(dim, int) else 0 if kept else -1)
    return dims if dims.count(-1) <= 1 else None


def _dims(value: ir.Value) -> tuple[int | str, ...] | None:
    if value.shape is None:
        return None
    dims = tuple(dim if isinstance(dim, int) else dim.value for dim in value.shape)
    return None if None in dims else dims
