"""Rotary embedding written out as arithmetic becomes the op's own, with tables for every position."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import onnx
import onnx_ir as ir
import onnxruntime

from relay_attention.export.float32_form import to_float32
from relay_attention.export.graph import (
    constant,
    find_nodes,
    graph_input,
    int_attribute,
    is_constant,
    made_by,
)
from relay_attention.export.passes.replace_attention import is_relay_attention

_POSITION_IDS = "position_ids"
_QUERY, _KEY = 0, 1
_HEADS_FIRST = (0, 2, 1, 3)


@dataclass(frozen=True)
class _Rotation:
    """x * cos + rotate_half(x) * sin on the first `size` of the last axis of x [batch, heads, sequence,
    head_dim]; halved: cos and sin are given for one half of it, as RotaryEmbedding takes them."""

    x: ir.Value
    cos: ir.Value
    sin: ir.Value
    size: int
    flatten: ir.Node  # the Reshape to [batch, sequence, heads * head_dim] behind it
    halved: bool = False


class FuseRotary(ir.passes.InPlacePass):
    """Sets do_rotary on each RelayAttention whose query and key are both rotated by the same function of
    position_ids.

    The tables are made by running the graph's own arithmetic for positions 0..max_positions-1, whatever
    scaling it holds. What does not have this shape (rotation of pairs, a factor that differs between the
    halves) stays in the graph as it is, which is right too, only slower.
    """

    def __init__(self, max_positions: int):
        super().__init__()
        self.max_positions = max_positions

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        tables: dict[tuple[ir.Value, ir.Value], tuple[ir.Value, ir.Value] | None] = {}
        modified = False
        for node in find_nodes(model, is_relay_attention):
            if int_attribute(node, "do_rotary"):
                continue
            query, key = _match(node.inputs[_QUERY]), _match(node.inputs[_KEY])
            if query is None or key is None:
                continue
            angles = (query.cos, query.sin)
            if (key.cos, key.sin, key.size, key.halved) != (*angles, query.size, query.halved):
                continue
            if angles not in tables:
                tables[angles] = self._tables(model, query, node.inputs[_QUERY].dtype, len(tables))
            pair = tables[angles]
            if pair is None:
                continue
            for index, rotation in ((_QUERY, query), (_KEY, key)):
                node.replace_input_with(index, _flat(model, node, rotation))
            node.resize_inputs(11)
            node.replace_input_with(9, pair[0])
            node.replace_input_with(10, pair[1])
            node.attributes["do_rotary"] = ir.AttrInt64("do_rotary", 1)
            modified = True
        return ir.passes.PassResult(model, modified)

    def _tables(
        self, model: ir.Model, rotation: _Rotation, dtype: ir.DataType | None, number: int
    ) -> tuple[ir.Value, ir.Value] | None:
        """cos_cache and sin_cache [max_positions, size / 2] as initializers."""
        halves = []
        for value in (rotation.cos, rotation.sin):
            table = _evaluate(model, value, self.max_positions)
            half = rotation.size // 2
            width = half if rotation.halved else rotation.size
            if table is None or table.size != self.max_positions * width:
                return None
            table = table.reshape(self.max_positions, width)
            if not rotation.halved and not np.array_equal(table[:, :half], table[:, half:]):
                return None
            halves.append(np.ascontiguousarray(table[:, :half]))
        suffix = f".{number}" if number else ""
        names = (f"rotary{suffix}.cos_cache", f"rotary{suffix}.sin_cache")
        if dtype is None or any(half.dtype != dtype.numpy() for half in halves):
            return None
        cos, sin = (
            constant(model, name, ir.Tensor(half, name=name))
            for name, half in zip(names, halves, strict=True)
        )
        return cos, sin


def _flat(model: ir.Model, before: ir.Node, rotation: _Rotation) -> ir.Value:
    """The value before rotation as [batch, sequence, heads * head_dim]."""
    source = rotation.x
    producer = made_by(source, "Transpose")
    new: list[ir.Node] = []
    if producer is not None and _perm(producer) == _HEADS_FIRST:
        source = producer.inputs[0]
    else:
        new.append(ir.node("Transpose", [source], {"perm": list(_HEADS_FIRST)}))
        source = new[-1].outputs[0]
    old = rotation.flatten
    new.append(ir.node("Reshape", [source, old.inputs[1]], dict(old.attributes)))
    flat: ir.Value = new[-1].outputs[0]
    flat.shape, flat.type = old.outputs[0].shape, old.outputs[0].type
    model.graph.insert_before(before, new)
    return flat


def _match(value: ir.Value | None) -> _Rotation | None:
    flatten = made_by(value, "Reshape")
    transpose = made_by(flatten.inputs[0], "Transpose") if flatten is not None else None
    if flatten is None or transpose is None or _perm(transpose) != _HEADS_FIRST:
        return None
    rotated = transpose.inputs[0]
    whole = _rotation(rotated, flatten) or _operator(rotated, flatten)
    if whole is not None:
        return whole
    # partial rotary: the first dimensions are rotated, the rest joined on behind
    concat = made_by(rotated, "Concat")
    if concat is None or len(concat.inputs) != 2:
        return None
    first = _rotation(concat.inputs[0], flatten)
    rest = _sliced(concat.inputs[1])
    start = _sliced(first.x) if first else None
    if first is None or rest is None or start is None or rest[0] is not start[0]:
        return None
    if start[1:] != (0, first.size) or rest[1:] != (first.size, _width(rest[0])):
        return None
    return _Rotation(start[0], first.cos, first.sin, first.size, flatten)


def _operator(value: ir.Value | None, flatten: ir.Node) -> _Rotation | None:
    """Matches RotaryEmbedding of opset 23 with tables that are gathered already."""
    node = made_by(value, "RotaryEmbedding")
    if node is None or len([operand for operand in node.inputs if operand is not None]) != 3:
        return None
    x, cos, sin = node.inputs[:3]
    size = int_attribute(node, "rotary_embedding_dim") or _width(x)
    if int_attribute(node, "interleaved") or not size or x.shape is None or len(x.shape) != 4:
        return None
    return _Rotation(x, cos, sin, size, flatten, halved=True)


def _rotation(value: ir.Value | None, flatten: ir.Node) -> _Rotation | None:
    """Matches value = x * cos + concat(-x[half:], x[:half]) * sin."""
    add = made_by(value, "Add")
    if add is None:
        return None
    for straight, crossed in (tuple(add.inputs), tuple(reversed(add.inputs))):
        left, right = made_by(straight, "Mul"), made_by(crossed, "Mul")
        if left is None or right is None:
            continue
        for half_turned, sin in (tuple(right.inputs), tuple(reversed(right.inputs))):
            x = _half_turned(half_turned)
            if x is None or x not in left.inputs:
                continue
            cos = left.inputs[1] if left.inputs[0] is x else left.inputs[0]
            size = _width(x)
            if size and size % 2 == 0:
                return _Rotation(x, cos, sin, size, flatten)
    return None


def _half_turned(value: ir.Value) -> ir.Value | None:
    """x where value = concat(-x[..., half:], x[..., :half])."""
    concat = made_by(value, "Concat")
    negative = made_by(concat.inputs[0], "Neg") if concat is not None else None
    if concat is None or negative is None or len(concat.inputs) != 2:
        return None
    upper, lower = _sliced(negative.inputs[0]), _sliced(concat.inputs[1])
    if upper is None or lower is None or upper[0] is not lower[0]:
        return None
    size = _width(upper[0])
    if not size or upper[1:] != (size // 2, size) or lower[1:] != (0, size // 2):
        return None
    return upper[0]


def _sliced(value: ir.Value | None) -> tuple[ir.Value, int, int] | None:
    """(x, start, end) where value is x[..., start:end]."""
    node = made_by(value, "Slice")
    if node is None or len(node.inputs) < 4:
        return None
    x, width = node.inputs[0], _width(node.inputs[0])
    starts, ends, axes = (_ints(operand) for operand in node.inputs[1:4])
    steps = _ints(node.inputs[4]) if len(node.inputs) > 4 else [1]
    if not width or not starts or not ends or not axes or len(starts) != 1 or steps != [1]:
        return None
    if axes[0] not in (-1, len(x.shape) - 1):
        return None
    start, end = starts[0], min(ends[0], width)
    return x, start + width if start < 0 else start, end + width if end < 0 else end


def _evaluate(model: ir.Model, value: ir.Value, max_positions: int) -> npt.NDArray[np.generic] | None:
    """A value that depends on position_ids alone, for positions 0, 1, ... max_positions - 1; None if on
    more."""
    positions = graph_input(model, _POSITION_IDS)
    if positions is None:
        return None
    nodes: dict[ir.Node, None] = {}
    constants: dict[str, ir.TensorProtocol] = {}
    pending = [value]
    while pending:
        current = pending.pop()
        node = current.producer()
        if node is not None:
            if node not in nodes:
                nodes[node] = None
                pending.extend(operand for operand in node.inputs if operand is not None)
        elif current.is_initializer() and current.const_value is not None:
            constants[str(current.name)] = current.const_value
        elif current is not positions:
            return None
    ordered = [node for node in model.graph if node in nodes]
    graph = onnx.helper.make_graph(
        [ir.serde.serialize_node(node) for node in ordered],
        "rotary",
        [onnx.helper.make_tensor_value_info(_POSITION_IDS, positions.dtype, [1, max_positions])],
        [onnx.helper.make_tensor_value_info(str(value.name), value.dtype, None)],
        [onnx.numpy_helper.from_array(tensor.numpy(), name) for name, tensor in constants.items()],
    )
    opsets = [
        onnx.helper.make_opsetid(*item) for item in model.graph.opset_imports.items() if item[0] != "relay"
    ]
    proto = onnx.helper.make_model(graph, opset_imports=opsets, ir_version=model.ir_version)
    proto = to_float32(proto)  # of bfloat16; it is rounded once, at the end
    session = onnxruntime.InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"])
    feed = np.arange(max_positions, dtype=positions.dtype.numpy())[None]
    found = np.asarray(session.run(None, {_POSITION_IDS: feed})[0])
    return found if value.dtype is None else found.astype(value.dtype.numpy())


def _perm(node: ir.Node) -> tuple[int, ...]:
    return tuple(node.attributes["perm"].as_ints()) if "perm" in node.attributes else ()


def _width(value: ir.Value) -> int | None:
    if value.shape is None or not len(value.shape) or not isinstance(value.shape[-1], int):
        return None
    return value.shape[-1]


def _ints(value: ir.Value | None) -> list[int] | None:
    if value is None or not is_constant(value):
        return None
    tensor = ir.convenience.get_const_tensor(value)
    return None if tensor is None else [int(item) for item in tensor.numpy().reshape(-1)]
