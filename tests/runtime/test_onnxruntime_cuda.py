"""The backend "onnxruntime-cuda". NO GPU is used here, but by the tests marked `gpu`.

Its class runs with ONNX Runtime's CPU provider (device="cpu"): in main memory, or over a FAKE of cuda-python
whose device memory is main memory too. That shows binding, addresses, order and the choice of tokens; not
that a GPU, its provider or the CUDA kernels do what they should.
"""

from __future__ import annotations

import importlib.util
import itertools
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

from relay_attention.errors import BackendError
from relay_attention.runtime import Artifact, RelayDecoder, SamplingParams
from relay_attention.runtime import onnxruntime_cuda_backend as module
from relay_attention.runtime.backend import ReadsTop, batch_bucket, load_backend
from relay_attention.runtime.onnxruntime_backend import Array, HostMemory
from relay_attention.runtime.onnxruntime_top import TopTokens
from relay_attention.runtime.sampling import TIES, Sampler
from relay_attention.runtime.top_tokens import top_tokens_model

TESTS = Path(__file__).parents[1]
NAME = "onnxruntime-cuda"
BFLOAT16 = TensorProto.BFLOAT16
HAS_CUDA = module.CUDA in onnxruntime.get_available_providers()

MIXED = [
    SamplingParams(max_new_tokens=10),
    SamplingParams(max_new_tokens=10, temperature=0.9, top_k=20, seed=1, ignore_eos=True),
    SamplingParams(max_new_tokens=10, temperature=1.2, top_k=5, top_p=0.8, min_p=0.02, seed=2),
    SamplingParams(max_new_tokens=10, temperature=0.7, top_k=10**6, seed=3),
    SamplingParams(max_new_tokens=10, temperature=0.7, top_p=0.9, seed=4),
    SamplingParams(max_new_tokens=10, repetition_penalty=1.3),
    SamplingParams(max_new_tokens=10, min_new_tokens=4, temperature=0.5, top_k=3, seed=5),
    SamplingParams(max_new_tokens=10, logprobs=2),
]


def imported(path: Path) -> ModuleType:
    """A module that pytest's importlib mode cannot import by name."""
    spec = importlib.util.spec_from_file_location(path.stem + "_of_cuda_tests", path)
    assert spec
    assert spec.loader
    made = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(made)
    return made


