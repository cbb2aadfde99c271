"""Times the CUDA kernel against everything a user could pick instead, on one GPU, in one run.

    python scripts/bench_gpu.py --out results            # the full grid
    python scripts/bench_gpu.py --out results --quick    # a dozen points
    python scripts/bench_gpu.py --out results --coarse   # 96 points of the grid
    python scripts/bench_gpu.py --out results --tune     # sweeps the kernel's knobs at a few points

Times are medians of CUDA-event times over replays of a CUDA graph that holds one call for each of several
input sets (together larger than L2), divided by the sets. Beside each stand the floor, from the bytes and
FLOPs that must move and this machine's own copy bandwidth and matrix rate, and time / floor. Writes
bench_gpu.json, bench_gpu.png.

Peers, each with the same keys and values:
  flash / cudnn      torch SDPA over the whole prompt of each request (the queries of a group as rows)
  two calls          torch SDPA over the prefix + torch SDPA over the contexts, merged: the relay of the paper
  flashinfer         its multi-level cascade wrapper, where the package is there
  ort gqa            ONNX Runtime's GroupQueryAttention over the whole prompt, where it has CUDA
                     (a host loop around run_with_iobinding: no graph, so a long queue hides the launches)
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests" / "gpu"))
from cuda_library import CudaLibrary
from relay_cuda import FLOAT16, Params, Tuning

HEADS = [(32, 32), (32, 8), (64, 8), (8, 1)]
BATCHES = [1, 4, 8, 16, 32, 64, 128, 256]
PREFIXES = [512, 1024, 2048, 8192, 32768]
CONTEXTS = [128, 512]
L2_BYTES = 150 << 20  # input sets together exceed this several times over
MEMORY = 40 << 30  # of all input sets of one implementation
BUDGET_MS = 60.0  # of the timed replays of one implementation at one point


@dataclass(frozen=True)
class Point:
    num_heads: int
    kv_num_heads: int
    head_dim: int
    batch: int
    prefix: int
    context: int  # keys of each request's own, the new token included

    @property
    def group(self) -> int:
        return self.num_heads // self.kv_num_heads

    @property
    def bytes(self) -> int:
        row = 2 * self.head_dim
        keys = 2 * self.kv_num_heads * (self.prefix + self.batch * self.context)
        return row * (keys + 2 * self.batch * (self.num_heads + self.kv_num_heads))

    @property
    def flops(self) -> int:
        return 4 * self.batch * self.num_heads * self.head_dim * (self.prefix + self.context)

    @property
    def unshared_bytes(self) -> int:
        return 4 * self.head_dim * self.kv_num_heads * self.batch * (self.prefix + self.context)


@dataclass
class Result:
    point: Point
    floor_us: float
    bound: str
    plan: dict[str, int]
    empty_us: float
    times_us: dict[str, float] = field(default_factory=dict)
    errors: dict[str, float] = field(default_factory=dict)
    notes: dict[str, str] = field(default_factory=dict)


def sets_for(bytes_each: int, most: int = 12) -> int:
    """How many input sets keep L2 from helping, as far as memory allows."""
    return max(1, min(most, 1 + L2_BYTES // max(1, bytes_each), MEMORY // max(1, bytes_each)))


def graph_time(calls: list[Callable[[], Any]], budget_ms: float = BUDGET_MS) -> float:
    """Microseconds a call: median over replays of one graph that makes all `calls` one after the other,
    for budget_ms or three replays, whichever takes longer."""
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for timed in (False, True):
            if timed:
                start.record()
            for call in calls:
                call()
        end.record()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    rounds = max(1, int(budget_ms / 4 / max(start.elapsed_time(end), 1e-3)))  # so that replays fit the budget
    repeat = max(1, min(16 // len(calls), rounds))
    with torch.cuda.graph(graph):
        for _ in range(repeat):
            for call in calls:
                call()
    count = repeat * len(calls)
    for _ in range(2):
        graph.replay()
    times: list[float] = []
    while len(times) < 3 or (sum(times) < budget_ms and len(times) < 50):
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return statistics.median(times) * 1000 / count


def measure_ceilings() -> dict[str, float]:
    source = torch.empty(1 << 30, dtype=torch.uint8, device="cuda").random_()
    target = torch.empty_like(source)
    copy = graph_time([lambda: target.copy_(source)], budget_ms=200)
    a, b = (torch.randn(8192, 8192, dtype=torch.float16, device="cuda") for _ in range(2))
    product = graph_time([lambda: torch.mm(a, b)], budget_ms=400)
    return {"copy_tb_s": 2 * source.numel() / copy / 1e6, "matmul_tflop_s": 2 * 8192**3 / product / 1e6}


class Inputs:
    """One set of fp16 tensors; the whole prompt of each request is made on demand."""

    def __init__(self, point: Point, seed: int) -> None:
        generator = torch.Generator("cuda").manual_seed(seed)

        def random(*shape: int) -> torch.Tensor:
            return torch.randn(*shape, dtype=torch.float16, device="cuda", generator=generator)

        p = point
        self.point = point
        self.query = random(p.batch, 1, p.num_heads * p.head_dim)
        self.key = random(p.batch, 1, p.kv_num_heads * p.head_dim)
        self.value = random(p.batch, 1, p.kv_num_heads * p.head_dim)
        self.prefix = [random(p.kv_num_heads, p.prefix, p.head_dim) for _ in range(2)]
        self.past = [random(p.batch, p.kv_num_heads, p.context, p.head_dim) for _ in range(2)]
        for cache, new in zip(self.past, (self.key, self.value), strict=True):
            cache[:, :, -1] = new.view(p.batch, p.kv_num_heads, p.head_dim)
        self.context_lens = torch.full((p.batch,), p.context - 1, dtype=torch.int32, device="cuda")
        self.query_lens = torch.ones_like(self.context_lens)
        # [B, Hkv, G, D]: the queries of a group as rows
        self.rows = self.query.view(p.batch, p.kv_num_heads, p.group, p.head_dim)

    def whole(self) -> list[torch.Tensor]:
        """[B, Hkv, P + C, D]: what a cache without sharing holds."""
        p = self.point
        return [
            torch.cat([prefix.expand(p.batch, -1, -1, -1), past], 2)
            for prefix, past in zip(self.prefix, self.past, strict=True)
        ]


class Relay:
    """Our kernel over some input sets."""

    def __init__(self, library: CudaLibrary, inputs: list[Inputs], tuning: Tuning | None = None) -> None:
        self.library = library
        self.tuning = tuning or Tuning()
        self.inputs = inputs
        self.outputs = [torch.full_like(x.query, float("nan")) for x in inputs]
        self.params = [self._params(x, y) for x, y in zip(inputs, self.outputs, strict=True)]
        self.workspace = torch.empty(
            library.workspace_bytes(self.params[0]), dtype=torch.uint8, device="cuda"
        )

    @staticmethod
    def _params(x: Inputs, output: torch.Tensor) -> Params:
        p = x.point
        return Params(
            query=x.query.data_ptr(), key=x.key.data_ptr(), value=x.value.data_ptr(),
            past_key=x.past[0].data_ptr(), past_value=x.past[1].data_ptr(),
            present_key=x.past[0].data_ptr(), present_value=x.past[1].data_ptr(),
            context_lens=x.context_lens.data_ptr(), query_lens=x.query_lens.data_ptr(),
            prefix_key=x.prefix[0].data_ptr(), prefix_value=x.prefix[1].data_ptr(), output=output.data_ptr(),
            batch=p.batch, sequence=1, num_heads=p.num_heads,
            kv_num_heads=p.kv_num_heads, head_dim=p.head_dim, max_context=p.context,
            prefix_length=p.prefix, local_window_size=-1, dtype=FLOAT16,
        )  # fmt: skip

    def calls(self) -> list[Callable[[], None]]:
        launch, tuning, workspace = self.library.launch, self.tuning, self.workspace
        return [lambda p=p: launch(p, tuning, workspace) for p in self.params]  # type: ignore[misc]


def two_calls(x: Inputs) -> torch.Tensor:
    """The relay of the paper: two of torch's flash attentions and a merge. [B, Hkv, G, D]"""
    p = x.point
    flash = torch.ops.aten._scaled_dot_product_flash_attention
    rows = x.rows.transpose(0, 1).reshape(1, p.kv_num_heads, p.batch * p.group, p.head_dim)
    prefix = flash(rows, x.prefix[0][None], x.prefix[1][None])
    own = flash(x.rows, x.past[0], x.past[1])
    prefix_out = prefix[0].reshape(p.kv_num_heads, p.batch, p.group, p.head_dim).transpose(0, 1)
    prefix_lse = prefix[1].reshape(p.kv_num_heads, p.batch, p.group).transpose(0, 1)
    return merge(prefix_out, prefix_lse, own[0], own[1])


