#!/usr/bin/env python3
"""Benchmark of the RelayAttention op on a CPU, with ONNX Runtime's own GroupQueryAttention in the same run.

Beside every time stand the bytes that must move, the FLOPs that must be done, the two floors that follow from
ceilings measured in the same run (a large copy, a large matrix product), and time / floor. Contenders take
turns, and the decode steps go round several sets of buffers, more than the caches hold.

Targets (checked with --check): decode at least 5x at B=32, 3x at B=8, 0.9x at B=1; the packed prefix product
at B=32 at least 60% of the rate of the best matrix product measured on the same shapes and threads.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
from numpy.typing import NDArray
from onnx import TensorProto, helper

from relay_attention.plugins import library_path, schema

TARGET_RATIOS = {32: 5.0, 8: 3.0, 1: 0.9}
TARGET_PRODUCT = 0.6
BUFFER_BYTES = 160 << 20
"""Buffers of one contender together: several times the last-level cache."""

Arrays = dict[str, NDArray[Any]]


@dataclass(frozen=True)
class Shape:
    """Sizes of one layer: P prefix tokens, C context tokens a request, the new ones included."""

    heads: int = 32
    kv_heads: int = 8
    head_dim: int = 64
    prefix: int = 2048
    context: int = 64

    def cache_bytes(self, tokens: int) -> int:
        return 2 * tokens * self.kv_heads * self.head_dim * 4

    def flops(self, query_tokens: int, keys: float) -> float:
        return 4.0 * query_tokens * self.heads * self.head_dim * keys


@dataclass
class Row:
    """One measurement. Times in milliseconds."""

    name: str
    milliseconds: float
    best_milliseconds: float
    bytes: float
    flops: float
    floor_milliseconds: float
    over_floor: float


class Bench:
    """Sessions, ceilings and rows of one run."""

    def __init__(self, threads: int, seconds: float) -> None:
        self.threads = threads
        self.seconds = seconds
        self.rows: list[Row] = []
        self.bytes_per_second = 0.0
        self.flops_per_second = 0.0

    def session(self, model: bytes) -> ort.InferenceSession:
        options = ort.SessionOptions()
        options.intra_op_num_threads = self.threads
        options.log_severity_level = 3
        options.register_custom_ops_library(str(library_path()))
        return ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])

    def race(self, contenders: Sequence[Callable[[int], None]]) -> list[list[float]]:
        """Seconds of every call. The contenders take turns of about equal length until the time is over."""
        times: list[list[float]] = [[] for _ in contenders]
        counts = [0] * len(contenders)
        for contender in contenders:
            contender(0)
        start = time.perf_counter()
        rounds = 0
        while rounds < 5 or time.perf_counter() - start < self.seconds:
            for i, contender in enumerate(contenders):
                turn = time.perf_counter()
                while True:
                    before = time.perf_counter()
                    contender(counts[i])
                    after = time.perf_counter()
                    counts[i] += 1
                    times[i].append(after - before)
                    if after - turn > self.seconds / 40:
                        break
            rounds += 1
        return times

    def add(self, name: str, times: list[float], moved: float, flops: float) -> Row:
        floor = max(moved / self.bytes_per_second, flops / self.flops_per_second)
        median = statistics.median(times)
        row = Row(name, median * 1e3, min(times) * 1e3, moved, flops, floor * 1e3, median / floor)
        self.rows.append(row)
        print(
            f"{name:<44}{row.milliseconds:9.3f} ms (best {row.best_milliseconds:8.3f})"
            f"{moved / 1e6:9.1f} MB{flops / 1e9:9.3f} GFLOP   floor {row.floor_milliseconds:7.3f} ms,"
            f" time/floor {row.over_floor:5.2f}",
            flush=True,
        )
        return row


def make_model(domain: str, op: str, inputs: dict[str, tuple[int, int]], attributes: dict[str, Any]) -> bytes:
    """A model of one attention node; inputs: name -> (element type, rank)."""
    outputs = {"output": 3, "present_key": 4, "present_value": 4}
    node = helper.make_node(op, list(inputs), list(outputs), domain=domain, **attributes)
    graph = helper.make_graph(
        [node],
        "attention",
        [helper.make_tensor_value_info(name, kind, [None] * rank) for name, (kind, rank) in inputs.items()],
        [
            helper.make_tensor_value_info(name, TensorProto.FLOAT, [None] * rank)
            for name, rank in outputs.items()
        ],
    )
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid(domain, 1)]
    return onnx.helper.make_model(graph, opset_imports=opsets, ir_version=9).SerializeToString()


def relay_model(shape: Shape) -> bytes:
    kinds = {"T": TensorProto.FLOAT, "I": TensorProto.INT32}
    inputs = {t.name: (kinds[t.type], len(t.shape)) for t in schema.INPUTS if not t.rotary_only}
    attributes = schema.make_attributes(num_heads=shape.heads, kv_num_heads=shape.kv_heads)
    return make_model(schema.DOMAIN, schema.OP_TYPE, inputs, attributes)


def gqa_model(shape: Shape) -> bytes:
    tensor, length = TensorProto.FLOAT, TensorProto.INT32
    inputs = {"query": (tensor, 3), "key": (tensor, 3), "value": (tensor, 3), "past_key": (tensor, 4)}
    inputs |= {"past_value": (tensor, 4), "seqlens_k": (length, 1), "total_sequence_length": (length, 0)}
    return make_model(
        "com.microsoft",
        "GroupQueryAttention",
        inputs,
        {"num_heads": shape.heads, "kv_num_heads": shape.kv_heads},
    )


def normal(rng: np.random.Generator, *dims: int) -> NDArray[Any]:
    return rng.standard_normal(dims, dtype=np.float32)


def relay_feeds(shape: Shape, rng: np.random.Generator, lengths: Sequence[int]) -> Arrays:
    """New tokens for each request: one each after context - 1 others (decoding), or a prefill after none."""
    batch, sequence, dim = len(lengths), max(lengths), shape.head_dim
    decoding = sequence == 1
    return {
        "query": normal(rng, batch, sequence, shape.heads * dim),
        "key": normal(rng, batch, sequence, shape.kv_heads * dim),
        "value": normal(rng, batch, sequence, shape.kv_heads * dim),
        "past_key": normal(rng, batch, shape.kv_heads, shape.context, dim),
        "past_value": normal(rng, batch, shape.kv_heads, shape.context, dim),
        "context_lens": np.full(batch, shape.context - 1 if decoding else 0, np.int32),
        "query_lens": np.asarray(lengths, np.int32),
        "prefix_key": normal(rng, shape.kv_heads, shape.prefix, dim),
        "prefix_value": normal(rng, shape.kv_heads, shape.prefix, dim),
    }


def gqa_feeds(relay: Arrays, rows: slice) -> Arrays:
    """The same attention for some rows of the batch with the whole prompt in each request's cache."""
    count = int(relay["query_lens"][rows].max())
    batch = len(relay["query_lens"][rows])
    feeds = {name: np.ascontiguousarray(relay[name][rows, :count]) for name in ("query", "key", "value")}
    for side in ("key", "value"):
        prefix = np.broadcast_to(relay[f"prefix_{side}"], (batch, *relay[f"prefix_{side}"].shape))
        feeds[f"past_{side}"] = np.concatenate([prefix, relay[f"past_{side}"][rows]], axis=2)
    total = relay["prefix_key"].shape[1] + int(relay["context_lens"][rows].max()) + count
    feeds["seqlens_k"] = np.full(batch, total - 1, np.int32)
    feeds["total_sequence_length"] = np.array(total, np.int32)
    return feeds


