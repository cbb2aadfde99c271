"""The last token of each row is gathered without anything from main memory."""

from __future__ import annotations

import onnx_ir as ir
from onnx_ir import tape

from relay_attention.export.graph import constant, find_nodes, last_dim
from relay_attention.export.passes.gather_last_token import LAST_TOKEN


class GatherOnDevice(ir.passes.InPlacePass):
    """Replaces the GatherND of `GatherLastToken` by GatherElements, where the width is known.

    ONNX Runtime's GatherND on CUDA copies a few numbers from main memory in every run, so that a run with it
    cannot be replayed as a CUDA graph. TensorRT has no such trouble and keeps the one node.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        found = [node for node in find_nodes(model, _is_gather) if last_dim(_input(node, 0))]
        for node in found:
            hidden, index = _input(node, 0), _input(node, 1)
            width = last_dim(hidden)
            assert width
            axis_1 = constant(model, "relay.axis_1", ir.tensor([1]))
            axis_2 = constant(model, "relay.axis_2", ir.tensor([2]))
            row = constant(model, f"relay.row_of_{width}", ir.tensor([1, 1, width]))
            record = tape.Tape()
            index = record.op("Unsqueeze", [index, axis_2], name=f"{node.name}/index")
            index = record.op("Expand", [index, row], name=f"{node.name}/indices")
            last = record.op("GatherElements", [hidden, index], {"axis": 1}, name=f"{node.name}/elements")
            last = record.op("Squeeze", [last, axis_1], name=node.name)
            old = node.outputs[0]
            last.type, last.shape = old.type, old.shape
            ir.convenience.replace_nodes_and_values(model.graph, node, [node], record.nodes, [old], [last])
        return ir.passes.PassResult(model, bool(found))


def _input(node: ir.Node, index: int) -> ir.Value:
    value = node.inputs[index]
    assert value is not None
    return value


def _is_gather(node: ir.Node) -> bool:
    return bool(node.op_type == "GatherND" and node.name == LAST_TOKEN)
