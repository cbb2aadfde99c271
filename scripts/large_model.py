#!/usr/bin/env python3
"""A model of Llama's geometry with random weights, for GPU machines that 2 GB cannot be carried to.

`make` exports it where the exporter is, for TensorRT and beside it for ONNX Runtime (FOLDER_ort), and keeps
graph, manifest, tokenizer and small tensors (1 MB) only. `fill` makes the large tensors anew on the other
machine, random with the same deviations, alike in both; it needs numpy and this package, and torch if there
is one, to be fast. `time` decodes with a backend and keeps logits and times,
so that two engines that need two Pythons are compared by the same code.

usage: large_model.py make FOLDER [--layers N] [--prefix TOKENS] [--vocabulary N]
       large_model.py fill FOLDER...
       large_model.py time BACKEND FOLDER OUT.npz
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import sys
import time
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

LAYOUT, KEPT = "layout.json", ".kept"
RANDOM_FROM = 1 << 20  # bytes of a tensor that is not carried
BATCHES = (1, 8, 32, 64)
CONTEXT, NEW_TOKENS, REPETITIONS = 128, 4, 30
Float32 = npt.NDArray[np.float32]
Int32 = npt.NDArray[np.int32]


def make(folder: Path, layers: int, prefix: int, vocabulary: int) -> None:
    """Exports the model; see the module's text. Takes some 10 GB of memory at four layers."""
    sys.path.insert(0, str(Path(__file__).parents[1] / "tests/export"))
    import tiny_models
    import transformers

    from relay_attention.export.exporter import export_model

    config = transformers.LlamaConfig(
        vocab_size=vocabulary, hidden_size=4096, intermediate_size=14336, num_hidden_layers=layers,
        num_attention_heads=32, num_key_value_heads=8, head_dim=128, max_position_embeddings=4096,
        bos_token_id=0, eos_token_id=1, pad_token_id=2, initializer_range=0.02,
    )  # fmt: skip
    source = tiny_models.make_model(folder.with_name(folder.name + "_source"), config)
    # the tokenizer knows bytes and few merges: a prompt of digits has a token for each
    text = "".join(str(index % 10) for index in range(prefix - 1))
    for target, out in (("tensorrt", folder), ("onnxruntime", folder.with_name(folder.name + "_ort"))):
        export_model(
            source,
            text,
            out,
            precision="fp16",
            target=target,
            template="plain",
            max_context=512,
            progress=True,
        )
        hollow(out)
    shutil.rmtree(source)


def hollow(folder: Path) -> None:
    """Takes the large tensors out of an artifact's files; `fill` puts others in their place."""
    layout = {}
    for name, tensors in (("weights.bin", _weights(folder)), ("prefix.bin", _prefix(folder))):
        path = folder / name
        content = np.memmap(path, np.uint8, "r")
        random = []
        with path.with_name(name + KEPT).open("wb") as kept:
            end = 0
            for offset, title, tensor in sorted(tensors, key=lambda found: found[0]):
                if tensor.nbytes < RANDOM_FROM:
                    continue
                deviation = float(tensor[: 1 << 20].astype(np.float32).std())
                random.append([offset, tensor.size, deviation, zlib.crc32(title.encode())])
                kept.write(content[end:offset].tobytes())
                end = offset + tensor.nbytes
            kept.write(content[end:].tobytes())
        layout[name] = {"bytes": path.stat().st_size, "random": random}
        del content
        path.unlink()
    (folder / LAYOUT).write_text(json.dumps(layout))


def _weights(folder: Path) -> Iterator[tuple[int, str, npt.NDArray[Any]]]:
    """(offset, name, content, flat) of each float16 tensor in weights.bin."""
    import onnx

    for tensor in onnx.load(folder / "model.onnx", load_external_data=False).graph.initializer:
        data = {entry.key: entry.value for entry in tensor.external_data}
        if data.get("location") == "weights.bin" and tensor.data_type == onnx.TensorProto.FLOAT16:
            offset, count = int(data["offset"]), math.prod(tensor.dims)
            yield offset, tensor.name, np.memmap(folder / "weights.bin", np.float16, "r", offset, (count,))


def _prefix(folder: Path) -> Iterator[tuple[int, str, npt.NDArray[Any]]]:
    from relay_attention.runtime.artifact import PrefixFile

    prefix = PrefixFile.open(folder / "prefix.bin")
    for layer, (offsets, pair) in enumerate(zip(prefix.extents(), prefix.read(), strict=True)):
        for kind, offset, tensor in zip(("key", "value"), offsets, pair, strict=False):
            yield offset, f"prefix.{layer}.{kind}", tensor.reshape(-1)


def fill(folder: Path) -> None:
    """Makes weights.bin and prefix.bin of a hollow artifact, and enters their hashes in relay.json."""
    from relay_attention.runtime.artifact import FileEntry

    normal = _normal()
    manifest = json.loads((folder / "relay.json").read_text())
    for name, described in json.loads((folder / LAYOUT).read_text()).items():
        with (folder / (name + KEPT)).open("rb") as kept, (folder / name).open("wb") as stream:
            for offset, count, deviation, seed in described["random"]:
                stream.write(kept.read(offset - stream.tell()))
                for part, start in enumerate(range(0, count, 1 << 26)):
                    stream.write(normal(min(count - start, 1 << 26), seed + part, deviation).data)
            stream.write(kept.read())
            if stream.tell() != described["bytes"]:
                raise SystemExit(f"{folder / name}: {stream.tell()} bytes instead of {described['bytes']}")
        entry = FileEntry.of(folder / name)
        manifest["files"][name] = {"bytes": entry.bytes, "sha256": entry.sha256}
    (folder / "relay.json").write_text(json.dumps(manifest, indent=2))


