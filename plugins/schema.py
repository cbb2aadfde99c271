"""The op `relay::RelayAttention`: its inputs, outputs and attributes, defined once for every room.

The C++ side of the same definition is `plugins/common/op.h`; a test keeps the two equal. `docs/op.md` is
printed by `python -m relay_attention.plugins.schema`. Needs nothing but the standard library.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

DOMAIN: Final = "relay"
OP_TYPE: Final = "RelayAttention"
SINCE_VERSION: Final = 1
PLUGIN_VERSION: Final = "1"
MAX_HEAD_DIM: Final = 256
"""head_dim is a multiple of 8, at most this."""
TYPES: Final = {
    "ONNX Runtime, CPU": ("float32", "float16"),
    "ONNX Runtime, CUDA": ("float16", "bfloat16"),
    "TensorRT 8.6": ("float16",),
    "TensorRT 10 and later": ("float16", "bfloat16"),
}
"""What T may be, by engine."""


@dataclass(frozen=True)
class Tensor:
    """One input or output. `type` is "T" (see TYPES; the same for all of them) or "I" (int32)."""

    name: str
    type: str
    shape: tuple[str, ...]
    description: str
    rotary_only: bool = False
    """There exactly when do_rotary = 1."""


@dataclass(frozen=True)
class Attribute:
    """One attribute. A `default` of None means that the node must have it."""

    name: str
    type: type[int] | type[float] | type[str]
    default: int | float | str | None
    description: str


INPUTS: Final = (
    Tensor("query", "T", ("B", "S", "Hq*D"), "new tokens, right-padded to S"),
    Tensor("key", "T", ("B", "S", "Hkv*D"), "keys of the new tokens, not yet rotated"),
    Tensor("value", "T", ("B", "S", "Hkv*D"), "values of the new tokens"),
    Tensor(
        "past_key",
        "T",
        ("B", "Hkv", "Cmax", "D"),
        "cache of each request's own keys, rotated; the prefix is never copied into it",
    ),
    Tensor("past_value", "T", ("B", "Hkv", "Cmax", "D"), "cache of each request's own values"),
    Tensor("context_lens", "I", ("B",), "tokens in the cache before this call"),
    Tensor("query_lens", "I", ("B",), "valid new tokens of each row, at most S; 0 = idle"),
    Tensor("prefix_key", "T", ("Hkv", "P", "D"), "keys of the shared prefix, rotated; P may be 0"),
    Tensor("prefix_value", "T", ("Hkv", "P", "D"), "values of the shared prefix"),
    Tensor(
        "cos_cache", "T", ("max_pos", "R/2"), "cosines, one row a position; R <= D dims are rotated", True
    ),
    Tensor("sin_cache", "T", ("max_pos", "R/2"), "sines", True),
)

OUTPUTS: Final = (
    Tensor("output", "T", ("B", "S", "Hq*D"), "attention output; zero for tokens past query_lens"),
    Tensor(
        "present_key",
        "T",
        ("B", "Hkv", "Cmax", "D"),
        "past_key with the new keys at context_lens[b] .. context_lens[b] + query_lens[b] - 1. Bind it to"
        " past_key's buffer: then only the new tokens are written; otherwise past_key is copied first",
    ),
    Tensor("present_value", "T", ("B", "Hkv", "Cmax", "D"), "past_value with the new values, likewise"),
)

ATTRIBUTES: Final = (
    Attribute("num_heads", int, None, "query heads Hq, a multiple of kv_num_heads"),
    Attribute("kv_num_heads", int, None, "key and value heads Hkv"),
    Attribute("scale", float, 0.0, "factor on query . key; 0 = 1/sqrt(D)"),
    Attribute(
        "softcap",
        float,
        0.0,
        "score = softcap * tanh(score / softcap), after scale, before the mask; 0 = none",
    ),
    Attribute(
        "local_window_size",
        int,
        -1,
        "a key at position j is seen from position i where j <= i and i - j < local_window_size; positions"
        " are absolute, the prefix has 0 .. P-1; -1 = no window",
    ),
    Attribute("do_rotary", int, 0, "1: the op rotates query and key; the node has cos_cache and sin_cache"),
    Attribute(
        "rotary_interleaved",
        int,
        0,
        "0: pairs are (x[i], x[i + R/2]); 1: pairs are (x[2i], x[2i + 1])",
    ),
    Attribute("plugin_version", str, PLUGIN_VERSION, "how TensorRT's parser finds the plugin"),
    Attribute("plugin_namespace", str, DOMAIN, "how TensorRT's parser finds the plugin"),
)

INPUT_NAMES: Final = tuple(tensor.name for tensor in INPUTS)
OUTPUT_NAMES: Final = tuple(tensor.name for tensor in OUTPUTS)


def input_names(do_rotary: bool) -> tuple[str, ...]:
    """Names of a node's inputs, in order."""
    return tuple(tensor.name for tensor in INPUTS if do_rotary or not tensor.rotary_only)


