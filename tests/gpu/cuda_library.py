"""librelay_attention_cuda.so (plugins/cuda/capi.cu) through torch tensors, and the op in float64."""

from __future__ import annotations

import ctypes
import os
from pathlib import Path

import numpy as np
import torch
from relay_cuda import FLOAT16, Array, Bits, Case, Params, Tuning

ROOT = Path(__file__).resolve().parent.parent.parent
BARRIER_BYTES = 256


def find_library() -> Path:
    """RELAY_CUDA_LIBRARY, or what a build of the checkout left."""
    given = os.environ.get("RELAY_CUDA_LIBRARY")
    candidates = [Path(given)] if given else [*ROOT.glob("build*/**/librelay_attention_cuda.so")]
    for path in candidates:
        if path.is_file():
            return path
    raise FileNotFoundError(
        "librelay_attention_cuda.so is not built: run scripts/test_gpu.sh, or set RELAY_CUDA_LIBRARY"
    )


def to_device(bits: Bits) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(bits).view(np.int16)).cuda()


def to_host(tensor: torch.Tensor) -> Bits:
    return np.asarray(tensor.cpu().numpy()).view(np.uint16)


class Call:
    """One call of the op with its tensors on the device; launch() may be repeated and captured."""

    def __init__(self, library: CudaLibrary, case: Case, tensors: dict[str, torch.Tensor]) -> None:
        self.library = library
        self.case = case
        context, query = case.lengths()
        self.tensors = dict(tensors)
        self.tensors["context_lens"] = torch.from_numpy(context).cuda()
        self.tensors["query_lens"] = torch.from_numpy(query).cuda()
        # Poison: int16 0x7FFF is a NaN in both storage types.
        self.tensors["output"] = torch.full(case.shapes()["query"], 0x7FFF, dtype=torch.int16, device="cuda")
        for name in ("key", "value"):
            past = self.tensors[f"past_{name}"]
            self.tensors[f"present_{name}"] = past if case.in_place else torch.full_like(past, 0x7FFF)
        self.params = case.params()
        for name, tensor in self.tensors.items():
            setattr(self.params, name, tensor.data_ptr())
        self.workspace = torch.full(
            (library.workspace_bytes(self.params),), 0xFF, dtype=torch.uint8, device="cuda"
        )

    def launch(self, tuning: Tuning | None = None, own_barrier: bool = False) -> None:
        self.library.launch(self.params, tuning or Tuning(), self.workspace, own_barrier)

    def results(self) -> tuple[Bits, Bits, Bits]:
        torch.cuda.synchronize()
        return tuple(to_host(self.tensors[n]) for n in ("output", "present_key", "present_value"))  # type: ignore


class CudaLibrary:
    def __init__(self, path: Path | None = None) -> None:
        self.path = path or find_library()
        self.library = ctypes.CDLL(str(self.path))
        self.message = ctypes.create_string_buffer(512)
        self.barrier = torch.zeros(BARRIER_BYTES, dtype=torch.uint8, device="cuda")

    def _check(self, status: int) -> None:
        if status != 0:
            raise RuntimeError(f"status {status}: {self.message.value.decode()}")

    def workspace_bytes(self, params: Params) -> int:
        size = ctypes.c_size_t()
        self._check(self.library.relay_attention_workspace_bytes(ctypes.byref(params), ctypes.byref(size)))
        return size.value

    def plan(self, params: Params, tuning: Tuning | None = None) -> dict[str, int]:
        values = (ctypes.c_int * 6)()
        self._check(
            self.library.relay_attention_plan(
                ctypes.byref(params),
                ctypes.byref(tuning or Tuning()),
                values,
                self.message,
                ctypes.c_size_t(512),
            )
        )
        names = ("prefix_rows", "context_rows", "depth", "grid", "launches", "shared_bytes")
        return dict(zip(names, values, strict=True))

    def launch(
        self, params: Params, tuning: Tuning, workspace: torch.Tensor, own_barrier: bool = False
    ) -> None:
        """Enqueues on torch's current stream. own_barrier: the library clears the barrier itself."""
        self._check(
            self.library.relay_attention_launch(
                ctypes.byref(params), ctypes.byref(tuning), ctypes.c_void_p(workspace.data_ptr()),
                ctypes.c_size_t(workspace.numel()),
                ctypes.c_void_p(None if own_barrier else self.barrier.data_ptr()),
                ctypes.c_void_p(torch.cuda.current_stream().cuda_stream), self.message, ctypes.c_size_t(512),
            )
        )  # fmt: skip

    def empty_launch(self, params: Params, tuning: Tuning | None = None) -> None:
        """A kernel that does nothing, on the grid and shared memory of the real one."""
        self._check(
            self.library.relay_attention_empty_launch(
                ctypes.byref(params), ctypes.byref(tuning or Tuning()),
                ctypes.c_void_p(torch.cuda.current_stream().cuda_stream), self.message, ctypes.c_size_t(512),
            )
        )  # fmt: skip

    def call(self, case: Case, inputs: dict[str, Bits]) -> Call:
        return Call(self, case, {name: to_device(bits) for name, bits in inputs.items()})


