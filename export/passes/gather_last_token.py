"""The language head runs on the last valid token of each row only."""

from __future__ import annotations

import onnx_ir as ir
from onnx_ir import tape

from relay_attention.errors import ExportError
from relay_attention.export.graph import constant, graph_input, graph_output, is_constant
from relay_attention.runtime.artifact import IoNames

LAST_TOKEN = "last_token/gather"  # name of the node
_NAMES = IoNames()
_ELEMENTWISE = {"Add", "Cast", "Div", "Identity", "Mul", "Sub", "Tanh"}
_PROJECTIONS = {"MatMul", "MatMulNBits"}


class GatherLastToken(ir.passes.InPlacePass):
    """Gathers the last valid token as far before the logits as every operation works token by token.

    That is in front of the language head, through casts, scaling, softcap and bias; where something else is
    in the way, behind it. The logits become [batch, vocab].
    """

    def requires(self, model: ir.Model) -> None:
        if graph_output(model, _NAMES.logits) is None:
            outputs = ", ".join(str(value.name) for value in model.graph.outputs)
            raise ExportError(f"the graph has no output {_NAMES.logits!r}, only: {outputs}")
        if graph_input(model, _NAMES.query_lens) is None:
            raise ExportError("the graph has no attention that could be rewritten")

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        logits = graph_output(model, _NAMES.logits)
        assert logits is not None
        chain = _token_wise_chain(logits)
        hidden = chain[-1].inputs[_data_input(chain[-1])] if chain else logits
        assert hidden is not None
        if hidden.shape is not None and len(hidden.shape) != 3:
            raise ExportError(
                f"{hidden.name!r}, from which the logits are made, has {len(hidden.shape)} dimensions, "
                "[batch, sequence, hidden] is expected"
            )
        record = tape.Tape()
        last = _gather(model, record, hidden)
        if chain:
            model.graph.insert_before(chain[-1], record.nodes)
            chain[-1].replace_input_with(_data_input(chain[-1]), last)
            for node in chain:
                _drop_sequence(node.outputs[0])
            _use_tied_weight(model, chain[-1])
        else:
            model.graph.extend(record.nodes)
            model.graph.outputs[model.graph.outputs.index(logits)] = last
            logits.name, last.name = f"{logits.name}.every_token", logits.name
        return ir.passes.PassResult(model, True)

    def ensures(self, model: ir.Model) -> None:
        logits = graph_output(model, _NAMES.logits)
        if logits is None or (logits.shape is not None and len(logits.shape) != 2):
            raise ir.passes.PostconditionError("the logits are not [batch, vocab]")


def _token_wise_chain(logits: ir.Value) -> list[ir.Node]:
    """Nodes from the logits back to the language head (the last one), each used by nothing else."""
    chain: list[ir.Node] = []
    value = logits
    while (node := value.producer()) is not None and len(value.consumers()) == (value is not logits):
        index = _data_input(node)
        if index < 0:
            break
        chain.append(node)
        if node.op_type in _PROJECTIONS:
            return chain
        data = node.inputs[index]
        assert data is not None
        value = data
    return []


def _data_input(node: ir.Node) -> int:
    """Which input of a token-wise node is the activation; -1 if the node is not token-wise."""
    if node.op_type not in _ELEMENTWISE | _PROJECTIONS:
        return -1
    data = [i for i, operand in enumerate(node.inputs) if operand is not None and not is_constant(operand)]
    if len(data) != 1 or (node.op_type in _PROJECTIONS and data[0] != 0):
        return -1
    if node.op_type in _ELEMENTWISE and not all(
        _has_no_sequence(operand) for operand in node.inputs if operand is not None and is_constant(operand)
    ):
        return -1
    return data[0]


def _has_no_sequence(value: ir.Value) -> bool:
    """Whether a constant may be broadcast over any number of tokens."""
    return value.shape is not None and all(size == 1 for size in value.shape[:-1])


def _gather(model: ir.Model, record: tape.Tape, hidden: ir.Value) -> ir.Value:
    """[batch, sequence, width] -> [batch, width] at max(query_lens - 1, 0)."""
    query_lens = graph_input(model, _NAMES.query_lens)
    zero = constant(model, "relay.zero", ir.tensor(0))
    one = constant(model, "relay.one", ir.tensor(1))
    column = constant(model, "relay.axis_1", ir.tensor([1]))
    length = record.op("Cast", [query_lens], {"to": ir.DataType.INT64}, name="last_token/query_lens")
    index = record.op("Sub", [length, one], name="last_token/index")
    index = record.op("Max", [index, zero], name="last_token/index_or_0")
    index = record.op("Unsqueeze", [index, column], name="last_token/index_column")
    last = record.op("GatherND", [hidden, index], {"batch_dims": 1}, name=LAST_TOKEN)
    last.name = "last_token"
    last.type = hidden.type
    if hidden.shape is not None:
        last.shape = ir.Shape([hidden.shape[0], hidden.shape[2]])
    return last


def _drop_sequence(value: ir.Value) -> None:
    if value.shape is not None and len(value.shape) == 3:
        value.shape = ir.Shape([value.shape[0], value.shape[2]])


def _use_tied_weight(model: ir.Model, head: ir.Node) -> None:
    """Language head tied to the embedding: x @ transpose(weight) becomes Gemm, which needs no second copy."""
    weight = head.inputs[1]
    transpose = weight.producer() if weight is not None else None
    if head.op_type != "MatMul" or transpose is None or transpose.op_type != "Transpose":
        return
    source = transpose.inputs[0]
    if source is None or not source.is_initializer() or source.shape is None or len(source.shape) != 2:
        return
    gemm = ir.node("Gemm", [head.inputs[0], source], {"transB": 1}, outputs=[ir.Value()], name=head.name)
    output = head.outputs[0]
    ir.convenience.replace_nodes_and_values(model.graph, head, [head], [gemm], [output], [gemm.outputs[0]])
