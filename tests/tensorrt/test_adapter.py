"""The TensorRT adapters through TensorRT's own interfaces, driven by a test host: see adapter_host.py.

Needs TensorRT's headers (TENSORRT_ROOT, several separated by colons) and CUDA's; nothing of TensorRT runs.
"""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator
from typing import Any

import adapter_host
import numpy as np
import pytest
from adapter_host import FIELD_FLOAT64, FIELD_INT64, FLOAT, HALF, INT32, Host, Plugin

from relay_attention.plugins.reference import relay_attention

HEADERS = {adapter_host.major_of(folder): folder for folder in adapter_host.header_folders()}
CUDA = adapter_host.cuda_include()
REASON = (
    "TensorRT's headers are not here: set TENSORRT_ROOT to the folders that hold them" if not HEADERS
    else "CUDA's headers are not here: set CUDA_HOME" if not CUDA
    else "there is no g++" if not shutil.which("g++")
    else ""
)  # fmt: skip
pytestmark = pytest.mark.skipif(bool(REASON), reason=REASON)

ATTRIBUTES: dict[str, Any] = {"num_heads": 4, "kv_num_heads": 2}
DIM = 64


@pytest.fixture(scope="session", params=sorted(HEADERS) or [0], ids=lambda major: f"tensorrt{major}")
def host(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Host]:
    assert CUDA
    folder = tmp_path_factory.mktemp("adapter")
    loaded = Host(*adapter_host.build(HEADERS[request.param], CUDA, folder))
    yield loaded
    assert loaded.live_allocations() == 0, "barrier words were not freed"


@pytest.fixture
def plugin(host: Host) -> Iterator[Plugin]:
    made = host.create(**ATTRIBUTES)
    assert made
    yield made
    made.destroy()


