"""scripts/check_tensorrt.py itself, over FAKES of tensorrt and cuda: its steps hold where the engine is
right, fail where it is wrong, and one that dies does not stop the others. It says nothing about TensorRT."""

from __future__ import annotations

import json
import os
import shutil
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
    monkeypatch.setattr(
        check_tensorrt, "mapped_libraries", list
    )  # torch may have loaded them in this process

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
    gpu = Gpu()
    gpu.layer_times = {
        "{ForeignNode[a...node_linear]}": 0.5, "node_linear_3 || node_linear_4": 0.25,
        "RelayAttention.0": 0.125,
        "Reformatting CopyNode for Input Tensor 0 to node_linear_3": 0.0625,
    }  # fmt: skip
    with installed(gpu, tmp_path / "plugin.so"):
        yield made


def rows(capsys: pytest.CaptureFixture[str]) -> list[str]:
    return [line for line in capsys.readouterr().out.splitlines() if line.startswith((OK, FAIL))]


def test_steps(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    large_model.time_backend("onnxruntime", work / "large", work / "peer.npz")
    names = ["build:small", "build:input", "build:large", "agree:small", "large", "large2", "refit", "bind"]
    for name in (*names, "no_cudnn"):
        check_tensorrt.run_step(name, work, 1)
    found = rows(capsys)
    assert len(found) > 20
    assert not [line for line in found if line.startswith(FAIL)]
    assert [": decode only: " in line for line in found if ": build: " in line] == [False, False, True, False]
    one, two = (
        [line.split(": ")[1] for line in found if f" {name}: " in line and "onnxruntime" not in line]
        for name in ("large", "large2")
    )
    assert one == two
    assert one[-1] == "profile by layer"
    assert len(list(work.glob("large*/engine/*.plan"))) == 2, "one plan took the other's place"
    assert (work / "large2/model.onnx").stat().st_ino == (work / "large/model.onnx").stat().st_ino


def test_profile(work: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Any) -> None:
    """By kind, and the slowest layers; one that fails is a row, after all the times."""
    monkeypatch.setattr(large_model, "BATCHES", (1, 8))
    monkeypatch.setattr(check_tensorrt, "PROFILED", 3)
    check_tensorrt.run_step("build:large", work, 1)
    large_model.time_backend("onnxruntime", work / "large", work / "peer.npz")
    capsys.readouterr()
    check_tensorrt.run_step("large", work, 1)
    out = capsys.readouterr().out.splitlines()
    kinds = "0.938 ms: linear layers 0.250, Myelin 0.500, RelayAttention 0.125, the rest 0.062"
    shown = [line.split(": ", 1)[1] for line in out if line.startswith(check_tensorrt.NOTE)]
    assert shown[:3] == [f"profile at batch {batch}: {kinds}" for batch in (1, 2, 8)]
    assert shown[3] == "profile at batch 8: 0.500 ms {ForeignNode[a...node_linear]}"
    assert len(shown) == 7
    assert out[-1].startswith(f"{OK}  large: profile by layer: medians of 3 steps at batch 1, 2, 8")
    monkeypatch.delattr(sys.modules["tensorrt"], "IProfiler")
    check_tensorrt.run_step("large", work, 1)
    found = rows(capsys)
    assert found[-1].startswith(f"{FAIL}  large: profile by layer")
    assert not [line for line in found[:-1] if line.startswith(FAIL)]


def test_refusals(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    check_tensorrt.run_step("build:small", work, 1)
    check_tensorrt.run_step("refused", work, 1)
    found = rows(capsys)
    assert len(found) == 10
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
            if not any(part in line for part in ("decode at", "new process", "offers", "profile by"))
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


def test_a_build_that_took_too_long_is_not_begun_again(work: Path, capsys: Any, monkeypatch: Any) -> None:
    """At a level that takes longer."""
    slow = Step("build:small", [sys.executable, "-c", "import time; time.sleep(60)"], 0, 0.5)
    monkeypatch.setattr(check_tensorrt, "plan_steps", lambda *_: ([slow], []))
    monkeypatch.setattr(check_tensorrt, "START", time.monotonic())
    assert check_tensorrt.check(work, 30, None, 1) == 1
    out = capsys.readouterr().out
    assert "stopped after 0 s" in out
    assert "0 of 1 ok" in out


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
    """Each line's time is its runner's, the compiler's or the library's."""
    lines = [
        (0, "Loaded shared library"),
        (3, "[MemUsageChange] Init builder kernel library: CPU +2954"),
        (3, "--------------- Timing Runner: node_7_copy_input [profile 1] (Reformat[0x80000006])"),
        (3.5, "Tactic: 0x00000000000003e8 Time: 0.0056"),
        (4.5, "Tactic: 0x0000000000000000 Time: 0.0049"),
        (4.5, "--------------- Timing Runner: {ForeignNode[a...b]} (Myelin[0x80000023])"),
        (9, " (foreignNode) Set user's cuda kernel library"),
    ]
    log = "".join(f"TensorRT {at:8.3f} s: {text}\n" for at, text in lines)
    assert check_tensorrt.slowest(log, 3) == [
        "   4.5 s: compiling Myelin, 1 x 4500.0 ms (median; 90th percentile 4500.0)",
        "   3.0 s: loading the builder's kernels, 1 x 3000.0 ms (median; 90th percentile 3000.0)",
        "   1.5 s: timing Reformat, 2 x 750.0 ms (median; 90th percentile 950.0)",
    ]


LAYERS = """TensorRT  199.761 s: Engine Layer Information:
Layer(CaskGemmConvolution): a, Tactic: 0x1, x (Half[-1,256:8,1,1]) -> y (Half[-1,256:8,1,1])
{}
Layer(MyelinReformat): d, Tactic: 0x0, x (Half[-1,1,256]) -> y (Float[-1,1,256])
Layer(Reduce): mean, Tactic: 0x0, x (Float[-1,1,256]) -> y (Float[-1,1,1])
TensorRT  199.762 s: Timing Runner: e (CaskConvolution): Float(256,1) -> Float(256,1)
"""


@pytest.mark.parametrize(
    "types", [("Float", "Float"), ("Half", "Float"), ("Float", "Half"), ("Half", "Half")]
)
def test_linear_layers_in_float32_fail(
    work: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, types: tuple[str, str]
) -> None:
    """A row of their own, before the build's: that the plan is there is what later steps need."""
    from relay_attention.export import build as module

    line = "Layer(CaskConvolution): b || c, Tactic: 0x2, x ({}[-1,256:4,1,1]) -> y ({}[-1,1024:4,1,1])"
    build = module.build_engine

    def logged(*arguments: Any) -> Path:
        print(LAYERS.format(line.format(*types)))
        return build(*arguments)

    monkeypatch.setattr(module, "build_engine", logged)
    check_tensorrt.run_step("build:small", work, 1)
    linear, built = rows(capsys)
    assert built.startswith(f"{OK}  small: build")
    if types == ("Half", "Half"):
        assert linear.startswith(f"{OK}  small: linear layers run in float16: all 2 outside Myelin")
    else:
        assert linear.startswith(FAIL)
        assert "1 of 2 take or give float32: b || c" in linear


def test_libraries_that_are_loaded_fail(
    work: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(check_tensorrt, "mapped_libraries", lambda: ["libcublas.so.12"])
    check_tensorrt.run_step("no_cudnn", work, 1)
    (found,) = rows(capsys)
    assert found.startswith(FAIL)
    assert "libcublas.so.12 loaded nevertheless" in found


def test_libraries_are_hidden(tmp_path: Path) -> None:
    """The linker takes the stand-in for a library that is needed, and its functions are not there; without it
    the library is found where its user says, and seen among what is mapped."""
    compiler = shutil.which("cc") or pytest.skip("no C compiler")
    real = tmp_path / "real"
    real.mkdir()
    (tmp_path / "cudnn.c").write_text("int cudnnCreate(void) { return 7; }")
    (tmp_path / "user.c").write_text("int cudnnCreate(void); int create(void) { return cudnnCreate(); }")
    library, user = real / "libcudnn.so.8", tmp_path / "user.so"
    shared = [compiler, "-shared", "-fPIC"]
    subprocess.run([*shared, f"{tmp_path}/cudnn.c", "-Wl,-soname,libcudnn.so.8", "-o", library], check=True)
    linked = [f"-Wl,-z,lazy,-rpath,{real}", "-o", user]
    subprocess.run([*shared, f"{tmp_path}/user.c", library, *linked], check=True)
    code = (
        "import ctypes, os, sys, check_tensorrt as check;"
        f"user = ctypes._dlopen({str(user)!r}, os.RTLD_LAZY);"
        "print(check.mapped_libraries(), flush=True);"
        "print(ctypes.CDLL(None, handle=user).create())"
    )
    hidden = check_tensorrt.without_libraries(tmp_path / "without")
    path = os.pathsep.join([str(Path(check_tensorrt.__file__).parent), *filter(None, sys.path)])
    found = {
        state: subprocess.run(
            [sys.executable, "-c", code], env=os.environ | {"PYTHONPATH": path} | more,
            capture_output=True, text=True, check=False,
        )
        for state, more in (("seen", {}), ("hidden", hidden))
    }  # fmt: skip
    assert found["seen"].stdout == "['libcudnn.so.8']\n7\n", found["seen"].stderr
    assert found["hidden"].stdout == "[]\n"
    assert "cudnnCreate" in found["hidden"].stderr


def test_path_without_libraries(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LD_LIBRARY_PATH", "/py310/lib:/site/nvidia/cublas/lib:/site/nvidia/cudnn/lib:")
    hidden = check_tensorrt.without_libraries(tmp_path)["LD_LIBRARY_PATH"]
    assert hidden == f"{tmp_path}:/py310/lib"
    assert check_tensorrt.without_libraries(tmp_path)["LD_LIBRARY_PATH"] == hidden, "twice"
    _, then = check_tensorrt.plan_steps(tmp_path, None, 1)
    (step,) = [step for step in then if step.name == "no_cudnn"]
    assert step.environment() == {"LD_LIBRARY_PATH": f"{tmp_path / 'without'}:/py310/lib"}


def test_order(work: Path) -> None:
    """Nothing that builds runs beside anything else; what a step needs comes before it."""
    first, then = check_tensorrt.plan_steps(work, "python", 1)
    assert [step.name for step in first] == ["names", "adapters", "fill"]
    seen = {step.name for step in first}
    for step in then:
        assert seen.issuperset((*step.after, *step.uses)), step.name
        seen.add(step.name)
    usage = (Path(check_tensorrt.__file__).parent / "test_tensorrt.sh").read_text()
    listed = usage.split("that is not there:\n")[1].split("scripts/")[0].replace("#", "").split()
    assert listed == [step.name for step in (*first, *then)]


def chosen(work: Path, *only: str, level: int = 1) -> set[str]:
    first, then = check_tensorrt.plan_steps(work, "python", level)
    return check_tensorrt.choose({step.name: step for step in (*first, *then)}, list(only))


def test_only(work: Path) -> None:
    large = {"large", "build:large", "peer", "fill"}
    assert chosen(work, "large", "names") == large | {"names"}
    assert chosen(work, "large2") == {"large2", "peer", "fill"}
    (work / "peer.npz").touch()
    assert chosen(work, "large") == large - {"peer"}
    assert chosen(work, "large2") == {"large2", "fill"}
    assert chosen(work, "peer") == {"peer", "fill"}
    check_tensorrt.run_step("build:small", work, 1)
    assert chosen(work, "refused") == {"refused"}
    assert chosen(work, "build:small") == {"build:small"}
    assert chosen(work, "refused", level=2) == {"refused", "build:small"}
    with pytest.raises(SystemExit, match=r"no step refuse here; .*refused"):
        chosen(work, "refuse")


def test_a_plan_that_failed_is_not_there(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from relay_attention.export import build

    check_tensorrt.run_step("build:small", work, 1)
    monkeypatch.setattr(build, "build_engine", lambda *_: 1 / 0)
    check_tensorrt.run_step("build:small", work, 1)
    assert chosen(work, "refused") == {"refused", "build:small"}


def test_only_runs_no_other(work: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Any) -> None:
    def one(name: str, *after: str, **more: Any) -> Step:
        return Step(name, [sys.executable, "-c", f"print('ok    {name}: 1')"], 1, 20, after, **more)

    (work / "there").touch()
    steps = ([one("first"), one("fill")], [one("built", "fill", made=work / "there"), one("last", "built")])
    monkeypatch.setattr(check_tensorrt, "plan_steps", lambda *_: steps)
    monkeypatch.setattr(check_tensorrt, "START", time.monotonic())
    assert check_tensorrt.check(work, 60, None, 1, ["last"]) == 0
    out = capsys.readouterr().out
    assert "1 of 1 ok, 0 steps not run" in out
    assert "built: there from before" in out


def test_levels(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Its engines are right, and do not pass for `build:small`'s."""
    check_tensorrt.run_step("build:small", work, 1)
    check_tensorrt.run_step("levels", work, None)
    found = rows(capsys)
    assert len(found) == 9
    assert not [line for line in found if line.startswith(FAIL)]
    assert "no timing cache before" in found[1]
    assert "kB before" in found[2]
    assert chosen(work, "refit") == {"refit", "build:small"}


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
