"""An artifact becomes a TensorRT plan: parse, profiles, build, and a description beside the plan.

The plan lies in the artifact's folder engine/, under a name made of TensorRT's version, the GPU and the
model; see `runtime.engine`. It holds the prefix, unless the artifact was exported with `--prefix input`.
Another system prompt of the same length is refitted into a plan that is there, without a build.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import onnx_ir as ir

from relay_attention.errors import BackendError, ExportError
from relay_attention.export.passes.gather_last_token import LAST_TOKEN
from relay_attention.export.passes.tensorrt_check import problems
from relay_attention.runtime.artifact import MODEL_NAME, Artifact, FileEntry, Manifest
from relay_attention.runtime.engine import (
    FOLDER,
    Box,
    EngineInfo,
    Profile,
    cache_capacity,
    find_engine,
    model_hash,
    plan_path,
    write_engine,
)

ALIAS_VARIABLE = "RELAY_TENSORRT_ALIAS_CACHE"


@dataclass(frozen=True)
class BuildOptions:
    """What an engine is built for.

    max_batch, opt_batch: requests that decode together, at most and as tuned for. None: max_batch with a
        chunk of 1, as linear layers tuned for 64 rows take 1 row in the same time: that of reading the
        weights. Else a quarter of it, as what Myelin has is slower when tuned for many rows.
    prefill_batch, chunk: rows and tokens of one prefill call; longer prompts go in several calls. With a
        chunk of 1 the plan has no profile for prefill: prompts go token by token through decode's, with up to
        max_batch rows.
    max_context: tokens of one request beside the prefix; None for the artifact's.
    max_prefix: tokens of an input prefix; None for the artifact's.
    workspace: bytes that TensorRT may use for scratch, None for its own choice.
    refit: a static prefix can be replaced by one of the same length without a build.
    alias_cache: tell TensorRT 10.3+ that present is past (off: it may keep a second copy of the cache).
    optimization_level: effort of TensorRT's builder, 0 (seconds) to 5 (slow); None for its own default.
    timing_cache: file of timings to reuse and add to; one serves all models on a machine. None: one beside
        the plan.
    force: build, even where a plan can be refitted.
    """

    max_batch: int = 64
    opt_batch: int | None = None
    prefill_batch: int = 8
    chunk: int = 512
    max_context: int | None = None
    max_prefix: int | None = None
    workspace: int | None = None
    optimization_level: int | None = None
    timing_cache: Path | None = None
    refit: bool = True
    alias_cache: bool = False
    verbose: bool = False
    device: int = 0
    force: bool = False


def build_engine(
    output: str | os.PathLike[str], options: BuildOptions | None = None, progress: bool = False
) -> Path:
    """Builds the plan of an artifact for this TensorRT and this GPU, or refits the one that is there.

    progress: say on stderr what is being done. Returns: the plan's path.
    Raises: ExportError if the artifact is not one for TensorRT or TensorRT refuses its graph; BackendError if
        TensorRT, its plugin's library, cuda-python or a GPU is missing. A plan that is there stays as it was.
    """
    options = options or BuildOptions()
    artifact = Artifact.open(output)
    _check(artifact, options)
    from relay_attention.runtime import tensorrt_backend as backend

    box = backend.this_box(options.device)
    library = backend.load_plugin()
    logger = backend.Logger(options.verbose)
    path = plan_path(artifact, box)
    with _says(progress, f"TensorRT {box.tensorrt} on {box.gpu}: {path.name}"):
        if not options.force and (described := _refit(artifact, box, logger, options)):
            return described
        info = _info(artifact, box, library, options)
        plan = _build(artifact, info, logger, options, path.parent / _timing_cache_name(box), progress)
        # memoryview: a plan of gigabytes is not copied
        info = replace(info, plan=_entry(plan))
        write_engine(path, plan, info)
    return path


def _check(artifact: Artifact, options: BuildOptions) -> None:
    """Everything that can be refused without TensorRT."""
    manifest = artifact.manifest
    if manifest.dtype != "float16":
        raise ExportError(
            f"{artifact.path}: is {manifest.dtype}; the plugin's kernels take float16: export with "
            "--precision fp16"
        )
    if found := problems(ir.load(artifact.file(MODEL_NAME))):
        raise ExportError(
            f"{artifact.file(MODEL_NAME)}: TensorRT's parser would not take it ({found[0]}"
            f"{f', and {len(found) - 1} more' if len(found) > 1 else ''}): export with --target tensorrt"
        )
    for name in ("max_batch", "prefill_batch", "chunk"):
        if getattr(options, name) < 1:
            raise ExportError(f"{name.replace('_', '-')} is {getattr(options, name)}, at least 1 is needed")
    if not 1 <= (options.opt_batch or 1) <= options.max_batch:
        raise ExportError(f"opt-batch {options.opt_batch} is not between 1 and max-batch {options.max_batch}")
    if (options.optimization_level or 0) < 0:
        raise ExportError(f"optimization-level {options.optimization_level}: it is 0 to 5")
    context, prefix = _max_context(manifest, options), _max_prefix(manifest, options)
    if context < 1 or prefix + context > manifest.geometry.max_positions:
        raise ExportError(
            f"prefix of {prefix} tokens + max-context {context} exceed the model's "
            f"{manifest.geometry.max_positions} positions"
        )
    if manifest.prefix.length < 1:
        raise ExportError(f"{artifact.path}: its prefix is empty; TensorRT takes no empty tensors here")


def _max_context(manifest: Manifest, options: BuildOptions) -> int:
    return manifest.max_context if options.max_context is None else options.max_context


def _max_prefix(manifest: Manifest, options: BuildOptions) -> int:
    if options.max_prefix is None or manifest.prefix.mode == "static":
        return manifest.prefix.length
    return max(options.max_prefix, manifest.prefix.length)


def _info(artifact: Artifact, box: Box, library: Path, options: BuildOptions) -> EngineInfo:
    manifest, static = artifact.manifest, artifact.manifest.prefix.mode == "static"
    most = options.max_batch
    chunk = min(options.chunk, _max_context(manifest, options))
    tuned_for = options.opt_batch or (most if chunk == 1 else max(most // 4, 1))
    decode = Profile((1, tuned_for, most), (1, 1, 1))
    prefill = Profile((1, 1, min(options.prefill_batch, most)), (1, chunk, chunk))
    return EngineInfo(
        box=box,
        model=model_hash(manifest),
        dtype=manifest.dtype,
        decode=decode,
        prefill=prefill if chunk > 1 else decode,
        max_context=cache_capacity(manifest, _max_context(manifest, options)),
        prefix_mode=manifest.prefix.mode,
        prefix_length=_max_prefix(manifest, options),
        prefix_tokens=manifest.prefix.token_sha256 if static else "",
        refit=options.refit and static,
        plugin=library.name,
        plan=FileEntry(0, ""),
    )


def _refit(artifact: Artifact, box: Box, logger: Any, options: BuildOptions) -> Path | None:
    """Refits a plan of this model that holds another prefix; None where there is no plan to refit."""
    import tensorrt

    from relay_attention.runtime.tensorrt_backend import refit_prefix

    try:
        path, info = find_engine(artifact, box)
    except BackendError:
        return None
    tokens = artifact.manifest.prefix.token_sha256
    if not info.refit or info.prefix_tokens == tokens or not _same_profiles(info, artifact, options):
        return None
    runtime = tensorrt.Runtime(logger)
    engine = runtime.deserialize_cuda_engine(path.read_bytes())
    if engine is None:
        return None
    refit_prefix(engine, logger, artifact.manifest, artifact.prefix)
    plan = memoryview(engine.serialize())
    write_engine(path, plan, replace(info, prefix_tokens=tokens, plan=_entry(plan)))
    return path


def _same_profiles(info: EngineInfo, artifact: Artifact, options: BuildOptions) -> bool:
    wanted = _info(artifact, info.box, Path(info.plugin), options)
    return (info.decode, info.prefill, info.max_context) == (
        wanted.decode,
        wanted.prefill,
        wanted.max_context,
    )


def _build(
    artifact: Artifact,
    info: EngineInfo,
    logger: Any,
    options: BuildOptions,
    timing_cache: Path,
    progress: bool,
) -> memoryview:
    import tensorrt as trt

    strongly_typed = getattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)
    explicit_batch = getattr(
        trt.NetworkDefinitionCreationFlag, "EXPLICIT_BATCH", None
    )  # gone where it is implied
    flags = [flag for flag in (strongly_typed, explicit_batch) if flag is not None]
    builder = trt.Builder(logger)
    network = builder.create_network(sum(1 << int(flag) for flag in flags))
    config = builder.create_builder_config()
    _without_other_libraries(trt, config)
    if options.optimization_level is not None:
        _set_optimization_level(trt, config, options.optimization_level)

    with _says(progress, "parsing the graph"), _aliasing(options.alias_cache):
        _parse(trt, artifact, network, logger)
    if len(info.profiles) == 1:
        _only_token(trt, network)
    if strongly_typed is None:
        config.set_flag(trt.BuilderFlag.FP16)
        config.set_flag(trt.BuilderFlag.OBEY_PRECISION_CONSTRAINTS)
        if len(info.profiles) == 1:
            _flatten_products(trt, network)
        _pin_types(trt, network, ir.load(artifact.file(MODEL_NAME)))
    if info.refit:
        _mark_refittable(trt, network, config, artifact.manifest)
    if options.alias_cache:
        _alias(trt, config)
    if options.workspace is not None:
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, options.workspace)
    for profile in info.profiles:
        _add_profile(builder, config, artifact.manifest, info, profile)

    timing_cache = options.timing_cache or timing_cache
    cache = config.create_timing_cache(timing_cache.read_bytes() if timing_cache.is_file() else b"")
    if cache is None or not config.set_timing_cache(cache, False):  # of another GPU or TensorRT: anew
        config.set_timing_cache(config.create_timing_cache(b""), False)
    with _says(progress, "building: TensorRT times kernels, which takes minutes"):
        plan = builder.build_serialized_network(network, config)
    if plan is None:
        raise ExportError(f"{artifact.path}: TensorRT could not build the engine: {logger.take()}")
    timing_cache.parent.mkdir(parents=True, exist_ok=True)
    part = timing_cache.with_name(timing_cache.name + ".part")
    part.write_bytes(memoryview(config.get_timing_cache().serialize()))
    part.replace(timing_cache)
    return memoryview(plan)


def _without_other_libraries(trt: Any, config: Any) -> None:
    """No cuDNN and cuBLAS: TensorRT 8.6 and later use them for plugins' handles only, which this one leaves
    alone; 8.6 ends the process where cuDNN is not installed whole."""
    sources = getattr(trt, "TacticSource", None)
    for name in ("CUDNN", "CUBLAS", "CUBLAS_LT"):
        if (source := getattr(sources, name, None)) is not None:
            config.set_tactic_sources(config.get_tactic_sources() & ~(1 << int(source)))


def _set_optimization_level(trt: Any, config: Any, level: int) -> None:
    if not hasattr(config, "builder_optimization_level"):
        raise ExportError(f"--optimization-level needs TensorRT 8.6 or later, this is {trt.__version__}")
    config.builder_optimization_level = level


def _parse(trt: Any, artifact: Artifact, network: Any, logger: Any) -> None:
    parser = trt.OnnxParser(network, logger)
    model = artifact.file(MODEL_NAME).resolve()
    if not parser.parse_from_file(str(model)):
        errors = [parser.get_error(index) for index in range(parser.num_errors)]
        shown = [f"node {error.node()}: {error.desc()}" for error in errors[:5]]
        raise ExportError(f"{model}: TensorRT's parser refuses it: {'; '.join([*shown, logger.take()])}")
    linear = 1 << int(trt.TensorFormat.LINEAR)
    for index in range(network.num_inputs):
        network.get_input(index).allowed_formats = linear
    for index in range(network.num_outputs):
        network.get_output(index).allowed_formats = linear


def _only_token(trt: Any, network: Any) -> None:
    """Of one token a row the last is no choice: a reshape, which costs nothing, takes the place of the
    graph's GatherND, a kernel."""
    layers = [network.get_layer(index) for index in range(network.num_layers)]
    for gather in layers:
        if (gather.name, gather.type) != (LAST_TOKEN, trt.LayerType.GATHER):
            continue
        hidden = gather.get_input(0)  # [batch, 1, width]
        last = _reshaped(network, hidden, (-1, hidden.shape[-1]), f"{LAST_TOKEN}/rows")
        _redirect(_uses(layers, gather.get_output(0)), last)


