#!/usr/bin/env python3
"""Runs TensorRT on a GPU: prints what held and what did not, each as it is known, and a table at the end.

`make` runs where torch and transformers are and writes artifacts. `check` runs where tensorrt, cuda-bindings
and onnxruntime are; every step is a process of its own, as TensorRT can end its process, so that a step that
fails stops only what needs its result. What times nothing runs first, side by side; then one by one, as
builders time kernels on the GPU: three at once each took ten times as long for it, and timed one another.
`--only` runs the steps named and what they need and is not there from an earlier call (a plan of that level,
peer.npz). scripts/test_tensorrt.sh calls both.

usage: check_tensorrt.py make WORK
       check_tensorrt.py check WORK [--seconds N] [--peer COMMAND] [--level N] [--only NAME[,NAME...]]
       check_tensorrt.py step NAME WORK [--level N]
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import shutil
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import large_model
import numpy as np

ROOT = Path(__file__).parents[1]
PROMPTS = [[5, 6, 7], [9], list(range(20, 60)), [1, 2], [40] * 17, [8, 3, 8, 3]] * 4
TIE = 3e-2  # of the largest logit: what float16 engines may differ by, as in export/verification.py
START = time.monotonic()
OK, FAIL, NOTE = "ok  ", "FAIL", "      . "
DEFAULT_LEVEL = 3  # TensorRT's own
PROFILED = 10  # steps
LARGE: dict[str, dict[str, int]] = {"large": {"chunk": 1}, "large2": {"chunk": 128, "prefill_batch": 8}}


# ---- artifacts ----


def make(work: Path) -> None:
    """Artifacts small/, other/ (another prompt of the same length), short/, long/, input/, and demo/, with
    requests.jsonl and the expected answers."""
    sys.path.insert(0, str(ROOT / "tests/export"))
    import tiny_models
    import transformers

    from relay_attention.export.exporter import export_model

    shape: dict[str, Any] = {
        "vocab_size": 300, "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 3,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64, "max_position_embeddings": 512,
        "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2, "initializer_range": 0.1,
    }  # fmt: skip
    source = tiny_models.make_model(work / "hf_small", transformers.LlamaConfig(**shape))
    common: dict[str, Any] = {"precision": "fp16", "target": "tensorrt", "max_context": 128}
    text = "The quick brown fox jumps over the lazy dog. " * 3
    export_model(source, text + "ab", work / "small", **common)
    export_model(source, text + "ba", work / "other", **common)
    export_model(source, "ab", work / "short", **common)
    export_model(source, text * 2, work / "long", **common)
    export_model(source, text + "ab", work / "input", prefix="input", **common)
    shutil.rmtree(source)
    example = ROOT / "examples/directory"
    directory = [sys.executable, str(example / "make_directory.py"), "--seed", "7", "--requests", "64"]
    subprocess.run([*directory, "-o", str(work)], check=True)
    prompt = (work / "system_prompt.txt").read_text("utf-8")
    export_model(example / "model", prompt, work / "demo", precision="fp16", target="tensorrt")


# ---- steps: each in a process of its own ----


def row(name: str) -> Callable[[Callable[[], str]], None]:
    """Runs a check at once and prints its row; a check that raises is a row FAIL with the reason."""

    def run(check: Callable[[], str]) -> None:
        start = time.monotonic()
        try:
            result, detail = OK, check()
        except Exception as error:
            result, detail = FAIL, f"{type(error).__name__}: {error}".replace("\n", " ")[:600]
            traceback.print_exc()
        print(f"{result}  {name}: {detail} [{time.monotonic() - start:.1f} s]", flush=True)

    return run


def build(work: Path, name: str, level: int | None, **options: Any) -> str:
    """Builds work/name; says what the builder spent its time on, by its own log.

    All builds share a timing cache, unless one is given: what an earlier one has timed is not timed again.
    """
    from relay_attention.export.build import BuildOptions, build_engine

    sizes = {"max_batch": 16, "prefill_batch": 4, "chunk": 32}
    if name in LARGE:
        sizes = {"max_batch": max(large_model.BATCHES), **LARGE[name]}
    common = {"optimization_level": level, "verbose": True, "timing_cache": work / "timing.cache"}
    chosen = BuildOptions(**(sizes | common | options))
    assert chosen.timing_cache is not None
    cached = chosen.timing_cache.stat().st_size if chosen.timing_cache.is_file() else 0
    log = work / f"build-{name}-{level}.log"
    built_at(work, name).unlink(missing_ok=True)
    start = time.monotonic()
    with log.open("w", encoding="utf-8") as stream, contextlib.redirect_stdout(stream):
        path = build_engine(work / name, chosen)
    seconds = time.monotonic() - start
    text = log.read_text("utf-8")
    for line in slowest(text):
        print(f"{NOTE}{name}: {line}", flush=True)
    if re.search(r"^Layer\(", text, re.MULTILINE):  # a row of its own: the plan is there, whatever its types
        row(f"{name}: linear layers run in float16")(lambda: in_float16(linear_layers(text)))
    else:
        print(f"{NOTE}{name}: the builder's log does not say in what types linear layers run", flush=True)
    built_at(work, name).write_text(str(level))
    shown = "its own level" if level is None else f"level {level}"
    before = f"timing cache of {cached / 1e3:.0f} kB before" if cached else "no timing cache before"
    profiles = "decode only" if chosen.chunk == 1 else "decode and prefill"
    return f"{profiles}: {seconds:.1f} s at {shown}, {path.stat().st_size / 1e6:.1f} MB, {before}"


def built_at(work: Path, name: str) -> Path:
    """Holds the level of the plan that is there; absent while it is built and where that failed."""
    return work / f"built-{name}"


def slowest(log: str, count: int = 6) -> list[str]:
    """What the time between the log's lines went into. Where another process has the GPU, the 90th percentile
    of a timing is many times its median."""
    spent: dict[str, list[float]] = {}
    runner = ""
    found = re.findall(r"^TensorRT +([\d.]+) s: (.*)$", log, re.MULTILINE)
    for (before, _), (after, message) in pairwise(found):
        if "Timing Runner: " in message:
            runner = re.sub(r".*\(|\[0x\w*\]|\)$", "", message)
        if message.startswith("Tactic"):  # after a tactic was timed: its time, or for some, its name
            kind = f"timing {runner}"
        elif "Set user's cuda kernel library" in message:  # after Myelin's compiler
            kind = f"compiling {runner}"
        elif "Init builder kernel library" in message:
            kind = "loading the builder's kernels"
        else:
            kind = "other"
        spent.setdefault(kind, []).append(float(after) - float(before))
    return [
        f"{sum(times):6.1f} s: {kind}, {len(times)} x {1e3 * np.median(times):.1f} ms (median; "
        f"90th percentile {1e3 * np.percentile(times, 90):.1f})"
        for kind, times in sorted(spent.items(), key=lambda item: -sum(item[1]))[:count]
    ]


def linear_layers(log: str) -> list[str]:
    """Of a plan's layers, as 8.6 lists them ("Layer(Kind): name, Tactic: 0x1, x (Half[..]) -> y (Half[..])"),
    those that are one product of matrices, or several side by side. Not seen: those in what Myelin compiles
    as a whole, whose line has the types at its borders only."""
    return re.findall(r"^Layer\(\w*(?:Conv|Gemm|MatrixMultiply|FullyConnected)\w*\): (.*)", log, re.MULTILINE)


def in_float16(layers: list[str]) -> str:
    """The artifacts here have no product in float32."""
    wide = [layer.split(",")[0] for layer in layers if "(Float[" in layer]
    assert not wide, f"{len(wide)} of {len(layers)} take or give float32: {', '.join(wide[:3])}"
    return f"all {len(layers)} outside Myelin" if layers else "none outside Myelin"


def load(folder: Path, **options: Any) -> Any:
    from relay_attention.runtime.artifact import Artifact
    from relay_attention.runtime.backend import load_backend

    return load_backend("tensorrt", Artifact.open(folder), **options)


def tokens(folder: Path, backend: str, **options: Any) -> list[tuple[int, ...]]:
    """Greedy tokens of 24 ragged requests through 8 slots, which are reused."""
    from relay_attention.runtime.decoder import RelayDecoder
    from relay_attention.runtime.sampling import SamplingParams

    params = SamplingParams(max_new_tokens=12, ignore_eos=True)
    with RelayDecoder.load(folder, backend=backend, max_batch=8, max_context=96, **options) as decoder:
        return [tuple(result.token_ids) for result in decoder.generate(PROMPTS, params)]


def same(folder: Path, **options: Any) -> str:
    """The same tokens as ONNX Runtime; where they part, that one must have held both for as good as equal."""
    found, expected = tokens(folder, "tensorrt", **options), tokens(folder, "onnxruntime")
    ties = 0
    for index, (ours, theirs) in enumerate(zip(found, expected, strict=True)):
        parted = next((k for k, (a, b) in enumerate(zip(ours, theirs, strict=True)) if a != b), None)
        if parted is None:
            continue
        logits = reference_logits(folder, [[*PROMPTS[index], *ours[:parted]]])[0]
        gap, allowed = logits.max() - logits[ours[parted]], TIE * max(1.0, np.abs(logits).max())
        assert gap <= allowed, f"request {index}, token {parted}: {ours[parted]} is {gap:.3f} below the best"
        ties += 1
    return f"{len(found)} requests, {sum(map(len, found))} tokens, {ties} parted at a tie"


def reference_logits(folder: Path, prompts: list[list[int]], backend: Any = None) -> np.ndarray:
    """Logits after each prompt, of ONNX Runtime on the CPU, or of the backend that is given."""
    from relay_attention.runtime.artifact import Artifact
    from relay_attention.runtime.onnxruntime_backend import OnnxRuntimeBackend

    backend = backend or OnnxRuntimeBackend(Artifact.open(folder))
    backend.allocate(len(prompts), 96)
    lengths = np.array([len(prompt) for prompt in prompts], np.int32)
    ids = np.zeros((len(prompts), lengths.max()), np.int32)
    for index, prompt in enumerate(prompts):
        ids[index, : len(prompt)] = prompt
    backend.step(0, ids, np.zeros(len(prompts), np.int32), lengths)
    logits: np.ndarray = backend.read_logits().copy()
    backend.close()
    return logits


def close_to(found: np.ndarray, expected: np.ndarray) -> str:
    assert np.isfinite(found).all(), "not finite"
    difference, allowed = np.abs(found - expected).max(), TIE * max(1.0, np.abs(expected).max())
    assert difference <= allowed, f"logits differ by {difference:.3f}, {allowed:.3f} are allowed"
    return f"logits within {difference:.1e} of {np.abs(expected).max():.1f}"


def refused(action: Callable[[], Any], *expected: str) -> str:
    from relay_attention.errors import RelayError

    try:
        action()
    except RelayError as error:
        if missing := [part for part in expected if part not in str(error)]:
            raise AssertionError(f"says {error}, without {missing}") from error
        return str(error)[:160]
    raise AssertionError("was not refused")


def step_build(work: Path, name: str, level: int | None) -> None:
    refit = {"refit": False} if name in LARGE else {}
    row(f"{name}: build")(lambda: build(work, name, level, **refit))


def step_rebuild(work: Path, name: str) -> None:
    """After a build that failed: TensorRT's own level, and cuBLAS, so that the rest can be seen at all."""
    from relay_attention.export import build as module

    def without_cudnn(trt: Any, config: Any) -> None:
        config.set_tactic_sources(config.get_tactic_sources() & ~(1 << int(trt.TacticSource.CUDNN)))

    module._without_other_libraries = without_cudnn
    print(f"{NOTE}{name}: once more, at level {DEFAULT_LEVEL} and with cuBLAS", flush=True)
    step_build(work, name, DEFAULT_LEVEL)


