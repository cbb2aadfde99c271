from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest

from relay_attention.errors import ExportError
from relay_attention.export.passes import ReplaceAttention

# two layers over the same input, with caches and lengths as onnxruntime-genai's builder writes them
GQA = """
<ir_version: 9, opset_import: ["" : 18, "com.microsoft" : 1]>
graph (float[batch, seq, 32] query, float[batch, seq, 16] key, float[batch, seq, 16] value,
       float[batch, 1, past, 16] past_key_values__0__key, float[batch, 1, past, 16] past_key_values__0__value,
       int32[batch] seqlens_k, int32[1] total)
   => (float[batch, seq, 32] y, float[batch, seq, 32] z, float[batch, 1, all, 16] present__0__key,
       float[batch, 1, all, 16] present__0__value) {
  [first] y, present__0__key, present__0__value =
    com.microsoft.GroupQueryAttention <num_heads = 2, kv_num_heads = 1, %s>
    (query, key, value, past_key_values__0__key, past_key_values__0__value, seqlens_k, total, cos, sin)
  [second] z = com.microsoft.GroupQueryAttention <num_heads = 2, kv_num_heads = 1>
    (query, key, value, , , seqlens_k, total)
}
"""
ANGLES = np.arange(64, dtype=np.float32)[:, None] * (0.5 ** np.arange(8, dtype=np.float32))


@pytest.fixture
def make(parse):
    def model(attributes: str = "scale = 0.0") -> ir.Model:
        return parse(GQA % attributes, cos=np.cos(ANGLES), sin=np.sin(ANGLES))

    return model


def _attention(model: ir.Model) -> list[ir.Node]:
    return [node for node in model.graph if node.op_type == "RelayAttention"]


def test_every_layer_becomes_relay_attention_with_its_attributes(make) -> None:
    model = make("scale = 0.5, softcap = 9.0, local_window_size = 3, do_rotary = 1, rotary_interleaved = 1")
    assert ReplaceAttention()(model).modified
    first, second = _attention(model)
    assert {name: attribute.value for name, attribute in first.attributes.items()} == {
        "num_heads": 2,
        "kv_num_heads": 1,
        "scale": 0.5,
        "softcap": 9.0,
        "local_window_size": 3,
        "do_rotary": 1,
        "rotary_interleaved": 1,
        "plugin_version": "1",
        "plugin_namespace": "relay",
    }
    assert [value.name for value in first.inputs] == [
        "query", "key", "value", "past_key_values.0.key", "past_key_values.0.value",
        "context_lens", "query_lens", "prefix.0.key", "prefix.0.value", "cos", "sin",
    ]  # fmt: skip
    # not rotated: the tables are left out at the end, and nothing is left out in between
    assert len(second.inputs) == 9
    assert None not in second.inputs
    assert second.attributes["local_window_size"].value == -1
    assert model.graph.opset_imports["relay"] == 1


def test_the_sources_caches_go_and_the_artifacts_come(make) -> None:
    model = make()
    ReplaceAttention()(model)
    shapes = {value.name: tuple(map(str, value.shape)) for value in model.graph.inputs}
    for layer in (0, 1):
        for what in ("key", "value"):
            assert shapes[f"past_key_values.{layer}.{what}"] == ("batch", "1", "max_context", "16")
            assert model.graph.initializers[f"prefix.{layer}.{what}"].shape == ir.Shape([1, 0, 16])
    assert model.graph.inputs[0].dtype == ir.DataType.FLOAT
    names = [value.name for value in model.graph.outputs]
    assert names.count("present.0.key") == 1
    assert {"present.1.key", "present.1.value"} <= set(names)


def test_a_prefix_may_be_an_input_of_any_length(make) -> None:
    model = make()
    ReplaceAttention("input")(model)
    prefix = next(value for value in model.graph.inputs if value.name == "prefix.1.value")
    assert tuple(map(str, prefix.shape)) == ("1", "prefix_length", "16")
    assert not [name for name in model.graph.initializers if name.startswith("prefix")]


@pytest.mark.parametrize(
    "attributes", ["scale = 0.0", "do_rotary = 1", "softcap = 2.0, scale = 0.7", "local_window_size = 3"]
)
def test_results_are_those_of_group_query_attention(make, run, attributes: str) -> None:
    generator = np.random.default_rng(0)
    feeds = {
        name: generator.standard_normal((2, 6, width), dtype=np.float32)
        for name, width in (("query", 32), ("key", 16), ("value", 16))
    }
    empty = {f"past_key_values.0.{what}": np.zeros((2, 1, 0, 16), np.float32) for what in ("key", "value")}
    lengths = {"seqlens_k": np.array([5, 5], np.int32), "total": np.array([6], np.int32)}
    model = make(attributes)
    expected = run(model, **feeds, **empty, **lengths)
    ReplaceAttention()(model)
    for name in ("seqlens_k", "total"):
        model.graph.inputs.remove(next(value for value in model.graph.inputs if value.name == name))
    # in two pieces, the second after a context
    caches = {
        f"past_key_values.{layer}.{what}": np.zeros((2, 1, 6, 16), np.float32)
        for layer in (0, 1)
        for what in ("key", "value")
    }
    names = [value.name for value in model.graph.outputs]
    found: dict[str, list[np.ndarray]] = {"y": [], "z": []}
    for start, end in ((0, 4), (4, 6)):
        piece = {name: value[:, start:end] for name, value in feeds.items()}
        lengths = {
            "context_lens": np.full(2, start, np.int32),
            "query_lens": np.full(2, end - start, np.int32),
        }
        outputs = dict(zip(names, run(model, **piece, **caches, **lengths), strict=True))
        caches = {name: outputs[name.replace("past_key_values", "present")] for name in caches}
        for name, values in found.items():
            values.append(outputs[name])
    np.testing.assert_allclose(np.concatenate(found["y"], 1), expected[0], atol=2e-6)
    np.testing.assert_allclose(np.concatenate(found["z"], 1), expected[1], atol=2e-6)


def test_head_sizes_that_the_op_has_not_are_refused(make) -> None:
    model = make()
    model.graph[0].attributes["num_heads"] = ir.AttrInt64("num_heads", 8)  # 32 / 8 = 4
    with pytest.raises(ExportError, match=r"'first'.*head_dim 4 is not a multiple of 8"):
        ReplaceAttention()(model)


def test_types_that_the_op_has_not_are_refused(make) -> None:
    model = make()
    for value in model.graph[0].inputs[:3]:
        value.type = ir.TensorType(ir.DataType.DOUBLE)
    with pytest.raises(ExportError, match=r"DOUBLE.*all must be FLOAT, FLOAT16 or BFLOAT16, all the same"):
        ReplaceAttention()(model)


def test_a_graph_without_attention_is_left_alone() -> None:
    model = ir.from_onnx_text(
        '<ir_version: 9, opset_import: ["" : 18]> graph (float[n] x) => (float[n] y) { y = Relu (x) }'
    )
    assert not ReplaceAttention()(model).modified
