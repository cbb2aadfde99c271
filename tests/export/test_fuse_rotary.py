from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest

from relay_attention.export.passes import FuseRotary, SimplifyReshapes

HEADS, KV_HEADS, HEAD_DIM, POSITIONS, LENGTH = 2, 1, 16, 32, 6

# what torch traces for apply_rotary_pos_emb, with `size` dimensions rotated and attention_scaling 0.5
TEXT = """
<ir_version: 9, opset_import: ["" : 18, "relay" : 1]>
graph (float[batch, seq, 32] q, float[batch, seq, 16] k, float[batch, seq, 16] v, int64[batch, seq]
position_ids,
       float[batch, 1, max, 16] past_key, float[batch, 1, max, 16] past_value, int32[batch] context_lens,
       int32[batch] query_lens)
   => (float[batch, seq, 32] y, float[batch, 1, max, 16] present_key, float[batch, 1, max, 16] present_value)
   <int64[1] zero = {0}, int64[1] one = {1}, int64[1] last = {-1}, int64[1] three = {3},
    int64[1] half = {%(half)s}, int64[1] size = {%(size)s}, int64[1] end = {9223372036854775807},
    float scaling = {%(scaling)s}, float[1, 0, 16] prefix_key = {}, float[1, 0, 16] prefix_value = {},
    int64[4] split_q = {0, 0, 2, 16}, int64[4] split_k = {0, 0, 1, 16},
    int64[3] join_q = {0, 0, 32}, int64[3] join_k = {0, 0, 16},
    float[batch, seq, 2, 16] q4, float[batch, seq, 1, 16] k4, float[batch, 2, seq, 16] qt, float[batch, 1,
    seq, 16] kt, float[batch, 2, seq, %(size)s] qr, float[batch, 1, seq, %(size)s] kr,
    float[batch, seq, 32] qf, float[batch, seq, 16] kf, float[batch, 1, seq, %(size)s] cos_h,
    float[batch, 1, seq, %(size)s] sin_h> {
  u = Unsqueeze (position_ids, last)
  f = Cast <to = 1> (u)
  angles = Mul (f, inv_freq)
  both = Concat <axis = -1> (angles, angles)
  cos = Cos (both)
  sin = Sin (both)
  cos_s = Mul (cos, scaling)
  sin_s = Mul (sin, scaling)
  cos_h = Unsqueeze (cos_s, one)
  sin_h = Unsqueeze (sin_s, one)
  q4 = Reshape (q, split_q)
  k4 = Reshape (k, split_k)
  qt = Transpose <perm = [0, 2, 1, 3]> (q4)
  kt = Transpose <perm = [0, 2, 1, 3]> (k4)
  %(rotate)s
  qb = Transpose <perm = [0, 2, 1, 3]> (q_rotated)
  kb = Transpose <perm = [0, 2, 1, 3]> (k_rotated)
  qf = Reshape (qb, join_q)
  kf = Reshape (kb, join_k)
  y, present_key, present_value = relay.RelayAttention <num_heads = 2, kv_num_heads = 1>
    (qf, kf, v, past_key, past_value, context_lens, query_lens, prefix_key, prefix_value)
}
"""
WHOLE = """
  %(x)s_upper = Slice (%(x)st, half, end, three, one)
  %(x)s_lower = Slice (%(x)st, zero, half, three, one)
  %(x)s_negative = Neg (%(x)s_upper)
  %(x)s_turned = Concat <axis = -1> (%(x)s_negative, %(x)s_lower)
  %(x)s_straight = Mul (%(x)st, cos_h)
  %(x)s_crossed = Mul (%(x)s_turned, sin_h)
  %(x)s_rotated = Add (%(x)s_straight, %(x)s_crossed)
"""
PARTIAL = """
  %(x)sr = Slice (%(x)st, zero, size, last, one)
  %(x)s_rest = Slice (%(x)st, size, end, last, one)
  %(x)s_upper = Slice (%(x)sr, half, end, three, one)
  %(x)s_lower = Slice (%(x)sr, zero, half, three, one)
  %(x)s_negative = Neg (%(x)s_upper)
  %(x)s_turned = Concat <axis = -1> (%(x)s_negative, %(x)s_lower)
  %(x)s_straight = Mul (cos_h, %(x)sr)
  %(x)s_crossed = Mul (sin_h, %(x)s_turned)
  %(x)s_first = Add (%(x)s_crossed, %(x)s_straight)
  %(x)s_rotated = Concat <axis = -1> (%(x)s_first, %(x)s_rest)
"""