def _flatten_products(trt: Any, network: Any) -> None:
    """Where each row has one token, products of activations [batch, 1, K] with a matrix [1, K, N] become
    products of [1, batch, K]. Products of the same tensor keep one: TensorRT merges them.

    What TensorRT 8.6 leaves to Myelin it computes as one product for each row of the batch, each reading the
    weights again.
    """
    layers = [network.get_layer(index) for index in range(network.num_layers)]
    found = []  # all shapes before the first change
    for product in layers:
        if product.type != trt.LayerType.MATRIX_MULTIPLY or product.get_output(0).is_network_output:
            continue
        tokens, matrix = (tuple(product.get_input(index).shape) for index in range(2))
        if len(tokens) != 3 or len(matrix) != 3 or matrix[0] != 1 or min(matrix) < 1:
            continue
        columns = product.get_output(0).shape[-1]
        width = matrix[1] if columns == matrix[2] else matrix[2]  # [1, N, K] where it is used transposed
        if tokens[:2] == (-1, -1) and tokens[2] in (-1, width):
            found.append((product, width, columns))
    flat: dict[str, Any] = {}  # by what is flattened
    for product, width, columns in found:
        tokens, result = product.get_input(0), product.get_output(0)
        if tokens.name not in flat:
            flat[tokens.name] = _reshaped(network, tokens, (1, -1, width), f"tokens/{tokens.name}")
        uses = _uses(layers, result)
        product.set_input(0, flat[tokens.name])
        _redirect(uses, _reshaped(network, result, (-1, 1, columns), f"tokens/{result.name}/rows"))


