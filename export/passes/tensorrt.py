"""The passes behind `--target tensorrt`: the decoding graph in the forms that TensorRT 8.6's ONNX parser
takes.

The graph stays one that ONNX Runtime runs, with the same results.
"""

from __future__ import annotations

import onnx_ir as ir
import onnx_ir.passes.common as common

from relay_attention.export.passes.remove_unused import RemoveUnused
from relay_attention.export.passes.tensorrt_check import RefuseForTensorRT
from relay_attention.export.passes.tensorrt_lower import LowerFusedOps
from relay_attention.export.passes.tensorrt_opset import LowerOpset


def tensorrt_passes() -> list[ir.passes.PassBase]:
    """The passes, in order; they follow those of `pipeline`."""
    return [
        LowerFusedOps(),
        common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0),
        LowerOpset(),
        RemoveUnused(),
        RefuseForTensorRT(),
    ]