@pytest.fixture(scope="module")
def prompts(artifact: Artifact) -> list[list[int]]:
    generator = np.random.default_rng(3)
    vocab_size = artifact.manifest.geometry.vocab_size
    return [generator.integers(0, vocab_size, n).tolist() for n in (1, 30, 7, 2, 19, 44, 3, 12)]


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often logits and likeliest tokens were read."""
    counted: Counter[str] = Counter()
    for name in ("read_logits", "read_top"):
        method = getattr(module.OnnxRuntimeCudaBackend, name)

        def call(self: Any, *args: Any, name: str = name, method: Callable[..., Any] = method) -> Any:
            counted[name] += 1
            return method(self, *args)

        monkeypatch.setattr(module.OnnxRuntimeCudaBackend, name, call)
    return counted


def run(path: Path, prompts: list[list[int]], params: Any, backend: str = NAME, **options: Any) -> list[Any]:
    options = ({"device": "cpu"} if backend == NAME else {}) | {"max_batch": 3, "threads": 1} | options
    with RelayDecoder.load(path, backend, **options) as decoder:
        return decoder.generate(prompts, params)


@pytest.mark.parametrize("mode", ["static", "input"])
@pytest.mark.parametrize("logits", ["last", "all"])
def test_same_results_as_the_cpu_backend(make_artifact, tmp_path, prompts, calls, mode, logits):
    """Every kind of sampling, ragged prompts in chunks: equal to the last bit of the log-probabilities."""
    path = make_artifact(tmp_path / "artifact", mode=mode, logits=logits).path
    for options in ({"max_batch": 3, "prefill_chunk": 9}, {"max_batch": 8}):
        found, expected = (run(path, prompts, MIXED, name, **options) for name in (NAME, "onnxruntime"))
        assert found == expected
    assert calls["read_top"] > 0
    assert calls["read_logits"] > 0


@pytest.mark.parametrize("params", [MIXED[0], MIXED[1], MIXED[2]])
def test_only_the_likeliest_are_read(artifact, prompts, calls, params):
    """Greedy and top-k requests never fetch a row of logits."""
    found = run(artifact.path, prompts, params)
    assert calls["read_logits"] == 0
    assert calls["read_top"] > 0
    assert found == run(artifact.path, prompts, params, "onnxruntime")


def test_float16(make_artifact, tmp_path, prompts):
    path = make_artifact(tmp_path / "half", dtype="float16").path
    assert run(path, prompts, MIXED) == run(path, prompts, MIXED, "onnxruntime")


@pytest.mark.parametrize("mode", ["static", "input"])
def test_bfloat16_caches(gpu, make_artifact, tmp_path, mode):
    """Caches and prefix in bfloat16, over the fake: bound as that type, moved, read; beside float32.

    The CPU provider computes between Casts. Keys and values of up to 4 are rounded by at most 2^-7.
    """
    backends: list[Any] = []
    for dtype, options in (("bfloat16", {"cuda_graph": True}), ("float32", {"cuda_graph": False})):
        artifact = make_artifact(tmp_path / dtype, mode=mode, dtype=dtype, between_casts=dtype == "bfloat16")
        backends.append(load_backend(NAME, artifact, **options))
        backends[-1].allocate(4, 32)
    narrow, exact = backends
    assert 2 * narrow.cache_bytes == exact.cache_bytes
    assert 2 * narrow.prefix_bytes == exact.prefix_bytes
    ids = np.random.default_rng(0).integers(0, 250, (3, 9)).astype(np.int32)
    for first_row, tokens, context_lens, query_lens in (
        (0, ids, [0, 0, 0], [9, 1, 4]), (0, ids[:, :1], [9, 1, 4], [1, 1, 1]), (1, ids[:2], [2, 5], [7, 3]),
        (0, ids[:, :1], [10, 9, 8], [1, 1, 1]),
    ):  # fmt: skip
        for backend in backends:
            backend.step(first_row, tokens, np.int32(context_lens), np.int32(query_lens))
        found, expected = (backend.read_logits() for backend in backends)
        assert found.dtype == np.float32
        np.testing.assert_allclose(found, expected, atol=0.06)
    for backend in backends:
        backend.move(0, 3, 11)
    for row, length in ((0, 11), (1, 10), (3, 11)):
        for pair, exact_pair in zip(*(each.read_cache(row, length) for each in backends), strict=True):
            for cache, exact_cache in zip(pair, exact_pair, strict=True):
                assert cache.dtype == np.float32
                assert not (cache.view(np.uint32) & 0xFFFF).any()
                np.testing.assert_allclose(cache, exact_cache, atol=0.05)
    for backend in backends:
        backend.close()


def test_bfloat16_is_not_for_the_cpu(make_artifact, tmp_path):
    artifact = make_artifact(tmp_path / "narrow", dtype="bfloat16")
    with pytest.raises(
        BackendError,
        match=r"is bfloat16, which .* on GPUs only: .*'onnxruntime-cuda', or .*--precision fp16 or fp32",
    ):
        load_backend("onnxruntime", artifact)


@pytest.mark.skipif(HAS_CUDA, reason="this op library may have CUDA kernels")
def test_bfloat16_without_cuda_kernels(make_artifact, tmp_path):
    """As with an op library for CPUs beside onnxruntime-gpu."""
    artifact = make_artifact(tmp_path / "narrow", dtype="bfloat16")
    with pytest.raises(
        BackendError,
        match=r"is bfloat16, which only CUDA kernels take, .* has none: build it with RELAY_CUDA=ON",
    ):
        load_backend(NAME, artifact, device="cpu")


def test_graph_of_the_likeliest_tokens():
    """What is encoded by hand is what onnx makes."""
    made = onnx.load_from_string(top_tokens_model())
    onnx.checker.check_model(made, full_check=True)

    def value(name: str, kind: int, *shape: int | str) -> onnx.ValueInfoProto:
        return helper.make_tensor_value_info(name, kind, shape)

    axes = helper.make_tensor("axes", TensorProto.INT64, [1], [-1])
    graph = helper.make_graph(
        [
            helper.make_node("TopK", ["logits", "count"], ["values", "ids"], "values"),
            helper.make_node("ReduceSum", ["logits", "axes"], ["sums"], "sums", keepdims=0),
        ],
        "top_tokens",
        [value("logits", TensorProto.FLOAT, "rows", "vocabulary"), value("count", TensorProto.INT64, 1)],
        [
            value("values", TensorProto.FLOAT, "rows", "count"),
            value("ids", TensorProto.INT64, "rows", "count"),
            value("sums", TensorProto.FLOAT, "rows"),
        ],
        [axes],
    )
    assert made == helper.make_model(graph, ir_version=8, opset_imports=[helper.make_opsetid("", 17)])
    assert numpy_helper.to_array(made.graph.initializer[0]).tolist() == [-1]


def test_top_tokens():
    """One session for all counts; an output buffer that grows."""
    finder = TopTokens("CPUExecutionProvider", HostMemory())
    random = np.random.default_rng(0)
    for rows, count in ((1, 9), (5, 9), (2, 8192), (5, 9000), (5, 1)):
        logits = random.standard_normal((rows, 8192)).astype(np.float32)
        values, ids = finder.find(logits, count)
        assert values.shape == ids.shape == (rows, min(count, 8192))
        np.testing.assert_array_equal(values, -np.sort(-logits)[:, :count])
        np.testing.assert_array_equal(np.take_along_axis(logits, ids, 1), values)


def test_read_top(artifact):
    backend: Any = load_backend(NAME, artifact, device="cpu", threads=1)
    assert isinstance(backend, ReadsTop)
    assert not isinstance(load_backend("onnxruntime", artifact, threads=1), ReadsTop)
    backend.allocate(4, 16)
    backend.step(0, np.int32([[5, 6], [7, 0]]), np.int32([0, 0]), np.int32([2, 1]))
    logits = backend.read_logits()
    vocab_size = logits.shape[1]
    for count in (1, 9, vocab_size, vocab_size + 5):
        values, ids = backend.read_top(count)
        assert values.shape == ids.shape == (2, min(count, vocab_size))
        np.testing.assert_array_equal(values, -np.sort(-logits)[:, :count])
        np.testing.assert_array_equal(np.take_along_axis(logits, ids, 1), values)
    for value in (np.nan, np.inf, -np.inf):
        backend._last_logits = logits.copy()
        backend._last_logits[1, 17] = value
        values, _ = backend.read_top(4)
        assert np.isfinite(values[0]).all()
        assert np.isnan(values[1]).all()
    backend.close()


@pytest.mark.parametrize("step", [0.0, 0.25, 2.0])
def test_sample_top_is_sample(step):
    """Random logits, also coarse ones with many ties: what the likeliest settle is what all of them give."""
    settled = 0
    for seed in range(300):
        random = np.random.default_rng(seed)
        logits = (random.standard_normal(200) * 3).astype(np.float32)
        logits = np.round(logits / step).astype(np.float32) * np.float32(step) if step else logits
        params = SamplingParams(
            temperature=float(random.choice([0.0, 1e-30, 0.7, 3.0])), top_k=int(random.integers(1, 60)),
            top_p=float(random.choice([1.0, 0.9])), min_p=float(random.choice([0.0, 0.05])), seed=seed,
        )  # fmt: skip
        whole, top = (Sampler(params, [3], []) for _ in range(2))
        for generated in range(3):
            count = top.top_needed(generated)
            assert count is not None
            ids = np.lexsort((random.random(200), -logits))[: count + int(random.integers(0, 9))]
            token_id = top.sample_top(logits[ids], ids)
            settled += token_id is not None
            token_id = top.sample(logits, generated) if token_id is None else token_id
            assert token_id == whole.sample(logits, generated)
    assert settled == 900 if step == 0 else 0 < settled < 900


def test_what_the_likeliest_cannot_settle():
    def settle(values: list[float], **params: Any) -> int | None:
        sampler = Sampler(SamplingParams(**params), [], [])
        return sampler.sample_top(np.float32(values), np.arange(len(values))[::-1])

    assert settle([3, 3, 3]) is None
    assert settle([3, 3, 2]) == 1  # the lower id
    assert settle([3, 2, 2, 2], temperature=1, top_k=2) is None
    assert settle([3, 2], temperature=1, top_k=2) is None
    assert settle([3, 2, 1], temperature=1, top_k=1) == 2
    # another logit may be as large as these once divided by the temperature and rounded
    assert settle([1e8, 1.0000001, 1], temperature=1, top_k=2) is None
    assert settle([np.nan, np.nan]) is None
    for params in (
        {"repetition_penalty": 1.1}, {"logprobs": 0}, {"temperature": 1}, {"min_new_tokens": 2},
    ):  # fmt: skip
        assert Sampler(SamplingParams(**params), [7], []).top_needed(1) is None
    assert Sampler(SamplingParams(min_new_tokens=2), [7], []).top_needed(2) == 1 + TIES


def test_logits_that_are_not_finite_end_their_request_only(artifact, monkeypatch):
    step = module.OnnxRuntimeCudaBackend.step

    def spoil(self: Any, first_row: int, *arrays: Any) -> None:
        step(self, first_row, *arrays)
        if first_row == 0 and len(self._last_logits) == 2:
            self._last_logits[1, 5] = np.nan

    monkeypatch.setattr(module.OnnxRuntimeCudaBackend, "step", spoil)
    params = SamplingParams(max_new_tokens=4, ignore_eos=True)
    results = run(artifact.path, [[5], [6]], params, max_batch=2)
    assert [result.finish_reason for result in results] == ["length", "error"]
    assert "not finite" in results[1].error


# without CUDA: what is said


@pytest.mark.skipif(HAS_CUDA, reason="this onnxruntime has CUDA")
def test_onnxruntime_without_cuda(artifact):
    with pytest.raises(
        BackendError, match=r"has no CUDA, only .*CPUExecutionProvider.*relay-attention\[cuda\]"
    ):
        load_backend(NAME, artifact)


def test_onnxruntime_that_cannot_say_where_nodes_run(artifact, monkeypatch):
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: [module.CUDA])
    name = "get_provider_graph_assignment_info"
    owner = next(kind for kind in onnxruntime.InferenceSession.__mro__ if name in vars(kind))
    monkeypatch.delattr(owner, name)
    with pytest.raises(
        BackendError, match=r"cannot say which provider runs which node.*onnxruntime-gpu>=1\.24"
    ):
        load_backend(NAME, artifact)


def test_device_that_is_none(artifact):
    with pytest.raises(BackendError, match="device is 'gpu': it is 'cuda'"):
        load_backend(NAME, artifact, device="gpu")
    with pytest.raises(BackendError, match="threads is 0"):
        load_backend(NAME, artifact, device="cpu", threads=0)


def test_placement(artifact):
    """A session that fell back to the CPU, as a whole or in its RelayAttention nodes, is refused."""
    session = load_backend(NAME, artifact, device="cpu", threads=1)._session
    module.check_placement(session, "CPUExecutionProvider")
    with pytest.raises(BackendError, match=r"could not start CUDAExecutionProvider and took \['CPUExec"):
        module.check_placement(session, module.CUDA)
    claims = SimpleNamespace(
        get_providers=lambda: [module.CUDA, "CPUExecutionProvider"],
        get_provider_graph_assignment_info=session.get_provider_graph_assignment_info,
    )
    with pytest.raises(
        BackendError,
        match=r"2 RelayAttention nodes would not run on CUDA.*'attention_0' on CPUExecutionProv.*RELAY_CUDA",
    ):
        module.check_placement(claims, module.CUDA)


def test_provider_that_fails(artifact, monkeypatch):
    """Its reason is raised, and no other provider is tried."""
    tried = []

    def fail(self: Any, providers: Any, *rest: Any) -> None:
        tried.append(providers)
        raise RuntimeError("CUDA failure 35: driver version is insufficient")

    monkeypatch.setattr(onnxruntime.InferenceSession, "_create_inference_session", fail)
    with pytest.raises(BackendError, match=r"refuses it: CUDA failure 35: driver version is insufficient"):
        load_backend(NAME, artifact, device="cpu")
    assert len(tried) == 1


# the class over a fake of cuda-python


class FakeRuns:
    """ONNX Runtime on the fake GPU's stream: runs happen when the stream is waited for.

    With enable_cuda_graph, a gpu_graph_id of 0 or more is run three times at first, as ONNX Runtime does, and
    then replayed: with the addresses and shapes of the first time, whatever is bound by then.
    """

    def __init__(self, gpu: Any):
        self.gpu = gpu
        self.graphs: dict[tuple[int, int], Any] = {}  # by session and graph id: the captured binding
        self.launches: list[
            str
        ] = []  # "run" or "graph", and the shape of the input_ids, as they were asked for
        self.asked = self.done = 0  # runs of any session
        self.fail: Callable[[int], bool] = lambda graph_id: False  # whether a capture fails

    def run(self, memory: Any, session: Any, io: Any, options: Any) -> None:
        graph_id = int(entry(options, "gpu_graph_id", "-1"))
        captures = session.get_inputs()[0].name == "input_ids"  # not the graph of the likeliest tokens
        assert not captures or options is not None
        bound = dict(io.recorded)  # what is bound later does not count
        if captures and graph_id >= 0:
            if (id(session), graph_id) not in self.graphs and self.fail(graph_id):
                raise RuntimeError("CUDA failure 900: operation not permitted when stream is capturing")
            times = 1 if (id(session), graph_id) in self.graphs else 3
            bound = self.graphs.setdefault((id(session), graph_id), bound)
        else:
            times = 1

        def work() -> None:
            for (_, name), (_, _, dtype, shape, address) in bound.items():
                if name.startswith(("past", "present")):
                    itemsize = 2 if dtype == BFLOAT16 else np.dtype(dtype).itemsize
                    self.gpu.view(address, int(np.prod(shape)) * itemsize)  # not freed yet
            self.done += 1
            made = session.original_io_binding()
            for (kind, name), what in bound.items():
                getattr(made, kind)(name, *what)
            for _ in range(times):
                session.run_with_iobinding(made)

        if captures:
            shape = "x".join(map(str, bound["bind_input", "input_ids"][3]))
            self.launches.append(f"{'run' if graph_id < 0 else 'graph'} {shape}")
        self.asked += 1
        memory._stream._stream.add(work)


def entry(options: Any, name: str, default: str) -> str:
    try:
        return str(options.get_run_config_entry(name))
    except (RuntimeError, AttributeError):
        return default


def recorded_binding(session: Any) -> Any:
    """An IOBinding that remembers what was bound."""
    io = session.original_io_binding()
    io.recorded = {}
    for kind, original in (("bind_input", io.bind_input), ("bind_output", io.bind_output)):

        def bind(name: str, *what: Any, kind: str = kind, original: Any = original) -> None:
            io.recorded[kind, name] = what
            original(name, *what)

        setattr(io, kind, bind)
    return io


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Any]:
    """Device memory of the fake; the session itself is on the CPU and finds it, as it is main memory."""
    fake = imported(TESTS / "tensorrt" / "fake_gpu.py")
    made = fake.Gpu()
    made.runs = FakeRuns(made)
    monkeypatch.setattr(module, "CUDA", "CPUExecutionProvider")
    monkeypatch.setattr(module.DeviceMemory, "device", "cpu")
    monkeypatch.setattr(module.DeviceMemory, "run", lambda memory, *args: made.runs.run(memory, *args))
    monkeypatch.setattr(module, "_inputs_on_host", lambda session: set())
    original = onnxruntime.InferenceSession.io_binding
    monkeypatch.setattr(onnxruntime.InferenceSession, "original_io_binding", original, raising=False)
    monkeypatch.setattr(onnxruntime.InferenceSession, "io_binding", recorded_binding)
    with fake.installed(made, tmp_path / "none.so"):
        yield made
        assert made.runs.done == made.runs.asked  # and on memory that was still there


def load_over_fake(path: Path, **options: Any) -> RelayDecoder:
    return RelayDecoder.load(path, NAME, **({"max_batch": 3, "threads": 1} | options))


@pytest.mark.parametrize("mode", ["static", "input"])
@pytest.mark.parametrize("logits", ["last", "all"])
def test_device_memory(gpu, make_artifact, tmp_path, prompts, mode, logits):
    """Caches, prefix, logits, moves and picks by the calls of cuda-python; everything is freed."""
    artifact = make_artifact(tmp_path / "artifact", mode=mode, logits=logits)
    expected = run(artifact.path, prompts, MIXED, "onnxruntime", prefill_chunk=9)
    with load_over_fake(artifact.path, prefill_chunk=9) as decoder:
        assert decoder.generate(prompts, MIXED) == expected
        held = sum(array.nbytes for array in gpu.memory.values())
        assert held >= decoder.cache_bytes + (decoder.prefix_bytes if mode == "input" else 0)
        backend: Any = decoder._backend
        caches = [*backend._keys, *backend._values]
        assert all(isinstance(cache, module.DeviceArray) for cache in caches)
        assert {cache.address for cache in caches} <= set(gpu.memory)
    del decoder, backend, caches
    assert not gpu.memory


# decode graphs over the fake


def tokens(results: list[Any]) -> list[Any]:
    """All but logits: idle rows beside a row change how the CPU rounds its matrix products."""
    return [(result.token_ids, result.text, result.finish_reason) for result in results]


def shapes_of(launches: list[str], kind: str) -> list[str]:
    return [shape for name, shape in map(str.split, launches) if name == kind]


@pytest.mark.parametrize("mode", ["static", "input"])
@pytest.mark.parametrize("logits", ["last", "all"])
def test_graphs_give_the_same_results(gpu, make_artifact, tmp_path, prompts, mode, logits):
    """Ragged requests that come and go, every kind of sampling: the CPU backend's tokens."""
    artifact = make_artifact(tmp_path / "artifact", mode=mode, logits=logits)
    expected = run(artifact.path, prompts, MIXED, "onnxruntime", max_batch=6)
    for cuda_graph in (None, True, False):
        gpu.runs.launches.clear()
        with load_over_fake(artifact.path, cuda_graph=cuda_graph, max_batch=6, prefill_chunk=9) as decoder:
            backend: Any = decoder._backend
            assert backend.cuda_graph == (cuda_graph is not False)
            assert tokens(decoder.generate(prompts, MIXED)) == tokens(expected)
            assert tokens(decoder.generate(prompts[:2], MIXED[:2])) == tokens(expected[:2])
        replayed = shapes_of(gpu.runs.launches, "graph")
        assert set(replayed) == (set() if cuda_graph is False else {"1x1", "2x1", "4x1", "6x1"})
        assert len(replayed) > 2 * len(set(replayed)) or cuda_graph is False
    del decoder, backend
    gpu.runs.graphs.clear()
    assert not gpu.memory
    assert not gpu.pinned


