"""The passes together, on the graph that onnxruntime-genai's builder makes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from relay_attention.errors import ExportError
from relay_attention.export.genai import load_genai
from relay_attention.export.passes import pipeline, rewrite

TOKENS = np.array([[5, 9, 2, 7, 7, 1, 30, 31], [4, 4, 8, 100, 3, 2, 9, 10]], np.int32)


def _relay_feeds(model: ir.Model, rows: int, capacity: int) -> dict[str, np.ndarray]:
    return {
        value.name: np.zeros((rows, int(value.shape[1]), capacity, int(value.shape[3])), np.float32)
        for value in model.graph.inputs
        if value.name.startswith("past_key_values")
    }


def test_a_second_run_changes_nothing(genai_llama: Path) -> None:
    model = load_genai(genai_llama).model
    rewrite(model)
    nodes = [node.op_type for node in model.graph]
    for each in pipeline():
        if type(each).__name__ in ("UnpackQKV", "ReplaceAttention", "ShiftPositions", "RemoveUnused"):
            assert not each(model).modified
    assert [node.op_type for node in model.graph] == nodes


def test_the_decoding_graph_is_a_valid_onnx_model(llama_artifact: Path) -> None:
    onnx.checker.check_model(llama_artifact / "model.onnx", full_check=True)


@pytest.mark.parametrize("all_logits", [False, True])
def test_names_are_unique_and_opsets_complete(genai_llama: Path, all_logits: bool) -> None:
    model = load_genai(genai_llama).model
    rewrite(model, all_logits=all_logits)
    assert {node.domain for node in model.graph} <= set(model.opset_imports)
    names = [value.name for node in model.graph for value in node.outputs if value.name]
    names += [value.name for value in model.graph.inputs]
    assert len(names) == len(set(names))


def test_logits_are_those_of_the_source_graph(genai_llama: Path, run) -> None:
    source = load_genai(genai_llama).model
    empty = {
        value.name: np.zeros((2, int(value.shape[1]), 0, 16), np.float32)
        for value in source.graph.inputs
        if value.name.startswith("past_key_values")
    }
    expected = run(
        source, input_ids=TOKENS.astype(np.int64), attention_mask=np.ones((2, 8), np.int64), **empty
    )[0]
    model = load_genai(genai_llama).model
    rewrite(model, all_logits=True)
    lengths = {"context_lens": np.zeros(2, np.int32), "query_lens": np.full(2, 8, np.int32)}
    found = run(model, input_ids=TOKENS, **lengths, **_relay_feeds(model, 2, 8))[0]
    np.testing.assert_allclose(found, expected, atol=2e-4)
    last = load_genai(genai_llama).model
    rewrite(last)
    lengths["query_lens"] = np.array([8, 3], np.int32)
    found = run(last, input_ids=TOKENS, **lengths, **_relay_feeds(last, 2, 8))[0]
    np.testing.assert_allclose(found, expected[[0, 1], [7, 2]], atol=2e-4)


@pytest.mark.parametrize("mode", ["static", "input"])
def test_the_prefix_is_where_the_mode_says(genai_llama: Path, mode: str) -> None:
    model = load_genai(genai_llama).model
    rewrite(model, prefix_mode=mode)
    inputs = [value.name for value in model.graph.inputs if value.name.startswith("prefix")]
    initializers = [name for name in model.graph.initializers if name.startswith("prefix")]
    names = ["prefix.0.key", "prefix.0.value", "prefix.1.key", "prefix.1.value"]
    assert (inputs, initializers) == ((names, []) if mode == "input" else ([], names))


def test_nothing_of_the_exporters_machine_is_left(llama_artifact: Path) -> None:
    proto = onnx.load(llama_artifact / "model.onnx", load_external_data=False)
    assert not any(node.metadata_props or node.doc_string for node in proto.graph.node)
    assert not proto.metadata_props


def test_one_attention_that_cannot_be_rewritten_refuses_the_graph(genai_llama: Path) -> None:
    model = load_genai(genai_llama).model
    nodes = [node for node in model.graph if node.op_type == "GroupQueryAttention"]
    nodes[1].attributes["smooth_softmax"] = ir.AttrInt64("smooth_softmax", 1)
    with pytest.raises(ExportError, match=rf"{nodes[1].name}.*smooth softmax"):
        rewrite(model)


def test_a_mask_that_is_used_elsewhere_refuses_the_graph(genai_llama: Path) -> None:
    model = load_genai(genai_llama).model
    mask = next(value for value in model.graph.inputs if value.name == "attention_mask")
    gather = next(node for node in model.graph if node.name == "/model/embed_tokens/Gather")
    cast = ir.node("Cast", [mask], {"to": ir.DataType.FLOAT})
    column = ir.node("ReduceMax", [cast.outputs[0]], {"keepdims": 1})
    scaled = ir.node("Mul", [gather.outputs[0], column.outputs[0]], name="masking")
    scaled.outputs[0].type, scaled.outputs[0].shape = gather.outputs[0].type, gather.outputs[0].shape
    gather.outputs[0].replace_all_uses_with(scaled.outputs[0])
    scaled.replace_input_with(0, gather.outputs[0])
    model.graph.insert_after(gather, [cast, column, scaled])
    with pytest.raises(ExportError, match="still needs its input 'attention_mask'"):
        rewrite(model)
