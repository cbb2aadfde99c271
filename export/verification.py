"""Does an artifact decode what its model decodes? Its greedy tokens and logits beside those of transformers.

The rule. The artifact decodes greedily, in ragged batches. transformers then runs each request in full,
prefix and prompt and the artifact's tokens, in float32 and without any cache, and gives the logits at every
new token.

- Logits differ where any of them is off by more than the tolerance: `relative tolerance * largest logit`.
- A token that is not the reference's best is a *tie* where the reference gives it the best logit less at most
the
  tolerance, and a *mismatch* otherwise. As the reference is fed the artifact's tokens, a tie does not hide
  what comes after it.

A request without mismatch and without logits that differ agrees; ties are counted and shown.
"""

from __future__ import annotations

import inspect
import json
import math
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from tqdm import tqdm

from relay_attention.errors import ExportError, PromptError
from relay_attention.export.float32_form import CPU, load_on_cpu
from relay_attention.export.prefix import load_graph
from relay_attention.runtime import bfloat16
from relay_attention.runtime.artifact import MODEL_NAME, Artifact
from relay_attention.runtime.backend import load_backend

RELATIVE_TOLERANCE = {"float32": 2e-4, "float16": 3e-2, "bfloat16": 1e-1}
LONGEST_PROMPT = 48
_PIECE = 1 << 24  # elements of a weight that are read at a time

Logits = npt.NDArray[np.float32]


@dataclass
class RequestReport:
    """One request: how many of its new tokens are the reference's, are ties, or are neither.

    max_abs_diff: of the logits at all new tokens. tolerance: what they may differ by.
    first_mismatch: index of the first new token that is neither match nor tie, or None.
    """

    prompt_tokens: int
    new_tokens: int
    matches: int
    ties: int
    mismatches: int
    first_mismatch: int | None
    max_abs_diff: float
    tolerance: float

    @property
    def status(self) -> str:
        """ "match", "tie" (no mismatch, but ties), "mismatch", "logits differ" or "not finite"."""
        if not math.isfinite(self.max_abs_diff):
            return "not finite"
        if self.mismatches:
            return "mismatch"
        if self.max_abs_diff > self.tolerance:
            return "logits differ"
        return "tie" if self.ties else "match"


@dataclass
class VerifyReport:
    """What `verify` found.

    arithmetic: the type in which the artifact was computed, that of the artifact but for bfloat16 on a CPU.
    not_finite: names of weights and prefix tensors that hold NaN or Inf.
    """

    artifact: str
    reference: str
    dtype: str
    backend: str
    prefix_tokens: int
    arithmetic: str
    not_finite: list[str] = field(default_factory=list)
    requests: list[RequestReport] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        """Every request agrees, and every tensor is finite."""
        return not self.not_finite and all(request.status in ("match", "tie") for request in self.requests)

    def to_json(self) -> dict[str, Any]:
        requests = [asdict(request) | {"status": request.status} for request in self.requests]
        return asdict(self) | {"ok": self.ok, "requests": requests}

    def table(self) -> str:
        """The report for a terminal."""
        computed = "" if self.arithmetic == self.dtype else f" computed in {self.arithmetic}"
        lines = [
            f"{self.artifact} ({self.dtype}{computed}, {self.backend}) against {self.reference} (float32, "
            "transformers), "
            f"{self.prefix_tokens} prefix tokens",
            "",
            "request  prompt  new  match  tie  mismatch  max |diff|  tolerance  status",
        ]
        for index, request in enumerate(self.requests):
            lines.append(
                f"{index:7}  {request.prompt_tokens:6}  {request.new_tokens:3}  {request.matches:5}  "
                f"{request.ties:3}  "
                f"{request.mismatches:8}  {request.max_abs_diff:10.2e}  {request.tolerance:9.2e}  "
                f"{request.status}"
            )
        lines.append("")
        if self.not_finite:
            lines.append(f"NaN or Inf in: {', '.join(self.not_finite)}")
        agreed = sum(request.status in ("match", "tie") for request in self.requests)
        ties = sum(request.ties for request in self.requests)
        tied = f" (tied tokens: {ties})" if ties else ""
        lines.append(
            f"{'ok' if self.ok else 'MISMATCH'}: {agreed} of {len(self.requests)} requests agree{tied}"
        )
        return "\n".join(lines)


