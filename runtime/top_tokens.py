"""The ONNX graph that finds the likeliest tokens where the logits lie, so that only they leave the device."""

from __future__ import annotations

from collections.abc import Sequence

LOGITS, COUNT, VALUES, IDS, SUMS = "logits", "count", "values", "ids", "sums"
_FLOAT, _INT64, _INT = 1, 7, 2  # TensorProto.FLOAT, TensorProto.INT64, AttributeProto.INT
_IR_VERSION, _OPSET = 8, 17


def top_tokens_model() -> bytes:
    """logits [n, vocab] float32, count [1] int64 -> values [n, count] descending, ids [n, count], sums [n].

    The sum of a row is finite only if each of its logits is.
    The runtime does without the package onnx; the field numbers are those of onnx.proto.
    """
    graph = [
        _bytes(1, _node("TopK", [LOGITS, COUNT], [VALUES, IDS])),
        _bytes(1, _node("ReduceSum", [LOGITS, "axes"], [SUMS], keepdims=0)),
        _bytes(2, b"top_tokens"),
        _bytes(5, _int64s("axes", [1], [-1])),
        _bytes(11, _value(LOGITS, _FLOAT, ["rows", "vocabulary"])),
        _bytes(11, _value(COUNT, _INT64, [1])),
        _bytes(12, _value(VALUES, _FLOAT, ["rows", "count"])),
        _bytes(12, _value(IDS, _INT64, ["rows", "count"])),
        _bytes(12, _value(SUMS, _FLOAT, ["rows"])),
    ]
    opset = _bytes(1, b"") + _ints(2, [_OPSET])
    return _ints(1, [_IR_VERSION]) + _bytes(7, b"".join(graph)) + _bytes(8, opset)


def _node(op_type: str, inputs: Sequence[str], outputs: Sequence[str], **attributes: int) -> bytes:
    fields = [_bytes(1, name.encode()) for name in inputs] + [_bytes(2, name.encode()) for name in outputs]
    fields += [_bytes(3, outputs[0].encode()), _bytes(4, op_type.encode())]
    for name, value in attributes.items():
        fields.append(_bytes(5, _bytes(1, name.encode()) + _ints(3, [value]) + _ints(20, [_INT])))
    return b"".join(fields)


def _int64s(name: str, shape: Sequence[int], values: Sequence[int]) -> bytes:
    """A TensorProto."""
    return _ints(1, shape) + _ints(2, [_INT64]) + _ints(7, values) + _bytes(8, name.encode())


def _value(name: str, kind: int, shape: Sequence[int | str]) -> bytes:
    dims = [_ints(1, [size]) if isinstance(size, int) else _bytes(2, size.encode()) for size in shape]
    tensor = _ints(1, [kind]) + _bytes(2, b"".join(_bytes(1, dim) for dim in dims))
    return _bytes(1, name.encode()) + _bytes(2, _bytes(1, tensor))


def _bytes(field: int, content: bytes) -> bytes:
    """A protobuf field of strings or messages."""
    return _varint(field << 3 | 2) + _varint(len(content)) + content


def _ints(field: int, values: Sequence[int]) -> bytes:
    """A protobuf field of integers, one after the other."""
    return b"".join(_varint(field << 3) + _varint(value) for value in values)


def _varint(value: int) -> bytes:
    value &= (1 << 64) - 1  # negative ones in two's complement
    groups = []
    while value > 0x7F:
        groups.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*groups, value])
