from __future__ import annotations

import importlib.util
import re
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest

from relay_attention.plugins import library_path


def _load(name: str) -> ModuleType:
    """A helper module beside this file: with --import-mode=importlib they cannot be imported by name."""
    spec = importlib.util.spec_from_file_location(name, Path(__file__).with_name(f"{name}.py"))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


tiny_models = _load("tiny_models")
for _name in ("onnx_decoders", "torch_exports"):  # tests import them by name
    _load(_name)


@pytest.fixture(scope="session")
def tiny() -> ModuleType:
    """The module tiny_models."""
    return tiny_models


@pytest.fixture(scope="session")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama with a tokenizer that has no chat template."""
    return tiny_models.make_model(tmp_path_factory.mktemp("llama") / "llama", tiny_models.CONFIGS["llama"]())


@pytest.fixture(scope="session")
def genai_llama(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny Llama as onnxruntime-genai's builder makes it, for the CPU, float32."""
    return tiny_models.make_genai(tmp_path_factory.mktemp("genai") / "llama", llama)


@pytest.fixture(scope="session")
def llama_artifact(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny Llama exported. Not to be changed: copy it first."""
    from relay_attention.export import export_model

    return export_model(llama, tiny_models.SYSTEM_PROMPT, tmp_path_factory.mktemp("artifact") / "llama")


Parse = Callable[..., ir.Model]


@pytest.fixture(scope="session")
def parse() -> Parse:
    """Reads ONNX's text format, where "__" in a name stands for "."; tensors by name become initializers."""

    def parse_text(text: str, **tensors: Any) -> ir.Model:
        used = [
            ir.tensor(value, name=name) for name, value in tensors.items() if re.search(rf"\b{name}\b", text)
        ]
        model = ir.from_onnx_text(text, initializers=used)
        for tensor in used:
            value = model.graph.initializers[tensor.name]
            value.shape, value.type = tensor.shape, ir.TensorType(tensor.dtype)
        values = {*model.graph.inputs, *(output for node in model.graph for output in node.outputs)}
        for value in (*values, *list(model.graph.initializers.values())):
            if value.name and "__" in value.name:
                value.name = value.name.replace("__", ".")
        return model

    return parse_text


Run = Callable[..., list[np.ndarray]]


@pytest.fixture(scope="session")
def run() -> Run:
    """Runs an onnx-ir model in ONNX Runtime, with the RelayAttention library: outputs in graph order."""

    def run_model(model: ir.Model, **feeds: Any) -> list[np.ndarray]:
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        options.intra_op_num_threads = 2
        options.register_custom_ops_library(str(library_path()))
        session = onnxruntime.InferenceSession(
            ir.to_proto(ir.external_data.load_to_model(model)).SerializeToString(),
            options,
            providers=["CPUExecutionProvider"],
        )
        return session.run(None, feeds)

    return run_model
