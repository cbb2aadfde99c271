"""Models with random weights, small enough to make in a test: Hugging Face folders and genai builds of
them."""

from __future__ import annotations

import contextlib
import io
import json
import runpy
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import tokenizers
import torch
import transformers

VOCAB_SIZE = 384
MAX_POSITIONS = 512
WINDOW = 24  # shorter than the prefixes of the tests
HEADS, KV_HEADS, HEAD_DIM = 4, 2, 16

SYSTEM_PROMPT = (
    "You are the clerk of a small library. Books are lent for three weeks; whoever asks for a book by name "
    "is told its shelf, and nothing else. Answer briefly, in one sentence, and be kind."
)
CHAT_TEMPLATE = (
    "{% for message in messages %}<s>{{ message['role'] }}: {{ message['content'] }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant:{% endif %}"
)

_BASE: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": HEADS * HEAD_DIM,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KV_HEADS,
    "max_position_embeddings": MAX_POSITIONS,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
    # wide enough that attention decides which token comes next
    "initializer_range": 0.2,
}
CONFIGS: dict[str, Any] = {
    "llama": lambda: transformers.LlamaConfig(**_BASE),
    "llama-tied": lambda: transformers.LlamaConfig(**_BASE, tie_word_embeddings=True),
    "llama3-scaling": lambda: transformers.LlamaConfig(
        **_BASE,
        rope_parameters={
            "rope_type": "llama3",
            "rope_theta": 10000.0,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        },
    ),
    "qwen2": lambda: transformers.Qwen2Config(**_BASE),
    "qwen3": lambda: transformers.Qwen3Config(**_BASE, head_dim=HEAD_DIM),
    "mistral": lambda: transformers.MistralConfig(**_BASE, sliding_window=WINDOW),
}


def make_tokenizer(folder: Path, chat_template: str | None = None) -> None:
    """A byte-level BPE tokenizer with <s>, </s> and <pad>, saved as transformers saves it."""
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=300,  # few merges, so that the prompt has many tokens
        special_tokens=["<s>", "</s>", "<pad>"],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([SYSTEM_PROMPT * 3], trainer)
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    )
    if chat_template:
        fast.chat_template = chat_template
    fast.save_pretrained(folder)


def make_model(folder: Path, config: Any, chat_template: str | None = None, seed: int = 0) -> Path:
    """A Hugging Face folder with random weights (norms and biases too) and a tokenizer."""
    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1:
                torch.nn.init.normal_(parameter, 0.0 if name.endswith("bias") else 1.0, 0.1)
    model.save_pretrained(folder)
    make_tokenizer(folder, chat_template)
    return folder


def make_genai(
    folder: Path, source: Path, precision: str = "fp32", provider: str | None = None, **options: Any
) -> Path:
    """What onnxruntime-genai's model builder makes of a Hugging Face folder, for the CPU (fp16: for CUDA)."""
    provider = provider or ("cuda" if precision == "fp16" else "cpu")
    command = ["builder", "-i", str(source), "-o", str(folder), "-p", precision, "-e", provider]
    command += ["-c", str(folder / "cache"), "--extra_options", "hf_token=false"]
    command += [f"{name}={value}" for name, value in options.items()]
    # its command line, which is the same in all versions, without another process's imports
    with mock.patch.object(sys, "argv", command), _silence():
        runpy.run_module("onnxruntime_genai.models.builder", run_name="__main__")
    return folder


@contextlib.contextmanager
def _silence() -> Iterator[None]:
    with (
        contextlib.redirect_stdout(io.StringIO()),
        contextlib.redirect_stderr(io.StringIO()),
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore")
        yield


def edit_json(path: Path, **fields: Any) -> None:
    """Changes fields of a JSON file; None removes one."""
    data = json.loads(path.read_text())
    for name, value in fields.items():
        if value is None:
            data.pop(name, None)
        else:
            data[name] = value
    path.write_text(json.dumps(data))
