"""Builds the emulation library once a session: the kernels of plugins/cuda, by the host compiler."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
sys.path.insert(0, str(HERE.parent / "gpu"))  # relay_cuda


def _build(folder: Path, compiler: str) -> Path:
    flags = ["-std=c++17", "-O2", "-fPIC", "-DRELAY_CUDA_ON_HOST", "-Wno-unknown-pragmas"]
    flags += [f"-I{HERE}", f"-I{ROOT / 'plugins' / 'cuda'}"]
    if platform.machine() == "x86_64" and " f16c" in Path("/proc/cpuinfo").read_text():
        flags += ["-mf16c"]
    sources = {
        f"kernels_{d}": ROOT / "plugins" / "cuda" / f"kernels_{d}.cu" for d in (32, 64, 96, 128, 192, 256)
    }
    sources |= {f"hopper_{d}": ROOT / "plugins" / "cuda" / f"hopper_{d}.cu" for d in (32, 64, 96, 128)}
    sources |= {"plan": ROOT / "plugins" / "cuda" / "plan.cpp", "emulation": HERE / "emulation.cpp"}

    def compile_one(item: tuple[str, Path]) -> str:
        name, source = item
        target = str(folder / f"{name}.o")
        subprocess.run([compiler, *flags, "-x", "c++", "-c", str(source), "-o", target], check=True)
        return target

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = list(pool.map(compile_one, sources.items()))
    library = folder / "librelay_emulation.so"
    subprocess.run([compiler, "-shared", *objects, "-o", str(library)], check=True)
    return library


@pytest.fixture(scope="session")
def emulation_library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    given = os.environ.get("RELAY_EMULATION_LIBRARY")
    if given:
        return Path(given)
    compiler = os.environ.get("CXX") or shutil.which("g++")
    if compiler is None or platform.machine() not in ("x86_64", "aarch64"):
        pytest.skip("needs g++ on x86-64 or aarch64")
    return _build(tmp_path_factory.mktemp("emulation"), compiler)
