"""Decoders that exist as ONNX already: optimum's exports, torch.onnx.export, whatever has their form.

Read from model.onnx (or optimum's decoder_model_merged.onnx, decoder_with_past_model.onnx,
decoder_model.onnx), with config.json and the tokenizer beside it or one folder above. What the graph computes
is exported: a window or scaling that its exporter lost is not put back.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import onnx_ir as ir
import onnx_ir.passes.common as common
import onnxscript.optimizer

from relay_attention.errors import ExportError
from relay_attention.export.graph import (
    describe,
    find_nodes,
    float_attribute,
    graph_input,
    graph_output,
    int_attribute,
    last_dim,
)
from relay_attention.export.passes import run
from relay_attention.export.passes.fold_attention import FoldAttention, make_probe
from relay_attention.export.passes.refuse_leftovers import refuse_attention
from relay_attention.export.passes.settle_sizes import SettleSizes, StateShapes
from relay_attention.export.source import ONNX, PRECISIONS, SourceModel, read_json, token_list

CONFIG_NAME = "config.json"
NAMES = (
    "model.onnx",
    "decoder_model_merged.onnx",
    "decoder_with_past_model.onnx",
    "decoder_model.onnx",
)
_OLDEST_OPSET = 13  # older ones have axes as attributes
_BRANCH = "use_cache_branch"
_POSITIONS = (
    "max_position_embeddings",
    "n_positions",
    "max_seq_len",
    "max_sequence_length",
    "seq_length",
    "n_ctx",
)
_LAYERS = ("num_hidden_layers", "n_layer", "num_layers", "n_layers")
_LENGTH_DEPENDENT_ROPE = {"dynamic", "longrope", "su"}
_PREDICATES = {
    "And",
    "Equal",
    "Greater",
    "GreaterOrEqual",
    "IsNaN",
    "Less",
    "LessOrEqual",
    "Not",
    "Or",
    "Xor",
}
_KNOWN_ATTENTION = {"GroupQueryAttention", "MultiHeadAttention"}
_SMALL = 1024  # elements of a tensor that constant folding may take up


def load_onnx(source: Path, precision: str | None = None) -> SourceModel:
    """Reads an ONNX decoder; its weights stay in their files, mapped.

    source: the file, or a folder with one of `NAMES` in it or in its folder onnx.
    precision: "fp32", "fp16" or "bf16" if the graph must be of that, None for what it is.
    Raises: ExportError if files are missing or the graph is no decoder that can be rewritten, naming the
    node.
    """
    file = find_file(source)
    config = read_json(_config_file(file))
    max_positions, architecture = _max_positions(config, file), _architecture(config, file)
    _refuse_encoders(config, architecture, file)
    model = _read(file)
    opset = model.graph.opset_imports.get("", 0)
    if opset < _OLDEST_OPSET:
        raise ExportError(
            f"{file}: of opset {opset}; export the model with opset {_OLDEST_OPSET} or newer (17 at best)"
        )
    _refuse_inputs(model, file)
    _take_branch(model, file)
    fold_attention(model, file, max_positions)
    _check_logits(model, file)
    _warn_of_lost(model, config, file)
    _warn_of_shared_ranges(model, file)
    _check_precision(model, file, precision)
    layers = next((config[name] for name in _LAYERS if isinstance(config.get(name), int)), None)
    return SourceModel(
        model=model,
        kind=ONNX,
        architecture=architecture,
        max_positions=max_positions,
        num_layers=layers,
        eos=_eos(config, file),
    )


def fold_attention(model: ir.Model, file: Path, max_positions: int) -> None:
    """Turns a graph with masks and caches of its own into one of relay.AttentionForm nodes and position_ids.

    file: what messages name. max_positions: as far as masks are proved.
    Raises: ExportError naming the node that stands against it.
    """
    for node in model.graph:  # before what is unusual about the graph's inputs, which follows from it
        if node.domain == "com.microsoft" and node.op_type not in _KNOWN_ATTENTION:
            try:
                refuse_attention(node)
            except ExportError as error:
                raise ExportError(f"{file}: {error}") from error
    try:
        _normalise(model)
    except Exception as error:  # onnx, onnx-ir and onnxscript raise many kinds
        raise ExportError(f"{file}: not a valid ONNX graph: {_root_cause(error)}") from error
    _check_interface(model, file)
    # lengths are known by the nodes that read them, so the probe is made before these go
    probe = make_probe(model, max_positions)
    for value in model.graph.inputs:
        if value.uses() and not probe.knows(value):
            reader = describe(next(iter(value.consumers())))
            raise ExportError(
                f"{file}: its input {value.name!r} {value.shape}, read by {reader}, is not known here; "
                "known are "
                "input_ids, attention_mask [batch, total], position_ids, cache_position, and caches of "
                "keys and "
                "values"
            )
    try:
        run(
            model,
            [
                FoldAttention(max_positions),
                common.RemoveUnusedNodesPass(),
                SettleSizes(probe),
                StateShapes(probe),
            ],
        )
    except ExportError as error:
        raise ExportError(f"{file}: {error}") from error
    run(model, [common.TopologicalSortPass()])


def find_file(source: Path) -> Path:
    """The ONNX file that a path stands for.

    Raises: ExportError if there is none, or several without a name that is known.
    """
    if source.is_file():
        return source
    for folder in (source, source / "onnx"):
        encoders = sorted(path.name for path in folder.glob("*encoder*.onnx"))
        if encoders:
            raise ExportError(
                f"{folder}: {encoders[0]} makes it an encoder-decoder; only decoders can be exported"
            )
        for name in NAMES:
            if (folder / name).is_file():
                return folder / name
        others = sorted(folder.glob("*.onnx"))
        if len(others) == 1:
            return others[0]
        if others:
            names = ", ".join(path.name for path in others)
            raise ExportError(
                f"{folder}: holds several graphs ({names}), none named {' or '.join(NAMES)}: give the "
                "file itself"
            )
    raise ExportError(f"{source}: no ONNX graph in it")


def _config_file(file: Path) -> Path:
    for folder in (file.parent, file.parent.parent):
        if (folder / CONFIG_NAME).is_file():
            return folder / CONFIG_NAME
    raise ExportError(
        f"{file.parent / CONFIG_NAME}: missing; the number of positions and the end tokens are read "
        "from it: put "
        "the model's config.json beside the graph"
    )


def _max_positions(config: dict[str, Any], file: Path) -> int:
    text = _text_config(config)
    scaling = text.get("rope_parameters") or text.get("rope_scaling") or {}
    parts = [scaling, *(value for value in scaling.values() if isinstance(value, dict))]
    for part in parts:
        kind = part.get("rope_type", part.get("type"))
        if kind in _LENGTH_DEPENDENT_ROPE:
            raise ExportError(
                f"{file}: rotary embedding of type {kind!r} ({CONFIG_NAME}) depends on the length of each "
                "request, and a traced graph holds the frequencies of one length without saying which: "
                "export the Hugging Face folder instead, whose frequencies can be fixed to those of a prefix"
            )
    for name in _POSITIONS:
        value = text.get(name)
        if isinstance(value, int) and value > 0:
            return value
    raise ExportError(
        f"{_config_file(file)}: it does not say how many positions the model has "
        f"({', '.join(_POSITIONS[:3])})"
    )


def _text_config(config: dict[str, Any]) -> dict[str, Any]:
    text = config.get("text_config")
    return text if isinstance(text, dict) else config


def _architecture(config: dict[str, Any], file: Path) -> str:
    names = config.get("architectures")
    if isinstance(names, list) and names:
        return str(names[0])
    return str(config.get("model_type") or file.stem)


def _refuse_encoders(config: dict[str, Any], architecture: str, file: Path) -> None:
    if config.get("is_encoder_decoder"):
        raise ExportError(f"{file}: {architecture} is an encoder-decoder; only decoders can be exported")


def _eos(config: dict[str, Any], file: Path) -> tuple[int, ...]:
    generation = _config_file(file).with_name("generation_config.json")
    if generation.is_file():
        found = token_list(read_json(generation).get("eos_token_id"))
        if found:
            return found
    return token_list(_text_config(config).get("eos_token_id"))


def _read(file: Path) -> ir.Model:
    try:
        model = ir.load(file)
    except Exception as error:  # protobuf raises errors of its own
        raise ExportError(f"{file}: cannot be read as an ONNX model: {error}") from error
    for graph in model.graphs():
        for value in graph.initializers.values():
            tensor = value.const_value
            if isinstance(tensor, ir.ExternalTensor):
                if not Path(tensor.path).is_file():
                    raise ExportError(
                        f"{tensor.path}: missing, though {file.name} keeps {value.name!r} in it"
                    )
                end = (tensor.offset or 0) + (tensor.length or tensor.nbytes)
                if Path(tensor.path).stat().st_size < end:
                    raise ExportError(
                        f"{tensor.path}: cut off, {value.name!r} of {file.name} ends at byte {end}"
                    )
    return model


def _refuse_inputs(model: ir.Model, file: Path) -> None:
    for value in model.graph.inputs:
        name = str(value.name)
        if "encoder" in name:
            raise ExportError(
                f"{file}: its input {name!r} makes it part of an encoder-decoder; only decoders can be "
                "exported"
            )
        if name in ("inputs_embeds", "pixel_values"):
            raise ExportError(
                f"{file}: it takes {name!r} in place of token ids; only text decoders can be exported"
            )


def _take_branch(model: ir.Model, file: Path) -> None:
    """Of optimum's merged graph, the branch that takes past keys and values."""
    condition = graph_input(model, _BRANCH)
    if condition is None:
        return
    for node in find_nodes(model, lambda node: node.op_type == "If"):
        if node.inputs[0] is not condition:
            raise ExportError(f"{file}: {describe(node)} does not branch by {_BRANCH!r}")
        branch = node.attributes["then_branch"].as_graph()
        for value in list(branch.initializers.values()):
            branch.initializers.pop(str(value.name))
            if str(value.name) in model.graph.initializers:
                value.name = f"{node.name}.{value.name}"
            model.graph.register_initializer(value)
        inner = list(branch.outputs)
        branch.outputs.clear()
        moved = list(branch)
        branch.remove(moved)
        model.graph.insert_before(node, moved)
        for old, new in zip(node.outputs, inner, strict=True):
            name = old.name
            if new.type is None:
                new.type, new.shape = old.type, old.shape
            old.replace_all_uses_with(new, replace_graph_outputs=True)
            old.name, new.name = f"{name}.merged", name
        model.graph.remove(node, safe=True)
    if condition.uses():
        raise ExportError(f"{file}: its input {_BRANCH!r} does more than to choose the branch")
    model.graph.inputs.remove(condition)


