from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import onnx
import pytest
import torch
import transformers
from onnx import TensorProto, helper
from safetensors.torch import save_file

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


_EXPORT = """
import re, sys, threading, time
from pathlib import Path
from relay_attention.export import export_model
def anonymous():  # what the system cannot take back, unlike pages mapped from files
    return int(re.search(r"RssAnon:\\s+(\\d+) kB", Path("/proc/self/status").read_text()).group(1))
small, large, out = map(Path, sys.argv[1:4])
precision = sys.argv[4]
export_model(small, "Be kind.", out, precision=precision, threads=1)  # what libraries take once
before, peak, ended = anonymous(), 0, threading.Event()
def watch():
    global peak
    while not ended.wait(0.01):
        peak = max(peak, anonymous())
watcher = threading.Thread(target=watch)
watcher.start()
export_model(large, "Be kind.", out, precision=precision, threads=1)
ended.set()
watcher.join()
print((peak - before) // 1024)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/self/status")
@pytest.mark.parametrize(("precision", "dtype"), [("fp16", torch.float16), ("bf16", torch.bfloat16)])
def test_an_export_holds_no_copy_of_the_weights(
    tiny: ModuleType, tmp_path: Path, precision: str, dtype: torch.dtype
) -> None:
    """Traced, transposed, written, hashed and run: over 200 MB of 16 bits each and one weight at a time."""
    config = {"hidden_size": WIDTH, "intermediate_size": 4096, "num_hidden_layers": 7, "head_dim": 64}
    config |= {"num_attention_heads": 16, "num_key_value_heads": 16}
    large = transformers.LlamaConfig(**{**tiny.CONFIGS["llama"]().to_dict(), **config, "dtype": dtype})
    with torch.device("meta"):
        shapes = transformers.AutoModelForCausalLM.from_config(large).state_dict()
    generator = torch.Generator().manual_seed(0)
    weights = {
        name: torch.empty(tensor.shape, dtype=dtype).uniform_(-0.05, 0.05, generator=generator)
        for name, tensor in shapes.items()
    }
    large.save_pretrained(tmp_path / "large")
    tiny.make_tokenizer(tmp_path / "large")
    save_file(weights, tmp_path / "large" / "model.safetensors", metadata={"format": "pt"})
    size = sum(tensor.nbytes for tensor in weights.values()) // MEGABYTE
    assert size > 200
    del weights
    small = tiny.make_model(tmp_path / "small", tiny.CONFIGS["llama"]())
    command = [
        sys.executable,
        "-c",
        _EXPORT,
        str(small),
        str(tmp_path / "large"),
        str(tmp_path / "out"),
        precision,
    ]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    assert (tmp_path / "out" / "weights.bin").stat().st_size > size * MEGABYTE
    assert int(result.stdout) < 0.7 * size  # one copy would be as much again, in float32 twice
