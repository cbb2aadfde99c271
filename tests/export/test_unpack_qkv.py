from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest

from relay_attention.errors import ExportError
from relay_attention.export.passes import UnpackQKV

SEPARATE = """
<ir_version: 9, opset_import: ["" : 18, "com.microsoft" : 1]>
graph (float[batch, seq, 16] query, float[batch, seq, 8] key, float[batch, seq, 8] value,
       int32[batch] seqlens_k, int32[1] total) => (float[batch, seq, 16] y) {
  [attention] y = com.microsoft.GroupQueryAttention <num_heads = 2, kv_num_heads = 1>
    (query, key, value, , , seqlens_k, total)
}
"""
PACKED = """
<ir_version: 9, opset_import: ["" : 18, "com.microsoft" : 1]>
graph (float[batch, seq, %s] qkv, int32[batch] seqlens_k, int32[1] total) => (float[batch, seq, 16] y) {
  [attention] y = com.microsoft.GroupQueryAttention <num_heads = 2, kv_num_heads = 1>
    (qkv, , , , , seqlens_k, total)
}
"""


def test_three_inputs_give_what_the_packed_one_gave(run) -> None:
    model = ir.from_onnx_text(PACKED % 32)
    lengths = {"seqlens_k": np.array([4, 4], np.int32), "total": np.array([5], np.int32)}
    qkv = np.random.default_rng(0).standard_normal((2, 5, 32), dtype=np.float32)
    before = run(model, qkv=qkv, **lengths)
    result = UnpackQKV()(model)
    assert result.modified
    attention = next(node for node in model.graph if node.op_type == "GroupQueryAttention")
    assert [tuple(value.shape)[-1] for value in attention.inputs[:3]] == [16, 8, 8]
    np.testing.assert_array_equal(run(model, qkv=qkv, **lengths)[0], before[0])


def test_separate_inputs_are_left_alone() -> None:
    model = ir.from_onnx_text(SEPARATE)
    assert not UnpackQKV()(model).modified


def test_two_layers_share_the_split_sizes() -> None:
    text = PACKED % 32
    second = "[other] z = com.microsoft.GroupQueryAttention <num_heads = 2, kv_num_heads = 1>"
    text = text.replace(
        "=> (float[batch, seq, 16] y)", "=> (float[batch, seq, 16] y, float[batch, seq, 16] z)"
    )
    text = text.replace("}", f"{second} (qkv, , , , , seqlens_k, total)\n}}")
    model = ir.from_onnx_text(text)
    UnpackQKV()(model)
    assert [node.op_type for node in model.graph].count("Split") == 2
    assert len(model.graph.initializers) == 1


def test_a_width_that_does_not_split_is_refused_with_the_node() -> None:
    model = ir.from_onnx_text(PACKED % 30)
    with pytest.raises(ExportError, match=r"'attention'.*width 30 does not split into 2 query heads"):
        UnpackQKV()(model)
