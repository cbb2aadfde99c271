"""Does another engine compute what ONNX Runtime computes from the same artifact? Layer by layer, and token by
token.

Both engines are fed the same tokens, those that ONNX Runtime chooses greedily, through ragged prefill in two
calls, single steps and a slot that is reused. Compared are the logits at every new token, by the rule of
verification.py, and what each layer appended to its cache: an error shows in the layer where it begins.
"""

from __future__ import annotations

import math
import os
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from relay_attention.errors import BackendError, PromptError
from relay_attention.export import verification
from relay_attention.export.float32_form import load_on_cpu
from relay_attention.runtime.artifact import Artifact
from relay_attention.runtime.backend import load_backend

REFERENCE = "onnxruntime"


@dataclass
class LayerReport:
    """Largest difference between the engines' cached keys and values of one layer, and their largest
    magnitude."""

    layer: int
    max_abs_diff: float
    largest: float
    ok: bool


@dataclass
class CompareReport(verification.VerifyReport):
    """What `compare` found; `reference` is the other engine's name."""

    layers: list[LayerReport] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        return super().ok and all(layer.ok for layer in self.layers)

    def table(self) -> str:
        """The report for a terminal."""
        lines = ["layer  max |diff|   largest  status"]
        for layer in self.layers:
            status = "match" if layer.ok else "differs"
            lines.append(f"{layer.layer:5}  {layer.max_abs_diff:10.2e}  {layer.largest:8.2e}  {status}")
        return "\n".join([*lines, "", super().table().replace(" (float32, transformers)", "")])


def compare(
    output: str | os.PathLike[str],
    backend: str,
    *,
    requests: int = 8,
    new_tokens: int = 16,
    tolerance: float | None = None,
    seed: int = 0,
    **options: Any,
) -> CompareReport:
    """Compares an engine with ONNX Runtime on one artifact.

    backend: the engine's name; options: its own. requests, new_tokens, tolerance, seed: as for `verify`.
    Raises: ArtifactError, PromptError, BackendError.
    """
    artifact = Artifact.open(output)
    manifest = artifact.manifest
    if backend == REFERENCE:
        raise BackendError(
            f"the backend to compare is {REFERENCE} itself: give another, or verify with --reference"
        )
    if requests < 1 or not 1 <= new_tokens < manifest.max_context:
        raise PromptError(f"{requests} requests of {new_tokens} new tokens cannot be compared")
    relative = verification.RELATIVE_TOLERANCE[manifest.dtype] if tolerance is None else tolerance
    prompts = verification._prompts(artifact, requests, new_tokens, seed)
    engines = [load_on_cpu(artifact), load_backend(backend, artifact, **options)]
    computed = verification.arithmetic(manifest.dtype, REFERENCE)
    reference = REFERENCE if computed == manifest.dtype else f"{REFERENCE}, computed in {computed}"
    report = CompareReport(
        str(output), reference, manifest.dtype, backend, manifest.prefix.length, manifest.dtype
    )
    try:
        longest = max(map(len, prompts)) + new_tokens
        for engine in engines:
            engine.allocate(requests, longest)
        # slots that other requests have used: the second run must not see what the first has left
        _decode(engines, [prompt[::-1] for prompt in prompts], 2)
        tokens, logits = _decode(engines, prompts, new_tokens)
        for row, prompt in enumerate(prompts):
            report.requests.append(
                verification._compare(len(prompt), tokens[1][row], logits[1][row], logits[0][row], relative)
            )
        report.layers = _compare_caches(
            engines, [len(prompt) + new_tokens - 1 for prompt in prompts], relative
        )
    finally:
        for engine in engines:
            engine.close()
    return report


def _decode(
    engines: list[Any], prompts: list[list[int]], new_tokens: int
) -> tuple[list[list[list[int]]], list[npt.NDArray[np.float32]]]:
    """Each engine's greedy tokens and logits [request, token, vocab]; all are fed the first one's tokens."""
    rows = len(prompts)
    lengths = np.array([len(prompt) for prompt in prompts], np.int32)
    context = np.zeros(rows, np.int32)
    logits: list[list[npt.NDArray[np.float32]]] = [[] for _ in engines]
    first: list[npt.NDArray[np.float32] | None] = [None] * len(engines)
    for end in (-(-lengths // 2), lengths):
        counts = (end - context).astype(np.int32)
        ids = np.zeros((rows, max(1, int(counts.max()))), np.int32)
        for row, prompt in enumerate(prompts):
            ids[row, : counts[row]] = prompt[context[row] : end[row]]
        ended = ((counts > 0) & (end == lengths))[:, None]
        for index, engine in enumerate(engines):
            engine.step(0, ids, context, counts)
            found, before = engine.read_logits(), first[index]
            first[index] = found.copy() if before is None else np.where(ended, found, before)
        context = end.astype(np.int32)
    for index, found_first in enumerate(first):
        assert found_first is not None
        logits[index].append(found_first)
    for _ in range(new_tokens - 1):
        fed = logits[0][-1].argmax(axis=-1).astype(np.int32)[:, None]
        for index, engine in enumerate(engines):
            engine.step(0, fed, context, np.ones(rows, np.int32))
            logits[index].append(engine.read_logits().copy())
        context = context + np.int32(1)
    stacked = [np.stack(each, axis=1) for each in logits]
    return [each.argmax(axis=-1).tolist() for each in stacked], stacked


def _compare_caches(engines: list[Any], lengths: list[int], relative: float) -> list[LayerReport]:
    reports: list[LayerReport] = []
    for row, length in enumerate(lengths):
        caches = [engine.read_cache(row, length) for engine in engines]
        for layer, (expected, found) in enumerate(zip(*caches, strict=True)):
            if row == 0:
                reports.append(LayerReport(layer, 0.0, 0.0, True))
            for wanted, got in zip(expected, found, strict=True):
                difference = float(np.abs(got.astype(np.float64) - wanted).max(initial=0.0))
                largest = float(np.abs(wanted).max(initial=0.0))
                report = reports[layer]
                report.max_abs_diff = max(
                    report.max_abs_diff, difference if math.isfinite(difference) else math.inf
                )
                report.largest = max(report.largest, largest)
    for report in reports:
        report.ok = report.max_abs_diff <= relative * max(1.0, report.largest)
    return reports