def shapes(
    batch: int = 3, sequence: int = 5, context: int = 16, prefix: int = 12, rotary: int = 0
) -> list[tuple[int, ...]]:
    heads, kv_heads, cache = 4, 2, (batch, 2, context, DIM)
    found: list[tuple[int, ...]] = [
        (batch, sequence, heads * DIM),
        *[(batch, sequence, kv_heads * DIM)] * 2,
        cache,
        cache,
    ]
    found += [(batch,), (batch,), (kv_heads, prefix, DIM), (kv_heads, prefix, DIM)]
    return found + ([(context + prefix, rotary // 2)] * 2 if rotary else [])


def types(rotary: int = 0, outputs: bool = True) -> list[int]:
    return [HALF] * 5 + [INT32] * 2 + [HALF] * (4 if rotary else 2) + [HALF] * (3 if outputs else 0)


def tensors(seed: int = 0, rotary: int = 0, **sizes: int) -> dict[str, np.ndarray]:
    random = np.random.default_rng(seed)
    names = [
        "query",
        "key",
        "value",
        "past_key",
        "past_value",
        "context_lens",
        "query_lens",
        "prefix_key",
        "prefix_value",
    ]
    names += ["cos_cache", "sin_cache"] if rotary else []
    made = {
        name: random.standard_normal(shape).astype(np.float16)
        for name, shape in zip(names, shapes(rotary=rotary, **sizes), strict=True)
    }
    batch, sequence = made["query"].shape[:2]
    capacity = made["past_key"].shape[2]
    made["query_lens"] = random.integers(0, sequence + 1, batch).astype(np.int32)
    made["context_lens"] = random.integers(0, capacity - sequence + 1, batch).astype(np.int32)
    return made


def run(
    plugin: Plugin, given: dict[str, np.ndarray], rotary: int = 0, in_place: bool = True
) -> list[np.ndarray]:
    """Attaches, enqueues and detaches; returns output, present_key, present_value."""
    past = [given["past_key"].copy(), given["past_value"].copy()]
    inputs = list(given.values())
    inputs[3:5] = past
    present = past if in_place else [np.full_like(cache, 7) for cache in past]
    output = np.full(given["query"].shape, 7, np.float16)
    all_tensors = [*inputs, output, *present]
    size = plugin.workspace([tensor.shape for tensor in all_tensors], types(rotary))
    assert size > 0
    workspace = np.full(size + 64, 0x5C, np.uint8)
    assert plugin.call("attach") == 0
    assert plugin.enqueue(all_tensors, types(rotary), workspace) == 0, plugin.host.log()
    plugin.call("detach")
    assert (workspace[size:] == 0x5C).all(), "wrote past the workspace"
    return [output, *present]


def check(given: dict[str, np.ndarray], attributes: dict[str, Any], found: list[np.ndarray]) -> None:
    expected = relay_attention(**given, **attributes)
    for name, tensor, wanted in zip(("output", "present_key", "present_value"), found, expected, strict=True):
        np.testing.assert_allclose(tensor.astype(np.float64), wanted, rtol=4e-3, atol=4e-3, err_msg=name)


def test_exports_only_entry_points(host: Host) -> None:
    defined = subprocess.run(
        ["nm", "-D", "--defined-only", host.plugin_path], capture_output=True, text=True, check=True
    )
    names = {line.split()[-1] for line in defined.stdout.splitlines()}
    creators = "getPluginCreators" if host.major < 10 else "getCreators"
    assert {name for name in names if not name.startswith("host_")} == {creators, "setLoggerFinder"}
    undefined = subprocess.run(
        ["nm", "-D", "--undefined-only", host.plugin_path], capture_output=True, text=True, check=True
    )
    assert not [
        line for line in undefined.stdout.splitlines() if "nvinfer" in line.lower() or "cuda" in line.lower()
    ]


def test_creator(host: Host) -> None:
    name, version, namespace, *fields = host.describe().split()
    assert (name, version, namespace) == ("RelayAttention", "1", "relay")
    assert dict(field.split(":") for field in fields) == {
        "num_heads": "5", "kv_num_heads": "5", "local_window_size": "5", "do_rotary": "5",
        "rotary_interleaved": "5",
        "alias_cache": "5", "scale": "1", "softcap": "1",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"kv_num_heads": 2}, "field num_heads is missing"),
        ({"num_heads": 4}, "field kv_num_heads is missing"),
        ({**ATTRIBUTES, "num_heads": 5}, "num_heads = 5 is not a multiple of kv_num_heads = 2"),
        ({**ATTRIBUTES, "kv_num_heads": 0}, "kv_num_heads = 0 must be at least 1"),
        ({**ATTRIBUTES, "scale": float("nan")}, "scale = "),
        ({**ATTRIBUTES, "softcap": -1.0}, "softcap = -1"),
        ({**ATTRIBUTES, "local_window_size": 0}, "local_window_size = 0 must be at least 1"),
        ({**ATTRIBUTES, "do_rotary": 2}, "do_rotary = 2 must be 0 or 1"),
        ({**ATTRIBUTES, "alias_cache": 3}, "alias_cache = 3 must be 0 or 1"),
        ({**ATTRIBUTES, "scale": 1}, "field scale must be a float32"),
        ({**ATTRIBUTES, "num_heads": 4.0}, "field num_heads must be an int32"),
        ({**ATTRIBUTES, "softcaps": 1.0}, "field softcaps is unknown"),
        ({**ATTRIBUTES, "scale": (np.zeros(2, np.float32), 1)}, "field scale must hold one number"),
    ],
)
def test_refuses_fields(host: Host, fields: dict[str, Any], reason: str) -> None:
    host.log()
    assert host.create("layer.7", **fields) is None
    assert f"RelayAttention (layer.7): {reason}" in host.log()


def test_field_types(host: Host) -> None:
    made = host.create(**ATTRIBUTES, scale=(np.array([0.25]), FIELD_FLOAT64))
    assert made
    made.destroy()
    wide = host.create(num_heads=(np.array([4], np.int64), FIELD_INT64), kv_num_heads=2)
    if host.major < 10:
        assert wide is None
        return
    assert wide
    wide.destroy()
    assert host.create(num_heads=(np.array([1 << 40], np.int64), FIELD_INT64), kv_num_heads=2) is None
    assert "does not fit an int32" in host.log()


