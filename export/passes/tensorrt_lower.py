"""Fused operators that TensorRT's parser has no importer for become the operators they stand for."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import onnx_ir as ir
from onnx_ir import tape

from relay_attention.export.graph import (
    constant,
    find_nodes,
    float_attribute,
    input_of,
    int_attribute,
    refuse,
)


class LowerFusedOps(ir.passes.InPlacePass):
    """Writes out normalizations and activations; every reduction runs in float32, whatever the model's type.

    RMS and layer normalization of ONNX and of onnxruntime's contrib domain, with or without the residual in
    front, and the forms of Gelu and Swish.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        nodes = find_nodes(model, lambda node: _lowering(node) is not None)
        for node in nodes:
            lowering = _lowering(node)
            assert lowering is not None
            writer = _Writer(model, node)
            outputs = lowering(writer)
            for index, old in enumerate(node.outputs):
                new = outputs.get(index)
                if new is None:
                    if old.uses() or old in model.graph.outputs:
                        raise refuse(node, f"its output {index} is used, which has no form for TensorRT")
                    continue
                new.shape, new.type = old.shape, old.type
                _rename(model, old, new)
            model.graph.insert_before(node, writer.record.nodes)
            model.graph.remove(node, safe=True)
        return ir.passes.PassResult(model, bool(nodes))

    def ensures(self, model: ir.Model) -> None:
        for node in find_nodes(model, lambda node: _lowering(node) is not None):
            raise ir.passes.PostconditionError(f"{node.name} ({node.op_type}) is still there")


def _rename(model: ir.Model, old: ir.Value, new: ir.Value) -> None:
    """Puts `new` in the place of `old`, a graph output's name included."""
    if old in model.graph.outputs:
        model.graph.outputs[model.graph.outputs.index(old)] = new
    old.replace_all_uses_with(new)
    name, old.name = old.name, None
    new.name = name


class _Writer:
    """Appends the nodes that replace one node, named after it and typed."""

    def __init__(self, model: ir.Model, node: ir.Node):
        self.model, self.node, self.record = model, node, tape.Tape()

    def op(
        self, op_type: str, inputs: list[ir.Value], *, dtype: ir.DataType | None = None, **attributes: object
    ) -> ir.Value:
        name = f"{self.node.name or self.node.outputs[0].name}/{len(list(self.record.nodes))}.{op_type}"
        value = self.record.op(op_type, inputs, attributes, name=name)
        value.name, value.type = f"{name}:0", ir.TensorType(dtype or inputs[0].dtype or ir.DataType.FLOAT)
        if inputs[0].shape is not None:
            value.shape = ir.Shape(list(inputs[0].shape))
        return value

    def cast(self, value: ir.Value, dtype: ir.DataType) -> ir.Value:
        return value if value.dtype == dtype else self.op("Cast", [value], dtype=dtype, to=dtype)

    def number(self, number: float, dtype: ir.DataType | None) -> ir.Value:
        dtype = dtype or ir.DataType.FLOAT
        array = np.array(number, dtype.numpy())
        return constant(self.model, f"relay.{array.dtype}.{number!r}", ir.tensor(array))

    def mean(self, value: ir.Value) -> ir.Value:
        """Over the last axis, which stays as 1."""
        made = self.op("ReduceMean", [value], axes=[-1], keepdims=1)
        made.shape = ir.Shape([*value.shape[:-1], 1]) if value.shape is not None else None
        return made


Lowering = Callable[[_Writer], dict[int, ir.Value]]


def _data(writer: _Writer, index: int = 0) -> ir.Value:
    value = input_of(writer.node, index)
    if value is None or value.dtype is None:
        raise refuse(writer.node, f"input {index} is missing, or of unknown type")
    return value


def _check_last_axis(writer: _Writer, value: ir.Value) -> None:
    axis = int_attribute(writer.node, "axis", -1)
    if axis != -1 and (value.shape is None or axis != len(value.shape) - 1):
        raise refuse(
            writer.node, f"it normalizes from axis {axis} on; only the last axis has a form for TensorRT"
        )


def _residual(writer: _Writer, bias_index: int) -> ir.Value:
    """input + skip (+ bias): what the Skip... forms normalize, and hand on as output 3."""
    total = writer.op("Add", [_data(writer), _data(writer, 1)])
    bias = input_of(writer.node, bias_index)
    return total if bias is None else writer.op("Add", [total, bias])


def _rms(writer: _Writer, value: ir.Value, scale: ir.Value) -> ir.Value:
    dtype, wide = value.dtype, ir.DataType.FLOAT
    assert dtype is not None
    x = writer.cast(value, wide)
    epsilon = writer.number(float_attribute(writer.node, "epsilon", 1e-5), wide)
    root = writer.op("Sqrt", [writer.op("Add", [writer.mean(writer.op("Mul", [x, x])), epsilon])])
    return writer.cast(writer.op("Mul", [writer.op("Div", [x, root]), writer.cast(scale, wide)]), dtype)