def _normal() -> Any:
    """A function that makes (count, seed, deviation) normal float16 numbers."""
    try:
        import torch
    except ImportError:
        return lambda count, seed, deviation: (
            np.random.default_rng(seed).standard_normal(count, np.float32) * np.float32(deviation)
        ).astype(np.float16)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    source = torch.Generator(device)
    return lambda count, seed, deviation: (
        (torch.randn(count, device=device, generator=source.manual_seed(seed)) * deviation)
        .half()
        .cpu()
        .numpy()
    )


def decode(backend: Any, batch: int, vocab: int) -> Float32:
    """Logits [1 + NEW_TOKENS, batch, vocab] after a ragged prefill and single tokens, all of them given."""
    random = np.random.default_rng(batch)
    lengths = random.integers(CONTEXT // 2, CONTEXT + 1, batch).astype(np.int32)
    ids = random.integers(3, vocab, (batch, CONTEXT + NEW_TOKENS)).astype(np.int32)
    backend.step(0, ids[:, :CONTEXT], np.zeros(batch, np.int32), lengths)
    found = [backend.read_logits().copy()]
    for token in range(NEW_TOKENS):
        one = np.ones(batch, np.int32)
        backend.step(0, ids[:, CONTEXT + token :][:, :1].copy(), lengths + np.int32(token), one)
        found.append(backend.read_logits().copy())
    return np.stack(found)


def one_token(batch: int) -> tuple[Int32, Int32, Int32]:
    """What a step at CONTEXT cached tokens takes: ids [batch, 1], context_lens and query_lens [batch]."""
    return np.full((batch, 1), 5, np.int32), np.full(batch, CONTEXT, np.int32), np.ones(batch, np.int32)


def decode_times(backend: Any, batch: int) -> dict[str, float]:
    """Median milliseconds at CONTEXT cached tokens. step: the engine alone, until the device is done, its
    logits left where they are. token: until the greedy tokens of all rows are in main memory."""
    call = one_token(batch)

    def token() -> None:
        backend.step(0, *call)
        if hasattr(backend, "read_top"):
            backend.read_top(1)
        else:
            backend.read_logits().argmax(axis=-1)

    def step() -> None:
        backend.step(0, *call)
        synchronize()

    times = {"token": _median_ms(token)}
    # TensorRT's step copies the logits to main memory, ONNX Runtime's leaves them on the device
    stream = backend._stream if type(backend).__name__ == "TensorRTBackend" else None
    if stream is not None:
        stream.download = lambda *_: None
    try:
        times["step"] = _median_ms(step)
    finally:
        if stream is not None:
            del stream.download
    return times


def synchronize() -> None:
    """Waits for the device, if this machine has one: a backend may return before it is done."""
    from relay_attention.errors import BackendError

    try:
        from relay_attention.runtime import cuda

        cuda.call("cudaDeviceSynchronize")
    except BackendError:
        return


def _median_ms(action: Any) -> float:
    times = []
    for _ in range(5 + REPETITIONS):
        start = time.perf_counter()
        action()
        times.append(time.perf_counter() - start)
    return 1e3 * float(np.median(times[5:]))


def time_backend(name: str, folder: Path, out: Path) -> None:
    """Logits and times of every batch size, in one .npz."""
    if name == "onnxruntime-cuda":
        import torch  # noqa: F401  it brings the CUDA and cuDNN libraries that ONNX Runtime looks for
    from relay_attention.runtime.artifact import Artifact
    from relay_attention.runtime.backend import load_backend

    artifact = Artifact.open(folder)
    start = time.monotonic()
    backend = load_backend(name, artifact)
    backend.allocate(max(BATCHES), 2 * CONTEXT)
    kept: dict[str, Any] = {}
    times = {}
    for batch in BATCHES:
        kept[f"logits{batch}"] = decode(backend, batch, artifact.manifest.geometry.vocab_size)
        times[str(batch)] = decode_times(backend, batch)
    backend.close()
    np.savez(out, times=json.dumps(times), **kept)
    shown = "; ".join(f"B {b}: step {t['step']:.3f}, token {t['token']:.3f} ms" for b, t in times.items())
    graph = getattr(backend, "cuda_graph", None)  # ONNX Runtime's own decision
    reason = getattr(backend, "cuda_graph_reason", "")
    shown += "" if graph is None else f"; CUDA graph {'on' if graph else f'off ({reason[:160]})'}"
    print(f"ok    large: {name}: {shown} [{time.monotonic() - start:.1f} s]")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    steps = parser.add_subparsers(dest="step", required=True)
    making = steps.add_parser("make")
    making.add_argument("folder", type=Path)
    making.add_argument("--layers", type=int, default=4)
    making.add_argument("--prefix", type=int, default=2048, metavar="TOKENS")
    making.add_argument(
        "--vocabulary", type=int, default=4096, help="TensorRT 8.6 compiles for minutes at 32,000"
    )
    steps.add_parser("fill").add_argument("folders", nargs="+", type=Path)
    timing = steps.add_parser("time")
    timing.add_argument("backend")
    timing.add_argument("folder", type=Path)
    timing.add_argument("out", type=Path)
    arguments = parser.parse_args()
    if arguments.step == "make":
        make(arguments.folder, arguments.layers, arguments.prefix, arguments.vocabulary)
    elif arguments.step == "fill":
        start = time.monotonic()
        for folder in arguments.folders:
            fill(folder)
        print(f"ok    large: random weights made [{time.monotonic() - start:.1f} s]")
    else:
        time_backend(arguments.backend, arguments.folder, arguments.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
