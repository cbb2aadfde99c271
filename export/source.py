"""A model as it comes in: its graph before the rewrite, and the facts that only its own files hold."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx_ir as ir

from relay_attention.errors import ExportError

HUGGINGFACE, GENAI = "huggingface", "genai"


@dataclass
class SourceModel:
    """A source graph that computes `logits` from `input_ids`, with attention in a form that a matcher knows.

    kind: "huggingface" or "genai". max_positions: tokens that the model's positions reach.
    num_layers: how many attentions the graph must hold, None where the source does not say.
    eos: the ids that end a text.
    """

    model: ir.Model
    kind: str
    architecture: str
    max_positions: int
    num_layers: int | None
    eos: tuple[int, ...]


def detect(folder: Path) -> str:
    """Which kind of model folder this is.

    Raises: ExportError if it is none, or lacks the files of its kind.
    """
    if not folder.is_dir():
        what = "is a file, a folder is expected" if folder.exists() else "no such folder"
        raise ExportError(f"{folder}: {what}")
    if (folder / "genai_config.json").is_file():
        return GENAI
    if (folder / "config.json").is_file():
        if not any(folder.glob("*.safetensors")):
            raise ExportError(
                f"{folder}: it has config.json, but no *.safetensors: only safetensors are loaded"
            )
        return HUGGINGFACE
    raise ExportError(
        f"{folder}: neither a Hugging Face model (config.json, *.safetensors) nor one of "
        "onnxruntime-genai's model "
        "builder (genai_config.json, *.onnx)"
    )


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
