from __future__ import annotations

import numpy as np
import onnx_ir as ir

from relay_attention.export.passes import SimplifyReshapes


def _model(body: str, output: str = "float[batch, seq, 8] y") -> ir.Model:
    text = f"""
    <ir_version: 9, opset_import: ["" : 18]>
    graph (float[batch, seq, 8] x) => ({output})
      <float[batch, seq, 2, 4] split, float[batch, seq, 8] joined,
       int64[1] two = {{2}}, int64[1] four = {{4}}, int64[1] eight = {{8}}> {{
      batch = Shape <start = 0, end = 1> (x)
      seq = Shape <start = 1, end = 2> (x)
      {body}
    }}
    """
    return ir.from_onnx_text(text)


SPLIT = (
    "split_shape = Concat <axis = 0> (batch, seq, two, four)\n"
    "split = Reshape <allowzero = 1> (x, split_shape)\n"
)
JOIN = "join_shape = Concat <axis = 0> (batch, seq, eight)\n joined = Reshape (split, join_shape)\n"
X = np.random.default_rng(0).standard_normal((2, 3, 8), dtype=np.float32)


def test_a_round_trip_goes() -> None:
    model = _model(SPLIT + JOIN + "y = Relu (joined)")
    assert SimplifyReshapes()(model).modified
    relu = model.graph.outputs[0].producer()
    assert relu.inputs[0].name == "x"


def test_computed_shapes_become_constants_with_the_same_result(run) -> None:
    output = "float[batch, 2, seq, 4] y"
    model = _model(SPLIT + "y = Transpose <perm = [0, 2, 1, 3]> (split)", output)
    before = run(model, x=X)
    assert SimplifyReshapes()(model).modified
    reshape = model.graph.outputs[0].producer().inputs[0].producer()
    np.testing.assert_array_equal(reshape.inputs[1].const_value.numpy(), [0, 0, 2, 4])
    assert "allowzero" not in reshape.attributes  # with it, 0 would mean an empty dimension
    np.testing.assert_array_equal(run(model, x=X)[0], before[0])


def test_two_symbols_in_other_places_stay_computed() -> None:
    output = "float[seq, batch, 8] y"
    model = _model("s = Concat <axis = 0> (seq, batch, eight)\n y = Reshape (x, s)", output)
    assert not SimplifyReshapes()(model).modified


def test_an_output_of_the_graph_keeps_its_name() -> None:
    model = _model(SPLIT + "s = Concat <axis = 0> (batch, seq, eight)\n y = Reshape (split, s)")
    SimplifyReshapes()(model)
    assert model.graph.outputs[0].name == "y"
    assert model.graph.outputs[0].producer().op_type == "Reshape"
