"""Positions and sizes that a graph works out from its masks and caches come from input_ids and
position_ids."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import onnx_ir.passes.common as common
from onnx_ir import tape

from relay_attention.errors import ExportError
from relay_attention.export.graph import add_input, constant, describe, graph_input
from relay_attention.export.probe import INPUT_IDS, POSITION_IDS, Array, Probe, ProbeError, Setting

_INTEGERS = {ir.DataType.INT64, ir.DataType.INT32}
_KEPT = {INPUT_IDS, POSITION_IDS}
_SMALL = 8  # elements of a shape
_SIZES = ((2, 5, 7), (3, 11, 13))


class SettleSizes(ir.passes.InPlacePass):
    """Finds what is left of inputs that go (attention_mask, caches, lengths), and what it stands for.

    A value [batch or 1, sequence] that is past + 0, 1, 2, ... at every setting tried is position_ids; a
    number that is the batch, the sequence or always the same is taken from input_ids, or constant. Then the
    inputs go.
    Raises: ExportError naming the node that reads anything else.
    """

    def __init__(self, probe: Probe):
        super().__init__()
        self.probe = probe

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        going = [value for value in model.graph.inputs if value.name not in _KEPT]
        self._positions(model)
        self._numbers(model)
        common.RemoveUnusedNodesPass()(model)
        if any(node.op_type == "GroupQueryAttention" for node in model.graph):
            # it reads them until ReplaceAttention has been; what is left then is refused by RemoveUnused
            return ir.passes.PassResult(model, True)
        for value in going:
            if value.uses():
                readers = ", ".join(describe(node) for node in list(value.consumers())[:3])
                raise ExportError(
                    f"the graph still needs its input {value.name!r} outside its attention, for "
                    f"{readers}: what "
                    "is computed from it is neither positions nor a size of the batch"
                )
            model.graph.inputs.remove(value)
        return ir.passes.PassResult(model, True)

    def _positions(self, model: ir.Model) -> None:
        offsets, ranks = {}, {}
        for value, arrays in self._evaluate(model).items():
            offset = self._offset(arrays)
            if offset is not None:
                offsets[value], ranks[value] = offset, arrays[0][1].ndim
        made: dict[int, ir.Value] = {}
        for value, offset in offsets.items():
            for node, index in tuple(value.uses()):
                if any(output in offsets for output in node.outputs):
                    continue
                if ranks[value] == 1 and (node.op_type, index) != ("Gather", 1):
                    continue  # a row for all of the batch, where each row is to have its own
                if offset not in made:
                    made[offset] = self._position_ids(model, offset)
                new = made[offset]
                if value.dtype != ir.DataType.INT64:
                    cast = ir.node("Cast", [new], {"to": value.dtype})
                    cast.outputs[0].type = value.type
                    model.graph.insert_before(node, cast)
                    new = cast.outputs[0]
                node.replace_input_with(index, new)

    def _position_ids(self, model: ir.Model, offset: int) -> ir.Value:
        input_ids = graph_input(model, INPUT_IDS)
        assert input_ids is not None
        assert input_ids.shape is not None
        dims = [dim if isinstance(dim, int) else str(dim.value) for dim in input_ids.shape]
        positions = add_input(model, POSITION_IDS, ir.DataType.INT64, dims)
        if positions.dtype != ir.DataType.INT64:
            raise ExportError(f"position_ids is of type {positions.dtype}, INT64 is expected")
        if not offset:
            return positions
        by = constant(model, f"positions.offset.{offset}", ir.tensor(offset))
        add = ir.node("Add", [positions, by], name=f"positions/offset_{offset}")
        add.outputs[0].type, add.outputs[0].shape = positions.type, positions.shape
        model.graph.insert_before(model.graph[0], add)
        return add.outputs[0]

    def _offset(self, arrays: list[tuple[Setting, Array]]) -> int | None:
        """c where the arrays are positions + c, None where they are not."""
        offsets = set()
        for setting, array in arrays:
            if array.ndim not in (1, 2) or array.shape[-1] != setting.sequence:
                return None
            if array.ndim == 2 and array.shape[0] not in (1, setting.batch):
                return None
            apart = array - np.arange(setting.past, setting.total)
            offsets |= set(np.unique(apart).tolist())
        return int(offsets.pop()) if len(offsets) == 1 else None

    def _numbers(self, model: ir.Model) -> None:
        record = tape.Tape()
        input_ids = graph_input(model, INPUT_IDS)
        assert input_ids is not None
        replaced: dict[ir.Value, ir.Value] = {}
        for value, arrays in self._evaluate(model).items():
            if any(array.size != 1 for _, array in arrays):
                continue
            found = [int(array.reshape(-1)[0]) for _, array in arrays]
            rank = arrays[0][1].ndim
            if rank > 1:
                continue
            if found == [setting.batch for setting, _ in arrays]:
                new = _size(model, record, input_ids, 0, rank)
            elif found == [setting.sequence for setting, _ in arrays]:
                new = _size(model, record, input_ids, 1, rank)
            elif len(set(found)) == 1:
                number = np.array(found[0] if rank == 0 else [found[0]], np.int64)
                new = constant(model, f"number.{found[0]}.{rank}", ir.tensor(number))
            else:
                continue
            if value.dtype != ir.DataType.INT64:
                new = record.op("Cast", [new], {"to": value.dtype})
                new.type = value.type
            replaced[value] = new
        for value, new in replaced.items():
            value.replace_all_uses_with(new)
        if record.nodes:
            model.graph.insert_before(model.graph[0], record.nodes)

    def _evaluate(self, model: ir.Model) -> dict[ir.Value, list[tuple[Setting, Array]]]:
        """Integers that depend on inputs which go, at every setting, in graph order."""
        common.RemoveUnusedNodesPass()(model)
        probe = self.probe.anew()
        # without a past, positions may be counted from the size of input_ids alone
        kept = _KEPT if probe.has_past else {POSITION_IDS}
        dirty = {value for value in model.graph.inputs if value.name not in kept}
        targets = []
        for node in model.graph:
            if any(operand in dirty for operand in node.inputs):
                dirty.update(node.outputs)
                targets += [
                    output
                    for output in node.outputs
                    if output.dtype in _INTEGERS and output not in probe.activations
                ]
        return _at_settings(probe, targets)


class StateShapes(ir.passes.InPlacePass):
    """Writes down what is known of shapes: constants in place of arithmetic, dimensions of activations.

    Exporters that trace leave shapes out, and compute them while running; later passes look for constants.
    """

    def __init__(self, probe: Probe):
        super().__init__()
        self.probe = probe

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        probe = self.probe.anew()
        targets = [
            output
            for node in model.graph
            for output in node.outputs
            if output.dtype in _INTEGERS and output not in probe.activations and node.op_type != "Constant"
        ]
        for value, arrays in _at_settings(probe, targets).items():
            first = arrays[0][1]
            if first.size <= _SMALL and all(np.array_equal(first, array) for _, array in arrays):
                new = constant(model, f"{value.name}.constant", ir.tensor(first))
                value.replace_all_uses_with(new)
        common.RemoveUnusedNodesPass()(model)
        probe = probe.anew()
        input_ids = graph_input(model, INPUT_IDS)
        assert input_ids is not None
        assert input_ids.shape is not None
        names = dict(zip("BS", input_ids.shape, strict=True))
        for node in model.graph:
            for output in node.outputs:
                axes = probe.axes(output)
                if axes is not None:
                    dims = [axis if isinstance(axis, int) else names.get(axis) for axis in axes]
                    output.shape = ir.Shape(dims)
        return ir.passes.PassResult(model, True)


def _at_settings(probe: Probe, targets: list[ir.Value]) -> dict[ir.Value, list[tuple[Setting, Array]]]:
    """Values at every setting; those that cannot be evaluated are left out."""
    # the longest too: what is cut off at some length is no constant
    settings = [probe.setting(*sizes) for sizes in (*_SIZES, (1, 1, probe.longest - 1))]
    if not targets:
        return {}
    try:
        rows = [probe.evaluate(targets, setting) for setting in settings]
        return {
            target: [(setting, row[place]) for setting, row in zip(settings, rows, strict=True)]
            for place, target in enumerate(targets)
        }
    except ProbeError:
        pass
    results: dict[ir.Value, list[tuple[Setting, Array]]] = {}
    for target in targets:
        try:
            results[target] = [(setting, probe.evaluate([target], setting)[0]) for setting in settings]
        except ProbeError:
            continue
    return results


def _size(model: ir.Model, record: tape.Tape, input_ids: ir.Value, axis: int, rank: int) -> ir.Value:
    size = record.op("Shape", [input_ids], {"start": axis, "end": axis + 1})
    size.type, size.shape = ir.TensorType(ir.DataType.INT64), ir.Shape([1])
    if rank == 0:
        size = record.op("Squeeze", [size])
        size.type, size.shape = ir.TensorType(ir.DataType.INT64), ir.Shape([])
    return size
