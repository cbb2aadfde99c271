#!/usr/bin/env python3
"""Runs the TensorRT engine on a GPU and prints a table of what held and what did not.

Two parts, as the GPU machine has two Pythons: `make` runs where torch and transformers are and writes
artifacts; `check` runs where tensorrt, cuda-bindings and onnxruntime are. scripts/test_tensorrt.sh calls
both.

usage: check_tensorrt.py make WORK [--demo HF_FOLDER SYSTEM_PROMPT] [--large]
       check_tensorrt.py check WORK [--large]
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

ROWS: list[tuple[str, str, str]] = []
PROMPTS = [[5, 6, 7], [9], list(range(20, 60)), [1, 2], [40] * 17, [8, 3, 8, 3]] * 4


def make(work: Path, demo: list[str] | None, large: bool) -> None:
    """Artifacts small/, other/ (another prompt of the same length), input/, and demo/ and large/ if asked
    for."""
    sys.path.insert(0, str(Path(__file__).parents[1] / "tests/export"))
    import tiny_models
    import transformers

    from relay_attention.export.exporter import export_model

    shape: dict[str, Any] = {
        "vocab_size": 300, "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 3,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64, "max_position_embeddings": 512,
        "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2, "initializer_range": 0.1,
    }  # fmt: skip
    small = tiny_models.make_model(work / "hf_small", transformers.LlamaConfig(**shape))
    common: dict[str, Any] = {"precision": "fp16", "target": "tensorrt"}
    text = "The quick brown fox jumps over the lazy dog. " * 3
    export_model(small, text + "ab", work / "small", max_context=128, **common)
    export_model(small, text + "ba", work / "other", max_context=128, **common)
    export_model(small, text + "ab", work / "input", max_context=128, prefix="input", **common)
    export_model(small, "ab", work / "short", max_context=128, **common)
    if demo:
        prompt = Path(demo[1]).read_text("utf-8")
        export_model(demo[0], prompt, work / "demo", **common)
    if large:  # the geometry of Llama 3.2 1B, random
        shape |= {
            "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads":
            32, "num_key_value_heads": 8, "max_position_embeddings": 4096, "initializer_range": 0.02,
        }  # fmt: skip
        source = tiny_models.make_model(work / "hf_large", transformers.LlamaConfig(**shape))
        export_model(source, "x1" * 1023, work / "large", max_context=512, template="plain", **common)
        shutil.rmtree(source)


def row(name: str) -> Callable[[Callable[[], str]], None]:
    """Runs a check at once and keeps its row; a check that raises is a row FAIL with the reason."""

    def run(check: Callable[[], str]) -> None:
        start = time.monotonic()
        try:
            result, detail = "ok", check()
        except Exception as error:
            result, detail = "FAIL", f"{type(error).__name__}: {error}".replace("\n", " ")[:600]
            traceback.print_exc()
        ROWS.append((name, result, f"{detail} [{time.monotonic() - start:.1f} s]"))
        print(f"{result:4}  {name}: {ROWS[-1][2]}", flush=True)

    return run


def tokens(folder: Path, backend: str, **options: Any) -> list[tuple[int, ...]]:
    """Greedy tokens of 24 ragged requests through 8 slots, which are reused."""
    from relay_attention.runtime.decoder import RelayDecoder
    from relay_attention.runtime.sampling import SamplingParams

    params = SamplingParams(max_new_tokens=12, ignore_eos=True)
    with RelayDecoder.load(folder, backend=backend, max_batch=8, max_context=96, **options) as decoder:
        return [tuple(result.token_ids) for result in decoder.generate(PROMPTS, params)]


def refused(action: Callable[[], Any], *expected: str) -> str:
    from relay_attention.errors import RelayError

    try:
        action()
    except RelayError as error:
        if missing := [part for part in expected if part not in str(error)]:
            raise AssertionError(f"says {error}, without {missing}") from error
        return str(error)[:160]
    raise AssertionError("was not refused")


def check(work: Path, large: bool) -> None:
    """Everything, in one process, but for what has to be a new one."""
    import tensorrt

    from relay_attention.export.build import BuildOptions, build_engine
    from relay_attention.export.compare import compare
    from relay_attention.runtime.artifact import Artifact
    from relay_attention.runtime.engine import EngineInfo, write_engine
    from relay_attention.runtime.tensorrt_backend import TensorRTBackend, this_box

    options = BuildOptions(max_batch=16, prefill_batch=4, chunk=32)
    box = this_box(0)
    print(f"TensorRT {box.tensorrt}, {box.gpu}, compute capability {box.compute_capability}", flush=True)

    def load(folder: Path) -> TensorRTBackend:
        return TensorRTBackend(Artifact.open(folder))

    def same(folder: Path, backend_options: dict[str, Any]) -> str:
        found, expected = tokens(folder, "tensorrt", **backend_options), tokens(folder, "onnxruntime")
        wrong = [index for index, (a, b) in enumerate(zip(found, expected, strict=True)) if a != b]
        assert not wrong, f"requests {wrong} differ from ONNX Runtime's"
        return f"{len(found)} requests, {sum(map(len, found))} tokens"

    small = work / "small"
    for name in ("small", "input", *(["demo"] if (work / "demo").is_dir() else [])):
        folder = work / name

        @row(f"{name}: build")
        def _() -> str:
            path = build_engine(folder, options, progress=True)  # noqa: B023
            return f"{path.name}, {path.stat().st_size / 1e6:.1f} MB"

        @row(f"{name}: verify against ONNX Runtime, by layer")
        def _() -> str:
            report = compare(folder, "tensorrt")  # noqa: B023
            assert report.ok, report.table()
            worst = max(layer.max_abs_diff for layer in report.layers)
            return (
                f"logits within {max(r.max_abs_diff for r in report.requests):.2e}, caches within {worst:.2e}"
            )

        row(f"{name}: same greedy tokens, CUDA graphs")(lambda: same(folder, {}))  # noqa: B023
        row(f"{name}: same greedy tokens, no graphs")(lambda: same(folder, {"cuda_graph": False}))  # noqa: B023

    @row("small: loaded in a new process")
    def _() -> str:
        command = [sys.executable, __file__, "decode", str(small)]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        assert [tuple(ids) for ids in json.loads(done.stdout.splitlines()[-1])] == tokens(small, "tensorrt")
        return "same tokens"

    @row("small: another prompt of the same length, refitted")
    def _() -> str:
        folder = work / "refitted"
        shutil.copytree(work / "other", folder)
        shutil.copytree(small / "engine", folder / "engine")
        start = time.monotonic()
        build_engine(folder, options)
        seconds = time.monotonic() - start
        return f"{seconds:.2f} s; {same(folder, {})}"

    @row("input: another prefix bound")
    def _() -> str:
        backend = load(work / "input")
        backend.set_prefix(Artifact.open(work / "other").prefix)
        backend.allocate(2, 96)
        ids = np.array([[5, 6, 7, 8]] * 2, np.int32)
        backend.step(0, ids, np.zeros(2, np.int32), np.full(2, 4, np.int32))
        found = backend.read_logits().copy()
        backend.close()
        from relay_attention.runtime.onnxruntime_backend import OnnxRuntimeBackend

        expected = OnnxRuntimeBackend(Artifact.open(work / "other"))
        expected.allocate(2, 96)
        expected.step(0, ids, np.zeros(2, np.int32), np.full(2, 4, np.int32))
        difference = float(np.abs(found - expected.read_logits()).max())
        assert difference < 0.05, f"logits differ by {difference}"
        return f"logits within {difference:.2e}"

    plan = next(small.glob("engine/*.plan"))
    described = plan.with_suffix(".json")
    content, text = plan.read_bytes(), described.read_text()
    info = EngineInfo.read(described)
    bad = {
        "truncated plan": (lambda: plan.write_bytes(content[:-100]), ("truncated",)),
        "damaged plan": (lambda: plan.write_bytes(content[:-1] + bytes([content[-1] ^ 1])), ("damaged",)),
        "plan that TensorRT refuses": (lambda: _replace(plan, b"no plan" * 9, info), ("refuses the plan",)),
        "plan of another GPU": (
            lambda: described.write_text(text.replace(box.gpu, "NVIDIA A100")),
            ("does not fit", "NVIDIA A100"),
        ),
        "plan of another TensorRT": (
            lambda: described.write_text(text.replace(f'"{box.tensorrt}"', '"8.5.3.1"')),
            ("does not fit", "8.5.3.1"),
        ),
    }
    for name, (damage, expected) in bad.items():

        @row(f"refused: {name}")
        def _() -> str:
            damage()  # noqa: B023
            try:
                return refused(lambda: load(small), *expected)  # noqa: B023
            finally:
                write_engine(plan, content, info)
                described.write_text(text)

    @row("refused: batch beyond the profile")
    def _() -> str:
        backend = load(small)
        try:
            return refused(lambda: backend.allocate(17, 96), "beyond the engine's 16")
        finally:
            backend.close()

    @row("refused: prefix of another length")
    def _() -> str:
        folder = work / "short"
        shutil.copytree(small / "engine", folder / "engine", dirs_exist_ok=True)
        return refused(lambda: load(folder), "built for a prefix of")

    @row("refused: plugin library missing")
    def _() -> str:
        code = (
            "import os; os.environ['RELAY_ATTENTION_TENSORRT_LIBRARY'] = '/nowhere.so'\n"
            "from relay_attention.runtime.decoder import RelayDecoder\n"
            f"RelayDecoder.load({str(small)!r}, backend='tensorrt')"
        )
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
        assert "'/nowhere.so', but there is no such file" in done.stderr, done.stderr[-400:]
        return done.stderr.strip().splitlines()[-1][:160]

    if large:
        check_large(
            work / "large", BuildOptions(max_batch=64, prefill_batch=4, chunk=128), tensorrt.__version__
        )


def _replace(plan: Path, content: bytes, info: Any) -> None:
    import hashlib

    from relay_attention.runtime.artifact import FileEntry
    from relay_attention.runtime.engine import write_engine

    entry = FileEntry(len(content), hashlib.sha256(content).hexdigest())
    write_engine(plan, content, replace(info, plan=entry))


def check_large(folder: Path, options: Any, version: str) -> None:
    """Build, agreement and time of a decode step, with and without CUDA graphs."""
    from relay_attention.export.build import build_engine
    from relay_attention.export.compare import compare
    from relay_attention.runtime.artifact import Artifact
    from relay_attention.runtime.tensorrt_backend import TensorRTBackend

    @row("large: build")
    def _() -> str:
        path = build_engine(folder, options, progress=True)
        return f"{path.name}, {path.stat().st_size / 1e9:.2f} GB"

    @row("large: verify against ONNX Runtime on the CPU")
    def _() -> str:
        report = compare(folder, "tensorrt", requests=4, new_tokens=4)
        assert report.ok, report.table()
        return f"logits within {max(request.max_abs_diff for request in report.requests):.2e}"

    context = 128
    for graph in (True, False):
        try:
            backend = TensorRTBackend(Artifact.open(folder), cuda_graph=graph)
            backend.allocate(64, 512)
        except Exception as error:
            ROWS.append((f"large: decode, graph {graph}", "FAIL", str(error)[:600]))
            continue
        for batch in (1, 8, 32, 64):

            @row(f"large: decode step, batch {batch}, {'graph' if graph else 'no graph'}")
            def _() -> str:
                ids = np.ones((batch, 1), np.int32)  # noqa: B023
                lens = [np.full(batch, size, np.int32) for size in (context, 1)]  # noqa: B023
                for _ in range(5):
                    backend.step(0, ids, *lens)  # noqa: B023
                times = []
                for _ in range(30):
                    start = time.perf_counter()
                    backend.step(0, ids, *lens)  # noqa: B023
                    times.append(time.perf_counter() - start)
                assert np.isfinite(backend.read_logits()).all()  # noqa: B023
                median, least = 1e3 * np.median(times), 1e3 * min(times)
                return f"{median:.3f} ms median, {least:.3f} ms least, TensorRT {version}"

        backend.close()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("step", choices=("make", "check", "decode"))
    parser.add_argument("work", type=Path)
    parser.add_argument("--demo", nargs=2, metavar=("HF_FOLDER", "SYSTEM_PROMPT"))
    parser.add_argument("--large", action="store_true")
    arguments = parser.parse_args()
    if arguments.step == "make":
        arguments.work.mkdir(parents=True, exist_ok=True)
        make(arguments.work, arguments.demo, arguments.large)
        return 0
    if arguments.step == "decode":
        print(json.dumps(tokens(arguments.work, "tensorrt")))
        return 0
    check(arguments.work, arguments.large)
    width = max(len(name) for name, _, _ in ROWS)
    print("\n" + "\n".join(f"{name:<{width}}  {result:<4}  {detail}" for name, result, detail in ROWS))
    failed = sum(result != "ok" for _, result, _ in ROWS)
    print(f"\n{len(ROWS) - failed} of {len(ROWS)} ok")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
