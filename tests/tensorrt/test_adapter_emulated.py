"""The TensorRT adapters over the CUDA kernels' own source, run thread by thread on the CPU. Not TensorRT, not
a GPU.

See adapter_host.py and tests/cuda_emulation; needs TensorRT's and CUDA's headers.
"""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path
from typing import Any

import adapter_host
import pytest
import test_adapter
from adapter_host import Host
from test_adapter import ATTRIBUTES, CUDA, HEADERS, REASON, check, run, tensors

pytestmark = pytest.mark.skipif(bool(REASON), reason=REASON)


@pytest.fixture(scope="module")
def emulation(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if given := os.environ.get("RELAY_EMULATION_LIBRARY"):
        return Path(given)
    path = Path(__file__).parents[1] / "cuda_emulation/conftest.py"
    spec = importlib.util.spec_from_file_location("emulation_conftest", path)
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return Path(module._build(tmp_path_factory.mktemp("emulation"), "g++"))


@pytest.fixture(scope="module", params=sorted(HEADERS) or [0], ids=lambda major: f"tensorrt{major}")
def host(request: pytest.FixtureRequest, emulation: Path, tmp_path_factory: pytest.TempPathFactory) -> Host:
    assert CUDA
    folder = tmp_path_factory.mktemp("adapter")
    return Host(*adapter_host.build(HEADERS[request.param], CUDA, folder, emulation))


@pytest.mark.parametrize("in_place", [True, False], ids=["in place", "copied"])
@pytest.mark.parametrize(
    ("attributes", "rotary", "sizes"),
    [
        (ATTRIBUTES, 0, {"batch": 3, "sequence": 5}),
        ({**ATTRIBUTES, "do_rotary": 1}, 64, {"batch": 5, "sequence": 1, "prefix": 70}),
        ({**ATTRIBUTES, "do_rotary": 1, "rotary_interleaved": 1}, 32, {"batch": 2, "sequence": 9}),
        (
            {**ATTRIBUTES, "scale": 0.2, "softcap": 3.0, "local_window_size": 7},
            0,
            {"batch": 3, "sequence": 4},
        ),
    ],
    ids=["plain", "rotary", "interleaved", "softcap and window"],
)
def test_enqueue(
    host: Host, attributes: dict[str, Any], rotary: int, sizes: dict[str, int], in_place: bool
) -> None:
    made = host.create(**attributes)
    assert made
    again = host.deserialize(made.serialize())
    made.destroy()
    assert again
    given = tensors(1, rotary, **sizes)
    check(given, attributes, run(again, given, rotary, in_place))
    again.destroy()


def test_kernels_refuse_while_building(host: Host) -> None:
    """head_dim 16 is one of the op's, but not one of the kernels': their own sentence reaches the log."""
    made = host.create(**ATTRIBUTES)
    assert made
    narrow = [
        tuple(size // 4 if size in (256, 128, 64) else size for size in shape)
        for shape in test_adapter.shapes()
    ]
    host.log()
    assert made.output_shapes(narrow) is None
    assert "head_dim" in host.log()
    made.destroy()
