"""FAKES of `tensorrt` and `cuda.bindings.runtime` over host memory, to test what calls them without a GPU.

Not TensorRT. Device memory is host memory in which every access is checked against what was allocated. Work
is queued and runs when the stream is waited for, so that a wait that was forgotten gives wrong results. An
engine is the artifact's model.onnx in ONNX Runtime on the CPU, with the layers that were added and operands
as they were set, run at the addresses and shapes that were bound. Only names that the real modules have are
here: an attribute that a version lacks is an AttributeError, as it would be there.
"""

from __future__ import annotations

import ctypes
import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from enum import Enum
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import helper, numpy_helper

INT32, INT64, BOOL = onnx.TensorProto.INT32, onnx.TensorProto.INT64, onnx.TensorProto.BOOL
# layers of onnx-tensorrt 8.6; the others are elementwise
KINDS = {
    "Cast": "CAST", "Gather": "GATHER", "GatherND": "GATHER", "GatherElements": "GATHER",
    "RelayAttention": "PLUGIN_V2", "Squeeze": "SHUFFLE", "Unsqueeze": "SHUFFLE", "Reshape": "SHUFFLE",
    "MatMul": "MATRIX_MULTIPLY", "Gemm": "MATRIX_MULTIPLY", "Sqrt": "UNARY", "Sigmoid": "ACTIVATION",
    "Tanh": "ACTIVATION", "ReduceMean": "REDUCE", "Expand": "SLICE",
}  # fmt: skip
NUMPY = {"tensor(float)": np.float32, "tensor(float16)": np.float16, "tensor(int32)": np.int32}


class Status(Enum):
    cudaSuccess = 0
    cudaErrorMemoryAllocation = 2
    cudaErrorInvalidValue = 1
    cudaErrorNoDevice = 100
    cudaErrorStreamCaptureUnsupported = 900
    cudaErrorIllegalAddress = 700


class Gpu:
    """State of the fake GPU; tests read and set it."""

    def __init__(self) -> None:
        self.devices = 1
        self.name, self.capability = "FAKE H100", (9, 0)
        self.total = 8 << 30
        self.memory: dict[int, np.ndarray] = {}  # address: the array that owns it
        self.pinned: dict[int, np.ndarray] = {}
        self.streams: dict[int, FakeStream] = {}
        self.pending: list[Callable[[], None]] = []  # of the default stream
        self.launches: list[str] = []  # "enqueue ROWSxSEQUENCE" and "graph ROWSxSEQUENCE", as they ran
        self.refits: list[str] = []
        self.registry = Registry()
        self.version = "8.6.0"
        self.fail_enqueue = False
        self.alias: str | None = None
        self.layer_times: dict[str, float] = {}  # milliseconds that a profiler is told

    def view(self, address: int, nbytes: int) -> np.ndarray:
        """The bytes at a device address; an access beyond an allocation is an illegal address."""
        for start, array in self.memory.items():
            if start <= address and address + nbytes <= start + array.nbytes:
                return array[address - start : address - start + nbytes]
        raise IllegalAddress(f"{nbytes} bytes at {address:#x}")


class IllegalAddress(Exception):
    pass


class FakeStream:
    def __init__(self, number: int):
        self.number = number
        self.queue: list[Callable[[], None]] = []
        self.captured: list[Callable[[], None]] | None = None

    def __int__(self) -> int:
        return self.number

    def add(self, work: Callable[[], None]) -> None:
        (self.queue if self.captured is None else self.captured).append(work)

    def run(self) -> None:
        queue, self.queue = self.queue, []
        for work in queue:
            work()


class Severity(Enum):
    INTERNAL_ERROR = 0
    ERROR = 1
    WARNING = 2
    INFO = 3
    VERBOSE = 4


class ILogger:
    Severity = Severity

    def __init__(self) -> None:
        pass


class IProfiler:
    def __init__(self) -> None:
        pass


class Registry:
    def __init__(self) -> None:
        self.loaded: list[str] = []
        self.refuse = False

    def load_library(self, path: str) -> object | None:
        if self.refuse:
            return None
        self.loaded.append(path)
        return object()

    def find(self, name: str, version: str, namespace: str = "") -> object | None:
        return (
            object()
            if self.loaded and (name, version, namespace) == ("RelayAttention", "1", "relay")
            else None
        )


