"""The TensorRT adapters on a GPU, with the real kernels, through TensorRT's own interfaces: see
adapter_host.py.

Not TensorRT: no engine is built. RELAY_TENSORRT_ADAPTERS names a folder with librelay_attention_tensorrtN.so
and hostN.so of each major (made by `scripts/test_tensorrt.sh prepare`).
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from adapter_host import BF16, HALF, INT32, Host, Plugin

from relay_attention.plugins.reference import relay_attention

FOLDER = Path(os.environ.get("RELAY_TENSORRT_ADAPTERS", ""))
MAJORS = [major for major in (8, 10, 11) if (FOLDER / f"host{major}.so").is_file()]
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not MAJORS or "RELAY_TENSORRT_ADAPTERS" not in os.environ,
        reason="RELAY_TENSORRT_ADAPTERS names no folder with plugins and hosts",
    ),
]
HEADS, KV_HEADS, DIM, CONTEXT, PREFIX, ROTARY = 8, 2, 128, 96, 200, 128


@pytest.fixture(scope="module")
def torch() -> Any:
    module = pytest.importorskip("torch")
    if not module.cuda.is_available():
        pytest.skip("needs an NVIDIA GPU: torch sees none")
    return module


@pytest.fixture(scope="module", params=MAJORS or [0], ids=lambda major: f"tensorrt{major}")
def host(request: pytest.FixtureRequest, torch: Any) -> Host:
    torch.zeros(1, device="cuda")  # a context, before the plugin asks for the device
    return Host(FOLDER / f"librelay_attention_tensorrt{request.param}.so", FOLDER / f"host{request.param}.so")


@pytest.fixture
def plugin(host: Host) -> Iterator[Plugin]:
    made = host.create(num_heads=HEADS, kv_num_heads=KV_HEADS, do_rotary=1)
    assert made, host.log()
    again = host.deserialize(made.serialize())
    made.destroy()
    assert again
    assert again.call("attach") == 0
    yield again
    again.call("detach")
    again.destroy()


def tensors(torch: Any, batch: int, sequence: int, dtype: Any) -> dict[str, Any]:
    """Random inputs on the GPU, ragged, one row idle."""
    generator = torch.Generator("cuda").manual_seed(batch * 100 + sequence)
    cache = (batch, KV_HEADS, CONTEXT, DIM)
    shapes = {
        "query": (batch, sequence, HEADS * DIM), "key": (batch, sequence, KV_HEADS * DIM),
        "value": (batch, sequence, KV_HEADS * DIM), "past_key": cache, "past_value": cache,
        "context_lens": (batch,), "query_lens": (batch,), "prefix_key": (KV_HEADS, PREFIX, DIM),
        "prefix_value": (KV_HEADS, PREFIX, DIM), "cos_cache": (PREFIX + CONTEXT, ROTARY // 2),
        "sin_cache": (PREFIX + CONTEXT, ROTARY // 2),
    }  # fmt: skip
    made = {
        name: torch.randn(shape, device="cuda", generator=generator).to(dtype)
        for name, shape in shapes.items()
    }
    random = np.random.default_rng(batch)
    query_lens = random.integers(1, sequence + 1, batch)
    query_lens[batch // 2] = 0
    lengths = {"context_lens": random.integers(0, CONTEXT - sequence + 1, batch), "query_lens": query_lens}
    return made | {
        name: torch.tensor(values, dtype=torch.int32, device="cuda") for name, values in lengths.items()
    }


def check(torch: Any, given: dict[str, Any], found: list[Any], tolerance: float) -> None:
    arrays = {name: value.float().cpu().numpy() for name, value in given.items()}
    lengths = {name: given[name].cpu().numpy() for name in ("context_lens", "query_lens")}
    expected = relay_attention(**(arrays | lengths), num_heads=HEADS, kv_num_heads=KV_HEADS, do_rotary=1)
    for name, tensor, wanted in zip(("output", "present_key", "present_value"), found, expected, strict=True):
        np.testing.assert_allclose(
            tensor.float().cpu().numpy(), wanted, rtol=tolerance, atol=tolerance, err_msg=name
        )


@pytest.mark.parametrize("in_place", [True, False], ids=["in place", "copied"])
@pytest.mark.parametrize(("batch", "sequence"), [(1, 1), (8, 1), (3, 17), (33, 1)])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_enqueue(
    torch: Any, host: Host, plugin: Plugin, dtype: str, batch: int, sequence: int, in_place: bool
) -> None:
    if dtype == "bfloat16" and host.major < 10:
        pytest.skip("TensorRT 8.6 has no bfloat16")
    given = tensors(torch, batch, sequence, getattr(torch, dtype))
    kind = HALF if dtype == "float16" else BF16
    types = [kind] * 5 + [INT32] * 2 + [kind] * 4 + [kind] * 3
    inputs = [value.clone() for value in given.values()]
    present = inputs[3:5] if in_place else [torch.full_like(cache, 7) for cache in inputs[3:5]]
    everything = [*inputs, torch.full_like(inputs[0], 7), *present]
    workspace = torch.empty(
        plugin.workspace([t.shape for t in everything], types), dtype=torch.uint8, device="cuda"
    )
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    before = torch.cuda.memory_allocated()
    assert plugin.enqueue(everything, types, workspace, stream.cuda_stream) == 0, host.log()
    assert torch.cuda.memory_allocated() == before
    stream.synchronize()
    check(torch, given, everything[11:], 1e-2 if dtype == "float16" else 6e-2)


def test_enqueue_in_a_cuda_graph(torch: Any, host: Host, plugin: Plugin) -> None:
    """A captured step gives the same again and again, with lengths that change between launches."""
    given = tensors(torch, 8, 1, torch.float16)
    types = [HALF] * 5 + [INT32] * 2 + [HALF] * 7
    inputs = [value.clone() for value in given.values()]
    everything = [*inputs, torch.zeros_like(inputs[0]), *inputs[3:5]]
    workspace = torch.empty(
        plugin.workspace([t.shape for t in everything], types), dtype=torch.uint8, device="cuda"
    )
    stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph, stream=stream):
        assert plugin.enqueue(everything, types, workspace, stream.cuda_stream) == 0, host.log()
    for seed in range(3):
        lengths = np.random.default_rng(seed).integers(0, CONTEXT, 8)
        given["context_lens"].copy_(torch.tensor(lengths, dtype=torch.int32))
        for target, source in zip(inputs, given.values(), strict=True):
            target.copy_(source)
        torch.cuda.synchronize()
        graph.replay()
        torch.cuda.synchronize()
        check(torch, given, everything[11:], 1e-2)
