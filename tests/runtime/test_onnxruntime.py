"""The tiny decoder in ONNX Runtime with the op library, against itself in float64 over the whole prompt."""

import dataclasses
import shutil
from pathlib import Path

import numpy as np
import onnx
import pytest

from relay_attention.errors import ArtifactError, BackendError, RelayError
from relay_attention.runtime import Artifact, RelayDecoder, SamplingParams
from relay_attention.runtime import backend as backend_module
from relay_attention.runtime.artifact import FileEntry, IoNames
from relay_attention.runtime.backend import load_backend


@pytest.fixture(scope="module")
def prompts(artifact) -> list[list[int]]:
    generator = np.random.default_rng(3)
    vocab_size = artifact.manifest.geometry.vocab_size
    return [
        generator.integers(0, vocab_size, length).tolist()
        for length in (1, 30, 7, 2, 19, 44, 3, 12, 5, 26, 9)
    ]


@pytest.fixture(scope="module")
def expected(artifact, numpy_decoder, prompts) -> list[list[int]]:
    """Greedy tokens of every prompt, 12 at most."""
    prefix, end = artifact.manifest.prefix.token_ids, artifact.manifest.tokens.eos
    return [numpy_decoder.greedy([*prefix, *prompt], 12, end) for prompt in prompts]


@pytest.fixture
def load(artifact):
    def load_decoder(path=artifact.path, **options) -> RelayDecoder:
        return RelayDecoder.load(path, **({"max_batch": 4, "threads": 2} | options))

    return load_decoder


@pytest.mark.parametrize(
    "options",
    [
        {"max_batch": 1},
        {"max_batch": 3, "prefill_chunk": 5},
        {"max_batch": 4, "threads": 1, "prefill_chunk": 1},
        {"max_batch": 32},
        {"max_batch": 8, "max_context": 200},
    ],
)
def test_greedy_tokens_and_logprobs(load, numpy_decoder, prompts, expected, options):
    """Ragged prompts, more than slots, chunked or not: tokens are equal, log-probabilities within 1e-4."""
    with load(**options) as decoder:
        results = decoder.generate(prompts, SamplingParams(max_new_tokens=12, logprobs=1))
        prefix = decoder.manifest.prefix.token_ids
    assert [result.token_ids for result in results] == expected
    for prompt, result in list(zip(prompts, results, strict=True))[:4]:
        logits, _ = numpy_decoder.run([*prefix, *prompt, *result.token_ids])
        logits = logits[len(prefix) + len(prompt) - 1 : -1]
        logits -= np.log(np.exp(logits).sum(-1, keepdims=True))
        chosen = logits[np.arange(len(result.token_ids)), result.token_ids]
        np.testing.assert_allclose([entry.logprob for entry in result.logprobs], chosen, atol=1e-4)


def test_input_prefix_and_all_logits(load, make_artifact, tmp_path, prompts, expected):
    for mode, logits in (("input", "last"), ("static", "all"), ("input", "all")):
        artifact = make_artifact(tmp_path / f"{mode}-{logits}", mode=mode, logits=logits)
        with load(artifact.path) as decoder:
            results = decoder.generate(prompts, SamplingParams(max_new_tokens=12))
        assert [result.token_ids for result in results] == expected


@pytest.mark.parametrize("mode", ["static", "input"])
def test_float16(load, make_artifact, tmp_path, prompts, numpy_decoder, mode):
    """Caches of half the size; log-probabilities of the tokens it chose, within what float16 loses."""
    artifact = make_artifact(tmp_path / "half", mode=mode, dtype="float16")
    with load(artifact.path) as decoder:
        assert decoder.cache_bytes == 4 * 64 * artifact.manifest.kv_bytes_per_token
        assert artifact.manifest.kv_bytes_per_token == 2 * 2 * 2 * 8 * 2
        results = decoder.generate(prompts, SamplingParams(max_new_tokens=10, logprobs=0, ignore_eos=True))
    prefix = artifact.manifest.prefix.token_ids
    for prompt, result in zip(prompts, results, strict=True):
        logits, _ = numpy_decoder.run([*prefix, *prompt, *result.token_ids])
        logits = logits[len(prefix) + len(prompt) - 1 : -1]
        logits -= np.log(np.exp(logits).sum(-1, keepdims=True))
        chosen = logits[np.arange(len(result.token_ids)), result.token_ids]
        np.testing.assert_allclose([entry.logprob for entry in result.logprobs], chosen, atol=0.05)


