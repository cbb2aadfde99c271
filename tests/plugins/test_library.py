"""The library as a file: what it exports, what it needs, and the checks it shares with the other adapters."""

import shutil
import subprocess

import pytest

from relay_attention.plugins import library_path

needs_binutils = pytest.mark.skipif(
    shutil.which("nm") is None or shutil.which("readelf") is None,
    reason="needs nm and readelf (package binutils)",
)


def output_of(*command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


@needs_binutils
def test_exports_the_entry_point_only() -> None:
    lines = output_of("nm", "-D", "--defined-only", str(library_path())).split("\n")
    assert [line.split()[-1] for line in lines if line] == ["RegisterCustomOps"]


@needs_binutils
def test_needs_nothing_but_the_c_library() -> None:
    needed = [
        line.split("[")[1].rstrip("]")
        for line in output_of("readelf", "-d", str(library_path())).split("\n")
        if "(NEEDED)" in line
    ]
    allowed = ("libc.so", "libm.so", "libpthread.so", "libdl.so", "librt.so", "ld-linux")
    assert not [name for name in needed if not name.startswith(allowed)]
