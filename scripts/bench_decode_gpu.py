"""Times decoding of a whole model in ONNX Runtime on CUDA: relay attention beside GroupQueryAttention.

usage: python scripts/bench_decode_gpu.py [--layers N] [--batches 1,8,32,64] [--out FOLDER]
       python scripts/bench_decode_gpu.py --tiny            the same script on a CPU, to see that it runs

A model of Llama-3-8B's geometry with random float16 weights is written here (16 GB; no internet, no exporter)
as two graphs over one file of weights: one with RelayAttention and the prefix as initializers, in an artifact
that RelayDecoder opens, and one with com.microsoft's GroupQueryAttention and the whole prompt in every
request's cache, written in place. Both run in the same onnxruntime, with and without CUDA graphs, and choose
greedy tokens with the same small graph on the GPU.

For each batch, medians of: step (the session alone, until the GPU is done), token (the greedy tokens are in
main memory), decoder (RelayDecoder.generate, a token of all requests; nothing of the kind exists for the
other side, whose "token" is the least that a driver could take). Beside them the floor: bytes of weights,
keys and values that a step reads over this machine's copy bandwidth. First the logits of both are compared,
on a tiny geometry and on the whole one. What fails says so, and the rest goes on; the exit status is then 1.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import math
import shutil
import statistics
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

with contextlib.suppress(ImportError):
    import torch  # noqa: F401  it brings the CUDA libraries that ONNX Runtime needs

import numpy as np
import onnx
import onnxruntime
import tokenizers
from onnx import TensorProto, helper, numpy_helper

from relay_attention.runtime import Artifact, RelayDecoder, SamplingParams
from relay_attention.runtime import onnxruntime_cuda_backend as cuda_backend
from relay_attention.runtime.artifact import (
    FileEntry,
    Geometry,
    Manifest,
    PrefixFile,
    PrefixHeader,
    PrefixInfo,
)
from relay_attention.runtime.onnxruntime_backend import Binding, HostMemory, Memory
from relay_attention.runtime.onnxruntime_top import TopTokens

START = time.perf_counter()
TOP = 9  # logits that RelayDecoder fetches for a greedy token
CHECK_ROWS, CHECK_STEPS = 4, 4
CONTEXT = 128  # tokens of each request's own while steps are timed
BLOCK = 16_777_259  # random numbers that all weights are cut from; prime, so that no two rows are alike
PRESENT = {"key": "present.{}.key", "value": "present.{}.value"}
PAST = {"key": "past_key_values.{}.key", "value": "past_key_values.{}.value"}


def say(*words: object) -> None:
    print(f"[{time.perf_counter() - START:6.1f} s]", *words, flush=True)


@dataclass(frozen=True)
class Model:
    """The geometry; sizes in elements."""

    layers: int = 32
    hidden: int = 4096
    heads: int = 32
    kv_heads: int = 8
    head_dim: int = 128
    intermediate: int = 14336
    vocab: int = 128256
    prefix: int = 4096
    capacity: int = 256  # tokens of a request's own, at most
    dtype: str = "float16"

    @property
    def matrices(self) -> dict[str, tuple[int, int]]:
        """Every matrix in the order of the file; shapes as MatMul takes them."""
        query, key = self.heads * self.head_dim, self.kv_heads * self.head_dim
        found = {"embedding": (self.vocab, self.hidden)}
        for layer in range(self.layers):
            found |= {
                f"{layer}.query": (self.hidden, query),
                f"{layer}.key": (self.hidden, key),
                f"{layer}.value": (self.hidden, key),
                f"{layer}.output": (query, self.hidden),
                f"{layer}.gate": (self.hidden, self.intermediate),
                f"{layer}.up": (self.hidden, self.intermediate),
                f"{layer}.down": (self.intermediate, self.hidden),
            }
        return found | {"head": (self.hidden, self.vocab)}

    @property
    def itemsize(self) -> int:
        return np.dtype(self.dtype).itemsize

    @property
    def read_bytes(self) -> int:
        """Of weights, by a decode step: of the embedding a few rows only."""
        sizes = {name: math.prod(shape) for name, shape in self.matrices.items()}
        return (sum(sizes.values()) - sizes["embedding"]) * self.itemsize

    @property
    def token_bytes(self) -> int:
        """Of keys and values of one token, all layers."""
        return 2 * self.layers * self.kv_heads * self.head_dim * self.itemsize

    @property
    def positions(self) -> int:
        return self.prefix + self.capacity


TINY = Model(2, 64, 4, 2, 16, 128, 512, 48, 160, "float32")
TINY_GPU = Model(2, 256, 4, 2, 64, 512, 8192, 200, 160)  # heads that the CUDA kernels take


# The model's files


def write_weights(model: Model, path: Path) -> dict[str, tuple[int, int]]:
    """All matrices, one behind the other; returns each one's (offset, bytes)."""
    random = np.random.default_rng(0)
    block = random.standard_normal(BLOCK, dtype=np.float32)
    block *= 0.02 * math.sqrt(4096 / model.hidden)
    block = block.astype(model.dtype)
    places, offset = {}, 0
    with path.open("wb", buffering=0) as file:
        for index, (name, shape) in enumerate(model.matrices.items()):
            left, start = math.prod(shape), index * 1_000_003 % BLOCK
            places[name] = offset, left * model.itemsize
            while left:
                part = memoryview(block[start : start + left]).cast("B")
                offset += file.write(part)
                left -= len(part) // model.itemsize
                start = 0
    return places