class Attention:
    """One session with its buffers bound, caches in place."""

    def __init__(self, session: ort.InferenceSession, feeds: Sequence[Arrays]) -> None:
        self.session = session
        self.outputs: list[NDArray[Any]] = []
        self.kept = feeds
        self.bindings = [self._bind(one) for one in feeds]

    def _bind(self, feeds: Arrays) -> ort.IOBinding:
        binding = self.session.io_binding()
        for name, array in feeds.items():
            binding.bind_input(name, "cpu", 0, array.dtype.type, array.shape, array.ctypes.data)
        output = np.zeros_like(feeds["query"])
        self.outputs.append(output)
        bound = {"output": output, "present_key": feeds["past_key"], "present_value": feeds["past_value"]}
        for name, array in bound.items():
            binding.bind_output(name, "cpu", 0, array.dtype.type, array.shape, array.ctypes.data)
        return binding

    def __call__(self, turn: int) -> None:
        self.session.run_with_iobinding(self.bindings[turn % len(self.bindings)])


def sets_of(one_set_bytes: int) -> int:
    return max(2, -(-BUFFER_BYTES // one_set_bytes))


def measure_ceilings(bench: Bench) -> dict[str, float]:
    """Rates of a large copy (read + write) and of a large matrix product, on the same threads."""
    n = 1024
    product = np_product_session(bench, [n, n], [n, n])
    source, target = np.ones(64 << 20, np.float32), np.empty(64 << 20, np.float32)
    contenders: list[Callable[[int], None]] = [product, lambda _: np.copyto(target, source)]
    names = ["ONNX Runtime MatMul 1024", "copy 256 MB, NumPy, 1 thread"]
    torch = import_torch(bench.threads)
    if torch is not None:
        a, b = torch.randn(n, n), torch.randn(n, n)
        c = torch.empty(n, n)
        torch_source, torch_target = torch.from_numpy(source), torch.from_numpy(target)
        contenders += [lambda _: torch.mm(a, b, out=c), lambda _: torch_target.copy_(torch_source)]
        names += ["torch mm 1024", "copy 256 MB, torch"]
    best = [min(times) for times in bench.race(contenders)]
    rates = {}
    for name, seconds in zip(names, best, strict=True):
        rates[name] = (2 * source.nbytes if "copy" in name else 2.0 * n**3) / seconds / 1e9
        print(f"{name:<44}{rates[name]:9.1f} {'GB/s (read + write)' if 'copy' in name else 'GFLOP/s'}")
    bench.bytes_per_second = max(rate for name, rate in rates.items() if "copy" in name) * 1e9
    bench.flops_per_second = max(rate for name, rate in rates.items() if "copy" not in name) * 1e9
    return rates


def import_torch(threads: int) -> Any:
    try:
        import torch
    except ImportError:
        return None
    torch.set_num_threads(threads)
    return torch


def np_product_session(
    bench: Bench, left: Sequence[int], right: Sequence[int], transposed: bool = False
) -> Callable[[int], None]:
    """A (batched) matrix product in ONNX Runtime on random buffers."""
    domain, op = ("com.microsoft", "FusedMatMul") if transposed else ("", "MatMul")
    node = helper.make_node(op, ["a", "b"], ["c"], domain=domain, **({"transB": 1} if transposed else {}))
    infos = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [None] * len(left)) for name in "abc"]
    graph = helper.make_graph([node], "product", infos[:2], infos[2:])
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("com.microsoft", 1)]
    model = onnx.helper.make_model(graph, opset_imports=opsets, ir_version=9)
    session = bench.session(model.SerializeToString())
    rng = np.random.default_rng(1)
    a, b = normal(rng, *left), normal(rng, *right)
    c = np.zeros((*left[:-1], right[-2] if transposed else right[-1]), np.float32)
    binding = session.io_binding()
    for name, array in (("a", a), ("b", b)):
        binding.bind_input(name, "cpu", 0, np.float32, array.shape, array.ctypes.data)
    binding.bind_output("c", "cpu", 0, np.float32, c.shape, c.ctypes.data)

    def run(_: int, keep: tuple[Any, ...] = (a, b, c)) -> None:
        session.run_with_iobinding(binding)

    return run