def cuda_runtime(gpu: Gpu) -> ModuleType:
    """A fake of `cuda.bindings.runtime`."""
    module: Any = ModuleType("cuda.bindings.runtime")
    ok = Status.cudaSuccess
    module.cudaError_t = Status
    module.cudaMemcpyKind = SimpleNamespace(
        cudaMemcpyHostToDevice=1, cudaMemcpyDeviceToHost=2, cudaMemcpyDeviceToDevice=3
    )
    module.cudaStreamCaptureMode = SimpleNamespace(cudaStreamCaptureModeThreadLocal=1)
    module.cudaStreamNonBlocking, module.cudaHostAllocDefault = 1, 0

    def allocate(store: dict[int, np.ndarray], nbytes: int) -> int:
        raw = np.full(nbytes + 256, 0xEE, np.uint8)
        array = raw[-raw.ctypes.data % 256 :][:nbytes]
        store[array.ctypes.data] = array
        return int(array.ctypes.data)

    def malloc(nbytes: int) -> tuple[Any, ...]:
        if sum(array.nbytes for array in gpu.memory.values()) + nbytes > gpu.total:
            return Status.cudaErrorMemoryAllocation, None
        return ok, allocate(gpu.memory, nbytes)

    def free(address: int) -> tuple[Any, ...]:
        return (ok if gpu.memory.pop(address, None) is not None else Status.cudaErrorInvalidValue,)

    def memset(address: int, value: int, nbytes: int) -> tuple[Any, ...]:
        memory = gpu.view(address, nbytes)
        gpu.pending.append(lambda: memory.fill(value))  # the host does not wait for it
        return (ok,)

    def synchronize_device() -> tuple[Any, ...]:
        pending, gpu.pending = gpu.pending, []
        for work in pending:
            work()
        for made in gpu.streams.values():
            made.run()
        return (ok,)

    def host(address: int, nbytes: int) -> np.ndarray:
        return np.frombuffer((ctypes.c_uint8 * nbytes).from_address(address), np.uint8)

    def copy(target: int, source: int, nbytes: int, kind: int, stream: FakeStream) -> tuple[Any, ...]:
        def work() -> None:
            to = host(target, nbytes) if kind == 2 else gpu.view(target, nbytes)
            to[:] = host(source, nbytes) if kind == 1 else gpu.view(source, nbytes)

        stream.add(work)
        return (ok,)

    def copy_2d(
        target: int, target_pitch: int, source: int, source_pitch: int, width: int, height: int, kind: int,
        stream: FakeStream
    ) -> tuple[Any, ...]:  # fmt: skip
        def work() -> None:
            for row in range(height):
                moved = gpu.view(source + row * source_pitch, width).copy()
                gpu.view(target + row * target_pitch, width)[:] = moved

        assert kind == 3
        stream.add(work)
        return (ok,)

    def stream(flags: int) -> tuple[Any, ...]:
        made = FakeStream(1000 + len(gpu.streams))
        gpu.streams[made.number] = made
        return ok, made

    def synchronize(stream: FakeStream) -> tuple[Any, ...]:
        if stream.captured is not None:
            return (Status.cudaErrorStreamCaptureUnsupported,)
        try:
            stream.run()
        except IllegalAddress:
            return (Status.cudaErrorIllegalAddress,)
        return (ok,)

    def begin(stream: FakeStream, mode: int) -> tuple[Any, ...]:
        stream.captured = []
        return (ok,)

    def end(stream: FakeStream) -> tuple[Any, ...]:
        graph, stream.captured = stream.captured, None
        return ok, graph

    def launch(graph: list[Callable[[], None]], stream: FakeStream) -> tuple[Any, ...]:
        def work() -> None:
            for each in graph:
                each()
            gpu.launches[-1] = gpu.launches[-1].replace("enqueue", "graph")

        stream.add(work)
        return (ok,)

    def properties(index: int) -> tuple[Any, ...]:
        return ok, SimpleNamespace(name=gpu.name.encode(), major=gpu.capability[0], minor=gpu.capability[1])

    module.cudaGetDeviceCount = lambda: (ok, gpu.devices) if gpu.devices else (Status.cudaErrorNoDevice, 0)
    module.cudaSetDevice = lambda index: (ok,)
    module.cudaGetDeviceProperties = properties
    module.cudaMemGetInfo = lambda: (ok, gpu.total - sum(a.nbytes for a in gpu.memory.values()), gpu.total)
    module.cudaMalloc, module.cudaFree, module.cudaMemset = malloc, free, memset
    module.cudaHostAlloc = lambda nbytes, flags: (ok, allocate(gpu.pinned, nbytes))
    module.cudaFreeHost = lambda address: (
        (ok,) if gpu.pinned.pop(address, None) is not None else (Status.cudaErrorInvalidValue,)
    )
    module.cudaMemcpyAsync, module.cudaMemcpy2DAsync = copy, copy_2d
    module.cudaStreamCreateWithFlags, module.cudaStreamSynchronize = stream, synchronize
    module.cudaDeviceSynchronize = synchronize_device
    module.cudaStreamDestroy = lambda stream: (ok,)
    module.cudaStreamBeginCapture, module.cudaStreamEndCapture = begin, end
    module.cudaGraphInstantiate = lambda graph, flags: (ok, graph)
    module.cudaGraphDestroy = module.cudaGraphExecDestroy = lambda graph: (ok,)
    module.cudaGraphLaunch = launch
    return module


