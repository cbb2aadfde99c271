"""Operators take the form they have in ONNX opset 17, the last one that TensorRT 8.6's parser knows."""

from __future__ import annotations

import onnx_ir as ir

from relay_attention.export.graph import constant, find_nodes, input_of, int_attribute, refuse

OPSET = 17
# from opset 18 on these take their axes as an input; ReduceSum does since 13
_REDUCTIONS = {
    "ReduceL1", "ReduceL2", "ReduceLogSum", "ReduceLogSumExp", "ReduceMax", "ReduceMean", "ReduceMin",
    "ReduceProd", "ReduceSumSquare",
}  # fmt: skip
# attributes that came after opset 17, with the value that means what opset 17 did
_LATER_ATTRIBUTES: dict[str, dict[str, int | str]] = {
    "Cast": {"saturate": 1, "round_mode": "up"},
    "CastLike": {"saturate": 1},
    "QuantizeLinear": {"saturate": 1, "block_size": 0, "output_dtype": 0, "precision": 0},
    "DequantizeLinear": {"block_size": 0, "output_dtype": 0},
}


class LowerOpset(ir.passes.InPlacePass):
    """Axes of reductions as attributes, sizes of Split as an input; the model declares opset 17."""

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        modified = model.opset_imports.get("", OPSET) != OPSET
        for node in find_nodes(model, lambda node: node.domain == ""):
            if node.op_type in _REDUCTIONS:
                modified |= _axes_as_attribute(node)
            elif node.op_type == "Split":
                modified |= _split_sizes(model, node)
            modified |= _drop_later_attributes(node)
            node.version = None  # a node's own version would contradict the model's
        model.opset_imports[""] = min(OPSET, model.opset_imports.get("", OPSET))
        used = {node.domain for node in model.graph}
        for domain in [domain for domain in model.opset_imports if domain and domain not in used]:
            del model.opset_imports[domain]
            modified = True
        model.ir_version = min(model.ir_version, 8)
        return ir.passes.PassResult(model, modified)


def _axes_as_attribute(node: ir.Node) -> bool:
    noop = node.attributes.pop("noop_with_empty_axes", None)
    axes = input_of(node, 1)
    if axes is None:
        if noop is not None and noop.as_int() and len(node.inputs) > 1:
            raise refuse(node, "noop_with_empty_axes has no form in opset 17")
        return noop is not None
    values = axes.const_value
    if values is None:
        raise refuse(node, f"its axes ({axes.name!r}) are computed; TensorRT needs them constant")
    node.resize_inputs(1)
    node.attributes.add(ir.AttrInt64s("axes", [int(axis) for axis in values.numpy().reshape(-1)]))
    return True


def _split_sizes(model: ir.Model, node: ir.Node) -> bool:
    count = node.attributes.pop("num_outputs", None)
    if input_of(node, 1) is not None or count is None:
        return count is not None
    data, axis, parts = node.inputs[0], int_attribute(node, "axis", 0), count.as_int()
    size = data.shape[axis] if data is not None and data.shape is not None else None
    if not isinstance(size, int):
        raise refuse(node, "the size of what it splits is not known; TensorRT needs the sizes of the parts")
    each = -(-size // parts)
    sizes = [each] * (parts - 1) + [size - each * (parts - 1)]
    node.resize_inputs(2)
    node.replace_input_with(1, constant(model, f"split.{'.'.join(map(str, sizes))}", ir.tensor(sizes)))
    return True


def _drop_later_attributes(node: ir.Node) -> bool:
    modified = False
    for name, neutral in _LATER_ATTRIBUTES.get(node.op_type, {}).items():
        attribute = node.attributes.get(name)
        if attribute is not None and attribute.value == neutral:
            node.attributes.pop(name)
            modified = True
    return modified
