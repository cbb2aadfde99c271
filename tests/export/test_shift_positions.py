from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest

from relay_attention.errors import ExportError
from relay_attention.export.passes import ShiftPositions

TEXT = """
<ir_version: 9, opset_import: ["" : 18]>
graph (%s[batch, seq] position_ids, int64[batch, seq] input_ids, int32[batch] context_lens,
       int32[batch] query_lens) => (%s[batch, seq] y, int64[2] shape) {
  y = Identity (position_ids)
  shape = Shape (position_ids)
}
"""
FEEDS = {
    "input_ids": np.zeros((3, 4), np.int64),
    "context_lens": np.array([0, 7, 2], np.int32),
    "query_lens": np.array([4, 2, 0], np.int32),
}
# prefix of 5, then the context, then 0, 1, ...; padding repeats the last valid token's position
EXPECTED = [[5, 6, 7, 8], [12, 13, 13, 13], [7, 7, 7, 7]]


def _model(parse, dtype: str = "int64") -> ir.Model:
    model = parse(TEXT % (dtype, dtype))
    prefix = np.zeros((2, 5, 4), np.float32)
    model.graph.register_initializer(
        ir.Value(name="prefix.0.key", shape=ir.Shape(prefix.shape), const_value=ir.tensor(prefix))
    )
    return model


@pytest.mark.parametrize("dtype", ["int64", "int32"])
def test_positions_follow_prefix_and_context(parse, run, dtype: str) -> None:
    model = _model(parse, dtype)
    assert ShiftPositions()(model).modified
    assert "position_ids" not in [value.name for value in model.graph.inputs]
    found, shape = run(model, **FEEDS)
    assert found.dtype == dtype
    np.testing.assert_array_equal(found, EXPECTED)
    np.testing.assert_array_equal(shape, [3, 4])


def test_a_prefix_of_another_length_moves_them(parse, run) -> None:
    model = _model(parse)
    ShiftPositions()(model)
    prefix = model.graph.initializers["prefix.0.key"]
    prefix.const_value, prefix.shape = ir.tensor(np.zeros((2, 1, 4), np.float32)), ir.Shape([2, 1, 4])
    np.testing.assert_array_equal(run(model, **FEEDS)[0], np.array(EXPECTED) - 4)


def test_who_wants_only_the_shape_needs_no_positions(parse) -> None:
    model = _model(parse)
    ShiftPositions()(model)
    assert model.graph.outputs[1].producer().inputs[0].name == "input_ids"


def test_an_unused_input_goes() -> None:
    model = ir.from_onnx_text(
        '<ir_version: 9, opset_import: ["" : 18]>'
        "graph (int64[b, s] position_ids, float[n] x) => (float[n] y) { y = Relu (x) }"
    )
    assert ShiftPositions()(model).modified
    assert [value.name for value in model.graph.inputs] == ["x"]
    assert not ShiftPositions()(model).modified


def test_positions_without_attention_are_refused() -> None:
    model = ir.from_onnx_text(
        '<ir_version: 9, opset_import: ["" : 18]> graph (int64[b, s] position_ids) => (int64[b, s] y)'
        " { y = Identity (position_ids) }"
    )
    from relay_attention.export.passes import run as run_passes

    with pytest.raises(ExportError, match="no attention that could be rewritten"):
        run_passes(model, [ShiftPositions()])
