"""Which nodes are computed in float32, and that they compute what they did. No GPU."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
from onnx import TensorProto, helper

from relay_attention.errors import ExportError
from relay_attention.export.float32_form import to_float32
from relay_attention.export.passes import run as run_passes
from relay_attention.export.passes.bfloat16_on_cuda import Bfloat16OnCuda

TEXT = """
<ir_version: 9, opset_import: ["" : %d]>
graph (bfloat16[n, 4] x) => (bfloat16[n, 4] y, bfloat16[n, 4] z)
<bfloat16[n, 4] a, bfloat16[n, 4] b, bfloat16[n, 4] c> {
  a = Sigmoid (x)
  b = Reciprocal (a)
  c = Mul (a, b)
  y = Cos (x)
  z = Softplus (c)
}
"""


def model_of(opset: int) -> ir.Model:
    return ir.from_onnx_text(TEXT % opset)


def nodes(model: ir.Model) -> list[tuple[str, str]]:
    """Operators with the type that they give."""
    return [(node.op_type, str(node.outputs[0].dtype)) for node in model.graph]


def test_what_has_no_kernel_is_computed_in_float32():
    model = model_of(18)
    assert Bfloat16OnCuda()(model).modified
    assert nodes(model) == [
        ("Sigmoid", "BFLOAT16"),
        ("Cast", "FLOAT"), ("Reciprocal", "FLOAT"), ("Cast", "BFLOAT16"),
        ("Mul", "BFLOAT16"),
        ("Cast", "FLOAT"), ("Cos", "FLOAT"), ("Cast", "BFLOAT16"),
        ("Cast", "FLOAT"), ("Softplus", "FLOAT"), ("Cast", "BFLOAT16"),
    ]  # fmt: skip
    assert [(value.name, value.dtype) for value in model.graph.outputs] == [
        ("y", ir.DataType.BFLOAT16),
        ("z", ir.DataType.BFLOAT16),
    ]
    onnx.checker.check_model(ir.to_proto(model), full_check=True)
    assert not Bfloat16OnCuda()(model).modified


def test_kernels_come_with_opsets():
    """Cos and Softplus take bfloat16 from opset 22 on; Reciprocal never."""
    model = model_of(22)
    Bfloat16OnCuda()(model)
    assert [kind for kind in nodes(model) if kind[1] == "FLOAT"] == [
        ("Cast", "FLOAT"),
        ("Reciprocal", "FLOAT"),
    ]


def test_other_types_are_left_alone():
    model = ir.from_onnx_text((TEXT % 18).replace("bfloat16", "float"))
    assert not Bfloat16OnCuda()(model).modified


def test_values_are_the_same():
    x = np.random.default_rng(0).standard_normal((3, 4), dtype=np.float32)
    found = []
    for change in (False, True):
        model = model_of(18)
        if change:
            Bfloat16OnCuda()(model)
        proto = to_float32(ir.to_proto(model))
        session = onnxruntime.InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"])
        found.append(session.run(None, {"x": x}))
    np.testing.assert_array_equal(found[0], found[1])


def test_a_value_that_several_read_is_cast_once():
    text = """<ir_version: 9, opset_import: ["" : 18]>
    graph (bfloat16[4] x) => (bfloat16[4] y, bfloat16[4] z) { y = Reciprocal (x)  z = Log (x) }"""
    model = ir.from_onnx_text(text)
    Bfloat16OnCuda()(model)
    assert [node.op_type for node in model.graph].count("Cast") == 3


def test_types_are_worked_out_where_passes_left_them_out():
    """By the operators' schemas; integers and truth values are not taken for bfloat16."""
    text = """<ir_version: 9, opset_import: ["" : 18]>
    graph (bfloat16[n, 4] x) => (bfloat16[m] y, int64[2] s, bool[n, 4] q)
    { a = Abs (x)  s = Shape (a)  q = IsNaN (a)  b = Reciprocal (a)
      flat = Constant <value = int64[1] {-1}> ()
      y = Reshape (b, flat) }"""
    model = ir.from_onnx_text(text)
    Bfloat16OnCuda()(model)
    assert nodes(model) == [
        ("Abs", "BFLOAT16"), ("Shape", "INT64"), ("IsNaN", "BOOL"), ("Cast", "FLOAT"),
        ("Reciprocal", "FLOAT"), ("Cast", "BFLOAT16"), ("Constant", "INT64"), ("Reshape", "BFLOAT16"),
    ]  # fmt: skip


def test_types_that_cannot_be_known_are_refused():
    x, y = (helper.make_tensor_value_info(name, TensorProto.BFLOAT16, ["n"]) for name in "xy")
    graph = [
        helper.make_node("Mystery", ["x"], ["a"], "mystery", domain="com.microsoft"),
        helper.make_node("Abs", ["a"], ["y"]),
    ]
    proto = helper.make_model(helper.make_graph(graph, "g", [x], [y]), opset_imports=[
        helper.make_opsetid("", 18), helper.make_opsetid("com.microsoft", 1)])  # fmt: skip
    with pytest.raises(ExportError, match=r"Mystery node 'mystery': the type of its output 'a' is not known"):
        run_passes(ir.from_proto(proto), [Bfloat16OnCuda()])
