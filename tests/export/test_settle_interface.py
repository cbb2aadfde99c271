from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest

from relay_attention.errors import ExportError
from relay_attention.export.passes import SettleInterface
from relay_attention.export.passes import run as run_passes

TEXT = """
<ir_version: 9, opset_import: ["" : 18, "relay" : 1]>
graph (float[n, 1, m, 8] past_key_values__0__value, float[n, 1, m, 8] past_key_values__0__key, int32[n]
query_lens,
       int64[n, t] input_ids, int32[n] context_lens)
   => (float[n, 1, m, 8] present__0__value, float16[n, t, 4] logits, float[n, 1, m, 8] present__0__key,
       float[n, t, 8] hidden_states)
   <float[4, 8] table = {ZEROS}, int64[1] big = {3}, float16[n, t, 4] logits, float[n, t, 8] hidden_states> {
  hidden_states = Gather (table, input_ids)
  same = Mod (input_ids, big)
  [relay] a, present__0__key, present__0__value = relay.RelayAttention <num_heads = 1, kv_num_heads = 1>
  (hidden_states) wide = Cast <to = 1> (same)
  logits = Cast <to = 10> (a)
}
""".replace("ZEROS", ", ".join(["0"] * 32))


@pytest.fixture
def settled(parse) -> ir.Model:
    model = parse(TEXT)
    assert SettleInterface()(model).modified
    return model


def test_inputs_and_outputs_are_the_artifacts_in_order(settled) -> None:
    assert [value.name for value in settled.graph.inputs] == [
        "input_ids", "context_lens", "query_lens", "past_key_values.0.key", "past_key_values.0.value",
    ]  # fmt: skip
    assert [value.name for value in settled.graph.outputs] == ["logits", "present.0.key", "present.0.value"]


def test_token_ids_are_int32_for_gather_and_cast_for_the_rest(settled) -> None:
    assert settled.graph.inputs[0].dtype == ir.DataType.INT32
    nodes = {node.op_type: node for node in settled.graph}
    assert nodes["Gather"].inputs[1] is settled.graph.inputs[0]
    assert nodes["Mod"].inputs[0].producer().op_type == "Cast"


def test_logits_are_float32(settled) -> None:
    logits = settled.graph.outputs[0]
    assert logits.dtype == ir.DataType.FLOAT
    assert logits.producer().op_type == "Cast"


def test_batch_and_sequence_get_their_names_everywhere(settled) -> None:
    assert [str(dim) for dim in settled.graph.inputs[0].shape] == ["batch", "sequence"]
    gathered = next(node for node in settled.graph if node.op_type == "Gather").outputs[0]
    assert [str(dim) for dim in gathered.shape] == ["batch", "sequence", "8"]


def test_a_fixed_batch_is_refused(parse) -> None:
    model = parse(TEXT.replace("int64[n, t] input_ids", "int64[1, t] input_ids"))
    with pytest.raises(ExportError, match=r"fixed shape.*dynamic batch"):
        SettleInterface()(model)


def test_a_graph_without_token_ids_is_refused(parse) -> None:
    model = parse(TEXT.replace("input_ids", "tokens"))
    with pytest.raises(ExportError, match="no input 'input_ids'"):
        run_passes(model, [SettleInterface()])


def test_float32_logits_get_no_cast(parse) -> None:
    text = TEXT.replace("float16[n, t, 4] logits", "float[n, t, 4] logits").replace("<to = 10>", "<to = 1>")
    model = parse(text)
    SettleInterface()(model)
    assert np.sum([node.op_type == "Cast" for node in model.graph]) == 3  # wide, logits, input_ids
