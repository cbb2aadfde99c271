"""A tiny random decoder as an artifact, the same in NumPy, and a backend that only remembers tokens."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from tokenizers import AddedToken, decoders, models, pre_tokenizers
from tokenizers import Tokenizer as FastTokenizer

from relay_attention.errors import BackendError
from relay_attention.runtime import bfloat16
from relay_attention.runtime.artifact import (
    Artifact,
    FileEntry,
    Geometry,
    Manifest,
    PrefixFile,
    PrefixHeader,
    PrefixInfo,
    TokenIds,
)
from relay_attention.runtime.text import SystemPrompt, Tokenizer

LAYERS, HEADS, KV_HEADS, HEAD_DIM, HIDDEN, MAX_POSITIONS = 2, 4, 2, 8, 32, 512
SYSTEM_PROMPT = "Answer the user's questions from this directory: Ann 12, Bob 7, Zoë 41. Be kind. " * 2
TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}<|im_start|>{{ message.role }}\n"
    "{{ message.content | trim }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
MERGES = ["h e", "l l", "he ll", "hell o", "Ġ a", "Ġ t", "Ġt h", "Ġth e", "Ċ Ċ", "Ã ©", "s t", "o p", "st op"]
SPECIAL = ["<s>", "</s>", "<|im_start|>", "<|im_end|>"]


def byte_tokenizer() -> FastTokenizer:
    """Byte-level BPE: 256 bytes, a few merges, four special tokens."""
    vocab = {byte: index for index, byte in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    pairs = [tuple(merge.split(" ")) for merge in MERGES]
    for left, right in pairs:
        vocab[left + right] = len(vocab)
    tokenizer = FastTokenizer(models.BPE(vocab=vocab, merges=pairs))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL])
    return tokenizer


class NumpyDecoder:
    """The tiny decoder in float64, one sequence at a time, without cache, prefix or batch."""

    def __init__(self, vocab_size: int, seed: int = 0):
        generator = np.random.default_rng(seed)

        def matrix(*shape: int) -> np.ndarray:
            return (generator.standard_normal(shape) / np.sqrt(shape[0])).astype(np.float32)

        self.vocab_size = vocab_size
        self.weights = {"embedding": matrix(vocab_size, HIDDEN) * np.float32(np.sqrt(vocab_size))}
        for layer in range(LAYERS):
            self.weights |= {
                f"{layer}.query": matrix(HIDDEN, HEADS * HEAD_DIM),
                f"{layer}.key": matrix(HIDDEN, KV_HEADS * HEAD_DIM),
                f"{layer}.value": matrix(HIDDEN, KV_HEADS * HEAD_DIM),
                f"{layer}.output": matrix(HEADS * HEAD_DIM, HIDDEN),
                f"{layer}.up": matrix(HIDDEN, 2 * HIDDEN),
                f"{layer}.down": matrix(2 * HIDDEN, HIDDEN),
            }
        self.weights["head"] = matrix(HIDDEN, vocab_size) * np.float32(1.5)
        frequencies = 100.0 ** (-np.arange(HEAD_DIM // 2) / (HEAD_DIM // 2))
        angles = np.outer(np.arange(MAX_POSITIONS), frequencies)
        self.cos, self.sin = np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)

    def run(self, token_ids: Sequence[int]) -> tuple[np.ndarray, list[tuple[np.ndarray, np.ndarray]]]:
        """Logits [n, vocab] and each layer's rotated keys and values [kv heads, n, head_dim]."""
        weights = {name: value.astype(np.float64) for name, value in self.weights.items()}
        length, group = len(token_ids), HEADS // KV_HEADS
        hidden = weights["embedding"][np.asarray(token_ids, int)]
        caches = []
        mask = np.tril(np.ones((length, length), bool))
        for layer in range(LAYERS):
            query, key, value = (
                (hidden @ weights[f"{layer}.{name}"]).reshape(length, -1, HEAD_DIM).transpose(1, 0, 2)
                for name in ("query", "key", "value")
            )
            query, key = self._rotate(query), self._rotate(key)
            caches.append((key, value))
            scores = query @ np.repeat(key, group, 0).transpose(0, 2, 1) / np.sqrt(HEAD_DIM)
            scores = np.where(mask, scores, -np.inf)
            scores = np.exp(scores - scores.max(-1, keepdims=True, initial=-np.inf))
            attended = scores / scores.sum(-1, keepdims=True) @ np.repeat(value, group, 0)
            hidden = hidden + attended.transpose(1, 0, 2).reshape(length, -1) @ weights[f"{layer}.output"]
            hidden = hidden + np.tanh(hidden @ weights[f"{layer}.up"]) @ weights[f"{layer}.down"]
        return hidden @ weights["head"], caches

    def greedy(self, token_ids: Sequence[int], count: int, end: Sequence[int] = ()) -> list[int]:
        """Up to `count` greedy tokens, the end token left out."""
        sequence, generated = list(token_ids), []
        while len(generated) < count:
            token_id = int(self.run(sequence)[0][-1].argmax())
            if token_id in end:
                break
            generated.append(token_id)
            sequence.append(token_id)
        return generated

    def _rotate(self, states: np.ndarray) -> np.ndarray:
        length = states.shape[1]
        cos, sin = self.cos[:length].astype(np.float64), self.sin[:length].astype(np.float64)
        first, second = np.split(states, 2, axis=-1)
        return np.concatenate([first * cos - second * sin, second * cos + first * sin], -1)


