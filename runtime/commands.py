"""The commands `inspect` and `generate`."""

from __future__ import annotations

import argparse
import io
import json
import math
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from relay_attention.errors import PromptError, RelayError

if TYPE_CHECKING:
    from relay_attention.runtime.artifact import Artifact
    from relay_attention.runtime.request import GenerationEvent, GenerationResult
    from relay_attention.runtime.sampling import SamplingParams
    from relay_attention.runtime.text import Prompt

EXIT_FAILED, EXIT_INTERRUPTED = 2, 130
CARRIED = ("id", "expected")  # fields of a prompt that its result repeats
MOST_ERRORS = 10  # printed of a file of prompts

# flag: (type, what it is); the fields of SamplingParams
_SAMPLING = {
    "max_new_tokens": (int, "at most so many tokens (256)"),
    "min_new_tokens": (int, "do not stop before so many (0)"),
    "temperature": (float, "0 is greedy (0)"),
    "top_k": (int, "only the k likeliest tokens (0: all)"),
    "top_p": (float, "only the likeliest tokens that together reach this probability (1)"),
    "min_p": (float, "only tokens this probable, relative to the likeliest (0)"),
    "repetition_penalty": (float, "above 1 makes tokens seen before less likely (1)"),
    "seed": (int, "request i draws with seed + i (a new seed each time)"),
    "logprobs": (int, "write log-probabilities of the chosen and the n likeliest tokens (none)"),
}


def add_commands(subparsers: Any) -> None:
    """Adds this room's commands to argparse's subparsers; what they need is imported when they run."""
    inspect = subparsers.add_parser(
        "inspect", help="print what an artifact holds", description=_inspect.__doc__
    )
    inspect.add_argument("artifact", metavar="OUT", help="artifact folder")
    inspect.add_argument("--json", action="store_true", help="print JSON")
    inspect.add_argument("--check", action="store_true", help="read every file and compare its sha256")
    inspect.set_defaults(run=_inspect)

    generate = subparsers.add_parser(
        "generate", help="decode a file of prompts with an artifact", description=_generate.__doc__
    )
    generate.add_argument("artifact", metavar="OUT", help="artifact folder")
    generate.add_argument(
        "--prompts", required=True, metavar="FILE", help="file of prompts, - for standard input"
    )
    generate.add_argument("-o", "--output", metavar="FILE", help="where results go (standard output)")
    generate.add_argument("--backend", default="onnxruntime", help="inference engine (%(default)s)")
    generate.add_argument("--threads", type=int, metavar="N", help="the engine's threads (its own choice)")
    generate.add_argument(
        "--max-batch", type=int, default=32, metavar="N", help="requests at a time (%(default)s)"
    )
    generate.add_argument("--max-context", type=int, metavar="N", help="tokens of a request (the artifact's)")
    generate.add_argument(
        "--mapped-weights",
        action="store_true",
        help="on the CPU: take weights from their file, uncopied; less memory, slower",
    )
    for name, (kind, text) in _SAMPLING.items():
        generate.add_argument(f"--{name.replace('_', '-')}", type=kind, metavar="N", help=text)
    generate.add_argument("--stop", action="append", metavar="TEXT", help="end at this text; may be repeated")
    generate.add_argument("--stop-token-ids", type=int, nargs="+", metavar="ID", help="end at these tokens")
    generate.add_argument("--ignore-eos", action="store_true", default=None, help="do not end at end tokens")
    generate.set_defaults(run=_generate)


def _inspect(arguments: argparse.Namespace) -> int:
    """Print what an artifact holds: model, prefix, cache sizes, files."""
    from relay_attention.runtime.artifact import Artifact

    artifact = Artifact.open(arguments.artifact)
    if arguments.check:
        _check(artifact)
    if arguments.json:
        described = artifact.manifest.to_json() | {"path": str(artifact.path), "checked": arguments.check}
        print(json.dumps(described, indent=2, ensure_ascii=False))
    else:
        print(_describe(artifact, arguments.check))
    return 0


def _check(artifact: Artifact) -> None:
    from tqdm import tqdm

    total = sum(entry.bytes for entry in artifact.manifest.files.values())
    with tqdm(total=total, unit="B", unit_scale=True, desc="check", leave=False, disable=None) as bar:
        artifact.check_hashes(bar.update)


