"""Graphs in bfloat16, computed in float32 by ONNX Runtime on the CPU."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime
from onnx import TensorProto, helper

from relay_attention.export.float32_form import to_float32
from relay_attention.runtime import bfloat16

BFLOAT16 = TensorProto.BFLOAT16


def external(folder: Path, **weights: np.ndarray) -> list[onnx.TensorProto]:
    """Initializers of bfloat16 in a file weights.bin."""
    tensors, offset = [], 0
    with (folder / "weights.bin").open("wb") as stream:
        for name, values in weights.items():
            tensor = TensorProto(name=name, data_type=BFLOAT16, dims=values.shape)
            tensor.data_location = TensorProto.EXTERNAL
            data = bfloat16.narrow(values).tobytes()
            for key, value in (("location", "weights.bin"), ("offset", offset), ("length", len(data))):
                tensor.external_data.add(key=key, value=str(value))
            stream.write(data)
            offset += len(data)
            tensors.append(tensor)
    return tensors


def test_weights_in_files_are_exact_and_stay_there(tmp_path: Path):
    """An embedding gathered from and multiplied by, a weight with a declared type, a small one inside."""
    random = np.random.default_rng(0)
    table, weight, scale = (random.standard_normal(shape, np.float32) for shape in ((9, 4), (4, 4), (4,)))
    scale_tensor = helper.make_tensor("scale", BFLOAT16, [4], bfloat16.narrow(scale).tobytes(), raw=True)
    nodes = [
        helper.make_node("Gather", ["table", "ids"], ["x"]),
        helper.make_node("MatMul", ["x", "weight"], ["y"]),
        helper.make_node("Cast", ["y"], ["wide"], to=TensorProto.FLOAT),
        helper.make_node("Cast", ["wide"], ["narrow"], to=BFLOAT16),
        helper.make_node("Mul", ["narrow", "scale"], ["z"]),
        helper.make_node("Gemm", ["z", "table"], ["logits"], transB=1),
    ]
    values = [
        helper.make_tensor_value_info(name, BFLOAT16, None) for name in ("x", "y", "narrow", "z", "weight")
    ]
    graph = helper.make_graph(
        nodes, "g",
        [helper.make_tensor_value_info("ids", TensorProto.INT32, ["n"])],
        [helper.make_tensor_value_info("logits", BFLOAT16, ["n", 9])],
        [*external(tmp_path, table=table, weight=weight), scale_tensor], value_info=values,
    )  # fmt: skip
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    before = model.SerializeToString()
    wide = to_float32(model)
    assert model.SerializeToString() == before
    assert {tensor.name: tensor.data_type for tensor in wide.graph.initializer} == {
        "table": BFLOAT16, "weight": BFLOAT16, "scale": TensorProto.FLOAT,
    }  # fmt: skip
    (tmp_path / "wide.onnx").write_bytes(wide.SerializeToString())
    onnx.checker.check_model(tmp_path / "wide.onnx", full_check=True)
    session = onnxruntime.InferenceSession(tmp_path / "wide.onnx", providers=["CPUExecutionProvider"])
    ids = np.int32([3, 0, 8])
    table, weight, scale = (
        bfloat16.widen(bfloat16.narrow(each)).astype(np.float64) for each in (table, weight, scale)
    )
    expected = (table[ids] @ weight * scale) @ table.T
    (found,) = session.run(None, {"ids": ids})
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


def test_types_in_attributes():
    nodes = [
        helper.make_node("Constant", [], ["two"], value=helper.make_tensor("t", BFLOAT16, [1], [2.0])),
        helper.make_node(
            "ConstantOfShape", ["shape"], ["threes"], value=helper.make_tensor("t", BFLOAT16, [1], [3.0])
        ),
        helper.make_node("Mul", ["two", "threes"], ["y"]),
    ]
    graph = helper.make_graph(
        nodes, "g", [helper.make_tensor_value_info("shape", TensorProto.INT64, [1])],
        [helper.make_tensor_value_info("y", BFLOAT16, ["n"])],
    )  # fmt: skip
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    wide = to_float32(model).SerializeToString()
    session = onnxruntime.InferenceSession(wide, providers=["CPUExecutionProvider"])
    np.testing.assert_array_equal(session.run(None, {"shape": np.array([2])})[0], np.float32([6, 6]))