def test_hot_swap(load, make_artifact, tmp_path, input_artifact, artifact, numpy_decoder, prompts, expected):
    """Another prefix of another length takes over, for token ids and for strings; and back."""
    other = make_artifact(tmp_path / "other", mode="input", text="Be short.")
    for name in ("model.onnx", "tokenizer.json"):  # not needed for a swap
        (other.path / name).unlink()
    params = SamplingParams(max_new_tokens=8)
    with load(input_artifact.path) as decoder:
        before = decoder.prefix_bytes
        decoder.set_prefix(other.path)
        assert decoder.prefix_bytes < before
        results = decoder.generate([*prompts[:3], "hello"], params)
        asked = decoder.system_prompt.encode("hello")
        tokens, end = other.manifest.prefix.token_ids, other.manifest.tokens.eos
        for prompt, result in zip([*prompts[:3], asked], results, strict=True):
            assert result.token_ids == numpy_decoder.greedy([*tokens, *prompt], 8, end)
        decoder.set_prefix(input_artifact.path)
        assert [r.token_ids for r in decoder.generate(prompts[:3], params)] == [
            tokens[:8] for tokens in expected[:3]
        ]
        foreign = make_artifact(tmp_path / "foreign", seed=1)
        with pytest.raises(ArtifactError, match=r"prefix\.bin: computed by another model"):
            decoder.set_prefix(foreign.path)
        long = make_artifact(tmp_path / "long", mode="input", text="Be kind. " * 50, max_context=8)
        with pytest.raises(ArtifactError, match="exceed the model's 512 positions"):
            decoder.set_prefix(long.path)
        decoder.add_request([1])
        with pytest.raises(RelayError, match="while requests are in flight"):
            decoder.set_prefix(other.path)
        while decoder.busy:
            decoder.step()
        assert [r.token_ids for r in decoder.generate(prompts[:3], params)] == [
            tokens[:8] for tokens in expected[:3]
        ]
    with load() as decoder, pytest.raises(BackendError, match="part of its graph"):
        decoder.set_prefix(artifact.path)


def test_seeded_sampling_in_any_batch(load, prompts):
    """Real logits of real batches: the same seed gives the same tokens alone, in company, in other slots."""
    params = [
        SamplingParams(max_new_tokens=20, temperature=0.9, top_k=60, top_p=0.95, seed=seed, ignore_eos=True)
        for seed in range(len(prompts))
    ]
    runs = []
    for options in ({"max_batch": 1}, {"max_batch": 3, "prefill_chunk": 7}, {"max_batch": 16, "threads": 1}):
        with load(**options) as decoder:
            runs.append([result.token_ids for result in decoder.generate(prompts, params)])
            reverse = decoder.generate(prompts[::-1], params[::-1])
            runs.append([result.token_ids for result in reverse[::-1]])
    assert all(run == runs[0] for run in runs)


def test_caches_are_written_in_place(load, artifact):
    """One allocation, bound as past and as present: the tokens appear in it, and the rest stays zero."""
    backend = load_backend("onnxruntime", artifact, threads=1)
    backend.allocate(3, 16)
    addresses = [cache.ctypes.data for cache in (*backend._keys, *backend._values)]
    assert all(address % 64 == 0 for address in addresses)
    assert backend.cache_bytes == 3 * 16 * artifact.manifest.kv_bytes_per_token
    assert backend.prefix_bytes == artifact.manifest.prefix.length * artifact.manifest.kv_bytes_per_token
    ids = np.int32([[5, 6, 7], [8, 0, 0]])
    backend.step(1, ids, np.int32([0, 0]), np.int32([3, 1]))
    assert backend.read_logits().shape == (2, artifact.manifest.geometry.vocab_size)
    assert [cache.ctypes.data for cache in (*backend._keys, *backend._values)] == addresses
    for cache in (*backend._keys, *backend._values):
        filled = np.abs(cache).sum(axis=(1, 3)) > 0
        assert filled.tolist() == [[False] * 16, [True] * 3 + [False] * 13, [True] + [False] * 15]
    backend.move(1, 0, 2)
    for cache in (*backend._keys, *backend._values):
        np.testing.assert_array_equal(cache[0, :, :2], cache[1, :, :2])
        assert not cache[0, :, 2:].any()
    backend.close()


def test_no_copy_of_the_cache(artifact):
    """Of 2 GB of caches only the (huge) pages of a few tokens are ever touched."""

    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * 4096

    backend = load_backend("onnxruntime", artifact, threads=1)
    backend.allocate(8, 1_000_000)
    assert backend.cache_bytes > 2e9
    before = resident()
    for step in range(3):
        backend.step(0, np.full((8, 1), 5, np.int32), np.full(8, step, np.int32), np.ones(8, np.int32))
    backend.move(7, 2, 3)
    assert resident() - before < 3e8
    backend.close()


def test_rows_are_independent(load, artifact):
    """An idle row is left alone, and does not disturb its neighbour."""
    backend = load_backend("onnxruntime", artifact, threads=1)
    backend.allocate(2, 16)
    backend.step(0, np.int32([[5, 6], [7, 8]]), np.int32([0, 0]), np.int32([2, 0]))
    both = backend.read_logits()[0].copy()
    assert np.isfinite(backend.read_logits()).all()
    assert not any(cache[1].any() for cache in (*backend._keys, *backend._values))
    backend.step(1, np.int32([[5, 6]]), np.int32([0]), np.int32([2]))
    np.testing.assert_allclose(backend.read_logits()[0], both, atol=1e-5)