def make_attributes(**values: int | float) -> dict[str, Any]:
    """The attributes of a node, complete and of the right types, from those that differ from the defaults.

    Raises: TypeError for a name that is no attribute, a missing one, or a value of the wrong type.
    """
    unknown = sorted(set(values) - {attribute.name for attribute in ATTRIBUTES})
    if unknown:
        raise TypeError(f"{OP_TYPE} has no attribute {', '.join(unknown)}")
    made: dict[str, Any] = {}
    for attribute in ATTRIBUTES:
        value = values.get(attribute.name, attribute.default)
        if value is None:
            raise TypeError(f"{OP_TYPE} needs the attribute {attribute.name}")
        if attribute.type is not str and attribute.type(value) != value:
            raise TypeError(
                f"{OP_TYPE} attribute {attribute.name} = {value!r} must be of type {attribute.type.__name__}"
            )
        made[attribute.name] = attribute.type(value)
    return made


def make_markdown() -> str:
    """The text of docs/op.md."""
    lines = [
        f"# `{DOMAIN}::{OP_TYPE}`, version {SINCE_VERSION}",
        "",
        "<!-- Made by `python -m relay_attention.plugins.schema > docs/op.md` from plugins/schema.py. -->",
        "",
        "Attention of new tokens over a prefix that all requests share and over each request's own context,"
        " causal among the new tokens, fused exactly:",
        "",
        "    o_p, lse_p = attention(query, prefix_key, prefix_value)",
        "    o_c, lse_c = attention(query, present_key, present_value)",
        "    output     = (e^lse_p * o_p + e^lse_c * o_c) / (e^lse_p + e^lse_c)",
        "",
        "B = batch, S = new tokens of the longest row, Hq = num_heads, Hkv = kv_num_heads, D = head_dim (a"
        f" multiple of 8, at most {MAX_HEAD_DIM}), Cmax = cache capacity in tokens, P = prefix length,"
        " R = rotary dimensions. T is one type for all: "
        + "; ".join(f"{' or '.join(types)} ({engine})" for engine, types in TYPES.items())
        + ". Softmax and fusion are computed in float32. Token s of row b has the absolute position"
        " P + context_lens[b] + s; with do_rotary = 1, query and key are rotated at that position.",
        "",
        "| # | input | type | shape | |",
        "|---|---|---|---|---|",
    ]
    types = {"T": "T", "I": "int32"}
    for index, tensor in enumerate(INPUTS):
        note = tensor.description + ("; only with do_rotary = 1" if tensor.rotary_only else "")
        lines.append(
            f"| {index} | {tensor.name} | {types[tensor.type]} | [{', '.join(tensor.shape)}] | {note} |"
        )
    lines += ["", "| # | output | type | shape | |", "|---|---|---|---|---|"]
    for index, tensor in enumerate(OUTPUTS):
        shape = ", ".join(tensor.shape)
        lines.append(f"| {index} | {tensor.name} | {types[tensor.type]} | [{shape}] | {tensor.description} |")
    lines += ["", "| attribute | type | default | |", "|---|---|---|---|"]
    for attribute in ATTRIBUTES:
        default = "required" if attribute.default is None else repr(attribute.default).replace("'", '"')
        lines.append(
            f"| {attribute.name} | {attribute.type.__name__} | {default} | {attribute.description} |"
        )
    lines += [
        "",
        "Errors that a kernel reports when it runs, with the node's name, the argument and its value: shapes"
        " that disagree; negative lengths; query_lens[b] > S; context_lens[b] + query_lens[b] > Cmax; a"
        " position beyond the rotary cache. Attributes, the number of inputs and head_dim are checked when"
        " the session is made.",
        "",
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    print(make_markdown(), end="")
