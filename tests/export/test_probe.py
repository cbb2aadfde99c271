from __future__ import annotations

from types import ModuleType

import numpy as np
import onnx_decoders as d  # conftest.py has loaded it
import onnx_ir as ir
import pytest

from relay_attention.export.onnx_source import _infer_types
from relay_attention.export.probe import SPARE, Probe, ProbeError, Setting


def _model(text: str, **tensors: object) -> ir.Model:
    used = [ir.tensor(value, name=name) for name, value in tensors.items()]
    model = ir.from_onnx_text(text, initializers=used)
    for tensor in used:
        value = model.graph.initializers[tensor.name]
        value.shape, value.type = tensor.shape, ir.TensorType(tensor.dtype)
    _infer_types(model)
    return model


def _value(model: ir.Model, name: str) -> ir.Value:
    return next(value for node in model.graph for value in node.outputs if value.name == name)


CACHED = """
<ir_version: 10, opset_import: ["" : 18]>
g (int64[b, s] input_ids, int64[b, t] attention_mask, float[b, 2, p, 8] past) => (float[b, s, 16] logits) {
    shape = Shape (past)
    past_length = Gather (shape, two)
    counted = CumSum (attention_mask, one)
    hidden = Gather (table, input_ids)
    wide = MatMul (hidden, weight)
    wide_shape = Shape (wide)
    split = Reshape (wide, heads)
    turned = Transpose <perm = [0, 2, 1, 3]> (split)
    all = Concat <axis = 2> (past, turned)
    logits = MatMul (hidden, weight)
}
"""
TENSORS = {
    "one": np.array(1),
    "two": np.array(2),
    "table": np.zeros((50, 4), np.float32),
    "weight": np.zeros((4, 16), np.float32),
    "heads": np.array([0, 0, 2, 8]),
}


def test_values_and_shapes_at_a_setting() -> None:
    model = _model(CACHED, **TENSORS)
    probe = Probe(model)
    setting = Setting(2, 3, 5)
    past, counted, wide = (_value(model, name) for name in ("past_length", "counted", "wide_shape"))
    found = probe.evaluate([past, counted, wide], setting)
    assert found[0] == 5
    assert found[1].tolist() == [[1, 2, 3, 4, 5, 6, 7, 8]] * 2
    # the shape of an activation, which itself is not computed
    assert found[2].tolist() == [2, 3, 16]
    assert probe.shape(_value(model, "all"), setting) == (2, 2, 8, 8)
    assert probe.axes(_value(model, "all")) == ("B", 2, "?", 8)
    assert probe.axes(_value(model, "split")) == ("B", "S", 2, 8)


def test_what_token_ids_decide_is_not_evaluated() -> None:
    model = _model(CACHED, **TENSORS)
    with pytest.raises(ProbeError, match="token ids or the caches"):
        Probe(model).evaluate([_value(model, "wide")], Setting(1, 2, 3))


def test_a_value_may_be_fed() -> None:
    model = _model(CACHED, **TENSORS)
    feeds = {_value(model, "wide"): np.arange(32, dtype=np.float32).reshape(1, 2, 16)}
    turned = Probe(model).evaluate([_value(model, "turned")], Setting(1, 2, 3), feeds)[0]
    assert turned[0, 1, 0].tolist() == list(range(8, 16))


def test_a_factor_that_grows_past_some_length_is_no_number() -> None:
    """As models have it that scale their scores by the logarithm of long lengths."""
    text = """
    <ir_version: 10, opset_import: ["" : 18]>
    g (int64[b, s] input_ids, int64[b, t] attention_mask) => (float factor) {
        shape = Shape <start = 1> (attention_mask)
        length = Squeeze (shape)
        number = Cast <to = 1> (length)
        ratio = Div (number, trained)
        factor = Max (ratio, unit)
        fixed = Max (unit, unit)
    }
    """
    tensors = {"trained": np.array(64, np.float32), "unit": np.array(1, np.float32)}
    model = _model(text, **tensors)
    probe = Probe(model, longest=512)
    assert probe.scalar(_value(model, "fixed")) == 1.0
    assert probe.scalar(_value(model, "factor")) is None
    assert Probe(model, longest=60).scalar(_value(model, "factor")) == 1.0


@pytest.mark.parametrize(
    ("node", "expected"),
    [
        ("ReduceMean <axes = [-1], keepdims = 1> (wide)", (2, 3, 1)),
        ("ReduceMax <axes = [1], keepdims = 0> (wide)", (2, 16)),
        ("ReduceSum (wide, one)", (2, 1, 16)),
        ("ReduceSum <keepdims = 0> (wide)", ()),
        ("ReduceSum <noop_with_empty_axes = 1> (wide)", (2, 3, 16)),
    ],
)
def test_shapes_of_sums(node: str, expected: tuple[int, ...]) -> None:
    """As normalisation of heads is written out by exporters that note no shapes."""
    text = CACHED.replace("logits = MatMul", f"reduced = {node}\n logits = MatMul").replace("18]", "17]")
    model = _model(text, **TENSORS | {"one": np.array([1])})
    assert Probe(model).shape(_value(model, "reduced"), Setting(2, 3, 5)) == expected


def test_static_caches_have_room_to_spare(tiny: ModuleType) -> None:
    model = ir.from_proto(d.decoder(d.scattered, opset=24, prepare=d.lengths))
    probe = Probe(model, ["write_indices"], ["nonpad_kv_seqlen"], longest=4096)
    cache = next(value for value in model.graph.inputs if str(value.name).startswith("past"))
    assert probe.longest == probe.capacity == d.CAPACITY
    assert probe.shape(cache, Setting(2, 3, 4)) == (2, 2, d.CAPACITY, 16)
    assert SPARE > 0
    write = next(value for value in model.graph.inputs if value.name == "write_indices")
    assert probe.knows(write)