def step_agree(work: Path, name: str) -> None:
    """By layer and by token, with and without graphs."""
    folder = work / name
    row(f"{name}: the scheduler's greedy tokens, CUDA graphs, slots reused")(lambda: same(folder))

    @row(f"{name}: verify against ONNX Runtime, by layer")
    def _() -> str:
        from relay_attention.export.compare import compare

        report = compare(folder, "tensorrt")
        assert report.ok, report.table()
        worst = max(layer.max_abs_diff for layer in report.layers)
        return f"logits within {max(r.max_abs_diff for r in report.requests):.1e}, caches {worst:.1e}"

    row(f"{name}: the same without graphs")(lambda: same(folder, cuda_graph=False))

    @row(f"{name}: loaded in a new process")
    def _() -> str:
        command = [sys.executable, __file__, "step", "decode", str(folder)]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        assert [tuple(ids) for ids in json.loads(done.stdout.splitlines()[-1])] == tokens(folder, "tensorrt")
        return "same tokens"


def step_demo(work: Path) -> None:
    """Accuracy of the demo model; its requests have answers."""
    requests = [json.loads(line) for line in (work / "requests.jsonl").read_text().splitlines()]

    @row("demo: accuracy and tokens")
    def _() -> str:
        from relay_attention.runtime.decoder import RelayDecoder

        answers = {}
        for backend in ("tensorrt", "onnxruntime"):
            with RelayDecoder.load(work / "demo", backend=backend, max_batch=16) as decoder:
                results = decoder.generate([request["prompt"] for request in requests])
                answers[backend] = [result.text.strip() for result in results]
        pairs = zip(answers["tensorrt"], requests, strict=True)
        right = sum(answer == request["expected"] for answer, request in pairs)
        equal = sum(a == b for a, b in zip(*answers.values(), strict=True))
        assert right >= 0.95 * len(requests), f"only {right} of {len(requests)} right"
        return f"{right} of {len(requests)} right, {equal} the same as ONNX Runtime's"