def test_engine_refusal_is_an_error_of_the_step(artifact):
    backend = load_backend("onnxruntime", artifact, threads=1)
    backend.allocate(1, 4)
    with pytest.raises(BackendError, match="ONNX Runtime failed in a step of 1 rows x 2"):
        backend.step(0, np.int32([[1, 2]]), np.int32([3]), np.int32([2]))
    backend.step(0, np.int32([[1, 2]]), np.int32([0]), np.int32([2]))


def test_too_large_for_memory(load, monkeypatch):
    monkeypatch.setattr(backend_module, "available_memory", lambda: 10**6)
    with pytest.raises(
        BackendError, match=r"max_batch 4096 of max_context 64 .* 0\.06 GiB, 0\.00 GiB are available: at most"
    ):
        load(max_batch=4096)
    monkeypatch.undo()
    with pytest.raises(BackendError, match=r"need \d+\.\d\d GiB.*at most max_batch \d+ fits"):
        load(max_batch=10**8)


def test_weights_too_large_for_copies(load, artifact, monkeypatch):
    """float16 is held in float32 on a CPU; mapped, the same tokens come from less memory."""
    weights = FileEntry(10**6, "0" * 64)
    files = artifact.manifest.files | {"weights.bin": weights}
    for dtype, gib in (("float32", 10**6), ("float16", 2 * 10**6)):
        manifest = dataclasses.replace(artifact.manifest, dtype=dtype, files=files)
        monkeypatch.setattr(backend_module, "available_memory", lambda need=gib: need - 1)
        with pytest.raises(BackendError, match=r"GiB of weights .*mapped_weights=True \(`generate --mapped"):
            load_backend("onnxruntime", dataclasses.replace(artifact, manifest=manifest))
    monkeypatch.undo()
    greedy = SamplingParams(max_new_tokens=5, ignore_eos=True)
    answers = []
    for mapped in (False, True):
        with load(mapped_weights=mapped) as decoder:
            answers.append([result.token_ids for result in decoder.generate([[5, 6, 7], [9]], greedy)])
    assert answers[0] == answers[1]


def test_names_of_inputs_and_outputs_are_the_manifests(artifact, load, tmp_path):
    folder = Path(shutil.copytree(artifact.path, tmp_path / "renamed"))
    manifest = artifact.manifest
    old = dataclasses.asdict(manifest.io)
    new = {field: f"my_{field}" + ("_of_{layer}" if "{layer}" in name else "") for field, name in old.items()}
    layers = range(manifest.geometry.num_layers)
    names = {
        old[field].format(layer=layer): new[field].format(layer=layer) for field in old for layer in layers
    }
    model = onnx.load(folder / "model.onnx", load_external_data=False)
    for value in (*model.graph.input, *model.graph.output, *model.graph.initializer, *model.graph.value_info):
        value.name = names.get(value.name, value.name)
    for node in model.graph.node:
        node.input[:] = [names.get(name, name) for name in node.input]
        node.output[:] = [names.get(name, name) for name in node.output]
    onnx.save(model, folder / "model.onnx")
    files = manifest.files | {"model.onnx": FileEntry.of(folder / "model.onnx")}
    dataclasses.replace(manifest, io=IoNames(**new), files=files).write(folder / "relay.json")
    greedy = SamplingParams(max_new_tokens=5, ignore_eos=True)
    answers = []
    for path in (artifact.path, folder):
        with load(path) as decoder:
            answers.append([result.token_ids for result in decoder.generate([[5, 6, 7], [9]], greedy)])
    assert answers[0] == answers[1]


def test_an_option_that_the_engine_has_not(load):
    with pytest.raises(BackendError, match="has no option 'mapped'; it has threads, mapped_weights"):
        load(mapped=True)


def test_available_memory():
    assert backend_module.available_memory() > 2**20


def test_threads(load):
    with pytest.raises(BackendError, match="threads is 0"):
        load(threads=0)


def test_model_that_is_not_one(load, artifact, tmp_path):
    folder = Path(shutil.copytree(artifact.path, tmp_path / "copy"))
    raw = (folder / "model.onnx").read_bytes()
    (folder / "model.onnx").write_bytes(b"\0" * len(raw))
    with pytest.raises(BackendError, match=r"model\.onnx: ONNX Runtime .* refuses it"):
        load(folder)


def test_names_that_do_not_fit(load, artifact, tmp_path):
    folder = Path(shutil.copytree(artifact.path, tmp_path / "copy"))
    text = (folder / "relay.json").read_text().replace('"logits": "logits"', '"logits": "scores"')
    (folder / "relay.json").write_text(text)
    Artifact.open(folder)
    with pytest.raises(
        BackendError, match=r"outputs do not fit relay.json: missing \['scores'\], unknown \['logits'\]"
    ):
        load(folder)


def test_missing_library(load, monkeypatch, tmp_path):
    monkeypatch.setenv("RELAY_ATTENTION_LIBRARY", str(tmp_path / "none.so"))
    with pytest.raises(BackendError, match="no such file"):
        load()
    (tmp_path / "none.so").write_bytes(b"not a library")
    with pytest.raises(BackendError, match="cannot load the op library"):
        load()