def _describe(artifact: Artifact, checked: bool) -> str:
    manifest = artifact.manifest
    geometry, prefix, batch = manifest.geometry, manifest.prefix, 32
    shared = prefix.length * manifest.kv_bytes_per_token
    context = manifest.max_context * manifest.kv_bytes_per_token
    windows = sorted({size for size in geometry.local_window_size if size >= 0})
    source = manifest.source
    rows = [
        ("artifact", f"{artifact.path}, made by {manifest.producer}"),
        (
            "model",
            f"{source.get('architecture', '?')} from {source.get('kind', '?')}, {manifest.model_id[:16]}",
        ),
        ("layers", f"{geometry.num_layers}" + (f", local windows {windows}" if windows else "")),
        ("heads", f"{_each(geometry.num_heads)}, {_each(geometry.kv_num_heads)} of keys and values"),
        ("head size", _each(geometry.head_dim)),
        ("vocabulary", f"{geometry.vocab_size}"),
        ("precision", manifest.dtype),
        ("prefix", f"{prefix.length} tokens, {prefix.mode}, {prefix.template}, {_size(shared)} of KV"),
        ("context", f"{manifest.max_context} tokens a request, {_size(context)} of KV"),
        ("positions", f"{geometry.max_positions}"),
        (
            f"KV of {batch}",
            f"{_size(shared + batch * context)}; {_size(batch * (shared + context))} if not shared",
        ),
        ("logits", manifest.logits),
        ("end tokens", ", ".join(map(str, manifest.tokens.eos)) or "none"),
    ]
    rows += [(name, _size(entry.bytes)) for name, entry in manifest.files.items()]
    rows += [("sha256", "every file is as it was exported")] if checked else []
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"{name:<{width}}  {value}" for name, value in rows)


def _each(values: tuple[int, ...]) -> str:
    """One number where all layers agree, the range otherwise."""
    return f"{min(values)} to {max(values)}" if len(set(values)) > 1 else str(values[0]) if values else "0"


def _size(count: float) -> str:
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.2f} GiB"


def _generate(arguments: argparse.Namespace) -> int:
    """Decode a file of prompts, one a line: plain text, or a JSON object with "prompt" (text), "messages" (a
    chat) or "token_ids", and sampling parameters of its own beside it; "id" and "expected" come back with the
    result. Results are JSON objects, one a line, in prompt order, written as soon as they are there; on
    Ctrl-C unfinished requests say "aborted"."""
    from relay_attention.runtime.decoder import GenerationInterrupted, RelayDecoder
    from relay_attention.runtime.sampling import SamplingParams

    names = (*_SAMPLING, "stop", "stop_token_ids", "ignore_eos")
    given = {name: value for name in names if (value := getattr(arguments, name)) is not None}
    numbered = _read_prompts(arguments.prompts, SamplingParams.from_mapping(given))
    options = {name: getattr(arguments, name) for name in ("backend", "threads", "max_batch", "max_context")}
    if arguments.mapped_weights:
        options["mapped_weights"] = True
    with RelayDecoder.load(arguments.artifact, **options) as decoder:
        errors, encoded = [], []
        for entry in numbered:
            try:
                encoded.append(decoder.encode(entry.prompt))
            except PromptError as error:
                errors.append(f"{arguments.prompts}:{entry.line}: {error}")
        _refuse(errors)
        progress = len(encoded) > 1 and sys.stderr.isatty()
        with _Writer(arguments.output, [entry.carried for entry in numbered]) as writer:
            try:
                params = [entry.params for entry in numbered]
                results = decoder.generate(encoded, params, stream=writer.event, progress=progress)
            except GenerationInterrupted as interrupt:
                writer.rest(interrupt.results)
                ended = sum(result.finish_reason != "aborted" for result in interrupt.results)
                print(
                    f"relay-attention: interrupted, {ended} of {len(encoded)} are finished", file=sys.stderr
                )
                return EXIT_INTERRUPTED
    failed = [result.error for result in results if result.finish_reason == "error"]
    if failed:
        print(
            f"relay-attention: {len(failed)} of {len(results)} requests failed: {failed[0]}", file=sys.stderr
        )
    return EXIT_FAILED if failed else 0


@dataclass(frozen=True)
class _Entry:
    """One line of the file of prompts; `carried` is handed on to its result."""

    line: int
    prompt: Prompt
    params: SamplingParams
    carried: dict[str, Any]


