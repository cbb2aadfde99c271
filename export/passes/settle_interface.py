"""Names, types and order of the graph's inputs and outputs become those of the artifact."""

from __future__ import annotations

import onnx_ir as ir

from relay_attention.errors import ExportError
from relay_attention.export.graph import find_nodes, graph_input, graph_output
from relay_attention.export.passes.replace_attention import is_relay_attention
from relay_attention.runtime.artifact import IoNames

_NAMES = IoNames()


class SettleInterface(ir.passes.InPlacePass):
    """input_ids becomes int32, the logits float32, dimensions get their names, outputs other than the
    contract's go.

    Inputs: input_ids, context_lens, query_lens, the caches, then the prefix if it is an input.
    Outputs: logits, then the caches.
    """

    def requires(self, model: ir.Model) -> None:
        if graph_input(model, _NAMES.input_ids) is None:
            inputs = ", ".join(str(value.name) for value in model.graph.inputs)
            raise ExportError(f"the graph has no input {_NAMES.input_ids!r}, only: {inputs}")
        if graph_output(model, _NAMES.logits) is None:
            outputs = ", ".join(str(value.name) for value in model.graph.outputs)
            raise ExportError(f"the graph has no output {_NAMES.logits!r}, only: {outputs}")

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        _rename_dims(model)
        _narrow_input_ids(model)
        _widen_logits(model)
        _order(model)
        return ir.passes.PassResult(model, True)


def layer_names(model: ir.Model, *patterns: str) -> list[str]:
    """The names that patterns like "present.{layer}.key" stand for, layer by layer."""
    layers = len(list(find_nodes(model, is_relay_attention)))
    return [pattern.format(layer=layer) for layer in range(layers) for pattern in patterns]


def _rename_dims(model: ir.Model) -> None:
    input_ids = graph_input(model, _NAMES.input_ids)
    assert input_ids is not None
    if input_ids.shape is None or len(input_ids.shape) != 2:
        raise ExportError(f"{_NAMES.input_ids} is of shape {input_ids.shape}, [batch, sequence] is expected")
    for dim, axis in zip(input_ids.shape, ("batch", "sequence"), strict=True):
        if isinstance(dim, int):
            raise ExportError(
                f"{_NAMES.input_ids} is of fixed shape {input_ids.shape}: export the model with a dynamic "
                f"{axis} size"
            )
    names = {str(dim): axis for dim, axis in zip(input_ids.shape, ("batch", "sequence"), strict=True)}
    values = {*model.graph.inputs, *(output for node in model.graph for output in node.outputs)}
    for value in values:
        if value.shape is not None:
            value.shape = ir.Shape(
                [dim if isinstance(dim, int) else names.get(str(dim), dim) for dim in value.shape]
            )


def _narrow_input_ids(model: ir.Model) -> None:
    """Gather takes int32 indices as they are; whatever else reads the token ids gets them cast back."""
    input_ids = graph_input(model, _NAMES.input_ids)
    assert input_ids is not None
    dtype = input_ids.dtype
    input_ids.type = ir.TensorType(ir.DataType.INT32)
    if dtype == ir.DataType.INT32:
        return
    others = [
        (node, index)
        for node, index in input_ids.uses()
        if (node.op_type, index) not in (("Gather", 1), ("Shape", 0))
    ]
    if others:
        cast = ir.node("Cast", [input_ids], {"to": dtype}, name="input_ids/cast")
        cast.outputs[0].name, cast.outputs[0].type = "input_ids.wide", ir.TensorType(dtype)
        cast.outputs[0].shape = input_ids.shape
        model.graph.insert_before(model.graph[0], cast)
        for node, index in others:
            node.replace_input_with(index, cast.outputs[0])


def _widen_logits(model: ir.Model) -> None:
    logits = graph_output(model, _NAMES.logits)
    assert logits is not None
    if logits.dtype == ir.DataType.FLOAT:
        return
    wide = ir.Value(name=logits.name, shape=logits.shape, type=ir.TensorType(ir.DataType.FLOAT))
    logits.name = f"{logits.name}.{str(logits.dtype).lower()}"
    model.graph.append(
        ir.node("Cast", [logits], {"to": ir.DataType.FLOAT}, outputs=[wide], name="logits/cast")
    )
    model.graph.outputs[model.graph.outputs.index(logits)] = wide


def _order(model: ir.Model) -> None:
    graph = model.graph
    inputs = [_NAMES.input_ids, _NAMES.context_lens, _NAMES.query_lens]
    inputs += layer_names(model, _NAMES.past_key, _NAMES.past_value)
    inputs += layer_names(model, _NAMES.prefix_key, _NAMES.prefix_value)
    rank = {name: place for place, name in enumerate(inputs)}
    ordered = sorted(graph.inputs, key=lambda value: rank.get(value.name or "", len(rank)))
    graph.inputs.clear()
    graph.inputs.extend(ordered)
    outputs = [_NAMES.logits, *layer_names(model, _NAMES.present_key, _NAMES.present_value)]
    found = {value.name: value for value in graph.outputs}
    graph.outputs.clear()
    graph.outputs.extend(found[name] for name in outputs if name in found)