def write_prefix(model: Model, folder: Path, manifest: Manifest) -> PrefixFile:
    random = np.random.default_rng(1)
    shape = (model.kv_heads, model.prefix, model.head_dim)
    whole = random.standard_normal((4, *shape), dtype=np.float32).astype(model.dtype)
    layers = [  # every layer another part of the same numbers
        (np.roll(whole[layer % 2], layer, axis=1), np.roll(whole[2 + layer % 2], layer, axis=1))
        for layer in range(model.layers)
    ]
    return PrefixFile.write(folder / "prefix.bin", PrefixHeader.of(manifest), layers)


def write_graph(
    model: Model, path: Path, places: dict[str, tuple[int, int]], prefix: PrefixFile | None
) -> None:
    """The decoding graph with RelayAttention and a prefix, or with GroupQueryAttention where it is None."""
    kind = helper.np_dtype_to_tensor_dtype(np.dtype(model.dtype))
    nodes: list[onnx.NodeProto] = []
    constants: list[onnx.TensorProto] = []

    def add(op: str, inputs: list[str], output: str, **attributes: Any) -> str:
        nodes.append(helper.make_node(op, inputs, [output], output, **attributes))
        return output

    def external(name: str, shape: tuple[int, ...], file: str, offset: int, nbytes: int) -> None:
        tensor = TensorProto(name=name, data_type=kind, dims=shape, data_location=TensorProto.EXTERNAL)
        for key, value in (("location", file), ("offset", offset), ("length", nbytes)):
            tensor.external_data.add(key=key, value=str(value))
        constants.append(tensor)

    def constant(name: str, value: Any) -> None:
        constants.append(numpy_helper.from_array(np.asarray(value), name))

    def normed(state: str, added: str, name: str) -> tuple[str, str]:
        """RMSNorm(state + added), and the sum."""
        outputs = [name, "", "", f"{name}.sum"]
        nodes.append(
            helper.make_node(
                "SkipSimplifiedLayerNormalization",
                [state, added, "norm"],
                outputs,
                name,
                domain="com.microsoft",
                epsilon=1e-5,
            )
        )
        return name, f"{name}.sum"

    for name, shape in model.matrices.items():
        external(name, shape, "weights.bin", *places[name])
    constant("norm", np.ones(model.hidden, model.dtype))
    angles = np.outer(
        np.arange(model.positions), 500000.0 ** (-np.arange(model.head_dim // 2) / (model.head_dim // 2))
    )
    constant("cos", np.cos(angles).astype(model.dtype))
    constant("sin", np.sin(angles).astype(model.dtype))
    for name, value in {"zero": 0, "one": 1}.items():
        constant(name, np.int64(value))
    constant("axis", np.int64([1]))
    constant("axes", np.int64([1, 2]))
    constant("row", np.int64([1, 1, model.hidden]))

    def value(name: str, data_type: int, *shape: int | str) -> onnx.ValueInfoProto:
        return helper.make_tensor_value_info(name, data_type, shape)

    integers = {"input_ids": ("batch", "sequence"), "context_lens": ("batch",), "query_lens": ("batch",)}
    if prefix is None:
        integers["total_sequence_length"] = ()
    inputs = [value(name, TensorProto.INT32, *shape) for name, shape in integers.items()]
    outputs = [value("logits", TensorProto.FLOAT, "batch", model.vocab)]
    cache = ("batch", model.kv_heads, "max_context", model.head_dim)
    state = add("Gather", ["embedding", "input_ids"], "embedded")
    norm = add(
        "SimplifiedLayerNormalization", [state, "norm"], "0.normed", axis=-1, epsilon=1e-5, stash_type=1
    )
    for layer in range(model.layers):
        here = {name: [pattern[k].format(layer) for k in ("key", "value")] for name, pattern in (
            ("past", PAST), ("present", PRESENT))}  # fmt: skip
        inputs += [value(name, kind, *cache) for name in here["past"]]
        outputs += [value(name, kind, *cache) for name in here["present"]]
        query, key, values = (
            add("MatMul", [norm, f"{layer}.{name}"], f"{layer}.{name}.projected")
            for name in ("query", "key", "value")
        )
        heads = {"num_heads": model.heads, "kv_num_heads": model.kv_heads, "do_rotary": 1}
        tables = ["cos", "sin"]
        if prefix is None:
            op, domain = "GroupQueryAttention", "com.microsoft"
            rest = ["context_lens", "total_sequence_length", *tables]  # one token: cached = total - 1
        else:
            op, domain = "RelayAttention", "relay"
            heads |= {"plugin_version": "1", "plugin_namespace": "relay"}  # type: ignore[dict-item]
            names = [f"prefix.{layer}.key", f"prefix.{layer}.value"]
            rest = ["context_lens", "query_lens", *names, *tables]
            shape = (model.kv_heads, model.prefix, model.head_dim)
            *offsets, nbytes = prefix.extents()[layer]
            for name, offset in zip(names, offsets, strict=True):
                external(name, shape, "prefix.bin", offset, nbytes)
        attended = f"{layer}.attended"
        nodes.append(
            helper.make_node(
                op,
                [query, key, values, *here["past"], *rest],
                [attended, *here["present"]],
                f"{layer}.attention",
                domain=domain,
                **heads,
            )
        )
        projected = add("MatMul", [attended, f"{layer}.output"], f"{layer}.output.projected")
        norm, state = normed(state, projected, f"{layer}.mlp.normed")
        gate = add("MatMul", [norm, f"{layer}.gate"], f"{layer}.gate.projected")
        up = add("MatMul", [norm, f"{layer}.up"], f"{layer}.up.projected")
        gated = add("Mul", [gate, add("Sigmoid", [gate], f"{layer}.sigmoid")], f"{layer}.silu")
        inner = add("Mul", [gated, up], f"{layer}.inner")
        down = add("MatMul", [inner, f"{layer}.down"], f"{layer}.down.projected")
        norm, state = normed(state, down, f"{layer + 1}.normed")
    length = add("Cast", ["query_lens"], "length", to=TensorProto.INT64)
    last = add("Max", [add("Sub", [length, "one"], "before"), "zero"], "last")
    index = add("Expand", [add("Unsqueeze", [last, "axes"], "column"), "row"], "index")
    token = add("Squeeze", [add("GatherElements", [norm, index], "gathered", axis=1), "axis"], "token")
    add("Cast", [add("MatMul", [token, "head"], "logits.narrow")], "logits", to=TensorProto.FLOAT)
    graph = helper.make_graph(nodes, "decoder", inputs, outputs, constants)
    opsets = [helper.make_opsetid(name, number) for name, number in (("", 17), ("com.microsoft", 1))]
    opsets += [helper.make_opsetid("relay", 1)] if prefix else []
    path.write_bytes(helper.make_model(graph, opset_imports=opsets, ir_version=8).SerializeToString())


def write_model(model: Model, folder: Path) -> Artifact:
    """The artifact, and gqa.onnx in its folder."""
    folder.mkdir(parents=True, exist_ok=True)
    places = write_weights(model, folder / "weights.bin")
    say(f"weights: {sum(nbytes for _, nbytes in places.values()) / 1e9:.2f} GB")
    vocab = {f"t{index}": index for index in range(model.vocab)}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocab, unk_token="t0"))
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "system_prompt.txt").write_text("random", encoding="utf-8")
    each = model.layers
    manifest = Manifest(
        model_id="0" * 64,
        dtype=model.dtype,
        geometry=Geometry(
            each, (model.heads,) * each, (model.kv_heads,) * each, (model.head_dim,) * each, (-1,) * each,
            model.vocab, model.positions,
        ),
        max_context=model.capacity,
        prefix=PrefixInfo("static", model.prefix, (1,) * model.prefix, "plain"),
        source={"kind": "benchmark", "architecture": "LlamaForCausalLM"},
    )  # fmt: skip
    prefix = write_prefix(model, folder, manifest)
    write_graph(model, folder / "model.onnx", places, prefix)
    write_graph(model, folder / "gqa.onnx", places, None)
    for name in ("model.onnx", "prefix.bin", "tokenizer.json", "system_prompt.txt"):
        manifest.files[name] = FileEntry.of(folder / name)
    manifest.write(folder / "relay.json")
    say("graphs and prefix")
    return Artifact.open(folder)


