"""Questions that matchers and passes ask of a graph."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import onnx_ir as ir

from relay_attention.errors import ExportError


def describe(node: ir.Node) -> str:
    """How messages name a node."""
    domain = f"{node.domain}." if node.domain else ""
    return f"{domain}{node.op_type} node {node.name!r}"


def refuse(node: ir.Node, reason: str) -> ExportError:
    """The error for a node that cannot become RelayAttention."""
    return ExportError(f"cannot rewrite {describe(node)}: {reason}")


def input_of(node: ir.Node, index: int) -> ir.Value | None:
    """Input of a node, None where it is left out."""
    return node.inputs[index] if index < len(node.inputs) else None


def made_by(value: ir.Value | None, op_type: str) -> ir.Node | None:
    """The node that makes a value, if it is of that operator of the default domain."""
    node = value.producer() if value is not None else None
    return node if node is not None and node.op_type == op_type and not node.domain else None


def int_attribute(node: ir.Node, name: str, default: int = 0) -> int:
    attribute = node.attributes.get(name)
    return default if attribute is None else attribute.as_int()


def float_attribute(node: ir.Node, name: str, default: float = 0.0) -> float:
    attribute = node.attributes.get(name)
    return default if attribute is None else attribute.as_float()


def is_constant(value: ir.Value, known: dict[ir.Value, bool] | None = None) -> bool:
    """Whether a value depends on no graph input: an initializer, or arithmetic on initializers only."""
    known = {} if known is None else known
    pending = [value]
    while pending:
        current = pending[-1]
        node = current.producer()
        if current in known:
            pending.pop()
        elif node is None:
            known[current] = current.is_initializer() and not current.is_graph_input()
        else:
            inputs = [operand for operand in node.inputs if operand is not None]
            unknown = [operand for operand in inputs if operand not in known]
            if unknown:
                pending.extend(unknown)
            else:
                known[current] = all(known[operand] for operand in inputs)
    return known[value]


def last_dim(value: ir.Value) -> int | None:
    """Size of a value's last dimension, from its shape or from the weights of the projection that makes
    it."""
    if value.shape is not None and len(value.shape) and isinstance(value.shape[-1], int):
        return value.shape[-1]
    node = value.producer()
    if node is None:
        return None
    if node.op_type == "MatMul":
        return last_dim(node.inputs[1])
    if node.op_type == "MatMulNBits":
        return int_attribute(node, "N") or None
    if node.op_type in ("Add", "Cast", "Identity", "SimplifiedLayerNormalization"):
        return next((size for operand in node.inputs if (size := last_dim(operand)) and size > 1), None)
    return None


def find_nodes(model: ir.Model, predicate: Callable[[ir.Node], bool]) -> Iterable[ir.Node]:
    """Nodes of the main graph for which the predicate holds, in graph order; removing them meanwhile is
    allowed."""
    return [node for node in model.graph if predicate(node)]


def graph_input(model: ir.Model, name: str) -> ir.Value | None:
    return next((value for value in model.graph.inputs if value.name == name), None)


def graph_output(model: ir.Model, name: str) -> ir.Value | None:
    return next((value for value in model.graph.outputs if value.name == name), None)


def constant(model: ir.Model, name: str, tensor: ir.TensorProtocol) -> ir.Value:
    """An initializer of the main graph; the one of that name if there is one already."""
    existing = model.graph.initializers.get(name)
    if existing is not None:
        return existing
    value = ir.Value(
        name=name, shape=ir.Shape(tensor.shape), type=ir.TensorType(tensor.dtype), const_value=tensor
    )
    model.graph.register_initializer(value)
    return value


def add_input(model: ir.Model, name: str, dtype: ir.DataType, shape: list[int | str]) -> ir.Value:
    """A new input of the main graph; the one of that name if there is one already."""
    existing = graph_input(model, name)
    if existing is not None:
        return existing
    value = ir.Value(name=name, shape=ir.Shape(shape), type=ir.TensorType(dtype))
    model.graph.inputs.append(value)
    return value
