"""The CUDA kernels' C interface (plugins/cuda/launch.h) in ctypes, and the op in float64 to compare with.

Shared by tests/gpu, tests/cuda_emulation and scripts/bench_gpu.py; needs numpy only.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]
Bits = npt.NDArray[np.uint16]
FLOAT16, BFLOAT16 = 0, 1


class Params(ctypes.Structure):
    """RelayParams, field by field."""

    _fields_ = (
        *[
            (name, ctypes.c_void_p)
            for name in (
                "query", "key", "value", "past_key", "past_value", "present_key", "present_value",
                "context_lens", "query_lens", "prefix_key", "prefix_value", "cos_cache",
                "sin_cache", "output",
            )
        ],
        *[
            (name, ctypes.c_int32)
            for name in (
                "batch", "sequence", "num_heads", "kv_num_heads", "head_dim", "max_context", "prefix_length",
                "rotary_dim", "max_positions",
            )
        ],
        ("scale", ctypes.c_float),
        ("softcap", ctypes.c_float),
        ("local_window_size", ctypes.c_int32),
        ("rotary_interleaved", ctypes.c_int32),
        ("dtype", ctypes.c_int32),
    )  # fmt: skip


class Tuning(ctypes.Structure):
    """RelayTuning, field by field."""

    _fields_ = tuple(
        (name, ctypes.c_int32)
        for name in (
            "algorithm", "prefix_rows", "context_rows", "pipeline_depth", "blocks_per_sm", "prefix_cost",
            "context_cost", "l2_prefetch_mb", "copies_in_flight", "tokens_per_launch",
            "wide_keys",
        )
    )  # fmt: skip


def to_bits(x: npt.NDArray[np.floating], dtype: int) -> Bits:
    """Rounds to float16 or bfloat16 (to nearest even) and returns the bits."""
    if dtype == FLOAT16:
        return np.asarray(x, np.float16).view(np.uint16)
    word = np.ascontiguousarray(x, np.float32).view(np.uint32)
    return np.asarray((word + 0x7FFF + (word >> 16 & 1)) >> 16, np.uint16)


def from_bits(bits: Bits, dtype: int) -> Array:
    if dtype == FLOAT16:
        return np.asarray(bits.view(np.float16), np.float64)
    return np.asarray((bits.astype(np.uint32) << 16).view(np.float32), np.float64)


@dataclass(frozen=True)
class Case:
    """One call of the op: sizes, attributes and lengths. query_lens None: all `sequence`."""

    head_dim: int = 64
    kv_num_heads: int = 2
    group: int = 4
    prefix_length: int = 100
    max_context: int = 80
    context_lens: tuple[int, ...] = (5, 70, 0)
    query_lens: tuple[int, ...] | None = None
    sequence: int = 1
    dtype: int = FLOAT16
    scale: float = 0.0
    softcap: float = 0.0
    local_window_size: int = -1
    rotary_dim: int = 0
    rotary_interleaved: bool = False
    max_positions: int = 0
    in_place: bool = True

    @property
    def batch(self) -> int:
        return len(self.context_lens)

    @property
    def num_heads(self) -> int:
        return self.kv_num_heads * self.group

    @property
    def positions(self) -> int:
        """Rows of the rotary caches."""
        return self.max_positions or self.prefix_length + self.max_context

    def lengths(self) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.int32]]:
        query = self.query_lens if self.query_lens is not None else (self.sequence,) * self.batch
        return np.array(self.context_lens, np.int32), np.array(query, np.int32)

    def params(self) -> Params:
        """Everything but the pointers."""
        return Params(
            batch=self.batch, sequence=self.sequence, num_heads=self.num_heads,
            kv_num_heads=self.kv_num_heads, head_dim=self.head_dim, max_context=self.max_context,
            prefix_length=self.prefix_length,
            rotary_dim=self.rotary_dim,
            max_positions=self.positions if self.rotary_dim else 0, scale=self.scale,
            softcap=self.softcap, local_window_size=self.local_window_size,
            rotary_interleaved=int(self.rotary_interleaved), dtype=self.dtype,
        )  # fmt: skip

    def shapes(self) -> dict[str, tuple[int, ...]]:
        b, s, d, kv = self.batch, self.sequence, self.head_dim, self.kv_num_heads
        shapes: dict[str, tuple[int, ...]] = {
            "query": (b, s, self.num_heads * d),
            "key": (b, s, kv * d),
            "value": (b, s, kv * d),
            "past_key": (b, kv, self.max_context, d),
            "past_value": (b, kv, self.max_context, d),
            "prefix_key": (kv, self.prefix_length, d),
            "prefix_value": (kv, self.prefix_length, d),
        }
        return shapes

    def inputs(self, seed: int = 0) -> dict[str, Bits]:
        """Random tensors. Cache slots beyond the context and rows past query_lens hold NaN."""
        rng = np.random.default_rng(seed)
        tensors = {
            name: to_bits(rng.standard_normal(shape, dtype=np.float32), self.dtype)
            for name, shape in self.shapes().items()
        }
        context, query = self.lengths()
        for b in range(self.batch):
            for name in ("past_key", "past_value"):
                tensors[name][b, :, max(0, int(context[b])) :] = 0x7FFF
            for name in ("query", "key", "value"):
                tensors[name][b, max(0, int(query[b])) :] = 0x7FFF
        angles = np.arange(self.positions)[:, None] / 100.0 ** np.linspace(0, 1, max(1, self.rotary_dim // 2))
        if self.rotary_dim:
            tensors["cos_cache"] = to_bits(np.cos(angles), self.dtype)
            tensors["sin_cache"] = to_bits(np.sin(angles), self.dtype)
        return tensors


def _rotate(x: Array, cosine: Array, sine: Array, interleaved: bool) -> Array:
    """x [..., D] by angles [..., R/2] of its positions."""
    half = cosine.shape[-1]
    y: Array = x.copy()
    first = slice(0, 2 * half, 2) if interleaved else slice(0, half)
    second = slice(1, 2 * half, 2) if interleaved else slice(half, 2 * half)
    y[..., first] = x[..., first] * cosine - x[..., second] * sine
    y[..., second] = x[..., second] * cosine + x[..., first] * sine
    return y


def reference(case: Case, tensors: dict[str, Bits]) -> tuple[Array, Bits, Bits]:
    """output [B, S, Hq*D] in float64, present_key and present_value as bits.

    Rotated queries and keys are rounded to the storage type as the kernels do; all else is float64. A row
    whose lengths are out of range gives NaN and leaves its cache alone.
    """
    b_count, s_count, d, kv, group = case.batch, case.sequence, case.head_dim, case.kv_num_heads, case.group
    x = {name: from_bits(bits, case.dtype) for name, bits in tensors.items()}
    present_key, present_value = tensors["past_key"].copy(), tensors["past_value"].copy()
    output = np.zeros((b_count, s_count, case.num_heads, d))
    scale = case.scale or 1 / np.sqrt(d)
    contexts, queries = case.lengths()
    prefix = case.prefix_length
    for b in range(b_count):
        context, new = int(contexts[b]), int(queries[b])
        bad = new < 0 or new > s_count or context < 0 or context + new > case.max_context
        bad = bad or bool(case.rotary_dim and new > 0 and prefix + context + new > case.positions)
        if bad:
            output[b] = np.nan
            continue
        if new == 0:
            continue
        q = x["query"][b, :new].reshape(new, case.num_heads, d)
        k = x["key"][b, :new].reshape(new, kv, d)
        if case.rotary_dim:
            rows = slice(prefix + context, prefix + context + new)
            cosine, sine = x["cos_cache"][rows][:, None], x["sin_cache"][rows][:, None]
            q = from_bits(to_bits(_rotate(q, cosine, sine, case.rotary_interleaved), case.dtype), case.dtype)
            k = _rotate(k, cosine, sine, case.rotary_interleaved)
        present_key[b, :, context : context + new] = to_bits(k, case.dtype).transpose(1, 0, 2)
        new_values = tensors["value"][b, :new].reshape(new, kv, d)
        present_value[b, :, context : context + new] = new_values.transpose(1, 0, 2)
        end = context + new
        keys = np.concatenate([x["prefix_key"], from_bits(present_key[b, :, :end], case.dtype)], axis=1)
        values = np.concatenate([x["prefix_value"], from_bits(present_value[b, :, :end], case.dtype)], axis=1)
        q = q.reshape(new, kv, group, d).transpose(1, 2, 0, 3)
        score = np.einsum("hgqd,hkd->hgqk", q, keys, optimize=True) * scale
        if case.softcap:
            score = case.softcap * np.tanh(score / case.softcap)
        i = prefix + context + np.arange(new)[:, None]
        j = np.arange(prefix + end)[None]
        visible = j <= i
        if case.local_window_size > 0:
            visible &= i - j < case.local_window_size
        score = np.where(visible, score, -np.inf)
        weight = np.exp(score - score.max(-1, keepdims=True))
        weight /= weight.sum(-1, keepdims=True)
        out = np.einsum("hgqk,hkd->hgqd", weight, values, optimize=True)
        output[b, :new] = out.transpose(2, 0, 1, 3).reshape(new, case.num_heads, d)
    return output.reshape(b_count, s_count, -1), present_key, present_value


def relative_error(got: Array, want: Array) -> float:
    """||got - want|| / ||want|| over the rows that want has finite; infinite where NaNs do not match."""
    if not np.array_equal(np.isnan(got), np.isnan(want)):
        return float("inf")
    finite = ~np.isnan(want)
    norm = float(np.linalg.norm(want[finite]))
    difference = float(np.linalg.norm(got[finite] - want[finite]))
    return difference / norm if norm else difference


# What rounding to the storage type (of probabilities and output) leaves: 2^-11 and 2^-8, with some room.
TOLERANCE = {FLOAT16: 1.5e-3, BFLOAT16: 1.0e-2}


# What compute-sanitizer and the emulation's race detector run too.
SMALL: dict[str, Case] = {
    "decode": Case(
        head_dim=128, rotary_dim=128, kv_num_heads=8, prefix_length=1000, context_lens=(5, 70, 0, 64)
    ),
    "one request": Case(head_dim=128, context_lens=(33,), prefix_length=700),
    "no prefix": Case(prefix_length=0, rotary_dim=32),
    "group of 7": Case(group=7, kv_num_heads=4, context_lens=(5, 70, 0, 64, 63)),
    "group of 16": Case(group=16, kv_num_heads=1, head_dim=256, dtype=BFLOAT16),
    "group of 24": Case(group=24, kv_num_heads=1, context_lens=(5, 70, 0, 64), rotary_dim=64),
    "group of 70": Case(group=70, kv_num_heads=1, head_dim=128, rotary_dim=128, prefix_length=200),
    "multi-head": Case(group=1, kv_num_heads=8, head_dim=96),
    "idle rows": Case(context_lens=(5, 9, 70, 3), query_lens=(1, 0, 1, 0)),
    "softcap, window": Case(
        softcap=5.0, local_window_size=50, prefix_length=300, context_lens=(5, 70, 0, 20)
    ),
    "interleaved, not in place": Case(rotary_dim=48, rotary_interleaved=True, in_place=False, head_dim=192),
    "prefill, ragged": Case(
        sequence=40, context_lens=(5, 0, 40, 7), query_lens=(40, 33, 0, 1), rotary_dim=64
    ),
    "several tokens": Case(sequence=4, query_lens=(4, 1, 3), rotary_dim=64),
    "lengths out of range": Case(context_lens=(5, -1, 80, 9, 9, 2), query_lens=(1, 1, 1, -1, 2, 1)),
}