# The two sides


class Gqa:
    """GroupQueryAttention with the prompt in every request's cache, in place, driven by addresses alone."""

    def __init__(self, path: Path, model: Model, memory: Memory, batch: int):
        """batch: cache slots, filled with the prefix's keys and values. Raises what ONNX Runtime raises."""
        self.model, self.memory = model, memory
        self.why_no_graph = "on a CPU"
        self.session = self._open(path)
        shape = (batch, model.kv_heads, model.positions, model.head_dim)
        self.caches = {
            (layer, name): memory.zeros(shape, np.dtype(model.dtype))
            for layer in range(model.layers)
            for name in ("key", "value")
        }
        self.logits = memory.zeros((batch * model.vocab,), np.dtype(np.float32))
        self.top = TopTokens(self.provider, memory, cuda_backend.run_options({cuda_backend._NO_WAIT: 1}))
        self.bindings: dict[tuple[int, bool], tuple[Binding, Any]] = {}
        self.most = np.asarray(model.positions, np.int32)
        self.last: Any = None

    def _open(self, path: Path) -> Any:
        self.provider: Any = "CPUExecutionProvider"
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        if not isinstance(self.memory, cuda_backend.DeviceMemory):
            return onnxruntime.InferenceSession(str(path), options, [self.provider], enable_fallback=0)
        options.add_session_config_entry(cuda_backend._RECORD, "1")
        self.provider = (cuda_backend.CUDA, self.memory.provider_options)
        with_graph = (cuda_backend.CUDA, self.memory.provider_options | {"enable_cuda_graph": "1"})
        try:
            session = onnxruntime.InferenceSession(str(path), options, [with_graph], enable_fallback=0)
            self.why_no_graph = ""
        except Exception as error:
            self.why_no_graph = str(error)
            session = onnxruntime.InferenceSession(str(path), options, [self.provider], enable_fallback=0)
        for part in session.get_provider_graph_assignment_info():
            elsewhere = [node.op_type for node in part.get_nodes() if part.ep_name != cuda_backend.CUDA]
            if elsewhere:
                say(f"GQA graph: {len(elsewhere)} nodes on {part.ep_name}: {sorted(set(elsewhere))}")
        return session

    def fill(self, prefix: PrefixFile) -> None:
        """The prefix's keys and values at the head of every slot."""
        for layer, pair in enumerate(prefix.read()):
            for name, tensor in zip(("key", "value"), pair, strict=True):
                cache = self.caches[layer, name]
                if isinstance(self.memory, cuda_backend.DeviceMemory):
                    self._fill_device(cache, self.memory.put(tensor))
                else:
                    cache[:, :, : self.model.prefix] = tensor

    def _fill_device(self, cache: Any, tensor: Any) -> None:
        from relay_attention.runtime import cuda

        kind = cuda.cudart.cudaMemcpyKind.cudaMemcpyDeviceToDevice
        stream = self.memory._stream._stream  # type: ignore[attr-defined]
        batch, heads, capacity, dim = cache.shape
        width, pitch = (length * dim * self.model.itemsize for length in (self.model.prefix, capacity))
        for row in range(batch):
            target = cache.address + row * heads * pitch
            cuda.call("cudaMemcpy2DAsync", target, pitch, tensor.address, width, width, heads, kind, stream)
        self.memory.wait()  # the tensor goes now

    def step(self, input_ids: Any, context_lens: Any, graph: bool) -> None:
        """input_ids [n, 1]; context_lens [n]: tokens of each request beside the prefix."""
        rows = len(input_ids)
        if (rows, graph) not in self.bindings:
            entries = {cuda_backend._GRAPH_ID: rows if graph else -1}
            entries |= {cuda_backend._NO_WAIT: 1} if graph else {}
            made = Binding(self.session, self.memory), cuda_backend.run_options(entries)
            self.bindings[rows, graph] = made
        binding, options = self.bindings[rows, graph]
        if binding.rows != (0, rows):
            for (layer, name), cache in self.caches.items():
                binding.input(PAST[name].format(layer), cache[:rows])
                binding.output(PRESENT[name].format(layer), cache[:rows])
            # read on the host: what a graph is captured with has to hold for all of its replays
            binding.host_input("total_sequence_length", self.most)
            binding.rows = (0, rows)
        lens = np.asarray(context_lens, np.int32) + np.int32(self.model.prefix)
        small = {"input_ids": np.asarray(input_ids, np.int32), "context_lens": lens}
        small["query_lens"] = np.ones(rows, np.int32)
        for name, array in zip(small, self.memory.stage(list(small.values())), strict=True):
            binding.input(name, array)
        if not graph:
            self.total = np.asarray(int(lens.max()) + 1, np.int32)
            binding.host_input("total_sequence_length", self.total)
        self.last = self.memory.view(self.logits, (rows, self.model.vocab))
        binding.output("logits", self.last)
        self.memory.run(self.session, binding.io, options)

    def close(self) -> None:
        self.memory.wait()
        self.bindings.clear()
        self.top.close()
        self.caches.clear()
        self.logits = self.last = self.session = None
        self.memory.close()


