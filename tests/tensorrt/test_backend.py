"""build, the plan's description and the TensorRT backend, over FAKES of tensorrt and cuda (see fake_gpu.py).

They show which calls are made, in which order, with which shapes and addresses; not that TensorRT takes them.
"""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from fake_gpu import Gpu, installed
from onnx import helper, numpy_helper

from relay_attention.errors import BackendError, ExportError, RelayError
from relay_attention.runtime.artifact import Artifact
from relay_attention.runtime.backend import batch_bucket
from relay_attention.runtime.engine import cache_capacity

_spec = importlib.util.spec_from_file_location(
    "runtime_conftest", Path(__file__).parents[1] / "runtime/conftest.py"
)
assert _spec
assert _spec.loader
tiny = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(tiny)

OTHER_PROMPT = tiny.SYSTEM_PROMPT.replace("Ann 12", "Ann 21")


@pytest.fixture(scope="session")
def exported(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Artifacts of the tiny decoder in float16; not to be changed."""
    folder = tmp_path_factory.mktemp("exported")
    kinds: dict[str, dict[str, Any]] = {
        "static": {}, "input": {"mode": "input"}, "all": {"logits": "all"}, "other": {"text": OTHER_PROMPT},
        "short": {"text": "Be kind."}, "short input": {"text": "Be kind.", "mode": "input"},
    }  # fmt: skip
    for name, options in kinds.items():
        tiny.make_artifact(folder / name, dtype="float16", **options)
    return {name: folder / name for name in kinds}


@pytest.fixture
def gpu(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Gpu]:
    made = Gpu()
    made.version = getattr(request, "param", made.version)
    library = tmp_path / "plugin.so"
    library.write_bytes(b"")
    with installed(made, library):
        yield made


@pytest.fixture
def artifact(exported: dict[str, Path], tmp_path: Path) -> Path:
    """A copy of the static artifact."""
    return copied(exported["static"], tmp_path / "artifact")


def copied(source: Path, target: Path) -> Path:
    shutil.copytree(source, target)
    return target


def build(folder: Path, **options: Any) -> Path:
    from relay_attention.export.build import BuildOptions, build_engine

    defaults = {"max_batch": 12, "prefill_batch": 3, "chunk": 16}
    return build_engine(folder, BuildOptions(**(defaults | options)))


def load(folder: Path, **options: Any) -> Any:
    from relay_attention.runtime.tensorrt_backend import TensorRTBackend

    return TensorRTBackend(Artifact.open(folder), **options)


def reference(folder: Path) -> Any:
    from relay_attention.runtime.onnxruntime_backend import OnnxRuntimeBackend

    return OnnxRuntimeBackend(Artifact.open(folder), threads=1)


class Pair:
    """The backend under test beside ONNX Runtime; every call goes to both, and results are compared."""

    def __init__(self, tested: Any, expected: Any, max_batch: int, max_context: int = 64):
        self.backends = (tested, expected)
        self.random = np.random.default_rng(0)
        for backend in self.backends:
            backend.allocate(max_batch, max_context)

    def step(
        self, first_row: int, context_lens: list[int], query_lens: list[int], sequence: int | None = None
    ) -> None:
        rows, sequence = len(query_lens), sequence or max(query_lens)
        ids = self.random.integers(0, 250, (rows, sequence)).astype(np.int32)
        found = []
        for backend in self.backends:
            backend.step(
                first_row, ids.copy(), np.array(context_lens, np.int32), np.array(query_lens, np.int32)
            )
            found.append(backend.read_logits().copy())
        active = np.array(query_lens) > 0
        assert found[0].shape == found[1].shape == (rows, found[1].shape[1])
        np.testing.assert_allclose(found[0][active], found[1][active], rtol=2e-2, atol=2e-2)

    def move(self, *rows_and_length: int) -> None:
        for backend in self.backends:
            backend.move(*rows_and_length)


@pytest.mark.parametrize("gpu", ["8.6.0", "10.16.0", "11.1.0"], indirect=True)
@pytest.mark.parametrize("kind", ["static", "input", "all"])
def test_same_logits_as_onnxruntime(gpu: Gpu, exported: dict[str, Path], tmp_path: Path, kind: str) -> None:
    folder = copied(exported[kind], tmp_path / "artifact")
    plan = build(folder)
    assert plan.name.startswith(f"trt{gpu.version}-fake-h100-sm90-")
    pair = Pair(load(folder), reference(folder), max_batch=8)
    pair.step(0, [0, 0, 0, 0, 0], [5, 1, 9, 2, 7])  # ragged, more rows than one prefill call takes
    pair.step(0, [5, 1, 9, 2, 7], [1] * 5)
    pair.step(0, [6, 2, 10, 3, 8], [1] * 5)
    pair.step(5, [0], [37])  # longer than one prefill call takes
    pair.move(5, 1, 37)
    pair.step(0, [7, 37, 11, 4], [1, 1, 1, 1])
    pair.step(4, [9, 37], [1, 1])
    pair.step(0, [8, 38, 12, 5], [3, 0, 20, 1], 20)
    assert gpu.launches == [
        "enqueue 3x9", "enqueue 2x9", "enqueue 8x1", "graph 8x1", "enqueue 1x16", "enqueue 1x16",
        "enqueue 1x5",
        "enqueue 4x1", "enqueue 2x1", "enqueue 3x16", "enqueue 3x4", "enqueue 1x16",
    ]  # fmt: skip
    for tested, expected in zip(pair.backends[0].read_cache(1, 38), pair.backends[1]._keys, strict=True):
        np.testing.assert_array_equal(tested[0], expected[1, :, :38])
    pair.backends[0].close()
    assert not gpu.memory, "device memory was not freed"
    assert not gpu.pinned


@pytest.mark.parametrize("graph", [True, False])
@pytest.mark.parametrize("kind", ["static", "input", "all"])
def test_decode_only(gpu: Gpu, exported: dict[str, Path], tmp_path: Path, kind: str, graph: bool) -> None:
    """Without a prefill profile prompts go token by token: the logits and caches are those of whole prompts,
    of rows that end before others and of idle ones too."""
    folder = copied(exported[kind], tmp_path / "artifact")
    build(folder, chunk=1)
    (profile,) = gpu.config.profiles  # type: ignore[attr-defined]
    assert profile["input_ids"] == [[1, 1], [12, 1], [12, 1]], "not tuned for max_batch"
    pair = Pair(load(folder, cuda_graph=graph), reference(folder), max_batch=8)
    pair.step(0, [0, 0, 0, 0, 0], [5, 1, 9, 0, 7], 12)
    assert gpu.launches == (["enqueue 8x1"] + ["graph 8x1"] * 8 if graph else ["enqueue 5x1"] * 9)
    pair.step(0, [5, 1, 9, 0, 7], [1] * 5)
    pair.step(5, [0, 0], [4, 2])  # beside others, as the scheduler does
    assert gpu.launches[-4:] == ["enqueue 2x1"] * 4
    pair.step(0, [6, 2, 10, 1, 8, 4, 2], [1, 1, 3, 0, 1, 2, 1])
    pair.move(6, 1, 3)
    pair.step(0, [7, 3], [1, 1])
    pair.step(1, [4], [20])  # a slot is reused
    lengths = [8, 24, 13, 1, 9, 6]
    for row, length in enumerate(lengths):
        for index, (keys, values) in enumerate(pair.backends[0].read_cache(row, length)):
            np.testing.assert_array_equal(keys, pair.backends[1]._keys[index][row, :, :length])
            np.testing.assert_array_equal(values, pair.backends[1]._values[index][row, :, :length])
    pair.backends[0].close()
    assert not gpu.memory, "device memory was not freed"


def test_one_token_is_decodes(gpu: Gpu, artifact: Path) -> None:
    """What a prompt leaves for its last call: the decode profile, and its graph."""
    build(artifact)
    pair = Pair(load(artifact), reference(artifact), max_batch=4)
    pair.step(0, [0, 0], [17, 3])
    pair.step(0, [17, 3], [17, 1])
    assert gpu.launches == ["enqueue 2x16", "enqueue 2x1", "enqueue 2x16", "graph 2x1"]


def test_set_prefix_of_a_plan_that_decodes_only(gpu: Gpu, exported: dict[str, Path], tmp_path: Path) -> None:
    """Bound and refitted, graphs captured anew; `build` refits a plan of the same profiles only."""
    for kind, other in (("input", "short input"), ("static", "other")):
        folder = copied(exported[kind], tmp_path / kind)
        build(folder, chunk=1)
        pair = Pair(load(folder), reference(folder), max_batch=4)
        pair.step(0, [0, 0], [5, 3])
        prefix = Artifact.open(exported[other]).prefix
        pair.backends[0].set_prefix(prefix)
        expected = reference(exported[other])
        expected.allocate(4, 64)
        pair.backends = (pair.backends[0], expected)
        pair.step(0, [0, 0], [5, 3])
        pair.step(0, [5, 3], [1, 1])
    folder = copied(exported["other"], tmp_path / "other")
    shutil.copytree(tmp_path / "static/engine", folder / "engine")
    del gpu.config  # type: ignore[attr-defined]
    gpu.refits.clear()
    build(folder, chunk=1)
    assert gpu.refits
    assert not hasattr(gpu, "config"), "TensorRT's builder was used"
    Pair(load(folder), reference(folder), max_batch=2).step(0, [0, 0], [3, 4])
    shutil.rmtree(folder / "engine")
    shutil.copytree(tmp_path / "static/engine", folder / "engine")
    build(folder)
    assert len(gpu.config.profiles) == 2, "a plan of other profiles was refitted"  # type: ignore[attr-defined]


def test_descriptions_of_profiles(gpu: Gpu, artifact: Path) -> None:
    """What was described is read again; a description without a profile is damaged; one of more profiles than
    the plan has is refused; one of fewer, as of a chunk of 1 that was built with two, is decoded."""
    from relay_attention.runtime.engine import EngineInfo, Profile

    described = build(artifact, chunk=1, max_batch=4).with_suffix(".json")
    info = EngineInfo.read(described)
    assert info.profiles == (info.decode,) == (info.prefill,)
    text = described.read_text()
    assert json.loads(text) == json.loads(json.dumps(info.to_json()))
    for wrong in ({}, {"prefill": None}, {"prefill": {"batch": [1, 1], "sequence": [1, 1, 1]}}):
        data = {name: value for name, value in json.loads(text).items() if name != "prefill"}
        described.write_text(json.dumps(data | wrong))
        with pytest.raises(BackendError, match=r"damaged.*build the engine again"):
            load(artifact)
    two = replace(info, prefill=Profile((1, 1, 3), (1, 16, 16)))
    described.write_text(json.dumps(two.to_json()))
    with pytest.raises(BackendError, match=r"1 of 2 profiles: build it again"):
        load(artifact)
    described = build(artifact, force=True).with_suffix(".json")
    older = described.read_text()  # as descriptions were before
    assert [*json.loads(older)["prefill"].values()] == [[1, 1, 3], [1, 16, 16]]
    assert len(EngineInfo.read(described).profiles) == 2
    pair = Pair(load(artifact), reference(artifact), max_batch=4)
    pair.step(0, [0, 0], [5, 3])
    described.write_text(json.dumps(replace(EngineInfo.read(described), prefill=info.decode).to_json()))
    pair = Pair(load(artifact), reference(artifact), max_batch=4)
    pair.step(0, [0, 0], [5, 3])


def test_without_graphs(gpu: Gpu, artifact: Path) -> None:
    build(artifact)
    pair = Pair(load(artifact, cuda_graph=False), reference(artifact), max_batch=4)
    pair.step(0, [0, 0, 0], [4, 2, 6])
    for step in range(3):
        pair.step(0, [4 + step, 2 + step, 6 + step], [1] * 3)
    assert gpu.launches[1:] == ["enqueue 3x1"] * 3


def test_buckets(gpu: Gpu, artifact: Path) -> None:
    build(artifact, max_batch=44)
    backend = load(artifact)
    backend.allocate(44, 64)
    sizes = [batch_bucket(rows, backend._max_batch) for rows in (1, 2, 3, 5, 8, 9, 16, 17, 40, 41, 44)]
    assert sizes == [1, 2, 4, 8, 8, 16, 16, 24, 40, 44, 44]


def test_padding_rows_do_not_touch_their_slots(gpu: Gpu, artifact: Path) -> None:
    """Rows that a bucket adds may hold other requests' caches: they stay as they are."""
    build(artifact)
    pair = Pair(load(artifact), reference(artifact), max_batch=8)
    pair.step(0, [0] * 8, [6] * 8)
    before = [pair.backends[0].read_cache(row, 64) for row in range(5, 8)]
    pair.step(0, [6] * 5, [1] * 5)
    pair.step(0, [7] * 5, [1] * 5)
    for row, layers in zip(range(5, 8), before, strict=True):
        for layer, found in zip(layers, pair.backends[0].read_cache(row, 64), strict=True):
            np.testing.assert_array_equal(layer[0], found[0])


def test_another_prefix_is_refitted_when_loading(gpu: Gpu, exported: dict[str, Path], tmp_path: Path) -> None:
    static, other = (Artifact.open(exported[name]).manifest for name in ("static", "other"))
    assert static.prefix.length == other.prefix.length
    folder = copied(exported["other"], tmp_path / "artifact")
    shutil.copytree(build(copied(exported["static"], tmp_path / "first")).parent, folder / "engine")
    for described in (folder / "engine").glob("*.json"):  # the fake plan names its model by path
        assert json.loads(described.read_text())["prefix_tokens"] == static.prefix.token_sha256
    pair = Pair(load(folder), reference(folder), max_batch=2)
    assert len(gpu.refits) == 4
    pair.step(0, [0, 0], [5, 2])


def test_build_refits_instead(gpu: Gpu, exported: dict[str, Path], tmp_path: Path) -> None:
    folder = copied(exported["other"], tmp_path / "artifact")
    shutil.copytree(build(copied(exported["static"], tmp_path / "first")).parent, folder / "engine")
    del gpu.config  # type: ignore[attr-defined]
    plan = build(folder)
    assert not hasattr(gpu, "config"), "TensorRT's builder was used"
    described = json.loads(plan.with_suffix(".json").read_text())
    assert described["prefix_tokens"] == Artifact.open(folder).manifest.prefix.token_sha256
    gpu.refits.clear()
    Pair(load(folder), reference(folder), max_batch=2).step(0, [0], [5])
    assert not gpu.refits, "the plan holds the new prefix already"
    build(folder, force=True)
    assert hasattr(gpu, "config")


def test_set_prefix(gpu: Gpu, exported: dict[str, Path], tmp_path: Path) -> None:
    """An input prefix is rebound, shorter too; a static one is refitted, of the same length only."""
    folder = copied(exported["input"], tmp_path / "input")
    build(folder)
    pair = Pair(load(folder), reference(folder), max_batch=4)
    pair.step(0, [0, 0], [5, 3])
    pair.step(0, [5, 3], [1, 1])
    for backend in pair.backends:
        backend.set_prefix(Artifact.open(exported["short input"]).prefix)
    pair.step(0, [0, 0], [5, 3])
    pair.step(0, [5, 3], [1, 1])
    static = copied(exported["static"], tmp_path / "static")
    build(static)
    loaded = load(static)
    with pytest.raises(BackendError, match="part of its plan"):
        loaded.set_prefix(Artifact.open(exported["short"]).prefix)
    loaded.set_prefix(Artifact.open(exported["other"]).prefix)
    Pair(loaded, reference(exported["other"]), max_batch=2).step(0, [0], [4])


def test_longer_prefix_than_built_for(gpu: Gpu, exported: dict[str, Path], tmp_path: Path) -> None:
    folder = copied(exported["short input"], tmp_path / "artifact")
    build(folder)
    backend = load(folder)
    longer = Artifact.open(exported["input"]).prefix
    with pytest.raises(
        BackendError, match=f"a prefix of {longer.header.prefix_length} tokens; the engine takes 1 to"
    ):
        backend.set_prefix(longer)
    build(folder, max_prefix=longer.header.prefix_length, max_context=64)
    load(folder).set_prefix(longer)


def test_plan_of_another_box(gpu: Gpu, artifact: Path) -> None:
    build(artifact)
    gpu.name, gpu.capability = "FAKE A100", (8, 0)
    with pytest.raises(
        BackendError, match=r"built on FAKE H100 \(compute capability 9.0\), this is FAKE A100 \(8.0\)"
    ):
        load(artifact)
    gpu.name, gpu.capability = "FAKE H100", (9, 0)
    from relay_attention.runtime import tensorrt_backend

    tensorrt_backend.tensorrt.__version__ = "8.6.1"
    with pytest.raises(
        BackendError, match=r"built by TensorRT 8.6.0, this is 8.6.1.*Run `relay-attention build"
    ):
        load(artifact)


def test_no_plan(gpu: Gpu, artifact: Path) -> None:
    with pytest.raises(
        BackendError, match=r"no TensorRT plan fits TensorRT 8.6.0 on FAKE H100.*there is none at all"
    ):
        load(artifact)


def test_plan_of_another_model_or_prefix(
    gpu: Gpu, exported: dict[str, Path], tmp_path: Path, artifact: Path
) -> None:
    plan = build(artifact)
    for name, reason in (
        ("short", "built for a prefix of"),
        ("input", "built for a prefix that is static"),
        ("all", "another model"),
    ):
        folder = copied(exported[name], tmp_path / name)
        shutil.copytree(plan.parent, folder / "engine")
        with pytest.raises(BackendError, match=reason):
            load(folder)
    other = copied(exported["other"], tmp_path / "other")
    shutil.copytree(build(artifact, refit=False).parent, other / "engine")
    with pytest.raises(BackendError, match="built with another system prompt, and without --refit"):
        load(other)


def test_damaged_plans(gpu: Gpu, artifact: Path) -> None:
    plan = build(artifact)
    content = plan.read_bytes()
    described = plan.with_suffix(".json")
    for damaged, reason in (
        (content[:-1], "truncated"),
        (content + b" ", "changed"),
        (content[:-1] + b"?", "damaged"),
    ):
        plan.write_bytes(damaged)
        with pytest.raises(BackendError, match=reason):
            load(artifact)
    plan.unlink()
    with pytest.raises(BackendError, match=r"missing, though .*\.json is there"):
        load(artifact)
    plan.write_bytes(content)
    text = described.read_text()
    for damaged_text in (
        "{",
        "[]",
        text.replace('"max_context"', '"max"'),
        text.replace('"format_version": 1', '"format_version": 2'),
    ):
        described.write_text(damaged_text)
        with pytest.raises(BackendError, match="build the engine again"):
            load(artifact)


def test_plan_that_tensorrt_refuses(gpu: Gpu, artifact: Path) -> None:
    from relay_attention.runtime.artifact import FileEntry
    from relay_attention.runtime.engine import EngineInfo, write_engine

    plan = build(artifact)
    info = EngineInfo.read(plan.with_suffix(".json"))
    plan.write_bytes(b"not a plan")
    write_engine(plan, b"not a plan", replace(info, plan=FileEntry.of(plan)))
    with pytest.raises(BackendError, match="refuses the plan: magic tag does not match"):
        load(artifact)


def test_beyond_the_profile(gpu: Gpu, artifact: Path) -> None:
    build(artifact)
    backend = load(artifact)
    with pytest.raises(BackendError, match=r"max_batch 13 is beyond the engine's 12.*--max-batch 13"):
        backend.allocate(13, 64)
    with pytest.raises(BackendError, match="max_context 80 is beyond the engine's 64"):
        backend.allocate(4, 80)
    backend.allocate(4, 64)
    with pytest.raises(BackendError, match=r"rows 2..4 of 4 slots"):
        backend.step(2, *(np.zeros(shape, np.int32) for shape in ((3, 1), (3,), (3,))))


def test_out_of_device_memory(gpu: Gpu, artifact: Path) -> None:
    build(artifact)
    backend = load(artifact)
    gpu.total = (256 << 20) + 50_000
    with pytest.raises(BackendError, match="GiB of device memory are free: at most max_batch"):
        backend.allocate(12, 64)


def test_failing_engine(gpu: Gpu, artifact: Path) -> None:
    """A step that fails is an error; the next one works, with graphs and shapes set up anew."""
    build(artifact)
    pair = Pair(load(artifact), reference(artifact), max_batch=4)
    pair.step(0, [0, 0], [3, 4])
    pair.step(0, [3, 4], [1, 1])
    gpu.fail_enqueue = True
    with pytest.raises(BackendError, match="TensorRT failed in a step of 2 rows x 2"):
        pair.backends[0].step(0, *(np.ones(shape, np.int32) for shape in ((2, 2), (2,), (2,))))
    gpu.fail_enqueue = False
    pair.step(0, [4, 5], [1, 1])


def test_has_no_threads(gpu: Gpu, artifact: Path) -> None:
    with pytest.raises(BackendError, match="has no threads to set"):
        load(artifact, threads=2)


def test_no_gpu(gpu: Gpu, artifact: Path) -> None:
    gpu.devices = 0
    for action in (build, load):
        with pytest.raises(BackendError, match=r"no NVIDIA GPU can be used here.*cudaErrorNoDevice"):
            action(artifact)


def test_plugin_library_missing(gpu: Gpu, artifact: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RELAY_ATTENTION_TENSORRT_LIBRARY", "/nowhere.so")
    with pytest.raises(
        BackendError, match=r"RELAY_ATTENTION_TENSORRT_LIBRARY is '/nowhere.so', but there is no such"
    ):
        build(artifact)
    monkeypatch.delenv("RELAY_ATTENTION_TENSORRT_LIBRARY")
    with pytest.raises(BackendError, match="the plugin's library for TensorRT 8 is missing"):
        build(artifact)


def test_plugin_library_that_does_not_load(gpu: Gpu, artifact: Path) -> None:
    gpu.registry.refuse = True
    with pytest.raises(BackendError, match="could not load RelayAttention from it"):
        build(artifact)


def test_refuses_artifacts_that_are_not_for_tensorrt(gpu: Gpu, tmp_path: Path) -> None:
    tiny.make_artifact(tmp_path / "wide")
    with pytest.raises(ExportError, match="is float32; the plugin's kernels take float16"):
        build(tmp_path / "wide")


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"max_batch": 0}, "max-batch is 0"),
        ({"optimization_level": -1}, "optimization-level -1: it is 0 to 5"),
        ({"opt_batch": 13}, "opt-batch 13 is not between 1 and max-batch 12"),
        ({"max_context": 4000}, "exceed the model's 512 positions"),
        ({"alias_cache": True}, "needs TensorRT 10.3 or later, this is 8.6.0"),
    ],
)
def test_refuses_options(gpu: Gpu, artifact: Path, options: dict[str, Any], reason: str) -> None:
    with pytest.raises(RelayError, match=reason):
        build(artifact, **options)
    assert not list((artifact).glob("engine/*.plan"))