def test_serialization_round_trip(host: Host) -> None:
    made = host.create(
        "a layer",
        **ATTRIBUTES,
        scale=0.3,
        softcap=20.0,
        local_window_size=9,
        do_rotary=1,
        rotary_interleaved=1,
    )
    assert made
    data = made.serialize()
    assert b"a layer" in data
    again, clone = host.deserialize(data), made.clone()
    assert again
    made.destroy()
    assert again.serialize() == clone.serialize() == data
    assert again.identity() == clone.identity() == "RelayAttention 1 relay"
    again.destroy()
    clone.destroy()


def test_refuses_damaged_plan(host: Host, plugin: Plugin) -> None:
    if host.major >= 10:
        pytest.skip("TensorRT itself packs V3's fields")
    data = plugin.serialize()
    for damaged in (b"", data[:7], data[:-1], data + b"x", b"x" + data[1:]):
        assert host.deserialize(damaged) is None
    assert "truncated or damaged" in host.log()
    assert host.deserialize(data[:4] + b"\x63" + data[5:]) is None
    assert "another version of this plugin (layer format 99" in host.log()


def test_output_shapes_with_dynamic_sizes(plugin: Plugin) -> None:
    dynamic = [
        [-1, -1, 256],
        [-1, -1, 128],
        [-1, -1, 128],
        [-1, 2, -1, 64],
        [-1, 2, -1, 64],
        [-1],
        [-1],
        [2, 12, 64],
        [2, 12, 64],
    ]
    assert plugin.output_shapes(dynamic) == [[-1, -1, 256], [-1, 2, -1, 64], [-1, 2, -1, 64]]
    assert plugin.output_shapes(shapes()) == [[3, 5, 256], [3, 2, 16, 64], [3, 2, 16, 64]]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({0: (3, 5, 255)}, "query has shape [3, 5, 255]"),
        ({0: (3, 5, 320), 1: (3, 5, 160), 2: (3, 5, 160), 3: (3, 2, 16, 80), 4: (3, 2, 16, 80),
          7: (2, 12, 80), 8: (2, 12, 80)},
         "head_dim"),
        ({1: (3, 5, 64)}, "key has shape [3, 5, 64], expected [3, 5, 128]"),
        ({3: (3, 4, 16, 64)}, "past_key has shape"),
        ({4: (3, 2, 15, 64)}, "past_value has shape"),
        ({5: (2,)}, "context_lens has shape [2], expected [3]"),
        ({7: (2, 12, 32)}, "prefix_key has shape"),
        ({8: (2, 13, 64)}, "prefix_value has shape"),
        ({0: (3, 5)}, "query has 2 dimensions, expected 3"),
        ({0: (3, 5, -1)}, "query must have a constant size in dimension 2"),
    ],
)  # fmt: skip
def test_refuses_shapes_while_building(
    host: Host, plugin: Plugin, change: dict[int, tuple[int, ...]], reason: str
) -> None:
    host.log()
    wrong = shapes()
    for index, shape in change.items():
        wrong[index] = shape
    assert plugin.output_shapes(wrong) is None
    assert reason in host.log()


def test_refuses_number_of_inputs(host: Host, plugin: Plugin) -> None:
    assert plugin.output_shapes(shapes(rotary=32)) is None
    assert "the node has 11 inputs and 3 outputs, expected 9 (do_rotary = 0)" in host.log()


def test_types_and_formats(host: Host) -> None:
    for rotary in (0, 32):
        made = host.create(**ATTRIBUTES, do_rotary=int(rotary > 0))
        assert made
        good, inputs = types(rotary), 11 if rotary else 9
        assert made.output_types(good[:inputs]) == [HALF] * 3
        allowed = [HALF] + ([adapter_host.BF16] if host.major >= 10 else [])
        for base in allowed:
            row = [base if kind == HALF else kind for kind in good]
            for position in range(inputs + 3):
                for kind in range(8):
                    expected = (
                        kind == INT32
                        if position in (5, 6)
                        else kind == (base if position else kind) and kind in allowed
                    )
                    assert made.supports(position, [*row[:position], kind], inputs) == expected, (
                        position,
                        kind,
                    )
                assert not made.supports(position, row[: position + 1], inputs, form=1)
        assert not made.supports(0, good, inputs - 1)
        assert not made.supports(0, good, inputs, 2)
        made.destroy()