def test_a_graph_is_captured_once_a_bucket(gpu, artifact):
    with load_over_fake(artifact.path, max_batch=11) as decoder:
        params = SamplingParams(max_new_tokens=12, ignore_eos=True)
        for requests in (11, 9, 3, 11, 2, 1, 10):
            decoder.generate([[5, 6]] * requests, params)
        backend: Any = decoder._backend
        assert sorted(backend._graphs) == [1, 2, 4, 11]
        assert len(gpu.runs.graphs) == 4


def test_another_prefix_is_another_graph(gpu, input_artifact, make_artifact, tmp_path, prompts):
    other = make_artifact(tmp_path / "other", mode="input", text="Be short.")
    params = SamplingParams(max_new_tokens=6)
    with load_over_fake(input_artifact.path, cuda_graph=True) as decoder:
        for path in (input_artifact.path, other.path, input_artifact.path):
            decoder.set_prefix(path)
            expected = run(path, prompts[:3], params, "onnxruntime")
            assert decoder.generate(prompts[:3], params) == expected


@pytest.mark.parametrize("first", [1, 2])
def test_capture_that_fails(gpu, artifact, prompts, first):
    """Without graphs from then on where they were not asked for; said, and nothing is lost."""
    expected = run(artifact.path, prompts, MIXED, "onnxruntime", max_batch=4)
    gpu.runs.fail = lambda graph_id: graph_id >= first
    with load_over_fake(artifact.path, max_batch=4) as decoder:
        backend: Any = decoder._backend
        assert backend.cuda_graph == (first > 1)
        assert tokens(decoder.generate(prompts, MIXED)) == tokens(expected)
        assert not backend.cuda_graph
        assert "could not be captured: ONNX Runtime failed in a step of" in backend.cuda_graph_reason
        assert "not permitted when stream is capturing" in backend.cuda_graph_reason
    if first == 1:
        with pytest.raises(BackendError, match=r"cuda_graph is True, but .* could not be captured.*CUDA"):
            load_over_fake(artifact.path, cuda_graph=True)


