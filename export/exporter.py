"""Export: a model folder and a system prompt become an artifact."""

from __future__ import annotations

import gc
import hashlib
import json
import os
import shutil
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
from tqdm import tqdm

from relay_attention.errors import ArtifactError, ExportError
from relay_attention.export.folder import replace_folder
from relay_attention.export.graph import find_nodes, graph_output, int_attribute
from relay_attention.export.passes import rewrite, run
from relay_attention.export.passes.bfloat16_on_cuda import Bfloat16OnCuda
from relay_attention.export.passes.gather_on_device import GatherOnDevice
from relay_attention.export.passes.replace_attention import is_relay_attention
from relay_attention.export.passes.split_mixed_norms import SplitMixedNorms
from relay_attention.export.passes.tensorrt import tensorrt_passes
from relay_attention.export.pieces import check_pieces
from relay_attention.export.prefix import bake_prefix, choose_max_context, load_graph, tokenize
from relay_attention.export.progress import stage
from relay_attention.export.source import GENAI, ONNX, PRECISIONS, SourceModel, detect, files_beside
from relay_attention.runtime import bfloat16
from relay_attention.runtime.artifact import (
    MODEL_NAME,
    WEIGHTS_NAME,
    FileEntry,
    Geometry,
    IoNames,
    Manifest,
    PrefixInfo,
    TokenIds,
    file_sha256,
)
from relay_attention.runtime.text import TOKENIZER_FILES, TOKENIZER_NAME, Tokenizer

TARGETS = ("onnxruntime", "tensorrt")
_WEIGHT_ALIGNMENT = 4096
_NO_BFLOAT16_THERE = (
    "--target tensorrt takes no bfloat16: TensorRT 8.6 has none, and later ones were not tried with it; "
    "export with --precision fp16, or without --target tensorrt for the backend 'onnxruntime-cuda'"
)


def export_model(
    model: str | os.PathLike[str],
    system_prompt: str,
    output: str | os.PathLike[str],
    *,
    precision: str | None = None,
    target: str = "onnxruntime",
    max_context: int | None = None,
    prefix: str = "static",
    all_logits: bool = False,
    template: str | None = None,
    threads: int | None = None,
    progress: bool = False,
) -> Path:
    """Exports a model with a system prompt into an artifact folder.

    model: a Hugging Face folder (config.json, safetensors, tokenizer), or one made by onnxruntime-genai's
    model
        builder. Only its files are read; no code of its own is run.
    system_prompt: the text whose keys and values are computed once.
    output: the folder to write; an artifact that is there is replaced when all is done.
    precision: "fp32", "fp16" or "bf16" (which runs on GPUs only) for weights and KV cache; None for fp32, or
        for what a genai folder or an ONNX decoder holds.
    target: "onnxruntime", or "tensorrt" for a graph in forms that TensorRT 8.6 takes as well.
    max_context: tokens that one request may hold beside the prefix, at most the model's positions less the
    prefix;
        None for as many as there are, up to 4096.
    prefix: "static" for initializers of the graph, "input" for graph inputs that the runtime binds.
    all_logits: logits of every token ([batch, sequence, vocab]) instead of the last of each row ([batch,
    vocab]).
    template: "chat", "plain", or None for "chat" where the tokenizer has a chat template.
    threads: of ONNX Runtime while the prefix is computed. progress: show steps and bars on stderr.
    Returns: the folder, absolute.
    Raises: ExportError; `output` is then as it was.
    """
    source, output = Path(model), Path(output)
    if prefix not in ("static", "input"):
        raise ExportError(f"prefix is {prefix!r}; it is 'static' or 'input'")
    if precision not in (None, *PRECISIONS):
        raise ExportError(f"precision is {precision!r}; it is one of {', '.join(PRECISIONS)}")
    if target not in TARGETS:
        raise ExportError(f"target is {target!r}; it is {' or '.join(TARGETS)}")
    if target == "tensorrt" and precision == "bf16":
        raise ExportError(_NO_BFLOAT16_THERE)
    kind = detect(source)
    with replace_folder(output) as folder:
        tokenizer = _copy_tokenizer(files_beside(source), folder)
        prompt = tokenize(tokenizer, system_prompt, template)
        loaded = _load(source, kind, precision, len(prompt.token_ids), max_context, progress)
        max_context = choose_max_context(len(prompt.token_ids), loaded.max_positions, max_context)
        with stage("rewrite", progress):
            rewrite(
                loaded.model,
                prefix_mode=prefix,
                all_logits=all_logits,
                max_positions=loaded.max_positions,
            )
            dtype = _dtype(loaded.model)
            if target == "tensorrt" and dtype == bfloat16.NAME:
                raise ExportError(_NO_BFLOAT16_THERE)
            run(loaded.model, tensorrt_passes() if target == "tensorrt" else [GatherOnDevice()])
            if dtype == bfloat16.NAME:
                run(loaded.model, [Bfloat16OnCuda(), SplitMixedNorms()])
        geometry = _geometry(loaded)
        _write_model(loaded.model, folder, progress)
        eos = loaded.eos or ((tokenizer.eos_id,) if tokenizer.eos_id is not None else ())
        entries = _file_entries(folder, progress)
        manifest = Manifest(
            model_id=_model_id(folder, entries),
            dtype=dtype,
            geometry=geometry,
            max_context=max_context,
            prefix=PrefixInfo(prefix, 0, (), prompt.template),
            tokens=TokenIds(tokenizer.bos_id, tuple(eos), tokenizer.pad_id),
            logits="all" if all_logits else "last",
            source=_source(loaded),
            files=entries,
        )
        _check_tokens(manifest)
        # the weights are in the folder now; the prefix is computed from there
        _release_weights(loaded.model)
        del loaded
        bake_prefix(
            folder,
            manifest,
            prompt,
            threads=threads,
            progress=progress,
            check=check_pieces,
        )
    return output.resolve()