@pytest.mark.parametrize("gpu", ["8.6.0", "10.16.0", "11.1.0"], indirect=True)
def test_what_tensorrt_is_asked_to_build(gpu: Gpu, artifact: Path) -> None:
    plan = build(artifact, workspace=1 << 30, opt_batch=6)
    config, network = gpu.config, gpu.network  # type: ignore[attr-defined]
    typed = gpu.version != "8.6.0"
    assert network.flags == {"8.6.0": 1, "10.16.0": 3, "11.1.0": 1}[gpu.version]
    assert config.flags == (
        {"REFIT_INDIVIDUAL"} if typed else {"REFIT", "FP16", "OBEY_PRECISION_CONSTRAINTS"}
    )
    assert len(network.refittable) == (4 if typed else 0)
    assert config.limits == {"WORKSPACE": 1 << 30}
    sources = 0b11 if gpu.version == "11.1.0" else 0b11000
    assert config.tactic_sources == sources, "cuDNN or cuBLAS is asked for"
    assert config.builder_optimization_level == 3, "not TensorRT's own"
    assert config.profiles[0]["input_ids"] == [[1, 1], [6, 1], [12, 1]]
    assert config.profiles[1]["input_ids"] == [[1, 1], [1, 16], [3, 16]]
    capacity = cache_capacity(Artifact.open(artifact).manifest, 64)
    assert config.profiles[0]["past_key_values.1.value"] == [
        [1, 2, 1, 8],
        [6, 2, capacity, 8],
        [12, 2, capacity, 8],
    ]
    pinned = {layer.name.split("_")[0] for layer in network.layers if layer.precision is not None}
    assert pinned == (set() if typed else {"MatMul", "Add", "Tanh", "logits"})
    assert not list(plan.parent.glob("*.part"))


