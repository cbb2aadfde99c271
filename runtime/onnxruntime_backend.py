"""ONNX Runtime: what its backends share, and the one on the CPU.

Everything is bound by address: the caches are arrays allocated once, bound as past and present at the same
address, so that the op appends in place; a step on rows i..j binds the addresses of those rows. Nothing of
the cache is copied. Where the arrays lie is known to a `Memory` alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from relay_attention.errors import BackendError
from relay_attention.plugins import library_path
from relay_attention.runtime import backend, bfloat16
from relay_attention.runtime.artifact import MODEL_NAME, WEIGHTS_NAME, Artifact, PrefixFile
from relay_attention.runtime.backend import Int32

try:
    import onnxruntime as onnxruntime  # the backend on GPUs takes it from here
except ImportError as error:
    raise BackendError(
        f"the backend needs onnxruntime (pip install 'relay-attention[cpu]'; with NVIDIA GPUs "
        f"'relay-attention[cuda]' in its place): {error}"
    ) from error

Array = npt.NDArray[Any]
ALIGNMENT = 64  # bytes: a cache line, and the widest vector


class Memory(Protocol):
    """Where caches, prefix and logits lie. Its arrays are NumPy's or look alike: shape, dtype, nbytes,
    slices of rows. What fails is a BackendError or MemoryError."""

    device: str  # ONNX Runtime's name of it
    index: int

    def free(self) -> int | None:
        """Bytes that can still be allocated, if they can be known."""

    def zeros(self, shape: tuple[int, ...], dtype: np.dtype[Any]) -> Any:
        """A new array of zeros, its address a multiple of ALIGNMENT."""

    def view(
        self, array: Any, shape: tuple[int, ...], dtype: npt.DTypeLike | None = None, offset: int = 0
    ) -> Any:
        """Part of a flat array from a byte on, in another shape and dtype (None: its own)."""

    def address(self, array: Any) -> int:
        """Of the first element."""

    def put(self, array: Array) -> Any:
        """An array of this memory with the same content; the same array where it lies here already."""

    def stage(self, arrays: Sequence[Array]) -> list[Any]:
        """A step's small inputs in this memory, valid until the next call.

        Their addresses follow from their sizes: the same sizes lie at the same place every time.
        """

    def get(self, array: Any) -> Array:
        """A NumPy array with the same content; the same array where it is one."""

    def pick(self, array: Any, index: npt.NDArray[np.int64]) -> Any:
        """array[0, index[0]], array[1, index[1]], ... of an array [n, m, ...]; it may be overwritten."""

    def move(self, caches: Sequence[Any], source: int, target: int, length: int) -> None:
        """cache[target, :, :length] = cache[source, :, :length] for each of the caches."""

    def run(self, session: Any, binding: Any, options: Any) -> None:
        """Runs a session with an IOBinding of arrays of this memory, after what was asked for before."""

    def wait(self) -> None:
        """Until all that was asked for is done."""

    def close(self) -> None:
        """Frees what this object itself holds, not its arrays."""


class HostMemory:
    """Main memory: arrays are NumPy's; see `Memory`."""

    device, index = "cpu", 0

    def free(self) -> int | None:
        return backend.available_memory()

    def zeros(self, shape: tuple[int, ...], dtype: np.dtype[Any]) -> Array:
        """Pages are taken from the system when they are first written."""
        count = math.prod(shape)
        raw = np.zeros(count * dtype.itemsize + ALIGNMENT, np.uint8)
        start = -raw.ctypes.data % ALIGNMENT
        return raw[start : start + count * dtype.itemsize].view(dtype).reshape(shape)

    def view(
        self, array: Array, shape: tuple[int, ...], dtype: npt.DTypeLike | None = None, offset: int = 0
    ) -> Array:
        dtype = array.dtype if dtype is None else np.dtype(dtype)
        part = array.view(np.uint8)[offset : offset + math.prod(shape) * dtype.itemsize]
        return part.view(dtype).reshape(shape)

    def address(self, array: Array) -> int:
        return array.ctypes.data

    def put(self, array: Array) -> Array:
        return array

    def stage(self, arrays: Sequence[Array]) -> list[Array]:
        self._staged = [np.ascontiguousarray(array) for array in arrays]  # alive as long as they are bound
        return self._staged

    def get(self, array: Array) -> Array:
        return array

    def pick(self, array: Array, index: npt.NDArray[np.int64]) -> Array:
        return array[np.arange(len(array)), index]

    def move(self, caches: Sequence[Array], source: int, target: int, length: int) -> None:
        for cache in caches:
            cache[target, :, :length] = cache[source, :, :length]

    def run(self, session: Any, binding: Any, options: Any) -> None:
        session.run_with_iobinding(binding, options)

    def wait(self) -> None:
        pass

    def close(self) -> None:
        pass