def test_model_that_onnxruntime_cannot_capture(gpu, artifact, monkeypatch):
    """It says so when the session is made; another one is made without graphs, unless they were asked for."""
    said = "This session cannot use the graph capture feature as requested by the user as ..."
    original, made = module.open_session, []

    def refuse(artifact: Any, threads: Any, providers: Any, config: Any) -> Any:
        made.append(providers[0][1].get("enable_cuda_graph"))
        if made[-1]:
            raise BackendError(f"model.onnx: ONNX Runtime refuses it: {said}")
        return original(artifact, threads, providers, config)

    monkeypatch.setattr(module, "open_session", refuse)
    with load_over_fake(artifact.path) as decoder:
        backend: Any = decoder._backend
        assert not backend.cuda_graph
        assert said in backend.cuda_graph_reason
        decoder.generate([[5]], SamplingParams(max_new_tokens=3))
    assert made == ["1", None]
    with pytest.raises(BackendError, match=r"cuda_graph is True, but .*cannot use the graph capture feature"):
        load_over_fake(artifact.path, cuda_graph=True)
    said = "out of memory"
    with pytest.raises(BackendError, match="refuses it: out of memory"):
        load_over_fake(artifact.path)


def test_nodes_that_a_graph_would_replay_wrongly(gpu, artifact, monkeypatch):
    """GatherND reads main memory in every run; the exporter's Split in three does not."""
    nodes = [("Split", "layer.0/split"), ("GatherND", "last_token/gather"), ("MatMul", "head")]

    def session(*chosen: tuple[str, str]) -> Any:
        part = SimpleNamespace(
            ep_name="GPU",
            get_nodes=lambda: [SimpleNamespace(op_type=op, name=name, domain="") for op, name in chosen],
        )
        return SimpleNamespace(get_provider_graph_assignment_info=lambda: [part])

    assert "1 nodes whose CUDA kernels" in module.why_not_captured(session(*nodes), "GPU")
    assert "'last_token/gather' (GatherND)" in module.why_not_captured(session(*nodes), "GPU")
    assert module.why_not_captured(session(*nodes), "CPU") == ""
    assert module.why_not_captured(session(nodes[0], nodes[2]), "GPU") == ""
    assert "'split' (Split)" in module.why_not_captured(session(("Split", "split")), "GPU")
    monkeypatch.setattr(module, "why_not_captured", lambda *args: "it has a GatherND")
    with load_over_fake(artifact.path) as decoder:
        assert decoder._backend.cuda_graph_reason == "it has a GatherND"  # type: ignore[attr-defined]
        decoder.generate([[5]], SamplingParams(max_new_tokens=3))
    assert "graph" not in " ".join(gpu.runs.launches)
    with pytest.raises(BackendError, match=r"cuda_graph is True, but .* it has a GatherND"):
        load_over_fake(artifact.path, cuda_graph=True)


