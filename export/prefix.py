"""The prefix: a system prompt's tokens, and the keys and values that the model makes of them.

Needs onnx, onnxruntime and the tokenizer only: a new system prompt is baked where nothing else is installed.
"""

from __future__ import annotations

import dataclasses
import mmap
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
from tqdm import tqdm

from relay_attention.errors import ArtifactError, BackendError, ExportError, PromptError
from relay_attention.export.float32_form import computed_here, to_float32
from relay_attention.export.folder import replace_folder
from relay_attention.export.progress import stage
from relay_attention.plugins import library_path
from relay_attention.runtime import bfloat16
from relay_attention.runtime.artifact import (
    MANIFEST_NAME,
    MODEL_NAME,
    SYSTEM_PROMPT_NAME,
    Artifact,
    FileEntry,
    Geometry,
    Manifest,
    PrefixFile,
    PrefixHeader,
    PrefixInfo,
)
from relay_attention.runtime.engine import FOLDER as ENGINE_FOLDER
from relay_attention.runtime.onnxruntime_backend import keep_mapped
from relay_attention.runtime.text import SystemPrompt, Tokenizer

CHUNK = 512
DEFAULT_MAX_CONTEXT = 4096
_SCRATCH_MODEL = "empty_prefix.onnx"


def read_system_prompt(path: Path) -> str:
    """Text of a system prompt file.

    Raises: ExportError if it cannot be read, is not UTF-8, or is empty.
    """
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise ExportError(f"{path}: cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ExportError(f"{path}: not UTF-8 text: {error.reason} at byte {error.start}") from error
    if not text.strip():
        raise ExportError(f"{path}: the system prompt is empty")
    return text


def tokenize(tokenizer: Tokenizer, text: str, template: str | None = None) -> SystemPrompt:
    """The system prompt as prefix tokens.

    template: "chat", "plain", or None for "chat" where the tokenizer has a chat template.
    Raises: ExportError if the text is empty or the chat template cannot take it.
    """
    if not text.strip():
        raise ExportError("the system prompt is empty")
    try:
        prompt = SystemPrompt.make(tokenizer, text, template)
    except PromptError as error:
        raise ExportError(f"the system prompt cannot be made a prefix: {error}") from error
    if not prompt.token_ids:
        raise ExportError("the system prompt has no tokens")
    return prompt


def choose_max_context(prefix_length: int, max_positions: int, wanted: int | None) -> int:
    """Tokens that one request may hold beside the prefix: what is wanted, or as many as there are, up to
    4096.

    Raises: ExportError if the prefix leaves fewer positions than that.
    """
    left = max_positions - prefix_length
    if left < 1:
        raise ExportError(
            f"the system prompt has {prefix_length} tokens, the model has {max_positions} positions: it "
            "must be shorter "
            "than that"
        )
    if wanted is None:
        return min(left, DEFAULT_MAX_CONTEXT)
    if wanted < 1:
        raise ExportError(f"max_context is {wanted}; at least 1 token is needed")
    if wanted > left:
        raise ExportError(
            f"max_context is {wanted}, but the system prompt's {prefix_length} tokens leave only {left} of "
            "the model's "
            f"{max_positions} positions"
        )
    return wanted


def make_prefix(
    output: str | os.PathLike[str],
    system_prompt: str,
    *,
    max_context: int | None = None,
    template: str | None = None,
    threads: int | None = None,
    progress: bool = False,
) -> Path:
    """Gives an artifact another system prompt; its weights are not read into memory, nor copied.

    output: the artifact's folder, which is replaced as a whole when all is done.
    system_prompt: the text. max_context: as for `export_model`; the old one is kept by default, or made
    smaller
        where the new prompt leaves fewer positions.
    template: "chat", "plain", or None for the one the artifact was exported with.
    progress: show a bar on stderr.
    Returns: the folder. Raises: ArtifactError, ExportError; the folder is then as it was.
    """
    artifact = Artifact.open(output)
    manifest = artifact.manifest
    tokenizer = Tokenizer.open(artifact.path)
    prompt = tokenize(tokenizer, system_prompt, template or manifest.prefix.template)
    max_positions = manifest.geometry.max_positions
    min_prefix = int(manifest.source.get("min_prefix", 0))
    if len(prompt.token_ids) < min_prefix:
        raise ExportError(
            f"{output} was exported with rotary frequencies for long texts: a system prompt needs at least "
            f"{min_prefix} tokens there, this one has {len(prompt.token_ids)}; export the model with it"
        )
    if max_context is None:
        max_context = min(manifest.max_context, max(1, max_positions - len(prompt.token_ids)))
    max_context = choose_max_context(len(prompt.token_ids), max_positions, max_context)
    made_here = {MODEL_NAME, manifest.prefix.file, SYSTEM_PROMPT_NAME, MANIFEST_NAME}
    with replace_folder(artifact.path) as folder:
        for name in manifest.files:
            if name not in made_here:
                _link(artifact.file(name), folder / name)
        shutil.copyfile(artifact.file(MODEL_NAME), folder / MODEL_NAME)
        kept = {name: entry for name, entry in manifest.files.items() if name not in made_here}
        manifest = dataclasses.replace(manifest, max_context=max_context, files=kept)
        bake_prefix(folder, manifest, prompt, threads=threads, progress=progress)
        _keep_plans(artifact.path, folder)
    return artifact.path


def _keep_plans(source: Path, folder: Path) -> None:
    """TensorRT plans stay with an artifact: a prefix of the same length is refitted into them."""
    if (source / ENGINE_FOLDER).is_dir():
        (folder / ENGINE_FOLDER).mkdir()
        for file in (source / ENGINE_FOLDER).iterdir():
            _link(file, folder / ENGINE_FOLDER / file.name)


def bake_prefix(
    folder: Path,
    manifest: Manifest,
    prompt: SystemPrompt,
    *,
    threads: int | None,
    progress: bool,
    check: Callable[[onnxruntime.InferenceSession, Manifest], None] | None = None,
) -> Manifest:
    """Computes the prefix of a folder whose model, weights and tokenizer are in place, and writes the rest.

    That is prefix.bin, system_prompt.txt, the prefix initializers of model.onnx, and relay.json with an entry
    for each file. `manifest` says all that does not depend on the prompt; its entries for unchanged files are
    kept. A bfloat16 graph is computed in its float32 form. check: is given the session, with an empty prefix,
    and the manifest of the graph in it.
    Returns: the manifest that was written.
    """
    vocab_size = manifest.geometry.vocab_size
    if max(prompt.token_ids) >= vocab_size:
        raise ExportError(
            f"the tokenizer makes token {max(prompt.token_ids)} of the system prompt, but the model knows "
            f"{vocab_size} "
            "tokens: the tokenizer is another model's"
        )
    info = PrefixInfo(
        mode=manifest.prefix.mode,
        length=len(prompt.token_ids),
        token_ids=prompt.token_ids,
        template=prompt.template,
        file=manifest.prefix.file,
        rendered_at=prompt.rendered_at,
    )
    manifest = dataclasses.replace(manifest, prefix=info)
    (folder / SYSTEM_PROMPT_NAME).write_bytes(prompt.text.encode("utf-8"))
    model = load_graph(folder / MODEL_NAME)
    set_prefix(model, manifest.io.prefix_key, manifest.io.prefix_value, manifest.geometry, None)
    scratch = folder / _SCRATCH_MODEL
    narrow = manifest.dtype == bfloat16.NAME
    onnx.save(to_float32(model) if narrow else model, scratch)
    with stage("check", progress):
        session = open_session(scratch, threads, in_file_order=narrow)
        scratch.unlink()
        if check is not None:
            check(session, computed_here(manifest))
    file = compute_prefix(session, folder, manifest, progress=progress)
    del session
    if info.mode == "static":
        set_prefix(model, manifest.io.prefix_key, manifest.io.prefix_value, manifest.geometry, file)
    onnx.save(model, folder / MODEL_NAME)
    names = sorted(path.name for path in folder.iterdir() if path.name != MANIFEST_NAME)
    files = {name: manifest.files.get(name) or FileEntry.of(folder / name) for name in names}
    manifest = dataclasses.replace(manifest, files=files)
    manifest.write(folder / MANIFEST_NAME)
    return manifest


def load_graph(path: Path) -> onnx.ModelProto:
    """The graph of an ONNX file, its external data left where it is."""
    try:
        return onnx.load(path, load_external_data=False)
    except Exception as error:  # protobuf raises errors of its own
        raise ArtifactError(f"{path}: cannot be read as an ONNX model: {error}") from error


def set_prefix(
    model: onnx.ModelProto, key_name: str, value_name: str, geometry: Geometry, file: PrefixFile | None
) -> None:
    """Points the prefix initializers of a graph at a prefix file, or makes them empty. Graph inputs are left
    alone."""
    initializers = {tensor.name: tensor for tensor in model.graph.initializer}
    stated = {value.name: value.type.tensor_type.shape for value in model.graph.value_info}
    extents = file.extents() if file else [(0, 0, 0)] * geometry.num_layers
    for layer, ((heads, head_dim), (key_offset, value_offset, nbytes)) in enumerate(
        zip(geometry.layers, extents, strict=True)
    ):
        for pattern, offset in ((key_name, key_offset), (value_name, value_offset)):
            tensor = initializers.get(pattern.format(layer=layer))
            if tensor is None:
                continue
            length = file.header.prefix_length if file else 0
            del tensor.dims[:], tensor.external_data[:]
            tensor.dims.extend([heads, length, head_dim])
            if tensor.name in stated:
                stated[tensor.name].dim[1].dim_value = length
            tensor.raw_data = b""
            tensor.data_location = onnx.TensorProto.DEFAULT
            if file:
                tensor.ClearField("raw_data")
                tensor.data_location = onnx.TensorProto.EXTERNAL
                for key, text in (("location", file.path.name), ("offset", offset), ("length", nbytes)):
                    tensor.external_data.add(key=key, value=str(text))


def compute_prefix(
    session: onnxruntime.InferenceSession,
    folder: Path,
    manifest: Manifest,
    *,
    progress: bool,
    chunk: int = CHUNK,
) -> PrefixFile:
    """Runs the prefix tokens through a graph with an empty prefix; its caches are prefix.bin, mapped.

    The keys and values of the tokens are written into the file as the op appends them, so memory holds one
    chunk's activations and as much of the file as the system likes to keep. Where the manifest says bfloat16,
    the session computes in float32, into a file that is rounded (to nearest, ties to even) into prefix.bin.
    Raises: ExportError if the keys or values are not finite; BackendError if the session fails.
    """
    if manifest.dtype == bfloat16.NAME:
        return _compute_and_round(session, folder, manifest, progress=progress, chunk=chunk)
    header, io = PrefixHeader.of(manifest), manifest.io
    token_ids = np.asarray(manifest.prefix.token_ids, np.int32)
    with _mapped(folder / manifest.prefix.file, header) as (file, caches):
        binding = session.io_binding()
        dtype = np.dtype(header.dtype)
        for layer, (heads, head_dim) in enumerate(header.layers):
            shape = [1, heads, header.prefix_length, head_dim]
            names = ((io.past_key, io.present_key), (io.past_value, io.present_value))
            for (past, present), cache in zip(names, caches[layer], strict=True):
                address = cache.ctypes.data
                binding.bind_input(past.format(layer=layer), "cpu", 0, dtype, shape, address)
                binding.bind_output(present.format(layer=layer), "cpu", 0, dtype, shape, address)
        bind_empty_prefix(binding, manifest)
        with tqdm(
            total=len(token_ids), unit="token", desc="prefix", disable=None if progress else True
        ) as bar:
            for start in range(0, len(token_ids), chunk):
                part = token_ids[None, start : start + chunk]
                binding.bind_cpu_input(io.input_ids, np.ascontiguousarray(part))
                binding.bind_cpu_input(io.context_lens, np.array([start], np.int32))
                binding.bind_cpu_input(io.query_lens, np.array([part.shape[1]], np.int32))
                binding.bind_output(io.logits, "cpu")  # anew: its shape may change
                run_bound(session, binding)
                bar.update(part.shape[1])
        for layer, pair in enumerate(caches):
            for what, cache in zip(("keys", "values"), pair, strict=True):
                if not all(np.isfinite(head).all() for head in cache):
                    raise ExportError(
                        f"layer {layer}: the {what} of the system prompt are not finite: the weights hold "
                        "NaN or Inf, or "
                        f"{header.dtype} is too narrow for this model"
                    )
    return file


def _compute_and_round(
    session: onnxruntime.InferenceSession, folder: Path, manifest: Manifest, *, progress: bool, chunk: int
) -> PrefixFile:
    """`compute_prefix` of a bfloat16 artifact, by a session in float32."""
    info = dataclasses.replace(manifest.prefix, file=f"{manifest.prefix.file}.float32")
    wide = dataclasses.replace(computed_here(manifest), prefix=info)
    computed = compute_prefix(session, folder, wide, progress=progress, chunk=chunk)
    with _mapped(folder / manifest.prefix.file, PrefixHeader.of(manifest)) as (file, caches):
        for pair, exact in zip(caches, computed.read(), strict=True):
            for cache, values in zip(pair, exact, strict=True):
                for head, numbers in zip(cache, values, strict=True):  # one at a time in memory
                    head[:] = bfloat16.narrow(numbers)
    computed.path.unlink()
    return file


def bind_empty_prefix(binding: onnxruntime.IOBinding, manifest: Manifest) -> None:
    """Binds a prefix of length 0 where the graph takes it as input; in "static" graphs it is there
    already."""
    if manifest.prefix.mode == "static":
        return
    for layer, (heads, head_dim) in enumerate(manifest.geometry.layers):
        empty = np.zeros((heads, 0, head_dim), manifest.dtype)
        for name in (manifest.io.prefix_key, manifest.io.prefix_value):
            binding.bind_cpu_input(name.format(layer=layer), empty)


def open_session(
    model: Path, threads: int | None = None, in_file_order: bool = False
) -> onnxruntime.InferenceSession:
    """A CPU session with the RelayAttention library that holds no copy of the weights.

    They are mapped, as `keep_mapped` says. in_file_order: run the nodes as they are and in their order, for
    graphs with Casts of weights: what ONNX Runtime fuses it runs behind all the Casts, whose results pile up.
    Raises: BackendError if it cannot be made.
    """
    options = onnxruntime.SessionOptions()
    options.register_custom_ops_library(str(library_path()))
    options.log_severity_level = 3
    options.intra_op_num_threads = threads or 0
    disabled = keep_mapped(options)
    if in_file_order:
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    try:
        return onnxruntime.InferenceSession(
            model, options, providers=["CPUExecutionProvider"], disabled_optimizers=disabled
        )
    except Exception as error:  # onnxruntime raises many kinds
        raise BackendError(f"{model}: ONNX Runtime cannot load the graph: {error}") from error


def run_bound(session: onnxruntime.InferenceSession, binding: onnxruntime.IOBinding) -> None:
    """Runs a bound session. Raises: BackendError with the engine's words."""
    try:
        session.run_with_iobinding(binding)
    except Exception as error:  # onnxruntime raises many kinds
        raise BackendError(f"ONNX Runtime failed to run the graph: {error}") from error


@contextmanager
def _mapped(
    path: Path, header: PrefixHeader
) -> Iterator[tuple[PrefixFile, list[tuple[np.ndarray, np.ndarray]]]]:
    """prefix.bin with its header written and its tensors mapped for writing; flushed when the block ends."""
    packed = header.pack()
    file = PrefixFile(path, header, len(packed))
    _, value_offset, nbytes = file.extents()[-1]
    size = value_offset + nbytes
    dtype = bfloat16.storage(header.dtype)
    with path.open("w+b") as stream:
        stream.write(packed)
        stream.flush()
        # a full disk must be an error here, not a signal while the mapping is written
        os.posix_fallocate(stream.fileno(), 0, size)
        mapping = mmap.mmap(stream.fileno(), size)
        caches = []
        for (heads, head_dim), offsets in zip(header.layers, file.extents(), strict=True):
            shape = (heads, header.prefix_length, head_dim)
            pair = [
                np.frombuffer(mapping, dtype, int(np.prod(shape)), offset).reshape(shape)
                for offset in offsets[:2]
            ]
            caches.append((pair[0], pair[1]))
        yield file, caches
        mapping.flush()
        os.fsync(stream.fileno())


def _link(source: Path, target: Path) -> None:
    """A hard link, or a copy where the file system has none."""
    try:
        target.hardlink_to(source)
    except OSError:
        shutil.copyfile(source, target)
