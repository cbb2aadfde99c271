"""Builds a TensorRT adapter and the test host for it with g++, and drives the one through the other by
ctypes.

Not TensorRT: test_host.cc makes the calls that TensorRT's registry, builder and execution context would make.
The plugin's launch interface is launch_on_host.cc, plain loops over host memory, so no GPU is needed either.
"""

from __future__ import annotations

import ctypes
import os
import re
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

ROOT = Path(__file__).parents[2]
HERE = Path(__file__).parent / "host"

# nvinfer1's numbers, which every major keeps
FLOAT, HALF, INT32, BF16 = 0, 1, 3, 7
FIELD_FLOAT32, FIELD_FLOAT64, FIELD_INT32, FIELD_CHAR, FIELD_INT64 = 1, 2, 5, 6, 10
LINEAR = 0

Array = npt.NDArray[Any]


def header_folders() -> list[Path]:
    """Folders with NvInferRuntime.h, named by TENSORRT_ROOT (colon-separated) or in the system's include
    folder."""
    roots = [Path(root) for root in os.environ.get("TENSORRT_ROOT", "").split(":") if root]
    places = [place for root in roots for place in (root, root / "include")]
    places += [
        Path("/usr/include/x86_64-linux-gnu"),
        Path("/usr/include"),
        Path("/usr/local/tensorrt/include"),
    ]
    return [place for place in places if (place / "NvInferRuntime.h").is_file()]


def cuda_include() -> Path | None:
    """Folder of cuda_runtime_api.h, which TensorRT's headers include."""
    nvcc = shutil.which("nvcc")
    roots = [os.environ.get("CUDA_HOME", ""), str(Path(nvcc).parents[1]) if nvcc else "", "/usr/local/cuda"]
    roots += [str(path) for path in sorted(Path("/usr/local").glob("cuda-*"), reverse=True)]
    return next(
        (
            Path(root) / "include"
            for root in roots
            if root and (Path(root) / "include/cuda_runtime_api.h").is_file()
        ),
        None,
    )


def major_of(headers: Path) -> int:
    match = re.search(
        r"define (?:NV_TENSORRT_MAJOR|TRT_MAJOR_ENTERPRISE) +(\d+)",
        (headers / "NvInferVersion.h").read_text(),
    )
    assert match, headers
    return int(match.group(1))


def build(headers: Path, cuda: Path, folder: Path, emulation: Path | None = None) -> tuple[Path, Path]:
    """Compiles plugin and host for one TensorRT; returns the libraries.

    The plugin's kernels are launch_on_host.cc, or with the library of tests/cuda_emulation those of
    plugins/cuda.
    """
    adapter = "plugin_v2.cc" if major_of(headers) < 10 else "plugin_v3.cc"
    sources = [
        ROOT / "plugins/tensorrt" / name
        for name in (adapter, "layer.cc", "config.cc", "log.cc", "barrier.cc")
    ]
    sources += [ROOT / "plugins/common/op.cc", HERE / "cuda_runtime_on_host.cc"]
    sources += [
        HERE / ("launch_emulated.cc" if emulation else "launch_on_host.cc"),
        *filter(None, [emulation]),
    ]
    options = ["-static-libstdc++", "-static-libgcc", "-Wl,--exclude-libs,ALL"]
    options += [f"-Wl,-rpath,{emulation.parent}"] if emulation else []
    options += [f"-Wl,--version-script={HERE / 'exports.map'}"]
    plugin = folder / f"plugin{major_of(headers)}.so"
    _compile(headers, cuda, sources, plugin, options)
    return plugin, build_host(headers, cuda, folder)


def build_host(headers: Path, cuda: Path, folder: Path) -> Path:
    """Compiles test_host.cc for one TensorRT."""
    library = folder / f"host{major_of(headers)}.so"
    _compile(headers, cuda, [HERE / "test_host.cc"], library, [])
    return library


