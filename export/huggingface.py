"""Hugging Face folders: a transformers model, traced by torch.onnx.export with its attention kept whole.

transformers lets one register an attention function and a mask function. The ones registered here trace every
attention as one relay.AttentionForm node with its scale, softcap and window; no mask is ever built, no cache
is traced, and rotary embedding stays in the graph as arithmetic on position_ids. No model family has code
here.

What a model asks of its masks is found by probing: a first forward pass, in eager mode, hands over the
function that says which keys a query sees, and that function is evaluated. The same pass computes each
attention as it will be described, and must give the logits that the model gives with its own attention.
"""

from __future__ import annotations

import io
import logging
import re
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import onnx_ir as ir
import onnxscript.optimizer
import torch
import transformers

from relay_attention.errors import ExportError
from relay_attention.export.experts import split_experts
from relay_attention.export.passes import FoldWeightTransposes, run
from relay_attention.export.progress import stage
from relay_attention.export.rotary_regime import fix_regime
from relay_attention.export.source import HUGGINGFACE, SourceModel, token_list

IMPLEMENTATION = "relay"
OPSET = 18
# norm of the difference of logits relative to theirs: rounding, in different orders
_PROBE_TOLERANCE = {torch.float32: 1e-3, torch.float16: 5e-2, torch.bfloat16: 1e-1}
# keyword arguments of attention functions that do not change what is computed
_NEUTRAL = {
    "attention_mask", "cache_position", "cu_seq_lens_k", "cu_seq_lens_q", "deterministic", "dropout",
    "is_causal", "layer_idx", "max_length_k", "max_length_q", "output_attentions", "output_hidden_states",
    "output_router_logits", "past_key_value", "past_key_values", "position_embeddings", "position_ids",
    "return_dict", "sliding_window", "use_cache",
}  # fmt: skip
_REASONS = {
    "s_aux": "it has attention sinks, which RelayAttention has not",
    "sinks": "it has attention sinks, which RelayAttention has not",
    "position_bias": "it adds a learned position bias to the scores",
    "cache": "it manages a cache of its own",
    "indexer": "it selects keys by an indexer",
}
# what a model's config or code mentions, and why that is the likely reason for a refusal
_EVIDENCE = (
    ("alibi", "ALiBi adds a bias by distance to every score, which RelayAttention has not"),
    ("kv_lora_rank", "multi-head latent attention caches a compressed state, not keys and values"),
    (
        "gateddelta|linear_?attention|mamba|ssm_|rwkv|recurrent",
        "layers of linear attention, state-space or recurrent, keep a state that is no list of keys",
    ),
)


class _Visibility:
    """Stands for a mask while tracing: which keys before its own a query sees, its own included (-1: all)."""

    def __init__(self, local_window_size: int):
        self.local_window_size = local_window_size


class _Trace:
    """What the first, eager pass finds out, and the traced pass uses: masks in the order they are made."""

    def __init__(self, max_positions: int):
        self.max_positions = max_positions
        self.masks: list[_Visibility] = []
        self.replay: Iterator[_Visibility] | None = None
        self.num_sites = 0


_trace: _Trace | None = None


