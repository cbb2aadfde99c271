"""What the runtime asks of an inference engine. Every engine is one file that implements `Backend`."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt

from relay_attention.errors import BackendError
from relay_attention.runtime.artifact import Artifact, PrefixFile

Int32 = npt.NDArray[np.int32]

# name: (module, class). A module is imported when its backend is asked for: it may need packages of its own.
_BACKENDS = {
    "onnxruntime": ("relay_attention.runtime.onnxruntime_backend", "OnnxRuntimeBackend"),
    "onnxruntime-cuda": ("relay_attention.runtime.onnxruntime_cuda_backend", "OnnxRuntimeCudaBackend"),
    "tensorrt": ("relay_attention.runtime.tensorrt_backend", "TensorRTBackend"),
}


class Backend(Protocol):
    """One loaded model with its caches: max_batch slots of max_context tokens each, and one prefix for all.

    Used by one thread at a time. What the engine refuses in `step` or `read_logits` is a BackendError, and
    costs no more than that call. Arrays given to a method may be changed once it has returned.
    """

    def allocate(self, max_batch: int, max_context: int) -> None:
        """Makes the caches, once. Raises BackendError, with the numbers, where memory does not suffice."""

    def step(self, first_row: int, input_ids: Int32, context_lens: Int32, query_lens: Int32) -> None:
        """Runs the model on slots first_row..first_row+n-1 and appends the new tokens to their caches.

        input_ids [n, S], right-padded; context_lens [n]: tokens in each slot before; query_lens [n]: valid
        tokens of each row, 0 for none.
        """

    def read_logits(self) -> npt.NDArray[np.float32]:
        """Logits [n, vocab] after the last valid token of each row of the last step; valid until the next."""

    def move(self, source_row: int, target_row: int, length: int) -> None:
        """Copies the first `length` cached tokens of one slot over those of another."""

    def set_prefix(self, prefix: PrefixFile) -> None:
        """Replaces the prefix between two steps; the caller has checked that the model computed it.

        Raises: BackendError if this artifact's prefix is part of the graph (mode "static").
        """

    @property
    def cache_bytes(self) -> int:
        """Bytes of the allocated caches, all slots together."""

    @property
    def prefix_bytes(self) -> int:
        """Bytes of the prefix's keys and values, held once."""

    def close(self) -> None:
        """Frees the model and the caches; nothing else may be called after it."""


@runtime_checkable
class ReadsTop(Protocol):
    """What a backend offers besides if its logits lie on a device: most steps need the likeliest few only."""

    def read_top(self, count: int) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.int64]]:
        """The `count` largest logits of each row of the last step, [n, count], descending, and their ids.

        All of them where the vocabulary has no more. Which of equal logits are among the last is not said. A
        row with logits that are not finite (NaN, an infinity) is NaN throughout.
        """


def load_backend(name: str, artifact: Artifact, **options: Any) -> Backend:
    """Loads an artifact into the engine of that name; `options` are the engine's own (threads, ...).

    Raises: BackendError if there is no such backend or option, its packages are missing, or it refuses the
        model.
    """
    if name not in _BACKENDS:
        raise BackendError(f"there is no backend {name!r}; there is {', '.join(_BACKENDS)}")
    module, class_name = _BACKENDS[name]
    backend: Callable[..., Backend] = getattr(import_module(module), class_name)
    known = list(inspect.signature(backend).parameters)[1:]
    for option in options:
        if option not in known:
            raise BackendError(f"backend {name!r} has no option {option!r}; it has {', '.join(known)}")
    return backend(artifact, **options)


def batch_bucket(rows: int, max_batch: int) -> int:
    """Rows that a decode step is padded to where each size is captured: 1, 2, 4, 8, then multiples of 8, at
    most max_batch."""
    size = 1 << (rows - 1).bit_length() if rows <= 8 else -(-rows // 8) * 8
    return min(size, max_batch)


def available_memory() -> int | None:
    """Bytes of main memory still to be had, by the machine and by the control group; None if unknown."""
    limits = []
    try:
        meminfo = _numbers(Path("/proc/meminfo"))
        limits.append(meminfo["MemAvailable:"] * 1024)
        group = Path("/sys/fs/cgroup")
        limit, used = ((group / name).read_text() for name in ("memory.max", "memory.current"))
        cached = _numbers(group / "memory.stat")["inactive_file"]  # given back when needed
        limits.append(int(limit) - int(used) + cached)
    except (OSError, KeyError, ValueError):  # no such file on this system, or "max": no limit
        pass
    return min(limits, default=None)


def _numbers(path: Path) -> dict[str, int]:
    """Lines of "name number ..." as a dict."""
    return {
        words[0]: int(words[1]) for line in path.read_text().splitlines() if len(words := line.split()) > 1
    }


def check_memory(needed: int, max_batch: int, max_context: int, available: int | None) -> None:
    """Raises BackendError if caches of `needed` bytes do not fit in those available; None: not known."""
    if available is not None and needed > available:
        fitting = int(max_batch * available / needed)
        raise BackendError(
            f"caches for max_batch {max_batch} of max_context {max_context} tokens need "
            f"{needed / 2**30:.2f} GiB, {available / 2**30:.2f} GiB are available: "
            + (f"at most max_batch {fitting} fits, or " if fitting else "")
            + "set a smaller max_context"
        )
