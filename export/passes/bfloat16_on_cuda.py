"""bfloat16 stays where ONNX Runtime has CUDA kernels for it; the rest is computed in float32."""

from __future__ import annotations

import onnx
import onnx_ir as ir

from relay_attention.export.graph import find_nodes, refuse
from relay_attention.plugins.schema import DOMAIN, OP_TYPE

# Operators and the opset from which CUDAExecutionProvider has a kernel that takes bfloat16, read in ONNX
# Runtime's sources at 1.30.0 (August 2026): the registrations of core/providers/cuda/
# cuda_execution_provider.cc and contrib_ops/cuda/cuda_contrib_kernels.cc, and the type lists where the
# kernels are defined; docs/OperatorKernels.md agrees. Missing among others, below the opset noted or at all:
# Clip, Cos, CumSum, Equal, Greater, LeakyRelu, Less, Log, Reciprocal, ReduceMax, ReduceMean, Sin, Softplus.
_ANY_TYPE = {
    "Cast", "Compress", "Concat", "ConstantOfShape", "Expand", "Flatten", "Gather", "GatherElements",
    "GatherND", "Identity", "Reshape", "ScatterElements", "ScatterND", "Shape", "Size", "Slice", "Split",
    "Squeeze", "Tile", "Transpose", "Trilu", "Unsqueeze",
}  # fmt: skip
_SINCE = dict.fromkeys(_ANY_TYPE, 13) | {
    "Abs": 13, "Add": 13, "Cos": 22, "Div": 13, "Erf": 13, "Exp": 13, "Gelu": 20, "Gemm": 13,
    "HardSigmoid": 22, "HardSwish": 22, "IsNaN": 13, "LayerNormalization": 17, "MatMul": 13, "Max": 13,
    "Min": 13, "Mul": 13, "Neg": 13, "Pow": 15, "RMSNormalization": 23, "ReduceSum": 13, "Relu": 13,
    "RotaryEmbedding": 23, "Sigmoid": 13, "Sign": 13, "SimplifiedLayerNormalization": 1, "Sin": 22,
    "Softmax": 13, "Softplus": 22, "Softsign": 22, "Sqrt": 13, "Sub": 13, "Sum": 13, "Tanh": 13, "TopK": 24,
    "Where": 16,
}  # fmt: skip
_CONTRIB = {
    "BiasGelu", "FastGelu", "FusedMatMul", "GatherBlockQuantized", "Gelu", "MatMulNBits", "MoE", "QMoE",
    "QuickGelu", "RotaryEmbedding", "SkipLayerNormalization", "SkipSimplifiedLayerNormalization",
}  # fmt: skip


class Bfloat16OnCuda(ir.passes.InPlacePass):
    """Puts Casts to float32 and back around every node that takes or gives bfloat16 and has no kernel for it.

    The node would go to the CPU otherwise, where there is none either, or its session be refused.
    """

    def requires(self, model: ir.Model) -> None:
        for node in model.graph:
            if any(attribute.type in _GRAPHS for attribute in node.attributes.values()):
                raise refuse(node, "control flow is not supported")

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        opset = model.graph.opset_imports.get("", 0)
        wide: dict[ir.Value, ir.Value] = {}
        modified = False
        for node in find_nodes(model, lambda _: True):
            _settle_types(node, model)
            if not _holds_bfloat16(node) or _has_kernel(node, opset):
                continue
            modified = True
            for index, value in enumerate(node.inputs):
                if value is None or value.dtype != ir.DataType.BFLOAT16:
                    continue
                if value not in wide:
                    wide[value] = _cast(model, node, value, ir.DataType.FLOAT, f"{value.name}/float32")
                node.replace_input_with(index, wide[value])
            for value in node.outputs:
                if value.dtype == ir.DataType.BFLOAT16:
                    _give_in_float(model, node, value)
        return ir.passes.PassResult(model, modified)

    def ensures(self, model: ir.Model) -> None:
        opset = model.graph.opset_imports.get("", 0)
        for node in model.graph:
            if _holds_bfloat16(node) and not _has_kernel(node, opset):
                raise ir.passes.PostconditionError(
                    f"{node.name} ({node.op_type}) is bfloat16, without a kernel"
                )