def load_huggingface(
    folder: Path,
    dtype: str,
    prefix_length: int = 0,
    max_context: int | None = None,
    progress: bool = False,
) -> SourceModel:
    """Loads a folder's causal language model and traces it; the graph's weights are the model's own tensors.

    dtype: "float32", "float16" or "bfloat16", to which the weights are converted.
    prefix_length: tokens of the system prompt. max_context: as the user gave it. Both matter only to rotary
        embedding that depends on how long a request is.
    progress: show each step on stderr.
    Raises: ExportError for a model that is not a decoder, needs code of its own, lacks weights, or whose
        attention does not go through transformers' attention interface.
    """
    config = _read_config(folder)
    text_config = config.get_text_config(decoder=True)
    max_positions = _max_positions(config, text_config, folder)
    model = _load(folder, config, getattr(torch, dtype), progress)
    try:
        regime = fix_regime(model, prefix_length, max_context, max_positions)
    except ExportError as error:
        raise ExportError(f"{folder}: {type(model).__name__}: {error}") from error
    with stage("run", progress):
        own_logits = _own_logits(model)
        split_experts(model)
    with _registered(max_positions) as trace, torch.no_grad():
        with stage("run with attention as described", progress):
            _probe(model, trace, folder, own_logits)
        with stage("trace", progress):
            graph = _export(model, trace, folder)
    eos = token_list(getattr(model.generation_config, "eos_token_id", None)) or token_list(
        getattr(text_config, "eos_token_id", None)
    )
    return SourceModel(
        model=graph,
        kind=HUGGINGFACE,
        architecture=type(model).__name__,
        max_positions=regime.max_positions,
        min_prefix=regime.min_prefix,
        num_layers=text_config.num_hidden_layers,
        eos=eos,
    )


def _read_config(folder: Path) -> Any:
    try:
        config = transformers.AutoConfig.from_pretrained(
            folder, trust_remote_code=False, local_files_only=True
        )
    except Exception as error:  # transformers raises many kinds
        raise ExportError(
            f"{folder / 'config.json'}: transformers cannot read it: {_first_line(error)}"
        ) from error
    architecture = (config.architectures or [type(config).__name__])[0]
    if config.is_encoder_decoder:
        raise ExportError(f"{folder}: {architecture} is an encoder-decoder; only decoders can be exported")
    if type(config) not in transformers.MODEL_FOR_CAUSAL_LM_MAPPING:
        raise ExportError(f"{folder}: {architecture} is not a causal language model of transformers")
    if getattr(config, "quantization_config", None):
        raise ExportError(
            f"{folder}: {architecture} holds quantised weights, which torch cannot trace here: export the "
            "folder that "
            "onnxruntime-genai's model builder makes of it"
        )
    return config


def _max_positions(config: Any, text_config: Any, folder: Path) -> int:
    for name in ("max_position_embeddings", "n_positions", "max_seq_len"):
        value = getattr(text_config, name, None)
        if isinstance(value, int) and value > 0:
            return value
    model_class: Any = transformers.MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    detail = "config.json does not say how many positions the model has"
    raise ExportError(_refusal(folder, model_class, config, detail))


def _refusal(folder: Path, model_class: type, config: Any, detail: str) -> str:
    """Words for a refused model: the likely reason, as its config or code mention it, and the symptom."""
    text_config = config.get_text_config(decoder=True)
    layer_types = map(str, getattr(text_config, "layer_types", None) or ())
    names = vars(sys.modules[model_class.__module__]).items()
    own = [name for name, value in names if getattr(value, "__module__", "") == model_class.__module__]
    mentioned = " ".join([*text_config.to_dict(), *layer_types, *own]).lower()
    reasons = [reason for pattern, reason in _EVIDENCE if re.search(pattern, mentioned)]
    return ": ".join([f"{folder}: {model_class.__name__}", *reasons[:1], detail])


def _load(folder: Path, config: Any, dtype: torch.dtype, progress: bool) -> Any:
    bars = transformers.utils.logging.is_progress_bar_enabled()
    if not (progress and sys.stderr.isatty()):
        transformers.utils.logging.disable_progress_bar()
    try:
        model, info = transformers.AutoModelForCausalLM.from_pretrained(
            folder,
            config=config,
            dtype=dtype,
            use_safetensors=True,
            local_files_only=True,
            trust_remote_code=False,
            output_loading_info=True,
        )
    except Exception as error:  # transformers raises many kinds
        raise ExportError(f"{folder}: transformers cannot load it: {_first_line(error)}") from error
    finally:
        if bars:
            transformers.utils.logging.enable_progress_bar()
    missing = sorted(str(name) for name in {*info["missing_keys"], *info.get("mismatched_keys", ())})
    if missing:
        raise ExportError(
            f"{folder}: the weights lack {len(missing)} tensors of the model: {', '.join(missing[:5])}"
        )
    return model.eval()