class Binding:
    """An IOBinding that is told only what has changed: telling it all takes longer than a small step."""

    def __init__(self, session: Any, memory: Memory):
        self._memory = memory
        self.io = session.io_binding()
        self.bound: dict[str, tuple[Any, ...]] = {}
        self.rows = (0, 0)  # first and number of the rows whose caches are bound
        self.prefix: Any = None  # the list of arrays that is bound

    def input(self, name: str, array: Any) -> None:
        self._bind(self.io.bind_input, name, described(self._memory, array))

    def output(self, name: str, array: Any) -> None:
        self._bind(self.io.bind_output, name, described(self._memory, array))

    def host_input(self, name: str, array: Array) -> None:
        """An input that ONNX Runtime wants in main memory; it may copy when it is told, so it always is."""
        self.bound.pop(name, None)
        self._bind(self.io.bind_input, name, described(HostMemory(), array))

    def _bind(self, bind: Callable[..., None], name: str, what: tuple[Any, ...]) -> None:
        if self.bound.get(name) != what:
            bind(name, *what)
            self.bound[name] = what

    def clear(self) -> None:
        self.io.clear_binding_inputs()
        self.io.clear_binding_outputs()


class OnnxRuntimeBase:
    """An artifact in an ONNX Runtime session, whatever device it runs on; see `backend.Backend`."""

    def __init__(self, artifact: Artifact, session: Any, memory: Memory):
        """session: made by `open_session`; its caches, prefix and logits will lie in `memory`."""
        self._manifest = artifact.manifest
        self._dtype = artifact.manifest.storage_dtype
        self._session, self._memory = session, memory
        self._binding = Binding(session, memory)
        self._check_names(artifact)
        self._prefix: list[tuple[Any, Any]] = []
        self._prefix_length = artifact.manifest.prefix.length
        self._keys: list[Any] = []
        self._values: list[Any] = []
        self._logits: Any = memory.zeros((0,), np.dtype(np.float32))  # of a step of one token a row
        self._many_logits: Any = self._logits  # of more
        self._last_logits: Any = self._logits
        if artifact.manifest.prefix.mode == "input":
            self.set_prefix(artifact.prefix)

    def allocate(self, max_batch: int, max_context: int) -> None:
        """Makes the caches, zeroed; see `backend.Backend`."""
        shapes = [(max_batch, heads, max_context, dim) for heads, dim in self._manifest.geometry.layers]
        needed = max_batch * max_context * self._manifest.kv_bytes_per_token
        backend.check_memory(needed, max_batch, max_context, self._memory.free())
        logits = max_batch * self._manifest.geometry.vocab_size
        try:
            self._keys = [self._memory.zeros(shape, self._dtype) for shape in shapes]
            self._values = [self._memory.zeros(shape, self._dtype) for shape in shapes]
            self._logits = self._memory.zeros((logits,), np.dtype(np.float32))
        except (MemoryError, BackendError) as error:
            self._keys, self._values = [], []
            raise BackendError(
                f"caches for max_batch {max_batch} of {max_context} tokens: {error}"
            ) from error
        self._binding.rows = (0, 0)

    def step(self, first_row: int, input_ids: Int32, context_lens: Int32, query_lens: Int32) -> None:
        """Runs the session; see `backend.Backend`."""
        logits = self._run(self._binding, first_row, input_ids, context_lens, query_lens)
        if self._manifest.logits == "all":
            logits = self._memory.pick(logits, np.maximum(query_lens, 1).astype(np.int64) - 1)
        self._last_logits = logits

    def _run(
        self,
        binding: Binding,
        first_row: int,
        input_ids: Int32,
        context_lens: Int32,
        query_lens: Int32,
        options: Any = None,
    ) -> Any:
        """Runs the session with one of its bindings and RunOptions; returns the logits as the graph gives
        them, [n, vocab] or [n, S, vocab]."""
        rows, sequence = input_ids.shape
        names, vocab_size = self._manifest.io, self._manifest.geometry.vocab_size
        self._bind_fixed(binding, first_row, rows)
        arrays = [np.asarray(array, np.int32) for array in (input_ids, context_lens, query_lens)]
        self._bind_small(binding, arrays)
        shape = (rows, vocab_size) if self._manifest.logits == "last" else (rows, sequence, vocab_size)
        if math.prod(shape) <= math.prod(self._logits.shape):
            logits = self._memory.view(self._logits, shape)
        else:
            if math.prod(shape) > math.prod(self._many_logits.shape):
                self._many_logits = self._memory.zeros((math.prod(shape),), self._logits.dtype)
            logits = self._memory.view(self._many_logits, shape)
        binding.output(names.logits, logits)
        try:
            self._memory.run(self._session, binding.io, options)
        except Exception as error:  # onnxruntime has one class for each status, with no common base
            raise BackendError(
                f"ONNX Runtime failed in a step of {rows} rows x {sequence}: {error}"
            ) from error
        return logits

    def read_logits(self) -> npt.NDArray[np.float32]:
        """See `backend.Backend`."""
        logits: npt.NDArray[np.float32] = self._memory.get(self._last_logits)
        return logits

    def move(self, source_row: int, target_row: int, length: int) -> None:
        """See `backend.Backend`."""
        self._memory.move((*self._keys, *self._values), source_row, target_row, length)

    def read_cache(self, row: int, length: int) -> list[tuple[Array, Array]]:
        """Keys and values [kv_num_heads, length, head_dim] that a slot holds, layer by layer, to compare
        engines. bfloat16 is given as float32."""
        found = [
            self._memory.get(cache[row : row + 1])[0, :, :length].copy()
            for pair in zip(self._keys, self._values, strict=True)
            for cache in pair
        ]
        if self._dtype == bfloat16.BITS:
            found = [bfloat16.widen(array) for array in found]
        return list(zip(found[::2], found[1::2], strict=True))

    def set_prefix(self, prefix: PrefixFile) -> None:
        """Binds another prefix; the old one goes when the new one is there. See `backend.Backend`."""
        if self._manifest.prefix.mode != "input":
            raise BackendError(
                "the prefix of this artifact is part of its graph: export it with `--prefix input` to "
                "replace the prefix while running, or replace it in the folder with `relay-attention prefix`"
            )
        self._prefix = [(self._memory.put(key), self._memory.put(value)) for key, value in prefix.read()]
        self._binding.prefix = None  # bound by the next step; the old one is not kept for it
        self._prefix_length = prefix.header.prefix_length

    @property
    def cache_bytes(self) -> int:
        """See `backend.Backend`."""
        return sum(int(cache.nbytes) for cache in (*self._keys, *self._values))

    @property
    def prefix_bytes(self) -> int:
        """See `backend.Backend`."""
        return self._prefix_length * self._manifest.kv_bytes_per_token

    def close(self) -> None:
        """See `backend.Backend`."""
        self._binding.clear()
        del self._binding, self._session
        self._keys, self._values, self._prefix = [], [], []
        self._logits = self._many_logits = self._last_logits = None
        self._memory.close()

    def _bind_fixed(self, binding: Binding, first_row: int, rows: int) -> None:
        """What stays where it is from step to step: the rows' caches, and the prefix if it is an input."""
        names = self._manifest.io
        if binding.rows != (first_row, rows):
            part = slice(first_row, first_row + rows)
            for layer, (keys, values) in enumerate(zip(self._keys, self._values, strict=True)):
                binding.input(names.past_key.format(layer=layer), keys[part])
                binding.input(names.past_value.format(layer=layer), values[part])
                binding.output(names.present_key.format(layer=layer), keys[part])
                binding.output(names.present_value.format(layer=layer), values[part])
            binding.rows = (first_row, rows)
        if self._manifest.prefix.mode == "input" and binding.prefix is not self._prefix:
            for layer, (key, value) in enumerate(self._prefix):
                binding.input(names.prefix_key.format(layer=layer), key)
                binding.input(names.prefix_value.format(layer=layer), value)
            binding.prefix = self._prefix

    def _bind_small(self, binding: Binding, arrays: Sequence[Array]) -> None:
        """input_ids, context_lens and query_lens, int32."""
        names = self._manifest.io
        small = (names.input_ids, names.context_lens, names.query_lens)
        for name, array in zip(small, self._memory.stage(arrays), strict=True):
            binding.input(name, array)

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


