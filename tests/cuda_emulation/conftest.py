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
CUDA = ROOT / "plugins" / "cuda"
sys.path[:0] = [str(HERE), str(HERE.parent / "gpu")]  # relay_emulation, relay_cuda

KERNELS = {f"kernels_{d}": CUDA / f"kernels_{d}.cu" for d in (32, 64, 96, 128, 192, 256)}
KERNELS |= {f"hopper_{d}": CUDA / f"hopper_{d}.cu" for d in (32, 64, 96, 128)}
MACHINE = {"plan": CUDA / "plan.cpp", "emulation": HERE / "emulation.cpp", "races": HERE / "races.cpp"}
# The calls of -fsanitize=thread, which races.cpp takes, without its library.
INSTRUMENTED = ["-O1", "-g1", "-fsanitize=thread"]
INSTRUMENTED_KERNELS = [f"{kernel}_{d}" for kernel in ("kernels", "hopper") for d in (64, 96, 128)]


def _compile(folder: Path, compiler: str, sources: dict[str, Path], extra: list[str]) -> dict[str, Path]:
    flags = ["-std=c++17", "-O2", "-fPIC", "-DRELAY_CUDA_ON_HOST", "-Wno-unknown-pragmas"]
    flags += [f"-I{HERE}", f"-I{CUDA}", *extra]
    if platform.machine() == "x86_64" and " f16c" in Path("/proc/cpuinfo").read_text():
        flags += ["-mf16c"]

    def compile_one(item: tuple[str, Path]) -> tuple[str, Path]:
        name, source = item
        target = folder / f"{name}.o"
        subprocess.run([compiler, *flags, "-x", "c++", "-c", str(source), "-o", str(target)], check=True)
        return name, target

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return dict(pool.map(compile_one, sources.items()))


def _link(folder: Path, compiler: str, objects: dict[str, Path]) -> Path:
    library = folder / "librelay_emulation.so"
    files = [str(path) for path in objects.values()]
    subprocess.run([compiler, "-shared", *files, "-ldl", "-o", str(library)], check=True)
    return library


def _build(folder: Path, compiler: str) -> Path:
    return _link(folder, compiler, _compile(folder, compiler, KERNELS | MACHINE, []))


@pytest.fixture(scope="session")
def compiler() -> str:
    found = os.environ.get("CXX") or shutil.which("g++")
    if found is None or platform.machine() not in ("x86_64", "aarch64"):
        pytest.skip("needs g++ on x86-64 or aarch64")
    return found


@pytest.fixture(scope="session")
def emulation_library(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    given = os.environ.get("RELAY_EMULATION_LIBRARY")
    if given:
        return Path(given)
    return _build(tmp_path_factory.mktemp("emulation"), request.getfixturevalue("compiler"))


class RaceBuild:
    """Libraries that can look for data races in shared memory (races.h), for some kernels."""

    def __init__(self, folder: Path, compiler: str, ready: Path | None) -> None:
        """ready: folder with what the ordinary library was made of."""
        self.folder, self.compiler = folder, compiler
        sources = {name: KERNELS[name] for name in INSTRUMENTED_KERNELS}
        # First: what several of them define is linked as the first has it.
        self.objects = _compile(folder, compiler, sources, INSTRUMENTED)
        rest = {name: path for name, path in (KERNELS | MACHINE).items() if name not in self.objects}
        if ready is None:
            self.objects |= _compile(folder, compiler, rest, [])
        else:
            self.objects |= {name: ready / f"{name}.o" for name in rest}
        self.library = _link(folder, compiler, self.objects)

    def with_fault(self, name: str, unit: str, file: str, before: str, after: str) -> Path:
        """A library whose translation unit `unit` was compiled with a text in one of its files replaced."""
        folder = self.folder / name
        shutil.copytree(CUDA, folder)
        text = (folder / file).read_text()
        assert text.count(before) == 1, f"not once in {file}: {before}"
        (folder / file).write_text(text.replace(before, after))
        unit_object = _compile(folder, self.compiler, {unit: folder / f"{unit}.cu"}, INSTRUMENTED)
        return _link(folder, self.compiler, unit_object | self.objects | unit_object)

    def program(self, source: Path) -> Path:
        target = self.folder / source.stem
        main = _compile(self.folder, self.compiler, {source.stem: source}, INSTRUMENTED)[source.stem]
        command = [self.compiler, str(main), str(self.objects["races"]), "-ldl", "-o", str(target)]
        subprocess.run(command, check=True)
        return target


@pytest.fixture(scope="session")
def race_build(emulation_library: Path, compiler: str, tmp_path_factory: pytest.TempPathFactory) -> RaceBuild:
    ready = None if os.environ.get("RELAY_EMULATION_LIBRARY") else emulation_library.parent
    return RaceBuild(tmp_path_factory.mktemp("races"), compiler, ready)
