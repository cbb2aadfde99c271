"""A bfloat16 graph computed in float32, for machines without a GPU.

ONNX Runtime has no bfloat16 MatMul on the CPU. Here every bfloat16 tensor of a graph becomes float32: weights
exactly, as they are cast from where they are mapped; activations without being rounded in between. What is
computed so is what the GPU computes, but for its rounding.
"""

from __future__ import annotations

import dataclasses

import numpy as np
import onnx
import onnxruntime

from relay_attention.errors import BackendError
from relay_attention.plugins import library_path
from relay_attention.runtime import bfloat16
from relay_attention.runtime.artifact import MODEL_NAME, WEIGHTS_NAME, Artifact, Manifest, PrefixFile
from relay_attention.runtime.backend import Backend, available_memory, load_backend
from relay_attention.runtime.onnxruntime_backend import HostMemory, OnnxRuntimeBase, keep_mapped
from relay_attention.runtime.prefix_file import Layer

CPU = "onnxruntime"
_FLOAT, _BFLOAT16 = onnx.TensorProto.FLOAT, onnx.TensorProto.BFLOAT16
_TYPE_ATTRIBUTES = {"to", "dtype", "output_dtype"}
_FOLDER = "session.model_external_initializers_file_folder_path"


def computed_here(manifest: Manifest) -> Manifest:
    """The manifest of a graph in the types that the CPU computes it in: bfloat16 becomes float32."""
    return dataclasses.replace(manifest, dtype="float32") if manifest.dtype == bfloat16.NAME else manifest


def to_float32(model: onnx.ModelProto) -> onnx.ModelProto:
    """A copy of a graph in which everything bfloat16 is float32; external data stays where it is.

    Weights in files are cast node by node, so that as few as possible are held in float32; what is gathered
    from one (an embedding) is cast when it is gathered.
    """
    wide = onnx.ModelProto()
    wide.CopyFrom(model)
    graph = wide.graph
    external: set[str] = set()
    for tensor in graph.initializer:
        if tensor.data_type == _BFLOAT16:
            if tensor.data_location == onnx.TensorProto.EXTERNAL:
                external.add(tensor.name)
            else:
                _widen_tensor(tensor)
    for value in (*graph.input, *graph.output, *graph.value_info):
        if value.type.tensor_type.elem_type == _BFLOAT16 and value.name not in external:
            value.type.tensor_type.elem_type = _FLOAT
    nodes = []
    cast: set[str] = set()
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.name in _TYPE_ATTRIBUTES and attribute.i == _BFLOAT16:
                attribute.i = _FLOAT
            if attribute.type == onnx.AttributeProto.TENSOR and attribute.t.data_type == _BFLOAT16:
                _widen_tensor(attribute.t)
        gathered = node.op_type == "Gather" and node.input[0] in external
        for index, name in enumerate(node.input):
            if name not in external or gathered:
                continue
            if name not in cast:
                cast.add(name)
                nodes.append(onnx.helper.make_node("Cast", [name], [f"{name}/float32"], to=_FLOAT))
            node.input[index] = f"{name}/float32"
        nodes.append(node)
        if gathered:
            name = node.output[0]
            node.output[0] = f"{name}/bfloat16"
            nodes.append(onnx.helper.make_node("Cast", [f"{name}/bfloat16"], [name], to=_FLOAT))
    made = [onnx.NodeProto.FromString(node.SerializeToString()) for node in nodes]
    del graph.node[:]
    graph.node.extend(made)
    return wide


def _widen_tensor(tensor: onnx.TensorProto) -> None:
    values = onnx.numpy_helper.to_array(tensor).astype(np.float32)
    tensor.CopyFrom(onnx.numpy_helper.from_array(values, tensor.name))


class _WidePrefix(PrefixFile):
    def read(self) -> list[Layer]:
        return [(bfloat16.widen(key), bfloat16.widen(value)) for key, value in super().read()]


class Float32Form(OnnxRuntimeBase):
    """A bfloat16 artifact, computed in float32 on the CPU, to check with; see `backend.Backend`.

    The weights are held in float32 where memory suffices, and cast anew in every step where it does not.
    """

    def __init__(self, artifact: Artifact, threads: int | None = None):
        """threads: of ONNX Runtime, None for its own choice. Raises: BackendError if it refuses the graph."""
        options = onnxruntime.SessionOptions()
        options.register_custom_ops_library(str(library_path()))
        options.intra_op_num_threads = threads or 0
        options.log_severity_level = 3
        options.add_session_config_entry(_FOLDER, str(artifact.path.resolve()))
        weights, available = artifact.manifest.files.get(WEIGHTS_NAME), available_memory()
        mapped = weights is not None and available is not None and 2 * weights.bytes > available
        disabled = keep_mapped(options) if mapped else []
        if mapped:  # see `prefix.open_session`
            options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
        path = artifact.file(MODEL_NAME)
        try:
            graph = to_float32(onnx.load(path, load_external_data=False))
            session = onnxruntime.InferenceSession(
                graph.SerializeToString(), options, ["CPUExecutionProvider"], disabled_optimizers=disabled
            )
        except Exception as error:  # onnxruntime and protobuf raise many kinds
            raise BackendError(f"{path}: ONNX Runtime refuses its float32 form: {error}") from error
        prefix = _WidePrefix(**vars(artifact.prefix))
        wide = dataclasses.replace(artifact, manifest=computed_here(artifact.manifest), prefix=prefix)
        super().__init__(wide, session, HostMemory())


def load_on_cpu(artifact: Artifact, threads: int | None = None) -> Backend:
    """What results are compared with: the backend on the CPU, of bfloat16 the float32 form."""
    if artifact.manifest.dtype == bfloat16.NAME:
        return Float32Form(artifact, threads)
    return load_backend(CPU, artifact, threads=threads)