def _normalise(model: ir.Model) -> None:
    """What matters not to attention goes: functions, constants as nodes, arithmetic on them, unknown types.

    onnxscript folds constants and infers types; larger tensors are left in their files.
    """
    for value in [value for value in model.graph.initializers.values() if value in model.graph.inputs]:
        model.graph.inputs.remove(value)  # a default that could be overridden, which nobody does
    if model.graph.opset_imports.get("", 0) < 18:
        for node in find_nodes(model, lambda node: node.op_type == "Split" and not node.domain):
            node.attributes.pop("num_outputs", None)  # torch leaves it where it converts to opset 17
    left_out = [output for node in model.graph for output in node.outputs if not output.name]
    run(
        model,
        [
            common.InlinePass(),
            common.IdentityEliminationPass(),
            common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0),
            common.NameFixPass(),
        ],
    )
    onnxscript.optimizer.fold_constants(
        model, onnx_shape_inference=False, input_size_limit=_SMALL, output_size_limit=_SMALL
    )
    run(
        model,
        [
            common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0),
            common.RemoveUnusedNodesPass(),
            common.ShapeInferencePass(),
            common.CommonSubexpressionEliminationPass(),
            common.TopologicalSortPass(),
        ],
    )
    for output in left_out:
        output.name = ""  # NameFixPass would have them computed, in types that nobody stated
    _infer_types(model)


