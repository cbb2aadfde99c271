from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper

from relay_attention.errors import ExportError
from relay_attention.export.longrope_tables import choose_tables
from relay_attention.export.rotary_regime import Regime

SWITCH, POSITIONS = 64, 256
SHORT, LONG = np.full((SWITCH, 4), 1.0, np.float32), np.full((POSITIONS, 4), 2.0, np.float32)


def _model(axis: int = 1) -> ir.Model:
    """What onnxruntime-genai's builder writes; `axis` of the attention mask is compared."""

    def branch(name: str, table: np.ndarray) -> onnx.GraphProto:
        names = [f"{name}_cos", f"{name}_sin"]
        nodes = [
            helper.make_node("Constant", [], [each], value=onnx.numpy_helper.from_array(table))
            for each in names
        ]
        outputs = [helper.make_tensor_value_info(each, TensorProto.FLOAT, table.shape) for each in names]
        return helper.make_graph(nodes, name, [], outputs)

    def scalar(name: str, value: int) -> onnx.NodeProto:
        return helper.make_node(
            "Constant", [], [name], value=helper.make_tensor(name, TensorProto.INT64, [], [value])
        )

    nodes = [
        scalar("switch", SWITCH),
        scalar("axis", axis),
        helper.make_node("Shape", ["attention_mask"], ["shape"]),
        helper.make_node("Gather", ["shape", "axis"], ["total"]),
        helper.make_node("Greater", ["total", "switch"], ["is_long"]),
        helper.make_node(
            "If",
            ["is_long"],
            ["cos_cache", "sin_cache"],
            name="choice",
            then_branch=branch("long", LONG),
            else_branch=branch("short", SHORT),
        ),
        helper.make_node("Add", ["cos_cache", "sin_cache"], ["out"]),
    ]
    mask = helper.make_tensor_value_info("attention_mask", TensorProto.INT64, ["batch", "total"])
    out = helper.make_tensor_value_info("out", TensorProto.FLOAT, None)
    graph = helper.make_graph(nodes, "graph", [mask], [out])
    return ir.from_proto(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)]))


@pytest.mark.parametrize(
    ("prefix", "max_context", "regime", "table"),
    [
        (40, 24, Regime(SWITCH), SHORT),
        (40, None, Regime(SWITCH), SHORT),
        (SWITCH, None, Regime(POSITIONS, SWITCH), LONG),
    ],
)
def test_the_tables_are_those_of_every_request(
    prefix: int, max_context: int | None, regime: Regime, table: np.ndarray
) -> None:
    model = _model()
    assert choose_tables(model, prefix, max_context, POSITIONS) == regime
    assert not any(node.op_type == "If" for node in model.graph)
    add = next(node for node in model.graph if node.op_type == "Add")
    for value in add.inputs:
        assert np.array_equal(value.const_value.numpy(), table)


def test_requests_across_the_switch_are_refused_with_the_node() -> None:
    with pytest.raises(ExportError, match=r"'choice'.*after 64 tokens.*at most 24"):
        choose_tables(_model(), 40, 25, POSITIONS)


def test_a_choice_by_anything_else_is_left_to_be_refused() -> None:
    model = _model(axis=0)
    assert choose_tables(model, 40, 24, POSITIONS) == Regime(POSITIONS)
    assert any(node.op_type == "If" for node in model.graph)
