#!/usr/bin/env python3
"""Accuracy of the demo model in transformers (float32, greedy) over directories that training never saw.

    python evaluate.py --directories 24                  # needs torch, transformers

An answer counts when it is exact: the four digits and the end of the turn, nothing else. The keys and values
of the system prompt are computed once a directory and repeated for its requests.
"""

from __future__ import annotations

import argparse
import copy
import time
from collections import defaultdict
from pathlib import Path

import make_directory as data
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DynamicCache,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

MODEL = Path(__file__).parent / "model"
MAX_NEW_TOKENS = 8


def split_prompts(
    tokenizer: PreTrainedTokenizerBase, system_prompt: str, prompts: list[str]
) -> tuple[list[int], list[list[int]]]:
    """Token ids of the part that all prompts share, up to the user's text, and what follows it in each."""

    def render(prompt: str) -> list[int]:
        messages = [{"role": "system", "content": system_prompt}, {"role": "user", "content": prompt}]
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        ids: list[int] = tokenizer.encode(text, add_special_tokens=False)
        return ids

    shared = render("")
    prefix = shared[: shared.index(tokenizer.convert_tokens_to_ids("<|user|>")) + 1]
    rows = [render(prompt) for prompt in prompts]
    assert all(row[: len(prefix)] == prefix for row in rows)
    return prefix, [row[len(prefix) :] for row in rows]


@torch.no_grad()
def answer(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, system_prompt: str, prompts: list[str]
) -> list[str]:
    """Greedy answers, up to the end of the turn; one that does not end is marked with a trailing ellipsis."""
    prefix, suffixes = split_prompts(tokenizer, system_prompt, prompts)
    prefix_cache = DynamicCache(config=model.config)
    model(input_ids=torch.tensor([prefix]), past_key_values=prefix_cache, logits_to_keep=1)
    by_length = defaultdict(list)  # rows of one length need no padding
    for index, suffix in enumerate(suffixes):
        by_length[len(suffix)].append(index)
    answers = [""] * len(prompts)
    for rows in by_length.values():
        cache = copy.deepcopy(prefix_cache)
        cache.batch_repeat_interleave(len(rows))
        step = torch.tensor([suffixes[row] for row in rows])
        generated = []
        for _ in range(MAX_NEW_TOKENS):
            step = (
                model(input_ids=step, past_key_values=cache, logits_to_keep=1)
                .logits[:, -1]
                .argmax(-1)[:, None]
            )
            generated.append(step)
        for row, ids in zip(rows, torch.cat(generated, 1).tolist(), strict=True):
            ended = tokenizer.eos_token_id in ids
            ids = ids[: ids.index(tokenizer.eos_token_id)] if ended else ids
            answers[row] = tokenizer.decode(ids) + ("" if ended else "...")
    return answers


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, default=MODEL)
    parser.add_argument("--directories", type=int, default=24)
    parser.add_argument("--entries", type=int, nargs="+", default=[8, 32, 128, 224, 256, 280])
    parser.add_argument("--requests", type=int, default=32)
    parser.add_argument("--seed", type=int, default=1000, help="of the first directory")
    parser.add_argument(
        "--unseen-pairs", action="store_true", help="only names that training never put together"
    )
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    model = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=torch.float32).eval()
    pairs = data.HELD_OUT_PAIRS if arguments.unseen_pairs else data.ALL_PAIRS
    for entries in arguments.entries:
        started, right, total, tokens = time.perf_counter(), 0, 0, 0
        for seed in range(arguments.seed, arguments.seed + arguments.directories):
            prompt, requests = data.make_directory(seed, entries, arguments.requests, pairs)
            answers = answer(model, tokenizer, prompt, [request["prompt"] for request in requests])
            right += sum(a == request["expected"] for a, request in zip(answers, requests, strict=True))
            total += len(requests)
            tokens += len(split_prompts(tokenizer, prompt, [])[0])
        print(
            f"{entries:4} entries, {tokens / arguments.directories:6.0f} prompt tokens: "
            f"{right}/{total} exact = {100 * right / total:.2f} %  ({time.perf_counter() - started:.0f} s)",
            flush=True,
        )


if __name__ == "__main__":
    main()