def test_only_what_has_changed_is_bound(gpu, artifact, monkeypatch):
    """A decode step that is like the last one binds nothing."""
    with load_over_fake(artifact.path, max_batch=2) as decoder:
        backend: Any = decoder._backend
        token, length = np.int32([[5]]), np.int32([1])
        for first_row in (0, 1):
            for step in range(3):
                if step == 1:
                    binding = backend._graphs[1].binding if first_row == 0 else backend._binding
                    monkeypatch.setattr(binding.io, "bind_input", None)
                    monkeypatch.setattr(binding.io, "bind_output", None)
                backend.step(first_row, token, np.int32([step]), length)
        assert np.isfinite(backend.read_logits()).all()
        monkeypatch.undo()


@pytest.mark.parametrize("cuda_graph", [True, False])
def test_close_waits_for_a_step_that_nobody_read(gpu, artifact, cuda_graph):
    backend = load_backend(NAME, artifact, cuda_graph=cuda_graph)
    backend.allocate(2, 16)
    backend.step(0, np.int32([[5]]), np.int32([0]), np.int32([1]))
    backend.close()
    assert gpu.runs.done == 1 + cuda_graph


def test_buckets():
    assert [batch_bucket(rows, 100) for rows in (1, 2, 3, 5, 8, 9, 16, 17, 99)] == [
        1, 2, 4, 8, 8, 16, 16, 24, 100
    ]  # fmt: skip
    assert batch_bucket(3, 3) == 3


def test_device_cpu_has_no_graphs(artifact):
    with pytest.raises(BackendError, match=r"cuda_graph is True, but .* device is 'cpu'"):
        load_backend(NAME, artifact, device="cpu", cuda_graph=True)
    backend: Any = load_backend(NAME, artifact, device="cpu")
    assert backend.cuda_graph_reason == "device is 'cpu'"
    backend.close()


def test_device_memory_in_place(gpu, artifact):
    """The same caches as on the CPU, slot by slot, after steps and a move."""
    backends: list[Any] = [
        load_backend(NAME, artifact, threads=1), load_backend("onnxruntime", artifact, threads=1)
    ]  # fmt: skip
    for backend in backends:
        backend.allocate(3, 16)
        backend.step(1, np.int32([[5, 6, 7], [8, 0, 0]]), np.int32([0, 0]), np.int32([3, 1]))
        backend.move(1, 0, 2)
        backend.move(2, 0, 0)
    for row in range(3):
        for found, expected in zip(*(backend.read_cache(row, 16) for backend in backends), strict=True):
            np.testing.assert_array_equal(found, expected)
    np.testing.assert_array_equal(*(backend.read_logits() for backend in backends))
    for backend in backends:
        backend.close()


@pytest.mark.parametrize(("context", "query"), [(14, 3), (-1, 2), (0, -1), (0, 4), (2**31 - 1, 3)])
def test_lengths_out_of_range(gpu, artifact, context, query):
    """Refused before they reach the kernels; the next step is not affected."""
    backend = load_backend(NAME, artifact, threads=1)
    backend.allocate(3, 16)
    ids = np.zeros((2, 3), np.int32)
    with pytest.raises(
        BackendError, match=f"row 2: context_lens {context}, query_lens {query} of 3, .* 16 tok"
    ):
        backend.step(1, ids, np.int32([0, context]), np.int32([3, query]))
    backend.step(1, ids, np.int32([0, 13]), np.int32([3, 3]))
    backend.close()


