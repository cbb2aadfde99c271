"""bfloat16 in NumPy, which has no such type: arrays of its 16 bits, as uint16.

Nothing else in the runtime is uint16, so a dtype says by itself what an array holds.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

NAME = "bfloat16"
BITS = np.dtype(np.uint16)
ONNX_TYPE = 16  # TensorProto.BFLOAT16


def storage(dtype: str) -> np.dtype[Any]:
    """NumPy's type that holds an element type of a manifest: its own, or uint16 for bfloat16."""
    return BITS if dtype == NAME else np.dtype(dtype)


def element_type(dtype: np.dtype[Any]) -> type | int:
    """The element type as ONNX Runtime's bindings take it, of arrays of a dtype."""
    return ONNX_TYPE if dtype == BITS else dtype.type


def widen(bits: npt.NDArray[Any]) -> npt.NDArray[np.float32]:
    """The numbers whose bits are given, exactly."""
    values: npt.NDArray[np.float32] = (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)
    return values


def narrow(values: npt.NDArray[Any]) -> npt.NDArray[np.uint16]:
    """Bits of float32 numbers rounded to nearest, ties to even; beyond the largest is infinity, NaN stays."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    rounded = (bits + (np.uint32(0x7FFF) + (bits >> np.uint32(16) & np.uint32(1)))) >> np.uint32(16)
    quiet = (bits >> np.uint32(16)) | np.uint32(0x40)
    is_nan = (bits & np.uint32(0x7FFFFFFF)) > np.uint32(0x7F800000)
    found: npt.NDArray[np.uint16] = np.where(is_nan, quiet, rounded).astype(np.uint16)
    return found