def _infer_types(model: ir.Model) -> None:
    """Types behind operators that ONNX knows nothing of (com.microsoft): those of what they compute with."""
    for node in model.graph:
        operands = [value for value in node.inputs if value is not None and value.type is not None]
        for output in node.outputs:
            if output.type is not None or not output.name:
                continue
            if node.op_type == "Cast":
                output.type = ir.TensorType(ir.DataType(node.attributes["to"].as_int()))
            elif node.op_type in ("Shape", "Size"):
                output.type = ir.TensorType(ir.DataType.INT64)
            elif node.op_type in _PREDICATES:
                output.type = ir.TensorType(ir.DataType.BOOL)
            elif operands:
                # the condition of a Where, the integers of a DequantizeLinear come first
                last = node.op_type in ("Where", "DequantizeLinear")
                output.type = ir.TensorType(operands[min(1, len(operands) - 1) if last else 0].dtype)


def _root_cause(error: BaseException) -> str:
    while error.__cause__ is not None:
        error = error.__cause__
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}"


def _check_interface(model: ir.Model, file: Path) -> None:
    if graph_input(model, "input_ids") is None:
        inputs = ", ".join(str(value.name) for value in model.graph.inputs)
        raise ExportError(f"{file}: the graph has no input 'input_ids', only: {inputs}")
    input_ids = graph_input(model, "input_ids")
    dims = input_ids.shape if input_ids is not None else None
    if dims is None or len(dims) != 2 or any(isinstance(dim, int) for dim in dims):
        raise ExportError(
            f"{file}: input_ids is of shape {dims}: export the model with a dynamic batch and sequence"
        )
    logits = graph_output(model, "logits")
    if logits is None:
        outputs = ", ".join(str(value.name) for value in model.graph.outputs)
        raise ExportError(f"{file}: the graph has no output 'logits', only: {outputs}")
    kept = [value for value in model.graph.outputs if value is not logits]
    for value in kept:
        model.graph.outputs.remove(value)
    if logits.shape is None or not isinstance(logits.shape[-1], int):
        vocab_size = last_dim(logits)
        if vocab_size is not None and logits.shape is not None:
            logits.shape = ir.Shape([*logits.shape[:-1], vocab_size])