def reference_on_device(case: Case, inputs: dict[str, Bits], device: str = "cuda") -> Array:
    """relay_cuda.reference's output, in float64 on the GPU: for sizes that a CPU would take minutes for."""
    kind = torch.float16 if case.dtype == FLOAT16 else torch.bfloat16

    def tensor(name: str) -> torch.Tensor:
        return torch.from_numpy(inputs[name].view(np.int16)).to(device).view(kind).double()

    def rotate(x: torch.Tensor, cosine: torch.Tensor, sine: torch.Tensor) -> torch.Tensor:
        half = cosine.shape[-1]
        first = slice(0, 2 * half, 2) if case.rotary_interleaved else slice(0, half)
        second = slice(1, 2 * half, 2) if case.rotary_interleaved else slice(half, 2 * half)
        y = x.clone()
        y[..., first] = x[..., first] * cosine - x[..., second] * sine
        y[..., second] = x[..., second] * cosine + x[..., first] * sine
        return y.to(kind).double()

    d, kv, group, prefix = case.head_dim, case.kv_num_heads, case.group, case.prefix_length
    query, key, value = tensor("query"), tensor("key"), tensor("value")
    prefix_key, prefix_value = tensor("prefix_key"), tensor("prefix_value")
    past_key, past_value = tensor("past_key"), tensor("past_value")
    if case.rotary_dim:
        cos_cache, sin_cache = tensor("cos_cache"), tensor("sin_cache")
    output = torch.zeros(case.batch, case.sequence, case.num_heads, d, dtype=torch.float64, device=device)
    for b, (context, new) in enumerate(zip(*(x.tolist() for x in case.lengths()), strict=True)):
        bad = new < 0 or new > case.sequence or context < 0 or context + new > case.max_context
        if bad or (case.rotary_dim and new > 0 and prefix + context + new > case.positions):
            output[b] = torch.nan
            continue
        if new == 0:
            continue
        q = query[b, :new].reshape(new, case.num_heads, d)
        k = key[b, :new].reshape(new, kv, d)
        if case.rotary_dim:
            rows = slice(prefix + context, prefix + context + new)
            q = rotate(q, cos_cache[rows, None], sin_cache[rows, None])
            k = rotate(k, cos_cache[rows, None], sin_cache[rows, None])
        v = value[b, :new].reshape(new, kv, d)
        keys = torch.cat([prefix_key, past_key[b, :, :context], k.transpose(0, 1)], 1)
        values = torch.cat([prefix_value, past_value[b, :, :context], v.transpose(0, 1)], 1)
        q = q.reshape(new, kv, group, d).permute(1, 2, 0, 3).reshape(kv, group * new, d)
        score = q @ keys.transpose(1, 2) * (case.scale or d**-0.5)
        if case.softcap:
            score = case.softcap * torch.tanh(score / case.softcap)
        i = (prefix + context + torch.arange(new, device=device)).repeat(group)[:, None]
        j = torch.arange(keys.shape[1], device=device)[None]
        visible = j <= i
        if case.local_window_size > 0:
            visible = visible & (i - j < case.local_window_size)
        score = score.masked_fill(~visible, -torch.inf)
        out = torch.softmax(score, -1) @ values
        output[b, :new] = out.reshape(kv, group, new, d).permute(2, 0, 1, 3).reshape(new, case.num_heads, d)
    return np.asarray(output.reshape(case.batch, case.sequence, -1).cpu().numpy())
