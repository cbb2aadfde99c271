"""The real TensorRT's Python package, as far as it goes without a GPU: names, and the plugin in its registry.

TensorRT's Logger and plugin registry work on a machine without a GPU; Builder gives None there and Runtime
ends the process, so nothing here makes one. Needs `tensorrt`, and the plugin's library named by
RELAY_ATTENTION_TENSORRT_LIBRARY, or TensorRT's headers to build it against the host's launch interface.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import adapter_host
import numpy as np
import pytest

tensorrt = pytest.importorskip("tensorrt", reason="the Python package tensorrt is not installed")
MAJOR = int(tensorrt.__version__.split(".")[0])

# every name that runtime/tensorrt_backend.py, export/build.py and the check use without asking for it first
NAMES = {
    "ICudaEngine": "create_execution_context get_tensor_name num_io_tensors num_optimization_profiles "
    "serialize",
    "IExecutionContext": "enqueue_emits_profile execute_async_v3 profiler set_input_shape "
    "set_optimization_profile_async set_tensor_address",
    "IProfiler": "report_layer_time",
    "Runtime": "deserialize_cuda_engine",
    "Refitter": "get_missing_weights refit_cuda_engine set_named_weights",
    "Builder": "build_serialized_network create_builder_config create_network create_optimization_profile",
    "IBuilderConfig": "add_optimization_profile builder_optimization_level create_timing_cache "
    "get_tactic_sources get_timing_cache set_flag set_tactic_sources "
    "set_memory_pool_limit "
    "set_preview_feature set_timing_cache",
    "INetworkDefinition": "add_shuffle get_input get_layer get_output num_inputs num_layers num_outputs",
    "IOptimizationProfile": "set_shape",
    "ITimingCache": "serialize",
    "OnnxParser": "get_error num_errors parse_from_file",
    "ParserError": "desc node",
    "ITensor": "allowed_formats name shape",
    "ILayer": "get_input get_output name num_inputs num_outputs set_input type",
    "IShuffleLayer": "reshape_dims",
    "IPluginRegistry": "load_library",
    "BuilderFlag": "REFIT",
    "MemoryPoolType": "WORKSPACE",
    "TensorFormat": "LINEAR",
    "DataType": "FLOAT",
    "LayerType": "CAST IDENTITY CONSTANT SHAPE SHUFFLE GATHER CONCATENATION SLICE PLUGIN_V2 MATRIX_MULTIPLY",
}
if MAJOR < 10:  # networks are not typed
    NAMES["ILayer"] += " precision set_output_type"
    NAMES["ITensor"] += " dtype is_network_output"
    NAMES["DataType"] += " HALF"
    NAMES["BuilderFlag"] += " FP16 OBEY_PRECISION_CONSTRAINTS"
    NAMES["NetworkDefinitionCreationFlag"] = "EXPLICIT_BATCH"


@pytest.mark.parametrize("class_name", NAMES)
def test_names(class_name: str) -> None:
    missing = [name for name in NAMES[class_name].split() if not hasattr(getattr(tensorrt, class_name), name)]
    assert not missing, f"tensorrt {tensorrt.__version__}: {class_name} lacks {missing}"


def test_profiler_can_be_subclassed() -> None:
    class Profiler(tensorrt.IProfiler):  # type: ignore[misc]
        def __init__(self) -> None:
            tensorrt.IProfiler.__init__(self)

        def report_layer_time(self, layer_name: str, ms: float) -> None:
            raise AssertionError("nothing runs here")

    assert Profiler()


def test_dims_are_sequences() -> None:
    dims = tensorrt.Dims((-1, -1, 4096))
    assert tuple(dims) == (-1, -1, 4096)
    assert (len(dims), dims[-1], min(dims)) == (3, 4096, -1)


def test_logger_can_be_subclassed() -> None:
    class Logger(tensorrt.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            tensorrt.ILogger.__init__(self)

        def log(self, severity: Any, message: str) -> None:
            assert severity in (tensorrt.ILogger.Severity.ERROR, tensorrt.ILogger.Severity.INTERNAL_ERROR)

    assert Logger()


@pytest.mark.skipif(MAJOR >= 10, reason="TensorRT 10's Python package is not linked to them")
def test_imported_without_cudnn_and_cublas(tmp_path: Path) -> None:
    """The check's step without them: TensorRT loads, what stands in for them with it, and the plugin."""
    scripts = str(Path(__file__).parents[2] / "scripts")
    code = (
        f"import os, sys; sys.path.insert(0, {scripts!r}); from pathlib import Path;"
        "import check_tensorrt as check;"
        "lazy = len(sys.argv) > 1 and sys.setdlopenflags(os.RTLD_LAZY);"
        "import tensorrt; library = os.environ.get('RELAY_ATTENTION_TENSORRT_LIBRARY');"
        "assert not library or tensorrt.get_plugin_registry().load_library(library);"
        "print(check.mapped_libraries())"
    )
    sys.path.insert(0, scripts)
    try:
        from check_tensorrt import without_libraries
    finally:
        sys.path.remove(scripts)
    hidden = os.environ | without_libraries(tmp_path / "without")
    command = [sys.executable, "-c", code]
    seen = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "libcublas.so.12" in seen.stdout
    assert "libcudnn.so.8" in seen.stdout
    done = subprocess.run([*command, "lazy"], capture_output=True, text=True, check=False, env=hidden)
    assert done.stdout == "[]\n", done.stderr