def _check_logits(model: ir.Model, file: Path) -> None:
    input_ids, logits = graph_input(model, "input_ids"), graph_output(model, "logits")
    assert input_ids is not None
    assert logits is not None
    if logits.shape is None or len(logits.shape) != 3 or logits.shape[1] != input_ids.shape[1]:
        raise ExportError(
            f"{file}: its logits are {logits.shape}, not [batch, sequence, vocabulary]: export the "
            "model with the "
            "logits of every token (without logits_to_keep)"
        )


def _warn_of_lost(model: ir.Model, config: dict[str, Any], file: Path) -> None:
    """Speaks of what the model's config has and its exporter dropped (softcap under SDPA, windows)."""
    nodes = list(find_nodes(model, lambda node: node.op_type == "AttentionForm"))
    text = _text_config(config)
    window = text.get("sliding_window") if text.get("use_sliding_window", True) else None
    lost = []
    if text.get("attn_logit_softcapping") and not any(float_attribute(node, "softcap") for node in nodes):
        lost.append(f"a softcap of {text['attn_logit_softcapping']} (attn_logit_softcapping)")
    if (
        window
        and window < _max_positions(config, file)
        and all(int_attribute(node, "local_window_size", -1) < 0 for node in nodes)
    ):
        lost.append(f"a sliding window of {window} tokens")
    if nodes and lost:
        print(
            f"relay-attention: warning: {_config_file(file)} speaks of {' and '.join(lost)}, but no "
            "attention of "
            "the graph has it: the export computes what the graph computes, which is not what the "
            "original model "
            "does",
            file=sys.stderr,
        )


def _warn_of_shared_ranges(model: ir.Model, file: Path) -> None:
    """Activations quantised over a whole call: a token's result depends on which others come with it."""
    nodes = list(find_nodes(model, lambda node: node.op_type == "DynamicQuantizeLinear"))
    if nodes:
        print(
            f"relay-attention: warning: {file}: {len(nodes)} nodes quantise activations over all "
            "tokens of a call "
            f"(the first is {describe(nodes[0])}), so that results depend on which tokens and requests run "
            "together, here as in the original graph; weights alone in 4 or 8 bits (MatMulNBits) have "
            "no such "
            "effect",
            file=sys.stderr,
        )


def _check_precision(model: ir.Model, file: Path, precision: str | None) -> None:
    found = {
        node.inputs[0].dtype
        for node in find_nodes(model, lambda node: node.op_type in ("AttentionForm", "GroupQueryAttention"))
        if node.inputs[0] is not None
    }
    if precision is not None and found and found != {PRECISIONS[precision]}:
        names = ", ".join(sorted(str(dtype) for dtype in found))
        raise ExportError(
            f"{file}: its attention is of type {names}; it cannot be changed to {precision}: export "
            "the model in "
            "that precision, or leave --precision out"
        )