def bench_decode(bench: Bench, shape: Shape, batches: Sequence[int]) -> dict[int, float]:
    """One new token for each request of a batch."""
    print(f"\nDecode, {shape}, {bench.threads} threads")
    relay_session, gqa_session = bench.session(relay_model(shape)), bench.session(gqa_model(shape))
    ratios = {}
    for batch in batches:
        rng = np.random.default_rng(batch)
        token_bytes = 4 * batch * (2 * shape.heads + 2 * shape.kv_heads) * shape.head_dim
        relay_bytes = shape.cache_bytes(shape.prefix + batch * shape.context) + token_bytes
        gqa_bytes = shape.cache_bytes(batch * (shape.prefix + shape.context)) + token_bytes
        flops = shape.flops(batch, shape.prefix + shape.context)
        feeds = [relay_feeds(shape, rng, [1] * batch) for _ in range(sets_of(relay_bytes))]
        relay = Attention(relay_session, feeds)
        gqa = Attention(gqa_session, [gqa_feeds(one, slice(0, batch)) for one in feeds[: sets_of(gqa_bytes)]])
        relay(0)
        gqa(0)
        np.testing.assert_allclose(relay.outputs[0], gqa.outputs[0], rtol=1e-4, atol=1e-5)
        relay_times, gqa_times = bench.race([relay, gqa])
        ours = bench.add(f"B={batch} RelayAttention", relay_times, relay_bytes, flops)
        theirs = bench.add(f"B={batch} GroupQueryAttention", gqa_times, gqa_bytes, flops)
        ratios[batch] = theirs.milliseconds / ours.milliseconds
        print(
            f"  -> {ratios[batch]:.2f}x (best against best"
            f" {theirs.best_milliseconds / ours.best_milliseconds:.2f}x);"
            f" caches {shape.cache_bytes(shape.prefix + batch * shape.context) / 1e6:.1f} MB"
            f" against {shape.cache_bytes(batch * (shape.prefix + shape.context)) / 1e6:.1f} MB"
        )
    return ratios


