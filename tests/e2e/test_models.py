"""Models from both sources, exported and decoded, beside transformers running the full prompt of each
request.

The prefix is longer than any window, the batch is ragged, and there are more requests than cache slots.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import numpy as np
import onnx
import pytest
import torch
import transformers

from relay_attention.errors import ExportError
from relay_attention.export import export_model, verify
from relay_attention.runtime import RelayDecoder, SamplingParams
from relay_attention.runtime.artifact import Artifact

LENGTHS = (1, 40, 2, 17, 3, 33, 8)
NEW_TOKENS = 10
GREEDY = SamplingParams(max_new_tokens=NEW_TOKENS, ignore_eos=True)

Folder = Callable[[str], Path]


@pytest.fixture(scope="session")
def model_folder(tiny: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Folder:
    """The Hugging Face folder of a family, made once."""
    made: dict[str, Path] = {}

    def folder(family: str) -> Path:
        if family not in made:
            template = tiny.CHAT_TEMPLATE if family == "llama" else None
            path = tmp_path_factory.mktemp(family) / family
            made[family] = tiny.make_model(path, tiny.CONFIGS[family](), template)
        return made[family]

    return folder


@pytest.fixture(scope="session")
def genai_folder(
    tiny: ModuleType, model_folder: Folder, tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., Path]:
    """What onnxruntime-genai's builder makes of a family's folder."""

    def folder(family: str, precision: str = "fp32", **options: object) -> Path:
        source = model_folder(family)
        if family == "mistral":
            # without layer_types the builder takes a config with a window for one with full attention
            tiny.edit_json(source / "config.json", layer_types=["sliding_attention"] * 2)
        try:
            return tiny.make_genai(tmp_path_factory.mktemp("genai") / family, source, precision, **options)
        finally:
            if family == "mistral":
                tiny.edit_json(source / "config.json", layer_types=None)

    return folder


def _prompts(vocab_size: int) -> list[list[int]]:
    generator = np.random.default_rng(0)
    return [generator.integers(3, vocab_size, length).tolist() for length in LENGTHS]


def _decode(output: Path, prompts: list, threads: int = 2) -> list[list[int]]:
    with RelayDecoder.load(output, max_batch=3, threads=threads, prefill_chunk=16) as decoder:
        return [result.token_ids for result in decoder.generate(prompts, GREEDY)]


def _transformers_greedy(folder: Path, prefix: tuple[int, ...], prompts: list[list[int]]) -> list[list[int]]:
    """Greedy tokens of the full prompts, one at a time, without any cache."""
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    results = []
    for prompt in prompts:
        tokens = [*prefix, *prompt]
        with torch.no_grad():
            for _ in range(NEW_TOKENS):
                tokens.append(int(model(torch.tensor([tokens]), use_cache=False).logits[0, -1].argmax()))
        results.append(tokens[-NEW_TOKENS:])
    return results


def _check(tiny: ModuleType, folder: Path, output: Path) -> None:
    manifest = Artifact.open(output).manifest
    assert manifest.prefix.length > 3 * tiny.WINDOW
    prompts = _prompts(manifest.geometry.vocab_size)
    assert _decode(output, prompts) == _transformers_greedy(folder, manifest.prefix.token_ids, prompts)


@pytest.mark.parametrize("family", ["llama", "llama-tied", "llama3-scaling", "qwen2", "qwen3", "mistral"])
def test_huggingface(tiny: ModuleType, model_folder: Folder, family: str, tmp_path: Path) -> None:
    folder = model_folder(family)
    output = export_model(folder, tiny.SYSTEM_PROMPT, tmp_path / "out", template="plain")
    _check(tiny, folder, output)
    windows = Artifact.open(output).manifest.geometry.local_window_size
    assert windows == ((tiny.WINDOW,) * 2 if family == "mistral" else (-1, -1))


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "mistral"])
def test_genai(
    tiny: ModuleType, model_folder: Folder, genai_folder: Callable[..., Path], family: str, tmp_path: Path
) -> None:
    output = export_model(genai_folder(family), tiny.SYSTEM_PROMPT, tmp_path / "out", template="plain")
    _check(tiny, model_folder(family), output)
    windows = Artifact.open(output).manifest.geometry.local_window_size
    assert windows == ((tiny.WINDOW,) * 2 if family == "mistral" else (-1, -1))


def test_genai_with_separate_projections(
    tiny: ModuleType, model_folder: Folder, genai_folder: Callable[..., Path], tmp_path: Path
) -> None:
    source = genai_folder("qwen2", fuse_qkv="false")
    output = export_model(source, tiny.SYSTEM_PROMPT, tmp_path / "out")
    _check(tiny, model_folder("qwen2"), output)


def test_genai_int4_is_what_its_own_graph_computes(
    tiny: ModuleType, genai_folder: Callable[..., Path], tmp_path: Path
) -> None:
    """Quantised weights differ from the original's, so the builder's graph is the reference."""
    import onnxruntime

    source = genai_folder("llama", "int4")
    graph = onnx.load(source / "model.onnx", load_external_data=False)
    for node in graph.graph.node:
        for attribute in node.attribute:
            if attribute.name == "accuracy_level":
                # activations in float32: in int8 (the default) the last bits of a sum decide a rounding
                attribute.i = 1
    onnx.save(graph, source / "model.onnx")
    output = export_model(source, tiny.SYSTEM_PROMPT, tmp_path / "out", template="plain")
    manifest = Artifact.open(output).manifest
    prompts = _prompts(manifest.geometry.vocab_size)
    session = onnxruntime.InferenceSession(source / "model.onnx", providers=["CPUExecutionProvider"])
    empty = {
        value.name: np.zeros((1, tiny.KV_HEADS, 0, tiny.HEAD_DIM), np.float32)
        for value in session.get_inputs()
        if value.name.startswith("past_key_values")
    }
    expected = []
    for prompt in prompts:
        tokens = [*manifest.prefix.token_ids, *prompt]
        for _ in range(NEW_TOKENS):
            ids = np.array([tokens], np.int64)
            logits = session.run(
                ["logits"], {"input_ids": ids, "attention_mask": np.ones_like(ids), **empty}
            )[0]
            tokens.append(int(logits[0, -1].argmax()))
        expected.append(tokens[-NEW_TOKENS:])
    assert _decode(output, prompts) == expected


@pytest.mark.parametrize("source", ["huggingface", "genai"])
def test_float16(
    tiny: ModuleType, model_folder: Folder, genai_folder: Callable[..., Path], source: str, tmp_path: Path
) -> None:
    """Against float32: logits within tolerance, and no token that is worse than that."""
    folder = model_folder("llama") if source == "huggingface" else genai_folder("llama", "fp16")
    output = export_model(folder, tiny.SYSTEM_PROMPT, tmp_path / "out", precision="fp16", template="plain")
    assert Artifact.open(output).manifest.dtype == "float16"
    report = verify(output, model_folder("llama"), requests=4, new_tokens=8, threads=2)
    assert report.ok, report.table()
    assert sum(request.matches for request in report.requests) >= 28


@pytest.mark.parametrize(
    ("family", "precision", "provider", "kind"),
    [
        # with position_ids, GroupQueryAttention that does not rotate
        ("llama", "fp16", "dml", "GroupQueryAttention"),
        # keys repeated for every head behind caches, a mask that takes several tokens with empty caches only
        ("llama", "fp16", "cpu", "MultiHeadAttention"),
        # query and key normalised by the attention itself
        ("qwen3", "fp32", "webgpu", "GroupQueryAttention"),
    ],
)
def test_genai_for_other_devices(
    tiny: ModuleType,
    model_folder: Folder,
    genai_folder: Callable[..., Path],
    tmp_path: Path,
    family: str,
    precision: str,
    provider: str,
    kind: str,
) -> None:
    source = genai_folder(family, precision, provider=provider)
    graph = onnx.load(source / "model.onnx", load_external_data=False).graph
    assert [node.op_type for node in graph.node].count(kind) == 2
    output = export_model(source, tiny.SYSTEM_PROMPT, tmp_path / "out", template="plain", threads=1)
    report = verify(output, model_folder(family), requests=4, new_tokens=8, threads=2)
    assert report.ok, report.table()
    assert sum(request.matches for request in report.requests) >= (32 if precision == "fp32" else 28)


@pytest.mark.parametrize(
    ("precision", "options", "reason"),
    [
        (
            "fp32",
            {},
            r"com\.microsoft\.Attention node '/model/layers\.0/.*it projects the query, key and value",
        ),
        (
            "fp16",
            {"use_paged_attention": "true"},
            r"com\.microsoft\.PagedAttention node '/model/layers\.0/.*KV cache lies in blocks",
        ),
    ],
)
def test_genai_attention_that_is_refused(
    genai_folder: Callable[..., Path], tmp_path: Path, precision: str, options: dict[str, str], reason: str
) -> None:
    source = genai_folder("llama", precision, provider="cuda", **options)
    with pytest.raises(ExportError, match=reason):
        export_model(source, "Be kind.", tmp_path / "out")


@pytest.mark.parametrize(("prefix", "all_logits"), [("input", False), ("static", True)])
def test_other_layouts_of_the_graph(
    tiny: ModuleType,
    model_folder: Folder,
    genai_folder: Callable[..., Path],
    prefix: str,
    all_logits: bool,
    tmp_path: Path,
) -> None:
    output = export_model(
        genai_folder("qwen3"), tiny.SYSTEM_PROMPT, tmp_path / "out", prefix=prefix, all_logits=all_logits
    )
    _check(tiny, model_folder("qwen3"), output)


def test_requests_as_text_follow_the_chat_template(
    tiny: ModuleType, model_folder: Folder, tmp_path: Path
) -> None:
    folder = model_folder("llama")
    output = export_model(folder, tiny.SYSTEM_PROMPT, tmp_path / "out")
    assert Artifact.open(output).manifest.prefix.template == "chat"
    questions = ["Where is Middlemarch?", "b", " 3 books, please", "Ulysses?"]
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    whole = [
        tokenizer.apply_chat_template(
            [{"role": "system", "content": tiny.SYSTEM_PROMPT}, {"role": "user", "content": question}],
            add_generation_prompt=True,
            return_dict=False,
        )
        for question in questions
    ]
    assert _decode(output, questions) == _transformers_greedy(folder, (), whole)