@contextmanager
def _registered(max_positions: int) -> Iterator[_Trace]:
    """Registers the attention and mask functions for as long as a model is traced."""
    global _trace
    transformers.AttentionInterface.register(IMPLEMENTATION, _attention)
    transformers.AttentionMaskInterface.register(IMPLEMENTATION, _mask)
    # models that do not go through the attention interface may still call torch's attention with its masks
    masks = transformers.AttentionMaskInterface._global_mapping
    own_mask, own_attention = masks["sdpa"], torch.nn.functional.scaled_dot_product_attention
    masks["sdpa"] = _mask
    torch.nn.functional.scaled_dot_product_attention = _torch_attention
    _trace = _Trace(max_positions)
    try:
        yield _trace
    finally:
        _trace = None
        masks["sdpa"] = own_mask
        torch.nn.functional.scaled_dot_product_attention = own_attention


def _inputs() -> dict[str, torch.Tensor]:
    ids = torch.zeros(2, 3, dtype=torch.int64)
    return {
        "input_ids": ids,
        "position_ids": torch.arange(3).expand(2, 3).contiguous(),
        "attention_mask": torch.ones_like(ids),
    }


def _probe_inputs(model: Any) -> dict[str, torch.Tensor]:
    """Two rows of eight tokens; tokens differ, or every attention would give the same."""
    vocab_size = model.config.get_text_config(decoder=True).vocab_size
    ids = (torch.arange(16).reshape(2, 8) * 7 + 3) % vocab_size
    positions = torch.arange(8).expand(2, 8).contiguous()
    return {"input_ids": ids, "position_ids": positions, "attention_mask": torch.ones_like(ids)}


def _own_logits(model: Any) -> torch.Tensor | None:
    """What the model gives with an attention and experts of its own; None if it does not run so."""
    try:
        model.set_attn_implementation("eager")
        with torch.no_grad():
            logits: torch.Tensor = model(**_probe_inputs(model), use_cache=False, return_dict=True).logits
        return logits.float()
    except Exception:  # the model's own code; _probe says what is wrong
        return None


def _probe(model: Any, trace: _Trace, folder: Path, own_logits: torch.Tensor | None) -> None:
    """One eager pass over two short rows: finds the masks, and refuses what cannot be traced, by name."""

    def refusal(detail: str) -> ExportError:
        return ExportError(_refusal(folder, type(model), model.config, detail))

    try:
        model.set_attn_implementation(IMPLEMENTATION)
        logits = model(**_probe_inputs(model), use_cache=False, return_dict=True).logits.float()
    except ExportError as error:
        raise refusal(str(error)) from error
    except Exception as error:  # the model's own code
        raise refusal(
            f"it does not run with an attention function from outside ({type(error).__name__}: "
            f"{_first_line(error)})"
        ) from error
    layers = model.config.get_text_config(decoder=True).num_hidden_layers
    if trace.num_sites != layers:
        raise refusal(
            f"it has {layers} layers, but {trace.num_sites} attentions that go through transformers' "
            "attention interface or torch's scaled_dot_product_attention: the others keep a state that the "
            "artifact cannot cache, or attend in code of their own"
        )
    if own_logits is None:
        raise refusal("it does not run with an attention of its own, to compare with")
    off = float(torch.linalg.norm(logits - own_logits) / torch.linalg.norm(own_logits).clamp(min=1e-30))
    if off > _PROBE_TOLERANCE[model.dtype]:  # NaN in the weights is for the prefix to find
        raise refusal(
            f"its own attention gives other logits (off by {off:.1%}) than scaled dot products with the "
            "scale, softcap and mask that it names: it does more than that"
        )


