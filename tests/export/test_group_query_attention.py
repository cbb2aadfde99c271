from __future__ import annotations

import onnx_ir as ir
import pytest

from relay_attention.errors import ExportError
from relay_attention.export.forms import match

TEXT = """
<ir_version: 9, opset_import: ["" : 18, "com.microsoft" : 1]>
graph (float[batch, seq, 16] query, float[batch, seq, 8] key, float[batch, seq, 8] value, int32[batch]
seqlens_k,
       int32[1] total, float[64, 4] cos, float[64, 4] sin, int64[batch, seq] ids, float x)
   => (float[batch, seq, 16] y) {
  [the attention] y = com.microsoft.GroupQueryAttention <num_heads = 2, kv_num_heads = 1, %s> (%s)
}
""".replace("[the attention]", "[attention]")
INPUTS = ["query", "key", "value", "", "", "seqlens_k", "total"]


def _node(attributes: str = "scale = 0.5", **inputs: str) -> ir.Node:
    names = INPUTS + [""] * 10
    for index, name in inputs.items():
        names[int(index.removeprefix("input"))] = name
    while not names[-1]:
        names.pop()
    return ir.from_onnx_text(TEXT % (attributes, ", ".join(names))).graph[0]


def test_a_plain_node_is_described() -> None:
    site = match(_node("scale = 0.5, softcap = 3.0, local_window_size = 7"))
    assert site is not None
    assert (site.num_heads, site.kv_num_heads, site.head_dim) == (2, 1, 8)
    assert (site.scale, site.softcap, site.local_window_size, site.rotary) == (0.5, 3.0, 7, None)


@pytest.mark.parametrize(
    ("index", "reason"),
    [
        (9, "position_ids"),
        (10, "attention_bias"),
        (11, "sinks"),
        (12, "quantised"),
        (13, "quantised"),
        (14, "normalises the query"),
        (15, "normalises the key"),
        (16, "query_seqlens"),
    ],
)
def test_inputs_that_change_the_result_are_refused(index: int, reason: str) -> None:
    with pytest.raises(ExportError, match=rf"GroupQueryAttention node 'attention'.*{reason}"):
        match(_node(**{f"input{index}": "x"}))


@pytest.mark.parametrize(
    ("attribute", "reason"),
    [
        ("smooth_softmax = 1", "smooth softmax"),
        ("qk_output = 1", "scores"),
        ("kv_cache_bit_width = 8", "quantised"),
        ("causal = 0", "not causal"),
    ],
)
def test_attributes_that_change_the_result_are_refused(attribute: str, reason: str) -> None:
    with pytest.raises(ExportError, match=reason):
        match(_node(attribute))


def test_attributes_that_say_off_are_taken() -> None:
    assert match(_node("smooth_softmax = 0, qk_output = 0, causal = 1, sliding_window_cache = 1"))
    assert match(_node("smooth_softmax = -1"))


def test_rotary_tables_that_are_chosen_while_running_are_refused() -> None:
    with pytest.raises(ExportError, match=r"chosen while running \(longrope"):
        match(_node("do_rotary = 1", input7="cos", input8="sin"))
    with pytest.raises(ExportError, match="cos_cache or sin_cache is missing"):
        match(_node("do_rotary = 1"))


def test_a_query_that_does_not_split_into_heads_is_refused() -> None:
    node = _node()
    node.attributes["num_heads"] = ir.AttrInt64("num_heads", 3)
    with pytest.raises(ExportError, match="width 16 does not split into num_heads 3"):
        match(node)


def test_other_operators_are_no_sites() -> None:
    model = ir.from_onnx_text(
        '<ir_version: 9, opset_import: ["" : 18]> graph (float[n] x) => (float[n] y) { y = Relu (x) }'
    )
    assert match(model.graph[0]) is None