def _load(
    folder: Path,
    kind: str,
    precision: str | None,
    prefix_length: int,
    max_context: int | None,
    progress: bool,
) -> SourceModel:
    if kind == GENAI:
        from relay_attention.export.genai import load_genai

        with stage("read", progress):
            loaded = load_genai(folder, prefix_length, max_context)
        if precision is not None:
            _check_precision(loaded, folder, precision)
        return loaded
    if kind == ONNX:
        try:
            from relay_attention.export.onnx_source import load_onnx
        except ImportError as error:
            raise ExportError(
                f"{folder} is an ONNX decoder; exporting it needs onnxscript "
                f"(pip install 'relay-attention[export]'): {error}"
            ) from error
        with stage("read", progress):
            return load_onnx(folder, precision)
    try:
        from relay_attention.export.huggingface import load_huggingface
    except ImportError as error:
        raise ExportError(
            f"{folder} is a Hugging Face model; exporting it needs torch, transformers and onnxscript "
            f"(pip install 'relay-attention[export]'): {error}"
        ) from error
    dtype = str(PRECISIONS[precision or "fp32"].numpy())
    return load_huggingface(folder, dtype, prefix_length, max_context, progress)


def _source(loaded: SourceModel) -> dict[str, str]:
    source = {"kind": loaded.kind, "architecture": loaded.architecture}
    return source | ({"min_prefix": str(loaded.min_prefix)} if loaded.min_prefix else {})


def _check_precision(loaded: SourceModel, folder: Path, precision: str) -> None:
    output = graph_output(loaded.model, "logits")
    held = PRECISIONS.values()
    caches = {value.dtype for value in loaded.model.graph.inputs if value.dtype in held}
    if output is not None and caches and caches != {PRECISIONS[precision]}:
        found = ", ".join(sorted(str(dtype) for dtype in caches))
        raise ExportError(
            f"{folder}: built with a KV cache of {found}; its precision cannot be changed to {precision}: "
            f"build it with -p {precision}, or leave --precision out"
        )


def _copy_tokenizer(source: Path, folder: Path) -> Tokenizer:
    """Copies the tokenizer's files and opens them.

    A folder without tokenizer.json, but with the files that such a tokenizer can be made from, is converted.
    """
    for name in TOKENIZER_FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, folder / name)
    if not (folder / TOKENIZER_NAME).is_file():
        _convert_tokenizer(source, folder)
    try:
        return Tokenizer.open(folder)
    except ArtifactError as error:
        raise ExportError(f"{source}: {str(error).replace(str(folder), str(source))}") from error


def _convert_tokenizer(source: Path, folder: Path) -> None:
    if not any((source / name).is_file() for name in ("tokenizer.model", "vocab.json", "vocab.txt")):
        raise ExportError(
            f"{source}: it has no tokenizer ({TOKENIZER_NAME}); save the tokenizer into the model's folder"
        )
    try:
        import transformers

        tokenizer = transformers.AutoTokenizer.from_pretrained(
            source, local_files_only=True, trust_remote_code=False
        )
        tokenizer.backend_tokenizer.save(str(folder / TOKENIZER_NAME))
    except Exception as error:  # transformers raises many kinds
        raise ExportError(
            f"{source}: it has no {TOKENIZER_NAME}, and its tokenizer cannot be converted to one: {error}"
        ) from error