class Engine:
    """What a fake plan says: the path of model.onnx, its graph as edited, the profiles' shapes by input."""

    def __init__(self, gpu: Gpu, plan: dict[str, Any]):
        from relay_attention.plugins import library_path

        self.gpu, self.plan = gpu, plan
        options = onnxruntime.SessionOptions()
        options.register_custom_ops_library(str(library_path()))
        options.log_severity_level = 3
        self.kept: list[Any] = []  # onnxruntime does not keep initializers alive
        for name, (dtype, shape, data) in plan["weights"].items():
            value = np.frombuffer(bytes.fromhex(data), dtype).reshape(shape)
            self.kept.append(onnxruntime.OrtValue.ortvalue_from_numpy(value.copy()))
            options.add_initializer(name, self.kept[-1])
        weights = str(Path(plan["model"]).parent)
        options.add_session_config_entry("session.model_external_initializers_file_folder_path", weights)
        self.session = onnxruntime.InferenceSession(
            bytes.fromhex(plan["graph"]), options, providers=["CPUExecutionProvider"]
        )
        self.inputs = {value.name: value.type for value in self.session.get_inputs()}
        self.outputs = {value.name: value.type for value in self.session.get_outputs()}
        self.num_io_tensors = len(self.inputs) + len(self.outputs)
        self.num_optimization_profiles = len(plan["profiles"])
        self.refittable = plan["refit"]

    def get_tensor_name(self, index: int) -> str:
        return [*self.inputs, *self.outputs][index]

    def create_execution_context(self) -> Context:
        return Context(self)

    def serialize(self) -> bytes:
        return json.dumps(self.plan).encode()


