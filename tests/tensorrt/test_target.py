"""`--target tensorrt`: the graph in forms that TensorRT 8.6's parser takes, with the results it had before.

TensorRT itself does not run here: what its parser takes is a list made from onnx-tensorrt's branch 8.6-GA.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

from relay_attention.errors import ExportError
from relay_attention.export.passes import run
from relay_attention.export.passes.tensorrt_check import RefuseForTensorRT, problems
from relay_attention.export.passes.tensorrt_lower import LowerFusedOps
from relay_attention.export.passes.tensorrt_opset import LowerOpset

WIDTH = 32
RANDOM = np.random.default_rng(0)
TYPES = {np.float32: TensorProto.FLOAT, np.float16: TensorProto.FLOAT16}


def model(
    nodes: list[onnx.NodeProto],
    weights: dict[str, np.ndarray],
    dtype: type = np.float32,
    opset: int = 18,
    outputs: int = 1,
) -> onnx.ModelProto:
    """x [batch, sequence, WIDTH] -> y0, y1, ... through the nodes."""
    element = TYPES[dtype]
    shape = ["batch", "sequence", WIDTH]
    graph = helper.make_graph(
        nodes,
        "test",
        [
            helper.make_tensor_value_info(name, element, shape)
            for name in ("x", "skip")
            if any(name in node.input for node in nodes)
        ],
        [helper.make_tensor_value_info(f"y{i}", element, ["i", "j", f"k{i}"]) for i in range(outputs)],
        [numpy_helper.from_array(array, name) for name, array in weights.items()],
    )
    imports = [helper.make_opsetid("", opset), helper.make_opsetid("com.microsoft", 1)]
    return helper.make_model(graph, opset_imports=imports, ir_version=10)


def evaluate(proto: onnx.ModelProto, feeds: dict[str, np.ndarray]) -> list[np.ndarray]:
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(
        proto.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    names = {value.name for value in session.get_inputs()}
    return list(session.run(None, {name: array for name, array in feeds.items() if name in names}))


def lower(proto: onnx.ModelProto) -> onnx.ModelProto:
    loaded = ir.from_proto(proto)
    run(loaded, [LowerFusedOps(), LowerOpset(), RefuseForTensorRT()])
    lowered = ir.to_proto(loaded)
    onnx.checker.check_model(lowered)
    assert {item.domain: item.version for item in lowered.opset_import}[""] <= 17
    return lowered


def node(
    op_type: str, inputs: str, outputs: str = "y0", domain: str = "com.microsoft", **attributes: Any
) -> onnx.NodeProto:
    return helper.make_node(
        op_type, inputs.split(","), outputs.split(","), "a_node", domain=domain, **attributes
    )


FUSED = {
    "simplified": (node("SimplifiedLayerNormalization", "x,w", domain="", epsilon=1e-6, axis=-1), 18),
    "simplified axis 2": (node("SimplifiedLayerNormalization", "x,w", domain="", epsilon=1e-5, axis=2), 18),
    "skip simplified": (node("SkipSimplifiedLayerNormalization", "x,skip,w", "y0,,,y1", epsilon=1e-6), 18),
    "skip simplified bias": (node("SkipSimplifiedLayerNormalization", "x,skip,w,b", "y0", epsilon=1e-6), 18),
    "rms": (node("RMSNormalization", "x,w", domain="", epsilon=1e-6), 23),
    "layer": (node("LayerNormalization", "x,w,b", domain="", epsilon=1e-6), 17),
    "layer no bias": (node("LayerNormalization", "x,w", domain=""), 17),
    "skip layer": (node("SkipLayerNormalization", "x,skip,w,b,b", "y0,,,y1", epsilon=1e-6), 18),
    "gelu": (node("Gelu", "x", domain=""), 20),
    "gelu tanh": (node("Gelu", "x", domain="", approximate="tanh"), 20),
    "gelu contrib": (node("Gelu", "x"), 18),
    "bias gelu": (node("BiasGelu", "x,b"), 18),
    "fast gelu": (node("FastGelu", "x,b"), 18),
    "quick gelu": (node("QuickGelu", "x", alpha=1.5), 18),
}


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
@pytest.mark.parametrize("name", FUSED)
def test_lowered_ops_give_the_same(name: str, dtype: type) -> None:
    fused, opset = FUSED[name]
    weights = {
        key: (RANDOM.standard_normal(WIDTH) + 1).astype(dtype) for key in ("w", "b") if key in fused.input
    }
    feeds = {key: (3 * RANDOM.standard_normal((2, 5, WIDTH))).astype(dtype) for key in ("x", "skip")}
    proto = model([fused], weights, dtype, opset, outputs=2 if "y1" in fused.output else 1)
    try:
        expected = evaluate(proto, feeds)
    except onnxruntime.capi.onnxruntime_pybind11_state.NotImplemented:
        pytest.skip(f"ONNX Runtime {onnxruntime.__version__} has no CPU kernel to compare with")
    lowered = lower(proto)
    assert "com.microsoft" not in {item.domain for item in lowered.opset_import}
    assert fused.op_type not in {made.op_type for made in lowered.graph.node}
    tolerance = 2e-5 if dtype == np.float32 else 1e-2
    for wanted, found in zip(expected, evaluate(lowered, feeds), strict=True):
        assert found.dtype == dtype
        np.testing.assert_allclose(found, wanted, rtol=tolerance, atol=tolerance)


def test_reductions_run_in_float32() -> None:
    """Squares that overflow float16 come out finite."""
    proto = model([FUSED["simplified"][0]], {"w": np.ones(WIDTH, np.float16)}, np.float16)
    x = np.full((1, 1, WIDTH), 1000, np.float16)
    (y,) = evaluate(lower(proto), {"x": x})
    np.testing.assert_allclose(y, 1.0, rtol=1e-3)


@pytest.mark.parametrize("op_type", ["ReduceMean", "ReduceMax", "ReduceMin", "ReduceSumSquare", "ReduceL2"])
def test_axes_become_attributes(op_type: str) -> None:
    axes = {"axes": np.array([-1], np.int64)}
    proto = model([node(op_type, "x,axes", domain="", keepdims=1, noop_with_empty_axes=0)], axes)
    feeds = {"x": RANDOM.standard_normal((2, 3, WIDTH)).astype(np.float32)}
    lowered = lower(proto)
    (reduced,) = lowered.graph.node
    assert list(reduced.input) == ["x"]
    assert {attribute.name for attribute in reduced.attribute} == {"axes", "keepdims"}
    np.testing.assert_allclose(evaluate(lowered, feeds)[0], evaluate(proto, feeds)[0], rtol=1e-6)


def test_split_gets_sizes() -> None:
    proto = model([node("Split", "x", "y0,y1,y2", domain="", axis=-1, num_outputs=3)], {}, outputs=3)
    feeds = {"x": RANDOM.standard_normal((2, 3, WIDTH)).astype(np.float32)}
    for wanted, found in zip(evaluate(proto, feeds), evaluate(lower(proto), feeds), strict=True):
        np.testing.assert_array_equal(found, wanted)


def test_default_of_later_attribute_is_dropped() -> None:
    cast = node("Cast", "x", domain="", to=TensorProto.FLOAT, saturate=1)
    (lowered,) = lower(model([cast], {}, opset=19)).graph.node
    assert [attribute.name for attribute in lowered.attribute] == ["to"]


@pytest.mark.parametrize(
    ("nodes", "weights", "reason"),
    [
        ([node("MatMulNBits", "x,w", K=32, N=32)], {"w": np.zeros(4, np.uint8)}, "MatMulNBits"),
        ([node("Hardmax", "x", domain="")], {}, "Hardmax node 'a_node' is not among its operators"),
        ([node("FusedThing", "x")], {}, "com.microsoft.FusedThing node 'a_node' is not among"),
        ([node("Add", "x,w", domain="")], {"w": np.ones(1, np.float64)}, "'w' is of type DOUBLE"),
        ([node("Gather", "w,x", domain="")], {"w": np.array([2**40])}, "holds 1099511627776, beyond"),
        ([node("Cast", "x", domain="", to=1, saturate=0)], {}, "has saturate, which opset 17 does not"),
        ([node("Squeeze", "x,x", domain="")], {}, "computes its input 1, which has to be constant"),
    ],
)  # fmt: skip
def test_refuses(nodes: list[onnx.NodeProto], weights: dict[str, np.ndarray], reason: str) -> None:
    loaded = ir.from_proto(model(nodes, weights))
    with pytest.raises(ExportError) as error:
        run(loaded, [LowerFusedOps(), LowerOpset(), RefuseForTensorRT()])
    assert reason in str(error.value)


def test_refuses_bfloat16() -> None:
    bf16 = helper.make_tensor("w", TensorProto.BFLOAT16, [1], [1.0])
    graph = helper.make_graph(
        [node("Identity", "w", domain="")],
        "g",
        [],
        [helper.make_tensor_value_info("y0", TensorProto.BFLOAT16, [1])],
        [bf16],
    )
    loaded = ir.from_proto(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)]))
    assert any("BFLOAT16" in problem for problem in problems(loaded))


def test_refuses_computed_axes() -> None:
    nodes = [node("Shape", "x", "s", domain=""), node("ReduceMean", "x,s", domain="")]
    with pytest.raises(ExportError, match="TensorRT needs them constant"):
        lower(model(nodes, {}))


def test_refuses_normalization_of_other_axis() -> None:
    with pytest.raises(ExportError, match="from axis 1 on"):
        lower(
            model(
                [node("LayerNormalization", "x,w", domain="", axis=1)], {"w": np.ones((5, WIDTH), np.float32)}
            )
        )


def test_refuses_unusable_outputs() -> None:
    statistics = node("LayerNormalization", "x,w", "y0,y1", domain="")
    with pytest.raises(ExportError, match="its output 1 is used"):
        lower(model([statistics], {"w": np.ones(WIDTH, np.float32)}, outputs=2))


@pytest.mark.parametrize(
    ("attributes", "inputs", "reason"),
    [
        ({"plugin_version": "1", "plugin_namespace": "relay"}, ["x", "", "x"], "leaves an input out"),
        ({"plugin_namespace": "relay"}, ["x"], "lacks plugin_version '1'"),
        ({"plugin_version": "1", "plugin_namespace": ""}, ["x"], "lacks plugin_namespace 'relay'"),
        ({"plugin_version": "1", "plugin_namespace": "relay"}, ["x"] * 11, "rotary table that is computed"),
    ],
)
def test_plugin_node(attributes: dict[str, str], inputs: list[str], reason: str) -> None:
    relay = helper.make_node("RelayAttention", inputs, ["y0"], "layer", domain="relay", **attributes)
    assert any(reason in problem for problem in problems(ir.from_proto(model([relay], {}, opset=17))))