def bench_product(bench: Bench, shape: Shape, batch: int) -> dict[str, float]:
    """The prefix part of a decode step as a matrix product: rate against plain products of the same shapes.

    The op is timed with a context of the new token alone, softmax and all, but its FLOPs are counted for the
    prefix only. Each contender works on one set of buffers, so this is arithmetic, not memory.
    """
    rows = batch * shape.heads // shape.kv_heads
    print(f"\nPacked prefix product, {rows} rows a kv head, B={batch}")
    lone = Shape(shape.heads, shape.kv_heads, shape.head_dim, shape.prefix, 1)
    rng = np.random.default_rng(0)
    relay = Attention(bench.session(relay_model(lone)), [relay_feeds(lone, rng, [1] * batch)])
    heads, dim, keys = shape.kv_heads, shape.head_dim, shape.prefix
    names = ["RelayAttention, prefix alone", "ONNX Runtime QK^T", "ONNX Runtime PV"]
    contenders: list[Callable[[int], None]] = [
        relay,
        np_product_session(bench, [heads, rows, dim], [heads, keys, dim], transposed=True),
        np_product_session(bench, [heads, rows, keys], [heads, keys, dim]),
    ]
    torch = import_torch(bench.threads)
    if torch is not None:
        q, k, v = torch.randn(heads, rows, dim), torch.randn(heads, keys, dim), torch.randn(heads, keys, dim)
        scores, output = torch.empty(heads, rows, keys), torch.empty(heads, rows, dim)
        contenders += [
            lambda _: torch.bmm(q, k.transpose(1, 2), out=scores),
            lambda _: torch.bmm(scores, v, out=output),
        ]
        names += ["torch QK^T", "torch PV"]
    times = bench.race(contenders)
    flops = shape.flops(batch, keys)
    moved = shape.cache_bytes(keys) + 8.0 * batch * shape.heads * dim
    scores_bytes = 4.0 * heads * rows * keys
    rows_of = [bench.add(names[0], times[0], moved, flops)]
    for name, one in zip(names[1:], times[1:], strict=True):
        rows_of.append(bench.add(name, one, moved / 2 + scores_bytes, flops / 2))
    rates = {"relay": flops / rows_of[0].milliseconds / 1e6}
    for i, engine in ((1, "onnxruntime"), (3, "torch")):
        if i < len(rows_of):
            rates[engine] = flops / (rows_of[i].milliseconds + rows_of[i + 1].milliseconds) / 1e6
    best = max(rate for name, rate in rates.items() if name != "relay")
    rates["share"] = rates["relay"] / best
    listed = ", ".join(f"{name} {rate:.0f} GFLOP/s" for name, rate in rates.items() if name != "share")
    print(f"  -> {rates['share']:.0%} of the best plain product (QK^T and PV together: {listed})")
    return rates