def verify(
    output: str | os.PathLike[str],
    reference: str | os.PathLike[str],
    *,
    requests: int = 8,
    new_tokens: int = 16,
    backend: str = "onnxruntime",
    tolerance: float | None = None,
    seed: int = 0,
    threads: int | None = None,
    progress: bool = False,
) -> VerifyReport:
    """Compares an artifact with its model in transformers, by the rule at the head of this file.

    output: the artifact's folder; the content of its files is checked first. reference: the Hugging Face
    folder.
    requests: prompts of random tokens, of 1 to 48 tokens as far as max_context allows, decoded as one ragged
    batch
        that is prefilled in two calls. new_tokens: of each. tolerance: relative, None for 2e-4 (float32),
        3e-2 (float16) or 1e-1 (bfloat16).
    On the CPU a bfloat16 artifact is computed in float32, which the report says.
    The weights of an artifact of a quantised model are not those of its reference: expect a larger tolerance.
    Raises: ArtifactError if a file of the artifact is damaged; ExportError if the reference cannot be loaded
    or is
        another kind of model.
    """
    artifact = Artifact.open(output)
    artifact.check_hashes()
    manifest = artifact.manifest
    if requests < 1 or new_tokens < 1:
        raise PromptError(f"verify needs at least 1 request and 1 new token, not {requests} and {new_tokens}")
    if new_tokens >= manifest.max_context:
        raise PromptError(
            f"{new_tokens} new tokens do not fit in max_context {manifest.max_context} with a prompt"
        )
    report = VerifyReport(
        artifact=str(output),
        reference=str(reference),
        dtype=manifest.dtype,
        backend=backend,
        prefix_tokens=manifest.prefix.length,
        arithmetic=arithmetic(manifest.dtype, backend),
        not_finite=list(not_finite_tensors(artifact)),
    )
    model = _load_reference(Path(reference), artifact)
    relative = RELATIVE_TOLERANCE[manifest.dtype] if tolerance is None else tolerance
    prompts = _prompts(artifact, requests, new_tokens, seed)
    tokens, logits = _decode(artifact, backend, prompts, new_tokens, threads)
    for prompt, new, found in tqdm(
        list(zip(prompts, tokens, logits, strict=True)),
        desc="reference",
        unit="request",
        disable=None if progress else True,
    ):
        sequence = [*manifest.prefix.token_ids, *prompt, *new[:-1]]
        report.requests.append(_compare(len(prompt), new, found, model(sequence, new_tokens), relative))
    return report


def arithmetic(dtype: str, backend: str) -> str:
    """The type in which a backend computes an artifact of a dtype, as far as it is asked for here."""
    return "float32" if (dtype, backend) == (bfloat16.NAME, CPU) else dtype


def not_finite_tensors(artifact: Artifact) -> Iterator[str]:
    """Names of the floating-point weights and prefix tensors that hold NaN or Inf."""
    for tensor in load_graph(artifact.file(MODEL_NAME)).graph.initializer:
        values = _tensor_values(tensor, artifact.path)
        if values is None:
            continue
        flat = values.reshape(-1)
        if not all(_finite(flat[i : i + _PIECE]) for i in range(0, flat.size, _PIECE)):
            yield tensor.name
    if artifact.manifest.prefix.mode == "input":
        for layer, pair in enumerate(artifact.prefix.read()):
            for what, values in zip(("key", "value"), pair, strict=True):
                if not _finite(values):
                    yield f"prefix.{layer}.{what}"


def _finite(values: npt.NDArray[Any]) -> bool:
    return bool(np.isfinite(bfloat16.widen(values) if values.dtype == bfloat16.BITS else values).all())


def _tensor_values(tensor: Any, folder: Path) -> npt.NDArray[Any] | None:
    """A floating-point initializer, mapped where it is external (bfloat16 as bits); None for other types."""
    import onnx

    types: dict[int, npt.DTypeLike] = {
        onnx.TensorProto.FLOAT: np.float32,
        onnx.TensorProto.FLOAT16: np.float16,
        onnx.TensorProto.BFLOAT16: bfloat16.BITS,
    }
    if tensor.data_type not in types or 0 in tensor.dims:
        return None
    if tensor.data_location != onnx.TensorProto.EXTERNAL:
        values = np.asarray(onnx.numpy_helper.to_array(tensor))
        return values.astype(np.float32) if tensor.data_type == onnx.TensorProto.BFLOAT16 else values
    entries = {entry.key: entry.value for entry in tensor.external_data}
    return np.memmap(
        folder / entries["location"],
        types[tensor.data_type],
        "r",
        int(entries.get("offset", 0)),
        tuple(tensor.dims),
    )


def _prompts(artifact: Artifact, requests: int, new_tokens: int, seed: int) -> list[list[int]]:
    """Random prompts: the shortest of 1 token, the longest of 48, the others between, in no order."""
    generator = np.random.default_rng(seed)
    manifest = artifact.manifest
    longest = min(LONGEST_PROMPT, manifest.max_context - new_tokens)
    lengths = generator.permutation(np.linspace(1, longest, requests).round().astype(int))
    vocab_size = manifest.geometry.vocab_size
    return [generator.integers(0, vocab_size, int(length)).tolist() for length in lengths]