def _read_prompts(file: str, base: SamplingParams) -> list[_Entry]:
    """Every line that is not blank."""
    try:
        data = sys.stdin.buffer.read() if file == "-" else Path(file).read_bytes()
        lines = data.decode("utf-8-sig").split("\n")
    except OSError as error:
        raise PromptError(f"{file}: cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise PromptError(f"{file}: not UTF-8: {error}") from error
    prompts: list[_Entry] = []
    errors = []
    for number, line in enumerate(lines, 1):
        if line.strip():
            try:
                prompts.append(_parse(number, line.rstrip("\r"), base, len(prompts)))
            except (PromptError, ValueError) as error:
                errors.append(f"{file}:{number}: {error}")
    _refuse(errors)
    if not prompts:
        raise PromptError(f"{file}: holds no prompt")
    return prompts


def _parse(number: int, line: str, base: SamplingParams, index: int) -> _Entry:
    values: dict[str, Any] = json.loads(line) if line.lstrip().startswith("{") else {"prompt": line}
    found = [values.pop(name) for name in ("prompt", "messages", "token_ids") if name in values]
    if len(found) != 1:
        raise PromptError('one of "prompt", "messages" and "token_ids" is needed')
    carried = {name: values.pop(name) for name in CARRIED if name in values}
    seed = {} if base.seed is None else {"seed": base.seed + index}
    return _Entry(number, found[0], base.from_mapping(seed | values, base), carried)


def _refuse(errors: list[str]) -> None:
    if errors:
        more = [f"and {len(errors) - MOST_ERRORS} more"] if len(errors) > MOST_ERRORS else []
        raise PromptError("\n  ".join([*errors[:MOST_ERRORS], *more]))


class _Writer:
    """Writes results in the order of the prompts, each as soon as those before it are there.

    A file is written as FILE.partial and renamed at the end, or on Ctrl-C; any other end leaves FILE.partial.
    """

    def __init__(self, output: str | None, carried: list[dict[str, Any]]):
        self._carried = carried  # of each prompt
        self._output = Path(output) if output else None
        self._stream = io.FileIO(1, "wb", closefd=False)  # unbuffered: a line is out, or an error
        self._results: dict[int, GenerationResult] = {}
        self._written = 0

    def __enter__(self) -> _Writer:
        if self._output:
            self._partial = self._output.with_name(self._output.name + ".partial")
            try:
                self._stream = io.FileIO(self._partial, "wb")
            except OSError as error:
                raise RelayError(f"{self._partial}: cannot be written: {error.strerror}") from error
        return self

    def __exit__(self, kind: type | None, *_: object) -> None:
        if self._output:
            self._stream.close()
            if kind is None:
                self._partial.replace(self._output)

    def event(self, event: GenerationEvent) -> None:
        """Takes news of one request; only its end matters."""
        if event.result:
            self._results[event.index] = event.result
            while self._written in self._results:
                self._write(self._results.pop(self._written))

    def rest(self, results: list[GenerationResult]) -> None:
        """Writes those of all results that are not written yet."""
        for result in results[self._written :]:
            self._write(result)

    def _write(self, result: GenerationResult) -> None:
        fields: dict[str, Any] = {
            "index": self._written,
            "text": result.text,
            "token_ids": result.token_ids,
            "finish_reason": result.finish_reason,
            "stop": result.stop,
            "prompt_tokens": result.prompt_tokens,
            **self._carried[self._written],
        }
        if result.logprobs is not None:
            fields["logprobs"] = [
                {
                    "token_id": token.token_id,
                    "logprob": _finite(token.logprob),
                    "top": [[token_id, _finite(value)] for token_id, value in token.top],
                }
                for token in result.logprobs
            ]
        if result.error:
            fields["error"] = result.error
        data = (json.dumps(fields, ensure_ascii=False) + "\n").encode("utf-8")
        try:
            while data:
                data = data[self._stream.write(data) :]
        except BrokenPipeError:
            raise
        except OSError as error:
            name = self._partial if self._output else "standard output"
            raise RelayError(f"{name}: cannot be written: {error.strerror}") from error
        self._written += 1


def _finite(value: float) -> float | None:
    """JSON has no infinity."""
    return value if math.isfinite(value) else None
