"""The same model without relay attention, for comparison: every request's cache holds the whole prompt.

`build` takes an artifact's own graph and puts ONNX Runtime's GroupQueryAttention where RelayAttention stands,
so that both sides differ in nothing else. `GqaDecoder` decodes greedily with it, its caches written in place.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
from onnx import TensorProto, helper

from relay_attention.runtime.artifact import Artifact

SHARED_ATTRIBUTES = ("num_heads", "kv_num_heads", "scale", "softcap", "do_rotary", "rotary_interleaved")


def build(artifact: Artifact, path: Path) -> None:
    """Writes the artifact's graph with GroupQueryAttention nodes to `path`; the weights stay where they are.

    Raises: ValueError for a sliding window, whose meaning differs between the two ops.
    """
    model = onnx.load(str(artifact.path / "model.onnx"), load_external_data=False)
    graph = model.graph
    for node in graph.node:
        if node.op_type == "RelayAttention":
            node.CopyFrom(_group_query_attention(node))
    total, one = "baseline.total_lens", "baseline.one"
    graph.node.insert(0, helper.make_node("Add", ["context_lens", "query_lens"], [total]))
    graph.node.insert(1, helper.make_node("Sub", [total, one], ["baseline.seqlens_k"]))
    graph.initializer.append(helper.make_tensor(one, TensorProto.INT32, [1], [1]))
    graph.input.append(helper.make_tensor_value_info("total_sequence_length", TensorProto.INT32, []))
    _empty_prefix(graph, artifact)
    if not any(entry.domain == "com.microsoft" for entry in model.opset_import):
        model.opset_import.append(helper.make_opsetid("com.microsoft", 1))
    onnx.save(model, str(path))


def _group_query_attention(node: onnx.NodeProto) -> onnx.NodeProto:
    attributes = {a.name: helper.get_attribute_value(a) for a in node.attribute}
    if attributes.get("local_window_size", -1) >= 0:
        raise ValueError(f"node {node.name}: the baseline has no sliding window; compare a model without one")
    query, key, value, past_key, past_value, _, _, _, _, *rotary = node.input
    return helper.make_node(
        "GroupQueryAttention",
        [query, key, value, past_key, past_value, "baseline.seqlens_k", "total_sequence_length", *rotary],
        list(node.output),
        name=node.name,
        domain="com.microsoft",
        **{name: attributes[name] for name in SHARED_ATTRIBUTES if name in attributes},
    )


def _empty_prefix(graph: onnx.GraphProto, artifact: Artifact) -> None:
    """Without a prefix positions start at 0, where the graph takes them from the prefix's shape."""
    names = {
        name.format(layer=layer)
        for name in (artifact.manifest.io.prefix_key, artifact.manifest.io.prefix_value)
        for layer in range(artifact.manifest.geometry.num_layers)
    }
    used = {name for node in graph.node for name in node.input}
    for tensor in list(graph.initializer):
        if tensor.name in names - used:
            graph.initializer.remove(tensor)
        elif tensor.name in names:
            heads, _, head_dim = tensor.dims
            tensor.CopyFrom(helper.make_tensor(tensor.name, tensor.data_type, [heads, 0, head_dim], []))


@dataclass
class GqaRun:
    """What a batch took: seconds from the start, and the greedy tokens of each request."""

    token_ids: list[list[int]]
    first_token_seconds: list[float] = field(default_factory=list)
    total_seconds: float = 0.0
    step_seconds: float = 0.0  # median of a decode step
    cache_bytes: int = 0


class GqaDecoder:
    """Greedy decoding of full prompts with GroupQueryAttention on the CPU.

    The op takes several new tokens after cached ones only for a batch of one, so prompts are prefilled one by
    one and decoded together.
    """

    def __init__(self, model: Path, artifact: Artifact, threads: int) -> None:
        options = ort.SessionOptions()
        options.intra_op_num_threads = threads
        self.session = ort.InferenceSession(str(model), options, providers=["CPUExecutionProvider"])
        self.manifest = artifact.manifest
        names = artifact.manifest.io
        self.cache_names = [
            (past.format(layer=layer), present.format(layer=layer))
            for layer in range(artifact.manifest.geometry.num_layers)
            for past, present in (
                (names.past_key, names.present_key),
                (names.past_value, names.present_value),
            )
        ]

    def generate(self, prompts: Sequence[Sequence[int]], max_new_tokens: int, eos: Sequence[int]) -> GqaRun:
        """Greedy tokens of every prompt (full token ids, system prompt included), stop token left out."""
        capacity = max(map(len, prompts)) + max_new_tokens
        caches = self._allocate(len(prompts), capacity)
        run = GqaRun([[] for _ in prompts], cache_bytes=sum(c.nbytes for c in caches.values()))
        start = time.perf_counter()
        tokens = np.zeros(len(prompts), np.int32)
        for row, prompt in enumerate(prompts):
            ids = np.asarray([prompt], np.int32)
            logits = self._step(caches, slice(row, row + 1), ids, np.zeros(1, np.int32))
            tokens[row] = logits[0].argmax()
            run.first_token_seconds.append(time.perf_counter() - start)
        steps = []
        lengths = np.asarray([len(p) for p in prompts], np.int32)
        running = np.ones(len(prompts), bool)
        for _ in range(max_new_tokens):
            for row in np.flatnonzero(running):
                if tokens[row] in eos:
                    running[row] = False
                else:
                    run.token_ids[row].append(int(tokens[row]))
                    running[row] = len(run.token_ids[row]) < max_new_tokens
            if not running.any():
                break
            before = time.perf_counter()
            logits = self._step(caches, slice(0, len(prompts)), tokens[:, None], lengths)
            tokens = logits.argmax(axis=1).astype(np.int32)
            steps.append(time.perf_counter() - before)
            # an ended request stands still: its last place is written again
            lengths += running
        run.total_seconds = time.perf_counter() - start
        run.step_seconds = float(np.median(steps)) if steps else 0.0
        return run

    def _allocate(self, batch: int, capacity: int) -> dict[str, np.ndarray]:
        dtype = np.dtype(self.manifest.dtype)
        layers = [layer for layer in self.manifest.geometry.layers for _ in ("key", "value")]
        return {
            past: np.zeros((batch, heads, capacity, head_dim), dtype)
            for (past, _), (heads, head_dim) in zip(self.cache_names, layers, strict=True)
        }

    def _step(
        self, caches: dict[str, np.ndarray], rows: slice, ids: np.ndarray, lengths: np.ndarray
    ) -> np.ndarray:
        io = self.manifest.io
        binding = self.session.io_binding()
        batch, sequence = ids.shape
        inputs = {
            io.input_ids: np.ascontiguousarray(ids, np.int32),
            io.context_lens: lengths,
            io.query_lens: np.full(batch, sequence, np.int32),
            "total_sequence_length": np.asarray(int(lengths.max()) + sequence, np.int32),
        }
        for name, array in inputs.items():
            binding.bind_cpu_input(name, array)
        for past, present in self.cache_names:
            value = ort.OrtValue.ortvalue_from_numpy(caches[past][rows])
            binding.bind_ortvalue_input(past, value)
            binding.bind_ortvalue_output(present, value)
        binding.bind_output(io.logits, "cpu")
        self.session.run_with_iobinding(binding)
        logits: np.ndarray = binding.get_outputs()[-1].numpy()
        return logits.reshape(batch, -1, logits.shape[-1])[:, -1]
