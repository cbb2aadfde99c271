"""TensorRT on an NVIDIA GPU. The only file of the runtime that knows tensorrt; no torch.

The caches are device buffers made once and bound as past and present at the same address, so that the plugin
appends in place; a step on rows i..j binds the addresses of those rows. Calls of one token of rows 0..n-1 are
padded with idle rows to a bucket size and replayed as one CUDA graph; everything else is enqueued as it is.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from relay_attention.errors import BackendError
from relay_attention.plugins import library_path
from relay_attention.plugins.schema import DOMAIN, OP_TYPE, PLUGIN_VERSION
from relay_attention.runtime import cuda
from relay_attention.runtime.artifact import Artifact, Manifest, PrefixFile
from relay_attention.runtime.backend import Int32, batch_bucket
from relay_attention.runtime.engine import ADDRESS_ALIGNMENT, Box, cache_capacity, find_engine

try:
    import tensorrt
except ImportError as error:
    raise BackendError(
        "the backend 'tensorrt' needs tensorrt of the version that built the plan (pip install tensorrt): "
        f"{error}"
    ) from error

Array = npt.NDArray[Any]
LIBRARY_VARIABLE = "RELAY_ATTENTION_TENSORRT_LIBRARY"
DECODE, PREFILL = 0, -1  # indices of the engine's profiles, which may be one
_RESERVE = 256 << 20  # bytes of device memory left to TensorRT's and CUDA's own needs


class Logger(tensorrt.ILogger):
    """Collects TensorRT's errors, so that an exception can say what a None result does not; verbose: prints
    everything, with the seconds since it was made, which show what a build spends its time on."""

    def __init__(self, verbose: bool = False):
        tensorrt.ILogger.__init__(self)
        self.verbose, self.start = verbose, time.monotonic()
        self.errors: list[str] = []

    def log(self, severity: Any, message: str) -> None:
        if severity in (tensorrt.ILogger.Severity.INTERNAL_ERROR, tensorrt.ILogger.Severity.ERROR):
            self.errors.append(message)
        if self.verbose:
            print(f"TensorRT {time.monotonic() - self.start:8.3f} s: {message}", flush=True)

    def take(self) -> str:
        """The errors since the last call, in one line."""
        taken, self.errors = "; ".join(self.errors[-5:]), []
        return taken or "TensorRT gave no reason"


def plugin_library() -> Path:
    """The plugin's library for the TensorRT that is installed.

    The environment variable RELAY_ATTENTION_TENSORRT_LIBRARY names another file. Raises: BackendError.
    """
    if override := os.environ.get(LIBRARY_VARIABLE):
        if Path(override).is_file():
            return Path(override)
        raise BackendError(f"{LIBRARY_VARIABLE} is {override!r}, but there is no such file")
    major = tensorrt.__version__.split(".")[0]
    try:
        return library_path(f"librelay_attention_tensorrt{major}.so")
    except BackendError as error:
        raise BackendError(
            f"the plugin's library for TensorRT {major} is missing: build it with TENSORRT_ROOT set to "
            f"TensorRT {major}'s headers (docs/tensorrt.md), or set {LIBRARY_VARIABLE} to the file: {error}"
        ) from error


def load_plugin() -> Path:
    """Loads the plugin into TensorRT's registry, once a process; returns its file. Raises: BackendError."""
    registry, library = tensorrt.get_plugin_registry(), plugin_library()
    find = registry.get_creator if hasattr(registry, "get_creator") else registry.get_plugin_creator
    if find(OP_TYPE, PLUGIN_VERSION, DOMAIN) is None:
        registry.load_library(str(library))
        if find(OP_TYPE, PLUGIN_VERSION, DOMAIN) is None:
            raise BackendError(
                f"{library}: TensorRT {tensorrt.__version__} could not load {OP_TYPE} from it: is it "
                "built for "
                "this TensorRT, and can its CUDA libraries be found (ldd)?"
            )
    return library


def this_box(device: int) -> Box:
    """TensorRT's version and the GPU, made current. Raises: BackendError if there is none."""
    return Box(tensorrt.__version__, *cuda.use_device(device))


