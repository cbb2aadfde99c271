from __future__ import annotations

import numpy as np
import onnx_ir as ir

from relay_attention.export.passes import FoldWeightTransposes

WEIGHT = np.random.default_rng(0).standard_normal((3, 4), dtype=np.float32)


def _model(body: str) -> ir.Model:
    text = f"""
    <ir_version: 9, opset_import: ["" : 18]>
    graph (float[n, 4] x, int64[n] ids) => (float[n, 3] y) {{ {body} }}
    """
    return ir.from_onnx_text(text, initializers=[ir.tensor(WEIGHT, name="weight")])


def test_the_weight_is_stored_transposed_under_its_own_name(run) -> None:
    model = _model("t = Transpose <perm = [1, 0]> (weight)\n y = MatMul (x, t)")
    x = np.random.default_rng(1).standard_normal((5, 4), dtype=np.float32)
    before = run(model, x=x, ids=np.zeros(5, np.int64))
    assert FoldWeightTransposes()(model).modified
    assert [node.op_type for node in model.graph] == ["MatMul"]
    folded = model.graph.initializers["weight"]
    assert isinstance(folded.const_value, ir.LazyTensor)  # made when written, one weight at a time
    np.testing.assert_array_equal(folded.const_value.numpy(), WEIGHT.T)
    np.testing.assert_array_equal(run(model, x=x, ids=np.zeros(5, np.int64))[0], before[0])


def test_two_equal_transposes_become_one_weight() -> None:
    model = _model(
        "t = Transpose <perm = [1, 0]> (weight)\n u = Transpose <perm = [1, 0]> (weight)\n"
        "a = MatMul (x, t)\n b = MatMul (x, u)\n y = Add (a, b)"
    )
    assert FoldWeightTransposes()(model).modified
    assert [node.op_type for node in model.graph] == ["MatMul", "MatMul", "Add"]
    assert list(model.graph.initializers) == ["weight"]


def test_a_weight_with_another_use_is_not_stored_twice() -> None:
    model = _model(
        "t = Transpose <perm = [1, 0]> (weight)\n a = MatMul (x, t)\n"
        "e = Gather (weight, ids)\n s = ReduceSum (e)\n y = Add (a, s)"
    )
    assert not FoldWeightTransposes()(model).modified


def test_activations_are_left_alone() -> None:
    model = _model(
        "t = Transpose <perm = [1, 0]> (x)\n u = MatMul (weight, t)\n y = Transpose <perm = [1, 0]> (u)"
    )
    assert not FoldWeightTransposes()(model).modified
