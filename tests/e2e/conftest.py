from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

EXPORT = Path(__file__).parents[1] / "export"


def _load(path: Path) -> ModuleType:
    """A helper module: with --import-mode=importlib they cannot be imported by name."""
    name = path.stem
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, path)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module
        spec.loader.exec_module(module)
    return sys.modules[name]


tiny_models = _load(EXPORT / "tiny_models.py")
for _path in (
    EXPORT / "onnx_decoders.py",
    EXPORT / "torch_exports.py",
    Path(__file__).with_name("families.py"),
):
    _load(_path)  # tests import them by name


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--models-table",
        action="store_true",
        help="run every case of docs/models.md and write it; with `pytest tests/e2e`",
    )
    parser.addoption(
        "--optimum-python",
        metavar="COMMAND",
        help="a Python with optimum-onnx, for docs/models.md (`env PYTHONPATH=... python` will do)",
    )


@pytest.fixture(scope="session")
def tiny() -> ModuleType:
    """The module tests/export/tiny_models.py."""
    return tiny_models


@pytest.fixture(scope="session")
def table_module() -> ModuleType:
    """The module models_table.py."""
    return _load(Path(__file__).with_name("models_table.py"))


@pytest.fixture(scope="session")
def models_table(table_module: ModuleType) -> Any:
    """What the tests of families find, for docs/models.md."""
    return table_module.ModelsTable()