def _layer(writer: _Writer, value: ir.Value, scale: ir.Value | None, bias: ir.Value | None) -> ir.Value:
    dtype, wide = value.dtype, ir.DataType.FLOAT
    assert dtype is not None
    x = writer.cast(value, wide)
    epsilon = writer.number(float_attribute(writer.node, "epsilon", 1e-5), wide)
    centered = writer.op("Sub", [x, writer.mean(x)])
    variance = writer.mean(writer.op("Mul", [centered, centered]))
    result = writer.op("Div", [centered, writer.op("Sqrt", [writer.op("Add", [variance, epsilon])])])
    if scale is not None:
        result = writer.op("Mul", [result, writer.cast(scale, wide)])
    if bias is not None:
        result = writer.op("Add", [result, writer.cast(bias, wide)])
    return writer.cast(result, dtype)


def _rms_normalization(writer: _Writer) -> dict[int, ir.Value]:
    _check_last_axis(writer, _data(writer))
    return {0: _rms(writer, _data(writer), _data(writer, 1))}


def _skip_rms_normalization(writer: _Writer) -> dict[int, ir.Value]:
    total = _residual(writer, 3)
    return {0: _rms(writer, total, _data(writer, 2)), 3: total}


def _layer_normalization(writer: _Writer) -> dict[int, ir.Value]:
    _check_last_axis(writer, _data(writer))
    return {0: _layer(writer, _data(writer), input_of(writer.node, 1), input_of(writer.node, 2))}


def _skip_layer_normalization(writer: _Writer) -> dict[int, ir.Value]:
    total = _residual(writer, 4)
    return {0: _layer(writer, total, input_of(writer.node, 2), input_of(writer.node, 3)), 3: total}


def _gelu_erf(writer: _Writer, x: ir.Value) -> ir.Value:
    erf = writer.op("Erf", [writer.op("Mul", [x, writer.number(math.sqrt(0.5), x.dtype)])])
    half = writer.op("Mul", [x, writer.number(0.5, x.dtype)])
    return writer.op("Mul", [half, writer.op("Add", [erf, writer.number(1.0, x.dtype)])])


def _gelu_tanh(writer: _Writer, x: ir.Value) -> ir.Value:
    dtype = x.dtype
    assert dtype is not None
    wide = writer.cast(x, ir.DataType.FLOAT)  # a cube overflows float16 early
    cube = writer.op("Mul", [writer.op("Mul", [wide, wide]), wide])
    inner = writer.op("Add", [wide, writer.op("Mul", [cube, writer.number(0.044715, ir.DataType.FLOAT)])])
    tanh = writer.op(
        "Tanh", [writer.op("Mul", [inner, writer.number(math.sqrt(2 / math.pi), ir.DataType.FLOAT)])]
    )
    half = writer.op("Mul", [wide, writer.number(0.5, ir.DataType.FLOAT)])
    return writer.cast(
        writer.op("Mul", [half, writer.op("Add", [tanh, writer.number(1.0, ir.DataType.FLOAT)])]), dtype
    )


def _biased(writer: _Writer) -> ir.Value:
    bias = input_of(writer.node, 1)
    return _data(writer) if bias is None else writer.op("Add", [_data(writer), bias])


def _gelu(writer: _Writer) -> dict[int, ir.Value]:
    approximate = writer.node.attributes.get("approximate")
    form = _gelu_tanh if approximate is not None and approximate.as_string() == "tanh" else _gelu_erf
    return {0: form(writer, _biased(writer))}


def _fast_gelu(writer: _Writer) -> dict[int, ir.Value]:
    return {0: _gelu_tanh(writer, _biased(writer))}


def _swish(default_alpha: float) -> Lowering:
    def lower(writer: _Writer) -> dict[int, ir.Value]:
        x = _data(writer)
        alpha = float_attribute(writer.node, "alpha", default_alpha)
        scaled = x if alpha == 1 else writer.op("Mul", [x, writer.number(alpha, x.dtype)])
        return {0: writer.op("Mul", [x, writer.op("Sigmoid", [scaled])])}

    return lower


_LOWERINGS: dict[tuple[str, str], Lowering] = {
    ("", "RMSNormalization"): _rms_normalization,
    ("", "SimplifiedLayerNormalization"): _rms_normalization,  # onnxruntime registers it in ONNX's own domain
    ("com.microsoft", "SimplifiedLayerNormalization"): _rms_normalization,
    ("com.microsoft", "SkipSimplifiedLayerNormalization"): _skip_rms_normalization,
    ("", "LayerNormalization"): _layer_normalization,
    ("com.microsoft", "SkipLayerNormalization"): _skip_layer_normalization,
    ("", "Gelu"): _gelu,
    ("com.microsoft", "Gelu"): _gelu,
    ("com.microsoft", "BiasGelu"): _gelu,
    ("com.microsoft", "FastGelu"): _fast_gelu,
    ("com.microsoft", "QuickGelu"): _swish(1.702),
    ("", "Swish"): _swish(1.0),
}


def _lowering(node: ir.Node) -> Lowering | None:
    return _LOWERINGS.get((node.domain, node.op_type))
