"""Runs relay::RelayAttention in ONNX Runtime on random inputs and compares it with the float64 reference."""

from __future__ import annotations

import functools
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper

from relay_attention.plugins import library_path, schema
from relay_attention.plugins.reference import relay_attention

TARGET_VARIABLE = "RELAY_ATTENTION_CPU_TARGET"
ELEMENT_TYPES = {"float32": TensorProto.FLOAT, "float16": TensorProto.FLOAT16, "int32": TensorProto.INT32}


def make_model(
    attributes: Mapping[str, Any],
    dtype: str,
    input_names: Sequence[str],
    shapes: Mapping[str, Sequence[int | str | None]] | None = None,
    node_name: str = "attention_7",
) -> bytes:
    """A model of one node, with dims of unknown size unless `shapes` gives them."""
    kinds = {tensor.name: tensor for tensor in (*schema.INPUTS, *schema.OUTPUTS)}

    def value_info(name: str) -> onnx.ValueInfoProto:
        tensor = kinds[name]
        rank = len(tensor.shape)
        shape = (shapes or {}).get(name, [f"{name}_{i}" for i in range(rank)])
        return helper.make_tensor_value_info(
            name, ELEMENT_TYPES["int32" if tensor.type == "I" else dtype], shape
        )

    node = helper.make_node(
        schema.OP_TYPE,
        list(input_names),
        list(schema.OUTPUT_NAMES),
        name=node_name,
        domain=schema.DOMAIN,
        **attributes,
    )
    graph = helper.make_graph(
        [node], "one_node", [value_info(n) for n in input_names], [value_info(n) for n in schema.OUTPUT_NAMES]
    )
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid(schema.DOMAIN, schema.SINCE_VERSION)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=9).SerializeToString()


def make_session(model: bytes, threads: int = 1, target: str | None = None) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.log_severity_level = 4
    options.register_custom_ops_library(str(library_path()))
    saved = os.environ.get(TARGET_VARIABLE)
    try:
        if target is not None:
            os.environ[TARGET_VARIABLE] = target
        return ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    finally:
        if target is not None:
            os.environ.pop(TARGET_VARIABLE)
            if saved is not None:
                os.environ[TARGET_VARIABLE] = saved


@functools.lru_cache(maxsize=512)
def cached_session(
    attributes: tuple[tuple[str, Any], ...], dtype: str, rotary: bool, threads: int, target: str | None
) -> ort.InferenceSession:
    return make_session(make_model(dict(attributes), dtype, schema.input_names(rotary)), threads, target)


@dataclass
class Case:
    """Shapes, attributes and lengths of one call; the numbers are drawn afresh from `seed`."""

    num_heads: int = 4
    kv_num_heads: int = 2
    head_dim: int = 32
    prefix_length: int = 70
    max_context: int = 48
    sequence: int = 1
    context_lens: Sequence[int] = (5, 0, 40)
    query_lens: Sequence[int] = (1, 1, 1)
    rotary_dim: int = 0
    attributes: dict[str, Any] = field(default_factory=dict)
    dtype: str = "float32"
    seed: int = 0

    def make_inputs(self) -> dict[str, np.ndarray]:
        rng = np.random.default_rng(self.seed)
        batch, sequence, dim, kv = len(self.context_lens), self.sequence, self.head_dim, self.kv_num_heads

        def draw(*shape: int) -> np.ndarray:
            return rng.standard_normal(shape).astype(self.dtype)

        inputs = {
            "query": draw(batch, sequence, self.num_heads * dim),
            "key": draw(batch, sequence, kv * dim),
            "value": draw(batch, sequence, kv * dim),
            "past_key": draw(batch, kv, self.max_context, dim),
            "past_value": draw(batch, kv, self.max_context, dim),
            "context_lens": np.asarray(self.context_lens, np.int32),
            "query_lens": np.asarray(self.query_lens, np.int32),
            "prefix_key": draw(kv, self.prefix_length, dim),
            "prefix_value": draw(kv, self.prefix_length, dim),
        }
        for b in range(batch):  # nothing past a row's length may be read
            inputs["past_key"][b, :, self.context_lens[b] :] = np.nan
            inputs["past_value"][b, :, self.context_lens[b] :] = np.nan
            for name in ("query", "key", "value"):
                inputs[name][b, self.query_lens[b] :] = np.nan
        if self.rotary_dim:
            positions = np.arange(self.prefix_length + self.max_context)[:, None]
            angles = positions * 100.0 ** -(np.arange(self.rotary_dim // 2) / (self.rotary_dim // 2))
            inputs["cos_cache"] = np.cos(angles).astype(self.dtype)
            inputs["sin_cache"] = np.sin(angles).astype(self.dtype)
        return inputs

    def all_attributes(self) -> dict[str, Any]:
        return schema.make_attributes(
            num_heads=self.num_heads,
            kv_num_heads=self.kv_num_heads,
            do_rotary=int(self.rotary_dim > 0),
            **self.attributes,
        )

    def session(self, threads: int = 1, target: str | None = None) -> ort.InferenceSession:
        return cached_session(
            tuple(sorted(self.all_attributes().items())), self.dtype, self.rotary_dim > 0, threads, target
        )

    def reference(self, inputs: Mapping[str, np.ndarray]) -> tuple[np.ndarray, ...]:
        attributes = {k: v for k, v in self.all_attributes().items() if not k.startswith("plugin_")}
        return relay_attention(**inputs, **attributes)

    def check(self, threads: int = 1, target: str | None = None, in_place: bool = False) -> None:
        """Runs the op and compares all three outputs with the reference."""
        inputs = self.make_inputs()
        expected = self.reference(inputs)
        actual = run(self.session(threads, target), inputs, in_place)
        half = self.dtype == "float16"
        # float16 rounds the output and the rotated keys; rounding errors of the scores grow with their size
        rtol, atol = (2e-3, 4e-3 if self.rotary_dim else 1.5e-3) if half else (2e-5, 5e-6)
        atol *= max(1.0, self.attributes.get("scale", 0.0) * self.head_dim**0.5)
        for name, want, got in zip(schema.OUTPUT_NAMES, expected, actual, strict=True):
            np.testing.assert_allclose(got, want, rtol=rtol, atol=atol, err_msg=f"{name} of {self}")


def run(
    session: ort.InferenceSession, inputs: Mapping[str, np.ndarray], in_place: bool = False
) -> list[np.ndarray]:
    """Runs with outputs bound to buffers full of NaN, or the present outputs to the past inputs' buffers."""
    binding = session.io_binding()
    buffers = {name: np.ascontiguousarray(array).copy() for name, array in inputs.items()}
    shapes = {"output": "query", "present_key": "past_key", "present_value": "past_value"}
    outputs = []
    for name, like in shapes.items():
        if in_place and name != "output":
            outputs.append(buffers[like])
        else:
            outputs.append(np.full_like(buffers[like], np.nan))
    for name, array in buffers.items():
        binding.bind_input(name, "cpu", 0, array.dtype.type, array.shape, array.ctypes.data)
    for name, array in zip(shapes, outputs, strict=True):
        binding.bind_output(name, "cpu", 0, array.dtype.type, array.shape, array.ctypes.data)
    session.run_with_iobinding(binding)
    return outputs


def cpu_targets() -> list[str]:
    """The instruction sets that this machine can run, as the library itself reports them."""
    model = make_model(Case().all_attributes(), "float32", schema.input_names(False))
    with pytest.raises(Exception, match="there are: ") as error:
        make_session(model, target="none")
    return str(error.value).split("there are: ")[1].split("\n")[0].strip().split(", ")