@pytest.mark.parametrize("gpu", ["10.16.0"], indirect=True)
@pytest.mark.parametrize("wanted", [False, True])
def test_alias_is_declared_only_if_asked(
    gpu: Gpu, artifact: Path, monkeypatch: pytest.MonkeyPatch, wanted: bool
) -> None:
    monkeypatch.setenv("RELAY_TENSORRT_ALIAS_CACHE", "left over")
    build(artifact, alias_cache=wanted)
    assert gpu.config.features == ({"ALIASED_PLUGIN_IO_10_03"} if wanted else set())  # type: ignore[attr-defined]
    assert gpu.alias == ("1" if wanted else "0")
    assert os.environ["RELAY_TENSORRT_ALIAS_CACHE"] == "left over"


def test_optimization_level(gpu: Gpu, artifact: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    build(artifact, optimization_level=0)
    assert gpu.config.builder_optimization_level == 0  # type: ignore[attr-defined]
    create = sys.modules["tensorrt"].Builder.create_builder_config

    def of_8_5(builder: Any) -> Any:
        config = create(builder)
        del config.builder_optimization_level
        return config

    monkeypatch.setattr(sys.modules["tensorrt"].Builder, "create_builder_config", of_8_5)
    with pytest.raises(ExportError, match=r"--optimization-level needs TensorRT 8.6 or later"):
        build(artifact, optimization_level=1, force=True)


def test_timing_cache_is_reused(gpu: Gpu, artifact: Path) -> None:
    plan = build(artifact)
    (cache,) = plan.parent.glob("timing-trt8.6.0-sm90.cache")
    assert cache.read_bytes() == b"timed."
    build(artifact, force=True)
    assert cache.read_bytes() == b"timed.timed."
    elsewhere = artifact / "own.cache"
    build(artifact, force=True, timing_cache=elsewhere)
    assert elsewhere.read_bytes() == b"timed."
    elsewhere.write_bytes(b"of another GPU")
    build(artifact, force=True, timing_cache=elsewhere)
    assert elsewhere.read_bytes() == b"timed."


def greedy_tokens(folder: Path, backend: str, **params: Any) -> list[list[int]]:
    """The scheduler's, of ragged prompts and reused slots."""
    from relay_attention.runtime.decoder import RelayDecoder
    from relay_attention.runtime.sampling import SamplingParams

    prompts = [[5, 6, 7], [9], list(range(20, 60)), [1, 2]] * 3
    with RelayDecoder.load(folder, backend=backend, max_batch=5, max_context=64) as decoder:
        results = decoder.generate(prompts, SamplingParams(temperature=0.0, **params))
        return [result.token_ids for result in results]


def test_decoder_end_to_end(gpu: Gpu, artifact: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from relay_attention.runtime import backend as backends

    assert "tensorrt" in backends._BACKENDS
    answers = []
    for name, chunk in (("tensorrt", 16), ("tensorrt", 1), ("onnxruntime", 16)):
        build(artifact, chunk=chunk)
        answers.append(greedy_tokens(artifact, name, max_new_tokens=8))
    assert answers[0] == answers[1] == answers[2]
    assert any(launch.startswith("graph") for launch in gpu.launches)


def test_compare_with_onnxruntime(gpu: Gpu, artifact: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from relay_attention.cli import main
    from relay_attention.export.compare import compare
    from relay_attention.runtime import cuda, tensorrt_backend

    build(artifact)
    report = compare(artifact, "tensorrt", requests=5, new_tokens=6)
    assert report.ok, report.table()
    assert [layer.ok for layer in report.layers] == [True, True]
    assert report.layers[0].largest > 0.1
    assert len(report.requests) == 5
    assert not gpu.memory
    assert (
        main(["verify", str(artifact), "--backend", "tensorrt", "--requests", "3", "--new-tokens", "3"]) == 0
    )
    assert main(["verify", str(artifact)]) == 2

    # an engine that errs in the values of layer 1 is caught, and shown where it errs
    download = cuda.Stream.download

    def wrong(self: Any, array: np.ndarray, address: int) -> None:
        download(self, array, address)
        if array.dtype == np.float16:
            wrong.calls += 1  # type: ignore[attr-defined]
            if wrong.calls % 4 == 0:  # type: ignore[attr-defined]
                self.synchronize()
                array += 1

    wrong.calls = 0  # type: ignore[attr-defined]
    monkeypatch.setattr(tensorrt_backend.cuda.Stream, "download", wrong)
    report = compare(artifact, "tensorrt", requests=2, new_tokens=3)
    assert [layer.ok for layer in report.layers] == [True, False]
    assert not report.ok
    assert (
        main(["verify", str(artifact), "--backend", "tensorrt", "--requests", "2", "--new-tokens", "2"]) == 1
    )


def test_build_command(gpu: Gpu, artifact: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from relay_attention.cli import main

    sizes = ["--max-batch", "6", "--chunk", "16", "--workspace", "64", "--optimization-level", "2"]
    assert main(["build", str(artifact), *sizes]) == 0
    (plan,) = artifact.glob("engine/*.plan")
    assert capsys.readouterr().out.strip() == str(plan)
    assert gpu.config.limits == {"WORKSPACE": 64 << 20}  # type: ignore[attr-defined]
    assert gpu.config.builder_optimization_level == 2  # type: ignore[attr-defined]
    gpu.devices = 0
    assert main(["build", str(artifact)]) == 2
    assert "no NVIDIA GPU" in capsys.readouterr().err


@pytest.fixture(scope="session")
def huggingface(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama, exported with --target tensorrt before any fake is there."""
    path = Path(__file__).parents[1] / "export/tiny_models.py"
    spec = importlib.util.spec_from_file_location("tiny_models", path)
    assert spec
    assert spec.loader
    models = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(models)
    from relay_attention.export.exporter import export_model

    folder = tmp_path_factory.mktemp("huggingface")
    source = models.make_model(folder / "llama", models.CONFIGS["llama"]())
    return export_model(source, "Be kind: ab", folder / "out", precision="fp16", target="tensorrt")


def test_exported_for_tensorrt(huggingface: Path, gpu: Gpu, tmp_path: Path) -> None:
    """The whole way from a Hugging Face model; the plan outlives a new prompt of the same length."""
    from relay_attention.export.prefix import make_prefix

    folder = copied(huggingface, tmp_path / "out")
    plan = build(folder)
    pair = Pair(load(folder), reference(folder), max_batch=4)
    pair.step(0, [0, 0, 0], [4, 1, 7])
    pair.step(0, [4, 1, 7], [1, 1, 1])
    before = Artifact.open(folder).manifest.prefix
    make_prefix(folder, "Be kind: ba")
    after = Artifact.open(folder).manifest.prefix
    assert before.length == after.length
    assert before.token_ids != after.token_ids
    Pair(load(folder), reference(folder), max_batch=2).step(0, [0, 0], [3, 4])
    assert gpu.refits
    assert build(folder) == plan


@pytest.mark.parametrize("gpu", ["8.6.0", "10.16.0"], indirect=True)
@pytest.mark.parametrize("chunk", [16, 1])
def test_one_token_is_the_last(huggingface: Path, gpu: Gpu, tmp_path: Path, chunk: int) -> None:
    """A plan that decodes only has a reshape where the graph has GatherND; of any version."""
    folder = copied(huggingface, tmp_path / "out")
    graph = onnx.load(folder / "model.onnx", load_external_data=False).graph
    (gather,) = (node for node in graph.node if node.op_type == "GatherND")
    (head,) = (node for node in graph.node if gather.output[0] in node.input)
    build(folder, chunk=chunk)
    network = gpu.network  # type: ignore[attr-defined]
    operands = {layer.name: [each and each.name for each in layer.inputs] for layer in network.layers}
    added = {layer.output.name: layer for layer in network.layers if layer.added}
    if chunk == 1:
        last = added[operands[head.name][0]]
        assert (last.type.name, operands[last.name]) == ("SHUFFLE", [gather.input[0]])
        assert last.reshape_dims == (-1, 64)
        assert not any(gather.output[0] in names for names in operands.values())
        operands[head.name][0] = gather.output[0]
    assert operands[head.name] == [*head.input]
    if gpu.version != "8.6.0":
        assert len(added) == (chunk == 1)
        for node in graph.node:
            layer = next(each for each in network.layers if each.name == node.name)
            assert layer.parsed == operands[node.name], node.name


@pytest.mark.parametrize("chunk", [16, 1])
def test_products_of_all_rows(huggingface: Path, gpu: Gpu, tmp_path: Path, chunk: int) -> None:
    """Before TensorRT 10, where each row has one token: every product but the head's has all rows at once,
    those of a tensor the same one; all else takes [batch, 1, N] again; every pin of the network as parsed is
    there. With a prefill profile the network stays as it was parsed."""
    import tensorrt

    from relay_attention.export import build as module

    folder = copied(huggingface, tmp_path / "out")
    model = onnx.load(folder / "model.onnx", load_external_data=False)
    build(folder, chunk=chunk)
    network = gpu.network  # type: ignore[attr-defined]
    added = {layer.output.name: layer for layer in network.layers if layer.added}
    nodes = {node.name: node for node in model.graph.node}
    products = [node for node in nodes.values() if node.op_type == "MatMul"]
    if chunk > 1:
        assert not added
    else:
        assert {layer.type.name for layer in added.values()} == {"SHUFFLE"}
        assert len({layer.name for layer in added.values()}) == len(added), "two layers of a name"
        layers = {layer.name: layer for layer in network.layers}
        flat: dict[str, set[str]] = {}
        back: dict[str, str] = {}
        for node in products[:-1]:  # the last one is the head's, of rank 2
            tokens, result = layers[node.name].inputs[0], layers[node.name].output
            assert added[tokens.name].inputs[0].name in (node.input[0], back.get(node.input[0]))
            assert tokens.shape == (1, -1, network.shapes[node.input[1]][0])
            assert result.shape == (1, -1, network.shapes[node.input[1]][1])
            flat.setdefault(node.input[0], set()).add(tokens.name)
            (reader,) = (
                each for each in network.layers if result.name in [i and i.name for i in each.inputs]
            )
            assert (reader.type.name, reader.added) == ("SHUFFLE", True)
            back[result.name] = reader.output.name
            assert reader.reshape_dims == (-1, 1, result.shape[-1])
        assert all(len(names) == 1 for names in flat.values())
        assert len(flat) == 8, "not one for q, k, v and one for gate, up of each layer"
        assert not any(layer.precision or layer.output_types for layer in added.values())

    parsed = tensorrt.Builder(None).create_network(0)
    assert tensorrt.OnnxParser(parsed, None).parse_from_file(str(folder / "model.onnx"))
    module._pin_types(tensorrt, parsed, ir.from_proto(model))
    before, after = pinned_types(parsed), pinned_types(network)
    assert {name: after[name] for name in before} == before
    assert {before[node.output[0]] for node in products} == {"HALF"}

    pair = Pair(load(folder), reference(folder), max_batch=4)
    pair.step(0, [0, 0, 0, 0], [4, 1, 0, 20])
    pair.step(0, [4, 1, 0, 20], [1, 1, 1, 1])
    pair.step(0, [5, 2, 1, 21], [0, 7, 2, 1])


def products_model(*matrices: tuple[int, int]) -> Any:
    """A network of hidden [batch, sequence, K] times one matrix after another, and the model."""
    import tensorrt

    half, value = onnx.TensorProto.FLOAT16, helper.make_tensor_value_info
    nodes = [
        helper.make_node("MatMul", [f"x{index}", f"w{index}"], [f"x{index + 1}"], f"product{index}")
        for index in range(len(matrices))
    ]
    nodes.append(helper.make_node("Add", [f"x{len(matrices)}", "one"], ["out"], "add"))
    random = np.random.default_rng(0)
    weights = [
        numpy_helper.from_array(random.integers(-2, 3, shape).astype(np.float16), f"w{index}")
        for index, shape in enumerate(matrices)
    ]
    weights.append(numpy_helper.from_array(np.ones((), np.float16), "one"))
    inputs = [value("x0", half, ["b", "s", matrices[0][0]])]
    graph = helper.make_graph(nodes, "g", inputs, [value("out", half, None)], weights)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    network = tensorrt.Builder(None).create_network(0)
    network.layers = tensorrt.layers_of(model)
    network.num_layers = len(network.layers)
    return network, model


def test_product_of_a_product(gpu: Gpu) -> None:
    """The second one takes the first's rows, flattened again."""
    import onnxruntime
    import tensorrt

    from relay_attention.export.build import _flatten_products

    network, model = products_model((8, 4), (4, 6))
    _flatten_products(tensorrt, network)
    hidden = np.random.default_rng(1).integers(-4, 5, (3, 1, 8)).astype(np.float16)  # exact in any order
    found, expected = (
        onnxruntime.InferenceSession(each.SerializeToString(), providers=["CPUExecutionProvider"]).run(
            ["out"], {"x0": hidden}
        )[0]
        for each in (network.edited(model), model)
    )
    np.testing.assert_array_equal(found, expected)


def test_transposed_matrix(gpu: Gpu) -> None:
    """[1, N, K], of which the layer takes the transpose: the result's shape says which is N."""
    import tensorrt

    from relay_attention.export.build import _flatten_products

    network, _ = products_model((8, 4))
    (product,) = (layer for layer in network.layers if layer.type.name == "MATRIX_MULTIPLY")
    assert product.inputs[1].shape == (1, 8, 4)
    product.inputs[1].shape = (1, 4, 8)
    _flatten_products(tensorrt, network)
    flat, back = (layer for layer in network.layers if layer.added)
    assert (flat.reshape_dims, back.reshape_dims) == ((1, -1, 8), (-1, 1, 4))


@pytest.mark.parametrize(
    ("index", "shape"),
    [(0, (-1, 8)), (0, (-1, 3, 8)), (0, (-1, -1, 5)), (1, (8, 4)), (1, (2, 8, 4)), (1, (1, -1, 4))],
)
def test_other_products_stay(gpu: Gpu, index: int, shape: tuple[int, ...]) -> None:
    """What is not [batch, sequence, K] times one matrix, and what makes an output of the network."""
    import tensorrt

    from relay_attention.export.build import _flatten_products

    network, _ = products_model((8, 4))
    (product,) = (layer for layer in network.layers if layer.type.name == "MATRIX_MULTIPLY")
    product.output.is_network_output = True
    _flatten_products(tensorrt, network)
    product.output.is_network_output = False
    product.inputs[index].shape = shape
    _flatten_products(tensorrt, network)
    assert not [layer for layer in network.layers if layer.added]


@pytest.mark.parametrize("chunk", [16, 1])
def test_tokens_of_the_scheduler(huggingface: Path, gpu: Gpu, tmp_path: Path, chunk: int) -> None:
    """As exported, with and without a prefill profile."""
    folder = copied(huggingface, tmp_path / "out")
    build(folder, chunk=chunk)
    found, expected = (
        greedy_tokens(folder, backend, max_new_tokens=6, ignore_eos=True)
        for backend in ("tensorrt", "onnxruntime")
    )
    assert found == expected


def pinned_types(network: Any) -> dict[str, Any]:
    """What each layer's tensor is pinned to, and its precision with it."""
    for layer in network.layers:
        assert layer.output_types in ({}, {0: layer.precision}) or layer.output.is_network_output, layer.name
    return {layer.output.name: layer.precision for layer in network.layers}


def test_layers_have_the_graphs_types(huggingface: Path, gpu: Gpu, tmp_path: Path) -> None:
    """As exported: linear layers and activations in float16, norms in float32; what moves data is left."""
    folder = copied(huggingface, tmp_path / "out")
    graph = onnx.load(folder / "model.onnx", load_external_data=False).graph
    types = {value.name: value.type.tensor_type.elem_type for value in graph.value_info}
    build(folder)
    pinned = pinned_types(gpu.network)  # type: ignore[attr-defined]
    float32, seen = ("Pow", "ReduceMean", "Sqrt", "Div"), set()
    for node in graph.node:
        found = pinned[node.output[0]]
        seen.add((node.op_type, found))
        if node.op_type in ("MatMul", "Sigmoid", "Mul"):
            assert found == "HALF", node.name
        elif node.op_type in float32:
            assert found == "FLOAT", node.name
        elif node.op_type == "Add":
            assert found == {1: "FLOAT", 10: "HALF"}[types[node.output[0]]], node.name
        else:
            assert found is None, node.name
    assert {("MatMul", "HALF"), ("Sigmoid", "HALF"), ("Add", "HALF"), ("Add", "FLOAT")} <= seen
    assert {(name, "FLOAT") for name in float32} <= seen
    assert {("Cast", None), ("Gather", None), ("RelayAttention", None), ("Sub", None)} <= seen
    computing = {layer.output.name for layer in gpu.network.layers if layer.precision}  # type: ignore[attr-defined]
    assert computing <= {name for node in graph.node for name in node.output}, "a constant is pinned"


def test_every_layer_of_a_node_is_pinned(gpu: Gpu) -> None:
    """Those without a name too; types that the graph does not state come from the operands; an output of the
    network keeps its own."""
    import tensorrt

    from relay_attention.export import build as module

    half, whole = onnx.TensorProto.FLOAT16, onnx.TensorProto.INT64
    nodes = [
        ("Gemm", ["x", "w", "b"], "y"), ("Expand", ["y", "n"], "e"), ("Tanh", ["e"], "t"),
        ("Add", ["n", "n"], "m"), ("Cast", ["t"], "f"), ("Sqrt", ["f"], "out"),
    ]  # fmt: skip
    made = [
        helper.make_node(kind, inputs, [output], name=kind, **({"to": 1} if kind == "Cast" else {}))
        for kind, inputs, output in nodes
    ]
    inputs = [helper.make_tensor_value_info(name, kind, [2, 2]) for name, kind in (("x", half), ("n", whole))]
    weights = [helper.make_tensor(name, half, [2, 2], [1.0] * 4) for name in ("w", "b")]
    outputs = [helper.make_tensor_value_info("out", 1, [2, 2])]
    model = helper.make_model(helper.make_graph(made, "g", inputs, outputs, weights))
    network = tensorrt.Builder(None).create_network(0)
    network.layers = tensorrt.layers_of(model)
    network.num_layers = len(network.layers)
    module._pin_types(tensorrt, network, ir.from_proto(model))
    pinned = [(layer.type.name, layer.precision) for layer in network.layers if layer.precision]
    assert pinned == [
        ("MATRIX_MULTIPLY", "HALF"), ("ELEMENTWISE", "HALF"), ("ACTIVATION", "HALF"), ("UNARY", "FLOAT")
    ]  # fmt: skip
    assert pinned_types(network)["out"] == "FLOAT"
    assert not network.layers[-1].output_types, "the type of the network's output"
    model.graph.node[0].output[0] = "y of int8"
    model.graph.value_info.append(helper.make_tensor_value_info("y of int8", onnx.TensorProto.INT8, [2, 2]))
    network.layers = tensorrt.layers_of(model)
    with pytest.raises(ExportError, match="Gemm: the graph has y of int8 as INT8"):
        module._pin_types(tensorrt, network, ir.from_proto(model))
