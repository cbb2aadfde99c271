"""docs/models.md holds what the tests before this one have found; it is last in this folder."""

from __future__ import annotations

import subprocess
from importlib import metadata
from types import ModuleType
from typing import Any

import pytest
from families import FAMILIES, REFUSALS, SOURCES  # conftest.py has loaded it

_OPTIMUM = (
    "from importlib.metadata import version as v; print(v('optimum'), 'with transformers', v('transformers'))"
)


def _versions() -> dict[str, str]:
    packages = ("transformers", "torch", "onnxruntime", "onnxruntime-genai")
    return {name: metadata.version(name).partition("+")[0] for name in packages}


def test_docs_are_what_was_found(
    models_table: Any, table_module: ModuleType, pytestconfig: pytest.Config, request: pytest.FixtureRequest
) -> None:
    if not models_table.rows and not models_table.forms:
        pytest.skip("no family was tested")
    sources, path = list(SOURCES), table_module.PATH
    if pytestconfig.getoption("models_table", False):
        assert not request.session.testsfailed, "a case failed; docs/models.md is left as it is"
        assert set(models_table.rows) == {*FAMILIES, *REFUSALS}
        assert all(list(models_table.rows[family].files) == sources for family in FAMILIES)
        assert models_table.forms
        python = pytestconfig.getoption("optimum_python").split()
        optimum = subprocess.run([*python, "-c", _OPTIMUM], capture_output=True, text=True, check=True)
        path.write_text(models_table.markdown(_versions(), optimum.stdout.strip(), sources))
    written = path.read_text()
    if not written.endswith(table_module.made_with(_versions())):
        pytest.skip("docs/models.md was made with other versions of the libraries")
    missing = models_table.missing(written, sources)
    assert not missing, f"docs/models.md is out of date, make it anew ({table_module.COMMAND}): {missing}"
