"""The emulated machine refuses what the kernels must not do, and its products are right (machine.cpp)."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent

REFUSED = {
    "results before the wait": "a product of keys is wrong",
    "a changed operand": "an operand in registers changed while a product was under way",
    "no fence": "not fenced",
    "deadlock": "warp 1, lanes 0 to 31: at the barrier in shared memory at byte 16384",
    "too many arrivals": "more arrivals at a barrier than it expects",
    "too many bytes": "a tensor copy brings more bytes than its barrier expects",
    "a copy nobody waits for": "a block ended with tensor copies under way",
    "a barrier overwritten": "this is no barrier in shared memory, or it has been overwritten",
    "different products": "a warpgroup did not issue the same products",
}


@pytest.fixture(scope="module")
def machine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    compiler = os.environ.get("CXX") or shutil.which("g++")
    if compiler is None or platform.machine() not in ("x86_64", "aarch64"):
        pytest.skip("needs g++ on x86-64 or aarch64")
    program = tmp_path_factory.mktemp("machine") / "machine"
    flags = ["-std=c++17", "-O1", "-DRELAY_CUDA_ON_HOST", f"-I{HERE}"]
    sources = [str(HERE / "machine.cpp"), str(HERE / "races.cpp")]
    subprocess.run([compiler, *flags, *sources, "-ldl", "-o", str(program)], check=True)
    return program


def run(machine: Path, name: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([machine, name], capture_output=True, text=True, check=False, timeout=60)


def test_products(machine: Path) -> None:
    done = run(machine, "products")
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("name", REFUSED)
def test_refused(machine: Path, name: str) -> None:
    done = run(machine, name)
    assert done.returncode == 1, done.stderr
    assert REFUSED[name] in done.stdout