class OnnxRuntimeBackend(OnnxRuntimeBase):
    """An artifact in an ONNX Runtime session on the CPU; see `backend.Backend`.

    The caches are zeroed pages that take memory as they are used; an input prefix is mapped from its file.
    """

    def __init__(self, artifact: Artifact, threads: int | None = None, mapped_weights: bool = False):
        """threads: intra-op threads, None for one per physical core (ONNX Runtime's own choice).

        mapped_weights: use the weights where they are mapped from their file, without the packed or (float16)
            float32 copies that are faster. A step takes longer, float16 several times as long.
        Raises: BackendError also if memory does not suffice for these copies, or the artifact is bfloat16.
        """
        if artifact.manifest.dtype == bfloat16.NAME:
            raise BackendError(
                f"{artifact.path}: is bfloat16, which ONNX Runtime computes on GPUs only: load it with the "
                "backend 'onnxruntime-cuda', or export the model with --precision fp16 or fp32"
            )
        if not mapped_weights:
            _check_copies(artifact)
        session = open_session(artifact, threads, ["CPUExecutionProvider"], mapped=mapped_weights)
        super().__init__(artifact, session, HostMemory())


def _check_copies(artifact: Artifact) -> None:
    """Refuses weights whose copies would exhaust memory, before the system ends the process."""
    weights = artifact.manifest.files.get(WEIGHTS_NAME)
    available = backend.available_memory()
    if weights is None or available is None:
        return
    needed = weights.bytes * (2 if artifact.manifest.dtype == "float16" else 1)
    if needed > available:
        form = "in float32, as a CPU computes float16" if artifact.manifest.dtype == "float16" else "packed"
        raise BackendError(
            f"{artifact.path}: ONNX Runtime would hold {needed / 2**30:.1f} GiB of weights {form}, "
            f"{available / 2**30:.1f} GiB are available: load it with mapped_weights=True "
            "(`generate --mapped-weights`), which is slower, or export the model with int4 weights"
        )


