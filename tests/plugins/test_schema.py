"""The one definition of the op: its documentation is current and its C++ side says the same."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from relay_attention.plugins import schema

ROOT = Path(__file__).parents[2]
HEADER = ROOT / "plugins" / "common" / "op.h"
ADAPTER = ROOT / "plugins" / "onnxruntime" / "relay_op.cc"


def test_documentation_is_current() -> None:
    assert (ROOT / "docs" / "op.md").read_text() == schema.make_markdown(), (
        "run: python -m relay_attention.plugins.schema > docs/op.md"
    )


def quoted(text: str, array: str) -> list[str]:
    body = re.search(rf"{array}\[[^=]*=\s*\{{(.*?)\}};", text, re.DOTALL)
    assert body is not None
    return re.findall(r'"([^"]*)"', body[1])


def test_header_has_the_same_names() -> None:
    header = HEADER.read_text()
    assert tuple(quoted(header, "kInputNames")) == schema.INPUT_NAMES
    assert tuple(quoted(header, "kOutputNames")) == schema.OUTPUT_NAMES
    assert f'kOpDomain[] = "{schema.DOMAIN}"' in header
    assert f'kOpName[] = "{schema.OP_TYPE}"' in header
    assert f"kOpSinceVersion = {schema.SINCE_VERSION};" in header
    assert f"kMaxHeadDim = {schema.MAX_HEAD_DIM};" in header


def test_header_has_the_same_attributes_and_defaults() -> None:
    struct = re.search(r"struct Attributes \{(.*?)\};", HEADER.read_text(), re.DOTALL)
    assert struct is not None
    fields = dict(re.findall(r"(\w+) = (-?[\d.]+)f?;", struct[1]))
    expected = {a.name: a for a in schema.ATTRIBUTES if not a.name.startswith("plugin_")}
    assert list(fields) == list(expected)
    for name, text in fields.items():
        default = expected[name].default
        assert float(text) == (0 if default is None else default), name
    assert re.findall(r'ReadAttribute\(info, "(\w+)"', ADAPTER.read_text()) == list(expected)


def test_make_attributes() -> None:
    made = schema.make_attributes(num_heads=8, kv_num_heads=2, softcap=30)
    assert made["softcap"] == 30.0
    assert isinstance(made["softcap"], float)
    assert made["local_window_size"] == -1
    assert made["plugin_version"] == "1"
    with pytest.raises(TypeError, match="kv_num_heads"):
        schema.make_attributes(num_heads=8)
    with pytest.raises(TypeError, match="soft_cap"):
        schema.make_attributes(num_heads=8, kv_num_heads=8, soft_cap=1.0)
    with pytest.raises(TypeError, match=r"num_heads = 1\.5"):
        schema.make_attributes(num_heads=1.5, kv_num_heads=1)


def test_runtime_installs_need_no_onnx() -> None:
    code = (
        "import sys; sys.modules['onnx'] = sys.modules['torch'] = None\n"
        "from relay_attention.plugins import library_path, reference, schema"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