def _merge(a: torch.Tensor, a_lse: torch.Tensor, b: torch.Tensor, b_lse: torch.Tensor) -> torch.Tensor:
    weight = torch.sigmoid(a_lse - b_lse)[..., None]
    return (weight * a.float() + (1 - weight) * b.float()).half()


merge = torch.compile(_merge, dynamic=True)


def sdpa(backend: SDPBackend, rows: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    with sdpa_kernel(backend):
        return scaled_dot_product_attention(rows, key, value)


def flashinfer_cascade(inputs: list[Inputs]) -> list[Callable[[], torch.Tensor]]:
    import flashinfer  # type: ignore[import-not-found]

    p, page = inputs[0].point, 16
    prefix_pages, own_pages = p.prefix // page, -(-p.context // page)
    calls = []
    for x in inputs:
        pages = prefix_pages + p.batch * own_pages
        cache = torch.zeros(pages, 2, page, p.kv_num_heads, p.head_dim, dtype=torch.float16, device="cuda")
        for i in range(2):
            prefix = x.prefix[i].transpose(0, 1).reshape(prefix_pages, page, p.kv_num_heads, p.head_dim)
            cache[:prefix_pages, i] = prefix
            own = torch.zeros(
                p.batch, own_pages * page, p.kv_num_heads, p.head_dim, dtype=torch.float16, device="cuda"
            )
            own[:, : p.context] = x.past[i].transpose(1, 2)
            cache[prefix_pages:, i] = own.view(-1, page, p.kv_num_heads, p.head_dim)
        workspace = torch.empty(256 << 20, dtype=torch.uint8, device="cuda")
        wrapper = flashinfer.MultiLevelCascadeAttentionWrapper(2, workspace, "NHD")

        def ints(values: Any) -> torch.Tensor:
            return torch.tensor(list(values), dtype=torch.int32, device="cuda")

        wrapper.plan(
            [ints([0, p.batch]), ints(range(p.batch + 1))],
            [ints([0, prefix_pages]), ints(range(0, p.batch * own_pages + 1, own_pages))],
            [ints(range(prefix_pages)), ints(range(prefix_pages, pages))],
            [ints([page]), ints([p.context - (own_pages - 1) * page] * p.batch)],
            p.num_heads, p.kv_num_heads, p.head_dim, page,
        )  # fmt: skip
        query = x.query.view(p.batch, p.num_heads, p.head_dim)
        calls.append(lambda w=wrapper, q=query, c=cache: w.run(q, c))  # type: ignore[misc]
    return calls


def ort_gqa_time(x: Inputs, rounds: int = 50) -> float:
    """Microseconds a run of one GroupQueryAttention node over the whole prompt."""
    import numpy as np
    import onnxruntime as ort
    from onnx import TensorProto, helper

    if "CUDAExecutionProvider" not in ort.get_available_providers():
        raise ImportError("onnxruntime has no CUDAExecutionProvider here")
    p, half, whole = x.point, TensorProto.FLOAT16, x.point.prefix + x.point.context
    shapes = {
        "query": [p.batch, 1, p.num_heads * p.head_dim],
        "key": [p.batch, 1, p.kv_num_heads * p.head_dim],
        "value": [p.batch, 1, p.kv_num_heads * p.head_dim],
        "past_key": [p.batch, p.kv_num_heads, whole, p.head_dim],
        "past_value": [p.batch, p.kv_num_heads, whole, p.head_dim],
    }
    lengths = {"seqlens_k": [p.batch], "total_sequence_length": []}
    node = helper.make_node(
        "GroupQueryAttention", [*shapes, *lengths], ["output", "present_key", "present_value"],
        domain="com.microsoft", num_heads=p.num_heads, kv_num_heads=p.kv_num_heads,
    )  # fmt: skip
    inputs = [helper.make_tensor_value_info(n, half, s) for n, s in shapes.items()]
    inputs += [helper.make_tensor_value_info(n, TensorProto.INT32, s) for n, s in lengths.items()]
    results = {
        "output": shapes["query"],
        "present_key": shapes["past_key"],
        "present_value": shapes["past_value"],
    }
    outputs = [helper.make_tensor_value_info(n, half, s) for n, s in results.items()]
    model = helper.make_model(
        helper.make_graph([node], "gqa", inputs, outputs), ir_version=9,
        opset_imports=[helper.make_opsetid("", 17), helper.make_opsetid("com.microsoft", 1)],
    )  # fmt: skip
    options = ort.SessionOptions()
    # Not the default stream: its handle is 0, which ONNX Runtime takes for none; events would time nothing.
    stream = torch.cuda.Stream()
    provider = ("CUDAExecutionProvider", {"user_compute_stream": str(stream.cuda_stream)})
    session = ort.InferenceSession(model.SerializeToString(), options, providers=[provider])
    past = x.whole()
    output = torch.empty_like(x.query)
    seqlens = torch.full((p.batch,), whole - 1, dtype=torch.int32, device="cuda")
    tensors = dict(
        query=x.query, key=x.key, value=x.value, past_key=past[0], past_value=past[1], seqlens_k=seqlens
    )
    binding = session.io_binding()
    for name, tensor in tensors.items():
        kind = np.int32 if tensor.dtype == torch.int32 else np.float16
        binding.bind_input(name, "cuda", 0, kind, list(tensor.shape), tensor.data_ptr())
    binding.bind_ortvalue_input(
        "total_sequence_length", ort.OrtValue.ortvalue_from_numpy(np.array(whole, np.int32))
    )
    for name, tensor in (("output", output), ("present_key", past[0]), ("present_value", past[1])):
        binding.bind_output(name, "cuda", 0, np.float16, list(tensor.shape), tensor.data_ptr())
    run_options = ort.RunOptions()
    run_options.add_run_config_entry("disable_synchronize_execution_providers", "1")
    torch.cuda.synchronize()  # the tensors are made on another stream
    for _ in range(5):
        session.run_with_iobinding(binding, run_options)
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    times = []
    for _ in range(5):
        start.record(stream)
        for _ in range(rounds):
            session.run_with_iobinding(binding, run_options)
        end.record(stream)
        end.synchronize()
        times.append(start.elapsed_time(end) * 1000 / rounds)
    return statistics.median(times)


def relative_error(got: torch.Tensor, want: torch.Tensor) -> float:
    got, want = got.double().flatten(), want.double().flatten()
    error = float((got - want).norm() / want.norm())
    return error if error == error else float("inf")


def exact(x: Inputs) -> torch.Tensor:
    """float64, [B, Hkv, G, D], of the first two requests."""
    n = min(2, x.point.batch)
    parts = []
    for b in range(n):
        key, value = (torch.cat([x.prefix[i], x.past[i][b]], 1).double() for i in range(2))
        score = x.rows[b].double() @ key.transpose(1, 2) * x.point.head_dim**-0.5
        parts.append(torch.softmax(score, -1) @ value)
    return torch.stack(parts)


def bench_point(
    library: CudaLibrary, point: Point, ceilings: dict[str, float], peers: set[str], budget_ms: float
) -> Result:
    memory = point.bytes / ceilings["copy_tb_s"] / 1e6
    compute = point.flops / ceilings["matmul_tflop_s"] / 1e6
    shared = [Inputs(point, seed) for seed in range(sets_for(point.bytes))]
    relay = Relay(library, shared)
    library.launch(relay.params[0], relay.tuning, relay.workspace)
    result = Result(
        point, max(memory, compute), "memory" if memory > compute else "compute",
        library.plan(relay.params[0]),
        graph_time([lambda: library.empty_launch(relay.params[0])] * 4),
    )  # fmt: skip
    want = exact(shared[0])

    def record(name: str, calls: list[Callable[[], Any]], output: torch.Tensor | None = None) -> None:
        got = calls[0]()
        rows = (output if output is not None else got).reshape(
            point.batch, point.kv_num_heads, point.group, point.head_dim
        )[:2]
        result.errors[name] = relative_error(rows, want)
        result.times_us[name] = graph_time(calls, budget_ms)

    def attempt(name: str, action: Callable[[], None]) -> None:
        if name not in peers:
            return
        try:
            action()
        except Exception as error:  # a peer that cannot run is a finding, not an end
            result.notes[name] = (
                f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"[:200]
            )
            torch.cuda.synchronize()

    record("relay", relay.calls(), relay.outputs[0])
    pairs = [lambda x=x: two_calls(x) for x in shared]  # type: ignore[misc]
    attempt("two calls", lambda: record("two calls", pairs))
    attempt("flashinfer", lambda: record("flashinfer", flashinfer_cascade(shared)))

    if point.unshared_bytes > MEMORY:
        result.notes["whole prompt"] = f"needs {point.unshared_bytes >> 30} GiB a set"
        return result
    if peers & {"flash", "cudnn"}:
        whole = [(x.rows, *x.whole()) for x in shared[: sets_for(point.unshared_bytes)]]
        for name, backend in (("flash", SDPBackend.FLASH_ATTENTION), ("cudnn", SDPBackend.CUDNN_ATTENTION)):
            calls = [lambda w=w, backend=backend: sdpa(backend, *w) for w in whole]  # type: ignore[misc]
            attempt(name, lambda name=name, calls=calls: record(name, calls))  # type: ignore[misc]
        del whole

    def ort_gqa() -> None:
        result.times_us["ort gqa"] = ort_gqa_time(shared[0])

    attempt("ort gqa", ort_gqa)
    return result


def tune(library: CudaLibrary, point: Point) -> list[dict[str, Any]]:
    inputs = [Inputs(point, seed) for seed in range(sets_for(point.bytes))]
    found = []
    hopper = [
        dict(algorithm=3, prefix_rows=rows, pipeline_depth=depth, copies_in_flight=copies,
             prefix_cost=cost[0], context_cost=cost[1])
        for rows, depth, copies, cost in itertools.product(
            (64, 128), (6, 8, 24), (2, 3, 4, 6), ((16, 17), (1, 1), (4, 3), (3, 4))
        )
    ]  # fmt: skip
    portable = [
        dict(algorithm=2, prefix_rows=rows, blocks_per_sm=blocks, pipeline_depth=depth,
             prefix_cost=cost[0], context_cost=cost[1])
        for rows, blocks, depth, cost in itertools.product(
            (16, 64), (1, 2, 3), (3, 4, 6), ((1, 1), (2, 1), (1, 2))
        )
    ]  # fmt: skip
    for knobs in hopper + portable:
        tuning = Tuning(**knobs)
        relay = Relay(library, inputs, tuning)
        try:
            time = graph_time(relay.calls(), budget_ms=10)
        except RuntimeError as error:
            print(f"  {knobs}: {error}")
            continue
        found.append({**knobs, "us": time})
    found.sort(key=lambda entry: entry["us"])
    return found


def print_result(r: Result) -> None:
    p = r.point
    peers = {name: time for name, time in r.times_us.items() if name != "relay"}
    best = min(peers, key=lambda name: peers[name]) if peers else None
    ratio = f"{peers[best] / r.times_us['relay']:5.2f}x {best}" if best else ""
    print(
        f"{p.num_heads:3}/{p.kv_num_heads:<2} D{p.head_dim:<3} B{p.batch:<3} P{p.prefix:<5} C{p.context:<4}"
        f" {r.times_us['relay']:8.1f} us  floor {r.floor_us:7.1f} ({r.bound:7})"
        f" x{r.times_us['relay'] / r.floor_us:5.2f}"
        f"  empty {r.empty_us:4.1f}  error {r.errors['relay']:.1e}  best peer {ratio}",
        flush=True,
    )


def plot(results: list[Result], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    shapes = sorted({(r.point.num_heads, r.point.kv_num_heads, r.point.head_dim) for r in results})
    figure, axes = plt.subplots(2, len(shapes), figsize=(4 * len(shapes), 7), squeeze=False)
    for column, shape in enumerate(shapes):
        own = [r for r in results if (r.point.num_heads, r.point.kv_num_heads, r.point.head_dim) == shape]
        own = [r for r in own if r.point.context == own[0].point.context]
        for prefix in sorted({r.point.prefix for r in own}):
            line = sorted((r for r in own if r.point.prefix == prefix), key=lambda r: r.point.batch)
            batches = [r.point.batch for r in line]
            axes[0][column].plot(
                batches, [r.times_us["relay"] / r.floor_us for r in line], "o-", label=f"P {prefix}"
            )
            peers = [
                min((t for n, t in r.times_us.items() if n != "relay"), default=float("nan")) for r in line
            ]
            speedups = [peer / r.times_us["relay"] for peer, r in zip(peers, line, strict=True)]
            axes[1][column].plot(batches, speedups, "o-", label=f"P {prefix}")
        axes[0][column].set(title="{}/{} heads, D {}".format(*shape), xscale="log", ylabel="time / floor")
        axes[1][column].set(xscale="log", yscale="log", xlabel="batch", ylabel="best peer / relay")
        axes[1][column].axhline(1, color="gray", lw=0.5)
        axes[0][column].legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def grid(quick: bool, coarse: bool = False) -> list[Point]:
    if coarse:
        return [
            Point(hq, hkv, d, batch, prefix, 128)
            for (hq, hkv), d, prefix, batch in itertools.product(
                HEADS, (128, 64), (512, 2048, 8192), (1, 8, 32, 128)
            )
        ]
    if quick:
        cases = [(32, 8, 8, 1024), (32, 8, 8, 4096), (32, 8, 32, 1024), (32, 8, 32, 4096), (32, 8, 128, 4096),
                 (32, 8, 32, 32768), (32, 32, 32, 4096), (32, 8, 1, 8192), (64, 8, 64, 8192),
                 (8, 1, 64, 8192),
                 (32, 8, 256, 8192), (32, 8, 4, 512)]  # fmt: skip
        return [Point(hq, hkv, 128, batch, prefix, 128) for hq, hkv, batch, prefix in cases]
    return [
        Point(hq, hkv, d, batch, prefix, context)
        for (hq, hkv), d, context, prefix, batch in itertools.product(
            HEADS, (128, 64), CONTEXTS, PREFIXES, BATCHES
        )
    ]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="folder for bench_gpu.json and bench_gpu.png")
    parser.add_argument("--quick", action="store_true", help="a dozen points instead of the grid")
    parser.add_argument("--coarse", action="store_true", help="96 points of the grid")
    parser.add_argument("--tune", action="store_true", help="sweep the kernel's knobs at the quick points")
    parser.add_argument("--library", type=Path, help="librelay_attention_cuda.so")
    parser.add_argument("--budget", type=float, default=BUDGET_MS, help="milliseconds of replays a time")
    parser.add_argument(
        "--peers",
        nargs="*",
        default=["two calls", "flash", "cudnn", "flashinfer", "ort gqa"],
        help="who else to time",
    )
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("bench_gpu.py needs an NVIDIA GPU: torch sees none")
    arguments.out.mkdir(parents=True, exist_ok=True)
    library = CudaLibrary(arguments.library)
    ceilings = measure_ceilings()
    device = torch.cuda.get_device_name()
    print(f"{device}: copy {ceilings['copy_tb_s']:.2f} TB/s, matmul {ceilings['matmul_tflop_s']:.0f} TFLOP/s")
    document: dict[str, Any] = {"device": device, "torch": torch.__version__, "ceilings": ceilings}
    target = arguments.out / "bench_gpu.json"
    if arguments.tune:
        document["tuning"] = []
        for point in grid(quick=True):
            found = tune(library, point)
            print(point, *found[:3], sep="\n  ", flush=True)
            document["tuning"].append({"point": asdict(point), "found": found})
            target.write_text(json.dumps(document, indent=1))
        return
    results: list[Result] = []
    document["results"] = []
    for point in grid(arguments.quick, arguments.coarse):
        results.append(bench_point(library, point, ceilings, set(arguments.peers), arguments.budget))
        torch.cuda.empty_cache()
        print_result(results[-1])
        document["results"].append(asdict(results[-1]))
        target.write_text(json.dumps(document, indent=1))  # what there is survives a time limit
    plot(results, arguments.out / "bench_gpu.png")
    for note in sorted({f"{name}: {text}" for r in results for name, text in r.notes.items()}):
        print("note:", note)


if __name__ == "__main__":
    main()
