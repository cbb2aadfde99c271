"""The few calls of the CUDA runtime that a backend needs, by cuda-python; every failure is a BackendError."""

from __future__ import annotations

from types import TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt

from relay_attention.errors import BackendError

try:
    from cuda.bindings import runtime as cudart
except ImportError:
    try:
        from cuda import cudart  # cuda-python before 12.6
    except ImportError as error:
        raise BackendError(
            "the backends on GPUs need cuda-python (pip install cuda-bindings, of your driver's CUDA major): "
            f"{error}"
        ) from error

Array = npt.NDArray[Any]


def call(name: str, *arguments: Any) -> Any:
    """Calls a function of the CUDA runtime; returns what it returns beside the status.

    Raises: BackendError with the function's and the error's name.
    """
    status, *results = getattr(cudart, name)(*arguments)
    if status != cudart.cudaError_t.cudaSuccess:
        named = getattr(status, "name", str(status))
        raise BackendError(f"CUDA: {name} failed: {named}")
    return results[0] if len(results) == 1 else tuple(results) or None


def use_device(index: int) -> tuple[str, str]:
    """Makes a GPU current; returns its name and compute capability ("9.0").

    To be called before anything of TensorRT is made: without a GPU, TensorRT 8.6's Runtime ends the process.
    Raises: BackendError if there is no such GPU, or no driver.
    """
    try:
        count = call("cudaGetDeviceCount")
    except BackendError as error:
        raise BackendError(f"no NVIDIA GPU can be used here: {error}") from error
    if not 0 <= index < count:
        raise BackendError(f"there is no GPU {index}; there are {count}")
    call("cudaSetDevice", index)
    properties = call("cudaGetDeviceProperties", index)
    name = properties.name.decode() if isinstance(properties.name, bytes) else str(properties.name)
    return name.strip("\0 "), f"{properties.major}.{properties.minor}"


def free_memory() -> int:
    """Bytes of device memory that can still be allocated."""
    return int(call("cudaMemGetInfo")[0])


class DeviceBuffer:
    """Device memory; freed with the object or by `free`."""

    def __init__(self, nbytes: int, zero: bool = False):
        self.nbytes = nbytes
        self.address = int(call("cudaMalloc", max(nbytes, 1)))
        if zero:
            call("cudaMemset", self.address, 0, nbytes)
            call("cudaDeviceSynchronize")  # other streams would not wait for it

    def free(self) -> None:
        if self.address:
            address, self.address = self.address, 0
            call("cudaFree", address)

    def __del__(self) -> None:
        try:
            self.free()
        except Exception:  # while the interpreter ends, the driver may be gone already
            self.address = 0


class PinnedArray:
    """A NumPy array in page-locked host memory, which copies need to run beside the GPU's work."""

    def __init__(self, count: int, dtype: npt.DTypeLike):
        import ctypes

        self.nbytes = max(count, 1) * np.dtype(dtype).itemsize
        self.address = int(call("cudaHostAlloc", self.nbytes, cudart.cudaHostAllocDefault))
        memory = (ctypes.c_char * self.nbytes).from_address(self.address)
        self.array: Array = np.frombuffer(memoryview(memory), dtype)[:count]

    def free(self) -> None:
        if self.address:
            address, self.address = self.address, 0
            self.array = np.zeros(0, self.array.dtype)
            call("cudaFreeHost", address)

    def __del__(self) -> None:
        try:
            self.free()
        except Exception:
            self.address = 0


class Stream:
    """A CUDA stream, and the graphs captured on it."""

    def __init__(self) -> None:
        self._stream = call("cudaStreamCreateWithFlags", cudart.cudaStreamNonBlocking)
        self.handle = int(self._stream)

    def upload(self, address: int, array: Array) -> None:
        """Copies a host array to the device; the array must stay as it is until the stream is done."""
        kind = cudart.cudaMemcpyKind.cudaMemcpyHostToDevice
        call("cudaMemcpyAsync", address, array.ctypes.data, array.nbytes, kind, self._stream)

    def download(self, array: Array, address: int) -> None:
        """Copies device memory into a host array, which is valid once the stream is done."""
        kind = cudart.cudaMemcpyKind.cudaMemcpyDeviceToHost
        call("cudaMemcpyAsync", array.ctypes.data, address, array.nbytes, kind, self._stream)

    def copy_rows(self, target: int, source: int, pitch: int, width: int, height: int) -> None:
        """Copies `height` pieces of `width` bytes that lie `pitch` bytes apart, device to device."""
        kind = cudart.cudaMemcpyKind.cudaMemcpyDeviceToDevice
        call("cudaMemcpy2DAsync", target, pitch, source, pitch, width, height, kind, self._stream)

    def synchronize(self) -> None:
        """Waits; errors of the work before it are raised here."""
        call("cudaStreamSynchronize", self._stream)

    def capture(self) -> Capture:
        """`with stream.capture() as capture:` records what is enqueued; `capture.graph` replays it."""
        return Capture(self)

    def close(self) -> None:
        call("cudaStreamDestroy", self._stream)


class Graph:
    """A captured sequence of GPU work, launched as one."""

    def __init__(self, executable: Any, stream: Stream):
        self._executable, self._stream = executable, stream

    def launch(self) -> None:
        call("cudaGraphLaunch", self._executable, self._stream._stream)

    def close(self) -> None:
        call("cudaGraphExecDestroy", self._executable)


class Capture:
    """See `Stream.capture`."""

    def __init__(self, stream: Stream):
        self._stream = stream
        self.graph: Graph | None = None

    def __enter__(self) -> Capture:
        mode = cudart.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal
        call("cudaStreamBeginCapture", self._stream._stream, mode)
        return self

    def __exit__(
        self, kind: type | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        try:
            graph = call("cudaStreamEndCapture", self._stream._stream)
        except BackendError:
            if error is None:
                raise
            return  # what broke the capture says more
        try:
            if error is None:
                self.graph = Graph(call("cudaGraphInstantiate", graph, 0), self._stream)
        finally:
            call("cudaGraphDestroy", graph)
