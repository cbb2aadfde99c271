"""RMS normalisation in the form that engines recognise."""

from __future__ import annotations

import onnx_ir as ir

from relay_attention.export.graph import find_nodes, made_by


class DivideByRoot(ir.passes.InPlacePass):
    """Turns x * Reciprocal(Sqrt(v)) into x / Sqrt(v).

    torch traces rsqrt as the former; ONNX Runtime fuses only the latter into one normalisation node.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        modified = False
        for node in find_nodes(model, lambda node: made_by(node.outputs[0], "Mul") is not None):
            for x, factor in (tuple(node.inputs), tuple(reversed(node.inputs))):
                reciprocal = made_by(factor, "Reciprocal")
                if reciprocal is None or made_by(reciprocal.inputs[0], "Sqrt") is None:
                    continue
                divide = ir.node("Div", [x, reciprocal.inputs[0]], outputs=[ir.Value()], name=node.name)
                ir.convenience.replace_nodes_and_values(
                    model.graph, node, [node], [divide], list(node.outputs), list(divide.outputs)
                )
                modified = True
                break
        return ir.passes.PassResult(model, modified)
