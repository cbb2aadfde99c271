"""ONNX Runtime on an NVIDIA GPU.

The session is `onnxruntime_backend`'s with another memory: caches, prefix and logits are device buffers made
once. Everything is enqueued on one stream, ONNX Runtime's work too, and waited for when results are read. Of
a step's logits only the likeliest few are fetched, found by a small graph on the device, unless a request
needs all. Decode steps of rows 0..n-1 are padded with idle rows to a bucket size and replayed as one CUDA
graph, where ONNX Runtime can capture the model. Nothing runs on the CPU silently: the session's providers and
the provider of every RelayAttention node are checked when it is loaded.
"""

from __future__ import annotations

import itertools
import logging
import math
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from relay_attention.errors import BackendError
from relay_attention.plugins import library_path
from relay_attention.plugins.schema import DOMAIN, OP_TYPE
from relay_attention.runtime.artifact import Artifact, PrefixFile
from relay_attention.runtime.backend import Int32, batch_bucket
from relay_attention.runtime.onnxruntime_backend import (
    Array,
    Binding,
    HostMemory,
    Memory,
    OnnxRuntimeBase,
    onnxruntime,
    open_session,
)
from relay_attention.runtime.onnxruntime_top import TopTokens

CUDA = "CUDAExecutionProvider"
ALIGNMENT = 256  # bytes, as device memory is allocated
_RESERVE = 256 << 20  # bytes of device memory left to ONNX Runtime's and CUDA's own needs
_RECORD = "session.record_ep_graph_assignment_info"  # since ONNX Runtime 1.24
_GRAPH_ID, _NO_GRAPH = "gpu_graph_id", -1  # run option, and its value for a run that captures nothing
_NO_WAIT = "disable_synchronize_execution_providers"  # run option: the caller waits for the stream
# What ONNX Runtime says where it cannot capture a model at all: control flow, or copies between CPU and GPU.
_CANNOT_CAPTURE = "cannot use the graph capture feature"
# Kernels that copy a few numbers of their own from main memory in every run. A graph would replay that copy
# from memory that has long been given to something else. (Concat and Split: not for every shape.)
_COPY_FROM_HOST = {"Concat", "GatherND", "ScatterND", "Split"}
_UNPACKED_QKV = "/split"  # the exporter's Split into three along the last axis, which copies nothing