def test_device_memory_that_does_not_suffice(gpu, artifact, monkeypatch):
    gpu.total = 1 << 30
    with pytest.raises(BackendError, match=r"need \d+\.\d\d GiB, 0\.75 GiB are available: at most max_batch"):
        load_over_fake(artifact.path, max_batch=200_000)
    monkeypatch.setattr(module.DeviceMemory, "free", lambda self: None)
    with pytest.raises(BackendError, match=r"caches for max_batch 200000 .*cudaErrorMemoryAllocation"):
        load_over_fake(artifact.path, max_batch=200_000)


def test_no_gpu(gpu, artifact):
    gpu.devices = 0
    with pytest.raises(BackendError, match="no NVIDIA GPU"):
        load_over_fake(artifact.path)
    gpu.devices = 2
    with pytest.raises(BackendError, match="there is no GPU 5; there are 2"):
        load_over_fake(artifact.path, device_id=5)


@pytest.mark.parametrize("index", [0, 1])
def test_provider_options(gpu, index):
    """GPU 0 is not named, every other is."""
    gpu.devices = 2
    memory = module.DeviceMemory(index)
    options = memory.provider_options
    assert options.pop("device_id", "0") == str(index)
    assert set(options) == {"user_compute_stream", "arena_extend_strategy"}
    assert ("device_id" in memory.provider_options) == (index > 0)
    memory.close()


def test_swapped_prefix_is_freed(gpu, input_artifact, make_artifact, tmp_path, prompts):
    other = make_artifact(tmp_path / "other", mode="input", text="Be short.")
    params = SamplingParams(max_new_tokens=6)
    with load_over_fake(input_artifact.path) as decoder:
        before = decoder.generate(prompts[:3], params)
        buffers = len(gpu.memory)
        decoder.set_prefix(other.path)
        assert len(gpu.memory) == buffers
        assert decoder.generate(prompts[:3], params) == run(other.path, prompts[:3], params, "onnxruntime")
        decoder.set_prefix(input_artifact.path)
        assert decoder.generate(prompts[:3], params) == before


# on a GPU


@pytest.fixture(scope="session")
def cuda_box() -> None:
    if not HAS_CUDA:
        pytest.skip("needs onnxruntime-gpu: this onnxruntime has no CUDAExecutionProvider")
    try:
        from relay_attention.runtime import cuda

        cuda.use_device(0)
    except BackendError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="session")
def wide(cuda_box: None, tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str, str], Artifact]:
    """The tiny decoder by mode, logits and dtype; heads of 64, which the CUDA kernels take."""
    tiny = imported(TESTS / "runtime" / "conftest.py")
    tiny.HEAD_DIM = 64
    folder = tmp_path_factory.mktemp("wide")
    kinds = itertools.product(("static", "input"), ("last", "all"), ("float16", "bfloat16", "float32"))
    return {
        kind: tiny.make_artifact(folder / "-".join(kind), mode=kind[0], logits=kind[1], dtype=kind[2])
        for kind in kinds
    }


@pytest.mark.gpu
@pytest.mark.parametrize("mode", ["static", "input"])
@pytest.mark.parametrize("logits", ["last", "all"])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_gpu_steps(wide, mode, logits, dtype):
    """Logits and caches of ragged prefill, decode, moved and idle rows beside the CPU's, within rounding.

    bfloat16 is compared with the same weights in float32, as the CPU has none.
    """
    artifact = wide[mode, logits, dtype]
    on_cpu = wide[mode, logits, "float32" if dtype == "bfloat16" else dtype]
    # rounding the caches alone gives 0.02 and 0.02 in bfloat16 (test_bfloat16_caches)
    loses, cache_loses = (0.15, 0.06) if dtype == "bfloat16" else (0.05, 0.02)
    backends: list[Any] = [load_backend(NAME, artifact), load_backend("onnxruntime", on_cpu, threads=2)]
    ids = np.random.default_rng(0).integers(0, 250, (3, 9)).astype(np.int32)
    steps = [
        (0, ids, [0, 0, 0], [9, 1, 4]), (0, ids[:, :1], [9, 1, 4], [1, 1, 1]), (1, ids[:2], [2, 5], [7, 3]),
        (0, ids[:, :2], [10, 9, 8], [2, 0, 1]),
    ]  # fmt: skip
    for backend in backends:
        backend.allocate(4, 32)
    for first_row, tokens, context_lens, query_lens in steps:
        found = []
        for backend in backends:
            backend.step(first_row, tokens, np.int32(context_lens), np.int32(query_lens))
            found.append(backend.read_logits()[np.array(query_lens) > 0])
        np.testing.assert_allclose(found[0], found[1], atol=loses)
    values, top = backends[0].read_top(5)
    logits_read = backends[0].read_logits()
    np.testing.assert_array_equal(values, -np.sort(-logits_read)[:, :5])
    np.testing.assert_array_equal(np.take_along_axis(logits_read, top, 1), values)
    for backend in backends:
        backend.move(0, 3, 12)
    for row, length in ((0, 12), (1, 9), (2, 9), (3, 12)):
        for found, expected in zip(*(backend.read_cache(row, length) for backend in backends), strict=True):
            np.testing.assert_allclose(found, expected, atol=cache_loses)
    for backend in backends:
        backend.close()


@pytest.mark.gpu
@pytest.mark.parametrize("mode", ["static", "input"])
def test_gpu_tokens(wide, prompts, mode):
    """Decoded on the GPU: the CPU's greedy tokens up to near-ties, and where all logits are read or only the
    likeliest, the same tokens."""
    artifact, params = wide[mode, "last", "float16"], [replace(params, logprobs=None) for params in MIXED]
    greedy = SamplingParams(max_new_tokens=8, ignore_eos=True)
    found, expected = (run(artifact.path, prompts, greedy, name, **options) for name, options in (
        (NAME, {"device": "cuda"}), ("onnxruntime", {})))  # fmt: skip
    differing = sum(a.token_ids != b.token_ids for a, b in zip(found, expected, strict=True))
    assert differing <= 1
    results = [
        [result.token_ids for result in run(artifact.path, prompts, these, device="cuda", max_batch=8)]
        for these in (params, params, [replace(each, logprobs=0) for each in params])
    ]
    assert results[0] == results[1] == results[2]


