"""Decodes requests with an artifact, and beside it with the same model without relay attention.

usage: python scripts/compare.py ARTIFACT requests.jsonl [--threads 2] [--json FILE]

Each request is a JSON line with "prompt", and "expected" where the answer is known. The other side is ONNX
Runtime's GroupQueryAttention with the full prompt in every request's cache (scripts/gqa_baseline.py): the
same graph, weights, engine, threads and greedy sampling. Exit status 1 if fewer answers than --min-accuracy
are right, or if the two sides disagree.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from gqa_baseline import GqaDecoder, build

from relay_attention.runtime import GenerationEvent, RelayDecoder, SamplingParams
from relay_attention.runtime.artifact import Artifact
from relay_attention.runtime.text import SystemPrompt, Tokenizer


@dataclass
class Side:
    """One column of the table; times in seconds, sizes in bytes."""

    token_ids: list[list[int]]
    total_seconds: float
    first_token_mean: float
    first_token_max: float
    step_median: float
    kv_bytes: int

    @property
    def tokens_per_second(self) -> float:
        """Generated tokens over the whole time, prefill included."""
        return sum(map(len, self.token_ids)) / self.total_seconds


def with_relay(
    path: Path, prompts: list[list[int]], max_new_tokens: int, threads: int
) -> tuple[Side, list[str]]:
    """Decodes prompts (token ids that follow the prefix) through RelayDecoder; also returns the texts."""
    capacity = max(map(len, prompts)) + max_new_tokens
    with RelayDecoder.load(path, threads=threads, max_batch=len(prompts), max_context=capacity) as decoder:
        first: dict[int, float] = {}
        seen: list[float] = []  # when the first request had its tokens, one a step

        def note(event: GenerationEvent) -> None:
            now = time.perf_counter() - start
            first.setdefault(event.index, now)
            if event.index == 0:
                seen.append(now)

        start = time.perf_counter()
        results = decoder.generate(
            prompts, SamplingParams(temperature=0.0, max_new_tokens=max_new_tokens), stream=note
        )
        total = time.perf_counter() - start
        side = Side(
            [result.token_ids for result in results],
            total,
            float(np.mean(list(first.values()))),
            max(first.values()),
            float(np.median(np.diff(seen))) if len(seen) > 1 else 0.0,
            decoder.cache_bytes + decoder.prefix_bytes,
        )
        return side, [result.text for result in results]


def without_relay(artifact: Artifact, prompts: list[list[int]], max_new_tokens: int, threads: int) -> Side:
    """Decodes prefix and prompt of each request with GroupQueryAttention."""
    full = [[*artifact.manifest.prefix.token_ids, *prompt] for prompt in prompts]
    # beside the artifact: the graph refers to its weights by relative name
    with tempfile.NamedTemporaryFile(dir=artifact.path, prefix=".baseline-", suffix=".onnx") as file:
        build(artifact, Path(file.name))
        decoder = GqaDecoder(Path(file.name), artifact, threads)
    run = decoder.generate(full, max_new_tokens, artifact.manifest.tokens.eos)
    first = run.first_token_seconds
    return Side(
        run.token_ids, run.total_seconds, float(np.mean(first)), max(first), run.step_seconds, run.cache_bytes
    )


def print_table(relay: Side, plain: Side, prefix_length: int) -> float:
    """Prints both sides and their ratios; returns the share of requests whose tokens agree."""
    agreeing = [a == b for a, b in zip(relay.token_ids, plain.token_ids, strict=True)]
    rows = [
        ("tokens/s", relay.tokens_per_second, plain.tokens_per_second, "{:.1f}"),
        ("time to first token, mean (s)", relay.first_token_mean, plain.first_token_mean, "{:.3f}"),
        ("time to first token, last (s)", relay.first_token_max, plain.first_token_max, "{:.3f}"),
        ("decode step of all, median (ms)", relay.step_median * 1e3, plain.step_median * 1e3, "{:.2f}"),
        ("KV memory (MiB)", relay.kv_bytes / 2**20, plain.kv_bytes / 2**20, "{:.1f}"),
    ]
    print(f"\n{len(agreeing)} requests, prefix of {prefix_length} tokens, greedy, same graph and threads.")
    print("With relay the prefix was computed once, at export; without, with every request.\n")
    print(f"{'':32}{'relay':>12}{'without':>12}{'ratio':>9}")
    for name, left, right, form in rows:
        ratio = f"{max(left, right) / min(left, right):.1f}x" if min(left, right) > 0 else "-"
        print(f"{name:32}{form.format(left):>12}{form.format(right):>12}{ratio:>9}")
    print(f"{'same tokens':32}{sum(agreeing):>12} of {len(agreeing)}")
    return sum(agreeing) / len(agreeing)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("artifact", type=Path)
    parser.add_argument("requests", type=Path)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--max-new-tokens", type=int, default=16)
    parser.add_argument("--min-accuracy", type=float, default=0.95)
    parser.add_argument("--show", type=int, default=8, help="answers to print")
    parser.add_argument("--json", type=Path, help="also writes the numbers there")
    arguments = parser.parse_args()
    requests: list[dict[str, Any]] = [
        json.loads(line)
        for line in arguments.requests.read_text(encoding="utf-8").splitlines()
        if line.strip()
    ]
    artifact = Artifact.open(arguments.artifact)
    system_prompt = SystemPrompt.open(artifact, Tokenizer.open(artifact.path))
    prompts = [system_prompt.encode(request["prompt"]) for request in requests]
    relay, texts = with_relay(arguments.artifact, prompts, arguments.max_new_tokens, arguments.threads)
    plain = without_relay(artifact, prompts, arguments.max_new_tokens, arguments.threads)

    for request, text in list(zip(requests, texts, strict=True))[: arguments.show]:
        print(f"{request['prompt']:56} -> {text.strip():8} {_judge(request, text)}")
    judged = [
        _judge(request, text) for request, text in zip(requests, texts, strict=True) if "expected" in request
    ]
    accuracy = judged.count("right") / len(judged) if judged else None
    if accuracy is not None:
        print(f"accuracy: {judged.count('right')} of {len(judged)}")
    prefix_length = artifact.manifest.prefix.length
    agreement = print_table(relay, plain, prefix_length)
    if arguments.json:
        numbers = {"accuracy": accuracy, "agreement": agreement, "prefix_length": prefix_length}
        numbers |= {"relay": asdict(relay), "without": asdict(plain)}
        arguments.json.write_text(json.dumps(numbers, indent=2), encoding="utf-8")
    return int((accuracy is not None and accuracy < arguments.min_accuracy) or agreement < 1)


def _judge(request: dict[str, Any], text: str) -> str:
    if "expected" not in request:
        return ""
    return "right" if text.strip() == request["expected"] else f"WRONG, expected {request['expected']}"


if __name__ == "__main__":
    sys.exit(main())