logger = logging.getLogger(__name__)


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
    """Memory of one GPU and a stream, by cuda-python; see `onnxruntime_backend.Memory`.

    Sessions of the execution provider are to be given the same stream (`provider_options`): then order is
    kept without waiting. `put`, `get` and `stage` wait, the others only enqueue.
    """

    device = "cuda"
    _SMALL = 1 << 20  # bytes that are fetched through page-locked memory

    def __init__(self, index: int):
        """index: of the GPU, made current. Raises: BackendError without GPU, driver or cuda-python."""
        from relay_attention.runtime import cuda

        cuda.use_device(index)
        self.index = index
        self._cuda, self._stream = cuda, cuda.Stream()
        self._pinned = cuda.PinnedArray(self._SMALL, np.uint8)
        self._staging: dict[int, tuple[Any, Any]] = {}  # bytes: page-locked and device memory of that size

    @property
    def provider_options(self) -> dict[str, str]:
        """Of CUDAExecutionProvider: this GPU and this stream.

        Memory is taken as asked for, not doubled each time: the caches need the rest. GPU 0, the default, is
        left out: where it is named, ONNX Runtime from 1.26 on warns for every session that no plugin has it,
        by its process-wide logger, whatever the session's severity is.
        """
        return ({"device_id": str(self.index)} if self.index else {}) | {
            "user_compute_stream": str(self._stream.handle),
            "arena_extend_strategy": "kSameAsRequested",
        }

    def free(self) -> int | None:
        return max(self._cuda.free_memory() - _RESERVE, 0)

    def zeros(self, shape: tuple[int, ...], dtype: np.dtype[Any]) -> DeviceArray:
        buffer = self._cuda.DeviceBuffer(math.prod(shape) * dtype.itemsize, zero=True)
        return DeviceArray(buffer.address, shape, dtype, buffer)

    def view(
        self, array: DeviceArray, shape: tuple[int, ...], dtype: npt.DTypeLike | None = None, offset: int = 0
    ) -> DeviceArray:
        dtype = array.dtype if dtype is None else np.dtype(dtype)
        return DeviceArray(array.address + offset, shape, dtype, array.owner)

    def address(self, array: DeviceArray) -> int:
        return array.address

    def put(self, array: Array) -> DeviceArray:
        array = np.ascontiguousarray(array)
        buffer = self._cuda.DeviceBuffer(array.nbytes)
        self._stream.upload(buffer.address, array)
        self._stream.synchronize()
        return DeviceArray(buffer.address, array.shape, array.dtype, buffer)

    def stage(self, arrays: Sequence[Array]) -> list[DeviceArray]:
        places, size = [], 0
        for array in arrays:
            places.append(size)
            size += -(-array.nbytes // ALIGNMENT) * ALIGNMENT
        # a power of two, kept for good: the same sizes find the same buffer again
        capacity = max(1 << (size - 1).bit_length(), 4096)
        if capacity not in self._staging:
            pinned = self._cuda.PinnedArray(capacity, np.uint8)
            self._staging[capacity] = pinned, self._cuda.DeviceBuffer(capacity)
        pinned, buffer = self._staging[capacity]
        self._stream.synchronize()  # an earlier copy may still read the page-locked memory
        for place, array in zip(places, arrays, strict=True):
            pinned.array[place : place + array.nbytes] = array.reshape(-1).view(np.uint8)
        self._stream.upload(buffer.address, pinned.array[:size])
        return [
            DeviceArray(buffer.address + place, array.shape, array.dtype, buffer)
            for place, array in zip(places, arrays, strict=True)
        ]

    def get(self, array: DeviceArray) -> Array:
        if array.nbytes > self._SMALL:
            found = np.empty(array.shape, array.dtype)
            self._stream.download(found, array.address)
            self._stream.synchronize()
            return found
        part = self._pinned.array[: array.nbytes]
        if array.nbytes:
            self._stream.download(part, array.address)
        self._stream.synchronize()
        copied: Array = part.copy().view(array.dtype).reshape(array.shape)
        return copied

    def pick(self, array: DeviceArray, index: npt.NDArray[np.int64]) -> DeviceArray:
        rows, length = array.shape[:2]
        item = math.prod(array.shape[2:]) * array.dtype.itemsize
        for row, place in enumerate(index.tolist()):  # in place: no target lies beyond a source still to read
            source = array.address + (row * length + place) * item
            if source != array.address + row * item:
                self._stream.copy_rows(array.address + row * item, source, item, item, 1)
        return DeviceArray(array.address, (rows, *array.shape[2:]), array.dtype, array.owner)

    def move(self, caches: Sequence[DeviceArray], source: int, target: int, length: int) -> None:
        for cache in caches if length else ():
            _, heads, capacity, dim = cache.shape
            head = capacity * dim * cache.dtype.itemsize
            to, start = (cache.address + row * heads * head for row in (target, source))
            self._stream.copy_rows(to, start, head, length * dim * cache.dtype.itemsize, heads)

    def run(self, session: Any, binding: Any, options: Any) -> None:
        session.run_with_iobinding(binding, options)

    def wait(self) -> None:
        self._stream.synchronize()

    def close(self) -> None:
        self._staging.clear()
        self._pinned.free()
        self._stream.close()


@dataclass
class _DecodeGraph:
    """What a bucket's decode steps are captured and replayed with."""

    binding: Binding
    options: Any  # RunOptions
    captured: bool = False


class OnnxRuntimeCudaBackend(OnnxRuntimeBase):
    """An artifact in an ONNX Runtime session on an NVIDIA GPU; see `backend.Backend`, `backend.ReadsTop`.

    cuda_graph: whether decode steps are replayed as CUDA graphs. cuda_graph_reason: why they are not, or "".
    """

    def __init__(
        self,
        artifact: Artifact,
        threads: int | None = None,
        device_id: int = 0,
        cuda_graph: bool | None = None,
        device: str = "cuda",
    ):
        """threads: of what little runs on the CPU (shapes). device_id: index of the GPU.

        cuda_graph: True to replay decode steps as CUDA graphs, False not to, None where that is possible.
        device: FOR TESTS: "cpu" runs the same class in main memory with ONNX Runtime's CPU provider, on
            machines without a GPU. That is no GPU run, and nothing chooses it by itself.
        Raises: BackendError if onnxruntime has no CUDA, there is no GPU, the op library has no CUDA kernels,
            they do not take the model (float32, for one), or cuda_graph is True and the model cannot be
            captured, with the reason.
        """
        if device not in ("cuda", "cpu"):
            raise BackendError(f"device is {device!r}: it is 'cuda'; which GPU, says device_id")
        self._graph_wanted = cuda_graph
        self.cuda_graph, self.cuda_graph_reason = False, "cuda_graph is False"
        self._graphs: dict[int, _DecodeGraph] = {}  # by bucket
        self._graph_ids = itertools.count(1)  # 0 is ONNX Runtime's own
        self._max_batch = 0
        self._no_graph = run_options({_GRAPH_ID: _NO_GRAPH})  # else ONNX Runtime captures what it can
        self._on_host: set[str] = set()  # small inputs that the model wants in main memory
        self._kept: Sequence[Array] = ()  # alive as long as they are bound
        provider: Any = "CPUExecutionProvider"
        memory: Memory = HostMemory()
        if device == "cuda":
            _require_cuda()
            memory = on_device = DeviceMemory(device_id)
            provider = (CUDA, on_device.provider_options)
        try:
            session = self._open(artifact, threads, provider, device)
        except BaseException:
            memory.close()
            raise
        self._top = TopTokens(provider, memory, run_options({_NO_WAIT: 1}))
        super().__init__(artifact, session, memory)

    def _open(self, artifact: Artifact, threads: int | None, provider: Any, device: str) -> Any:
        """The session; settles whether decode steps may be captured."""
        if device == "cpu":
            self._give_up_graphs("device is 'cpu'")
            session = _open_recording(artifact, threads, provider)
            check_placement(session, provider)
            return session
        session = None
        if self._graph_wanted is not False:
            with_graph = (provider[0], provider[1] | {"enable_cuda_graph": "1"})
            try:
                session = _open_recording(artifact, threads, with_graph)
                self.cuda_graph, self.cuda_graph_reason = True, ""
            except BackendError as error:
                if _CANNOT_CAPTURE not in str(error):
                    raise
                self._give_up_graphs(str(error))
        session = session or _open_recording(artifact, threads, provider)
        check_placement(session, CUDA)
        self._on_host = _inputs_on_host(session)
        if self.cuda_graph:
            if reason := why_not_captured(session, CUDA):
                self._give_up_graphs(reason)
            elif self._on_host:
                self._give_up_graphs(f"nodes on the CPU read the inputs {', '.join(sorted(self._on_host))}")
        return session

    def allocate(self, max_batch: int, max_context: int) -> None:
        """See `backend.Backend`. Captures the smallest decode step: what cannot be captured shows now.

        Raises: BackendError also if cuda_graph is True and that fails.
        """
        super().allocate(max_batch, max_context)
        self._max_batch = max_batch
        self._graphs.clear()
        if self.cuda_graph:
            idle = np.zeros(1, np.int32)
            self.step(0, idle[:, None], idle, idle)

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
        replayed = self.cuda_graph and sequence == 1 and first_row == 0
        if not (replayed and self._replay(input_ids, context_lens, query_lens)):
            super().step(first_row, input_ids, context_lens, query_lens)

    def read_top(self, count: int) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.int64]]:
        """See `backend.ReadsTop`."""
        return self._top.find(self._last_logits, count)

    def set_prefix(self, prefix: PrefixFile) -> None:
        """See `backend.Backend`. Graphs that read the old prefix are not replayed again."""
        super().set_prefix(prefix)
        self._graphs.clear()

    def close(self) -> None:
        """See `backend.Backend`."""
        with suppress(BackendError):  # a GPU that has failed fails in this too
            self._memory.wait()  # a step whose logits nobody read still writes to what is freed now
        self._top.close()
        self._graphs.clear()
        super().close()

    def _replay(self, input_ids: Int32, context_lens: Int32, query_lens: Int32) -> bool:
        """A decode step of rows 0..n-1 by its bucket's graph; False if it could not be captured."""
        rows = len(input_ids)
        bucket = batch_bucket(rows, self._max_batch)
        if bucket > rows:  # idle rows: no query, nothing written
            idle = (0, bucket - rows)
            input_ids = np.pad(input_ids, (idle, (0, 0)))
            context_lens, query_lens = np.pad(context_lens, idle), np.pad(query_lens, idle)
        if bucket not in self._graphs:
            options = run_options({_GRAPH_ID: next(self._graph_ids), _NO_WAIT: 1})
            self._graphs[bucket] = _DecodeGraph(Binding(self._session, self._memory), options)
        graph = self._graphs[bucket]
        try:
            # the first time ONNX Runtime runs it twice before it captures: the same tokens to the same places
            logits = self._run(graph.binding, 0, input_ids, context_lens, query_lens, graph.options)
        except BackendError as error:
            if graph.captured:
                raise
            self._graphs.clear()
            self._give_up_graphs(f"a decode step of {bucket} rows could not be captured: {error}")
            return False
        graph.captured = True
        self._last_logits = self._memory.view(logits, (rows, self._manifest.geometry.vocab_size))
        return True

    def _give_up_graphs(self, reason: str) -> None:
        """Raises: BackendError if graphs were asked for."""
        if self._graph_wanted:
            raise BackendError(f"cuda_graph is True, but decode steps cannot be CUDA graphs: {reason}")
        self.cuda_graph, self.cuda_graph_reason = False, reason
        if self._graph_wanted is None:
            logger.info("decode steps are not replayed as CUDA graphs: %s", reason)

    def _run(
        self,
        binding: Binding,
        first_row: int,
        input_ids: Int32,
        context_lens: Int32,
        query_lens: Int32,
        options: Any = None,
    ) -> Any:
        options = options or self._no_graph
        return super()._run(binding, first_row, input_ids, context_lens, query_lens, options)

    def _bind_small(self, binding: Binding, arrays: Sequence[Array]) -> None:
        names = self._manifest.io
        self._kept = [np.ascontiguousarray(array) for array in arrays]
        placed = self._memory.stage(self._kept)
        small = (names.input_ids, names.context_lens, names.query_lens)
        for name, array, there in zip(small, self._kept, placed, strict=True):
            if name in self._on_host:
                binding.host_input(name, array)
            else:
                binding.input(name, there)


