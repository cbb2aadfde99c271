"""Models of onnxruntime-genai's model builder: genai_config.json beside an ONNX file."""

from __future__ import annotations

import sys
from pathlib import Path

import onnx_ir as ir

from relay_attention.errors import ExportError
from relay_attention.export.graph import find_nodes, int_attribute
from relay_attention.export.longrope_tables import choose_tables
from relay_attention.export.source import GENAI, SourceModel, read_json, token_list

CONFIG_NAME = "genai_config.json"


def load_genai(folder: Path, prefix_length: int = 0, max_context: int | None = None) -> SourceModel:
    """Reads the decoder of a genai folder; its weights stay in their file, mapped.

    prefix_length: tokens of the system prompt. max_context: as the user gave it. Both matter only to rotary
        embedding that depends on how long a request is.
    Raises: ExportError if files are missing or the folder holds more than one decoder model.
    """
    config = read_json(folder / CONFIG_NAME)
    try:
        model_config = config["model"]
        decoder = model_config["decoder"]
        file = folder / decoder["filename"]
        context_length = int(model_config["context_length"])
        num_layers = int(decoder["num_hidden_layers"])
    except (KeyError, TypeError, ValueError) as error:
        raise ExportError(f"{folder / CONFIG_NAME}: field {error} is missing or not of its type") from error
    kind = str(model_config.get("type", "unknown"))
    for part in ("encoder", "vision", "speech", "embedding"):
        if part in model_config:
            raise ExportError(
                f"{folder}: a {kind} model with a {part} part; only text decoders can be exported"
            )
    if "pipeline" in decoder:
        raise ExportError(f"{folder}: the decoder is a pipeline of several graphs, which is not supported")
    if not file.is_file():
        raise ExportError(f"{file}: missing, though {CONFIG_NAME} names it")
    try:
        model = ir.load(file)
    except Exception as error:  # protobuf raises errors of its own
        raise ExportError(f"{file}: cannot be read as an ONNX model: {error}") from error
    for value in model.graph.initializers.values():
        tensor = value.const_value
        if isinstance(tensor, ir.ExternalTensor) and not Path(tensor.path).is_file():
            raise ExportError(f"{tensor.path}: missing, though {file.name} keeps {value.name!r} in it")
    regime = choose_tables(model, prefix_length, max_context, context_length)
    if not find_nodes(model, lambda node: node.op_type == "GroupQueryAttention"):
        # what it writes where ONNX Runtime has no such kernel: float32 for CUDA, float16 for the CPU
        _state_head_size(model, decoder.get("head_size"))
        _fold_attention(model, file, regime.max_positions)
    _warn_of_lost_window(decoder, model, folder)
    return SourceModel(
        model=model,
        kind=GENAI,
        architecture=kind,
        max_positions=regime.max_positions,
        min_prefix=regime.min_prefix,
        num_layers=num_layers,
        eos=token_list(model_config.get("eos_token_id")),
    )


def _state_head_size(model: ir.Model, head_size: object) -> None:
    """Caches [batch, kv_num_heads, past, head_size], whose last size the builder names and does not state."""
    for value in model.graph.inputs:
        shape = value.shape
        if shape is not None and len(shape) == 4 and isinstance(head_size, int):
            value.shape = ir.Shape([*shape[:3], head_size])


def _fold_attention(model: ir.Model, file: Path, max_positions: int) -> None:
    try:
        from relay_attention.export.onnx_source import fold_attention
    except ImportError as error:
        raise ExportError(
            f"{file}: its attention is no GroupQueryAttention; exporting it needs onnxscript "
            f"(pip install 'relay-attention[export]'): {error}"
        ) from error
    fold_attention(model, file, max_positions)


def _warn_of_lost_window(decoder: dict[str, object], model: ir.Model, folder: Path) -> None:
    window = decoder.get("sliding_window")
    if not isinstance(window, dict) or not window.get("window_size"):
        return
    nodes = find_nodes(model, lambda node: node.op_type in ("GroupQueryAttention", "AttentionForm"))
    if all(int_attribute(node, "local_window_size", -1) <= 0 for node in nodes):
        print(
            f"relay-attention: warning: {folder / CONFIG_NAME} speaks of a sliding window of "
            f"{window['window_size']} "
            "tokens, but no attention of the graph has one: the export computes what the graph computes, "
            "full "
            "attention, which is not what the original model does past that many tokens",
            file=sys.stderr,
        )