@dataclass
class Results:
    """Seconds, medians: by (side, batch, quantity)."""

    times: dict[tuple[str, int, str], float] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    failed: bool = False

    def note(self, *words: object) -> None:
        self.notes.append(" ".join(map(str, words)))
        say(*words)


@contextlib.contextmanager
def part(results: Results, name: str) -> Iterator[None]:
    """A part that may fail alone."""
    say(f"{name} ...")
    try:
        yield
    except Exception as error:
        results.failed = True
        results.note(f"{name} FAILED: {type(error).__name__}: {error}")
        traceback.print_exc()


def median_time(call: Callable[[], Any], count: int) -> float:
    for _ in range(3):  # captures, allocates, warms up
        call()
    times = []
    for _ in range(count):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def checked_inputs(model: Model) -> Any:
    return np.random.default_rng(2).integers(0, model.vocab, (CHECK_STEPS, CHECK_ROWS, 1)).astype(np.int32)


def time_relay(
    artifact: Artifact, model: Model, arguments: argparse.Namespace, results: Results, check_only: bool
) -> Any:
    """Returns the logits [steps, rows, vocab] of the checked steps."""
    batches = arguments.batches
    options = {"device": "cuda" if arguments.cuda else "cpu"}
    decoder = RelayDecoder.load(
        artifact.path, "onnxruntime-cuda", max_batch=max(*batches, CHECK_ROWS), prefill_chunk=512, **options
    )
    backend: Any = decoder._backend
    say(f"RelayDecoder is loaded; cuda_graph {backend.cuda_graph} {backend.cuda_graph_reason}")
    modes = {"relay": False} | ({"relay, graph": True} if backend.cuda_graph else {})
    if not backend.cuda_graph:
        results.note(f"relay without CUDA graphs: {backend.cuda_graph_reason}")
    logits = []
    for graph in modes.values():
        backend.cuda_graph = graph
        for step, ids in enumerate(checked_inputs(model)):
            lens = np.full(CHECK_ROWS, step, np.int32)
            backend.step(0, ids, lens, np.ones_like(lens))
            logits.append(backend.read_logits().copy())
    logits = np.stack(logits)
    if len(modes) == 2:
        compare(results, "relay, replayed beside not", logits[CHECK_STEPS:], logits[:CHECK_STEPS])
    for batch in [] if check_only else batches:
        with part(results, f"relay, {batch} requests"):
            ids = np.random.default_rng(batch).integers(0, model.vocab, (batch, 1)).astype(np.int32)
            lens = np.full(batch, min(CONTEXT, model.capacity - 1), np.int32)
            ones = np.ones(batch, np.int32)

            def step(arrays: Any = (ids, lens, ones)) -> None:
                backend.step(0, *arrays)
                backend._memory.wait()

            def token(arrays: Any = (ids, lens, ones)) -> None:
                backend.step(0, *arrays)
                arrays[0][:, 0] = backend.read_top(TOP)[1][:, 0]

            prompts = np.random.default_rng(3).integers(1, model.vocab, (batch, 8)).tolist()
            params = SamplingParams(max_new_tokens=arguments.new_tokens, ignore_eos=True)
            for side, graph in modes.items():
                backend.cuda_graph = graph
                results.times[side, batch, "step"] = median_time(step, arguments.repeat)
                results.times[side, batch, "token"] = median_time(token, arguments.repeat)
                seen: list[float] = []

                def note(event: Any, seen: list[float] = seen) -> None:
                    if event.index == 0:
                        seen.append(time.perf_counter())

                found = decoder.generate(prompts, params, stream=note)
                if any(result.finish_reason == "error" for result in found):
                    raise RuntimeError(next(result.error for result in found if result.error))
                results.times[side, batch, "decoder"] = statistics.median(np.diff(seen).tolist())
    if not check_only:
        with part(results, "the likeliest tokens"):
            for rows in sorted({min(batches), max(batches)}):
                backend._last_logits = backend._memory.view(backend._logits, (rows, model.vocab))
                taken = median_time(lambda: backend.read_top(TOP), arguments.repeat)
                results.note(f"{TOP} likeliest of {rows} rows: {taken * 1e6:.0f} us")
    decoder.close()
    return logits[-CHECK_STEPS:]


