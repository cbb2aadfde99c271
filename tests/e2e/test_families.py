"""Model families, each a tiny random model made here, beside transformers running every request in full.

A case is exported with a system prompt that is longer than any window, decoded by RelayDecoder over a ragged
batch, and held against transformers by the rule of `verify`: every token is the reference's best (or a tie
within the tolerance), every logit is close. A refusal is a case too: its reason is part of docs/models.md.

The cases are in families.py, ONNX files of them in test_onnx_files.py; docs/models.md: test_table.py.
"""

from __future__ import annotations

import json
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import torch
import transformers
from families import (  # conftest.py has loaded it
    FAMILIES,
    GENAI,
    POSITIONS,
    REFUSALS,
    VOCAB,
    WINDOW,
    for_builder,
    without,
)

from relay_attention.errors import ExportError
from relay_attention.export import export_model, verify
from relay_attention.export.passes import run
from relay_attention.export.passes.tensorrt import tensorrt_passes
from relay_attention.runtime import RelayDecoder, SamplingParams
from relay_attention.runtime.artifact import Artifact

PROMPTS = (1, 29, 2, 17)  # tokens: ragged, more requests than cache slots
NEW_TOKENS = 6
# a prompt of ordinary length and a wish that cannot be met
_MAX_CONTEXT = {"phi3-across": POSITIONS // 2}


def _prompts() -> list[list[int]]:
    generator = np.random.default_rng(0)
    return [generator.integers(3, VOCAB, length).tolist() for length in PROMPTS]


@pytest.mark.parametrize("family", FAMILIES)
def test_family(tiny: ModuleType, family: str, tmp_path: Path, models_table: Any) -> None:
    title, config = FAMILIES[family]
    folder = tiny.make_model(tmp_path / family, config())
    output = export_model(folder, tiny.SYSTEM_PROMPT, tmp_path / "out", template="plain", threads=1)
    manifest = Artifact.open(output).manifest
    assert manifest.prefix.length > 3 * WINDOW
    report = verify(output, folder, requests=len(PROMPTS), new_tokens=NEW_TOKENS, threads=1)
    assert report.ok, report.table()

    model = transformers.AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()
    prompts = _prompts()
    sampling = SamplingParams(max_new_tokens=NEW_TOKENS, ignore_eos=True)
    with RelayDecoder.load(output, max_batch=3, threads=1, prefill_chunk=16) as decoder:
        answers = [result.token_ids for result in decoder.generate(prompts, sampling)]
    for prompt, answer in zip(prompts, answers, strict=True):
        _check_greedy(model, [*manifest.prefix.token_ids, *prompt], answer)
    row = models_table.row(family, title)
    row.architecture = manifest.source["architecture"]
    row.results["Hugging Face folder"] = "right"
    row.tensorrt = _tensorrt_checks(output)


def _tensorrt_checks(output: Path) -> str:
    """Whether the graph could be put in the forms that TensorRT takes."""
    try:
        run(ir.load(output / "model.onnx"), tensorrt_passes())
    except ExportError as error:
        return f"refused: {str(error).splitlines()[0]}"
    return "checks passed"


@pytest.mark.parametrize("family", FAMILIES)
def test_genai_folder(tiny: ModuleType, family: str, tmp_path: Path, models_table: Any) -> None:
    """The same families as onnxruntime-genai's builder makes them, as far as it does."""
    title, config = FAMILIES[family]
    row = models_table.row(family, title)
    folder = tiny.make_model(tmp_path / "model", config())
    expected = GENAI.get(family)
    if expected is None:
        with pytest.raises((NotImplementedError, KeyError)):
            tiny.make_genai(tmp_path / "genai", folder)
        row.results["onnxruntime-genai folder"] = "not built"
        return
    built = tiny.make_genai(tmp_path / "genai", for_builder(folder, tmp_path / "prepared"))
    output = export_model(built, tiny.SYSTEM_PROMPT, tmp_path / "out", template="plain", threads=1)
    if expected != "right":
        folder = tiny.make_model(tmp_path / "reference", without(family, expected))
    report = verify(output, folder, requests=len(PROMPTS), new_tokens=NEW_TOKENS, threads=1)
    assert report.ok, report.table()
    row.results["onnxruntime-genai folder"] = expected


@pytest.mark.parametrize("family", ["gemma2", "gpt2", "mixtral"])
def test_bfloat16(tiny: ModuleType, family: str, tmp_path: Path) -> None:
    """Computed in float32 here. Every node has a kernel for bfloat16 on CUDA: none is between Casts."""
    folder = tiny.make_model(tmp_path / family, FAMILIES[family][1]())
    output = export_model(
        folder, tiny.SYSTEM_PROMPT, tmp_path / "out", precision="bf16", template="plain", threads=1
    )
    names = [str(node.name) for node in ir.load(output / "model.onnx").graph]
    assert not [name for name in names if name.endswith(("/float32", "/bfloat16"))]
    report = verify(output, folder, requests=len(PROMPTS), new_tokens=NEW_TOKENS, threads=1)
    assert report.ok, report.table()


def _check_greedy(model: Any, prompt: list[int], answer: list[int]) -> None:
    """Every token is the best of the full prompt's logits, which are spread wide enough to tell."""
    with torch.no_grad():
        logits = model(torch.tensor([[*prompt, *answer[:-1]]]), use_cache=False).logits[0, len(prompt) - 1 :]
    tolerance = 2e-4 * max(1.0, float(logits.abs().max()))
    gap = logits.max(dim=-1).values - logits[torch.arange(len(answer)), answer]
    assert gap.max() <= tolerance
    ranked = logits.sort(dim=-1, descending=True).values
    decided = (ranked[:, 0] - ranked[:, 1] > 10 * tolerance).float().mean()
    assert decided >= 0.5, "the test's model gives near-ties: it could not tell right from wrong"


@pytest.mark.parametrize("family", REFUSALS)
def test_refusal(tiny: ModuleType, family: str, tmp_path: Path, models_table: Any) -> None:
    title, config, reason = REFUSALS[family]
    made = config()
    folder = tmp_path / family
    architecture = type(made).__name__.removesuffix("Config")
    if made.is_encoder_decoder:  # refused before anything is loaded
        made.save_pretrained(folder)
        (folder / "model.safetensors").write_bytes(b"")
        tiny.make_tokenizer(folder)
    else:
        tiny.make_model(folder, made)
        architecture = json.loads((folder / "config.json").read_text())["architectures"][0]
    with pytest.raises(ExportError, match=reason) as found:
        export_model(
            folder,
            tiny.SYSTEM_PROMPT,
            tmp_path / "out",
            template="plain",
            max_context=_MAX_CONTEXT.get(family),
        )
    assert not (tmp_path / "out").exists()
    message = str(found.value)
    assert str(folder) in message
    row = models_table.row(family, title)
    row.architecture = architecture
    row.refusal = message.replace(f"{folder}: ", "").replace(str(folder), "the folder")
