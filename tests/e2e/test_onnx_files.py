"""Model families as ONNX files of other tools: family by source, for docs/models.md.

A few are run every time; all of them with `--models-table`, which writes the document. optimum needs an older
transformers, and so a Python of its own: it runs only with `--optimum-python` as well. Where an exporter has
left something out of a model, the artifact must be right for the model without it.
"""

from __future__ import annotations

from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import onnx
import onnx_decoders as d  # conftest.py has loaded it
import onnxruntime
import pytest
from families import (  # likewise
    FAMILIES,
    HEAD_DIM,
    NOT_MADE,
    OPTIMUM,
    OWN,
    REFUSED,
    RIGHT,
    SOURCES,
    SPOKEN_OF,
    WRONG,
    for_builder,
    omissions,
    without,
)
from torch_exports import NotMade, make_onnx, make_optimum  # likewise

from relay_attention.errors import ExportError
from relay_attention.export import export_model, verify
from relay_attention.runtime import RelayDecoder, SamplingParams
from relay_attention.runtime.artifact import Artifact
from relay_attention.runtime.backend import load_backend

REQUESTS, NEW_TOKENS = 4, 6
PROMPTS = [np.random.default_rng(n).integers(3, 384, n).tolist() for n in (1, 14, 3, 9)]
ALWAYS = [
    ("gemma2", "genai fp16"),
    ("mistral", "genai fp16 for CPU"),
    ("qwen2", "genai int4"),
    ("gpt2", "torch 17"),
    ("smollm3", "torch 18"),
    ("gemma3", "torch 24"),
    ("qwen3", "TorchScript 17"),
]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "source" in metafunc.fixturenames:
        every = metafunc.config.getoption("models_table", False)
        pairs = [(family, source) for family in FAMILIES for source in SOURCES] if every else ALWAYS
        metafunc.parametrize(("family", "source"), pairs)


def test_family_as_onnx_file(
    tiny: ModuleType,
    family: str,
    source: str,
    tmp_path: Path,
    models_table: Any,
    pytestconfig: pytest.Config,
    capsys: pytest.CaptureFixture[str],
) -> None:
    python = pytestconfig.getoption("optimum_python", None)
    if source == OPTIMUM and not python:
        pytest.skip("needs --optimum-python")
    title, config = FAMILIES[family]
    folder = tiny.make_model(tmp_path / "model", config())
    try:
        file = _make(tiny, tmp_path / "onnx", folder, family, source, python)
    except NotMade as error:
        outcome, reason = NOT_MADE, str(error)
    else:
        capsys.readouterr()
        outcome, reason = _outcome(tiny, tmp_path, folder, file, family, source)
        if outcome in SPOKEN_OF:
            assert f"warning: {file}" in capsys.readouterr().err
    assert outcome != WRONG, reason
    # which outcome it should be, test_table.py knows from the document
    models_table.row(family, title).files[source] = (outcome, reason.replace(f"{tmp_path}/", ""))


def _make(tiny: ModuleType, folder: Path, model: Path, family: str, source: str, python: str | None) -> Path:
    if source == OPTIMUM:
        assert python is not None
        return make_optimum(folder, model, python)
    if "precision" in SOURCES[source]:
        try:
            tiny.make_genai(folder, for_builder(model, folder.with_name("prepared")), **SOURCES[source])
        except (NotImplementedError, KeyError) as error:
            raise NotMade(f"{type(error).__name__}: {error}") from error
        return _exact(folder) if source == "genai int4" else folder
    # transformers' attention through torch's own has no softcap
    return make_onnx(folder, model, attention="eager" if family == "gemma2" else "sdpa", **SOURCES[source])


def _exact(folder: Path) -> Path:
    """Activations in float32: in int8, the builder's choice, last bits of a sum decide a rounding."""
    graph = onnx.load(folder / "model.onnx", load_external_data=False)
    for node in graph.graph.node:
        for attribute in node.attribute:
            if attribute.name == "accuracy_level":
                attribute.i = 1
    onnx.save(graph, folder / "model.onnx")
    return folder


def _outcome(
    tiny: ModuleType, tmp_path: Path, folder: Path, file: Path, family: str, source: str
) -> tuple[str, str]:
    """What became of the file, and why."""
    try:
        output = export_model(file, tiny.SYSTEM_PROMPT, tmp_path / "out", template="plain", threads=1)
    except ExportError as error:
        return REFUSED, str(error)
    assert Artifact.open(output).manifest.prefix.length > 3 * tiny.WINDOW
    if source == "genai int4":
        return _as_its_own_graph(file, output)
    report = verify(output, folder, requests=REQUESTS, new_tokens=NEW_TOKENS, threads=1)
    if report.ok:
        return RIGHT, ""
    for omission in omissions(family):
        reference = tiny.make_model(tmp_path / omission.split(",")[0], without(family, omission))
        if verify(output, reference, requests=REQUESTS, new_tokens=NEW_TOKENS, threads=1).ok:
            return omission, ""
    if family == "smollm3" and "precision" in SOURCES[source] and _logits_as_its_own_graph(file, output):
        return OWN, ""
    return WRONG, report.table()


def _logits_as_its_own_graph(file: Path, output: Path) -> bool:
    """Whether the logits after every prompt are those of the source graph, to the rounding of float16."""
    artifact, session = Artifact.open(output), onnxruntime.InferenceSession(_own_graph(file))
    backend = load_backend("onnxruntime", artifact, threads=1)
    backend.allocate(1, 64)
    close = []
    for prompt in PROMPTS:
        whole = np.array([[*artifact.manifest.prefix.token_ids, *prompt]], np.int64)
        expected = session.run(["logits"], d._feeds(session, whole))[0][0, -1].astype(np.float32)
        backend.step(0, np.int32([prompt]), np.int32([0]), np.int32([len(prompt)]))
        close.append(np.abs(backend.read_logits()[0] - expected).max() < 3e-2 * np.abs(expected).max())
    backend.close()
    return all(close)


def _as_its_own_graph(file: Path, output: Path) -> tuple[str, str]:
    """Quantised weights are not the model's: the reference is the source graph, with the full prompts."""
    prefix = Artifact.open(output).manifest.prefix.token_ids
    with RelayDecoder.load(output, max_batch=3, threads=1) as decoder:
        greedy = SamplingParams(max_new_tokens=NEW_TOKENS, ignore_eos=True)
        found = [result.token_ids for result in decoder.generate(PROMPTS, greedy)]
    graph = onnx.load_from_string(_own_graph(file))
    expected = d.greedy(graph, [[*prefix, *prompt] for prompt in PROMPTS], NEW_TOKENS)
    return (RIGHT, "") if found == expected else (WRONG, f"{found} instead of {expected}")


def _own_graph(file: Path) -> bytes:
    """The builder's graph in a form that takes empty caches."""
    graph = onnx.load(file / "model.onnx")
    for value in graph.graph.input:  # the builder does not state the size of heads
        if value.name.startswith("past_key_values"):
            value.type.tensor_type.shape.dim[3].dim_value = HEAD_DIM
    for node in graph.graph.node:  # a ring of one window's keys, which empty caches are not
        kept = [attribute for attribute in node.attribute if attribute.name != "sliding_window_cache"]
        del node.attribute[:]
        node.attribute.extend(kept)
    return bytes(graph.SerializeToString())