class Context:
    def __init__(self, engine: Engine):
        self.engine = engine
        self.profile: dict[str, Any] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.addresses: dict[str, int] = {}
        self.profiler: Any = None
        self.enqueue_emits_profile = True

    def set_optimization_profile_async(self, index: int, stream_handle: int) -> bool:
        self.profile = self.engine.plan["profiles"][index]
        return stream_handle in self.engine.gpu.streams

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        low, _, high = self.profile[name]
        if not all(a <= size <= b for a, size, b in zip(low, shape, high, strict=True)):
            return False
        self.shapes[name] = tuple(shape)
        return True

    def set_tensor_address(self, name: str, address: int) -> bool:
        assert address % 256 == 0, f"{name} at {address:#x}: TensorRT asks for 256-byte alignment"
        self.addresses[name] = address
        return True

    def execute_async_v3(self, stream_handle: int) -> bool:
        engine, gpu = self.engine, self.engine.gpu
        if gpu.fail_enqueue:
            return False
        missing = [name for name in (*engine.inputs, *engine.outputs) if name not in self.addresses]
        assert not missing, f"no address for {missing}"
        assert set(self.shapes) == set(engine.inputs), "a shape was not set"
        shapes, addresses = dict(self.shapes), dict(self.addresses)
        gpu.streams[stream_handle].add(lambda: self.run(shapes, addresses))
        if self.profiler is not None and self.enqueue_emits_profile:  # the real one waits and reports
            gpu.streams[stream_handle].run()
            for name, ms in gpu.layer_times.items():
                self.profiler.report_layer_time(name, ms)
        return True

    def run(self, shapes: dict[str, tuple[int, ...]], addresses: dict[str, int]) -> None:
        engine, gpu = self.engine, self.engine.gpu
        feeds, arrays = {}, {}
        for name, kind in engine.inputs.items():
            count = int(np.prod(shapes[name])) * np.dtype(NUMPY[kind]).itemsize
            arrays[name] = gpu.view(addresses[name], count).view(NUMPY[kind]).reshape(shapes[name])
            feeds[name] = arrays[name].copy()
        for name, found in zip(engine.outputs, engine.session.run(list(engine.outputs), feeds), strict=True):
            past = name.replace("present", "past_key_values")
            assert name == past or addresses[name] == addresses[past], f"{name} is not bound in place"
            gpu.view(addresses[name], found.nbytes)[:] = (
                np.ascontiguousarray(found).reshape(-1).view(np.uint8)
            )
        rows, sequence = shapes["input_ids"]
        gpu.launches.append(f"enqueue {rows}x{sequence}")


def elem_type(value: onnx.ValueInfoProto) -> int:
    return value.type.tensor_type.elem_type


def with_shapes(model: onnx.ModelProto) -> onnx.GraphProto:
    """The graph with the shapes that a parser knows; an attention's output has its query's."""
    attentions = [node for node in model.graph.node if node.op_type == "RelayAttention"]
    for _ in range(len(attentions) + 1):
        graph = onnx.shape_inference.infer_shapes(model).graph
        values = {value.name: value for value in graph.value_info}
        shaped = {name for name, value in values.items() if value.type.tensor_type.HasField("shape")}
        known = onnx.ModelProto()
        known.CopyFrom(model)
        known.graph.CopyFrom(graph)
        model = known
        for node in attentions:
            if node.output[0] not in shaped and node.input[0] in shaped:
                made = onnx.ValueInfoProto()
                made.CopyFrom(values[node.input[0]])
                made.name = node.output[0]
                model.graph.value_info.append(made)
    return graph


def edited_graph(model: onnx.ModelProto, layers: list[Any]) -> onnx.ModelProto:
    """The model with the layers of a network that were added, and its nodes' operands as they are now."""
    made = onnx.ModelProto()
    made.CopyFrom(model)
    graph, taken = made.graph, {name for node in model.graph.node for name in node.output}
    nodes: list[onnx.NodeProto] = []
    for layer in layers:
        operands = [operand.name if operand is not None else "" for operand in layer.inputs]
        if layer.added:
            assert layer.output.name not in taken, f"{layer.output.name} is of two layers"
            nodes += _nodes_of(layer, operands)
        elif layer.node is not None:  # the others, of weights and broadcasting, the nodes have in them
            nodes.append(onnx.NodeProto())
            nodes[-1].CopyFrom(layer.node)
            for index, (name, before) in enumerate(zip(operands, layer.parsed, strict=True)):
                if name != before:
                    nodes[-1].input[index] = name
    values = {value.name: value for value in with_shapes(model).value_info}
    del graph.node[:], graph.value_info[:]
    graph.node.extend(_sorted(nodes))
    for layer in layers:
        # sizes of no name would be -1 after an attention: ONNX Runtime has it so for custom operators
        if layer.added and layer.inputs[0].name in values:
            size = [f"{layer.output.name}/{axis}" for axis in range(len(layer.output.shape))]
            dtype = elem_type(values[layer.inputs[0].name])
            graph.value_info.append(helper.make_tensor_value_info(layer.output.name, dtype, size))
    return made


