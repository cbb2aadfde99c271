"""The last gate before TensorRT: everything that TensorRT 8.6's parser would stumble over, said before it
does."""

from __future__ import annotations

import onnx
import onnx_ir as ir

from relay_attention.errors import ExportError
from relay_attention.export.graph import describe
from relay_attention.export.passes.replace_attention import is_relay_attention
from relay_attention.export.passes.tensorrt_opset import OPSET
from relay_attention.plugins.schema import DOMAIN, PLUGIN_VERSION

# Operators with "Y" in docs/operators.md of onnx-tensorrt's branch 8.6-GA, less those that the parser takes
# from frameworks older than ONNX, and less those that would carry a state or control flow (RefuseLeftovers
# refuses them).
SUPPORTED_OPS = frozenset(
    {
        "Abs", "Acos", "Acosh", "Add", "And", "ArgMax", "ArgMin", "Asin", "Asinh", "Atan", "Atanh",
        "Cast", "Ceil", "Clip", "Concat", "Constant", "ConstantOfShape", "Cos", "Cosh", "CumSum",
        "DequantizeLinear", "Div", "Dropout", "Einsum", "Elu", "Equal", "Erf", "Exp", "Expand",
        "EyeLike", "Flatten", "Floor", "Gather", "GatherElements", "GatherND", "Gemm", "Greater",
        "GreaterOrEqual", "HardSigmoid", "HardSwish", "Identity", "IsInf", "IsNaN", "LeakyRelu", "Less",
        "LessOrEqual", "Log", "LogSoftmax", "MatMul", "Max", "Mean", "Min", "Mod", "Mul", "Neg",
        "NonZero", "Not", "OneHot", "Or", "PRelu", "Pad", "Pow", "QuantizeLinear", "Range",
        "Reciprocal", "ReduceL1", "ReduceL2", "ReduceLogSum", "ReduceLogSumExp", "ReduceMax",
        "ReduceMean", "ReduceMin", "ReduceProd", "ReduceSum", "ReduceSumSquare", "Relu", "Reshape",
        "Round", "ScatterElements", "ScatterND", "Selu", "Shape", "Sigmoid", "Sign", "Sin", "Sinh",
        "Size", "Slice", "Softmax", "Softplus", "Softsign", "Split", "Sqrt", "Squeeze", "Sub", "Sum",
        "Tan", "Tanh", "Tile", "TopK", "Transpose", "Trilu", "Unsqueeze", "Where", "Xor",
    }
)  # fmt: skip
# INT64 is read as INT32; DOUBLE would be read as FLOAT, which changes results, so it is not taken here.
SUPPORTED_TYPES = frozenset(
    {
        ir.DataType.FLOAT,
        ir.DataType.FLOAT16,
        ir.DataType.INT32,
        ir.DataType.INT64,
        ir.DataType.INT8,
        ir.DataType.BOOL,
    }
)
# inputs that have to be initializers for the parser: (operator, index)
_CONSTANT_INPUTS = {("CumSum", 1), ("Slice", 3), ("Squeeze", 1), ("Unsqueeze", 1), ("ReduceSum", 1)}
_INT64_CHECKED = 1 << 20  # elements; larger tables hold no sizes or indices of a graph


class RefuseForTensorRT(ir.passes.InPlacePass):
    """Refuses a graph that TensorRT 8.6's ONNX parser would not take; changes nothing."""

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        if found := problems(model):
            shown = "; ".join(found[:5]) + (f"; and {len(found) - 5} more" if len(found) > 5 else "")
            raise ExportError(f"the graph has no form that TensorRT 8.6 takes: {shown}")
        return ir.passes.PassResult(model, False)


def problems(model: ir.Model) -> list[str]:
    """What TensorRT 8.6's parser would not take, one sentence each; empty for a graph that it takes."""
    found = []
    opset = model.opset_imports.get("", 0)
    if opset > OPSET:
        found.append(f"it declares opset {opset}, TensorRT 8.6 reads up to {OPSET}")
    if model.functions:
        found.append("it has local functions")
    for value in (*model.graph.inputs, *model.graph.initializers.values()):
        found += _value_problems(value)
    for node in model.graph:
        found += _node_problems(node)
    return found


def _value_problems(value: ir.Value) -> list[str]:
    if value.dtype is not None and value.dtype not in SUPPORTED_TYPES:
        return [f"{value.name!r} is of type {value.dtype}"]
    tensor = value.const_value
    if value.dtype == ir.DataType.INT64 and tensor is not None and 0 < tensor.size <= _INT64_CHECKED:
        low, high = int(tensor.numpy().min()), int(tensor.numpy().max())
        # int64's largest is Slice's "to the end"; clamped to int32's largest it means the same
        if low < -(2**31) or 2**31 <= high < 2**63 - 1:
            return [f"{value.name!r} holds {low if low < -(2**31) else high}, beyond int32"]
    return []


def _node_problems(node: ir.Node) -> list[str]:
    if is_relay_attention(node):
        return _plugin_problems(node)
    if node.domain or node.op_type not in SUPPORTED_OPS:
        return [f"{describe(node)} is not among its operators"]
    found = []
    schema = onnx.defs.get_schema(node.op_type, OPSET, "")
    if unknown := [name for name in node.attributes if name not in schema.attributes]:
        found.append(f"{describe(node)} has {', '.join(unknown)}, which opset {OPSET} does not")
    if not schema.min_input <= len(node.inputs) <= schema.max_input:
        found.append(
            f"{describe(node)} has {len(node.inputs)} inputs, opset {OPSET} takes up to {schema.max_input}"
        )
    for index, value in enumerate(node.inputs):
        if (node.op_type, index) in _CONSTANT_INPUTS and value is not None and value.const_value is None:
            found.append(f"{describe(node)} computes its input {index}, which has to be constant")
    for value in node.outputs:
        if value.dtype is not None and value.dtype not in SUPPORTED_TYPES:
            found.append(f"{describe(node)} gives {value.dtype}")
    return found


def _plugin_problems(node: ir.Node) -> list[str]:
    found = []
    if any(value is None for value in node.inputs):
        found.append(f"{describe(node)} leaves an input out")
    for name, expected in (("plugin_version", PLUGIN_VERSION), ("plugin_namespace", DOMAIN)):
        attribute = node.attributes.get(name)
        if attribute is None or attribute.as_string() != expected:
            found.append(f"{describe(node)} lacks {name} {expected!r}, by which TensorRT finds its plugin")
    for index in (9, 10):
        if (
            len(node.inputs) > index
            and (value := node.inputs[index]) is not None
            and value.const_value is None
        ):
            found.append(f"{describe(node)} has a rotary table that is computed; it has to be an initializer")
    return found
