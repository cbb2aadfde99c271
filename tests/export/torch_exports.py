"""Hugging Face folders as other tools make ONNX of them, with past keys and values."""

from __future__ import annotations

import logging
import shutil
import subprocess
import warnings
from pathlib import Path
from typing import Any

import torch
import transformers

_ROWS = ("input_ids", "attention_mask", "position_ids")
# optimum needs an older transformers, which reads other names in config.json
_OPTIMUM = """
import json, sys
from pathlib import Path
folder, output = map(Path, sys.argv[1:])
file = folder / "config.json"
config = json.loads(file.read_text())
rope = config.pop("rope_parameters", None) or {}
if "rope_type" in rope:
    config["rope_theta"] = rope.get("rope_theta", 1e4)
    if "partial_rotary_factor" in rope:
        config["partial_rotary_factor"] = config["rotary_pct"] = rope["partial_rotary_factor"]
    if rope["rope_type"] == "longrope":
        config["rope_scaling"] = {"type": "longrope"} | {k: rope[k] for k in ("short_factor", "long_factor")}
    elif rope["rope_type"] != "default":
        config["rope_scaling"] = {k: v for k, v in rope.items() if k != "rope_theta"}
elif rope:
    config["rope_theta"] = rope["full_attention"]["rope_theta"]
    config["rope_local_base_freq"] = rope["sliding_attention"]["rope_theta"]
file.write_text(json.dumps(config))
file = folder / "tokenizer_config.json"
file.write_text(json.dumps(json.loads(file.read_text()) | {"tokenizer_class": "PreTrainedTokenizerFast"}))
from optimum.exporters.onnx import main_export
main_export(str(folder), output=str(output), task="text-generation-with-past", do_validation=False)
"""


class NotMade(Exception):
    """The exporter does not make an ONNX file of this model; its words."""


class _WithPast(torch.nn.Module):
    """A transformers model as exporters wrap it: flat inputs, past keys and values in, all of them out."""

    def __init__(self, model: Any):
        super().__init__()
        self.model = model

    def forward(self, input_ids: Any, attention_mask: Any, position_ids: Any, past: Any) -> Any:
        cache = transformers.DynamicCache()
        for layer, (key, value) in enumerate(past):
            cache.update(key, value, layer)
        result = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=cache,
            use_cache=True,
        )
        return result.logits, [(layer.keys, layer.values) for layer in result.past_key_values.layers]


def make_onnx(
    folder: Path,
    source: Path,
    opset: int,
    attention: str = "sdpa",
    dynamo: bool = True,
    dtype: torch.dtype = torch.float32,
) -> Path:
    """What torch.onnx.export makes of a Hugging Face folder: model.onnx, config.json and the tokenizer.

    attention: transformers' name of it. dynamo: the exporter of today; False for the one through TorchScript,
    which optimum uses. dtype: of weights and caches.
    Raises: NotMade.
    """
    folder.mkdir(parents=True, exist_ok=True)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        source, attn_implementation=attention, dtype=dtype
    ).eval()
    wrapped = _WithPast(model).eval()
    past_ids = torch.zeros(2, 5, dtype=torch.int64)
    with torch.no_grad():
        cache = model(past_ids, past_key_values=transformers.DynamicCache(), use_cache=True).past_key_values
    past = [(torch.randn_like(layer.keys), torch.randn_like(layer.values)) for layer in cache.layers]
    positions = torch.arange(5, 8).expand(2, 3).contiguous()
    inputs = (torch.zeros(2, 3, dtype=torch.int64), torch.ones(2, 8, dtype=torch.int64), positions, past)
    kinds = [f"{layer}.{what}" for layer in range(len(past)) for what in ("key", "value")]
    names = {
        "input_names": [*_ROWS, *(f"past_key_values.{kind}" for kind in kinds)],
        "output_names": ["logits", *(f"present.{kind}" for kind in kinds)],
    }
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        logging.getLogger("torch.onnx").setLevel(logging.ERROR)
        try:
            if dynamo:
                any_size = torch.export.Dim.DYNAMIC
                sizes = [{0: any_size, 1: any_size}] * 3 + [[({0: any_size, 2: any_size},) * 2] * len(past)]
                program = torch.onnx.export(
                    wrapped,
                    inputs,
                    dynamo=True,
                    opset_version=opset,
                    dynamic_shapes=tuple(sizes),
                    verbose=False,
                    **names,
                )
                assert program is not None
                program.save(folder / "model.onnx")
            else:
                named = {name: {0: "batch", 1: "sequence"} for name in _ROWS}
                named["attention_mask"] = {0: "batch", 1: "past + sequence"}
                named |= {f"past_key_values.{kind}": {0: "batch", 2: "past"} for kind in kinds}
                torch.onnx.export(
                    wrapped,
                    inputs,
                    folder / "model.onnx",
                    dynamo=False,
                    opset_version=opset,
                    dynamic_axes=named,
                    **names,
                )
        except Exception as error:  # torch's exporters raise many kinds
            cause: BaseException = error
            while cause.__cause__ is not None:
                cause = cause.__cause__
            raise NotMade(
                f"{type(cause).__name__}: {(str(cause).strip().splitlines() or [''])[0]}"
            ) from error
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(source / name, folder / name)
    return folder


def make_optimum(folder: Path, source: Path, python: str) -> Path:
    """What optimum makes of a Hugging Face folder, in an environment of its own.

    python: the command that runs there.
    Raises: NotMade.
    """
    copy = Path(shutil.copytree(source, folder.with_name(f"{folder.name}-source")))
    command = [*python.split(), "-c", _OPTIMUM, str(copy), str(folder)]
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode:
        raise NotMade((result.stderr.strip().splitlines() or ["it does not run"])[-1])
    return folder
