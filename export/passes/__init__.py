"""From a source graph to the decoding graph: passes, each in a file of its own, run in order by `rewrite`.

Every pass is an onnx-ir pass: `requires` checks what it builds on, `call` edits the model in place and says
whether it changed anything, `ensures` checks what later passes and the runtime rely on.
"""

from __future__ import annotations

import onnx_ir as ir
import onnx_ir.passes.common as common

from relay_attention.errors import ExportError, RelayError
from relay_attention.export.passes.divide_by_root import DivideByRoot
from relay_attention.export.passes.fold_weight_transposes import FoldWeightTransposes
from relay_attention.export.passes.fuse_rotary import FuseRotary
from relay_attention.export.passes.gather_last_token import GatherLastToken
from relay_attention.export.passes.refuse_leftovers import RefuseLeftovers
from relay_attention.export.passes.remove_unused import RemoveUnused
from relay_attention.export.passes.replace_attention import ReplaceAttention
from relay_attention.export.passes.settle_interface import SettleInterface
from relay_attention.export.passes.shift_positions import ShiftPositions
from relay_attention.export.passes.simplify_reshapes import SimplifyReshapes
from relay_attention.export.passes.unfuse_qk_norm import UnfuseQKNorm
from relay_attention.export.passes.unpack_qkv import UnpackQKV

__all__ = [
    "DivideByRoot",
    "FoldWeightTransposes",
    "FuseRotary",
    "GatherLastToken",
    "RefuseLeftovers",
    "RemoveUnused",
    "ReplaceAttention",
    "SettleInterface",
    "ShiftPositions",
    "SimplifyReshapes",
    "UnfuseQKNorm",
    "UnpackQKV",
    "pipeline",
    "rewrite",
    "run",
]


def pipeline(
    *, prefix_mode: str = "static", all_logits: bool = False, max_positions: int | None = None
) -> list[ir.passes.PassBase]:
    """The passes that make a decoding graph, in order.

    prefix_mode: "static" for prefix keys and values that are initializers, "input" for graph inputs.
    all_logits: keep the logits of every token instead of the last valid one of each row.
    max_positions: rows of the rotary tables; None leaves written-out rotary embedding in the graph.
    """
    rotary = [FuseRotary(max_positions)] if max_positions else []
    last_token = [] if all_logits else [GatherLastToken()]
    return [
        FoldWeightTransposes(),
        UnpackQKV(),
        UnfuseQKNorm(),
        ReplaceAttention(prefix_mode),
        *rotary,
        SimplifyReshapes(),
        DivideByRoot(),
        ShiftPositions(),
        *last_token,
        SettleInterface(),
        common.TopologicalSortPass(),
        RemoveUnused(),
        RefuseLeftovers(),
        # what the exporter noted of its own stack and folders
        common.ClearMetadataAndDocStringPass(),
    ]


def run(model: ir.Model, passes: list[ir.passes.PassBase]) -> bool:
    """Runs passes over a model in place; returns whether any of them changed it.

    Raises: ExportError as the passes raise it; onnx-ir wraps what its `requires` and `ensures` raise.
    """
    modified = False
    for each in passes:
        try:
            modified |= each(model).modified
        except ir.passes.InvariantError as error:
            if isinstance(error.__cause__, RelayError):
                raise error.__cause__ from None
            raise ExportError(f"{type(each).__name__}: {error}") from error
    return modified


def rewrite(
    model: ir.Model,
    *,
    prefix_mode: str = "static",
    all_logits: bool = False,
    max_positions: int | None = None,
) -> None:
    """Turns a source graph into the decoding graph, in place.

    The source graph computes logits from input_ids (and position_ids, attention_mask, caches of its own);
    the decoding graph has the inputs and outputs of `IoNames`, with an empty prefix.
    Raises: ExportError naming the node that cannot be rewritten, and the reason.
    """
    run(model, pipeline(prefix_mode=prefix_mode, all_logits=all_logits, max_positions=max_positions))
