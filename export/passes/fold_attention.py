"""Attention with caches of its own becomes one relay.AttentionForm node, which knows nothing of caches."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx_ir as ir
from onnx_ir import tape

from relay_attention.errors import ExportError
from relay_attention.export.core import Core, Description, Tokens, describe
from relay_attention.export.forms import decomposed, multi_head_attention, onnx_attention
from relay_attention.export.graph import constant, find_nodes, made_by, refuse
from relay_attention.export.passes.refuse_leftovers import refuse_attention
from relay_attention.export.probe import Probe, is_cache

# each finds the core around a node, or says that there is none
FORMS: list[Callable[[ir.Node, Probe], Core | None]] = [
    onnx_attention.find,
    multi_head_attention.find,
    decomposed.find,
]
_HEADS_FIRST = [0, 2, 1, 3]


class FoldAttention(ir.passes.InPlacePass):
    """Finds attention in every form of `FORMS`, proves what it computes, and puts relay.AttentionForm there.

    All outputs of the graph but the logits go, and with them the caches.
    """

    def __init__(self, max_positions: int):
        super().__init__()
        self.max_positions = max_positions

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        probe = make_probe(model, self.max_positions)
        described = []
        for node in model.graph:
            for find in FORMS:
                core = find(node, probe)
                if core is not None:
                    described.append(describe(core, probe))
                    break
            else:
                if node.op_type != "GroupQueryAttention":  # ReplaceAttention takes it as it is
                    refuse_attention(node)
        caches = [cache for each in described for cache in each.caches]
        for cache in caches:
            if caches.count(cache) > 1:
                raise ExportError(
                    f"several attentions read the same cache {cache.name!r}, which is not supported"
                )
        for each in described:
            _replace(model, each)
        return ir.passes.PassResult(model, bool(described))


def make_probe(model: ir.Model, max_positions: int) -> Probe:
    """A probe that knows which inputs hold lengths, by what they bound."""
    past, total, has_past = set(), set(), False
    for value in model.graph.inputs:
        has_past |= is_cache(value)
        for node, index in value.uses():
            if (node.op_type, index) == ("TensorScatter", 2):
                past.add(str(value.name))
            elif (node.op_type, index) == ("Attention", onnx_attention.NONPAD):
                total.add(str(value.name))
    both = past & total
    if both:
        node = next(node for node in find_nodes(model, lambda node: node.op_type == "TensorScatter"))
        raise refuse(node, f"input {both.pop()!r} is both where new keys are written and how many are valid")
    return Probe(model, sorted(past), sorted(total), has_past, max_positions)


def _replace(model: ir.Model, found: Description) -> None:
    core, record = found.core, tape.Tape()
    name = f"{core.node.name or core.node.op_type}"
    operands = [_flat(model, record, tokens) for tokens in (found.query, found.key, found.value)]
    if core.projection_bias is not None:
        operands = _add_bias(model, record, found, operands)
    folded = record.op(
        "AttentionForm",
        operands,
        {
            "num_heads": found.query.heads,
            "kv_num_heads": found.key.heads,
            "head_dim": found.query.head_dim,
            "scale": found.scale,
            "softcap": found.softcap,
            "local_window_size": found.local_window_size,
        },
        domain="relay",
        name=name,
    )
    folded.name = f"{name}.folded"
    folded.type, folded.shape = operands[0].type, operands[0].shape
    old = found.output
    target, result = old.value, folded
    if old.layout == "bhsd":
        users = list(target.consumers())
        turned = [user for user in users if user.op_type == "Transpose" and _perm(user) == _HEADS_FIRST]
        if len(turned) == len(users) and not target.is_graph_output():
            by_heads = _reshape(model, record, folded, [0, 0, old.heads, old.head_dim])
            for user in turned:
                user.outputs[0].replace_all_uses_with(by_heads)
            result = None
        else:
            by_heads = _reshape(model, record, folded, [0, 0, old.heads, old.head_dim])
            result = record.op("Transpose", [by_heads], {"perm": _HEADS_FIRST})
            _take_type(result, target)
    elif old.layout == "bshd":
        result = _reshape(model, record, folded, [0, 0, old.heads, old.head_dim])
    maker = target.producer()
    assert maker is not None
    if result is not None:
        target.replace_all_uses_with(result)
    model.graph.insert_after(maker, record.nodes)


def _flat(model: ir.Model, record: tape.Tape, tokens: Tokens) -> ir.Value:
    """[batch, sequence, heads * head_dim] of tokens in any layout."""
    value, width = tokens.value, tokens.heads * tokens.head_dim
    if tokens.layout == "bse":
        return value
    if tokens.layout == "bhsd":
        turn = made_by(value, "Transpose")
        if turn is not None and _perm(turn) == _HEADS_FIRST and turn.inputs[0] is not None:
            value = turn.inputs[0]
        else:
            heads_last = record.op("Transpose", [value], {"perm": _HEADS_FIRST})
            heads_last.type = value.type
            heads_last.shape = ir.Shape([*_rows(model), tokens.heads, tokens.head_dim])
            value = heads_last
    flat = _reshape(model, record, value, [0, 0, width])
    if value.type is None:
        flat.type = tokens.value.type
    return flat


def _add_bias(
    model: ir.Model, record: tape.Tape, found: Description, operands: list[ir.Value]
) -> list[ir.Value]:
    bias = found.core.projection_bias
    tensor = ir.convenience.get_const_tensor(bias) if bias is not None else None
    if tensor is None or bias is None:
        raise refuse(found.core.node, "its bias is not constant")
    sizes = [tokens.heads * tokens.head_dim for tokens in (found.query, found.key, found.value)]
    results = []
    pieces = np.split(tensor.numpy(), np.cumsum(sizes)[:2])
    for operand, piece, what in zip(operands, pieces, ("query", "key", "value"), strict=True):
        added = constant(model, f"{bias.name}.{what}", ir.tensor(np.ascontiguousarray(piece)))
        total = record.op("Add", [operand, added])
        total.type, total.shape = operand.type, operand.shape
        results.append(total)
    return results


def _reshape(model: ir.Model, record: tape.Tape, value: ir.Value, dims: list[int]) -> ir.Value:
    shape = constant(model, f"reshape.{'x'.join(map(str, dims))}", ir.tensor(dims))
    result = record.op("Reshape", [value, shape])
    result.type = value.type
    result.shape = ir.Shape([*_rows(model), *dims[2:]])
    return result


def _rows(model: ir.Model) -> list[int | str]:
    """The names of batch and sequence, as input_ids has them."""
    shape = next(value for value in model.graph.inputs if value.name == "input_ids").shape
    assert shape is not None
    return [dim if isinstance(dim, int) else str(dim.value) for dim in shape]


def _take_type(value: ir.Value, other: ir.Value) -> None:
    value.type, value.shape = other.type, other.shape


def _perm(node: ir.Node) -> list[int]:
    return list(node.attributes["perm"].as_ints()) if "perm" in node.attributes else []