def _decode(
    artifact: Artifact, backend_name: str, prompts: list[list[int]], new_tokens: int, threads: int | None
) -> tuple[list[list[int]], npt.NDArray[np.float32]]:
    """Greedy tokens of every prompt, and the logits [request, token, vocab] that they are the best of."""
    on_cpu = backend_name == CPU
    backend = (
        load_on_cpu(artifact, threads) if on_cpu else load_backend(backend_name, artifact, threads=threads)
    )
    rows = len(prompts)
    lengths = np.array([len(prompt) for prompt in prompts], np.int32)
    backend.allocate(rows, int(lengths.max()) + new_tokens)
    context = np.zeros(rows, np.int32)
    logits: Logits = np.zeros((rows, new_tokens, artifact.manifest.geometry.vocab_size), np.float32)
    # prefill in two calls, so that rows with and without context, and idle rows, come up
    for end in (-(-lengths // 2), lengths):
        counts = end - context
        ids = np.zeros((rows, max(1, int(counts.max()))), np.int32)
        for row, prompt in enumerate(prompts):
            ids[row, : counts[row]] = prompt[context[row] : end[row]]
        backend.step(0, ids, context, counts)
        ended = (counts > 0) & (end == lengths)
        logits[ended, 0] = backend.read_logits()[ended]
        context = end.astype(np.int32)
    tokens = [[int(logits[row, 0].argmax())] for row in range(rows)]
    for step in range(1, new_tokens):
        last = np.array([[row[-1]] for row in tokens], np.int32)
        backend.step(0, last, context, np.ones(rows, np.int32))
        logits[:, step] = backend.read_logits()
        context = context + np.int32(1)
        for row in range(rows):
            tokens[row].append(int(logits[row, step].argmax()))
    backend.close()
    return tokens, logits


def _load_reference(folder: Path, artifact: Artifact) -> Callable[[list[int], int], Logits]:
    """A function (token ids, n) -> the logits [n, vocab] at the last n of them, computed by transformers."""
    try:
        import torch
        import transformers
    except ImportError as error:
        raise ExportError(
            f"verify needs torch and transformers (pip install 'relay-attention[export]'): {error}"
        ) from error
    if not folder.is_dir():
        raise ExportError(f"{folder}: the reference is a folder with a Hugging Face model; no such folder")
    try:
        if not sys.stderr.isatty():
            transformers.utils.logging.disable_progress_bar()
        # sdpa cannot do all that eager can (softcap), and eager needs memory for the scores of the whole
        # prompt
        config = transformers.AutoConfig.from_pretrained(
            folder, local_files_only=True, trust_remote_code=False
        )
        eager = artifact.manifest.prefix.length < 4096 or getattr(config, "attn_logit_softcapping", None)
        model = transformers.AutoModelForCausalLM.from_pretrained(
            folder,
            config=config,
            dtype=torch.float32,
            attn_implementation="eager" if eager else "sdpa",
            use_safetensors=True,
            local_files_only=True,
            trust_remote_code=False,
        ).eval()
    except Exception as error:  # transformers raises many kinds
        raise ExportError(f"{folder}: transformers cannot load the reference: {error}") from error
    vocab_size = config.get_text_config(decoder=True).vocab_size
    if vocab_size != artifact.manifest.geometry.vocab_size:
        raise ExportError(
            f"{folder}: the reference has a vocabulary of {vocab_size}, the artifact one of "
            f"{artifact.manifest.geometry.vocab_size}: it is another model"
        )
    keeps = "logits_to_keep" in inspect.signature(model.forward).parameters

    def logits(token_ids: list[int], count: int) -> Logits:
        keep = {"logits_to_keep": count} if keeps else {}
        with torch.no_grad():
            result = model(torch.tensor([token_ids]), use_cache=False, return_dict=True, **keep).logits
        return np.asarray(result[0, -count:].float().numpy())

    return logits


def _compare(
    prompt_tokens: int, tokens: list[int], found: Logits, reference: Logits, relative: float
) -> RequestReport:
    difference = np.abs(found.astype(np.float64) - reference)
    tolerance = relative * max(1.0, float(np.abs(reference).max()))
    chosen = np.array(tokens)
    gap = reference.max(axis=-1) - reference[np.arange(len(tokens)), chosen]
    match = reference.argmax(axis=-1) == chosen
    tie = ~match & (gap <= tolerance)
    wrong = ~match & ~tie
    finite = bool(np.isfinite(difference).all())
    return RequestReport(
        prompt_tokens=prompt_tokens,
        new_tokens=len(tokens),
        matches=int(match.sum()),
        ties=int(tie.sum()),
        mismatches=int(wrong.sum()),
        first_mismatch=int(wrong.argmax()) if wrong.any() else None,
        max_abs_diff=float(difference.max()) if finite else math.inf,
        tolerance=tolerance,
    )


def print_report(report: VerifyReport, as_json: bool) -> None:
    print(json.dumps(report.to_json(), indent=2) if as_json else report.table())
