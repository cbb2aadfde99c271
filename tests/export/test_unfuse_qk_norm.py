from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest

from relay_attention.errors import ExportError
from relay_attention.export.passes import UnfuseQKNorm, UnpackQKV

TEXT = """
<ir_version: 9, opset_import: ["" : 18, "com.microsoft" : 1]>
graph (float[batch, seq, 64] qkv, int32[batch] seqlens_k, int32[1] total, float[16] q_weight,
       float[16] k_weight) => (float[batch, seq, 32] y) {
  [attention] y = com.microsoft.GroupQueryAttention <num_heads = 2, kv_num_heads = 1 %s>
    (qkv, , , , , seqlens_k, total %s)
}
"""
NORMS = ", , , , , , , , q_weight, k_weight"
LENGTHS = {"seqlens_k": np.array([4, 4], np.int32), "total": np.array([5], np.int32)}


@pytest.mark.parametrize(
    ("attributes", "q_epsilon", "k_epsilon"),
    [
        ("", 1e-6, 1e-6),
        (", qk_norm_epsilon = 0.1", 0.1, 0.1),
        (", qk_norm_epsilon = 0.1, k_norm_epsilon = 0.5", 0.1, 0.5),
    ],
)
def test_the_norms_of_each_head_come_first(run, attributes: str, q_epsilon: float, k_epsilon: float) -> None:
    """Beside NumPy: ONNX Runtime fuses them on GPUs only."""
    generator = np.random.default_rng(0)
    qkv = generator.standard_normal((2, 5, 4, 16), dtype=np.float32)
    q_weight, k_weight = generator.standard_normal((2, 16), dtype=np.float32)
    normal = qkv.copy()
    for heads, weight, epsilon in ((slice(0, 2), q_weight, q_epsilon), (slice(2, 3), k_weight, k_epsilon)):
        squares = np.mean(qkv[:, :, heads] ** 2, axis=-1, keepdims=True)
        normal[:, :, heads] = qkv[:, :, heads] / np.sqrt(squares + epsilon) * weight
    weights = {"q_weight": q_weight, "k_weight": k_weight}
    expected = run(ir.from_onnx_text(TEXT % ("", "")), qkv=normal.reshape(2, 5, 64), **LENGTHS, **weights)

    model = ir.from_onnx_text(TEXT % (attributes, NORMS))
    UnpackQKV()(model)
    assert UnfuseQKNorm()(model).modified
    found = run(model, qkv=qkv.reshape(2, 5, 64), **LENGTHS, **weights)
    np.testing.assert_allclose(found[0], expected[0], atol=1e-6)
    assert not UnfuseQKNorm()(model).modified


def test_half_a_pair_is_refused() -> None:
    model = ir.from_onnx_text(TEXT % ("", NORMS.removesuffix(", k_weight")))
    UnpackQKV()(model)
    with pytest.raises(ExportError, match=r"GroupQueryAttention node 'attention'.*k_norm .* lacks a weight"):
        UnfuseQKNorm()(model)