def _export(model: Any, trace: _Trace, folder: Path) -> ir.Model:
    dims = {0: torch.export.Dim("batch"), 1: torch.export.Dim("sequence")}
    trace.replay = iter(trace.masks)
    inputs = _inputs()
    with _quiet():
        try:
            exported = torch.export.export(
                _LogitsOnly(model), (), inputs, dynamic_shapes={name: dims for name in inputs}, strict=False
            )
            program = torch.onnx.export(
                exported, (), dynamo=True, opset_version=OPSET, optimize=False, verbose=False
            )
        except Exception as error:  # torch's exporters raise many kinds, and explain themselves at the end
            name = type(model).__name__
            raise ExportError(
                f"{folder}: torch cannot export {name} to ONNX: {_root_cause(error)}"
            ) from error
    assert program is not None
    graph = program.model
    prefix = "model."  # of _LogitsOnly
    for value in list(graph.graph.initializers.values()):
        if value.name.startswith(prefix):
            value.name = value.name.removeprefix(prefix)
    graph.graph.outputs[0].name = "logits"
    _take_sizes_from_input_ids(graph)
    run(graph, [FoldWeightTransposes()])
    with _quiet():
        onnxscript.optimizer.optimize(graph)
    return graph


def _take_sizes_from_input_ids(model: ir.Model) -> None:
    """All three inputs are [batch, sequence]; torch may have taken these sizes from any of them."""
    input_ids, *others = model.graph.inputs
    for node, index in [use for value in others for use in value.uses()]:
        if node.op_type == "Shape" and not node.domain:
            node.replace_input_with(index, input_ids)


class _LogitsOnly(torch.nn.Module):
    def __init__(self, model: Any):
        super().__init__()
        self.model = model

    def forward(
        self, input_ids: torch.Tensor, position_ids: torch.Tensor, attention_mask: torch.Tensor
    ) -> torch.Tensor:
        # the attention mask is given so that the model takes the rows as padded, not as packed sequences;
        # nothing may read it but the mask function, or RemoveUnused refuses the graph
        result: torch.Tensor = self.model(
            input_ids=input_ids,
            position_ids=position_ids,
            attention_mask=attention_mask,
            use_cache=False,
            return_dict=True,
        ).logits
        return result


def _mask(mask_function: Callable[..., torch.Tensor], **arguments: Any) -> _Visibility:
    """Mask function of the interface: a description in place of a tensor."""
    assert _trace is not None
    if _trace.replay is not None:
        return next(_trace.replay)
    visibility = _Visibility(probe_window(mask_function, _trace.max_positions))
    _trace.masks.append(visibility)
    return visibility


