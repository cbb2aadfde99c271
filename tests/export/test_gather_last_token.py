from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest

from relay_attention.errors import ExportError
from relay_attention.export.passes import GatherLastToken
from relay_attention.export.passes import run as run_passes
from relay_attention.export.passes.gather_on_device import GatherOnDevice

HIDDEN = np.random.default_rng(0).standard_normal((3, 4, 8), dtype=np.float32)
QUERY_LENS = np.array([4, 1, 0], np.int32)
LAST = [3, 0, 0]  # of an idle row: its first, whatever that holds


def _model(parse, body: str) -> ir.Model:
    text = f"""
    <ir_version: 9, opset_import: ["" : 18]>
    graph (float[batch, seq, 8] hidden, int32[batch] query_lens) => (float[batch, seq, 5] logits)
      <float[batch, seq, 8] normed, float two = {{2.0}}> {{
      normed = Tanh (hidden)
      {body}
    }}
    """
    generator = np.random.default_rng(1)
    shapes = {"weight": (8, 5), "embedding": (5, 8), "bias": (5,), "per_token": (1, 4, 5)}
    return parse(
        text, **{name: generator.standard_normal(shape, dtype=np.float32) for name, shape in shapes.items()}
    )


def _check(run, model: ir.Model, tolerance: float = 2e-5) -> ir.Node:
    """Logits are those that the whole graph gave for the last valid tokens; returns the gather."""
    expected = run(model, hidden=HIDDEN, query_lens=QUERY_LENS)[0][np.arange(3), LAST]
    assert GatherLastToken()(model).modified
    found = run(model, hidden=HIDDEN, query_lens=QUERY_LENS)[0]
    assert found.shape == (3, 5)
    np.testing.assert_allclose(found, expected, rtol=tolerance, atol=tolerance / 10)
    assert model.graph.outputs[0].name == "logits"
    return next(node for node in model.graph if node.op_type == "GatherND")


@pytest.mark.parametrize(
    "head",
    [
        "logits = MatMul (normed, weight)",
        "p = MatMul (normed, weight)\n logits = Add (bias, p)",
        "p = MatMul (normed, weight)\n c = Div (p, two)\n t = Tanh (c)\n logits = Mul (t, two)",
        "half = Cast <to = 10> (weight)\n x = Cast <to = 10> (normed)\n p = MatMul (x, half)\n"
        "logits = Cast <to = 1> (p)",
    ],
)
def test_the_language_head_sees_one_token_of_each_row(parse, run, head: str) -> None:
    gather = _check(run, _model(parse, head), tolerance=2e-2 if "Cast" in head else 2e-5)
    assert gather.inputs[0].name in ("normed", "x")


def test_a_tied_head_needs_no_second_copy_of_the_embedding(parse, run) -> None:
    model = _model(parse, "t = Transpose <perm = [1, 0]> (embedding)\n logits = MatMul (normed, t)")
    _check(run, model)
    head = model.graph.outputs[0].producer()
    assert head.op_type == "Gemm"
    assert head.inputs[1].name == "embedding"


@pytest.mark.parametrize(
    "head",
    [
        "p = MatMul (normed, weight)\n logits = Softmax (p)",  # not known to work token by token
        "p = MatMul (normed, weight)\n logits = Add (p, per_token)",  # a constant along the sequence
        "p = MatMul (normed, weight)\n m = Relu (p)\n logits = Add (p, m)",  # two ways to the logits
    ],
)
def test_what_is_not_token_wise_keeps_its_place(parse, run, head: str) -> None:
    gather = _check(run, _model(parse, head))
    assert gather.outputs[0].name == "logits"


@pytest.mark.parametrize(
    "head", ["logits = MatMul (normed, weight)", "p = MatMul (normed, weight)\n logits = Softmax (p)"]
)
def test_the_same_without_main_memory(parse, run, head: str) -> None:
    model = _model(parse, head)
    _check(run, model)
    expected = run(model, hidden=HIDDEN, query_lens=QUERY_LENS)[0]
    assert GatherOnDevice()(model).modified
    np.testing.assert_array_equal(run(model, hidden=HIDDEN, query_lens=QUERY_LENS)[0], expected)
    assert "GatherND" not in {node.op_type for node in model.graph}
    assert [output.name for output in model.graph.outputs] == ["logits"]
    assert not GatherOnDevice()(model).modified


def test_a_graph_without_logits_is_refused(parse) -> None:
    model = _model(parse, "logits = MatMul (normed, weight)")
    model.graph.outputs[0].name = "scores"
    with pytest.raises(ExportError, match="no output 'logits', only: scores"):
        run_passes(model, [GatherLastToken()])
