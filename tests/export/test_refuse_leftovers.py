from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest

from relay_attention.errors import ExportError
from relay_attention.export.passes import RefuseLeftovers


def _model(body: str, domain: str = "com.microsoft") -> ir.Model:
    text = f"""
    <ir_version: 9, opset_import: ["" : 18, "{domain}" : 1]>
    graph (float[n, t, 8] x, float[n, t, 8] k, bool cond) => (float[n, t, t] y) {{ {body} }}
    """
    weight = ir.tensor(np.zeros((8, 8), np.float32), name="weight")
    return ir.from_onnx_text(text, initializers=[weight] if "weight" in body else [])


SCORES = "kt = Transpose <perm = [0, 2, 1]> (k)\n [product] s = MatMul (x, kt)\n"


@pytest.mark.parametrize(
    "between",
    [
        "y = Softmax (s)",
        "m = Add (s, s)\n y = Softmax (m)",
        "h = Tanh (s)\n c = Cast <to = 1> (h)\n w = Where (cond, c, s)\n y = Softmax (w)",
        "d = Div (s, s)\n r = Reshape (d, d)\n y = Softmax (r)",
    ],
)
def test_attention_that_is_written_out_is_refused_with_the_softmax(between: str) -> None:
    body = SCORES + between.replace("y = Softmax", "[soft] y = Softmax")
    with pytest.raises(ExportError, match=r"Softmax node 'soft'.*scores from 'product'"):
        RefuseLeftovers()(_model(body))


def test_a_softmax_over_a_projection_is_no_attention() -> None:
    model = _model("s = MatMul (x, weight)\n y = Softmax (s)")
    assert not RefuseLeftovers()(model).modified


@pytest.mark.parametrize(
    "op_type", ["MultiHeadAttention", "GroupQueryAttention", "PagedAttention", "Attention"]
)
def test_attention_operators_are_refused_by_name(op_type: str) -> None:
    with pytest.raises(ExportError, match=rf"{op_type} node 'left'.*no matcher knows"):
        RefuseLeftovers()(_model(f"[left] y = com.microsoft.{op_type} (x, k)"))


@pytest.mark.parametrize("op_type", ["Conv", "CumSum", "LSTM"])
def test_operators_with_a_state_of_their_own_are_refused(op_type: str) -> None:
    with pytest.raises(ExportError, match=rf"{op_type} node 'state'.*state from token to token"):
        RefuseLeftovers()(_model(f"[state] y = {op_type} (x, k)"))


def test_the_same_operators_on_constants_are_fine() -> None:
    assert not RefuseLeftovers()(_model("c = CumSum (weight, weight)\n y = MatMul (x, c)")).modified


def test_control_flow_is_refused() -> None:
    body = "[branch] y = If (cond) <then_branch = g () => (float a) { a = Identity (x) }, "
    body += "else_branch = h () => (float b) { b = Identity (k) }>"
    with pytest.raises(ExportError, match=r"If node 'branch'.*control flow"):
        RefuseLeftovers()(_model(body))
