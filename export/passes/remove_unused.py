"""What the attention used and nothing else does goes: masks, causal biases, their inputs."""

from __future__ import annotations

import onnx_ir as ir
import onnx_ir.passes.common as common

from relay_attention.errors import ExportError
from relay_attention.export.graph import describe
from relay_attention.export.passes.settle_interface import layer_names
from relay_attention.runtime.artifact import IoNames

_NAMES = IoNames()


class RemoveUnused(ir.passes.InPlacePass):
    """Removes nodes and initializers that lead to no output, then inputs and opsets without use.

    An input beyond the artifact's that something still reads is refused: the runtime could not feed it.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        modified = common.RemoveUnusedNodesPass()(model).modified
        expected = set(_inputs(model))
        for value in list(model.graph.inputs):
            if value.name in expected:
                continue
            if value.uses():
                readers = ", ".join(describe(node) for node in list(value.consumers())[:3])
                raise ExportError(
                    f"the graph still needs its input {value.name!r} after the rewrite, for {readers}: "
                    "what the "
                    "model does with it outside its attention is not supported"
                )
            model.graph.inputs.remove(value)
            modified = True
        modified |= common.RemoveUnusedOpsetsPass()(model).modified
        return ir.passes.PassResult(model, modified)

    def ensures(self, model: ir.Model) -> None:
        names = {value.name for value in model.graph.inputs}
        required = [_NAMES.input_ids, _NAMES.context_lens, _NAMES.query_lens]
        missing = [name for name in required if name not in names]
        if missing:
            raise ExportError(f"no attention was found in the graph (no use for {', '.join(missing)})")


def _inputs(model: ir.Model) -> list[str]:
    names = [_NAMES.input_ids, _NAMES.context_lens, _NAMES.query_lens]
    return names + layer_names(
        model, _NAMES.past_key, _NAMES.past_value, _NAMES.prefix_key, _NAMES.prefix_value
    )