def step_large(work: Path, level: int | None, name: str = "large") -> None:
    """Logits against ONNX Runtime on CUDA, and times beside its times, of the same run and method; then where
    a step's time goes. The plan of `large` decodes only: prompts go token by token."""
    folder, peer = work / name, work / "peer.npz"
    from relay_attention.runtime.artifact import Artifact

    vocab = Artifact.open(folder).manifest.geometry.vocab_size
    backend = load(folder)
    backend.allocate(max(large_model.BATCHES), 2 * large_model.CONTEXT)
    theirs = np.load(peer) if peer.is_file() else None
    their_times = json.loads(str(theirs["times"])) if theirs is not None else {}
    for batch in large_model.BATCHES:

        @row(f"{name}: logits at batch {batch} against ONNX Runtime CUDA")
        def _() -> str:
            found = large_model.decode(backend, batch, vocab)  # noqa: B023
            assert theirs is not None, "peer.npz is not there"
            expected = theirs[f"logits{batch}"]  # noqa: B023
            agree = (found.argmax(-1) == expected.argmax(-1)).mean()
            mean = np.abs(found - expected).mean()
            return f"{close_to(found, expected)}, mean {mean:.1e}, best token the same in {agree:.1%}"

    for graph in (True, False):
        backend._use_graphs = graph  # loading 2 GB again would take longer than all else
        for batch in large_model.BATCHES:

            @row(f"{name}: decode at batch {batch}, {'CUDA graph' if graph else 'no graph'}, level {level}")
            def _() -> str:
                ours, other = large_model.decode_times(backend, batch), their_times.get(str(batch))  # noqa: B023
                text = f"step {ours['step']:.3f} ms, token {ours['token']:.3f} ms"
                if other is None:
                    return text
                ratio = {kind: other[kind] / ours[kind] for kind in ours}
                return (
                    f"{text}; ONNX Runtime CUDA {other['step']:.3f}, {other['token']:.3f}: "
                    f"{ratio['step']:.2f}x, {ratio['token']:.2f}x as fast"
                )

    # last: what a profiler is attached to is slower from then on
    row(f"{name}: profile by layer")(lambda: profile(backend, name))
    backend.close()