def _reshaped(network: Any, tensor: Any, shape: tuple[int, ...], name: str) -> Any:
    layer = network.add_shuffle(tensor)
    if layer is None:
        raise ExportError(f"TensorRT cannot make the layer {name}")
    layer.name, layer.reshape_dims = name, shape
    return layer.get_output(0)


def _uses(layers: list[Any], tensor: Any) -> list[tuple[Any, int]]:
    """(layer, index) of each operand that is the tensor."""
    operands = ((layer, index) for layer in layers for index in range(layer.num_inputs))
    return [
        (layer, index)
        for layer, index in operands
        if (operand := layer.get_input(index)) is not None and operand.name == tensor.name
    ]


def _redirect(uses: list[tuple[Any, int]], tensor: Any) -> None:
    for layer, index in uses:
        layer.set_input(index, tensor)


def _pin_types(trt: Any, network: Any, model: ir.Model) -> None:
    """For TensorRT without typed networks: whatever computes does it in the graph's type, float32 or float16,
    as in a typed network; or the builder would take either for each layer, whichever it times faster.

    Tensors of the network do not say: until it is built every real one is float32. The parser makes the
    layers of a node one after another, not all of them named, and names what leaves the node as in the graph.

    Raises: ExportError if a matrix product is of no node that is float32 or float16.
    """
    types = _types_of_values(model)
    kinds = {ir.DataType.FLOAT: trt.DataType.FLOAT, ir.DataType.FLOAT16: trt.DataType.HALF}
    left_alone = {getattr(trt.LayerType, name) for name in _NOT_COMPUTING}
    of_node: list[Any] = []
    for index in range(network.num_layers):
        layer = network.get_layer(index)
        of_node.append(layer)
        names = [layer.get_output(output).name for output in range(layer.num_outputs)]
        found = [types[name] for name in names if name in types]
        if not found:
            continue
        kind = kinds.get(found[0])
        for each in of_node:
            if kind is not None and each.type not in left_alone:
                _pin(trt, each, kind)
            elif each.type == trt.LayerType.MATRIX_MULTIPLY:
                raise ExportError(f"{each.name}: the graph has {names[0]} as {found[0]}, not as a float type")
        of_node = []


