"""Every form of attention in an ONNX decoder, exported and decoded, beside what the graph itself decodes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import onnx
import onnx_decoders as d  # conftest.py has loaded it
import pytest

from relay_attention.errors import ExportError
from relay_attention.export import export_model
from relay_attention.export.onnx_source import load_onnx
from relay_attention.runtime import RelayDecoder, SamplingParams
from relay_attention.runtime.artifact import Artifact

NEW_TOKENS = 5
PROMPTS = [np.random.default_rng(n).integers(3, d.VOCAB, n).tolist() for n in (1, 14, 3, 9)]

WORKING = {
    "written out, scores multiplied, keys shared by Expand": lambda: d.decoder(d.decomposed()),
    "written out, query scaled, keys shared by Tile": lambda: d.decoder(
        d.decomposed(scale="query", repeat="tile")
    ),
    "written out, key scaled, keys shared by Gather": lambda: d.decoder(
        d.decomposed(scale="key", repeat="gather", factor=0.4)
    ),
    "written out, scale split on both, guard against NaN": lambda: d.decoder(
        d.decomposed(scale="split", guard=True)
    ),
    "written out, opset 17, scores divided, mask by Where": lambda: d.decoder(
        d.decomposed(scale="divide", mask="where"), opset=17
    ),
    "written out, softcap, mask by arithmetic": lambda: d.decoder(
        d.decomposed(softcap=1.5, mask="arithmetic")
    ),
    "written out, softcap and window, mask by Where": lambda: d.decoder(
        d.decomposed(window=24, softcap=2.0, mask="where")
    ),
    "written out, as many key heads as query heads": lambda: d.decoder(
        d.decomposed(scale="split"), kv_heads=4
    ),
    "written out, one key head": lambda: d.decoder(d.decomposed(), kv_heads=1),
    "written out, positions counted from attention_mask": lambda: d.decoder(
        d.decomposed(), positions="cumsum"
    ),
    "written out, positions counted behind the cache": lambda: d.decoder(d.decomposed(), positions="range"),
    "Attention 24, positions counted behind the cache": lambda: d.decoder(
        d.onnx_attention(), positions="range", opset=24
    ),
    "Attention 23, caches by Concat, bool mask": lambda: d.decoder(d.onnx_attention(), opset=23),
    "Attention 23, caches by Concat, float mask, softcap": lambda: d.decoder(
        d.onnx_attention(mask="float", scale=0.3, softcap=2.0), opset=23
    ),
    "Attention 23 in 3-D, caches by Concat, window": lambda: d.decoder(
        d.onnx_attention(rank=3, window=24), opset=23
    ),
    "Attention 23, caches of its own": lambda: d.decoder(d.onnx_attention(inner=True, mask="bool"), opset=23),
    "Attention 24, caches by Concat, bool mask": lambda: d.decoder(d.onnx_attention(), opset=24),
    "Attention 24 in 3-D, caches of its own, is_causal": lambda: d.decoder(
        d.onnx_attention(rank=3, inner=True, mask=None, is_causal=1), opset=24
    ),
    "Attention 24, TensorScatter caches, nonpad_kv_seqlen": lambda: d.decoder(
        d.scattered, opset=24, prepare=d.lengths
    ),
    "MultiHeadAttention, caches of its own, attention_bias": lambda: d.decoder(d.multi_head(), kv_heads=4),
    "MultiHeadAttention, bias of the projections, key_padding_mask": lambda: d.decoder(
        d.multi_head(bias=True, padding=True), kv_heads=4
    ),
    "MultiHeadAttention, unidirectional": lambda: d.decoder(
        d.multi_head(causal="unidirectional"), kv_heads=4
    ),
    "MultiHeadAttention, caches by Concat": lambda: d.decoder(d.multi_head(inner=False), kv_heads=4),
}


@pytest.fixture
def folder(tiny: ModuleType, tmp_path: Path) -> Callable[..., Path]:
    def make(model: onnx.ModelProto, **config: object) -> Path:
        return d.save(tmp_path / "model", model, tiny.make_tokenizer, **config)

    return make


@pytest.mark.parametrize("name", WORKING)
def test_greedy_tokens_are_the_graphs_own(
    tiny: ModuleType, folder: Callable[..., Path], tmp_path: Path, name: str, models_table: Any
) -> None:
    model = WORKING[name]()
    output = export_model(folder(model), tiny.SYSTEM_PROMPT, tmp_path / "out", template="plain", threads=1)
    manifest = Artifact.open(output).manifest
    assert manifest.source == {"kind": "onnx", "architecture": "TestDecoder"}
    assert manifest.prefix.length > 3 * tiny.WINDOW
    assert manifest.geometry.local_window_size == ((24, 24) if "window" in name else (-1, -1))
    heads = 4 if "Multi" in name or "as many" in name else 1 if "one key head" in name else 2
    assert manifest.geometry.kv_num_heads == (heads, heads)
    with RelayDecoder.load(output, max_batch=3, threads=1, prefill_chunk=8) as decoder:
        greedy = SamplingParams(max_new_tokens=NEW_TOKENS, ignore_eos=True)
        found = [result.token_ids for result in decoder.generate(PROMPTS, greedy)]
    whole = [[*manifest.prefix.token_ids, *prompt] for prompt in PROMPTS]
    assert found == d.greedy(model, whole, NEW_TOKENS)
    models_table.forms[name] = ("right", "")


def _alibi(b, layer: int, scores: str) -> str:
    distance = b.op("Range", b.tensor(0), b.op("Squeeze", b.size("attention_mask", 1)), b.tensor(1))
    slopes = b.tensor(np.array([0.5, 0.25, 0.125, 0.0625]).reshape(4, 1, 1), np.float32)
    return b.op("Add", scores, b.op("Mul", slopes, b.op("Cast", distance, to=1)))


def _sinks(b, layer: int, query: str, key: str, value: str) -> str:
    q = b.by_heads(query, d.HEADS)
    k, v = d.joined(b, layer, key, value)
    scores = b.op("MatMul", q, b.op("Transpose", k, perm=[0, 1, 3, 2]))
    scores = b.op("Add", scores, d.additive(b, d.visible(b)))
    column = b.op(
        "Concat", b.size("input_ids", 0), b.tensor([4]), b.size("input_ids", 1), b.tensor([1]), axis=0
    )
    joined = b.op("Concat", scores, b.op("Expand", b.weight(4, 1, 1), column), axis=-1)
    weights = b.op("Slice", b.op("Softmax", joined, axis=-1), b.tensor([0]), b.tensor([-1]), b.tensor([-1]))
    return b.flat(b.op("MatMul", weights, v))


def _quantised(b, layer: int, query: str, key: str, value: str) -> str:
    results = []
    for what, new in (("key", key), ("value", value)):
        shape = ("batch", 4, "past", d.HEAD_DIM)
        past = b.input(f"past_key_values.{layer}.{what}", onnx.TensorProto.INT8, *shape)
        scale = b.tensor(0.02, np.float32)
        wide = b.op("DequantizeLinear", past, scale)
        results.append(b.op("Concat", wide, b.by_heads(new, 4), axis=2))
    k = b.op("Transpose", results[0], perm=[0, 1, 3, 2])
    scores = b.op("Add", b.op("MatMul", b.by_heads(query, 4), k), d.additive(b, d.visible(b)))
    return b.flat(b.op("MatMul", b.op("Softmax", scores, axis=-1), results[1]))


def _learned_bias(b, layer: int, scores: str) -> str:
    """A bias that the token ids choose."""
    column = b.op("Gather", b.weight(d.VOCAB), "input_ids")
    return b.op("Add", scores, b.op("Unsqueeze", column, b.tensor([1, 3])))


def _chunked(b, layer: int, query: str, key: str, value: str) -> str:
    k, v = d.joined(b, layer, key, value)
    mask = d.visible(b, chunk=16)
    return b.flat(b.op("Attention", b.by_heads(query, d.HEADS), k, v, mask))


REFUSED = {
    "ALiBi": (
        lambda: d.decoder(d.decomposed(edit=_alibi)),
        r"Softmax node '/Softmax_\d+'.*more than a mask.*ALiBi",
    ),
    "a bias that the token ids choose": (
        lambda: d.decoder(d.decomposed(edit=_learned_bias)),
        r"Softmax.*cannot be evaluated.*token ids",
    ),
    "attention sinks": (
        lambda: d.decoder(_sinks, kv_heads=4),
        r"Softmax.*Concat node '/Concat_\d+'.*attention sinks",
    ),
    "quantised KV cache": (lambda: d.decoder(_quantised, kv_heads=4), r"Softmax node.*quantised"),
    "no mask": (
        lambda: d.decoder(d.decomposed(mask="none")),
        r"Softmax.*not causal.*the query at position \d+ sees the key at \d+",
    ),
    "chunked mask": (
        lambda: d.decoder(_chunked, opset=23),
        r"Attention node '/Attention_\d+'.*not causal with a fixed",
    ),
    "causal from the first key, behind a Concat": (
        # aligned with the first key, so that new tokens behind a cache do not see what is before them
        lambda: d.decoder(d.onnx_attention(mask=None, is_causal=1), opset=23),
        r"Attention node.*not causal",
    ),
    "two softcaps": (
        lambda: d.decoder(d.decomposed(softcap=2.0, edit=lambda b, _, scores: b.op("Tanh", scores))),
        r"Softmax.*two Tanh",
    ),
    "scores squared": (
        lambda: d.decoder(d.decomposed(edit=lambda b, _, scores: b.op("Mul", scores, scores))),
        r"Softmax.*no constant, in node '/Mul_\d+'",
    ),
    "scores shifted": (
        lambda: d.decoder(d.decomposed(edit=lambda b, _, s: b.op("Add", s, b.tensor(1, np.float32)))),
        r"Softmax.*more than a mask: 1 at a visible key",
    ),
    "heads shared in another order": (
        lambda: d.decoder(d.decomposed(repeat="wrong")),
        r"Softmax.*run by itself, it is not attention of 4 query and 2 key heads",
    ),
    "scores clipped": (
        lambda: d.decoder(
            d.decomposed(edit=lambda b, _, s: b.op("Min", s, b.tensor(0.01, np.float32)))
        ),
        r"Softmax.*run by itself, it is not attention",
    ),
}  # fmt: skip


def test_positions_that_forget_the_cache_are_refused(
    tiny: ModuleType, folder: Callable[..., Path], tmp_path: Path
) -> None:
    path = folder(d.decoder(d.decomposed(), positions="sequence"))
    with pytest.raises(ExportError, match="other logits when the same tokens come in two pieces"):
        export_model(path, tiny.SYSTEM_PROMPT, tmp_path / "out", threads=1)


def test_float16_and_4_bit_weights(tiny: ModuleType, folder: Callable[..., Path], tmp_path: Path) -> None:
    from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer
    from onnxruntime.transformers.float16 import convert_float_to_float16

    quantizer = MatMulNBitsQuantizer(d.decoder(d.decomposed()), block_size=32, is_symmetric=True)
    quantizer.process()
    half = convert_float_to_float16(d.decoder(d.decomposed(softcap=2.0)))
    for model, dtype in ((quantizer.model.model, "float32"), (half, "float16")):
        output = export_model(
            folder(model), tiny.SYSTEM_PROMPT, tmp_path / "out", template="plain", threads=1
        )
        manifest = Artifact.open(output).manifest
        assert manifest.dtype == dtype
        with RelayDecoder.load(output, max_batch=3, threads=1) as decoder:
            greedy = SamplingParams(max_new_tokens=3, ignore_eos=True)
            found = [result.token_ids for result in decoder.generate(PROMPTS, greedy)]
        assert found == d.greedy(model, [[*manifest.prefix.token_ids, *p] for p in PROMPTS], 3)


def test_activations_quantised_together_are_spoken_of(
    folder: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from onnxruntime.quantization import quantize_dynamic

    onnx.save(d.decoder(d.decomposed()), tmp_path / "float.onnx")
    quantize_dynamic(tmp_path / "float.onnx", tmp_path / "int8.onnx")
    load_onnx(folder(onnx.load(tmp_path / "int8.onnx")))
    assert "quantise activations over all tokens of a call" in capsys.readouterr().err


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_causal_attention_is_refused_by_name(
    folder: Callable[..., Path], name: str, models_table: Any
) -> None:
    model, reason = REFUSED[name]
    path = folder(model())
    with pytest.raises(ExportError, match=reason) as found:
        load_onnx(path)
    assert str(path / "model.onnx") in str(found.value)
    models_table.forms[name] = ("refused", str(found.value).replace(f"{path}/", ""))