def _open_recording(artifact: Artifact, threads: int | None, provider: Any) -> Any:
    """`open_session` on one provider, which can say afterwards where its nodes run."""
    try:
        return open_session(artifact, threads, [provider], {_RECORD: "1"})
    except BackendError as error:
        # of types that no kernel of an op has, it says that the graph is invalid
        if not all(part in str(error) for part in ("tensor(bfloat16)", f"operator ({OP_TYPE})")):
            raise
        raise BackendError(
            f"{artifact.path}: is bfloat16, which only CUDA kernels take, and {library_path()} has none: "
            "build it with RELAY_CUDA=ON"
        ) from error


def run_options(entries: dict[str, int]) -> Any:
    """RunOptions with configuration entries."""
    options = onnxruntime.RunOptions()
    for name, value in entries.items():
        options.add_run_config_entry(name, str(value))
    return options


def why_not_captured(session: Any, provider: str) -> str:
    """Why replaying a session's graph would be wrong although ONNX Runtime captures it; "" if it is right."""
    found = [
        f"{node.name!r} ({node.op_type})"
        for part in session.get_provider_graph_assignment_info()
        for node in part.get_nodes()
        if part.ep_name == provider
        and not node.domain
        and node.op_type in _COPY_FROM_HOST
        and not (node.op_type == "Split" and node.name.endswith(_UNPACKED_QKV))
    ]
    if not found:
        return ""
    older = any("GatherND" in node for node in found)
    return (
        f"{len(found)} nodes whose CUDA kernels may read main memory in every run: {', '.join(found[:3])}"
        + ("; GatherND is of an older export or of --target tensorrt: export the model again" * older)
    )


def _inputs_on_host(session: Any) -> set[str]:
    """Inputs that only nodes on the CPU read. A device's array would be copied when it is bound, not run."""
    if not hasattr(session, "get_input_memory_infos"):
        return set()
    infos = zip(session.get_inputs(), session.get_input_memory_infos(), strict=False)
    return {node.name for node, info in infos if info.name.lower() == "cpu" and "int32" in node.type}


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