def _compile(headers: Path, cuda: Path, sources: list[Path], library: Path, options: list[str]) -> None:
    """A shared library, with warnings as errors."""
    flags = ["-std=c++17", "-O1", "-fPIC", "-shared", "-fvisibility=hidden", "-Wall", "-Wextra", "-Werror"]
    flags += ["-Wno-deprecated-declarations", f"-I{ROOT}", "-isystem", str(headers), "-isystem", str(cuda)]
    command = ["g++", *flags, "-Wl,--no-undefined", *options, *map(str, sources), "-o", str(library), "-ldl"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr


class Host:
    """test_host.cc loaded for one TensorRT major, with the plugin's library opened in it."""

    def __init__(self, plugin: Path, host: Path):
        self.plugin_path = plugin
        self.library = ctypes.CDLL(str(host))
        self.plugin_library = ctypes.CDLL(str(plugin))
        for name in ("open", "create", "clone", "deserialize"):
            getattr(self.library, f"host_{name}").restype = ctypes.c_void_p
        for name in ("log", "describe", "identity"):
            getattr(self.library, f"host_{name}").restype = ctypes.c_char_p
        for name in ("serialize", "workspace"):
            getattr(self.library, f"host_{name}").restype = ctypes.c_int64
        self.major = self.library.host_tensorrt_major()
        error = ctypes.create_string_buffer(1024)
        self.handle = ctypes.c_void_p(self.library.host_open(str(plugin).encode(), error, 1024))
        assert self.handle.value, error.value

    def log(self) -> str:
        """What the plugin logged since the last call."""
        return str(self.library.host_log().decode())

    def describe(self) -> str:
        return str(self.library.host_describe(self.handle).decode())

    def live_allocations(self) -> int:
        return int(self.plugin_library.host_live_allocations())

    def create(self, layer: str = "layer.3", **fields: Any) -> Plugin | None:
        """A plugin from fields: int -> int32, float -> float32, or (numpy array, field type) as given."""
        names, data, types, lengths, keep = [], [], [], [], []
        for name, value in fields.items():
            if isinstance(value, tuple):
                array, kind = value
            elif isinstance(value, float):
                array, kind = np.array([value], np.float32), FIELD_FLOAT32
            else:
                array, kind = np.array([value], np.int32), FIELD_INT32
            keep.append(array)
            names.append(name.encode())
            data.append(array.ctypes.data)
            types.append(kind)
            lengths.append(array.size)
        count = len(names)
        made = self.library.host_create(
            self.handle, layer.encode(), count, (ctypes.c_char_p * count)(*names), (ctypes.c_void_p *
            count)(*data), (ctypes.c_int32 * count)(*types), (ctypes.c_int32 * count)(*lengths),
        )  # fmt: skip
        return Plugin(self, made) if made else None

    def deserialize(self, data: bytes, layer: str = "from plan") -> Plugin | None:
        made = self.library.host_deserialize(self.handle, layer.encode(), data, ctypes.c_int64(len(data)))
        return Plugin(self, made) if made else None


class Plugin:
    """One plugin object, driven as TensorRT drives it."""

    def __init__(self, host: Host, pointer: int):
        self.host = host
        self.pointer = ctypes.c_void_p(pointer)

    def call(self, name: str, *arguments: Any) -> int:
        return int(getattr(self.host.library, f"host_{name}")(self.pointer, *arguments))

    def identity(self) -> str:
        return str(self.host.library.host_identity(self.pointer).decode())

    def clone(self) -> Plugin:
        return Plugin(self.host, self.host.library.host_clone(self.pointer))

    def destroy(self) -> None:
        self.host.library.host_destroy(self.pointer)

    def serialize(self) -> bytes:
        size = self.call("serialize", None, ctypes.c_int64(0))
        buffer = ctypes.create_string_buffer(size)
        assert self.call("serialize", buffer, ctypes.c_int64(size)) == size
        return buffer.raw

    def output_shapes(self, shapes: Sequence[Sequence[int]]) -> list[list[int]] | None:
        """Shapes of the outputs from those of the inputs, -1 for what is known at run time only; None if
        refused."""
        out_shapes, out_ranks = np.zeros((3, 8), np.int64), np.zeros(3, np.int32)
        table, ranks = _shapes(shapes)
        if (
            self.call("output_shapes", len(shapes), _at(table), _at(ranks), _at(out_shapes), _at(out_ranks))
            != 0
        ):
            return None
        return [out_shapes[i, : out_ranks[i]].tolist() for i in range(3)]

    def output_types(self, types: Sequence[int]) -> list[int]:
        found = np.zeros(3, np.int32)
        given = np.array(types, np.int32)
        assert self.call("output_types", len(types), _at(given), _at(found)) == 0
        return [int(kind) for kind in found]

    def supports(
        self, position: int, types: Sequence[int], inputs: int, outputs: int = 3, form: int = LINEAR
    ) -> bool:
        given = np.array([*types, *[0] * 16][: inputs + outputs], np.int32)
        formats = np.full(inputs + outputs, form, np.int32)
        return bool(self.call("supports", position, inputs, outputs, _at(given), _at(formats)))

    def configure(self, shapes: Sequence[Sequence[int]], types: Sequence[int]) -> int:
        table, ranks, given = *_shapes(shapes), np.array(types, np.int32)
        return self.call("configure", len(shapes) - 3, _at(table), _at(ranks), _at(given))

    def workspace(self, shapes: Sequence[Sequence[int]], types: Sequence[int]) -> int:
        table, ranks, given = *_shapes(shapes), np.array(types, np.int32)
        return self.call("workspace", len(shapes) - 3, _at(table), _at(ranks), _at(given))

    def enqueue(self, tensors: Sequence[Any], types: Sequence[int], workspace: Any, stream: int = 0) -> int:
        """tensors: inputs, then the three outputs, as arrays or torch tensors. Returns what enqueue
        returned."""
        table, ranks = _shapes([tensor.shape for tensor in tensors])
        given, inputs = np.array(types, np.int32), len(tensors) - 3
        addresses = [_address(tensor) for tensor in tensors]
        input_addresses = (ctypes.c_void_p * inputs)(*addresses[:inputs])
        output_addresses = (ctypes.c_void_p * 3)(*addresses[inputs:])
        scratch, on = ctypes.c_void_p(_address(workspace)), ctypes.c_void_p(stream)
        tables = (_at(table), _at(ranks), _at(given))
        return self.call("enqueue", inputs, *tables, input_addresses, output_addresses, scratch, on)


def _address(tensor: Any) -> int:
    """Of a NumPy array, or of a torch tensor on the GPU."""
    return int(tensor.data_ptr() if hasattr(tensor, "data_ptr") else tensor.ctypes.data)


def _at(array: Array) -> ctypes.c_void_p:
    return ctypes.c_void_p(array.ctypes.data)


def _shapes(shapes: Sequence[Sequence[int]]) -> tuple[Array, Array]:
    table = np.zeros((len(shapes), 8), np.int64)
    for row, shape in enumerate(shapes):
        table[row, : len(shape)] = shape
    return table, np.array([len(shape) for shape in shapes], np.int32)