ELEMENTS = {
    "float32": TensorProto.FLOAT, "float16": TensorProto.FLOAT16, "bfloat16": TensorProto.BFLOAT16,
}  # fmt: skip


def stored(array: np.ndarray, dtype: str) -> np.ndarray:
    """An array in an element type of manifests; bfloat16 as its bits."""
    return bfloat16.narrow(array) if dtype == "bfloat16" else array.astype(dtype)


def build_model(
    decoder: NumpyDecoder, folder: Path, prefix: PrefixFile, mode: str, logits: str, between_casts: bool
) -> None:
    """model.onnx of the tiny decoder, with the contract's inputs and outputs; narrow types only in attention.

    between_casts: the op computes in float32, between Casts of all that goes in and comes out, so that ONNX
    Runtime's CPU provider, where the op takes no bfloat16, runs a graph with bfloat16 caches.
    """
    dtype = ELEMENTS[prefix.header.dtype]
    half = dtype != TensorProto.FLOAT
    names: list[str] = []
    nodes: list[onnx.NodeProto] = []

    def add(op: str, inputs: list[str], outputs: int = 1, **attributes: object) -> str | list[str]:
        made = [f"{op}_{len(nodes)}_{index}" for index in range(outputs)]
        nodes.append(helper.make_node(op, inputs, made, f"{op}_{len(nodes)}", **attributes))
        return made[0] if outputs == 1 else made

    initializers = [numpy_helper.from_array(value, name) for name, value in decoder.weights.items()]
    for name, table in (("cos", decoder.cos), ("sin", decoder.sin)):
        raw = stored(table, prefix.header.dtype).tobytes()
        initializers.append(helper.make_tensor(name, dtype, table.shape, raw, raw=True))
    constants = {"one": np.int64([1]), "axes": np.int64([1, 2])}
    constants |= {"zero": np.int32([0]), "one32": np.int32([1]), "size": np.int64([1, 1, HIDDEN])}
    initializers += [numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items()]
    integers = {"input_ids": ["batch", "sequence"], "context_lens": ["batch"], "query_lens": ["batch"]}
    inputs = [
        helper.make_tensor_value_info(name, TensorProto.INT32, shape) for name, shape in integers.items()
    ]
    outputs = []
    hidden = add("Gather", ["embedding", "input_ids"])
    for layer in range(LAYERS):
        cache = ["batch", KV_HEADS, "max_context", HEAD_DIM]
        for kind in ("key", "value"):
            names = [f"past_key_values.{layer}.{kind}", f"present.{layer}.{kind}"]
            inputs.append(helper.make_tensor_value_info(names[0], dtype, cache))
            outputs.append(helper.make_tensor_value_info(names[1], dtype, cache))
        states = [add("MatMul", [hidden, f"{layer}.{name}"]) for name in ("query", "key", "value")]
        if half:
            states = [add("Cast", [state], to=dtype) for state in states]
        past = [f"past_key_values.{layer}.{kind}" for kind in ("key", "value")]
        fixed = [f"prefix.{layer}.key", f"prefix.{layer}.value", "cos", "sin"]
        given = [f"attention.{layer}", f"present.{layer}.key", f"present.{layer}.value"]
        made = given
        if between_casts:
            states, past, fixed = (
                [add("Cast", [name], to=TensorProto.FLOAT) for name in names]
                for names in (states, past, fixed)
            )
            made = [f"{name}.wide" for name in given]
        node = helper.make_node(
            "RelayAttention",
            [*states, *past, "context_lens", "query_lens", *fixed],
            made,
            f"attention_{layer}",
            domain="relay",
            num_heads=HEADS,
            kv_num_heads=KV_HEADS,
            do_rotary=1,
            plugin_version="1",
            plugin_namespace="relay",
        )
        nodes.append(node)
        if between_casts:
            nodes += [
                helper.make_node("Cast", [wide], [name], f"cast_{name}", to=dtype)
                for wide, name in zip(made, given, strict=True)
            ]
        attended = add("Cast", [f"attention.{layer}"], to=TensorProto.FLOAT)
        hidden = add("Add", [hidden, add("MatMul", [attended, f"{layer}.output"])])
        inner = add("Tanh", [add("MatMul", [hidden, f"{layer}.up"])])
        hidden = add("Add", [hidden, add("MatMul", [inner, f"{layer}.down"])])
    if logits == "last":
        last = add("Max", [add("Sub", ["query_lens", "one32"]), "zero"])
        index = add("Cast", [add("Unsqueeze", [last, "axes"])], to=TensorProto.INT64)
        hidden = add(
            "Squeeze", [add("GatherElements", [hidden, add("Expand", [index, "size"])], axis=1), "one"]
        )
    nodes.append(helper.make_node("MatMul", [hidden, "head"], ["logits"], "logits"))
    shape = ["batch", decoder.vocab_size] if logits == "last" else ["batch", "sequence", decoder.vocab_size]
    outputs.insert(0, helper.make_tensor_value_info("logits", TensorProto.FLOAT, shape))
    for layer, (key_offset, value_offset, nbytes) in enumerate(prefix.extents()):
        for kind, offset in (("key", key_offset), ("value", value_offset)):
            name = f"prefix.{layer}.{kind}"
            if mode == "input":
                shape = [KV_HEADS, "prefix_length", HEAD_DIM]
                inputs.append(helper.make_tensor_value_info(name, dtype, shape))
                continue
            shape = [KV_HEADS, prefix.header.prefix_length, HEAD_DIM]
            tensor = TensorProto(name=name, data_type=dtype, dims=shape)
            tensor.data_location = TensorProto.EXTERNAL
            for key, value in (("location", "prefix.bin"), ("offset", offset), ("length", nbytes)):
                tensor.external_data.add(key=key, value=str(value))
            initializers.append(tensor)
    graph = helper.make_graph(nodes, "tiny", inputs, outputs, initializers)
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("relay", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=8)
    (folder / "model.onnx").write_bytes(model.SerializeToString())