def time_gqa(
    artifact: Artifact, model: Model, arguments: argparse.Namespace, results: Results, expected: Any,
    check_only: bool,
) -> None:  # fmt: skip
    batches = sorted(arguments.batches)
    gqa = None
    while gqa is None:
        slots = max(*batches, CHECK_ROWS)
        memory: Memory = cuda_backend.DeviceMemory(0) if arguments.cuda else HostMemory()
        try:
            gqa = Gqa(artifact.path / "gqa.onnx", model, memory, slots)
        except Exception as error:
            memory.close()
            if len(batches) < 2 or "emory" not in str(error):
                raise
            results.note(f"GQA with {slots} slots: {error}: left out")
            batches.pop()
            gc.collect()
    gqa.fill(artifact.prefix)
    say(f"GQA is loaded; graphs: {gqa.why_no_graph or 'yes'}")
    modes = {"gqa": False} | ({} if gqa.why_no_graph else {"gqa, graph": True})
    if gqa.why_no_graph:
        results.note(f"GQA without CUDA graphs: {gqa.why_no_graph}")
    for side, graph in list(modes.items()):
        with part(results, f"{side}: logits beside relay's"):
            found = []
            for step, ids in enumerate(checked_inputs(model)):
                gqa.step(ids, np.full(CHECK_ROWS, step, np.int32), graph)
                found.append(gqa.memory.get(gqa.last).copy())
            if expected is not None:
                compare(results, f"{side} beside relay", np.stack(found), expected)
            continue
        modes.pop(side)  # it failed
    for batch in [] if check_only else batches:
        with part(results, f"GQA, {batch} requests"):
            ids = np.random.default_rng(batch).integers(0, model.vocab, (batch, 1)).astype(np.int32)
            lens = np.full(batch, min(CONTEXT, model.capacity - 1), np.int32)
            for side, graph in modes.items():

                def step(graph: bool = graph, arrays: Any = (ids, lens)) -> None:
                    gqa.step(*arrays, graph)
                    gqa.memory.wait()

                def token(graph: bool = graph, arrays: Any = (ids, lens)) -> None:
                    gqa.step(*arrays, graph)
                    arrays[0][:, 0] = gqa.top.find(gqa.last, TOP)[1][:, 0]

                results.times[side, batch, "step"] = median_time(step, arguments.repeat)
                results.times[side, batch, "token"] = median_time(token, arguments.repeat)
    gqa.close()


