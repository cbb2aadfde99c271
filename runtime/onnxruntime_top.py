"""The likeliest tokens of logits that lie on a device, by a small ONNX Runtime session there."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt

from relay_attention.errors import BackendError
from relay_attention.runtime import top_tokens
from relay_attention.runtime.onnxruntime_backend import Binding, Memory, onnxruntime

_ALIGNMENT = 256  # bytes, as device memory is allocated


class TopTokens:
    """Finds the largest logits of each row. Its session is made when it is first needed."""

    def __init__(self, provider: Any, memory: Memory, options: Any = None):
        """provider: as InferenceSession takes it, on the stream of `memory`. options: RunOptions."""
        self._provider, self._memory, self._options = provider, memory, options
        self._opened: tuple[Any, Binding] | None = None
        self._output: Any = memory.zeros((0,), np.dtype(np.uint8))

    def find(self, logits: Any, count: int) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.int64]]:
        """logits [n, vocab] float32 in `memory`; see `backend.ReadsTop`. Raises: BackendError."""
        rows, vocab_size = logits.shape
        count = min(count, vocab_size)
        session, binding = self._session()
        shapes: dict[str, tuple[tuple[int, ...], np.dtype[Any]]] = {
            top_tokens.VALUES: ((rows, count), np.dtype(np.float32)),
            top_tokens.IDS: ((rows, count), np.dtype(np.int64)),
            top_tokens.SUMS: ((rows,), np.dtype(np.float32)),
        }
        places, size = {}, 0
        for name, (shape, dtype) in shapes.items():
            places[name] = size
            size += -(-math.prod(shape) * dtype.itemsize // _ALIGNMENT) * _ALIGNMENT
        if size > self._output.nbytes:
            self._output = self._memory.zeros((1 << (size - 1).bit_length(),), np.dtype(np.uint8))
        binding.input(top_tokens.LOGITS, logits)
        counts = np.array([count])
        binding.host_input(top_tokens.COUNT, counts)
        for name, (shape, dtype) in shapes.items():
            binding.output(name, self._memory.view(self._output, shape, dtype, places[name]))
        try:
            self._memory.run(session, binding.io, self._options)
            found = self._memory.get(self._memory.view(self._output, (size,)))  # all in one copy
        except Exception as error:
            raise BackendError(
                f"ONNX Runtime failed to find the {count} likeliest of {rows} rows: {error}"
            ) from error
        values, ids, sums = (
            found[places[name] :][: math.prod(shape) * dtype.itemsize].view(dtype).reshape(shape).copy()
            for name, (shape, dtype) in shapes.items()
        )
        values[~np.isfinite(sums)] = np.nan
        return values, ids

    def close(self) -> None:
        self._opened = None
        self._output = None

    def _session(self) -> tuple[Any, Binding]:
        if self._opened is None:
            options = onnxruntime.SessionOptions()
            options.log_severity_level = 3
            model = top_tokens.top_tokens_model()
            try:
                session = onnxruntime.InferenceSession(model, options, [self._provider], enable_fallback=0)
            except Exception as error:
                raise BackendError(
                    f"ONNX Runtime refuses the graph of the likeliest tokens: {error}"
                ) from error
            self._opened = session, Binding(session, self._memory)
        return self._opened