_NOT_COMPUTING = (
    "CAST", "IDENTITY", "CONSTANT", "SHAPE", "SHUFFLE", "GATHER", "CONCATENATION", "SLICE", "PLUGIN_V2"
)  # fmt: skip


def _pin(trt: Any, layer: Any, kind: Any) -> None:
    """Not what computes integers (of a shape) or truth values; a network's output has its type already."""
    outputs = [layer.get_output(index) for index in range(layer.num_outputs)]
    real = (trt.DataType.FLOAT, trt.DataType.HALF)
    if outputs[0].dtype not in real:
        return
    layer.precision = kind
    for index, output in enumerate(outputs):
        if output.dtype in real and not output.is_network_output:
            layer.set_output_type(index, kind)


def _types_of_values(model: ir.Model) -> dict[str, ir.DataType | None]:
    """What each node gives, by its name; one of no stated type has its first operand's that has one."""
    types: dict[str, ir.DataType | None] = {}
    for node in model.graph:
        operands = (value for value in node.inputs if value is not None)
        known = (value.dtype or types.get(value.name or "") for value in operands)
        inferred = next(filter(None, known), None)
        if node.op_type == "Cast":
            inferred = ir.DataType(node.attributes["to"].as_int())
        types |= {value.name: value.dtype or inferred for value in node.outputs if value.name}
    return types