def make_artifact(
    folder: Path,
    *,
    mode: str = "static",
    logits: str = "last",
    dtype: str = "float32",
    template: str = "chat",
    text: str = SYSTEM_PROMPT,
    max_context: int = 64,
    seed: int = 0,
    between_casts: bool = False,
) -> Artifact:
    """A whole artifact folder of the tiny decoder. between_casts: see `build_model`."""
    folder.mkdir(parents=True)
    tokenizer = byte_tokenizer()
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"bos_token": "<s>", "eos_token": {"content": "<|im_end|>"}, "chat_template": TEMPLATE}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    (folder / "system_prompt.txt").write_bytes(text.encode())
    prompt = SystemPrompt.make(Tokenizer.open(folder), text, template)
    decoder = NumpyDecoder(tokenizer.get_vocab_size(), seed)
    manifest = Manifest(
        model_id=f"{seed:064x}",
        dtype=dtype,
        geometry=Geometry(
            num_layers=LAYERS,
            num_heads=(HEADS,) * LAYERS,
            kv_num_heads=(KV_HEADS,) * LAYERS,
            head_dim=(HEAD_DIM,) * LAYERS,
            local_window_size=(-1,) * LAYERS,
            vocab_size=decoder.vocab_size,
            max_positions=MAX_POSITIONS,
        ),
        max_context=max_context,
        prefix=PrefixInfo(
            mode, len(prompt.token_ids), prompt.token_ids, prompt.template, rendered_at=prompt.rendered_at
        ),
        tokens=TokenIds(bos=tokenizer.token_to_id("<s>"), eos=(tokenizer.token_to_id("<|im_end|>"),)),
        logits=logits,
        source={"kind": "test", "architecture": "TinyForCausalLM"},
    )
    caches = [(stored(key, dtype), stored(value, dtype)) for key, value in decoder.run(prompt.token_ids)[1]]
    prefix = PrefixFile.write(folder / "prefix.bin", PrefixHeader.of(manifest), caches)
    build_model(decoder, folder, prefix, mode, logits, between_casts)
    names = ("model.onnx", "prefix.bin", "tokenizer.json", "tokenizer_config.json", "system_prompt.txt")
    manifest.files.update({name: FileEntry.of(folder / name) for name in names})
    manifest.write(folder / "relay.json")
    return Artifact.open(folder)


