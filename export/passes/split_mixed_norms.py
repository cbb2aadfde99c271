"""RMS normalisation that ONNX Runtime would fuse into a node for which it has no kernel stays in pieces."""

from __future__ import annotations

import onnx_ir as ir

from relay_attention.export.graph import find_nodes, made_by


class SplitMixedNorms(ir.passes.InPlacePass):
    """Turns x / Sqrt(v) back into x * Reciprocal(Sqrt(v)) where input and scale would be of two types.

    For CUDA, ONNX Runtime's SimplifiedLayerNormFusion (core/optimizer/layer_norm_fusion.cc) takes the Cast in
    front of a norm, and one behind its quotient, into the node that it makes. Its kernels (contrib_ops/cuda/
    layer_norm.cc, 1.30.0) take float32 or bfloat16 for both input and scale, not one of each: a model that
    multiplies by its scale in float32 (Gemma, OLMo2) would be refused. What holds a reciprocal is not fused.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        found = [node for node in find_nodes(model, _is_norm) if _takes_cast(node) != _gives_to_cast(node)]
        for node in found:
            x, root = node.inputs
            reciprocal = ir.node("Reciprocal", [root], name=f"{node.outputs[0].name}/reciprocal")
            reciprocal.outputs[0].name = f"{node.outputs[0].name}/reciprocal"
            reciprocal.outputs[0].type, reciprocal.outputs[0].shape = root.type, root.shape
            product = ir.node("Mul", [x, reciprocal.outputs[0]], outputs=[ir.Value()], name=node.name)
            ir.convenience.replace_nodes_and_values(
                model.graph, node, [node], [reciprocal, product], list(node.outputs), list(product.outputs)
            )
        return ir.passes.PassResult(model, bool(found))


def _is_norm(node: ir.Node) -> bool:
    """Whether a node is x / Sqrt(v) in float32."""
    return (
        made_by(node.outputs[0], "Div") is not None
        and node.inputs[0].dtype == ir.DataType.FLOAT
        and made_by(node.inputs[1], "Sqrt") is not None
    )


def _takes_cast(node: ir.Node) -> bool:
    """Whether x is cast from bfloat16 for this norm alone: two uses, of all Casts of that value together."""
    cast = made_by(node.inputs[0], "Cast")
    if cast is None or cast.inputs[0].dtype != ir.DataType.BFLOAT16:
        return False
    casts = [user for user in cast.inputs[0].consumers() if user.op_type == "Cast"]
    wide = [each for each in casts if each.attributes["to"].as_int() == ir.DataType.FLOAT]
    return sum(len(list(each.outputs[0].uses())) for each in wide) == 2


def _gives_to_cast(node: ir.Node) -> bool:
    users = list(node.outputs[0].consumers())
    return (
        len(users) == 1
        and users[0].op_type == "Cast"
        and users[0].attributes["to"].as_int() == ir.DataType.BFLOAT16
    )