@pytest.mark.gpu
def test_gpu_graph_of_the_likeliest_tokens_stays_there(cuda_box):
    """Every node that computes is on the GPU, and what it finds is right for a vocabulary of real size."""
    session = onnxruntime.SessionOptions()
    session.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
    made = onnxruntime.InferenceSession(top_tokens_model(), session, providers=[module.CUDA])
    placed = {
        node.op_type: part.ep_name
        for part in made.get_provider_graph_assignment_info()
        for node in part.get_nodes()
    }
    assert {"TopK", "ReduceSum"} <= set(placed)
    assert set(placed.values()) == {module.CUDA}
    logits = np.random.default_rng(0).standard_normal((33, 128256)).astype(np.float32)
    values, ids, _ = made.run(["values", "ids", "sums"], {"logits": logits, "count": np.array([9])})
    np.testing.assert_array_equal(values, -np.sort(-logits)[:, :9])
    np.testing.assert_array_equal(np.take_along_axis(logits, ids, 1), values)


@pytest.mark.gpu
def test_gpu_refuses_float32_with_a_reason(cuda_box, artifact):
    with pytest.raises(BackendError, match="take float16 and bfloat16, this node is float32"):
        load_backend(NAME, artifact)


def plain_and_replayed(artifact: Artifact, max_batch: int, max_context: int) -> list[Any]:
    """The same backend without and with graphs."""
    backends: list[Any] = [load_backend(NAME, artifact, cuda_graph=graph) for graph in (False, True)]
    for backend in backends:
        backend.allocate(max_batch, max_context)
    assert [backend.cuda_graph for backend in backends] == [False, True]
    return backends


@pytest.mark.gpu
@pytest.mark.parametrize("mode", ["static", "input"])
@pytest.mark.parametrize("logits", ["last", "all"])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_gpu_replayed_steps(wide, mode, logits, dtype):
    """Buckets that alternate, idle rows, prefills and moves between the replays, which use the same memory:
    the logits and caches of a backend without graphs."""
    random = np.random.default_rng(1)
    plain, replayed = backends = plain_and_replayed(wide[mode, logits, dtype], 11, 64)
    loses, cache_loses = (0.15, 0.06) if dtype == "bfloat16" else (0.05, 0.02)
    lengths = np.zeros(11, np.int32)

    def step(first_row: int, rows: int, query_lens: Any, sequence: int) -> None:
        ids = random.integers(0, 250, (rows, sequence)).astype(np.int32)
        part = slice(first_row, first_row + rows)
        for backend in backends:
            backend.step(first_row, ids, lengths[part], np.asarray(query_lens, np.int32))
        found, expected = (backend.read_logits() for backend in (replayed, plain))
        assert found.shape == expected.shape
        valid = np.asarray(query_lens) > 0
        np.testing.assert_allclose(found[valid], expected[valid], atol=loses)
        values, _ = replayed.read_top(5)
        np.testing.assert_array_equal(values, -np.sort(-found)[:, :5])
        lengths[part] += np.asarray(query_lens, np.int32)

    step(0, 11, random.integers(1, 10, 11), 9)
    for rows in (1, 4, 3, 1, 11, 2, 4, 8, 3, 11):
        step(0, rows, np.ones(rows, np.int32), 1)
        step(10, 1, [2], 3)  # as a prompt in chunks goes through the last slot
    for backend in backends:
        backend.move(7, 2, 9)
    lengths[2] = 9
    step(0, 5, [1, 0, 1, 1, 1], 1)
    step(0, 5, [1, 1, 1, 1, 1], 1)
    assert sorted(replayed._graphs) == [1, 2, 4, 8, 11]
    assert all(graph.captured for graph in replayed._graphs.values())
    for row in range(11):
        length = int(lengths[row])
        for found, expected in zip(*(each.read_cache(row, length) for each in backends), strict=True):
            np.testing.assert_allclose(found, expected, atol=cache_loses)
    for backend in backends:
        backend.close()


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_gpu_replay_after_another_prefix(wide, tmp_path, dtype):
    """Graphs of the old prefix, longer or shorter, are not replayed."""
    tiny = imported(TESTS / "runtime" / "conftest.py")
    tiny.HEAD_DIM = 64
    other = tiny.make_artifact(tmp_path / "other", mode="input", dtype=dtype, text="Be short.")
    prompts = [[5, 6, 7], [8], [9, 10, 11, 12]]
    params = SamplingParams(max_new_tokens=8, ignore_eos=True)
    artifact = wide["input", "last", dtype]
    with RelayDecoder.load(artifact.path, NAME, max_batch=3, cuda_graph=True) as decoder:
        for _ in range(2):
            for path in (artifact.path, other.path):
                decoder.set_prefix(path)
                found = [result.token_ids for result in decoder.generate(prompts, params)]
                results = run(path, prompts, params, device="cuda", cuda_graph=False)
                assert found == [result.token_ids for result in results]