def _model(form: str = WHOLE, size: int = HEAD_DIM, scaling: str = "0.5", **edit: str) -> ir.Model:
    rotate = form % {"x": "q"} + form % {"x": "k"}
    text = TEXT % {"half": size // 2, "size": size, "scaling": scaling, "rotate": rotate}
    for old, new in edit.items():
        text = text.replace(old, new)
    inv_freq = (10.0 ** -np.arange(0, 2, 2 / (size // 2))).astype(np.float32)
    return ir.from_onnx_text(text, initializers=[ir.tensor(inv_freq, name="inv_freq")])


def _feeds() -> dict[str, np.ndarray]:
    generator = np.random.default_rng(0)
    widths = {"q": HEADS * HEAD_DIM, "k": KV_HEADS * HEAD_DIM, "v": KV_HEADS * HEAD_DIM}
    return {
        **{name: generator.standard_normal((2, LENGTH, n), dtype=np.float32) for name, n in widths.items()},
        "past_key": np.zeros((2, 1, LENGTH, HEAD_DIM), np.float32),
        "past_value": np.zeros((2, 1, LENGTH, HEAD_DIM), np.float32),
        "context_lens": np.zeros(2, np.int32),
        "query_lens": np.full(2, LENGTH, np.int32),
    }


@pytest.mark.parametrize(("form", "size"), [(WHOLE, HEAD_DIM), (PARTIAL, 8)])
def test_the_op_rotates_as_the_arithmetic_did(run, form: str, size: int) -> None:
    model = _model(form, size)
    positions = np.broadcast_to(np.arange(LENGTH), (2, LENGTH))
    expected = run(model, **_feeds(), position_ids=positions)
    assert FuseRotary(POSITIONS)(model).modified
    node = next(node for node in model.graph if node.op_type == "RelayAttention")
    assert node.attributes["do_rotary"].value == 1
    assert [tuple(value.shape) for value in node.inputs[9:]] == [(POSITIONS, size // 2)] * 2
    for found, value in zip(run(model, **_feeds(), position_ids=positions), expected, strict=True):
        np.testing.assert_allclose(found, value, atol=2e-6)


def test_with_simplified_reshapes_nothing_is_left_before_the_op() -> None:
    model = _model()
    FuseRotary(POSITIONS)(model)
    SimplifyReshapes()(model)
    node = next(node for node in model.graph if node.op_type == "RelayAttention")
    assert [value.name for value in node.inputs[:3]] == ["q", "k", "v"]


def test_layers_share_their_tables() -> None:
    model = _model()
    FuseRotary(POSITIONS)(model)
    assert sorted(name for name in model.graph.initializers if "cache" in name) == [
        "rotary.cos_cache",
        "rotary.sin_cache",
    ]


@pytest.mark.parametrize(
    "edit",
    [
        {"q_negative = Neg": "q_negative = Abs"},  # another rotation
        {
            "Concat <axis = -1> (q_negative, q_lower)": "Concat <axis = -1> (q_lower, q_negative)"
        },  # halves swapped
        {"Mul (k_turned, sin_h)": "Mul (k_turned, cos_h)"},  # key and query rotated by other functions
        {
            "(angles, angles)": "(angles, other)",  # the halves have different angles
            "(f, inv_freq)": "(f, inv_freq)\n other = Neg (angles)",
        },
        {
            "cos_s = Mul (cos, scaling)": "w = ReduceSum (q)\n cos_s = Mul (cos, w)"
        },  # depends on more than positions
    ],
)
def test_anything_else_stays_as_it_is(edit: dict[str, str]) -> None:
    assert not FuseRotary(POSITIONS)(_model(**edit)).modified


def test_unrotated_attention_is_left_alone() -> None:
    model = _model()
    node = next(node for node in model.graph if node.op_type == "RelayAttention")
    node.replace_input_with(0, next(value for value in model.graph.inputs if value.name == "q"))
    assert not FuseRotary(POSITIONS)(model).modified