def compare(results: Results, name: str, found: Any, expected: Any) -> None:
    """Logits of the same tokens: differences beside their spread, and how many greedy tokens agree."""
    difference = np.abs(found - expected).max() / expected.std()
    same = int((found.argmax(-1) == expected.argmax(-1)).sum())
    count = math.prod(found.shape[:2])
    right = bool(np.isfinite(found).all() and difference < (1e-3 if found.shape[-1] == TINY.vocab else 0.1))
    results.failed |= not right
    results.note(
        f"{name}: logits differ by {difference:.1e} of their deviation at most, {same} of {count} greedy "
        f"tokens are the same: {'right' if right else 'WRONG'}"
    )


def copy_bandwidth() -> float:
    """Bytes read and written a second by a copy on the device, median."""
    from relay_attention.runtime import cuda

    nbytes = 1 << 30
    buffers = [cuda.DeviceBuffer(nbytes) for _ in range(2)]
    stream = cuda.Stream()
    kind = cuda.cudart.cudaMemcpyKind.cudaMemcpyDeviceToDevice

    def copies() -> None:
        for _ in range(8):
            cuda.call("cudaMemcpyAsync", buffers[0].address, buffers[1].address, nbytes, kind, stream._stream)
        stream.synchronize()

    taken = median_time(copies, 5) / 8
    for buffer in buffers:
        buffer.free()
    stream.close()
    return 2 * nbytes / taken


