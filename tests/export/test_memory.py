from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

LAYERS, WIDTH = 40, 1024
MEGABYTE = 1 << 20
WEIGHTS = LAYERS * WIDTH * WIDTH * 2 // MEGABYTE  # in float16
_RUN = """
import re, sys
from pathlib import Path
import numpy as np
from relay_attention.export.prefix import open_session
def peak():  # not ru_maxrss, which starts from the parent's
    return int(re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text()).group(1))
before = peak()
session = open_session(Path(sys.argv[1]), threads=1)
session.run(None, {"x": np.ones((4, int(sys.argv[2])), np.float16)})
print((peak() - before) // 1024)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/self/status")
def test_float16_weights_are_not_all_held_in_float32(tmp_path: Path) -> None:
    """ONNX Runtime computes float16 in float32 on a CPU; converted weights must not pile up."""
    weights = np.zeros((WIDTH, WIDTH), np.float16)
    with (tmp_path / "weights.bin").open("wb") as stream:
        initializers = []
        for layer in range(LAYERS):
            tensor = TensorProto(name=f"w{layer}", data_type=TensorProto.FLOAT16, dims=weights.shape)
            tensor.data_location = TensorProto.EXTERNAL
            for key, value in (
                ("location", "weights.bin"),
                ("offset", stream.tell()),
                ("length", weights.nbytes),
            ):
                tensor.external_data.add(key=key, value=str(value))
            stream.write(weights.tobytes())
            initializers.append(tensor)
    nodes = [
        helper.make_node("MatMul", [f"x{i}" if i else "x", f"w{i}"], [f"x{i + 1}"]) for i in range(LAYERS)
    ]
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT16, ["n", WIDTH])
    y = helper.make_tensor_value_info(f"x{LAYERS}", TensorProto.FLOAT16, ["n", WIDTH])
    graph = helper.make_graph(nodes, "graph", [x], [y], initializers)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    onnx.save(model, tmp_path / "model.onnx")
    result = subprocess.run(
        [sys.executable, "-c", _RUN, str(tmp_path / "model.onnx"), str(WIDTH)],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    # the mapped weights, and less than as much again; all of them in float32 would be twice as much again
    assert int(result.stdout) < 2 * WEIGHTS
