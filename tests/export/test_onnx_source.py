"""Folders and files with an ONNX decoder: what torch.onnx.export makes of transformers' models, merged
graphs, external data, and what is refused."""

from __future__ import annotations

import resource
import shutil
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import onnx
import onnx_decoders as d  # conftest.py has loaded it
import pytest
import transformers
from onnx import TensorProto, helper
from torch_exports import make_onnx  # likewise

from relay_attention.errors import ExportError
from relay_attention.export import export_model, verify
from relay_attention.export.onnx_source import find_file, load_onnx
from relay_attention.runtime import RelayDecoder, SamplingParams
from relay_attention.runtime.artifact import Artifact


@pytest.fixture
def folder(tiny: ModuleType, tmp_path: Path) -> Path:
    """A decoder of the tests' own, with attention written out."""
    return d.save(tmp_path / "model", d.decoder(d.decomposed()), tiny.make_tokenizer)


_BASE = {"vocab_size": 384, "bos_token_id": 0, "eos_token_id": 1}
TRACED = {
    # Attention nodes, RotaryEmbedding, Concat caches
    "llama-23": (23, "sdpa", lambda tiny: tiny.CONFIGS["llama"](), (-1, -1), 0.0),
    # learned positions, packed projection
    "gpt2-24": (
        24,
        "sdpa",
        lambda _: transformers.GPT2Config(**_BASE, n_embd=64, n_layer=2, n_head=4, n_positions=512),
        (-1, -1),
        0.0,
    ),
    # written out: softcap by Tanh, a window in every other layer
    "gemma2-18": (
        18,
        "eager",
        lambda tiny: transformers.Gemma2Config(
            **tiny._BASE, head_dim=16, query_pre_attn_scalar=16, sliding_window=tiny.WINDOW
        ),
        (24, -1),
        50.0,
    ),
    # written out by the exporter: scale split on both sides, guards against NaN
    "mistral-17": (17, "sdpa", lambda tiny: tiny.CONFIGS["mistral"](), (24, 24), 0.0),
}


@pytest.mark.parametrize("name", TRACED)
def test_what_torch_exports_decodes_as_transformers_does(tiny: ModuleType, tmp_path: Path, name: str) -> None:
    opset, attention, config, windows, softcap = TRACED[name]
    model = tiny.make_model(tmp_path / "source", config(tiny))
    source = make_onnx(tmp_path / "onnx", model, opset, attention)
    output = export_model(source, tiny.SYSTEM_PROMPT, tmp_path / "out", template="plain", threads=1)
    manifest = Artifact.open(output).manifest
    assert manifest.source["kind"] == "onnx"
    assert manifest.prefix.length > 3 * tiny.WINDOW
    assert manifest.geometry.local_window_size == windows
    assert manifest.geometry.kv_num_heads == ((4, 4) if "gpt2" in name else (2, 2))
    nodes = [node for node in onnx.load(output / "model.onnx", load_external_data=False).graph.node]
    relays = [node for node in nodes if node.op_type == "RelayAttention"]
    attributes = {attribute.name: attribute for attribute in relays[0].attribute}
    assert attributes["softcap"].f == softcap
    # rotary embedding went into the op, whether written out or a RotaryEmbedding
    assert attributes["do_rotary"].i == ("gpt2" not in name)
    _check(output, model)


def _check(output: Path, source: Path) -> None:
    report = verify(output, source, requests=5, new_tokens=8, threads=1)
    assert report.ok, report.table()
    assert sum(request.matches for request in report.requests) == 40