def print_table(model: Model, arguments: argparse.Namespace, results: Results, bandwidth: float) -> Any:
    """Returns the rows as they go into the JSON file."""
    rows = []
    context = min(CONTEXT, model.capacity - 1)
    own = {"relay": 0, "gqa": model.prefix}
    print(f"\n{model.layers} layers, prefix {model.prefix}, context {context}, {model.dtype}; milliseconds a")
    print(f"token of all requests; floor: bytes over the copy bandwidth, {bandwidth / 1e9:.0f} GB/s.")
    print("Of the decoder the context grows from 8 tokens.\n")
    head = ("requests", "side", "floor", "step", "token", "decoder", "tokens/s", "step/floor", "gqa/relay")
    print("".join(f"{name:>14}" for name in head))
    for batch in arguments.batches:
        sides = [side for side, each, _ in results.times if each == batch]
        best = {
            name: min(
                (
                    results.times.get((side, batch, "token"), math.inf)
                    for side in sides
                    if side.startswith(name)
                ),
                default=math.inf,
            )
            for name in own
        }
        for side in dict.fromkeys(sides):
            name = side.split(",")[0]
            shared = model.prefix if name == "relay" else 0
            keys = (shared + batch * (own[name] + context)) * model.token_bytes
            floor = (model.read_bytes + keys) / bandwidth if bandwidth else math.nan
            step, token, decoder = (
                results.times.get((side, batch, what), math.nan) for what in ("step", "token", "decoder")
            )
            whole = token if math.isnan(decoder) else decoder
            row = {
                "requests": batch, "side": side, "floor_ms": floor * 1e3, "step_ms": step * 1e3,
                "token_ms": token * 1e3, "decoder_ms": decoder * 1e3, "tokens_per_second": batch / whole,
                "step_over_floor": step / floor, "gqa_over_relay_token": best["gqa"] / best["relay"],
            }  # fmt: skip
            rows.append(row)
            cells = [batch, side, *(f"{number:.3f}" for number in list(row.values())[2:6])]
            cells += [f"{row['tokens_per_second']:.0f}"]
            cells += [f"{row[key]:.2f}" for key in ("step_over_floor", "gqa_over_relay_token")]
            print("".join(f"{cell:>14}" for cell in cells))
    print("\n" + "\n".join(results.notes), flush=True)
    return rows