def open_session(
    artifact: Artifact,
    threads: int | None,
    providers: Sequence[Any],
    config: Mapping[str, str] | None = None,
    mapped: bool = False,
) -> Any:
    """The artifact's model with the op library in an InferenceSession.

    threads: intra-op threads, None for ONNX Runtime's own choice. config: session configuration entries.
    mapped: hold no copy of the weights, see `keep_mapped`.
    Raises: BackendError if ONNX Runtime refuses the library or the model.
    """
    if threads is not None and threads < 1:
        raise BackendError(f"threads is {threads}, at least 1 is needed")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads or 0
    options.log_severity_level = 3
    for key, value in (config or {}).items():
        options.add_session_config_entry(key, value)
    disabled = keep_mapped(options) if mapped else []
    library, model = library_path(), artifact.file(MODEL_NAME)
    try:
        options.register_custom_ops_library(str(library))
    except Exception as error:
        raise BackendError(f"{library}: ONNX Runtime cannot load the op library: {error}") from error
    try:
        # without its fallback, which would print what is wrong and go on with the CPU
        return onnxruntime.InferenceSession(
            str(model), options, list(providers), enable_fallback=0, disabled_optimizers=disabled
        )
    except Exception as error:
        raise BackendError(f"{model}: ONNX Runtime {onnxruntime.__version__} refuses it: {error}") from error


def keep_mapped(options: Any) -> list[str]:
    """Sets session options so that weights on the CPU stay mapped from their file, none of them copied.

    ONNX Runtime would pack them for its matrix products, and compute float16 in float32 with weights that are
    converted once and kept; so each is converted when it is used.
    Returns: the optimizers that the session must do without.
    """
    options.enable_cpu_mem_arena = False
    options.add_session_config_entry("session.disable_prepacking", "1")
    # the default order runs every Cast of a weight before the first product, and holds them all
    options.execution_order = onnxruntime.ExecutionOrder.PRIORITY_BASED
    return ["ConstantFolding", "FuseFp16InitializerToFp32NodeTransformer"]


def described(memory: Memory, array: Any) -> tuple[str, int, type | int, tuple[int, ...], int]:
    """An array as IOBinding's bind_input and bind_output take it, after the name."""
    kind = bfloat16.element_type(array.dtype)
    return memory.device, memory.index, kind, array.shape, memory.address(array)