_GRAPHS = {ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS}


def _has_kernel(node: ir.Node, opset: int) -> bool:
    if not node.domain:
        return node.op_type in _SINCE and opset >= _SINCE[node.op_type]
    return (node.domain, node.op_type) == (DOMAIN, OP_TYPE) or (
        node.domain == "com.microsoft" and node.op_type in _CONTRIB
    )


def _holds_bfloat16(node: ir.Node) -> bool:
    values = [value for value in (*node.inputs, *node.outputs) if value is not None]
    return any(value.dtype == ir.DataType.BFLOAT16 for value in values)


def _settle_types(node: ir.Node, model: ir.Model) -> None:
    """States the types of a node's outputs where passes have not, by the operator's schema.

    Raises: ExportError where it cannot be told, and bfloat16 goes in.
    """
    untyped = [index for index, value in enumerate(node.outputs) if value.name != "" and value.dtype is None]
    if not untyped:
        return
    if node.op_type == "Cast":
        node.outputs[0].type = ir.TensorType(ir.DataType(node.attributes["to"].as_int()))
        return
    if node.op_type == "Constant" and "value" in node.attributes:
        node.outputs[0].type = ir.TensorType(node.attributes["value"].as_tensor().dtype)
        return
    try:
        schema = onnx.defs.get_schema(
            node.op_type, model.graph.opset_imports.get(node.domain, 1), node.domain
        )
    except onnx.defs.SchemaError:
        schema = None
    for index in untyped:
        dtype = _type_by_schema(schema, node, index)
        if dtype is not None:
            node.outputs[index].type = ir.TensorType(dtype)
        elif _holds_bfloat16(node):
            raise refuse(node, f"the type of its output {node.outputs[index].name!r} is not known")


def _type_by_schema(schema: onnx.defs.OpSchema | None, node: ir.Node, index: int) -> ir.DataType | None:
    """An output's type where the schema gives it: that of an input, or the only one there is."""
    if schema is None or not schema.outputs:
        return None
    output = schema.outputs[min(index, len(schema.outputs) - 1)]
    for place, value in enumerate(node.inputs):
        given = schema.inputs[min(place, len(schema.inputs) - 1)]
        if value is not None and value.dtype is not None and given.type_str == output.type_str:
            return value.dtype
    only = next((each for each in schema.type_constraints if each.type_param_str == output.type_str), None)
    names = only.allowed_type_strs if only else [output.type_str]
    known = {"tensor(bool)": ir.DataType.BOOL, "tensor(int64)": ir.DataType.INT64}
    return known.get(names[0]) if len(names) == 1 else None


def _cast(model: ir.Model, before: ir.Node, value: ir.Value, to: ir.DataType, name: str) -> ir.Value:
    node = ir.node("Cast", [value], {"to": to}, name=name)
    made: ir.Value = node.outputs[0]
    made.name, made.type, made.shape = name, ir.TensorType(to), value.shape
    model.graph.insert_before(before, node)
    return made


def _give_in_float(model: ir.Model, node: ir.Node, value: ir.Value) -> None:
    """The node gives float32, and a Cast behind it the bfloat16 value, which keeps its name and uses."""
    narrow = ir.node("Cast", [value], {"to": ir.DataType.BFLOAT16}, name=f"{value.name}/bfloat16")
    made = narrow.outputs[0]
    made.type, made.shape = value.type, value.shape
    name = value.name
    ir.convenience.replace_all_uses_with(value, made, replace_graph_outputs=True)
    narrow.replace_input_with(0, value)
    value.name, value.type, made.name = f"{name}/float32", ir.TensorType(ir.DataType.FLOAT), name
    model.graph.insert_after(node, narrow)
