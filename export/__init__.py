"""Export: load or make ONNX, rewrite its attention, compute the prefix, write the artifact; check it
afterwards.

Nothing heavy is imported before a function is called.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from relay_attention.export.exporter import export_model
    from relay_attention.export.prefix import make_prefix
    from relay_attention.export.verification import VerifyReport, verify

__all__ = ["VerifyReport", "export_model", "make_prefix", "verify"]

_HOMES = {
    "VerifyReport": "verification",
    "export_model": "exporter",
    "make_prefix": "prefix",
    "verify": "verification",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