def test_torchscript_graphs_and_what_onnx_runtimes_optimiser_makes_of_them(
    tiny: ModuleType, tmp_path: Path
) -> None:
    """No shapes in the first, fused normalisation and com.microsoft.RotaryEmbedding in the second."""
    from onnxruntime.transformers import optimizer

    model = tiny.make_model(tmp_path / "source", tiny.CONFIGS["mistral"]())
    source = make_onnx(tmp_path / "onnx", model, 17, dynamo=False)
    output = export_model(source, tiny.SYSTEM_PROMPT, tmp_path / "out", template="plain", threads=1)
    assert Artifact.open(output).manifest.geometry.local_window_size == (24, 24)
    _check(output, model)
    fused = optimizer.optimize_model(
        str(source / "model.onnx"), model_type="gpt2", num_heads=tiny.HEADS, hidden_size=64, opt_level=0
    )
    kinds = {node.op_type for node in fused.model.graph.node}
    assert {"RotaryEmbedding", "SimplifiedLayerNormalization"} & kinds
    fused.save_model_to_file(str(source / "model.onnx"))
    output = export_model(source, tiny.SYSTEM_PROMPT, tmp_path / "fused", template="plain", threads=1)
    assert Artifact.open(output).manifest.geometry.local_window_size == (24, 24)
    _check(output, model)


def _merge(folder: Path) -> None:
    """The graph in a folder as optimum's decoder_model_merged.onnx: the past in one branch of an If."""
    model = onnx.load(folder / "model.onnx")
    graph = model.graph
    wrong = onnx.GraphProto()  # the branch without past, which nobody may take
    wrong.name = "without_past"
    for output in graph.output:
        shape = helper.make_tensor(f"{output.name}.shape", TensorProto.INT64, [1], [0])
        wrong.node.append(helper.make_node("Constant", [], [f"{output.name}.s"], value=shape))
        wrong.node.append(helper.make_node("ConstantOfShape", [f"{output.name}.s"], [f"{output.name}.w"]))
        wrong.output.append(helper.make_tensor_value_info(f"{output.name}.w", TensorProto.FLOAT, None))
    then = onnx.GraphProto(name="with_past")
    then.node.extend(graph.node)
    for output in graph.output:
        then.output.append(helper.make_tensor_value_info(f"{output.name}.then", TensorProto.FLOAT, None))
    for node in then.node:
        renamed = [f"{name}.then" if name in {o.name for o in graph.output} else name for name in node.output]
        del node.output[:]
        node.output.extend(renamed)
    branch = helper.make_node(
        "If",
        ["use_cache_branch"],
        [o.name for o in graph.output],
        name="/if",
        then_branch=then,
        else_branch=wrong,
    )
    inputs = [*graph.input, helper.make_tensor_value_info("use_cache_branch", TensorProto.BOOL, [1])]
    merged = helper.make_graph([branch], "merged", inputs, graph.output, graph.initializer)
    merged = helper.make_model(merged, opset_imports=model.opset_import, ir_version=model.ir_version)
    onnx.checker.check_model(merged)
    onnx.save(merged, folder / "decoder_model_merged.onnx")
    (folder / "model.onnx").unlink()


def _tokens(output: Path, prompts: list[list[int]]) -> list[list[int]]:
    with RelayDecoder.load(output, max_batch=2, threads=1) as decoder:
        results = decoder.generate(prompts, SamplingParams(max_new_tokens=4, ignore_eos=True))
        return [result.token_ids for result in results]


def test_of_a_merged_graph_the_branch_with_past_is_taken(
    tiny: ModuleType, folder: Path, tmp_path: Path
) -> None:
    model = onnx.load(folder / "model.onnx")
    _merge(folder)
    assert find_file(folder).name == "decoder_model_merged.onnx"
    output = export_model(folder, tiny.SYSTEM_PROMPT, tmp_path / "out", threads=1)
    prompts = [[5, 6, 7], [9]]
    prefix = Artifact.open(output).manifest.prefix.token_ids
    assert _tokens(output, prompts) == d.greedy(model, [[*prefix, *prompt] for prompt in prompts], 4)


