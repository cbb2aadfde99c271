"""The last gate: nothing may be left that mixes tokens outside RelayAttention."""

from __future__ import annotations

import onnx_ir as ir

from relay_attention.export.graph import is_constant, refuse

_ATTENTION = {
    "Attention": "it projects the query, key and value itself, with weights packed into one",
    "DecoderMaskedMultiHeadAttention": "it decodes one token at a time from a buffer of its own",
    "DecoderMaskedSelfAttention": "it decodes one token at a time from a buffer of its own",
    "FlexAttention": "its scores pass functions of their own",
    "GroupQueryAttention": "",
    "LongformerAttention": "its mask is not causal with a fixed window",
    "MultiHeadAttention": "",
    "PackedAttention": "it batches prompts in a way of its own",
    "PackedMultiHeadAttention": "it batches prompts in a way of its own",
    "PagedAttention": "its KV cache lies in blocks (build the model without use_paged_attention)",
    "QAttention": "it is quantised, and projects the query, key and value itself",
    "QOrderedAttention": "it is quantised, and projects the query, key and value itself",
    "SparseAttention": "its mask is not causal with a fixed window",
}
# operators that carry a state along the sequence, for which the artifact has no cache
_RECURRENT = {
    "CausalConvWithState",
    "Conv",
    "ConvTranspose",
    "CumSum",
    "GRU",
    "GatedDeltaNet",
    "LSTM",
    "LinearAttention",
    "RNN",
    "Scan",
    "SelectiveScan",
}
_CONTROL_FLOW = {"If", "Loop"}
_BETWEEN_SCORES_AND_SOFTMAX = {
    "Add", "Cast", "Div", "Identity", "Max", "Min", "Mul", "Reshape", "Sub", "Tanh", "Transpose", "Where",
    "Expand", "Unsqueeze", "Squeeze", "Concat", "Slice",
}  # fmt: skip
_PRODUCTS = {"Einsum", "FusedMatMul", "Gemm", "MatMul"}


class RefuseLeftovers(ir.passes.InPlacePass):
    """Refuses a graph in which attention, or anything else that needs a state of its own, was not
    rewritten."""

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        known: dict[ir.Value, bool] = {}
        for node in model.graph:
            refuse_attention(node)
            if node.op_type == "Softmax" and (product := _scores(node, known)) is not None:
                raise refuse(
                    node,
                    f"it is attention written out (scores from {product.name!r}), which no matcher knows",
                )
            if all(value is None or is_constant(value, known) for value in node.inputs):
                continue
            if node.op_type in _RECURRENT:
                raise refuse(node, "it carries a state from token to token, which the artifact cannot cache")
            if node.op_type in _CONTROL_FLOW:
                raise refuse(node, "control flow is not supported")
        return ir.passes.PassResult(model, False)


def refuse_attention(node: ir.Node) -> None:
    """Raises ExportError for an operator that is attention as a whole."""
    reason = _ATTENTION.get(node.op_type)
    if reason is not None:
        raise refuse(node, ": ".join(["no matcher knows this form of attention", *[reason][: bool(reason)]]))


def _scores(softmax: ir.Node, known: dict[ir.Value, bool]) -> ir.Node | None:
    """The product of two activations whose result a Softmax takes, if there is one."""
    pending, seen = [softmax.inputs[0]], set()
    while pending:
        value = pending.pop()
        node = value.producer() if value is not None else None
        if node is None or node in seen:
            continue
        seen.add(node)
        operands = [operand for operand in node.inputs if operand is not None]
        if node.op_type in _PRODUCTS:
            if sum(not is_constant(operand, known) for operand in operands) > 1:
                return node
        elif node.op_type in _BETWEEN_SCORES_AND_SOFTMAX:
            pending.extend(operands)
    return None