class FakeBackend:
    """A backend without a model: a slot is the list of its tokens, and the logits follow from all of them.

    `chain` maps all tokens to the next one; where it gives None, logits are random, seeded by the tokens.
    `calls` records (first row, rows, sequence) of every step, `moves` (source, target, length) of every move.
    """

    def __init__(self, vocab_size: int, chain: Callable[[list[int]], int | None] = lambda tokens: None):
        self.vocab_size, self.chain = vocab_size, chain
        self.calls: list[tuple[int, int, int]] = []
        self.moves: list[tuple[int, int, int]] = []
        self.fail_on: Callable[[np.ndarray], bool] = lambda input_ids: False
        self.closed = False

    def allocate(self, max_batch: int, max_context: int) -> None:
        self.max_context = max_context
        self.slots: list[list[int]] = [[] for _ in range(max_batch)]

    def step(
        self, first_row: int, input_ids: np.ndarray, context_lens: np.ndarray, query_lens: np.ndarray
    ) -> None:
        rows, sequence = input_ids.shape
        assert first_row + rows <= len(self.slots)
        assert input_ids.dtype == context_lens.dtype == query_lens.dtype == np.int32
        self.calls.append((first_row, rows, sequence))
        if self.fail_on(input_ids):
            raise BackendError("the engine gave up")
        logits = np.zeros((rows, self.vocab_size), np.float32)
        for row in range(rows):
            slot, context, query = self.slots[first_row + row], context_lens[row], query_lens[row]
            assert 0 < query <= sequence
            assert context <= len(slot), "a slot is read beyond what was written to it"
            assert context + query <= self.max_context
            del slot[context:]
            slot += input_ids[row, :query].tolist()
            logits[row] = self.logits(slot)
        self._logits = logits

    def logits(self, tokens: list[int]) -> np.ndarray:
        """Logits after all tokens of a request."""
        row = np.random.default_rng(tokens).standard_normal(self.vocab_size).astype(np.float32) * 3
        if (following := self.chain(tokens)) is not None:
            row[following] = 100
        return row

    def read_logits(self) -> np.ndarray:
        return self._logits

    def move(self, source_row: int, target_row: int, length: int) -> None:
        assert length <= len(self.slots[source_row])
        self.moves.append((source_row, target_row, length))
        self.slots[target_row] = self.slots[source_row][:length]

    def set_prefix(self, prefix: PrefixFile) -> None:
        raise BackendError("static")

    cache_bytes = prefix_bytes = 0

    def close(self) -> None:
        self.closed = True


@pytest.fixture(scope="session")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    """The tiny decoder with a static prefix and a chat template. Not to be changed."""
    return make_artifact(tmp_path_factory.mktemp("artifact") / "static")


@pytest.fixture(scope="session")
def input_artifact(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    """The same with prefix mode "input". Not to be changed."""
    return make_artifact(tmp_path_factory.mktemp("artifact") / "input", mode="input")


@pytest.fixture(scope="session")
def numpy_decoder(artifact: Artifact) -> NumpyDecoder:
    """The same decoder in float64."""
    return NumpyDecoder(artifact.manifest.geometry.vocab_size)


@pytest.fixture(name="make_artifact")
def make_artifact_fixture() -> Callable[..., Artifact]:
    return make_artifact


@pytest.fixture(name="FakeBackend")
def fake_backend_fixture() -> type[FakeBackend]:
    return FakeBackend


@pytest.fixture(name="byte_tokenizer")
def byte_tokenizer_fixture() -> FastTokenizer:
    return byte_tokenizer()
