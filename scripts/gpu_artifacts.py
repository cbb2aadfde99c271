"""Makes the artifacts of tests/runtime/test_onnxruntime_cuda.py for a machine that cannot export.

usage: python scripts/gpu_artifacts.py FOLDER       a few MB; then, on the machine with the GPU:
       RELAY_GPU_ARTIFACTS=FOLDER pytest -m gpu tests/runtime/test_onnxruntime_cuda.py

Needs what exporting needs, and onnxruntime-genai for the quantised model. No GPU.
"""

from __future__ import annotations

import argparse
import runpy
import sys
import tempfile
from pathlib import Path
from unittest import mock

import numpy as np

from relay_attention.export import export_model
from relay_attention.export.float32_form import load_on_cpu
from relay_attention.runtime.artifact import Artifact
from relay_attention.runtime.text import SystemPrompt, Tokenizer

ROOT = Path(__file__).resolve().parents[1]
DEMO = ROOT / "examples" / "directory" / "model"


def system_prompt(entries: int = 64) -> str:
    """A directory as the demo model knows them."""
    sys.path.insert(0, str(DEMO.parent))
    import make_directory

    with tempfile.TemporaryDirectory() as folder:
        command = [
            "make_directory",
            "--seed",
            "7",
            "--requests",
            "1",
            "--entries",
            str(entries),
            "-o",
            folder,
        ]
        with mock.patch.object(sys, "argv", command):
            make_directory.main()
        return (Path(folder) / "system_prompt.txt").read_text(encoding="utf-8")


def questions(prompt: str) -> list[str]:
    """One of every person that a directory lists."""
    names = [line.rsplit(" ", 1)[0] for line in prompt.splitlines() if line[-4:].isdigit()]
    return [f"What is the extension of {name}?" for name in names]


def make_int4(folder: Path, *options: str) -> Path:
    """The demo model as onnxruntime-genai builds it for CUDA, weights of 4 bits (MatMulNBits).

    options: of its builder, NAME=VALUE.
    """
    command = ["builder", "-i", str(DEMO), "-o", str(folder), "-p", "int4", "-e", "cuda"]
    command += ["-c", str(folder / "cache"), "--extra_options", "hf_token=false", *options]
    with mock.patch.object(sys, "argv", command):
        runpy.run_module("onnxruntime_genai.models.builder", run_name="__main__")
    return folder


def make_gpt2(folder: Path) -> Path:
    """A tiny GPT-2, random: learned positions, computed in the graph from shapes."""
    import torch
    import transformers

    config = transformers.GPT2Config(
        vocab_size=768, n_positions=1024, n_embd=128, n_layer=2, n_head=4, bos_token_id=0, eos_token_id=1,
        initializer_range=0.1,
    )  # fmt: skip
    torch.manual_seed(0)
    transformers.GPT2LMHeadModel(config).eval().save_pretrained(folder)
    for path in DEMO.glob("tokenizer*"):
        (folder / path.name).write_bytes(path.read_bytes())
    return folder


def write_reference(folder: Path, questions: list[str], new_tokens: int = 8) -> None:
    """A bfloat16 artifact computed in float32, for machines that cannot: FOLDER.npz beside it.

    prompt_lens [n], prompts [n, longest] (int32, padded), tokens [n, new_tokens] (int32, greedy) and the
    logits [n, new_tokens, vocab] (float32) that each of these is the largest of.
    """
    artifact = Artifact.open(folder)
    system = SystemPrompt.open(artifact, Tokenizer.open(folder))
    prompts = [system.encode(question) for question in questions]
    lengths = np.array([len(prompt) for prompt in prompts], np.int32)
    padded = np.zeros((len(prompts), lengths.max()), np.int32)
    for row, prompt in zip(padded, prompts, strict=True):
        row[: len(prompt)] = prompt
    backend = load_on_cpu(artifact, threads=2)
    backend.allocate(len(prompts), int(lengths.max()) + new_tokens)
    backend.step(0, padded, np.zeros_like(lengths), lengths)
    logits = [backend.read_logits().copy()]
    for step in range(new_tokens - 1):
        tokens = logits[-1].argmax(axis=-1).astype(np.int32)
        backend.step(0, tokens[:, None], lengths + np.int32(step), np.ones_like(lengths))
        logits.append(backend.read_logits().copy())
    backend.close()
    found = np.stack(logits, axis=1)
    tokens = found.argmax(axis=-1).astype(np.int32)
    np.savez(folder.with_suffix(".npz"), prompt_lens=lengths, prompts=padded, tokens=tokens, logits=found)


def make_gemma2(folder: Path) -> Path:
    """A tiny Gemma 2, random: norms scaled in float32, softcaps, a window, activations of other kinds."""
    import torch
    import transformers

    config = transformers.Gemma2Config(
        vocab_size=768, hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=64, query_pre_attn_scalar=64, sliding_window=24,
        max_position_embeddings=1024, bos_token_id=0, eos_token_id=1, pad_token_id=2, initializer_range=0.2,
    )  # fmt: skip
    torch.manual_seed(0)
    transformers.Gemma2ForCausalLM(config).to(torch.bfloat16).eval().save_pretrained(folder)
    for path in DEMO.glob("tokenizer*"):
        (folder / path.name).write_bytes(path.read_bytes())
    return folder


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    folder: Path = parser.parse_args().folder
    folder.mkdir(parents=True, exist_ok=True)
    prompt = system_prompt()
    with tempfile.TemporaryDirectory() as scratch:
        sources = {
            "demo": (DEMO, {"precision": "fp16"}),
            "demo-input": (DEMO, {"precision": "fp16", "prefix": "input"}),
            "demo-bf16": (DEMO, {"precision": "bf16"}),
            "demo-bf16-input": (DEMO, {"precision": "bf16", "prefix": "input"}),
            "demo-int4": (make_int4(Path(scratch) / "int4"), {}),
            "demo-int4-bf16": (make_int4(Path(scratch) / "int4-bf16", "use_cuda_bf16=1"), {}),
            "gemma2-bf16": (
                make_gemma2(Path(scratch) / "gemma2"),
                {"precision": "bf16", "template": "plain"},
            ),
            "gpt2": (make_gpt2(Path(scratch) / "gpt2"), {"precision": "fp16", "template": "plain"}),
        }
        for name, (source, options) in sources.items():
            print(f"{name} ...", flush=True)
            text = prompt if name != "demo-bf16-input" else system_prompt(16)
            export_model(source, text, folder / name, max_context=128, threads=2, **options)
    for name in ("demo-bf16", "demo-int4-bf16", "gemma2-bf16"):
        write_reference(folder / name, [*questions(prompt)[::8], "the a of to", "?"])
    (folder / "system_prompt.txt").write_text(prompt, encoding="utf-8")


if __name__ == "__main__":
    main()