def _geometry(loaded: SourceModel) -> Geometry:
    """The shape of a rewritten model, as its RelayAttention nodes state it.

    Raises: ExportError if there are fewer of them than layers, or positions past a rotary table.
    """
    nodes = list(find_nodes(loaded.model, is_relay_attention))
    if loaded.num_layers is not None and len(nodes) != loaded.num_layers:
        raise ExportError(
            f"{loaded.architecture} has {loaded.num_layers} layers, but {len(nodes)} attentions that can "
            "be rewritten: "
            "the other layers keep a state that the artifact cannot cache"
        )
    logits = graph_output(loaded.model, "logits")
    assert logits is not None
    vocab_size = logits.shape[-1] if logits.shape is not None and len(logits.shape) else None
    if not isinstance(vocab_size, int):
        raise ExportError("the size of the vocabulary is not in the shape of the graph's logits")
    max_positions = loaded.max_positions
    for node in nodes:
        if int_attribute(node, "do_rotary"):
            rows = node.inputs[9].shape[0]
            max_positions = min(max_positions, rows) if isinstance(rows, int) else max_positions
    return Geometry(
        num_layers=len(nodes),
        num_heads=tuple(int_attribute(node, "num_heads") for node in nodes),
        kv_num_heads=tuple(int_attribute(node, "kv_num_heads") for node in nodes),
        head_dim=tuple(int(node.inputs[3].shape[3]) for node in nodes),
        local_window_size=tuple(int_attribute(node, "local_window_size", -1) for node in nodes),
        vocab_size=vocab_size,
        max_positions=max_positions,
    )


def _dtype(model: ir.Model) -> str:
    dtypes = {node.inputs[0].dtype for node in find_nodes(model, is_relay_attention)}
    if len(dtypes) != 1:
        raise ExportError(f"the layers' attentions are of different types: {', '.join(map(str, dtypes))}")
    return str(dtypes.pop().numpy())


def _write_model(model: ir.Model, folder: Path, progress: bool) -> None:
    """model.onnx, and weights.bin with every weight, one at a time."""
    model.producer_name = "relay-attention"
    model.graph.name = "relay_attention"
    with tqdm(desc="weights", unit="tensor", disable=None if progress else True) as bar:

        def advance(_: ir.TensorProtocol, info: ir.external_data.CallbackInfo) -> None:
            bar.total = info.total
            bar.update()

        ir.save(
            model,
            folder / MODEL_NAME,
            external_data=WEIGHTS_NAME,
            alignment=_WEIGHT_ALIGNMENT,
            align_threshold=_WEIGHT_ALIGNMENT,
            callback=advance,
        )


def _file_entries(folder: Path, progress: bool) -> dict[str, FileEntry]:
    """Sizes and hashes of the files that no prefix changes."""
    paths = [path for path in sorted(folder.iterdir()) if path.name != MODEL_NAME]
    sizes = {path: path.stat().st_size for path in paths}
    total = sum(sizes.values())
    with tqdm(
        total=total, desc="hashes", unit="B", unit_scale=True, disable=None if progress else True
    ) as bar:
        return {path.name: FileEntry(sizes[path], file_sha256(path, bar.update)) for path in paths}


def _release_weights(model: ir.Model) -> None:
    """Frees the weights' memory; onnxscript's rewrite rules keep the last graph they saw."""
    for value in model.graph.initializers.values():
        value.const_value = None
    gc.collect()


def _model_id(folder: Path, entries: dict[str, FileEntry]) -> str:
    """Identity of the weights: names, types, shapes, and content, those in weights.bin by its hash."""
    digest = hashlib.sha256()
    names = IoNames()
    prefixes = tuple(pattern.split("{")[0] for pattern in (names.prefix_key, names.prefix_value))
    for tensor in sorted(load_graph(folder / MODEL_NAME).graph.initializer, key=lambda tensor: tensor.name):
        if tensor.name.startswith(prefixes):
            continue
        digest.update(json.dumps([tensor.name, tensor.data_type, list(tensor.dims)]).encode())
        if tensor.data_location == onnx.TensorProto.EXTERNAL:
            digest.update(json.dumps({entry.key: entry.value for entry in tensor.external_data}).encode())
        else:
            digest.update(np.ascontiguousarray(onnx.numpy_helper.to_array(tensor)).tobytes())
    if WEIGHTS_NAME in entries:
        digest.update(entries[WEIGHTS_NAME].sha256.encode())
    return digest.hexdigest()


def _check_tokens(manifest: Manifest) -> None:
    too_large = [token for token in manifest.tokens.eos if token >= manifest.geometry.vocab_size]
    if too_large:
        raise ExportError(
            f"the model's end tokens {too_large} are outside its vocabulary of {manifest.geometry.vocab_size}"
        )