def bench_prefill(bench: Bench, shape: Shape, batch: int, tokens: int) -> float:
    """Up to `tokens` new tokens for each of `batch` requests, after the shared prompt.

    GroupQueryAttention refuses several new tokens after a past for more than one request, so it takes one
    call a request; that its caches already hold a copy of the prompt each is not counted.
    """
    shape = Shape(shape.heads, shape.kv_heads, shape.head_dim, shape.prefix, tokens)
    rng = np.random.default_rng(0)
    lengths = [tokens, *(int(n) for n in rng.integers(1, tokens + 1, batch - 1))]
    print(f"\nPrefill of {batch} ragged requests, {sum(lengths)} tokens (at most {tokens} each), {shape}")
    feeds = relay_feeds(shape, rng, lengths)
    relay = Attention(bench.session(relay_model(shape)), [feeds])
    session = bench.session(gqa_model(shape))
    calls = [Attention(session, [gqa_feeds(feeds, slice(b, b + 1))]) for b in range(batch)]

    def gqa(_: int) -> None:
        for call in calls:
            call(0)

    relay(0)
    gqa(0)
    for b, length in enumerate(lengths):
        np.testing.assert_allclose(relay.outputs[0][b, :length], calls[b].outputs[0][0], rtol=1e-4, atol=1e-5)
    relay_times, gqa_times = bench.race([relay, gqa])
    flops = sum(shape.flops(n, shape.prefix + (n + 1) / 2) for n in lengths)
    token_bytes = 4.0 * sum(lengths) * (2 * shape.heads + 2 * shape.kv_heads) * shape.head_dim
    ours = bench.add(
        "RelayAttention, one call",
        relay_times,
        shape.cache_bytes(shape.prefix + sum(lengths)) + token_bytes,
        flops,
    )
    moved = shape.cache_bytes(batch * shape.prefix + sum(lengths)) + token_bytes
    theirs = bench.add(f"GroupQueryAttention, {batch} calls", gqa_times, moved, flops)
    ratio = theirs.milliseconds / ours.milliseconds
    print(f"  -> {ratio:.2f}x (best against best {theirs.best_milliseconds / ours.best_milliseconds:.2f}x)")
    return ratio


def cpu_name() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.split(":")[1].strip()
    return platform.processor()


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--batches", default="1,8,32", help="batch sizes of the decode table")
    parser.add_argument("--prefix", type=int, default=2048, help="prefix tokens P")
    parser.add_argument("--context", type=int, default=64, help="context tokens C of each request")
    parser.add_argument("--heads", type=int, default=32)
    parser.add_argument("--kv-heads", type=int, default=8)
    parser.add_argument("--head-dim", type=int, default=64)
    parser.add_argument("--prefill-tokens", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=4.0, help="time for each comparison")
    parser.add_argument("--json", type=Path, help="also write the numbers there")
    parser.add_argument("--check", action="store_true", help="exit 1 where a target is missed")
    arguments = parser.parse_args()

    shape = Shape(
        arguments.heads, arguments.kv_heads, arguments.head_dim, arguments.prefix, arguments.context
    )
    bench = Bench(arguments.threads, arguments.seconds)
    batches = [int(batch) for batch in arguments.batches.split(",")]
    target = os.environ.get("RELAY_ATTENTION_CPU_TARGET", "best")
    load = os.getloadavg()[0]
    print(
        f"{cpu_name()}, {os.cpu_count()} CPUs, load {load:.1f} before the start;"
        f" ONNX Runtime {ort.__version__}; {arguments.threads} threads, kernels for {target}"
    )
    ceilings = measure_ceilings(bench)
    ratios = bench_decode(bench, shape, batches)
    product = bench_product(bench, shape, max(batches))
    prefill = bench_prefill(bench, shape, max(batches), arguments.prefill_tokens)

    if arguments.json:
        report = {
            "cpu": cpu_name(),
            "load_before": load,
            "onnxruntime": ort.__version__,
            "threads": arguments.threads,
            "kernels": target,
            "shape": asdict(shape),
            "ceilings": ceilings,
            "decode_ratio": ratios,
            "product_gflops": product,
            "prefill_ratio": prefill,
            "rows": [asdict(row) for row in bench.rows],
        }
        arguments.json.write_text(json.dumps(report, indent=2) + "\n")
    missed = [
        f"decode at B={batch}: {ratios[batch]:.2f}x, not {least}x"
        for batch, least in TARGET_RATIOS.items()
        if batch in ratios and ratios[batch] < least
    ]
    if product["share"] < TARGET_PRODUCT:
        missed.append(f"packed prefix product: {product['share']:.0%}, not {TARGET_PRODUCT:.0%}")
    for text in missed:
        print(f"missed: {text}")
    return 1 if arguments.check and missed else 0


if __name__ == "__main__":
    sys.exit(main())
