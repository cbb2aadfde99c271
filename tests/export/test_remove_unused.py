from __future__ import annotations

import onnx_ir as ir
import pytest

from relay_attention.errors import ExportError
from relay_attention.export.passes import RemoveUnused
from relay_attention.export.passes import run as run_passes

TEXT = """
<ir_version: 9, opset_import: ["" : 18, "relay" : 1, "com.microsoft" : 1]>
graph (int32[n, t] input_ids, int32[n] context_lens, int32[n] query_lens, int64[n, total] attention_mask,
       int64[n, t] beam)
   => (float[n, t, 8] logits)
   <float[4, 8] table = {%s}, int64[1] one = {1}> {
  embedded = Gather (table, input_ids)
  lengths = ReduceSum <keepdims = 0> (attention_mask, one)
  seqlens = Sub (lengths, one)
  causal = com.microsoft.Whatever (seqlens)
  %s
}
"""
PLAIN = "logits = relay.RelayAttention <num_heads = 1, kv_num_heads = 1> (embedded, context_lens, query_lens)"


def _model(body: str) -> ir.Model:
    return ir.from_onnx_text(TEXT % (", ".join(["0"] * 32), body))


def test_masks_go_with_their_inputs_constants_and_opset() -> None:
    model = _model(PLAIN)
    assert RemoveUnused()(model).modified
    assert [node.op_type for node in model.graph] == ["Gather", "RelayAttention"]
    assert [value.name for value in model.graph.inputs] == ["input_ids", "context_lens", "query_lens"]
    assert list(model.graph.initializers) == ["table"]
    assert "com.microsoft" not in model.opset_imports
    assert not RemoveUnused()(model).modified


def test_an_input_that_something_still_reads_is_refused_with_its_reader() -> None:
    body = (
        "a = relay.RelayAttention <num_heads = 1, kv_num_heads = 1> (embedded, context_lens, query_lens)\n"
        "f = Cast <to = 1> (attention_mask)\n [masking] logits = Mul (a, f)"
    )
    with pytest.raises(ExportError, match=r"still needs its input 'attention_mask'.*Cast"):
        RemoveUnused()(_model(body))


def test_a_graph_without_attention_is_refused() -> None:
    model = ir.from_onnx_text(
        '<ir_version: 9, opset_import: ["" : 18]> graph (int32[n, t] input_ids) => (float[n, t] logits)'
        " { logits = Cast <to = 1> (input_ids) }"
    )
    with pytest.raises(ExportError, match="no attention was found"):
        run_passes(model, [RemoveUnused()])