def test_a_graph_without_past_is_a_decoder_too(tiny: ModuleType, folder: Path, tmp_path: Path) -> None:
    model = onnx.load(folder / "model.onnx")
    # the caches become empty constants, as if there had never been any
    for value in [value for value in model.graph.input if value.name.startswith("past")]:
        model.graph.input.remove(value)
        joins = [node for node in model.graph.node if value.name in node.input]
        for node in joins:
            new = node.input[1]
            node.op_type = "Identity"
            del node.input[:], node.attribute[:]
            node.input.append(new)
    for value in [value for value in model.graph.output if value.name.startswith("present")]:
        model.graph.output.remove(value)
    onnx.save(model, folder / "model.onnx")
    output = export_model(folder, tiny.SYSTEM_PROMPT, tmp_path / "out", threads=1)
    prefix = Artifact.open(output).manifest.prefix.token_ids
    assert _tokens(output, [[3, 4]]) == d.greedy(model, [[*prefix, 3, 4]], 4)


def test_external_data_in_several_files_is_mapped(tiny: ModuleType, folder: Path, tmp_path: Path) -> None:
    """A weight of 512 MB in one of two files: the graph is loaded without its bytes."""
    model = onnx.load(folder / "model.onnx")
    whole = _tokens(export_model(folder, "Be kind.", tmp_path / "whole", threads=1), [[7, 8]])
    for number, tensor in enumerate(model.graph.initializer):
        if len(tensor.raw_data) < 1024:
            continue
        name = f"part_{number % 2}.data"
        with (folder / name).open("ab") as file:
            offset, length = file.tell(), len(tensor.raw_data)
            file.write(tensor.raw_data)
        tensor.ClearField("raw_data")
        tensor.data_location = TensorProto.EXTERNAL
        for key, value in (("location", name), ("offset", offset), ("length", length)):
            tensor.external_data.add(key=key, value=str(value))
    rows = 1 << 23
    big = model.graph.initializer.add(name="big", data_type=TensorProto.FLOAT, dims=[rows, 16])
    big.data_location = TensorProto.EXTERNAL
    for key, value in (("location", "part_2.data"), ("offset", 0), ("length", rows * 64)):
        big.external_data.add(key=key, value=str(value))
    with (folder / "part_2.data").open("wb") as file:
        file.truncate(rows * 64)
    row = helper.make_tensor("row", TensorProto.INT64, [1], [rows - 1])
    model.graph.initializer.append(row)
    model.graph.node.append(helper.make_node("Gather", ["big", "row"], ["big_row"], name="/big"))
    model.graph.node.append(helper.make_node("ReduceSum", ["big_row"], ["big_sum"], name="/sum"))
    logits = next(node for node in model.graph.node if "logits" in node.output)
    logits.output[0] = "raw_logits"
    model.graph.node.append(helper.make_node("Add", ["raw_logits", "big_sum"], ["logits"], name="/add"))
    onnx.save(model, folder / "model.onnx")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    load_onnx(folder)
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
    assert grown < rows * 64 / 2
    # not copied into this test's artifact: the graph without the large weight gives the same tokens
    model.graph.node.remove(model.graph.node[-1])
    logits.output[0] = "logits"
    model.graph.initializer.remove(big)
    del model.graph.node[-2:]
    onnx.save(model, folder / "model.onnx")
    assert _tokens(export_model(folder, "Be kind.", tmp_path / "parts", threads=1), [[7, 8]]) == whole
    with (folder / "part_1.data").open("r+b") as file:
        file.truncate(100)
    with pytest.raises(ExportError, match=r"part_1\.data: cut off"):
        load_onnx(folder)
    (folder / "part_0.data").unlink()
    with pytest.raises(ExportError, match=r"part_0\.data: missing, though model\.onnx keeps"):
        load_onnx(folder)


