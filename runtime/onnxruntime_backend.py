"""ONNX Runtime on the CPU. The only file that knows onnxruntime.

Everything is bound by address: the caches are arrays allocated once, bound as past and present at the same
address, so that the op appends in place; a step on rows i..j binds the addresses of those rows. Nothing of
the cache is copied.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt

from relay_attention.errors import BackendError
from relay_attention.plugins import library_path
from relay_attention.runtime.artifact import MODEL_NAME, Artifact, PrefixFile
from relay_attention.runtime.backend import Int32, check_memory

try:
    import onnxruntime
except ImportError as error:
    raise BackendError(
        f"the backend 'onnxruntime' needs onnxruntime (pip install 'relay-attention[cpu]'): {error}"
    ) from error

Array = npt.NDArray[Any]
ALIGNMENT = 64  # bytes: a cache line, and the widest vector


class OnnxRuntimeBackend:
    """An artifact in an ONNX Runtime session on the CPU; see `backend.Backend`."""

    def __init__(self, artifact: Artifact, threads: int | None = None):
        """threads: intra-op threads, None for one per physical core (ONNX Runtime's own choice)."""
        if threads is not None and threads < 1:
            raise BackendError(f"threads is {threads}, at least 1 is needed")
        self._manifest = artifact.manifest
        self._dtype = np.dtype(artifact.manifest.dtype)
        self._session = _session(artifact, threads or 0)
        self._binding = self._session.io_binding()
        self._check_names(artifact)
        self._prefix: list[tuple[Array, Array]] = []
        self._prefix_length = artifact.manifest.prefix.length
        self._keys: list[Array] = []
        self._values: list[Array] = []
        self._rows = (0, 0)  # first and number of the rows whose caches are bound
        self._logits = _aligned((0,), np.dtype(np.float32))
        self._last_logits: Array = self._logits
        if artifact.manifest.prefix.mode == "input":
            self.set_prefix(artifact.prefix)

    def allocate(self, max_batch: int, max_context: int) -> None:
        """Makes the caches, zeroed pages that take memory as they are used; see `backend.Backend`."""
        shapes = [(max_batch, heads, max_context, dim) for heads, dim in self._manifest.geometry.layers]
        check_memory(max_batch * max_context * self._manifest.kv_bytes_per_token, max_batch, max_context)
        try:
            self._keys = [_aligned(shape, self._dtype) for shape in shapes]
            self._values = [_aligned(shape, self._dtype) for shape in shapes]
        except MemoryError as error:
            raise BackendError(
                f"caches for max_batch {max_batch} of {max_context} tokens: {error}"
            ) from error
        self._rows = (0, 0)

    def step(self, first_row: int, input_ids: Int32, context_lens: Int32, query_lens: Int32) -> None:
        """Runs the session; see `backend.Backend`."""
        rows, sequence = input_ids.shape
        names, vocab_size = self._manifest.io, self._manifest.geometry.vocab_size
        self._bind_caches(first_row, rows)
        arrays = [np.ascontiguousarray(array, np.int32) for array in (input_ids, context_lens, query_lens)]
        for name, array in zip((names.input_ids, names.context_lens, names.query_lens), arrays, strict=True):
            self._bind_input(name, array)
        shape = (rows, vocab_size) if self._manifest.logits == "last" else (rows, sequence, vocab_size)
        if math.prod(shape) > self._logits.size:
            self._logits = _aligned((math.prod(shape),), self._logits.dtype)
        logits = self._logits[: math.prod(shape)].reshape(shape)
        self._bind_output(names.logits, logits)
        try:
            self._session.run_with_iobinding(self._binding)
        except Exception as error:  # onnxruntime has one class for each status, with no common base
            raise BackendError(
                f"ONNX Runtime failed in a step of {rows} rows x {sequence}: {error}"
            ) from error
        if self._manifest.logits == "all":
            logits = logits[np.arange(rows), np.maximum(query_lens, 1) - 1]
        self._last_logits = logits

    def read_logits(self) -> npt.NDArray[np.float32]:
        """See `backend.Backend`."""
        return self._last_logits

    def move(self, source_row: int, target_row: int, length: int) -> None:
        """See `backend.Backend`."""
        for cache in (*self._keys, *self._values):
            cache[target_row, :, :length] = cache[source_row, :, :length]

    def read_cache(self, row: int, length: int) -> list[tuple[Array, Array]]:
        """Keys and values [kv_num_heads, length, head_dim] that a slot holds, layer by layer, to compare
        engines."""
        pairs = zip(self._keys, self._values, strict=True)
        return [(keys[row, :, :length].copy(), values[row, :, :length].copy()) for keys, values in pairs]

    def set_prefix(self, prefix: PrefixFile) -> None:
        """Binds another prefix, mapped from its file; see `backend.Backend`."""
        if self._manifest.prefix.mode != "input":
            raise BackendError(
                "the prefix of this artifact is part of its graph: export it with `--prefix input` to "
                "replace the prefix while running, or replace it in the folder with `relay-attention prefix`"
            )
        layers = prefix.read()
        for layer, (key, value) in enumerate(layers):
            self._bind_input(self._manifest.io.prefix_key.format(layer=layer), key)
            self._bind_input(self._manifest.io.prefix_value.format(layer=layer), value)
        self._prefix = layers  # keeps the bound arrays alive
        self._prefix_length = prefix.header.prefix_length

    @property
    def cache_bytes(self) -> int:
        """See `backend.Backend`."""
        return sum(cache.nbytes for cache in (*self._keys, *self._values))

    @property
    def prefix_bytes(self) -> int:
        """See `backend.Backend`."""
        return self._prefix_length * self._manifest.kv_bytes_per_token

    def close(self) -> None:
        """See `backend.Backend`."""
        self._binding.clear_binding_inputs()
        self._binding.clear_binding_outputs()
        del self._binding, self._session
        self._keys, self._values, self._prefix = [], [], []

    def _bind_caches(self, first_row: int, rows: int) -> None:
        if self._rows == (first_row, rows):
            return
        names, part = self._manifest.io, slice(first_row, first_row + rows)
        for layer, (keys, values) in enumerate(zip(self._keys, self._values, strict=True)):
            self._bind_input(names.past_key.format(layer=layer), keys[part])
            self._bind_input(names.past_value.format(layer=layer), values[part])
            self._bind_output(names.present_key.format(layer=layer), keys[part])
            self._bind_output(names.present_value.format(layer=layer), values[part])
        self._rows = (first_row, rows)

    def _bind_input(self, name: str, array: Array) -> None:
        self._binding.bind_input(name, "cpu", 0, array.dtype.type, array.shape, array.ctypes.data)

    def _bind_output(self, name: str, array: Array) -> None:
        self._binding.bind_output(name, "cpu", 0, array.dtype.type, array.shape, array.ctypes.data)

    def _check_names(self, artifact: Artifact) -> None:
        manifest, names = artifact.manifest, artifact.manifest.io
        layers = range(manifest.geometry.num_layers)
        per_layer = [names.past_key, names.past_value]
        per_layer += [names.prefix_key, names.prefix_value] if manifest.prefix.mode == "input" else []
        inputs = {names.input_ids, names.context_lens, names.query_lens}
        inputs |= {name.format(layer=layer) for name in per_layer for layer in layers}
        outputs = {names.logits}
        outputs |= {
            name.format(layer=layer) for name in (names.present_key, names.present_value) for layer in layers
        }
        for what, expected, found in (
            ("inputs", inputs, {node.name for node in self._session.get_inputs()}),
            ("outputs", outputs, {node.name for node in self._session.get_outputs()}),
        ):
            if expected != found:
                raise BackendError(
                    f"{artifact.file(MODEL_NAME)}: {what} do not fit relay.json: missing "
                    f"{sorted(expected - found)}, unknown {sorted(found - expected)}: export the model again"
                )


def _session(artifact: Artifact, threads: int) -> Any:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    library, model = library_path(), artifact.file(MODEL_NAME)
    try:
        options.register_custom_ops_library(str(library))
    except Exception as error:
        raise BackendError(f"{library}: ONNX Runtime cannot load the op library: {error}") from error
    try:
        return onnxruntime.InferenceSession(str(model), options, providers=["CPUExecutionProvider"])
    except Exception as error:
        raise BackendError(f"{model}: ONNX Runtime {onnxruntime.__version__} refuses it: {error}") from error


def _aligned(shape: tuple[int, ...], dtype: np.dtype[Any]) -> Array:
    """Zeros whose address is a multiple of ALIGNMENT; pages are taken from the system when first written."""
    count = math.prod(shape)
    raw = np.zeros(count * dtype.itemsize + ALIGNMENT, np.uint8)
    start = -raw.ctypes.data % ALIGNMENT
    return raw[start : start + count * dtype.itemsize].view(dtype).reshape(shape)