def _nodes_of(layer: Any, operands: list[str]) -> list[onnx.NodeProto]:
    """Of a layer that was added."""
    kind, out = layer.type.name, layer.output.name
    assert kind == "SHUFFLE", f"{kind} is not computed here"
    value = numpy_helper.from_array(np.array(layer.reshape_dims))
    shape = helper.make_node("Constant", [], [f"{out}/shape"], value=value)
    return [shape, helper.make_node("Reshape", [*operands, f"{out}/shape"], [out])]


def _sorted(nodes: list[onnx.NodeProto]) -> list[onnx.NodeProto]:
    """Each after what it takes."""
    makers = {name: node for node in nodes for name in node.output if name}
    done: list[onnx.NodeProto] = []
    seen: set[int] = set()

    def visit(node: onnx.NodeProto) -> None:
        if id(node) in seen:
            return
        seen.add(id(node))
        for name in node.input:
            if name in makers:
                visit(makers[name])
        done.append(node)

    for node in nodes:
        visit(node)
    return done


def make_tensorrt(gpu: Gpu) -> ModuleType:
    """A fake of `tensorrt`, with the names of gpu.version."""
    module: Any = ModuleType("tensorrt")
    major = int(gpu.version.split(".")[0])
    module.__version__ = gpu.version
    module.ILogger = ILogger
    registry = SimpleNamespace(load_library=gpu.registry.load_library)
    setattr(registry, "get_creator" if major >= 10 else "get_plugin_creator", gpu.registry.find)
    module.get_plugin_registry = lambda: registry

    class Runtime:
        def __init__(self, logger: ILogger):
            assert gpu.devices, "the real one ends the process here"
            self.logger = logger

        def deserialize_cuda_engine(self, plan: bytes) -> Engine | None:
            try:
                return Engine(gpu, json.loads(plan))
            except (ValueError, KeyError):
                self.logger.log(Severity.ERROR, "magic tag does not match")
                return None

    class Refitter:
        def __init__(self, engine: Engine, logger: ILogger):
            self.engine, self.logger = engine, logger
            self.weights: dict[str, Any] = {}

        def set_named_weights(self, name: str, weights: Any) -> bool:
            if not self.engine.refittable or name not in self.engine.plan["shapes"]:
                self.logger.log(Severity.ERROR, f"no weights {name}")
                return False
            assert list(weights.shape) == self.engine.plan["shapes"][name]
            self.weights[name] = (str(weights.dtype), list(weights.shape), weights.tobytes().hex())
            return True

        def get_all_weights(self) -> list[str]:
            return list(self.engine.plan["shapes"])

        def get_missing_weights(self) -> list[str]:
            return []

        def refit_cuda_engine(self) -> bool:
            self.engine.plan["weights"].update(self.weights)
            self.engine.__init__(gpu, self.engine.plan)  # type: ignore[misc]
            gpu.refits += self.weights
            return True

    class Network:
        def __init__(self, flags: int):
            self.flags, self.model, self.refittable = flags, "", []
            self.num_inputs = self.num_outputs = self.num_layers = 0
            self.layers: list[Any] = []

        def get_input(self, index: int) -> Any:
            return self.inputs[index]

        def get_output(self, index: int) -> Any:
            return self.outputs[index]

        def get_layer(self, index: int) -> Any:
            return self.layers[index]

        def add_shuffle(self, tensor: Tensor) -> Layer:
            name = f"(Unnamed Layer* {len(self.layers)}) [Shuffle]"
            output = Tensor(f"{name}_output", tensor.dtype, shape=tensor.shape)
            made = Layer(name, "SHUFFLE", output, [tensor])
            made.added = True
            self.layers.append(made)
            self.num_layers += 1
            return made

        def edited(self, model: onnx.ModelProto) -> onnx.ModelProto:
            """The graph that was parsed, with the layers that were added and the operands as they are now."""
            return edited_graph(model, self.layers)

    if major >= 10:
        Network.mark_weights_refittable = lambda self, name: self.refittable.append(name) or True  # type: ignore[attr-defined]

    class OnnxParser:
        def __init__(self, network: Network, logger: ILogger):
            self.network, self.num_errors = network, 0

        def parse_from_file(self, path: str) -> bool:
            proto = onnx.load(path, load_external_data=False)
            network = self.network
            gpu.alias = os.environ.get("RELAY_TENSORRT_ALIAS_CACHE")  # what a creator would see
            network.model, network.proto = path, proto
            network.inputs = [SimpleNamespace(name=value.name) for value in proto.graph.input]
            network.outputs = [SimpleNamespace(name=value.name) for value in proto.graph.output]
            network.num_inputs, network.num_outputs = len(network.inputs), len(network.outputs)
            network.layers = layers_of(proto)
            network.num_layers = len(network.layers)
            network.shapes = {tensor.name: list(tensor.dims) for tensor in proto.graph.initializer}
            if gpu.registry.find("RelayAttention", "1", "relay") is None:
                self.num_errors = 1
                return False
            return True

        def get_error(self, index: int) -> Any:
            return SimpleNamespace(node=lambda: 3, desc=lambda: "Plugin not found")

    class Tensor:
        """Real ones are float32 whatever the graph says, as the log of TensorRT 8.6.0's parser has them."""

        def __init__(
            self,
            name: str,
            dtype: str,
            graph: onnx.GraphProto | None = None,
            shape: Sequence[int] | None = None,
        ):
            self.name, self.dtype = name, dtype
            self.is_network_output = graph is not None and name in {value.name for value in graph.output}
            if shape is not None:
                self.shape = tuple(shape)
            elif graph is not None:
                for value in (*graph.value_info, *graph.input):
                    if value.name == name and value.type.tensor_type.HasField("shape"):
                        self.shape = tuple(dim.dim_value or -1 for dim in value.type.tensor_type.shape.dim)
                for tensor in graph.initializer:
                    if tensor.name == name:
                        self.shape = tuple(tensor.dims)

    class Layer:
        def __init__(self, name: str, kind: str, output: Tensor, inputs: list[Tensor | None]):
            self.name, self.type, self.num_outputs = name, getattr(LayerType, kind), 1
            self.output, self.precision = output, None
            self.inputs, self.parsed = inputs, [each.name if each is not None else "" for each in inputs]
            self.added = False
            self.node: onnx.NodeProto | None = None  # that it was parsed from
            self.output_types: dict[int, Any] = {}

        @property
        def num_inputs(self) -> int:
            return len(self.inputs)

        @property
        def reshape_dims(self) -> tuple[int, ...]:
            return self.output.shape

        @reshape_dims.setter
        def reshape_dims(self, shape: tuple[int, ...]) -> None:
            assert self.type.name == "SHUFFLE"
            assert shape.count(-1) <= 1
            self.output.shape = tuple(shape)

        def get_input(self, index: int) -> Tensor | None:
            return self.inputs[index]

        def set_input(self, index: int, tensor: Tensor) -> None:
            if (self.type.name, index) == ("MATRIX_MULTIPLY", 0):
                self.output.shape = (*tensor.shape[:-1], self.output.shape[-1])
            self.inputs[index] = tensor

        def get_output(self, index: int) -> Tensor:
            return self.output

        def set_output_type(self, index: int, dtype: Any) -> None:
            assert self.output.dtype == "FLOAT", f"{self.name} computes {self.output.dtype}"
            self.output_types[index] = dtype

    def layers_of(model: onnx.ModelProto) -> list[Layer]:
        """As onnx-tensorrt 8.6 makes them: a weight is a constant; broadcasting, Gemm's bias and further
        operands are layers of their own, of which only the last output has a name of the graph."""
        graph = with_shapes(model)
        integers = {
            value.name for value in graph.input if value.type.tensor_type.elem_type in (INT32, INT64, BOOL)
        } | {tensor.name for tensor in graph.initializer if tensor.data_type in (INT32, INT64, BOOL)}
        weights = {tensor.name for tensor in graph.initializer}
        layers: list[Layer] = []

        def add(name: str, kind: str, dtype: str, output: str = "", inputs: Sequence[str] = ()) -> Tensor:
            unnamed = f"(Unnamed Layer* {len(layers)}) [{kind.title()}]"
            made = Tensor(output or f"{unnamed}_output", dtype, graph)
            operands = [Tensor(name, "FLOAT", graph) if name else None for name in inputs]
            layers.append(Layer(name or unnamed, kind, made, operands))
            return made

        for node in graph.node:
            to = [attribute.i for attribute in node.attribute if attribute.name == "to"]
            integer = to[0] in (INT32, INT64, BOOL) if to else node.input[0] in integers
            integers |= set(node.output) if integer else set()
            dtype = "INT32" if integer else "FLOAT"
            kind = KINDS.get(node.op_type, "ELEMENTWISE")
            for name in node.input:
                if name in weights and kind != "PLUGIN_V2":
                    add(name, "CONSTANT", "INT32" if name in integers else "FLOAT")
                    add("", "SHUFFLE", "INT32" if name in integers else "FLOAT")
            if node.op_type == "Expand":
                add("", "ELEMENTWISE", "INT32")  # of the two shapes
            if node.op_type == "Gemm" and len(node.input) > 2:
                add(node.name, kind, dtype, inputs=node.input[:2])
                layers[-1].node = node
                add("", "ELEMENTWISE", dtype, node.output[0])
                continue
            product = add(node.name, kind, dtype, node.output[0], node.input)
            layers[-1].node = node
            if node.op_type == "MatMul":
                tokens, matrix = (each.shape for each in layers[-1].inputs if each is not None)
                product.shape = (*tokens[:-1], matrix[-1])
                if len(matrix) < len(tokens):  # of the same rank as the other
                    made = layers.pop()
                    shuffled = add("", "SHUFFLE", dtype)
                    shuffled.shape = (*[1] * (len(tokens) - len(matrix)), *matrix)
                    made.inputs[1], made.parsed[1] = shuffled, shuffled.name
                    layers.append(made)
        return layers

    class OptimizationProfile(dict):
        def set_shape(self, name: str, low: Any, best: Any, high: Any) -> None:
            assert len(low) == len(best) == len(high)
            assert all(a <= b <= c for a, b, c in zip(low, best, high, strict=True)), (name, low, best, high)
            self[name] = [list(low), list(best), list(high)]

    class Config:
        def __init__(self) -> None:
            self.flags: set[str] = set()
            self.profiles: list[Any] = []
            self.features: set[str] = set()
            self.limits: dict[str, int] = {}
            self.builder_optimization_level = 3
            self.tactic_sources = 0b11 if major >= 11 else 0b11111

        def get_tactic_sources(self) -> int:
            return self.tactic_sources

        def set_tactic_sources(self, sources: int) -> bool:
            self.tactic_sources = sources
            return True

        def set_flag(self, flag: Any) -> None:
            self.flags.add(flag.name)

        def set_preview_feature(self, feature: Any, on: bool) -> None:
            assert on
            self.features.add(feature.name)

        def set_memory_pool_limit(self, pool: Any, size: int) -> None:
            self.limits[pool.name] = size

        def add_optimization_profile(self, profile: Any) -> int:
            self.profiles.append(profile)
            return len(self.profiles) - 1

        def create_timing_cache(self, data: bytes) -> Any:
            return SimpleNamespace(serialize=lambda: bytes(data) + b"timed.", data=bytes(data))

        def set_timing_cache(self, cache: Any, ignore_mismatch: bool) -> bool:
            if cache.data.startswith(b"of another GPU"):
                return False
            self.cache = cache
            return True

        def get_timing_cache(self) -> Any:
            return self.cache

    class Builder:
        def __init__(self, logger: ILogger):
            assert gpu.devices, "the real one gives no builder here"

        def create_network(self, flags: int) -> Network:
            gpu.network = Network(flags)  # type: ignore[attr-defined]
            return gpu.network  # type: ignore[attr-defined,no-any-return]

        def create_builder_config(self) -> Config:
            gpu.config = Config()  # type: ignore[attr-defined]
            return gpu.config  # type: ignore[attr-defined,no-any-return]

        def create_optimization_profile(self) -> OptimizationProfile:
            return OptimizationProfile()

        def build_serialized_network(self, network: Network, config: Config) -> bytes | None:
            inputs = {value.name for value in network.inputs}
            assert all(set(profile) == inputs for profile in config.profiles), "a profile lacks an input"
            refit = bool({"REFIT", "REFIT_INDIVIDUAL"} & config.flags)
            plan = {
                "model": network.model,
                "graph": network.edited(network.proto).SerializeToString().hex(),
                "profiles": config.profiles,
                "refit": refit,
                "weights": {},
                "shapes": network.shapes,
            }
            return json.dumps(plan).encode()

    LayerType = Enum(
        "LayerType",
        sorted({*KINDS.values(), "CONSTANT", "IDENTITY", "SHAPE", "CONCATENATION", "SLICE", "ELEMENTWISE"}),
    )
    flags = ["FP16", "REFIT", "OBEY_PRECISION_CONSTRAINTS"] + (["REFIT_INDIVIDUAL"] if major >= 10 else [])
    flags = [flag for flag in flags if major < 11 or flag not in ("FP16", "OBEY_PRECISION_CONSTRAINTS")]
    network_flags = {
        8: {"EXPLICIT_BATCH": 0},
        10: {"EXPLICIT_BATCH": 0, "STRONGLY_TYPED": 1},
        11: {"STRONGLY_TYPED": 0},
    }
    module.layers_of = layers_of  # for tests of networks without a file
    module.IProfiler = IProfiler
    module.Runtime, module.Refitter, module.Weights = Runtime, Refitter, lambda array: array
    module.Builder, module.OnnxParser, module.LayerType = Builder, OnnxParser, LayerType
    module.BuilderFlag = Enum("BuilderFlag", flags)
    module.NetworkDefinitionCreationFlag = IntNames(network_flags[major])
    module.MemoryPoolType = Enum("MemoryPoolType", ["WORKSPACE"])
    module.PreviewFeature = Enum(
        "PreviewFeature", ["ALIASED_PLUGIN_IO_10_03"] if major >= 10 else ["PROFILE_SHARING_0806"]
    )
    sources = ["CUBLAS", "CUBLAS_LT", "CUDNN", "EDGE_MASK_CONVOLUTIONS", "JIT_CONVOLUTIONS"][
        3 if major >= 11 else 0 :
    ]
    module.TacticSource = IntNames({name: index for index, name in enumerate(sources)})
    module.TensorFormat = SimpleNamespace(LINEAR=0)
    module.DataType = SimpleNamespace(FLOAT="FLOAT", HALF="HALF")
    return module


