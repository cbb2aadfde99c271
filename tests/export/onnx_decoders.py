"""Decoders written node by node with onnx.helper: two layers, learned positions, caches, any form of
attention."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
from onnx import TensorProto, helper, numpy_helper

VOCAB, WIDTH, HEADS, KV_HEADS, HEAD_DIM, LAYERS, POSITIONS = 384, 64, 4, 2, 16, 2, 512
CAPACITY = 256  # of a static cache
EMPTY = ""


class Builder:
    """Nodes, weights and inputs of a graph; every method gives the name of a value."""

    def __init__(self, opset: int = 18, kv_heads: int = KV_HEADS, seed: int = 0):
        self.opset, self.kv_heads = opset, kv_heads
        self.nodes: list[onnx.NodeProto] = []
        self.inputs: list[onnx.ValueInfoProto] = []
        self.outputs: list[onnx.ValueInfoProto] = []
        self.weights: list[onnx.TensorProto] = []
        self.generator = np.random.default_rng(seed)

    def op(self, kind: str, *inputs: str, outputs: int = 1, domain: str = "", **attributes: Any) -> Any:
        names = [f"{kind}_{len(self.nodes)}" + (f".{i}" if i else "") for i in range(outputs)]
        node = helper.make_node(kind, list(inputs), names, name=f"/{names[0]}", domain=domain, **attributes)
        self.nodes.append(node)
        return names[0] if outputs == 1 else names

    def tensor(self, value: Any, dtype: Any = np.int64) -> str:
        array = np.asarray(value, dtype)
        name = f"tensor_{len(self.weights)}"
        self.weights.append(numpy_helper.from_array(array, name))
        return name

    def weight(self, *shape: int) -> str:
        return self.tensor(self.generator.standard_normal(shape) * 0.2, np.float32)

    def input(self, name: str, dtype: int, *shape: int | str) -> str:
        self.inputs.append(helper.make_tensor_value_info(name, dtype, list(shape)))
        return name

    def output(self, value: str, name: str, *shape: int | str) -> None:
        self.nodes.append(helper.make_node("Identity", [value], [name], name=f"/{name}"))
        self.outputs.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, list(shape)))

    def size(self, value: str, axis: int) -> str:
        """int64 [1]"""
        return self.op("Shape", value, start=axis, end=axis + 1)

    def by_heads(self, value: str, heads: int) -> str:
        shape = self.tensor([0, 0, heads, HEAD_DIM])
        return self.op("Transpose", self.op("Reshape", value, shape), perm=[0, 2, 1, 3])

    def flat(self, value: str) -> str:
        turned = self.op("Transpose", value, perm=[0, 2, 1, 3])
        return self.op("Reshape", turned, self.tensor([0, 0, HEADS * HEAD_DIM]))

    def model(self) -> onnx.ModelProto:
        graph = helper.make_graph(self.nodes, "decoder", self.inputs, self.outputs, self.weights)
        opsets = [helper.make_opsetid("", self.opset), helper.make_opsetid("com.microsoft", 1)]
        return helper.make_model(graph, opset_imports=opsets, ir_version=10)


# (builder, layer, query, key, value [batch, sequence, heads * head_dim]) -> [batch, sequence, heads *
# head_dim]
Attention = Callable[[Builder, int, str, str, str], str]


def decoder(
    attention: Attention,
    opset: int = 18,
    kv_heads: int = KV_HEADS,
    positions: str = "input",
    prepare: Callable[[Builder], None] | None = None,
) -> onnx.ModelProto:
    """A decoder around a form of attention.

    positions: "input" (position_ids), "cumsum" (of attention_mask, as OPT has it) or "range" (behind the
    cache).
    """
    b = Builder(opset, kv_heads)
    ids = b.input("input_ids", TensorProto.INT64, "batch", "sequence")
    b.input("attention_mask", TensorProto.INT64, "batch", "total")
    if positions == "input":
        b.input("position_ids", TensorProto.INT64, "batch", "sequence")
    if prepare:
        prepare(b)
    hidden = b.op("Gather", b.weight(VOCAB, WIDTH), ids)
    hidden = b.op("Add", hidden, b.op("Gather", b.weight(POSITIONS + 2, WIDTH), _positions(b, positions)))
    for layer in range(LAYERS):
        query = b.op("MatMul", hidden, b.weight(WIDTH, HEADS * HEAD_DIM))
        key = b.op("MatMul", hidden, b.weight(WIDTH, kv_heads * HEAD_DIM))
        value = b.op("MatMul", hidden, b.weight(WIDTH, kv_heads * HEAD_DIM))
        attended = attention(b, layer, query, key, value)
        hidden = b.op("Add", hidden, b.op("MatMul", attended, b.weight(HEADS * HEAD_DIM, WIDTH)))
    logits = b.op("MatMul", hidden, b.weight(WIDTH, VOCAB))
    b.outputs.insert(
        0, helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", "sequence", VOCAB])
    )
    b.nodes.append(helper.make_node("Identity", [logits], ["logits"], name="/logits"))
    return b.model()


def _positions(b: Builder, kind: str) -> str:
    if kind == "input":
        return "position_ids"
    if kind == "cumsum":
        counted = b.op("Sub", b.op("CumSum", "attention_mask", b.tensor(1)), b.tensor(1))
        start = b.op("Sub", b.size("attention_mask", 1), b.size("input_ids", 1))
        new = b.op("Slice", counted, start, b.tensor([2**31]), b.tensor([1]))
        return b.op("Add", new, b.tensor(2))
    if kind == "sequence":
        count = b.op("Range", b.tensor(0), b.op("Squeeze", b.size("input_ids", 1)), b.tensor(1))
        return b.op("Unsqueeze", count, b.tensor([0]))
    total = b.op("Squeeze", b.size("attention_mask", 1))
    past = b.op("Sub", total, b.op("Squeeze", b.size("input_ids", 1)))
    return b.op("Unsqueeze", b.op("Range", past, total, b.tensor(1)), b.tensor([0]))


def caches(b: Builder, layer: int, length: int | str = "past") -> tuple[str, str]:
    shape = ("batch", b.kv_heads, length, HEAD_DIM)
    return tuple(  # type: ignore[return-value]
        b.input(f"past_key_values.{layer}.{what}", TensorProto.FLOAT, *shape) for what in ("key", "value")
    )


def joined(b: Builder, layer: int, key: str, value: str) -> tuple[str, str]:
    """Past and new keys and values [batch, kv_heads, total, head_dim], which are outputs too."""
    results = []
    for what, past, new in zip(("key", "value"), caches(b, layer), (key, value), strict=True):
        total = b.op("Concat", past, b.by_heads(new, b.kv_heads), axis=2)
        b.output(total, f"present.{layer}.{what}", "batch", b.kv_heads, "total", HEAD_DIM)
        results.append(total)
    return results[0], results[1]


def visible(b: Builder, window: int = 0, chunk: int = 0) -> str:
    """bool [batch, 1, sequence, total]: causal, within the window, not padded."""
    total = b.op("Squeeze", b.size("attention_mask", 1))
    past = b.op("Sub", total, b.op("Squeeze", b.size("input_ids", 1)))
    keys = b.op("Range", b.tensor(0), total, b.tensor(1))
    queries = b.op("Unsqueeze", b.op("Range", past, total, b.tensor(1)), b.tensor([1]))
    seen = b.op("LessOrEqual", keys, queries)
    if window:
        seen = b.op("And", seen, b.op("Less", b.op("Sub", queries, keys), b.tensor(window)))
    if chunk:
        same = b.op("Equal", b.op("Div", queries, b.tensor(chunk)), b.op("Div", keys, b.tensor(chunk)))
        seen = b.op("And", seen, same)
    valid = b.op("Cast", "attention_mask", to=TensorProto.BOOL)
    return b.op("And", seen, b.op("Unsqueeze", valid, b.tensor([1, 2])))


def additive(b: Builder, mask: str, hidden: float = -3.4028234663852886e38) -> str:
    return b.op("Where", mask, b.tensor(0, np.float32), b.tensor(hidden, np.float32))


def decomposed(
    *,
    scale: str = "after",
    repeat: str = "expand",
    mask: str = "add",
    softcap: float = 0.0,
    window: int = 0,
    guard: bool = False,
    factor: float = HEAD_DIM**-0.5,
    edit: Callable[[Builder, int, str], str] | None = None,
) -> Attention:
    """Attention written out.

    scale: "query", "key", "split", "after" or "divide". repeat: how keys are shared: "expand", "tile",
    "gather".
    mask: "add", "where", "add-first" (before the scale is undone), "arithmetic" ((1 - mask) * -1e9).
    edit: (builder, layer, scores) -> scores, to spoil them.
    """

    def build(b: Builder, layer: int, query: str, key: str, value: str) -> str:
        q = b.by_heads(query, HEADS)
        k, v = (_repeated(b, each, repeat) for each in joined(b, layer, key, value))
        k = b.op("Transpose", k, perm=[0, 1, 3, 2])
        root = b.tensor(factor**0.5, np.float32)
        if scale in ("query", "split"):
            q = b.op("Mul", q, root if scale == "split" else b.tensor(factor, np.float32))
        if scale in ("key", "split"):
            k = b.op("Mul", root if scale == "split" else b.tensor(factor, np.float32), k)
        scores = b.op("MatMul", q, k)
        if scale == "after":
            scores = b.op("Mul", scores, b.tensor([factor], np.float32))
        elif scale == "divide":
            scores = b.op("Div", scores, b.tensor(1 / factor, np.float32))
        if softcap:
            scores = b.op("Tanh", b.op("Div", scores, b.tensor(softcap, np.float32)))
            scores = b.op("Mul", scores, b.tensor(softcap, np.float32))
        if edit:
            scores = edit(b, layer, scores)
        seen = visible(b, window)
        if mask == "add":
            scores = b.op("Add", scores, additive(b, seen))
        elif mask == "where":
            scores = b.op("Where", seen, scores, b.tensor(-3.4e38, np.float32))
        elif mask == "arithmetic":
            number = b.op("Cast", seen, to=TensorProto.FLOAT)
            unseen = b.op("Sub", b.tensor(1, np.float32), number)
            scores = b.op("Add", b.op("Mul", unseen, b.tensor(-1e9, np.float32)), scores)
        weights = b.op("Softmax", scores, axis=-1)
        if guard:
            weights = b.op("Where", b.op("IsNaN", weights), b.tensor(0, np.float32), weights)
        return b.flat(b.op("MatMul", weights, v))

    return build


def _repeated(b: Builder, value: str, how: str) -> str:
    group = HEADS // b.kv_heads
    if group == 1:
        return value
    if how in ("gather", "wrong"):
        order = np.repeat if how == "gather" else np.tile
        return b.op("Gather", value, b.tensor(order(np.arange(b.kv_heads), group)), axis=1)
    shape = [
        b.size(value, 0),
        b.tensor([b.kv_heads]),
        b.tensor([group]),
        b.size(value, 2),
        b.tensor([HEAD_DIM]),
    ]
    wide = b.op("Unsqueeze", value, b.tensor([2]))
    if how == "tile":
        wide = b.op("Tile", wide, b.tensor([1, 1, group, 1, 1]))
    else:
        wide = b.op("Expand", wide, b.op("Concat", *shape, axis=0))
    whole = b.op("Concat", shape[0], b.tensor([HEADS]), shape[3], shape[4], axis=0)
    return b.op("Reshape", wide, whole)


def onnx_attention(
    *, rank: int = 4, mask: str | None = "bool", inner: bool = False, window: int = 0, **attributes: Any
) -> Attention:
    """ai.onnx Attention. inner: the node appends to the caches itself. mask: "bool", "float" or None."""

    def build(b: Builder, layer: int, query: str, key: str, value: str) -> str:
        seen = visible(b, window) if mask else EMPTY
        seen = additive(b, seen) if mask == "float" else seen
        options = dict(attributes)
        if rank == 3:
            options |= {"q_num_heads": HEADS, "kv_num_heads": b.kv_heads}
        if inner:
            past = caches(b, layer)
            new = (query, key, value) if rank == 3 else _all_by_heads(b, query, key, value)
            output, *present = b.op("Attention", *new, seen, *past, outputs=3, **options)
            for what, cache in zip(("key", "value"), present, strict=True):
                b.output(cache, f"present.{layer}.{what}", "batch", b.kv_heads, "total", HEAD_DIM)
        else:
            k, v = joined(b, layer, key, value)
            if rank == 3:
                shape = b.tensor([0, 0, b.kv_heads * HEAD_DIM])
                k, v = (b.op("Reshape", b.op("Transpose", x, perm=[0, 2, 1, 3]), shape) for x in (k, v))
            q = query if rank == 3 else b.by_heads(query, HEADS)
            output = b.op("Attention", q, k, v, *([seen] if seen else []), **options)
        return output if rank == 3 else b.flat(output)

    return build


def _all_by_heads(b: Builder, query: str, key: str, value: str) -> tuple[str, str, str]:
    return b.by_heads(query, HEADS), b.by_heads(key, b.kv_heads), b.by_heads(value, b.kv_heads)


def scattered(b: Builder, layer: int, query: str, key: str, value: str) -> str:
    """Attention of opset 24 over static caches that TensorScatter writes into."""
    present = []
    for what, past, new in zip(("key", "value"), caches(b, layer, CAPACITY), (key, value), strict=True):
        cache = b.op("TensorScatter", past, b.by_heads(new, b.kv_heads), "write_indices", axis=2)
        b.output(cache, f"present.{layer}.{what}", "batch", b.kv_heads, CAPACITY, HEAD_DIM)
        present.append(cache)
    q = b.by_heads(query, HEADS)
    empty = [EMPTY] * 3
    return b.flat(b.op("Attention", q, *present, *empty, "nonpad_kv_seqlen", is_causal=1))


def lengths(b: Builder) -> None:
    for name in ("write_indices", "nonpad_kv_seqlen"):
        b.input(name, TensorProto.INT64, "batch")


def multi_head(
    *, causal: str = "bias", bias: bool = False, inner: bool = True, padding: bool = False
) -> Attention:
    """com.microsoft.MultiHeadAttention. causal: "bias" or "unidirectional"."""

    def build(b: Builder, layer: int, query: str, key: str, value: str) -> str:
        mask = additive(b, visible(b)) if causal == "bias" else EMPTY
        pad = b.op("Cast", "attention_mask", to=TensorProto.INT32) if padding else EMPTY
        packed = b.weight(3 * HEADS * HEAD_DIM) if bias else EMPTY
        options = {"num_heads": HEADS, "unidirectional": int(causal == "unidirectional")}
        options |= {"domain": "com.microsoft"}
        if inner:
            past = caches(b, layer)
            inputs = (query, key, value, packed, pad, mask, *past)
            output, *present = b.op("MultiHeadAttention", *inputs, outputs=3, **options)
            for what, cache in zip(("key", "value"), present, strict=True):
                b.output(cache, f"present.{layer}.{what}", "batch", HEADS, "total", HEAD_DIM)
            return str(output)
        k, v = joined(b, layer, key, value)
        shape = b.tensor([0, 0, HEADS * HEAD_DIM])
        k, v = (b.op("Reshape", b.op("Transpose", x, perm=[0, 2, 1, 3]), shape) for x in (k, v))
        return str(b.op("MultiHeadAttention", query, k, v, packed, pad, mask, **options))

    return build


def save(folder: Path, model: onnx.ModelProto, make_tokenizer: Callable[[Path], None], **config: Any) -> Path:
    """A folder with model.onnx, config.json and a tokenizer."""
    folder.mkdir(parents=True, exist_ok=True)
    onnx.save(model, folder / "model.onnx")
    fields = {
        "architectures": ["TestDecoder"],
        "n_positions": POSITIONS,
        "n_layer": LAYERS,
        "eos_token_id": 1,
    }
    (folder / "config.json").write_text(json.dumps(fields | config))
    make_tokenizer(folder)
    return folder


def greedy(model: onnx.ModelProto, prompts: list[list[int]], new_tokens: int) -> list[list[int]]:
    """What the graph itself decodes, each prompt in full and alone, with empty caches."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    results = []
    for prompt in prompts:
        tokens = list(prompt)
        for _ in range(new_tokens):
            logits = session.run(["logits"], _feeds(session, np.array([tokens], np.int64)))[0]
            tokens.append(int(logits[0, -1].argmax()))
        results.append(tokens[-new_tokens:])
    return results


def _feeds(session: onnxruntime.InferenceSession, ids: np.ndarray) -> dict[str, np.ndarray]:
    known = {
        "input_ids": ids,
        "attention_mask": np.ones_like(ids),
        "position_ids": np.arange(ids.shape[1])[None],
        "write_indices": np.zeros(1, np.int64),
        "nonpad_kv_seqlen": np.array([ids.shape[1]], np.int64),
    }
    feeds = {}
    for value in session.get_inputs():
        if value.name in known:
            feeds[value.name] = known[value.name]
        elif value.name == "use_cache_branch":
            feeds[value.name] = np.array([True])
        else:
            shape = [1, *(dim if isinstance(dim, int) else 0 for dim in value.shape[1:])]
            dtype = np.float16 if value.type == "tensor(float16)" else np.float32
            feeds[value.name] = np.zeros(shape, dtype)
    return feeds
