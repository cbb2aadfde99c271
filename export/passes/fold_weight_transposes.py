"""Weights that the graph transposes are stored transposed."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx_ir as ir

from relay_attention.export.graph import find_nodes


class FoldWeightTransposes(ir.passes.InPlacePass):
    """Replaces Transpose(weight) by a weight that is transposed while it is written, one at a time.

    A weight with other uses stays as it is: folding would store it twice (a language head tied to the
    embedding).
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        modified = False
        for node in find_nodes(model, _transposes_weight):
            weight = node.inputs[0]
            if node.graph is None or weight is None or weight.const_value is None:
                continue
            permutation = node.attributes["perm"].as_ints()
            users = weight.consumers()
            if any(
                not _transposes_weight(user) or _permutation(user) != tuple(permutation) for user in users
            ):
                continue
            tensor = weight.const_value
            folded = ir.Value(
                name=weight.name,
                shape=ir.Shape([tensor.shape[axis] for axis in permutation]),
                type=ir.TensorType(tensor.dtype),
            )
            folded.const_value = ir.LazyTensor(
                _transposed(tensor, permutation), tensor.dtype, folded.shape, name=weight.name
            )
            for user in users:
                user.outputs[0].replace_all_uses_with(folded)
                model.graph.remove(user, safe=True)
            del model.graph.initializers[weight.name]
            weight.const_value = None  # others may keep the value; its memory is the new one's
            model.graph.register_initializer(folded)
            modified = True
        return ir.passes.PassResult(model, modified)


def _transposes_weight(node: ir.Node) -> bool:
    if node.op_type != "Transpose" or node.domain or "perm" not in node.attributes:
        return False
    weight = node.inputs[0]
    return weight is not None and weight.is_initializer() and not node.outputs[0].is_graph_output()


def _permutation(node: ir.Node) -> tuple[int, ...]:
    return tuple(node.attributes["perm"].as_ints())


def _transposed(tensor: ir.TensorProtocol, permutation: tuple[int, ...]) -> Callable[[], ir.Tensor]:
    return lambda: ir.Tensor(
        np.ascontiguousarray(tensor.numpy().transpose(permutation)), dtype=tensor.dtype, name=tensor.name
    )