def run(
    model: Model, folder: Path, arguments: argparse.Namespace, results: Results, check_only: bool
) -> None:
    artifact = None
    with part(results, f"writing the model, {model.layers} layers"):
        artifact = write_model(model, folder)
    if artifact is None:
        return
    expected = None
    with part(results, "relay"):
        expected = time_relay(artifact, model, arguments, results, check_only)
    gc.collect()  # what a failure has left on the device
    with part(results, "GQA"):
        time_gqa(artifact, model, arguments, results, expected, check_only)
    gc.collect()


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--layers", type=int, default=32, help="of the model (%(default)s; 16 halves the time)"
    )
    parser.add_argument("--prefix", type=int, default=4096, metavar="P", help="tokens (%(default)s)")
    parser.add_argument("--batches", default="1,8,32,64", help="requests at the same time (%(default)s)")
    parser.add_argument(
        "--new-tokens", type=int, default=64, help="of each request of the decoder (%(default)s)"
    )
    parser.add_argument("--repeat", type=int, default=30, help="timed calls of each kind (%(default)s)")
    parser.add_argument(
        "--folder", type=Path, help="for the model; removed at the end (default: /dev/shm or /tmp)"
    )
    parser.add_argument("--out", type=Path, help="folder for bench_decode.json")
    parser.add_argument(
        "--tiny", action="store_true", help="a tiny model on the CPU provider: no GPU is timed"
    )
    arguments = parser.parse_args()
    arguments.batches = sorted({int(batch) for batch in arguments.batches.split(",")})
    arguments.cuda = not arguments.tiny
    model = TINY if arguments.tiny else Model(layers=arguments.layers, prefix=arguments.prefix)
    model_bytes = sum(math.prod(shape) for shape in model.matrices.values()) * model.itemsize
    folder = arguments.folder
    if folder is None:
        shm = Path("/dev/shm")
        roomy = shm.is_dir() and shutil.disk_usage(shm).free > 1.2 * model_bytes + (1 << 30)
        folder = Path(tempfile.mkdtemp(prefix="relay-bench-", dir=shm if roomy else None))
    results, bandwidth = Results(), math.nan
    say(f"onnxruntime {onnxruntime.__version__}, {model_bytes / 1e9:.1f} GB of weights in {folder}")
    try:
        if arguments.cuda:
            with part(results, "copy bandwidth"):
                cuda_backend._require_cuda()
                from relay_attention.runtime import cuda

                say(*cuda.use_device(0))
                bandwidth = copy_bandwidth()
                say(f"{bandwidth / 1e9:.0f} GB/s")
            run(TINY_GPU, folder / "tiny", arguments, results, check_only=True)
        run(model, folder / "model", arguments, results, check_only=False)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    rows = print_table(model, arguments, results, bandwidth)
    if arguments.out:
        arguments.out.mkdir(parents=True, exist_ok=True)
        found = {"model": vars(model) | {}, "copy_bandwidth": bandwidth, "rows": rows, "notes": results.notes}
        (arguments.out / "bench_decode.json").write_text(json.dumps(found, indent=2), encoding="utf-8")
    say("done" if not results.failed else "done, with failures")
    return int(results.failed)


if __name__ == "__main__":
    sys.exit(main())