def refit_prefix(engine: Any, logger: Logger, manifest: Manifest, prefix: PrefixFile) -> None:
    """Replaces the prefix's keys and values inside a plan that was built with --refit.

    Raises: BackendError if the engine knows no such weights, or refuses them.
    """
    refitter = tensorrt.Refitter(engine, logger)
    names = (manifest.io.prefix_key, manifest.io.prefix_value)
    kept = []  # the arrays have to live until the refit is done
    for layer, pair in enumerate(prefix.read()):
        for name, tensor in zip(names, pair, strict=True):
            weights = np.ascontiguousarray(tensor)
            kept.append(weights)
            if not refitter.set_named_weights(name.format(layer=layer), tensorrt.Weights(weights)):
                raise BackendError(
                    f"the engine cannot take another prefix: {name.format(layer=layer)}: {logger.take()}"
                )
    missing = list(refitter.get_missing_weights())
    if missing or not refitter.refit_cuda_engine():
        reason = f"it asks for {missing[:3]} as well" if missing else logger.take()
        raise BackendError(f"the engine could not be refitted with another prefix: {reason}")


@dataclass
class _Context:
    """An execution context of one profile, and what is bound in it."""

    execution: Any
    shape: tuple[int, int] = (0, 0)  # rows, sequence
    first_row: int = -1
    addresses: dict[str, int] = field(default_factory=dict)

    def bind(self, name: str, address: int) -> None:
        if self.addresses.get(name) != address:
            if not self.execution.set_tensor_address(name, address):
                raise BackendError(f"TensorRT refused the address of {name!r}")
            self.addresses[name] = address


