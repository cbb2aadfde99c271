"""Attention written out: product, scale, softcap, mask, Softmax, product, as torch and optimum emit it.

Found from its Softmax. What lies between the scores and the Softmax is not matched but run: with scores of 0
it gives the mask, wherever and however that is applied.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from relay_attention.export.core import Core
from relay_attention.export.graph import float_attribute, int_attribute, refuse
from relay_attention.export.probe import Array, Probe, ProbeError, Setting, fed_dtype

_PRODUCTS = {"MatMul", "FusedMatMul", "Einsum"}
_TO_SOFTMAX = {
    "Add", "Cast", "Clip", "Concat", "Div", "Identity", "Max", "Min", "Mul", "Reshape", "Sub", "Tanh",
    "Where",
}  # fmt: skip
_FROM_SOFTMAX = {"Cast", "Dropout", "Identity", "Reshape", "Slice", "Where"}
_DEPTH = 16  # nodes between a product and its Softmax


@dataclass
class _Path:
    """scores: the product's output. nodes: from behind it to the Softmax, which is not in it."""

    product: ir.Node
    nodes: list[ir.Node]
    values: list[ir.Value]  # of `nodes`, which of their inputs the scores are


def find(node: ir.Node, probe: Probe) -> Core | None:
    """The core around a Softmax; None for other nodes, and for a Softmax that is no attention's.

    Raises: ExportError naming the node for an attention that RelayAttention cannot compute.
    """
    if node.domain or node.op_type != "Softmax":
        return None
    path = _path_to_product(node, probe)
    if path is None:
        return None
    for step in path.nodes:
        if step.op_type == "Concat":
            raise refuse(
                node,
                f"its scores get further columns (Concat node {step.name!r}) before the Softmax: "
                "attention sinks, "
                "which RelayAttention has not",
            )
    axis, scores = int_attribute(node, "axis", -1), path.product.outputs[0]
    rank = len(shape) if (shape := probe.axes(scores)) is not None else 0
    if axis not in (-1, rank - 1):
        raise refuse(node, f"it is over axis {axis} of scores of {rank} dimensions, not over the keys")
    second = _second_product(node)
    if second is None:
        raise refuse(
            node,
            f"it is attention written out (scores from {path.product.name!r}), but its probabilities "
            "do not go "
            "into one product with the values",
        )
    product, probabilities = second
    scale, softcap = _scale(node, path, probe)
    return Core(
        node=node,
        query=path.product.inputs[0],
        key=path.product.inputs[1],
        value=product.inputs[1] if product.inputs[0] is probabilities else product.inputs[0],
        output=product.outputs[0],
        bias=lambda probe, setting: _bias(node, scores, probe, setting),
        scale=scale,
        softcap=softcap,
    )


def _path_to_product(softmax: ir.Node, probe: Probe) -> _Path | None:
    """The way from the product of two activations to a Softmax, shortest first."""
    start = softmax.inputs[0]
    pending: list[tuple[ir.Value | None, list[ir.Node], list[ir.Value]]] = [(start, [], [])]
    seen: set[ir.Node] = set()
    while pending:
        value, nodes, values = pending.pop(0)
        node = value.producer() if value is not None else None
        if node is None or value is None or node in seen or len(nodes) > _DEPTH:
            continue
        seen.add(node)
        if node.op_type in _PRODUCTS:
            if len(node.inputs) == 2 and all(_is_activation(operand) for operand in node.inputs):
                return _Path(node, nodes, [*values, value])
        elif node.op_type in _TO_SOFTMAX:
            for operand in node.inputs:
                pending.append((operand, [node, *nodes], [value, *values]))
    return None


def _is_activation(value: ir.Value | None) -> bool:
    """Whether a value depends on the token ids' embeddings or on caches: on more than constants."""
    pending, seen = [value], set()
    while pending:
        current = pending.pop()
        if current is None or current in seen:
            continue
        seen.add(current)
        node = current.producer()
        if node is None:
            if current.is_graph_input():
                return True
        elif node.op_type not in ("Shape", "Size"):
            pending.extend(node.inputs)
    return False


def _second_product(softmax: ir.Node) -> tuple[ir.Node, ir.Value] | None:
    """The product of the probabilities and the values, and the former as it takes them."""
    pending, products = [softmax.outputs[0]], list[tuple[ir.Node, ir.Value]]()
    while pending:
        value = pending.pop()
        for node in value.consumers():
            if node.op_type in _PRODUCTS and not any(node is product for product, _ in products):
                products.append((node, value))
            elif node.op_type in _FROM_SOFTMAX:
                pending.append(node.outputs[0])
    return products[0] if len(products) == 1 else None


def _scale(softmax: ir.Node, path: _Path, probe: Probe) -> tuple[float, float]:
    """Factor of the scores, and softcap (0 for none), from the scalars on the way to the Softmax."""
    before, after, capped = 1.0, 1.0, False
    if path.product.op_type == "FusedMatMul":
        before = float_attribute(path.product, "alpha", 1.0)
    for node in path.nodes:
        if node.op_type == "Tanh":
            if capped:
                raise refuse(softmax, f"its scores pass two Tanh (the second is {node.name!r})")
            capped = True
        elif node.op_type in ("Mul", "Div"):
            scalars = [probe.scalar(operand) for operand in node.inputs]
            known = [scalar for scalar in scalars if scalar is not None]
            if len(known) != 1 or (node.op_type == "Div" and scalars[1] is None) or known[0] == 0:
                raise refuse(
                    softmax,
                    f"its scores are multiplied by something that is no constant, in node {node.name!r}",
                )
            factor = known[0] if node.op_type == "Mul" else 1.0 / known[0]
            if capped:
                after *= factor
            else:
                before *= factor
    return (before * after, after) if capped else (before, 0.0)


def _bias(softmax: ir.Node, scores: ir.Value, probe: Probe, setting: Setting) -> Array:
    """What reaches the Softmax where all scores are 0."""
    shape = probe.shape(scores, setting)
    if shape is None:
        raise ProbeError(f"the shape of the scores {scores.name!r} is not known")
    dtype = fed_dtype(scores)
    if softmax.inputs[0] is scores:
        return np.zeros(shape, dtype)
    return probe.evaluate([softmax.inputs[0]], setting, {scores: np.zeros(shape, dtype)})[0]