@pytest.fixture(scope="module")
def creator(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    library = os.environ.get("RELAY_ATTENTION_TENSORRT_LIBRARY")
    if not library:
        headers = [
            folder for folder in adapter_host.header_folders() if adapter_host.major_of(folder) == MAJOR
        ]
        cuda = adapter_host.cuda_include()
        if not headers or not cuda:
            pytest.skip(f"neither the plugin's library nor TensorRT {MAJOR}'s and CUDA's headers are here")
        library = str(adapter_host.build(headers[0], cuda, tmp_path_factory.mktemp("plugin"))[0])
    assert Path(library).is_file()
    registry = tensorrt.get_plugin_registry()
    find = registry.get_creator if hasattr(registry, "get_creator") else registry.get_plugin_creator
    assert find("RelayAttention", "1", "relay") is None
    handle = registry.load_library(library)
    assert handle
    yield find("RelayAttention", "1", "relay")
    registry.deregister_library(handle)
    assert find("RelayAttention", "1", "relay") is None


def fields(**values: Any) -> Any:
    made = []
    for name, value in values.items():
        real = isinstance(value, float)
        array = np.array([value], np.float32 if real else np.int32)
        kind = tensorrt.PluginFieldType.FLOAT32 if real else tensorrt.PluginFieldType.INT32
        made.append(tensorrt.PluginField(name, array, kind))
    return tensorrt.PluginFieldCollection(made)


def test_registry_finds_the_creator(creator: Any) -> None:
    assert (creator.name, creator.plugin_version, creator.plugin_namespace) == (
        "RelayAttention",
        "1",
        "relay",
    )
    names = {field.name for field in creator.field_names}
    assert {"num_heads", "kv_num_heads", "scale", "softcap", "local_window_size", "do_rotary"} <= names


@pytest.mark.skipif(MAJOR >= 10, reason="TensorRT 10 creates and serializes V3 plugins itself")
def test_plugin_through_the_registry(creator: Any) -> None:
    made = creator.create_plugin("layer.3", fields(num_heads=32, kv_num_heads=8, scale=0.5, do_rotary=1))
    assert (made.plugin_type, made.plugin_version, made.plugin_namespace) == ("RelayAttention", "1", "relay")
    assert made.num_outputs == 3
    data = bytes(made.serialize())
    assert len(data) == made.serialization_size
    assert bytes(creator.deserialize_plugin("layer.3", data).serialize()) == data
    assert bytes(made.clone().serialize()) == data
    assert creator.create_plugin("bad", fields(num_heads=30, kv_num_heads=8)) is None
    assert creator.deserialize_plugin("cut", data[:-1]) is None