class TensorRTBackend:
    """An artifact's plan in TensorRT; see `backend.Backend`."""

    def __init__(
        self,
        artifact: Artifact,
        device: int = 0,
        cuda_graph: bool = True,
        verbose: bool = False,
        threads: int | None = None,
    ):
        """device: index of the GPU. cuda_graph: replay decode steps as CUDA graphs. verbose: TensorRT's log.

        Raises: BackendError without GPU, plugin library or fitting plan, and if `threads` is not None.
        """
        if threads is not None:
            raise BackendError(f"threads is {threads}: the backend 'tensorrt' has no threads to set")
        box = this_box(device)  # first: without a GPU, TensorRT's own objects end the process
        self._manifest = artifact.manifest
        self._logger = Logger(verbose)
        load_plugin()
        path, self._info = find_engine(artifact, box)
        self._runtime = tensorrt.Runtime(self._logger)
        self._engine = self._runtime.deserialize_cuda_engine(path.read_bytes())
        if self._engine is None:
            raise BackendError(f"{path}: TensorRT {box.tensorrt} refuses the plan: {self._logger.take()}")
        self._check_names(path)
        self._dtype = self._manifest.storage_dtype
        self._stream = cuda.Stream()
        self._prefix: list[cuda.DeviceBuffer] = []
        self._prefix_length = self._manifest.prefix.length
        self._caches: list[cuda.DeviceBuffer] = []  # key, value of layer 0, 1, ...
        self._max_batch = self._capacity = 0  # slots, and tokens that each holds
        self._graphs: dict[int, cuda.Graph] = {}
        self._use_graphs = cuda_graph
        self._last_logits: Array = np.zeros((0, self._manifest.geometry.vocab_size), np.float32)
        if (
            self._manifest.prefix.mode == "static"
            and self._info.prefix_tokens != self._manifest.prefix.token_sha256
        ):
            refit_prefix(self._engine, self._logger, self._manifest, artifact.prefix)
        self._contexts = [self._context(index) for index in range(len(self._info.profiles))]
        if self._manifest.prefix.mode == "input":
            self.set_prefix(artifact.prefix)

    def allocate(self, max_batch: int, max_context: int) -> None:
        """Makes the caches in device memory; see `backend.Backend`."""
        info, geometry = self._info, self._manifest.geometry
        for name, value, limit in (
            ("max_batch", max_batch, info.decode.batch[2]),
            ("max_context", max_context, info.max_context),
        ):
            if value > limit:
                raise BackendError(
                    f"{name} {value} is beyond the engine's {limit}: choose at most that, or run "
                    "`relay-attention "
                    f"build` with --{name.replace('_', '-')} {value}"
                )
        capacity = cache_capacity(self._manifest, max_context)
        self._check_memory(max_batch, capacity)
        sizes = [max_batch * heads * capacity * dim * self._dtype.itemsize for heads, dim in geometry.layers]
        self._caches = [cuda.DeviceBuffer(size, zero=True) for size in sizes for _ in range(2)]
        self._max_batch, self._capacity = max_batch, capacity
        tokens = max(max_batch, min(max_batch, info.prefill.batch[2]) * info.prefill.sequence[2])
        staged = (tokens + 2 * max_batch) * 4 + 3 * ADDRESS_ALIGNMENT
        self._staging = cuda.PinnedArray(staged // 4, np.int32)
        self._lengths_and_ids = cuda.DeviceBuffer(staged)
        logits_rows = max_batch if self._manifest.logits == "last" else tokens
        self._logits = cuda.DeviceBuffer(logits_rows * geometry.vocab_size * 4)
        self._host_logits = cuda.PinnedArray(max_batch * geometry.vocab_size, np.float32)
        self._host_logits.array[:] = 0.0  # idle rows are never written

    def step(self, first_row: int, input_ids: Int32, context_lens: Int32, query_lens: Int32) -> None:
        """Enqueues the engine and waits for it; see `backend.Backend`.

        More rows or tokens than the prefill profile takes run as several calls.
        """
        rows, sequence = input_ids.shape
        if first_row + rows > self._max_batch:
            raise BackendError(f"rows {first_row}..{first_row + rows - 1} of {self._max_batch} slots")
        logits = self._host_logits.array[: rows * self._manifest.geometry.vocab_size].reshape(rows, -1)
        try:
            if sequence == 1:
                self._call(first_row, input_ids, context_lens, query_lens)
                self._stream.download(logits, self._logits.address)
            else:
                self._prefill(first_row, input_ids, context_lens, query_lens, logits)
            self._stream.synchronize()
        except BackendError as error:
            with suppress(BackendError):  # a GPU that has failed fails in this too
                self._forget()
            raise BackendError(f"TensorRT failed in a step of {rows} rows x {sequence}: {error}") from error
        self._last_logits = logits

    def read_logits(self) -> npt.NDArray[np.float32]:
        """See `backend.Backend`."""
        return self._last_logits

    def move(self, source_row: int, target_row: int, length: int) -> None:
        """See `backend.Backend`."""
        for (heads, dim), buffer in self._layer_buffers():
            head = self._capacity * dim * self._dtype.itemsize
            row = heads * head
            width = length * dim * self._dtype.itemsize
            if width:
                target, source = (buffer.address + index * row for index in (target_row, source_row))
                self._stream.copy_rows(target, source, head, width, heads)

    def read_cache(self, row: int, length: int) -> list[tuple[Array, Array]]:
        """Keys and values [kv_num_heads, length, head_dim] that a slot holds, layer by layer (to compare
        engines)."""
        found: list[Array] = []
        for (heads, dim), buffer in self._layer_buffers():
            whole = np.empty((heads, self._capacity, dim), self._dtype)
            self._stream.download(whole, buffer.address + row * whole.nbytes)
            self._stream.synchronize()
            found.append(whole[:, :length].copy())
        return list(zip(found[::2], found[1::2], strict=True))

    def set_prefix(self, prefix: PrefixFile) -> None:
        """Binds another prefix, or refits it where it is part of the plan; see `backend.Backend`.

        Raises: BackendError if the engine takes no prefix of this length, or was built without --refit.
        """
        length = prefix.header.prefix_length
        if self._manifest.prefix.mode == "static":
            if not self._info.refit or length != self._prefix_length:
                raise BackendError(
                    f"the prefix of this engine is part of its plan, {self._prefix_length} tokens"
                    f"{', built without --refit' if not self._info.refit else ''}: export with `--prefix "
                    "input`, or "
                    "build again"
                )
            refit_prefix(self._engine, self._logger, self._manifest, prefix)
            self._forget()
            return
        if not 1 <= length <= self._info.prefix_length:
            raise BackendError(
                f"a prefix of {length} tokens; the engine takes 1 to {self._info.prefix_length}: run "
                f"`relay-attention build` with --max-prefix {length}"
            )
        self._stream.synchronize()
        self._prefix = []  # freed before the next one is made
        for pair in prefix.read():
            for tensor in pair:
                buffer = cuda.DeviceBuffer(tensor.nbytes)
                self._stream.upload(buffer.address, np.ascontiguousarray(tensor))
                self._stream.synchronize()
                self._prefix.append(buffer)
        self._prefix_length = length
        self._forget()

    @property
    def cache_bytes(self) -> int:
        """See `backend.Backend`."""
        return sum(buffer.nbytes for buffer in self._caches)

    @property
    def prefix_bytes(self) -> int:
        """See `backend.Backend`."""
        return self._prefix_length * self._manifest.kv_bytes_per_token

    def close(self) -> None:
        """See `backend.Backend`."""
        self._stream.synchronize()
        self._forget()
        self._contexts = []
        for buffer in (*self._caches, *self._prefix):
            buffer.free()
        if self._max_batch:
            for buffer in (self._lengths_and_ids, self._logits):
                buffer.free()
            for pinned in (self._staging, self._host_logits):
                pinned.free()
        self._caches, self._prefix = [], []
        del self._engine, self._runtime
        self._stream.close()

    def _call(self, first_row: int, input_ids: Int32, context_lens: Int32, query_lens: Int32) -> None:
        """Enqueues the engine once, for no more rows and tokens than a profile takes."""
        rows, sequence = input_ids.shape
        context = self._contexts[DECODE if sequence == 1 else PREFILL]
        use_graph = self._use_graphs and first_row == 0 and sequence == 1
        bucket = batch_bucket(rows, self._max_batch) if use_graph else rows
        if bucket > rows:  # idle rows: no query, nothing written
            idle = ((0, bucket - rows), (0, 0))
            input_ids = np.pad(input_ids, idle)
            context_lens, query_lens = (np.pad(lens, idle[0]) for lens in (context_lens, query_lens))
        self._stage(input_ids, context_lens, query_lens)
        if use_graph and bucket in self._graphs:
            self._graphs[bucket].launch()
        else:
            self._bind(context, first_row, bucket, sequence)
            self._enqueue(context)
            if use_graph:  # once without capture, as TensorRT asks after a new shape
                self._stream.synchronize()
                with self._stream.capture() as capture:
                    self._enqueue(context)
                assert capture.graph is not None
                self._graphs[bucket] = capture.graph

    def _prefill(
        self, first_row: int, input_ids: Int32, context_lens: Int32, query_lens: Int32, logits: Array
    ) -> None:
        most_rows, most_tokens = self._info.prefill.batch[2], self._info.prefill.sequence[2]
        rows, sequence = input_ids.shape
        for row in range(0, rows, most_rows):
            part = slice(row, min(row + most_rows, rows))
            for start in range(0, sequence, most_tokens):
                lens = np.clip(query_lens[part] - start, 0, most_tokens).astype(np.int32)
                if start and not lens.any():
                    break
                # a row that has ended is idle: its cache is full to its end, its logits were read
                ids = input_ids[part, start : start + most_tokens]
                cached = context_lens[part] + np.minimum(query_lens[part], start).astype(np.int32)
                self._call(first_row + row, ids, cached, lens)
                ended = np.flatnonzero((lens > 0) & (query_lens[part] <= start + most_tokens))
                for index in ended:
                    self._download_row(logits[row + index], int(index), int(lens[index]), ids.shape[1])
                self._stream.synchronize()  # the staging array is written again

    def _download_row(self, target: Array, index: int, query_len: int, sequence: int) -> None:
        if self._manifest.logits == "all":
            index = index * sequence + query_len - 1
        self._stream.download(target, self._logits.address + index * target.nbytes)

    def _stage(self, input_ids: Int32, context_lens: Int32, query_lens: Int32) -> None:
        """Copies the step's integers to the device, in one copy."""
        offset = 0
        for (start, count), array in zip(
            _layout(*input_ids.shape), (input_ids, context_lens, query_lens), strict=True
        ):
            self._staging.array[start : start + count] = array.reshape(-1)
            offset = start + count
        self._stream.upload(self._lengths_and_ids.address, self._staging.array[:offset])

    def _bind(self, context: _Context, first_row: int, rows: int, sequence: int) -> None:
        """Tells the context the shapes and addresses of a step, those that changed."""
        names, geometry = self._manifest.io, self._manifest.geometry
        if context.shape != (rows, sequence):
            self._set_shape(context, names.input_ids, (rows, sequence))
            self._set_shape(context, names.context_lens, (rows,))
            self._set_shape(context, names.query_lens, (rows,))
            for layer, (heads, dim) in enumerate(geometry.layers):
                for name in (names.past_key, names.past_value):
                    shape = (rows, heads, self._capacity, dim)
                    self._set_shape(context, name.format(layer=layer), shape)
            base = self._lengths_and_ids.address
            for name, (start, _) in zip(
                (names.input_ids, names.context_lens, names.query_lens), _layout(rows, sequence), strict=True
            ):
                context.bind(name, base + 4 * start)
            context.bind(names.logits, self._logits.address)
            context.shape = (rows, sequence)
        if context.first_row != first_row:
            patterns = ((names.past_key, names.present_key), (names.past_value, names.present_value))
            for index, ((heads, dim), buffer) in enumerate(self._layer_buffers()):
                row_bytes = heads * self._capacity * dim * self._dtype.itemsize
                for pattern in patterns[index % 2]:
                    context.bind(pattern.format(layer=index // 2), buffer.address + first_row * row_bytes)
            context.first_row = first_row
        for index, buffer in enumerate(self._prefix):
            pattern = (names.prefix_key, names.prefix_value)[index % 2]
            context.bind(pattern.format(layer=index // 2), buffer.address)

    def _set_shape(self, context: _Context, name: str, shape: tuple[int, ...]) -> None:
        if not context.execution.set_input_shape(name, shape):
            raise BackendError(
                f"{name!r} of shape {shape} is outside the engine's profile: {self._logger.take()}"
            )

    def _enqueue(self, context: _Context) -> None:
        if not context.execution.execute_async_v3(self._stream.handle):
            raise BackendError(self._logger.take())

    def _forget(self) -> None:
        """Drops the graphs, and what is known of the contexts' shapes and addresses."""
        for graph in self._graphs.values():
            graph.close()
        self._graphs = {}
        for context in self._contexts:
            context.shape, context.first_row = (0, 0), -1
            context.addresses.clear()
            if self._manifest.prefix.mode == "input":
                self._set_prefix_shapes(context)

    def _set_prefix_shapes(self, context: _Context) -> None:
        names = self._manifest.io
        for layer, (heads, dim) in enumerate(self._manifest.geometry.layers):
            for name in (names.prefix_key, names.prefix_value):
                self._set_shape(context, name.format(layer=layer), (heads, self._prefix_length, dim))

    def _layer_buffers(self) -> Iterator[tuple[tuple[int, int], cuda.DeviceBuffer]]:
        """((kv_num_heads, head_dim), buffer) of the keys, then the values, of each layer."""
        layers = [layer for layer in self._manifest.geometry.layers for _ in range(2)]
        yield from zip(layers, self._caches, strict=True)

    def _context(self, index: int) -> _Context:
        execution = self._engine.create_execution_context()
        if execution is None or not execution.set_optimization_profile_async(index, self._stream.handle):
            raise BackendError(f"TensorRT could not make an execution context: {self._logger.take()}")
        self._stream.synchronize()
        return _Context(execution)

    def _check_memory(self, max_batch: int, max_context: int) -> None:
        needed = max_batch * max_context * self._manifest.kv_bytes_per_token
        available = max(cuda.free_memory() - _RESERVE, 0)
        if needed > available:
            fitting = int(max_batch * available / needed)
            raise BackendError(
                f"caches for max_batch {max_batch} of max_context {max_context} tokens need "
                f"{needed / 2**30:.2f} GiB, "
                f"{available / 2**30:.2f} GiB of device memory are free: "
                + (f"at most max_batch {fitting} fits, or " if fitting else "")
                + "set a smaller max_context"
            )

    def _check_names(self, path: Path) -> None:
        found = {self._engine.get_tensor_name(index) for index in range(self._engine.num_io_tensors)}
        expected = set(io_names(self._manifest))
        profiles, described = self._engine.num_optimization_profiles, len(self._info.profiles)
        if found != expected or profiles < described:
            raise BackendError(
                f"{path}: its tensors do not fit relay.json: missing {sorted(expected - found)}, unknown "
                f"{sorted(found - expected)}, {profiles} of {described} profiles: build it again"
            )


def _layout(rows: int, sequence: int) -> tuple[tuple[int, int], ...]:
    """(first, count) in int32s of input_ids, context_lens and query_lens in the staging buffer."""
    aligned = ADDRESS_ALIGNMENT // 4
    lens = -(-rows * sequence // aligned) * aligned
    return (0, rows * sequence), (lens, rows), (lens + -(-rows // aligned) * aligned, rows)


def io_names(manifest: Manifest) -> list[str]:
    """Every input and output that the graph of this artifact has."""
    names = manifest.io
    patterns = [names.past_key, names.past_value, names.present_key, names.present_value]
    patterns += [names.prefix_key, names.prefix_value] if manifest.prefix.mode == "input" else []
    layers = range(manifest.geometry.num_layers)
    fixed = [names.input_ids, names.context_lens, names.query_lens, names.logits]
    return fixed + [pattern.format(layer=layer) for pattern in patterns for layer in layers]