def _prefix_names(manifest: Manifest) -> Iterator[str]:
    for layer in range(manifest.geometry.num_layers):
        yield manifest.io.prefix_key.format(layer=layer)
        yield manifest.io.prefix_value.format(layer=layer)


def _mark_refittable(trt: Any, network: Any, config: Any, manifest: Manifest) -> None:
    """The prefix alone where TensorRT can mark single weights (10.1 on), every weight before."""
    individual = getattr(trt.BuilderFlag, "REFIT_INDIVIDUAL", None)
    if individual is None or not hasattr(network, "mark_weights_refittable"):
        config.set_flag(trt.BuilderFlag.REFIT)
        return
    config.set_flag(individual)
    for name in _prefix_names(manifest):
        if not network.mark_weights_refittable(name):
            raise ExportError(f"TensorRT cannot make {name} refittable: build with --no-refit")


def _alias(trt: Any, config: Any) -> None:
    feature = getattr(trt.PreviewFeature, "ALIASED_PLUGIN_IO_10_03", None)
    if feature is None:
        raise ExportError(f"--alias-cache needs TensorRT 10.3 or later, this is {trt.__version__}")
    config.set_preview_feature(feature, True)


@contextmanager
def _aliasing(wanted: bool) -> Iterator[None]:
    """The plugin's creator asks the environment, while the parser calls it."""
    before = os.environ.get(ALIAS_VARIABLE)
    os.environ[ALIAS_VARIABLE] = "1" if wanted else "0"
    try:
        yield
    finally:
        del os.environ[ALIAS_VARIABLE]
        if before is not None:
            os.environ[ALIAS_VARIABLE] = before


def _add_profile(builder: Any, config: Any, manifest: Manifest, info: EngineInfo, profile: Profile) -> None:
    names, made = manifest.io, builder.create_optimization_profile()
    batches, capacity = profile.batch, info.max_context
    made.set_shape(names.input_ids, *zip(profile.batch, profile.sequence, strict=True))
    for name in (names.context_lens, names.query_lens):
        made.set_shape(name, *((batch,) for batch in batches))
    for layer, (heads, dim) in enumerate(manifest.geometry.layers):
        for pattern in (names.past_key, names.past_value):
            sizes = zip(batches, (1, capacity, capacity), strict=True)
            made.set_shape(pattern.format(layer=layer), *((batch, heads, size, dim) for batch, size in sizes))
    if manifest.prefix.mode == "input":
        lengths = (1, manifest.prefix.length, info.prefix_length)
        for name, (heads, dim) in zip(
            _prefix_names(manifest),
            (layer for layer in manifest.geometry.layers for _ in range(2)),
            strict=True,
        ):
            made.set_shape(name, *((heads, length, dim) for length in lengths))
    if config.add_optimization_profile(made) < 0:
        raise ExportError(f"TensorRT refuses the profile {profile}: choose other sizes")


def _timing_cache_name(box: Box) -> str:
    return f"timing-trt{box.tensorrt}-sm{box.compute_capability.replace('.', '')}.cache"


def _entry(plan: memoryview) -> FileEntry:
    import hashlib

    return FileEntry(plan.nbytes, hashlib.sha256(plan).hexdigest())


@contextmanager
def _says(progress: bool, what: str) -> Iterator[None]:
    start = time.monotonic()
    if progress:
        print(what, file=sys.stderr, flush=True)
    yield
    if progress:
        print(f"  {time.monotonic() - start:.1f} s", file=sys.stderr, flush=True)


__all__ = ["FOLDER", "BuildOptions", "build_engine"]
