from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

TINY_MODELS = Path(__file__).parents[1] / "export" / "tiny_models.py"


@pytest.fixture(scope="session")
def tiny() -> ModuleType:
    """The module tests/export/tiny_models.py: with --import-mode=importlib it cannot be imported by name."""
    if "tiny_models" not in sys.modules:
        spec = importlib.util.spec_from_file_location("tiny_models", TINY_MODELS)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules["tiny_models"] = module
        spec.loader.exec_module(module)
    return sys.modules["tiny_models"]


class ModelsTable:
    """What the tests of families found, in order: (title, architecture, reason of a refusal or None)."""

    def __init__(self) -> None:
        self.rows: list[tuple[str, str, str | None]] = []

    def __call__(self, title: str, architecture: str, refusal: str | None) -> None:
        self.rows.append((title, architecture, refusal))


@pytest.fixture(scope="session")
def models_table() -> ModelsTable:
    return ModelsTable()