def test_a_file_and_a_repository_with_a_folder_onnx(tiny: ModuleType, folder: Path, tmp_path: Path) -> None:
    (folder / "onnx").mkdir()
    (folder / "model.onnx").rename(folder / "onnx" / "model.onnx")
    first = export_model(folder, "Be kind.", tmp_path / "first", threads=1)
    (folder / "config.json").rename(folder / "onnx" / "config.json")
    second = export_model(folder / "onnx" / "model.onnx", "Be kind.", tmp_path / "second", threads=1)
    assert Artifact.open(first).manifest.model_id == Artifact.open(second).manifest.model_id


def _edit(folder: Path, change: Callable[[onnx.ModelProto], None]) -> None:
    model = onnx.load(folder / "model.onnx")
    change(model)
    onnx.save(model, folder / "model.onnx")


def _add_input(name: str) -> Callable[[onnx.ModelProto], None]:
    value = helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", "length", 64])
    return lambda model: model.graph.input.append(value)


def _rename(old: str, new: str) -> Callable[[onnx.ModelProto], None]:
    def change(model: onnx.ModelProto) -> None:
        for value in (*model.graph.input, *model.graph.output):
            value.name = new if value.name == old else value.name
        for node in model.graph.node:
            node.input[:] = [new if name == old else name for name in node.input]
            node.output[:] = [new if name == old else name for name in node.output]

    return change


def _read_the_mask_elsewhere(model: onnx.ModelProto) -> None:
    logits = next(node for node in model.graph.node if "logits" in node.output)
    logits.output[0] = "raw_logits"
    nodes = [
        helper.make_node(
            "Cast", ["attention_mask"], ["mask_number"], name="/cast_mask", to=TensorProto.FLOAT
        ),
        helper.make_node("ReduceSum", ["mask_number"], ["mask_sum"], name="/sum_mask", keepdims=0),
        helper.make_node("Mul", ["raw_logits", "mask_sum"], ["logits"], name="/mul_mask"),
    ]
    model.graph.node.extend(nodes)


def _keep_the_last(model: onnx.ModelProto) -> None:
    head = next(node for node in model.graph.node if "logits" in node.output)
    head.output[0] = "every_logits"
    for name, number in (("last.start", -1), ("last.end", 2**31), ("last.axis", 1)):
        model.graph.initializer.append(helper.make_tensor(name, TensorProto.INT64, [1], [number]))
    inputs = ["every_logits", "last.start", "last.end", "last.axis"]
    model.graph.node.append(helper.make_node("Slice", inputs, ["logits"], name="/last"))
    model.graph.output[0].type.tensor_type.shape.dim[1].dim_value = 1


def _lose_an_attribute(model: onnx.ModelProto) -> None:
    node = next(node for node in model.graph.node if node.op_type == "Concat")
    del node.attribute[:]


def _close_a_circle(model: onnx.ModelProto) -> None:
    first = next(node for node in model.graph.node if node.op_type == "Add")
    first.input[0] = next(node for node in model.graph.node if "logits" in node.output).input[0]


def _age(model: onnx.ModelProto) -> None:
    model.opset_import[0].version = 11


def _fix_the_batch(model: onnx.ModelProto) -> None:
    model.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 1