class IntNames:
    def __init__(self, names: dict[str, int]):
        self.__dict__.update(names)


MODULES = [
    "relay_attention.runtime.cuda",
    "relay_attention.runtime.tensorrt_backend",
    "relay_attention.export.build",
]


@contextmanager
def installed(gpu: Gpu, library: Path) -> Iterator[None]:
    """Puts the fakes in the place of the real modules, and imports afresh what imports them."""
    runtime = cuda_runtime(gpu)
    bindings: Any = ModuleType("cuda.bindings")
    bindings.runtime = runtime
    fakes = {"tensorrt": make_tensorrt(gpu), "cuda.bindings": bindings, "cuda.bindings.runtime": runtime}
    fakes["cuda"] = ModuleType("cuda")
    with pytest.MonkeyPatch.context() as patch:
        for name, module in fakes.items():
            patch.setitem(sys.modules, name, module)
        for name in MODULES:
            patch.delitem(sys.modules, name, raising=False)
            parent, _, child = name.rpartition(".")
            if parent in sys.modules:
                patch.delattr(sys.modules[parent], child, raising=False)
        patch.setenv("RELAY_ATTENTION_TENSORRT_LIBRARY", str(library))
        yield
        for name in MODULES:
            sys.modules.pop(name, None)
            parent, _, child = name.rpartition(".")
            if parent in sys.modules and hasattr(sys.modules[parent], child):
                delattr(sys.modules[parent], child)
