"""Attention as the exporters write it: one matcher per form, each describing a node as an `AttentionSite`.

A new form is a new file here and an entry in `MATCHERS`; the rewriter and all else stay as they are.

Forms that keep their caches, masks and layouts in the graph around them (`decomposed`, `onnx_attention`,
`multi_head_attention`) describe a `Core` instead, which `passes/fold_attention.py` proves by running it and
turns into the first of the matchers' forms; a new one is a new file here and an entry in its `FORMS`.
"""

from __future__ import annotations

from collections.abc import Callable

import onnx_ir as ir

from relay_attention.export.forms import attention_form, group_query_attention
from relay_attention.export.site import AttentionSite

Matcher = Callable[[ir.Node], AttentionSite]

# (domain, operator) -> matcher; a matcher raises ExportError for a node of its form that it cannot describe
MATCHERS: dict[tuple[str, str], Matcher] = {
    ("relay", "AttentionForm"): attention_form.match,
    ("com.microsoft", "GroupQueryAttention"): group_query_attention.match,
}


def match(node: ir.Node) -> AttentionSite | None:
    """The site that a node is, or None for a node of no known form.

    Raises: ExportError naming the node and the reason if it is of a known form, but cannot be rewritten.
    """
    matcher = MATCHERS.get((node.domain, node.op_type))
    return matcher(node) if matcher else None
