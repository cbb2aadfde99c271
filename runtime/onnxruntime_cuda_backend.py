"""ONNX Runtime on an NVIDIA GPU.

The session is `onnxruntime_backend`'s with another memory: caches, prefix and logits are device buffers made
once. A step takes token ids and lengths from main memory; of its logits only the likeliest few are fetched,
found by a small graph on the device, unless a request needs all. Nothing runs on the CPU silently: the
session's providers and the provider of every RelayAttention node are checked when it is loaded.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from relay_attention.errors import BackendError
from relay_attention.plugins import library_path
from relay_attention.plugins.schema import DOMAIN, OP_TYPE
from relay_attention.runtime import top_tokens
from relay_attention.runtime.artifact import Artifact
from relay_attention.runtime.backend import Int32
from relay_attention.runtime.onnxruntime_backend import (
    Array,
    HostMemory,
    Memory,
    OnnxRuntimeBase,
    described,
    onnxruntime,
    open_session,
)

CUDA = "CUDAExecutionProvider"
_RESERVE = 256 << 20  # bytes of device memory left to ONNX Runtime's and CUDA's own needs
_RECORD = "session.record_ep_graph_assignment_info"  # since ONNX Runtime 1.24


@dataclass(frozen=True)
class DeviceArray:
    """A dense array in device memory; `owner` keeps the allocation alive."""

    address: int
    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    owner: Any

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    def __getitem__(self, rows: slice) -> DeviceArray:
        """Consecutive rows of the first axis."""
        start, stop, _ = rows.indices(self.shape[0])
        row = math.prod(self.shape[1:]) * self.dtype.itemsize
        shape = (stop - start, *self.shape[1:])
        return DeviceArray(self.address + start * row, shape, self.dtype, self.owner)


class DeviceMemory:
    """Memory of one GPU, by cuda-python; see `onnxruntime_backend.Memory`.

    Every method waits for its copies: ONNX Runtime's stream does not know of this one.
    """

    device = "cuda"

    def __init__(self, index: int):
        """index: of the GPU, made current. Raises: BackendError without GPU, driver or cuda-python."""
        from relay_attention.runtime import cuda

        cuda.use_device(index)
        self.index = index
        self._cuda, self._stream = cuda, cuda.Stream()

    def free(self) -> int | None:
        return max(self._cuda.free_memory() - _RESERVE, 0)

    def zeros(self, shape: tuple[int, ...], dtype: np.dtype[Any]) -> DeviceArray:
        buffer = self._cuda.DeviceBuffer(math.prod(shape) * dtype.itemsize, zero=True)
        return DeviceArray(buffer.address, shape, dtype, buffer)

    def view(self, array: DeviceArray, shape: tuple[int, ...]) -> DeviceArray:
        return DeviceArray(array.address, shape, array.dtype, array.owner)

    def address(self, array: DeviceArray) -> int:
        return array.address

    def put(self, array: Array) -> DeviceArray:
        array = np.ascontiguousarray(array)
        buffer = self._cuda.DeviceBuffer(array.nbytes)
        self._stream.upload(buffer.address, array)
        self._stream.synchronize()
        return DeviceArray(buffer.address, array.shape, array.dtype, buffer)

    def get(self, array: DeviceArray) -> Array:
        found = np.empty(array.shape, array.dtype)
        if found.nbytes:
            self._stream.download(found, array.address)
            self._stream.synchronize()
        return found

    def pick(self, array: DeviceArray, index: npt.NDArray[np.int64]) -> DeviceArray:
        rows, length = array.shape[:2]
        item = math.prod(array.shape[2:]) * array.dtype.itemsize
        for row, place in enumerate(index.tolist()):  # in place: no target lies beyond a source still to read
            source = array.address + (row * length + place) * item
            if source != array.address + row * item:
                self._stream.copy_rows(array.address + row * item, source, item, item, 1)
        self._stream.synchronize()
        return DeviceArray(array.address, (rows, *array.shape[2:]), array.dtype, array.owner)

    def move(self, caches: Sequence[DeviceArray], source: int, target: int, length: int) -> None:
        for cache in caches if length else ():
            _, heads, capacity, dim = cache.shape
            head = capacity * dim * cache.dtype.itemsize
            to, start = (cache.address + row * heads * head for row in (target, source))
            self._stream.copy_rows(to, start, head, length * dim * cache.dtype.itemsize, heads)
        self._stream.synchronize()

    def close(self) -> None:
        self._stream.close()


class OnnxRuntimeCudaBackend(OnnxRuntimeBase):
    """An artifact in an ONNX Runtime session on an NVIDIA GPU; see `backend.Backend`, `backend.ReadsTop`."""

    def __init__(
        self, artifact: Artifact, threads: int | None = None, device_id: int = 0, device: str = "cuda"
    ):
        """threads: of what little runs on the CPU (shapes). device_id: index of the GPU.

        device: FOR TESTS: "cpu" runs the same class in main memory with ONNX Runtime's CPU provider, on
            machines without a GPU. That is no GPU run, and nothing chooses it by itself.
        Raises: BackendError if onnxruntime has no CUDA, there is no GPU, the op library has no CUDA kernels,
            or they do not take the model (float32, for one).
        """
        if device not in ("cuda", "cpu"):
            raise BackendError(f"device is {device!r}: it is 'cuda'; which GPU, says device_id")
        self._provider: Any = "CPUExecutionProvider"
        memory: Memory = HostMemory()
        if device == "cuda":
            _require_cuda()
            memory = DeviceMemory(device_id)
            # memory is taken as asked for, not doubled each time: the caches need the rest
            options = {"device_id": str(device_id), "arena_extend_strategy": "kSameAsRequested"}
            self._provider = (CUDA, options)
        session = open_session(artifact, threads, [self._provider], {_RECORD: "1"})
        check_placement(session, CUDA if device == "cuda" else "CPUExecutionProvider")
        self._top: tuple[Any, Any] | None = None  # session and binding of top_tokens, made when first needed
        super().__init__(artifact, session, memory)

    def step(self, first_row: int, input_ids: Int32, context_lens: Int32, query_lens: Int32) -> None:
        """See `backend.Backend`. Lengths are checked here: the kernels see them on the device only."""
        capacity, sequence = self._keys[0].shape[2], input_ids.shape[1]
        ends = context_lens.astype(np.int64) + query_lens
        wrong = (context_lens < 0) | (query_lens < 0) | (query_lens > sequence) | (ends > capacity)
        if wrong.any():
            row = int(wrong.argmax())
            raise BackendError(
                f"row {first_row + row}: context_lens {context_lens[row]}, query_lens {query_lens[row]} of "
                f"{sequence}, but its slot holds {capacity} tokens"
            )
        super().step(first_row, input_ids, context_lens, query_lens)

    def read_top(self, count: int) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.int64]]:
        """See `backend.ReadsTop`."""
        rows, vocab_size = self._last_logits.shape
        count = min(count, vocab_size)
        session, binding = self._top = self._top or self._open_top()
        values, sums = np.empty((rows, count), np.float32), np.empty(rows, np.float32)
        ids, counts = np.empty((rows, count), np.int64), np.array([count])
        host = HostMemory()
        binding.bind_input(top_tokens.LOGITS, *described(self._memory, self._last_logits))
        binding.bind_input(top_tokens.COUNT, *described(host, counts))
        for name, array in ((top_tokens.VALUES, values), (top_tokens.IDS, ids), (top_tokens.SUMS, sums)):
            binding.bind_output(name, *described(host, array))
        try:
            session.run_with_iobinding(binding)
            binding.synchronize_outputs()
        except Exception as error:
            raise BackendError(
                f"ONNX Runtime failed to find the {count} likeliest of {rows} rows: {error}"
            ) from error
        values[~np.isfinite(sums)] = np.nan
        return values, ids

    def close(self) -> None:
        """See `backend.Backend`."""
        self._top = None
        super().close()

    def _open_top(self) -> tuple[Any, Any]:
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        model = top_tokens.top_tokens_model()
        try:
            session = onnxruntime.InferenceSession(model, options, [self._provider], enable_fallback=0)
        except Exception as error:
            raise BackendError(f"ONNX Runtime refuses the graph of the likeliest tokens: {error}") from error
        return session, session.io_binding()


def check_placement(session: Any, provider: str) -> None:
    """Raises BackendError unless the session runs on a provider, and every RelayAttention node with it.

    ONNX Runtime itself goes on with the CPU where a provider cannot be made or has no kernel for a node. Its
    option session.disable_cpu_ep_fallback would refuse every model, whose few nodes on shapes belong there.
    """
    providers = session.get_providers()
    if provider not in providers:
        raise BackendError(
            f"ONNX Runtime {onnxruntime.__version__} could not start {provider} and took {providers} "
            "instead: its CUDA and cuDNN libraries are missing or do not fit its version or the driver "
            "(onnxruntime.print_debug_info() says which it was built for)"
        )
    elsewhere = [
        f"{node.name!r} on {part.ep_name}"
        for part in session.get_provider_graph_assignment_info()
        for node in part.get_nodes()
        if (node.domain, node.op_type) == (DOMAIN, OP_TYPE) and part.ep_name != provider
    ]
    if elsewhere:
        raise BackendError(
            f"{len(elsewhere)} {OP_TYPE} nodes would not run on {provider}: {', '.join(elsewhere[:3])}: "
            f"{library_path()} has no CUDA kernels for them; build it with RELAY_CUDA=ON"
        )


def _require_cuda() -> None:
    """Raises BackendError unless the installed onnxruntime has CUDA and can say where nodes run."""
    available = onnxruntime.get_available_providers()
    if CUDA not in available:
        raise BackendError(
            f"the installed onnxruntime {onnxruntime.__version__} has no CUDA, only {', '.join(available)}: "
            "pip uninstall onnxruntime, then pip install 'relay-attention[cuda]' (onnxruntime and "
            "onnxruntime-gpu exclude each other: they install over one another)"
        )
    if not hasattr(onnxruntime.InferenceSession, "get_provider_graph_assignment_info"):
        raise BackendError(
            f"onnxruntime {onnxruntime.__version__} cannot say which provider runs which node, so that a "
            "fallback to the CPU would pass unseen: pip install 'onnxruntime-gpu>=1.24'"
        )
    if hasattr(onnxruntime, "preload_dlls"):
        onnxruntime.preload_dlls()  # CUDA's and cuDNN's libraries where pip has installed them