@pytest.fixture(scope="session")
def exported(cuda_box: None, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Artifacts of scripts/gpu_artifacts.py: those of RELAY_GPU_ARTIFACTS, or made here."""
    given = os.environ.get("RELAY_GPU_ARTIFACTS")
    folder = Path(given) if given else tmp_path_factory.mktemp("exported")

    def find(name: str) -> Path:
        if not given and not folder.joinpath("demo").is_dir():
            for package in ("transformers", "onnx_ir", "onnxruntime_genai"):
                pytest.importorskip(
                    package, reason=f"RELAY_GPU_ARTIFACTS is not set, and there is no {package}"
                )
            command = [sys.executable, str(TESTS.parent / "scripts" / "gpu_artifacts.py"), str(folder)]
            subprocess.run(command, check=True)
        if not (folder / name).is_dir():
            pytest.fail(f"RELAY_GPU_ARTIFACTS has no {name}: make it with scripts/gpu_artifacts.py")
        return folder / name

    return find


def questions(path: Path) -> list[str]:
    """One of every person that the directory in the prefix lists."""
    lines = (path / "system_prompt.txt").read_text(encoding="utf-8").splitlines()
    names = [line.rsplit(" ", 1)[0] for line in lines if line[-4:].isdigit()]
    return [f"What is the extension of {name}?" for name in names]


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["demo", "demo-input", "demo-int4"])
def test_gpu_exported(exported, name):
    """More requests than slots, that end at different times: right answers where the model gives them, the
    same with graphs and without, and beside ONNX Runtime's CPU."""
    path = exported(name)
    requests = questions(path)[:40]
    params = [SamplingParams(max_new_tokens=4 + index % 9) for index in range(len(requests))]
    found = {}
    for graph in (True, False):
        results = run(path, requests, params, device="cuda", cuda_graph=graph, max_batch=13)
        found[graph] = [result.token_ids for result in results]
    expected = [result.token_ids for result in run(path, requests, params, "onnxruntime", max_batch=13)]
    differing = [sum(a != b for a, b in zip(found[graph], expected, strict=True)) for graph in (True, False)]
    assert max(differing) <= (1 if name != "demo-int4" else 6)
    assert sum(a != b for a, b in zip(found[True], found[False], strict=True)) <= 1


def fed_logits(backend: Any, reference: Any) -> Array:
    """Logits [n, new tokens, vocab] of a backend that is fed the prompts and tokens of a reference."""
    lengths, tokens = reference["prompt_lens"], reference["tokens"]
    backend.step(0, reference["prompts"], np.zeros_like(lengths), lengths)
    found = [backend.read_logits().copy()]
    for step in range(tokens.shape[1] - 1):
        fed = np.ascontiguousarray(tokens[:, step : step + 1])
        backend.step(0, fed, lengths + np.int32(step), np.ones_like(lengths))
        found.append(backend.read_logits().copy())
    return np.stack(found, axis=1)


def check_bfloat16(found: Array, reference: Any) -> None:
    """Norms of differences relative to the logits', and tokens where the reference leaves no doubt.

    A CPU that rounds what each node gives has 7e-2 at worst for random prompts and 8e-3 on average.
    """
    expected = reference["logits"]
    off = np.linalg.norm(found - expected, axis=-1) / np.linalg.norm(expected, axis=-1)
    print(f"bfloat16: logits off by {off.mean():.1e} on average, {off.max():.1e} at worst")
    assert off.mean() < 2.5e-2
    assert off.max() < 0.2
    best = np.sort(expected, axis=-1)
    clear = best[..., -1] - best[..., -2] > 0.1 * np.abs(expected).max()
    assert clear.mean() > 0.3
    np.testing.assert_array_equal(found.argmax(-1)[clear], reference["tokens"][clear])


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["demo-bf16", "demo-int4-bf16", "gemma2-bf16"])
def test_gpu_exported_bfloat16(exported, name):
    """Every node on the GPU; logits beside float32's; replayed steps give what plain ones give."""
    path = exported(name)
    reference = np.load(path.with_suffix(".npz"))
    rows = len(reference["prompts"])
    artifact = Artifact.open(path)
    plain, replayed = plain_and_replayed(artifact, rows, 128)
    nodes = [
        (part.ep_name, node.op_type)
        for part in plain._session.get_provider_graph_assignment_info()
        for node in part.get_nodes()
    ]
    assert sum(op_type == "RelayAttention" for _, op_type in nodes) == artifact.manifest.geometry.num_layers
    elsewhere = [op_type for provider, op_type in nodes if provider != module.CUDA]
    assert set(elsewhere) <= {"Constant", "Reshape"}  # int4: weights of the embedding, reshaped once
    found = [fed_logits(backend, reference) for backend in (plain, replayed)]
    check_bfloat16(found[0], reference)
    np.testing.assert_array_equal(found[0], found[1])
    assert replayed._graphs[batch_bucket(rows, rows)].captured
    for backend in (plain, replayed):
        backend.close()
    requests = questions(path)[:40]
    params = [SamplingParams(max_new_tokens=4 + index % 9) for index in range(len(requests))]
    tokens = [
        [
            result.token_ids
            for result in run(path, requests, params, device="cuda", cuda_graph=graph, max_batch=13)
        ]
        for graph in (True, False)
    ]
    assert sum(a != b for a, b in zip(*tokens, strict=True)) <= 1


@pytest.mark.gpu
def test_gpu_exported_bfloat16_prefix(exported):
    """An artifact of a shorter prompt is given this one's prefix, when graphs of its own were captured."""
    reference = np.load(exported("demo-bf16").with_suffix(".npz"))
    backend: Any = load_backend(NAME, Artifact.open(exported("demo-bf16-input")), cuda_graph=True)
    backend.allocate(len(reference["prompts"]), 128)
    before = fed_logits(backend, reference)
    backend.set_prefix(Artifact.open(exported("demo-bf16")).prefix)
    found = fed_logits(backend, reference)
    check_bfloat16(found, reference)
    expected = reference["logits"]
    assert np.linalg.norm(before - expected) > 5 * np.linalg.norm(found - expected)
    backend.close()


@pytest.mark.gpu
def test_gpu_exported_sampling(exported):
    """Random draws with seeds, logits read whole and in part: the same tokens with graphs and without."""
    path = exported("demo")
    requests = questions(path)[: len(MIXED)]
    params = [replace(each, ignore_eos=True) for each in MIXED]
    found, expected = (
        [result.token_ids for result in run(path, requests, params, device="cuda", cuda_graph=graph)]
        for graph in (True, False)
    )
    assert sum(a != b for a, b in zip(found, expected, strict=True)) <= 1


@pytest.mark.gpu
def test_gpu_graphs_where_shapes_are_computed(exported):
    """GPT-2's positions come from shapes, on the CPU: replayed rightly, or the reason is said."""
    path = exported("gpt2")
    prompts = [[5, 6, 7], [8], [9, 10, 11, 12]]
    params = SamplingParams(max_new_tokens=8, ignore_eos=True)
    with RelayDecoder.load(path, NAME, max_batch=3) as decoder:
        backend: Any = decoder._backend
        assert backend.cuda_graph or backend.cuda_graph_reason
        print("gpt2:", backend.cuda_graph_reason or "replayed")
        found = [result.token_ids for result in decoder.generate(prompts, params)]
    expected = [result.token_ids for result in run(path, prompts, params, device="cuda", cuda_graph=False)]
    assert found == expected
