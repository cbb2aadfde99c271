"""A model as it comes in: its graph before the rewrite, and the facts that only its own files hold."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx_ir as ir

from relay_attention.errors import ExportError

HUGGINGFACE, GENAI, ONNX = "huggingface", "genai", "onnx"
PRECISIONS = {"fp32": ir.DataType.FLOAT, "fp16": ir.DataType.FLOAT16, "bf16": ir.DataType.BFLOAT16}


@dataclass
class SourceModel:
    """A source graph that computes `logits` from `input_ids`, with attention in a form that a matcher knows.

    kind: "huggingface", "genai" or "onnx". max_positions: tokens that the model's positions reach.
    min_prefix: tokens that a prefix must have for the graph to be right (rotary for long texts only).
    num_layers: how many attentions the graph must hold, None where the source does not say.
    eos: the ids that end a text.
    """

    model: ir.Model
    kind: str
    architecture: str
    max_positions: int
    num_layers: int | None
    eos: tuple[int, ...]
    min_prefix: int = 0


def detect(folder: Path) -> str:
    """Which kind of model a folder, or an ONNX file, holds.

    A folder with both safetensors and ONNX is a Hugging Face one; its graph is exported by giving its file.
    Raises: ExportError if it is none, or lacks the files of its kind.
    """
    if folder.is_file() and folder.suffix == ".onnx":
        return ONNX
    if not folder.is_dir():
        what = (
            "is a file, a model's folder or an .onnx file is expected"
            if folder.exists()
            else "no such folder"
        )
        raise ExportError(f"{folder}: {what}")
    if (folder / "genai_config.json").is_file():
        return GENAI
    has_config = (folder / "config.json").is_file()
    if has_config and any(folder.glob("*.safetensors")):
        return HUGGINGFACE
    if any(folder.glob("*.onnx")) or any(folder.glob("onnx/*.onnx")):
        return ONNX
    if has_config:
        raise ExportError(
            f"{folder}: it has config.json, but no *.safetensors and no *.onnx: only these are loaded"
        )
    raise ExportError(
        f"{folder}: neither a Hugging Face model (config.json, *.safetensors), nor one of "
        "onnxruntime-genai's model builder (genai_config.json, *.onnx), nor an ONNX decoder (*.onnx)"
    )


def files_beside(source: Path) -> Path:
    """The folder that holds a model's tokenizer: the folder itself, or that of the file.

    Where a repository keeps its graphs in a folder onnx, that is the one above.
    """
    folder = source if source.is_dir() else source.parent
    above = folder.resolve().parent
    if folder.resolve().name == "onnx" and not (folder / "tokenizer.json").is_file():
        return above if (above / "tokenizer.json").is_file() else folder
    return folder


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file of the model's.

    Raises: ExportError naming the file.
    """
    try:
        value = json.loads(path.read_bytes().decode("utf-8"))
    except OSError as error:
        raise ExportError(f"{path}: cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise ExportError(f"{path}: not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise ExportError(f"{path}: should be a JSON object, is {type(value).__name__}")
    return value


def token_list(value: Any) -> tuple[int, ...]:
    """Token ids from a config's field: a number, a list of them, or nothing."""
    if isinstance(value, bool) or value is None:
        return ()
    return (value,) if isinstance(value, int) else tuple(int(item) for item in value)