def _share_a_cache(model: onnx.ModelProto) -> None:
    for node in model.graph.node:
        node.input[:] = [name.replace("past_key_values.1.", "past_key_values.0.") for name in node.input]


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (_add_input("encoder_hidden_states"), r"input 'encoder_hidden_states'.*encoder-decoder"),
        (_add_input("inputs_embeds"), r"takes 'inputs_embeds' in place of token ids"),
        (_rename("input_ids", "tokens"), r"no input 'input_ids', only: tokens, attention_mask"),
        (_rename("logits", "scores"), r"no output 'logits', only: scores"),
        (
            _rename("attention_mask", "padding"),
            r"input 'padding' \[batch,total\], read by .* node '/.*', is not known here",
        ),
        (_read_the_mask_elsewhere, r"needs its input 'attention_mask' outside.*Cast node '/cast_mask'"),
        (_keep_the_last, r"logits are \[batch,1,384\].*logits of every token"),
        (_fix_the_batch, r"input_ids is of shape \[1,sequence\]: export the model with a dynamic batch"),
        (_lose_an_attribute, r"model\.onnx"),
        (_close_a_circle, r"not a valid ONNX graph"),
        (_age, r"of opset 11; export the model with opset 13 or newer"),
        (_share_a_cache, r"several attentions read the same cache 'past_key_values\.0\.key'"),
    ],
)
def test_graphs_that_are_no_plain_decoders_are_refused_by_name(
    folder: Path, damage: Callable[[onnx.ModelProto], None], reason: str
) -> None:
    _edit(folder, damage)
    with pytest.raises(ExportError, match=reason) as found:
        load_onnx(folder)
    assert str(folder / "model.onnx") in str(found.value)


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"is_encoder_decoder": True}, r"TestDecoder is an encoder-decoder"),
        ({"n_positions": None}, r"does not say how many positions"),
        ({"rope_scaling": {"type": "dynamic"}}, r"'dynamic' \(config\.json\) depends on the length"),
    ],
)
def test_what_the_config_says_is_heeded(
    tiny: ModuleType, folder: Path, fields: dict[str, Any], reason: str
) -> None:
    tiny.edit_json(folder / "config.json", **fields)
    with pytest.raises(ExportError, match=reason):
        load_onnx(folder)


def test_missing_and_damaged_files_are_named(tiny: ModuleType, folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(ExportError, match="cannot be changed to fp16"):
        export_model(folder, "prompt", out, precision="fp16")
    shutil.copyfile(folder / "model.onnx", folder / "encoder_model.onnx")
    with pytest.raises(ExportError, match=r"encoder_model\.onnx makes it an encoder-decoder"):
        export_model(folder, "prompt", out)
    (folder / "encoder_model.onnx").rename(folder / "b.onnx")
    (folder / "model.onnx").rename(folder / "a.onnx")
    with pytest.raises(ExportError, match=r"several graphs \(a\.onnx, b\.onnx\).*give the file itself"):
        export_model(folder, "prompt", out)
    (folder / "b.onnx").write_bytes(b"\xffnot")
    with pytest.raises(ExportError, match=r"b\.onnx: cannot be read as an ONNX model"):
        export_model(folder / "b.onnx", "prompt", out)
    (folder / "config.json").unlink()
    with pytest.raises(ExportError, match=r"config\.json: missing.*beside the graph"):
        export_model(folder / "a.onnx", "prompt", out)
    assert not out.exists()


def test_a_softcap_that_the_exporter_lost_is_spoken_of(
    tiny: ModuleType, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny.edit_json(folder / "config.json", attn_logit_softcapping=50.0, sliding_window=24)
    load_onnx(folder)
    said = capsys.readouterr().err
    assert "a softcap of 50.0 (attn_logit_softcapping) and a sliding window of 24 tokens" in said


def test_group_query_attention_without_a_genai_config(
    tiny: ModuleType, llama: Path, genai_llama: Path, tmp_path: Path
) -> None:
    """What other tools make of a genai build, or ONNX Runtime's fusions of a decoder."""
    source = Path(shutil.copytree(genai_llama, tmp_path / "model"))
    (source / "genai_config.json").unlink()
    shutil.copyfile(llama / "config.json", source / "config.json")
    output = export_model(source, tiny.SYSTEM_PROMPT, tmp_path / "out", template="plain", threads=1)
    assert Artifact.open(output).manifest.source == {"kind": "onnx", "architecture": "LlamaForCausalLM"}
    _check(output, llama)


def test_the_layers_of_the_config_must_all_attend(tiny: ModuleType, folder: Path, tmp_path: Path) -> None:
    tiny.edit_json(folder / "config.json", n_layer=3)
    with pytest.raises(ExportError, match="has 3 layers, but 2 attentions"):
        export_model(folder, "prompt", tmp_path / "out", threads=1)
