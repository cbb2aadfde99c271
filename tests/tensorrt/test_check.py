"""scripts/check_tensorrt.py itself, over FAKES of tensorrt and cuda: its steps hold where the engine is
right, fail where it is wrong, and one that dies does not stop the others. It says nothing about TensorRT."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from fake_gpu import Gpu, installed
from test_backend import copied, tiny

sys.path.insert(0, str(Path(__file__).parents[2] / "scripts"))
import check_tensorrt
import large_model
from check_tensorrt import FAIL, OK, Step


@pytest.fixture(scope="module")
def artifacts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `make` makes, but of the tiny decoder; not to be changed."""
    work = tmp_path_factory.mktemp("work")
    text = tiny.SYSTEM_PROMPT
    other = text.translate(str.maketrans("a1247", "o5683"))  # as many tokens
    kinds: dict[str, dict[str, Any]] = {
        "small": {}, "other": {"text": other}, "short": {"text": "Be kind."},
        "long": {"text": text * 2}, "input": {"mode": "input"},
    }  # fmt: skip
    for name, options in kinds.items():
        tiny.make_artifact(work / name, dtype="float16", max_context=128, **options)
    copied(work / "small", work / "large")
    return work


@pytest.fixture
def work(artifacts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    made = copied(artifacts, tmp_path / "work")
    (tmp_path / "plugin.so").write_bytes(b"")
    for name, value in {"BATCHES": (1, 3), "CONTEXT": 16, "REPETITIONS": 1}.items():
        monkeypatch.setattr(large_model, name, value)
    monkeypatch.setattr(check_tensorrt, "PROMPTS", check_tensorrt.PROMPTS[:6])
    monkeypatch.setattr(check_tensorrt, "TIE", 5e-3)

    def in_this_process(command: list[str], **options: Any) -> Any:
        """The fakes are here only."""
        with pytest.MonkeyPatch.context() as patch:
            for name, value in (options.get("env") or {}).items():
                patch.setenv(name, value)
            try:
                found = check_tensorrt.tokens(Path(command[-1]), "tensorrt")
            except Exception as error:
                return SimpleNamespace(stderr=f"BackendError: {error}")
            return SimpleNamespace(stdout=json.dumps(found))

    monkeypatch.setattr(subprocess, "run", in_this_process)
    with installed(Gpu(), tmp_path / "plugin.so"):
        yield made


def rows(capsys: pytest.CaptureFixture[str]) -> list[str]:
    return [line for line in capsys.readouterr().out.splitlines() if line.startswith((OK, FAIL))]


def test_steps(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    large_model.time_backend("onnxruntime", work / "large", work / "peer.npz")
    names = ["build:small", "build:input", "build:large", "agree:small", "large", "refit", "bind", "no_cudnn"]
    for name in names:
        check_tensorrt.run_step(name, work, 1)
    found = rows(capsys)
    assert len(found) > 20
    assert not [line for line in found if line.startswith(FAIL)]


def test_refusals(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    check_tensorrt.run_step("build:small", work, 1)
    check_tensorrt.run_step("refused", work, 1)
    found = rows(capsys)
    assert len(found) == 11
    assert not [line for line in found if line.startswith(FAIL)]


def test_wrong_results_fail(work: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Any) -> None:
    large_model.time_backend("onnxruntime", work / "large", work / "peer.npz")
    for name in ("build:small", "build:input", "build:large"):
        check_tensorrt.run_step(name, work, 1)
    from relay_attention.runtime.tensorrt_backend import TensorRTBackend

    read = TensorRTBackend.read_logits
    monkeypatch.setattr(TensorRTBackend, "read_logits", lambda self: np.roll(read(self), 1, axis=-1))
    capsys.readouterr()
    for name in ("agree:small", "large", "refit", "bind"):
        check_tensorrt.run_step(name, work, 1)
        found = [
            line
            for line in rows(capsys)
            if not any(part in line for part in ("decode at", "new process", "offers"))
        ]
        wrong = [line for line in found if line.startswith(OK) and "refused" not in line]
        assert not wrong, "not noticed"


def test_a_failed_build_is_tried_once_more(work: Path, tmp_path: Path, capsys: Any, monkeypatch: Any) -> None:
    """Only for what follows: its row stays."""
    good, bad = (f"print('{state}  small: build: 1')" for state in (OK, FAIL))
    script = tmp_path / "script.py"
    script.write_text(f"import sys\n{good} if 'rebuild:small' in sys.argv else {bad}\n")
    step = Step("build:small", [sys.executable, str(script), "step"], 1, 20)
    then = Step("then", [sys.executable, "-c", "print('ok    then: 1')"], 0, 20, ("build:small",))
    monkeypatch.setattr(check_tensorrt, "plan_steps", lambda *_: ([step], [then]))
    monkeypatch.setattr(check_tensorrt, "__file__", str(script))
    monkeypatch.setattr(check_tensorrt, "START", time.monotonic())
    assert check_tensorrt.check(work, 60, None, 1) == 1
    assert "2 of 3 ok, 0 steps not run" in capsys.readouterr().out
    capsys.readouterr()
    check_tensorrt.run_step("rebuild:small", work, None)
    assert rows(capsys)[0].startswith(OK)


def step(tmp_path: Path, code: str, limit: float = 20.0) -> Step:
    made = Step("it", [sys.executable, "-c", code], 1, limit)
    made.run(time.monotonic() + 30, tmp_path / "it.log")
    return made


def test_a_step_that_dies_has_a_row(tmp_path: Path) -> None:
    said = step(tmp_path, "print('ok    one: 1')")
    assert (said.state, said.rows) == ("ok", ["ok    one: 1"])
    died = step(tmp_path, "import os; print('ok    one: 1', flush=True); os.abort()")
    assert died.state == "FAIL"
    assert "ended with -6" in died.rows[-1]
    silent = step(tmp_path, "print('nothing')")
    assert silent.state == "FAIL"
    slow = step(tmp_path, "import time; time.sleep(60)", limit=0.5)
    assert "stopped after" in slow.rows[-1]


def test_time_is_up(work: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Any) -> None:
    monkeypatch.setattr(check_tensorrt, "START", time.monotonic() - 100)
    first = [Step("first", [sys.executable, "-c", "print('ok    first: 1')"], 1, 20)]
    then = [Step("second", ["false"], 30, 20), Step("third", ["false"], 0, 20, ("second",))]
    monkeypatch.setattr(check_tensorrt, "plan_steps", lambda *_: (first, then))
    assert check_tensorrt.check(work, 110, None, 1) == 1
    out = capsys.readouterr().out
    assert "not run, time was up: second" in out
    assert "not run, needs second: third" in out
    assert "1 of 1 ok, 2 steps not run" in out


def test_slowest() -> None:
    log = "".join(
        f"TensorRT {at:8.3f} s: {text}\n" for at, text in ((0, "a"), (1, "Tactic 3"), (5, "Tactic 44"))
    )
    assert check_tensorrt.slowest(log) == ["   5.0 s in 2 x until 'Tactic #'"]


def test_hollow_and_filled(artifacts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A filled artifact opens, its hashes are right, small tensors are as they were."""
    from relay_attention.runtime.artifact import Artifact

    folder = copied(artifacts / "small", tmp_path / "large")
    if not (folder / "weights.bin").is_file():  # the tiny decoder keeps its weights in the graph
        monkeypatch.setattr(large_model, "_weights", lambda folder: iter(()))
        (folder / "weights.bin").write_bytes(b"kept")
        manifest = json.loads((folder / "relay.json").read_text())
        manifest["files"]["weights.bin"] = {"bytes": 4, "sha256": ""}
        (folder / "relay.json").write_text(json.dumps(manifest))
    monkeypatch.setattr(large_model, "RANDOM_FROM", 1)
    before = Artifact.open(folder).prefix.read()[0][0].astype(np.float32)
    large_model.hollow(folder)
    assert not (folder / "prefix.bin").exists()
    large_model.fill(folder)
    filled = Artifact.open(folder)
    filled.check_hashes()
    after = filled.prefix.read()[0][0].astype(np.float32)
    assert (folder / "weights.bin").read_bytes() == b"kept"
    assert not np.array_equal(before, after)
    assert after.std() == pytest.approx(before.std(), rel=0.3)
