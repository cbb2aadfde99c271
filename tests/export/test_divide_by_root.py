from __future__ import annotations

import numpy as np
import onnx_ir as ir

from relay_attention.export.passes import DivideByRoot

TEXT = """
<ir_version: 9, opset_import: ["" : 18]>
graph (float[n, 4] x) => (float[n, 4] y, float[n, 4] z) {
  squares = Mul (x, x)
  mean = ReduceMean <keepdims = 1> (squares, axes)
  root = Sqrt (mean)
  factor = Reciprocal (root)
  y = Mul (%s)
  other = Exp (x)
  z = Mul (other, x)
}
"""


def _model(operands: str) -> ir.Model:
    return ir.from_onnx_text(TEXT % operands, initializers=[ir.tensor(np.array([-1]), name="axes")])


def test_a_product_with_a_reciprocal_root_becomes_a_quotient(run) -> None:
    x = np.random.default_rng(0).standard_normal((3, 4), dtype=np.float32)
    for operands in ("x, factor", "factor, x"):
        model = _model(operands)
        before = run(model, x=x)
        assert DivideByRoot()(model).modified
        divide = model.graph.outputs[0].producer()
        assert divide is not None
        assert divide.op_type == "Div"
        assert model.graph.outputs[0].name == "y"
        for found, expected in zip(run(model, x=x), before, strict=True):
            np.testing.assert_allclose(found, expected, rtol=1e-6)


def test_other_products_are_left_alone() -> None:
    model = _model("x, factor")
    DivideByRoot()(model)
    assert model.graph.outputs[1].producer().op_type == "Mul"
    assert not DivideByRoot()(model).modified