def test_workspace_serves_smaller_shapes(plugin: Plugin) -> None:
    outputs = [(8, 16, 256), (8, 2, 64, 64), (8, 2, 64, 64)]
    largest = plugin.workspace([*shapes(8, 16, 64), *outputs], types())
    assert largest >= plugin.workspace([*shapes(8, 1, 64), *outputs], types()) > 0


def test_configure_refuses_what_kernels_refuse(host: Host, plugin: Plugin) -> None:
    given = shapes()
    outputs = [given[0], given[3], given[3]]
    assert plugin.configure([*given, *outputs], types()) == 0
    if host.major >= 10:  # V2's configurePlugin returns nothing
        host.log()
        assert (
            plugin.configure([*given, *outputs], [FLOAT if kind == HALF else kind for kind in types()]) != 0
        )
        assert "float16" in host.log()


@pytest.mark.parametrize("in_place", [True, False], ids=["in place", "copied"])
@pytest.mark.parametrize(
    ("attributes", "rotary"),
    [
        (ATTRIBUTES, 0),
        ({**ATTRIBUTES, "scale": 0.2, "softcap": 3.0}, 0),
        ({**ATTRIBUTES, "local_window_size": 7}, 0),
        ({**ATTRIBUTES, "do_rotary": 1}, 64),
        ({**ATTRIBUTES, "do_rotary": 1, "rotary_interleaved": 1}, 32),
    ],
    ids=["plain", "softcap", "window", "rotary", "interleaved"],
)
def test_enqueue(host: Host, attributes: dict[str, Any], rotary: int, in_place: bool) -> None:
    made = host.create(**attributes)
    assert made
    given = tensors(1, rotary)
    check(given, attributes, run(made, given, rotary, in_place))
    made.destroy()


def test_enqueue_after_deserialization(host: Host) -> None:
    attributes = {**ATTRIBUTES, "softcap": 2.0, "local_window_size": 9}
    made = host.create(**attributes)
    assert made
    again = host.deserialize(made.serialize())
    made.destroy()
    assert again
    given = tensors(2, sequence=1, batch=5)
    check(given, attributes, run(again, given))
    again.destroy()


def test_contexts_have_barriers_of_their_own(host: Host, plugin: Plugin) -> None:
    before, launches = host.live_allocations(), host.plugin_library.host_launches_with_barrier()
    clone = plugin.clone()
    assert host.live_allocations() == before  # a copy holds no device memory
    for each in (plugin, clone):
        assert each.call("attach") == 0
    assert host.live_allocations() == before + 2
    for each in (plugin, clone):
        each.call("detach")
    assert host.live_allocations() == before
    clone.destroy()
    run(plugin, tensors(3))
    assert host.plugin_library.host_launches_with_barrier() == launches + 1


def test_enqueue_refuses_shapes(host: Host, plugin: Plugin) -> None:
    given = tensors(4)
    output = np.zeros_like(given["query"])
    bad = [*given.values(), output, given["past_key"], given["past_value"]]
    bad[5] = np.zeros(2, np.int32)
    host.log()
    assert plugin.enqueue(bad, types(), np.zeros(1 << 16, np.uint8)) != 0
    assert "layer.3): context_lens has shape [2]" in host.log()


def test_alias_is_off_unless_asked(host: Host, plugin: Plugin, monkeypatch: pytest.MonkeyPatch) -> None:
    assert [plugin.call("aliased_input", output) for output in range(3)] == [-2] * 3
    if host.major < 10:
        return
    monkeypatch.setenv("RELAY_TENSORRT_ALIAS_CACHE", "1")
    aliased = host.create(**ATTRIBUTES)
    assert aliased
    again = host.deserialize(aliased.serialize())
    assert again
    for each in (aliased, again):
        assert [each.call("aliased_input", output) for output in range(3)] == [-1, 3, 4]
        each.destroy()
