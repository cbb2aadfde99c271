from __future__ import annotations

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest

from relay_attention.export.float32_form import to_float32
from relay_attention.export.passes.split_mixed_norms import SplitMixedNorms

BODY = """
<ir_version: 9, opset_import: ["" : 18]>
graph (bfloat16[n, 4] h) => (%s[n, 4] y%s)
<bfloat16[4] narrow = {1, 2, 3, 4}, float[4] wide = {1, 2, 3, 4}, float two = {2}, float tiny = {0.001},
 float[n, 4] x, float[n, 4] square, float[n, 1] mean, float[n, 1] sum, float[n, 1] root, float[n, 4] quotient,
 float[n, 4] other, int64[1] axes = {1}> {
  x = Cast <to = 1> (h)
  square = Pow (x, two)
  mean = ReduceMean (square, axes)
  sum = Add (mean, tiny)
  root = Sqrt (sum)
  quotient = Div (x, root)
  %s
}
"""
AS_LLAMA = ("bfloat16", "", "q = Cast <to = 16> (quotient)  y = Mul (narrow, q)")
AS_GEMMA = ("float", "", "y = Mul (quotient, wide)")
AS_LLAMA_SHARED = ("bfloat16", ", float[n, 4] other", f"{AS_LLAMA[2]}  other = Neg (x)")
AS_GEMMA_SHARED = ("float", ", float[n, 4] other", f"{AS_GEMMA[2]}  other = Neg (x)")


def model_of(parts: tuple[str, str, str]) -> ir.Model:
    return ir.from_onnx_text(BODY % parts)


@pytest.mark.parametrize(
    ("parts", "split"),
    [(AS_LLAMA, False), (AS_GEMMA, True), (AS_LLAMA_SHARED, True), (AS_GEMMA_SHARED, False)],
)
def test_only_norms_of_two_types_are_split(parts: tuple[str, str, str], split: bool) -> None:
    """One type for both is bfloat16 with both Casts taken in, or float32 with none (x is used elsewhere)."""
    model = model_of(parts)
    x = np.random.default_rng(0).standard_normal((3, 4), dtype=np.float32)
    before = to_float32(ir.to_proto(model))
    assert SplitMixedNorms()(model).modified == split
    kinds = [node.op_type for node in model.graph]
    assert ("Div" in kinds, "Reciprocal" in kinds) == (not split, split)
    assert model.graph.outputs[0].name == "y"
    after = to_float32(ir.to_proto(model))
    found, expected = (
        onnxruntime.InferenceSession(each.SerializeToString(), providers=["CPUExecutionProvider"]).run(
            ["y"], {"h": x}
        )[0]
        for each in (after, before)
    )
    np.testing.assert_allclose(found, expected, rtol=1e-6)
    assert not SplitMixedNorms()(model).modified


def test_casts_of_one_value_count_together() -> None:
    """ONNX Runtime makes one Cast of them."""
    text = BODY % (
        "bfloat16",
        ", float[n, 4] other",
        f"{AS_LLAMA[2]}  again = Cast <to = 1> (h)  other = Neg (again)",
    )
    assert SplitMixedNorms()(ir.from_onnx_text(text)).modified