def profile(backend: Any, name: str) -> str:
    """Milliseconds by TensorRT's own profiler, without CUDA graph, as notes: by kind for each batch size, and
    the slowest layers of the largest. A profiled step may take longer than others."""
    import tensorrt

    class Profiler(tensorrt.IProfiler):
        def __init__(self) -> None:
            tensorrt.IProfiler.__init__(self)
            self.steps: list[dict[str, float]] = []

        def report_layer_time(self, layer_name: str, ms: float) -> None:
            self.steps[-1][layer_name] = self.steps[-1].get(layer_name, 0.0) + ms

    most, profiler = max(large_model.BATCHES), Profiler()
    backend._use_graphs = False
    execution = backend._contexts[0].execution
    execution.enqueue_emits_profile = True  # a step waits and reports
    execution.profiler = profiler
    batches = sorted({1, max(most // 4, 1), most})
    for batch in batches:
        call = large_model.one_token(batch)
        profiler.steps.clear()
        for _ in range(PROFILED + 2):
            profiler.steps.append({})
            backend.step(0, *call)
        steps = profiler.steps[2:]
        assert all(steps), f"a step of {batch} rows reported no layer"
        times = {layer: float(np.median([step.get(layer, 0.0) for step in steps])) for layer in steps[0]}
        kinds: dict[str, float] = dict.fromkeys(
            ("linear layers", "Myelin", "RelayAttention", "the rest"), 0.0
        )
        for layer, ms in times.items():
            kinds[layer_kind(layer)] += ms
        shown = ", ".join(f"{kind} {ms:.3f}" for kind, ms in kinds.items())
        print(f"{NOTE}{name}: profile at batch {batch}: {sum(times.values()):.3f} ms: {shown}", flush=True)
    for layer, ms in sorted(times.items(), key=lambda item: -item[1])[:8]:
        print(f"{NOTE}{name}: profile at batch {batch}: {ms:.3f} ms {layer[:120]}", flush=True)
    return f"medians of {PROFILED} steps at batch {', '.join(map(str, batches))}, no graph"


def layer_kind(layer: str) -> str:
    """By the name that a layer has in the plan; copies for a linear layer are none."""
    if "ForeignNode" in layer:
        return "Myelin"
    if layer.startswith("node_linear"):
        return "linear layers"
    return "RelayAttention" if layer.startswith("RelayAttention") else "the rest"


def step_large2(work: Path, level: int | None) -> None:
    """The same model with two profiles, in a folder of its own: the other plan stays."""
    folder = work / "large2"
    shutil.rmtree(folder, ignore_errors=True)
    # links: its weights are 2 GB
    shutil.copytree(work / "large", folder, copy_function=os.link, ignore=shutil.ignore_patterns("engine"))
    step_build(work, "large2", level)
    step_large(work, level, "large2")


def step_refit(work: Path, level: int | None) -> None:
    """Another prompt of the same length: refitted while loading, by `build`, and while running."""
    from relay_attention.runtime.artifact import Artifact

    folder = work / "refitted"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(work / "other", folder)
    shutil.copytree(work / "small/engine", folder / "engine")
    expected = reference_logits(folder, PROMPTS[:6])
    unlike = reference_logits(work / "small", PROMPTS[:6])
    difference, allowed = np.abs(expected - unlike).max(), TIE * np.abs(expected).max()
    assert difference > allowed, "the two prompts make no difference"

    @row("refit: the plan offers the prefix's weights")
    def _() -> str:
        import tensorrt

        backend = load(work / "small")
        names = set(tensorrt.Refitter(backend._engine, backend._logger).get_all_weights())
        layers = range(backend._manifest.geometry.num_layers)
        wanted = {f"prefix.{layer}.{kind}" for layer in layers for kind in ("key", "value")}
        backend.close()
        missing = sorted(wanted - names)
        assert not missing, f"without {missing[:3]} among {len(names)}: {sorted(names)[:12]}"
        return f"{len(names)} weights"

    @row("refit: by loading the artifact")
    def _() -> str:
        start = time.monotonic()
        backend = load(folder)
        seconds = time.monotonic() - start
        return (
            f"loaded in {seconds:.2f} s; {close_to(reference_logits(folder, PROMPTS[:6], backend), expected)}"
        )

    @row("refit: set_prefix while running")
    def _() -> str:
        backend = load(work / "small")
        start = time.monotonic()
        backend.set_prefix(Artifact.open(folder).prefix)
        seconds = time.monotonic() - start
        text = close_to(reference_logits(folder, PROMPTS[:6], backend), expected)
        return f"{seconds:.3f} s; {text}"

    @row("refit: by `build`, once and for all")
    def _() -> str:
        from relay_attention.export.build import BuildOptions, build_engine

        start = time.monotonic()
        options = BuildOptions(max_batch=16, prefill_batch=4, chunk=32, optimization_level=level)
        plan = build_engine(folder, options)
        seconds = time.monotonic() - start
        described = json.loads(plan.with_suffix(".json").read_text())
        assert described["prefix_tokens"] == Artifact.open(folder).manifest.prefix.token_sha256
        assert seconds < 60, f"{seconds:.1f} s are a build's, not a refit's"
        return f"{seconds:.2f} s; {same(folder)}"


def step_bind(work: Path) -> None:
    """`--prefix input`: other prefixes bound, shorter ones too, a longer one refused."""
    from relay_attention.runtime.artifact import Artifact

    row("input: the scheduler's greedy tokens, CUDA graphs, slots reused")(lambda: same(work / "input"))
    for name in ("other", "short"):

        @row(f"input: the prefix of {name} bound")
        def _() -> str:
            folder = work / name  # noqa: B023
            expected, backend = reference_logits(folder, PROMPTS[:6]), load(work / "input")
            start = time.monotonic()
            backend.set_prefix(Artifact.open(folder).prefix)
            seconds = time.monotonic() - start
            text = close_to(reference_logits(folder, PROMPTS[:6], backend), expected)
            return f"{1e3 * seconds:.1f} ms; {text}"

    @row("refused: prefix longer than built for, bound")
    def _() -> str:
        backend = load(work / "input")
        try:
            longer = Artifact.open(work / "long").prefix
            return refused(lambda: backend.set_prefix(longer), "the engine takes 1 to", "--max-prefix")
        finally:
            backend.close()


def step_refused(work: Path) -> None:
    """Plans that do not fit, and requests beyond the plan."""
    from relay_attention.runtime.artifact import Artifact
    from relay_attention.runtime.engine import EngineInfo, write_engine
    from relay_attention.runtime.tensorrt_backend import this_box

    small, box = work / "small", this_box(0)
    plan = next(small.glob("engine/*.plan"))
    described = plan.with_suffix(".json")
    content, text = plan.read_bytes(), described.read_text()
    info = EngineInfo.read(described)
    version = text.replace(f'"{box.tensorrt}"', '"8.5.3.1"')
    bad: dict[str, tuple[Callable[[], Any], tuple[str, ...]]] = {
        "truncated plan": (lambda: plan.write_bytes(content[:-100]), ("truncated",)),
        "damaged plan": (lambda: plan.write_bytes(content[:-1] + bytes([content[-1] ^ 1])), ("damaged",)),
        "plan that TensorRT itself refuses": (
            lambda: _replace(plan, b"no plan" * 9, info), ("refuses the plan",),
        ),
        "plan of another GPU": (
            lambda: described.write_text(text.replace(box.gpu, "NVIDIA A100")),
            ("does not fit", "NVIDIA A100"),
        ),
        "plan of another TensorRT": (lambda: described.write_text(version), ("does not fit", "8.5.3.1")),
    }  # fmt: skip

    @row("refused: batch beyond the profile")
    def _() -> str:
        backend = load(small)
        try:
            return refused(lambda: backend.allocate(17, 96), "beyond the engine's 16")
        finally:
            backend.close()

    @row("refused: prefix of another length, refitted")
    def _() -> str:
        backend = load(small)
        try:
            return refused(
                lambda: backend.set_prefix(Artifact.open(work / "short").prefix), "part of its plan"
            )
        finally:
            backend.close()

    @row("refused: plan built for a prefix of another length")
    def _() -> str:
        folder = work / "misfit"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(work / "short", folder)
        shutil.rmtree(folder / "engine", ignore_errors=True)
        shutil.copytree(small / "engine", folder / "engine")
        return refused(lambda: load(folder), "built for a prefix of")

    @row("refused: plugin library missing")
    def _() -> str:
        command = [sys.executable, __file__, "step", "decode", str(small)]
        environment = os.environ | {"RELAY_ATTENTION_TENSORRT_LIBRARY": "/nowhere.so"}
        done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
        assert "'/nowhere.so', but there is no such file" in done.stderr, done.stderr[-400:]
        return done.stderr.strip().splitlines()[-1][:160]

    for name, (damage, expected) in bad.items():

        @row(f"refused: {name}")
        def _() -> str:
            damage()  # noqa: B023
            try:
                return refused(lambda: load(small), *expected)  # noqa: B023
            finally:
                write_engine(plan, content, info)
                described.write_text(text)


def step_no_cudnn(work: Path, level: int | None) -> None:
    """Built and decoded with nothing behind cuDNN's and cuBLAS' names: see `without_libraries`."""
    sys.setdlopenflags(os.RTLD_LAZY)  # or Python has every function of them looked up on import

    @row("short: built and decoded without cuDNN and cuBLAS")
    def _() -> str:
        text = f"{build(work, 'short', level)}; {same(work / 'short')}"
        found = mapped_libraries()
        assert not found, f"{', '.join(found)} loaded nevertheless; {text}"
        return f"{text}; neither is loaded"


def without_libraries(folder: Path) -> dict[str, str]:
    """The environment in which a process that asks for cuDNN or cuBLAS gets a library without its functions.

    Leaving their folders out is not enough: libnvinfer_plugin.so.8, which TensorRT 8.6's Python package
    needs, is linked to all three: without them it does not load, and it finds them by a path of its own,
    nvidia/*/lib beside it. LD_LIBRARY_PATH comes before that one. A call of their functions ends the process.
    """
    import _ctypes  # a library that is in the process anyway and has no versions the linker would compare

    folder.mkdir(parents=True, exist_ok=True)
    for name in ("libcudnn.so.8", "libcublas.so.12", "libcublasLt.so.12"):
        (folder / name).unlink(missing_ok=True)
        (folder / name).symlink_to(Path(_ctypes.__file__).resolve())
    before = [part for part in os.environ.get("LD_LIBRARY_PATH", "").split(":") if part]
    others = [part for part in before if "cudnn" not in part and "cublas" not in part]
    return {"LD_LIBRARY_PATH": ":".join([str(folder.resolve()), *others])}


def mapped_libraries() -> list[str]:
    """Files of cuDNN and cuBLAS in this process."""
    paths = {line.split(maxsplit=5)[-1].strip() for line in Path("/proc/self/maps").read_text().splitlines()}
    names = {Path(path).name for path in paths if path.startswith("/")}
    return sorted(name for name in names if name.startswith(("libcudnn", "libcublas")))


def step_levels(work: Path) -> None:
    """What a build costs by level, without a timing cache and with one that has seen the same layers."""
    for level in (1, 0, 2, 3):
        cache = work / f"levels-{level}.cache"
        for state in ("cold", "warm"):

            @row(f"small: build, level {level}, timing cache {state}")
            def _() -> str:
                text = build(work, "small", level, timing_cache=cache, force=True)  # noqa: B023
                return f"{text}; {same(work / 'small')}"

    built_at(work, "small").unlink(missing_ok=True)  # whatever is there now is not what `build:small` makes


def _replace(plan: Path, content: bytes, info: Any) -> None:
    import hashlib

    from relay_attention.runtime.artifact import FileEntry
    from relay_attention.runtime.engine import write_engine

    entry = FileEntry(len(content), hashlib.sha256(content).hexdigest())
    write_engine(plan, content, replace(info, plan=entry))


def run_step(name: str, work: Path, level: int | None) -> None:
    kind, _, argument = name.partition(":")
    steps: dict[str, Callable[[], None]] = {
        "build": lambda: step_build(work, argument, level),
        "rebuild": lambda: step_rebuild(work, argument),
        "agree": lambda: step_agree(work, argument),
        "demo": lambda: step_demo(work),
        "large": lambda: step_large(work, level),
        "large2": lambda: step_large2(work, level),
        "refit": lambda: step_refit(work, level),
        "bind": lambda: step_bind(work),
        "refused": lambda: step_refused(work),
        "no_cudnn": lambda: step_no_cudnn(work, level),
        "levels": lambda: step_levels(work),
        "decode": lambda: print(json.dumps(tokens(work, "tensorrt"))),
    }
    steps[kind]()


# ---- the whole check ----


@dataclass
class Step:
    """One process. needs: seconds that must be left for it to be worth a start; limit: that it may take.
    after: steps without which it makes no sense. uses: steps whose result it takes where there is one.
    made, content: a file that says by its content, or if None by being there, that an earlier call's result
    is there."""

    name: str
    command: list[str]
    needs: float
    limit: float
    after: tuple[str, ...] = ()
    uses: tuple[str, ...] = ()
    made: Path | None = None
    content: str | None = None
    environment: Callable[[], dict[str, str]] = dict
    rows: list[str] = field(default_factory=list)
    state: str = "not run"
    timed_out: bool = False

    def run(self, deadline: float, log: Path) -> None:
        """Prints its rows as they come; one that gives none, or dies, has the row FAIL."""
        environment = (
            os.environ | {"PYTHONUNBUFFERED": "1", "CUDA_MODULE_LOADING": "LAZY"} | self.environment()
        )
        seconds = min(self.limit, deadline - time.monotonic())
        process = subprocess.Popen(
            self.command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment,
            errors="replace",
        )  # fmt: skip
        timer = threading.Timer(seconds, process.kill)
        timer.start()
        last: list[str] = []
        before = len(self.rows)
        assert process.stdout is not None
        with log.open("w", encoding="utf-8") as stream:
            for line in process.stdout:
                stream.write(line)
                last = [*last[-7:], line.strip()] if line.strip() else last
                if line.startswith((OK, FAIL)):
                    self.rows.append(line.rstrip())
                if line.startswith((OK, FAIL, NOTE)):
                    say(line.rstrip())
        code = process.wait()
        timer.cancel()
        self.timed_out = timer.finished.is_set() and code == -9
        if self.timed_out:
            self.add(f"{FAIL}  {self.name}: stopped after {seconds:.0f} s: {' | '.join(last[-2:])[:300]}")
        elif code or len(self.rows) == before:
            summary = last[-1] if last else "printed nothing"
            if not code and "pytest" in self.command and " passed" in summary:
                self.add(f"{OK}  {self.name}: {summary.strip('= ')}")
            else:
                self.add(f"{FAIL}  {self.name}: ended with {code}: {' | '.join(last[-4:])[:900]}")
        self.state = "ok" if self.rows[-1].startswith(OK) else "FAIL"

    def there(self) -> bool:
        if self.made is None or not self.made.is_file():
            return False
        return self.content is None or self.made.read_text() == self.content

    def add(self, line: str) -> None:
        self.rows.append(line)
        say(line)


def say(line: str) -> None:
    print(f"{time.monotonic() - START:6.1f} s  {line}", flush=True)


def plan_steps(work: Path, peer: str | None, level: int) -> tuple[list[Step], list[Step]]:
    """What may run side by side, as it times nothing, and what runs after it, one by one: what has been seen
    least first."""

    def own(name: str, needs: float, limit: float, *after: str, at: int = level, **more: Any) -> Step:
        command = [sys.executable, __file__, "step", name, str(work), "--level", str(at)]
        kind, _, argument = name.partition(":")
        if kind == "build":
            more |= {"made": built_at(work, argument), "content": str(at)}
        return Step(titled(name, at), command, needs, limit, after, **more)

    def titled(name: str, at: int) -> str:
        return name if at == level else f"{name}@{at}"

    def tests(name: str, python: list[str], file: str, *options: str) -> Step:
        command = [*python, "-m", "pytest", "-p", "no:cacheprovider", "-q", "-rf", "--tb=short", *options]
        return Step(name, [*command, str(ROOT / "tests/tensorrt" / file)], 20, 150)

    first, then = [tests("names", [sys.executable], "test_real_tensorrt.py")], []
    if peer:
        first.append(tests("adapters", [peer], "test_adapter_gpu.py", "-m", "gpu"))
    large = bool(peer) and (work / "large").is_dir()
    if peer and large:
        script = [peer, str(ROOT / "scripts/large_model.py")]
        folders = [str(work / "large"), str(work / "large_ort")]
        first.append(Step("fill", [*script, "fill", *folders], 20, 120))
        timing = [*script, "time", "onnxruntime-cuda", folders[1], str(work / "peer.npz")]
        then += [
            own("build:large", 60, 500, "fill"),
            Step("peer", timing, 30, 100, ("fill",), made=work / "peer.npz"),
            own("large", 30, 150, "build:large", uses=("peer",)),
            own("large2", 100, 400, "fill", uses=("peer",)),
        ]
    then += [
        own("build:input", 60, 300),
        own("bind", 10, 60, "build:input"),
        own("build:small", 20, 300),  # by the timings of input, which has the same layers
        own("agree:small", 10, 90, "build:small"),
        own("refit", 10, 60, "build:small"),
        own("refused", 15, 60, "build:small"),
        own("no_cudnn", 20, 300, environment=lambda: without_libraries(work / "without")),
        own("build:demo", 60, 300),
        own("demo", 15, 60, "build:demo"),
    ]
    if large and level < DEFAULT_LEVEL:
        slow = titled("build:large", DEFAULT_LEVEL)
        then.append(own("build:large", 100, 300, "fill", at=DEFAULT_LEVEL))
        then.append(own("large", 25, 90, slow, at=DEFAULT_LEVEL, uses=("peer",)))
    return first, [*then, own("levels", 60, 600)]


def choose(steps: dict[str, Step], only: list[str]) -> set[str]:
    """The steps named, and what they need that is not there; what is there counts as done.

    Raises: SystemExit, with all the names, where one is none."""
    if unknown := [name for name in only if name not in steps]:
        raise SystemExit(f"--only: no step {', '.join(unknown)} here; there are: {', '.join(steps)}")
    chosen: set[str] = set()
    waiting = list(only)
    while waiting:
        step = steps[waiting.pop()]
        if step.name in chosen:
            continue
        if step.name not in only and step.there():
            step.state = "ok"
            say(f"{NOTE}{step.name}: there from before")
            continue
        chosen.add(step.name)
        waiting += [*step.after, *step.uses]
    return chosen


def check(work: Path, seconds: float, peer: str | None, level: int, only: list[str] | None = None) -> int:
    deadline = START + seconds
    logs = work / "logs"
    logs.mkdir(exist_ok=True)
    first, then = plan_steps(work, peer, level)
    steps = {step.name: step for step in (*first, *then)}
    chosen = choose(steps, only) if only else set(steps)
    first, then = ([step for step in part if step.name in chosen] for part in (first, then))

    def run(step: Step) -> None:
        log = logs / f"{step.name.replace(':', '-')}.log"
        step.run(deadline, log)
        kind, _, name = step.name.partition(":")
        if step.timed_out or step.state == "ok":
            return
        if kind == "build" and deadline - time.monotonic() > step.needs:
            step.command = [sys.executable, __file__, "step", f"rebuild:{name.split('@')[0]}", str(work)]
            step.run(deadline, log.with_suffix(".again.log"))

    threads = [threading.Thread(target=run, args=(step,)) for step in first]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for step in then:
        failed = [name for name in step.after if steps[name].state != "ok"]
        if failed:
            step.state = f"not run, needs {', '.join(failed)}"
        elif deadline - time.monotonic() < step.needs:
            step.state = "not run, time was up"
        else:
            run(step)
    steps = {name: step for name, step in steps.items() if name in chosen}
    rows = [line for step in steps.values() for line in step.rows]
    missing = [f"{step.state}: {step.name}" for step in steps.values() if step.state.startswith("not run")]
    passed = sum(line.startswith(OK) for line in rows)
    print("\n" + "\n".join(rows + missing))
    print(f"\n{passed} of {len(rows)} ok, {len(missing)} steps not run, {time.monotonic() - START:.0f} s")
    return 0 if passed == len(rows) and not missing else 1


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    actions = parser.add_subparsers(dest="action", required=True)
    making = actions.add_parser("make")
    making.add_argument("work", type=Path)
    checking = actions.add_parser("check")
    checking.add_argument("work", type=Path)
    checking.add_argument("--seconds", type=float, default=420, help="no step is begun or goes on after it")
    checking.add_argument("--peer", help="command: a Python with onnxruntime-gpu, torch and pytest")
    checking.add_argument("--level", type=int, default=1, help="optimization level of the first builds")
    checking.add_argument(
        "--only", help="steps, with commas between: these, and what they need; a wrong name lists them all"
    )
    one = actions.add_parser("step")
    one.add_argument("name")
    one.add_argument("work", type=Path)
    one.add_argument("--level", type=int)
    arguments = parser.parse_args()
    if arguments.action == "make":
        arguments.work.mkdir(parents=True, exist_ok=True)
        make(arguments.work)
    elif arguments.action == "step":
        run_step(arguments.name, arguments.work, arguments.level)
    else:
        only = arguments.only.split(",") if arguments.only else None
        return check(arguments.work, arguments.seconds, arguments.peer, arguments.level, only)
    return 0


if __name__ == "__main__":
    sys.exit(main())