def probe_window(mask_function: Callable[..., torch.Tensor], max_positions: int) -> int:
    """The window of a causal mask, in keys with the query's own; -1 if every earlier key is seen.

    mask_function: (batch, head, query position, key position) -> bool tensor, as transformers' masks are made
    of.
    Raises: ExportError if the mask is anything but causal with one window for all positions.
    """
    zero = torch.tensor(0)
    keys = torch.arange(max_positions)

    def seen(query: int) -> torch.Tensor:
        visible = mask_function(zero, zero, torch.tensor(query), keys)
        return torch.broadcast_to(visible, keys.shape)

    last = max_positions - 1
    window = int(seen(last).sum())
    for query in sorted(
        {0, 1, last // 3, last // 2, *range(window - 2, window + 3), last} & set(range(last + 1))
    ):
        expected = (keys <= query) & (query - keys < window)
        if not torch.equal(seen(query), expected):
            raise ExportError(
                "its mask is not causal with a fixed window (bidirectional, chunked, or prefix mask)"
            )
    return -1 if window == max_positions else window


def _attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: Any,
    scaling: float | None = None,
    softcap: float | None = None,
    **arguments: Any,
) -> tuple[torch.Tensor, None]:
    """Attention function of the interface: one node in the traced graph.

    query: [batch, num_heads, sequence, head_dim]; key, value: [batch, kv_num_heads, sequence, head_dim].
    Returns: [batch, sequence, num_heads, head_dim] as the interface wants it, and no weights.
    """
    assert _trace is not None
    for name, argument in arguments.items():
        if argument is not None and (
            name in _REASONS or (name not in _NEUTRAL and torch.is_tensor(argument))
        ):
            raise ExportError(_REASONS.get(name, f"its attention takes {name!r}, which is not known here"))
    if not isinstance(attention_mask, _Visibility):
        raise ExportError("its attention takes a mask that is not made by transformers' mask functions")
    batch, num_heads, sequence, head_dim = query.shape
    kv_num_heads = key.shape[1]
    if key.shape[-1] != head_dim or value.shape[-1] != head_dim:
        raise ExportError(
            f"its query, key and value have head sizes {head_dim}, {key.shape[-1]}, {value.shape[-1]}, "
            "which differ"
        )
    if _trace.replay is None:
        _trace.num_sites += 1
        if key.shape[2] != sequence:
            raise ExportError(f"it attends from {sequence} tokens to {key.shape[2]}: not self-attention")
        output = _reference(query, key, value, attention_mask.local_window_size, scaling, softcap)
        return output.transpose(1, 2), None
    flat = [
        tensor.transpose(1, 2).reshape(batch, sequence, tensor.shape[1] * head_dim)
        for tensor in (query, key, value)
    ]
    output = torch.onnx.ops.symbolic(
        "relay::AttentionForm",
        flat,
        {
            "num_heads": num_heads,
            "kv_num_heads": kv_num_heads,
            "head_dim": head_dim,
            "scale": float(scaling) if scaling is not None else 0.0,
            "softcap": float(softcap) if softcap else 0.0,
            "local_window_size": attention_mask.local_window_size,
        },
        dtype=query.dtype,
        shape=flat[0].shape,
        version=1,
    )
    return output.reshape(batch, sequence, num_heads, head_dim), None


def _reference(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    window: int,
    scaling: float | None,
    softcap: float | None,
) -> torch.Tensor:
    """What RelayAttention computes, [batch, num_heads, sequence, head_dim], without prefix and cache."""
    groups = query.shape[1] // key.shape[1]
    key, value = (tensor.repeat_interleave(groups, dim=1).float() for tensor in (key, value))
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    scores = query.float() @ key.transpose(-1, -2) * scale
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    distance = torch.arange(scores.shape[-1])[:, None] - torch.arange(scores.shape[-1])
    seen = (distance >= 0) & ((window < 0) | (distance < window))
    return (scores.masked_fill(~seen, -torch.inf).softmax(-1) @ value).to(query.dtype)


def _torch_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: Any = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> torch.Tensor:
    """Stands for torch's scaled_dot_product_attention while a model is traced.

    Shapes as of `_attention`. Returns: [batch, num_heads, sequence, head_dim].
    """
    if attn_mask is None and is_causal:
        attn_mask = _Visibility(-1)
    elif attn_mask is None:
        raise ExportError("its attention has no mask: a query sees tokens that come after it")
    if query.ndim != 4:
        raise ExportError(f"its attention takes a query of {query.ndim} dimensions")
    output, _ = _attention(torch.nn.Module(), query, key, value, attn_mask, scaling=scale)
    return output.transpose(1, 2)


@contextmanager
def _quiet() -> Iterator[None]:
    """Silences what torch's exporter and onnxscript log and print about their own insides."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "torch.export", "onnxscript", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    heap = io.StringIO()
    with warnings.catch_warnings(), redirect_stdout(heap), redirect_stderr(heap):
        warnings.simplefilter("ignore")
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        try:
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)


def _root_cause(error: BaseException) -> str:
    while error.__cause__ is not None:
        error = error.__cause__
    return f"{type(error).__name__}: {_first_line(error)}"


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
