"""Positions are computed in the graph, after the prefix and after what each row has cached."""

from __future__ import annotations

import onnx_ir as ir
from onnx_ir import tape

from relay_attention.errors import ExportError
from relay_attention.export.graph import constant, graph_input
from relay_attention.runtime.artifact import IoNames

_NAMES = IoNames()
_POSITION_IDS = "position_ids"


class ShiftPositions(ir.passes.InPlacePass):
    """Replaces the input position_ids by prefix length + context_lens + 0, 1, 2, ... of each row.

    Padding repeats the last valid token's position, so that no table is read past its end.
    """

    def requires(self, model: ir.Model) -> None:
        positions = graph_input(model, _POSITION_IDS)
        if positions is not None and positions.uses() and graph_input(model, _NAMES.context_lens) is None:
            raise ExportError("the graph takes position_ids, but has no attention that could be rewritten")

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        old = graph_input(model, _POSITION_IDS)
        if old is None:
            return ir.passes.PassResult(model, False)
        _use_shape_of_input_ids(model, old)
        if old.uses():
            if old.shape is not None and len(old.shape) != 2:
                raise ExportError(
                    f"position_ids has {len(old.shape)} dimensions, [batch, sequence] is expected"
                )
            record = tape.Tape()
            new = _positions(model, record)
            if old.dtype != ir.DataType.INT64:
                new = record.op("Cast", [new], {"to": old.dtype})
            first = model.graph[0]
            old.replace_all_uses_with(new)
            model.graph.insert_before(first, record.nodes)
        model.graph.inputs.remove(old)
        return ir.passes.PassResult(model, True)

    def ensures(self, model: ir.Model) -> None:
        if graph_input(model, _POSITION_IDS) is not None:
            raise ir.passes.PostconditionError("position_ids is still an input")


def _use_shape_of_input_ids(model: ir.Model, positions: ir.Value) -> None:
    """Whoever only wants batch and sequence gets them from input_ids, which has the same shape."""
    input_ids = graph_input(model, _NAMES.input_ids)
    if input_ids is None or input_ids.shape != positions.shape:
        return
    for node, index in tuple(positions.uses()):
        if node.op_type == "Shape" and not node.domain:
            node.replace_input_with(index, input_ids)


def _positions(model: ir.Model, record: tape.Tape) -> ir.Value:
    """int64 [batch, sequence]: absolute position of every token."""
    names = {
        name: graph_input(model, name) for name in (_NAMES.input_ids, _NAMES.context_lens, _NAMES.query_lens)
    }
    first_prefix = _NAMES.prefix_key.format(layer=0)
    prefix = model.graph.initializers.get(first_prefix) or graph_input(model, first_prefix)
    int64 = {"to": ir.DataType.INT64}
    zero = constant(model, "relay.zero", ir.tensor(0))
    one = constant(model, "relay.one", ir.tensor(1))
    column = constant(model, "relay.axis_1", ir.tensor([1]))

    prefix_length = record.op("Shape", [prefix], {"start": 1, "end": 2}, name="positions/prefix_length")
    sequence = record.op(
        "Shape", [names[_NAMES.input_ids]], {"start": 1, "end": 2}, name="positions/sequence"
    )
    sequence = record.op("Squeeze", [sequence], name="positions/sequence_length")
    steps = record.op("Range", [zero, sequence, one], name="positions/steps")
    context = record.op("Cast", [names[_NAMES.context_lens]], int64, name="positions/context")
    context = record.op("Unsqueeze", [context, column], name="positions/context_column")
    valid = record.op("Cast", [names[_NAMES.query_lens]], int64, name="positions/valid")
    last = record.op(
        "Max", [record.op("Sub", [valid, one], name="positions/last"), zero], name="positions/last_valid"
    )
    last = record.op("Unsqueeze", [last, column], name="positions/last_column")
    steps = record.op("Min", [steps, last], name="positions/step")
    start = record.op("Add", [context, prefix_length], name="positions/start")
    result = record.op("Add", [start, steps], name="positions/add")
    result.name = "positions"
    result.type = ir.TensorType(ir.DataType.INT64)
    result.shape = ir.Shape(["batch", "sequence"])
    return result
