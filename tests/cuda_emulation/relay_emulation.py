"""The emulation library (conftest.py) in ctypes, and a call of it compared with float64."""

from __future__ import annotations

import ctypes
from pathlib import Path

import numpy as np
from relay_cuda import TOLERANCE, Bits, Case, Params, Tuning, from_bits, reference, relative_error

SM_90, SM_86 = 227 << 10, 99 << 10
HOPPER = {"major": 9, "algorithm": 3}
KERNELS: dict[str, dict[str, int]] = {"portable": {}, "hopper": HOPPER}


class Emulation:
    def __init__(self, path: Path) -> None:
        self.library = ctypes.CDLL(str(path))
        self.library.relay_emulate_workspace_bytes.restype = ctypes.c_size_t

    def call(
        self, params: Params, tuning: Tuning, *, major: int = 8, sm_count: int = 3, shared: int = SM_90,
        seed: int = 1, shuffle: bool = True, copies: int = 2, guard_at_end: bool = True,
        dry_run: bool = False,
    ) -> tuple[int, str, list[int]]:  # fmt: skip
        message, plan = ctypes.create_string_buffer(8192), (ctypes.c_int * 7)()
        status = self.library.relay_emulate(
            ctypes.byref(params), ctypes.byref(tuning), major, sm_count, ctypes.c_size_t(shared),
            ctypes.c_uint64(seed), int(shuffle), copies, int(guard_at_end), int(dry_run), plan, message,
            ctypes.c_size_t(len(message)),
        )  # fmt: skip
        return status, message.value.decode(), list(plan)

    def run(self, case: Case, tensors: dict[str, Bits], **options: object) -> tuple[Bits, Bits, Bits]:
        tuning = Tuning(**{k: options.pop(k) for k in [n for n, _ in Tuning._fields_] if k in options})
        tensors = {name: _aligned(x) for name, x in tensors.items()}
        context_lens, query_lens = case.lengths()
        output = _aligned(np.full(case.shapes()["query"], 0x7FFF, np.uint16))
        present = [tensors[n] if case.in_place else _aligned(np.full_like(tensors[n], 0x7FFF))
                   for n in ("past_key", "past_value")]  # fmt: skip
        params = case.params()
        for name, x in {**tensors, "context_lens": context_lens, "query_lens": query_lens, "output": output,
                        "present_key": present[0], "present_value": present[1]}.items():  # fmt: skip
            setattr(params, name, x.ctypes.data)
        status, message, _ = self.call(params, tuning, **options)  # type: ignore[arg-type]
        assert status == 0, message
        return output, present[0], present[1]


def _aligned(x: Bits) -> Bits:
    """A copy that starts at a multiple of 16 bytes, as the kernels demand."""
    room = np.empty(x.size + 8, np.uint16)
    offset = -room.ctypes.data % 16 // 2
    y = room[offset : offset + x.size].reshape(x.shape)
    y[...] = x
    return y


def check(emulation: Emulation, case: Case, seed: int = 0, **options: object) -> Bits:
    tensors = case.inputs(seed)
    want, want_key, want_value = reference(case, tensors)
    output, key, value = emulation.run(case, tensors, **options)
    error = relative_error(from_bits(output, case.dtype), want)
    assert error < TOLERANCE[case.dtype], f"relative error {error}"
    # A rotated key is computed in float32 by the kernel: it may round to the other side.
    assert np.array_equal(value, want_value)
    got, expected = from_bits(key, case.dtype), from_bits(want_key, case.dtype)
    np.testing.assert_allclose(got, expected, rtol=2**-7 if case.dtype else 2**-10, atol=1e-3)
    if not case.rotary_dim:
        assert np.array_equal(key, want_key)
    return output
