"""The op relay::RelayAttention: schema, NumPy reference, and the library with its native kernels."""

from __future__ import annotations

import os
from pathlib import Path

from relay_attention.errors import BackendError

LIBRARY_NAME = "librelay_attention_ort.so"
LIBRARY_VARIABLE = "RELAY_ATTENTION_LIBRARY"

__all__ = ["library_path"]


def library_path(name: str = LIBRARY_NAME) -> Path:
    """The ONNX Runtime custom-op library, for `SessionOptions.register_custom_ops_library`.

    The environment variable RELAY_ATTENTION_LIBRARY names another file. In an editable install the built
    library and this package lie in different folders; where both hold one (after scripts/build_native.sh),
    the newer is taken.

    Raises: BackendError where there is no such file.
    """
    override = os.environ.get(LIBRARY_VARIABLE)
    if override and name == LIBRARY_NAME:
        path = Path(override)
        if path.is_file():
            return path
        raise BackendError(f"{LIBRARY_VARIABLE} is {override!r}, but there is no such file")
    candidates = [Path(folder) / "lib" / name for folder in __path__]
    found = [path for path in candidates if path.is_file()]
    if found:
        return max(found, key=lambda path: path.stat().st_mtime)
    looked = ", ".join(str(path) for path in candidates)
    raise BackendError(
        f"the native library is missing (looked for {looked}): install the package with pip, run"
        f" scripts/build_native.sh in a checkout, or set {LIBRARY_VARIABLE} to the file"
    )
