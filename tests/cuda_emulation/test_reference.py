"""The CUDA tests' own float64 op (they must run where the package is not installed) is the package's."""

from __future__ import annotations

import numpy as np
import pytest
from relay_cuda import Case, from_bits, reference, relative_error

CASES = [
    Case(context_lens=(5, 70, 0, 9), query_lens=(1, 1, 1, 0)),
    Case(sequence=9, context_lens=(5, 60, 0), query_lens=(9, 3, 0), rotary_dim=64, softcap=7.0),
    Case(rotary_dim=32, rotary_interleaved=True, local_window_size=30, scale=0.3),
    Case(local_window_size=120, prefix_length=0, group=7),
]


@pytest.mark.parametrize("case", CASES)
def test_same_as_the_packages_reference(case: Case) -> None:
    op = pytest.importorskip("relay_attention.plugins.reference")
    inputs = case.inputs(1)
    context_lens, query_lens = case.lengths()
    tensors = {name: from_bits(bits, case.dtype) for name, bits in inputs.items()}
    with np.errstate(invalid="ignore"):
        want = op.relay_attention(
            **tensors, context_lens=context_lens, query_lens=query_lens, num_heads=case.num_heads,
            kv_num_heads=case.kv_num_heads, scale=case.scale, softcap=case.softcap,
            local_window_size=case.local_window_size, do_rotary=int(case.rotary_dim > 0),
            rotary_interleaved=int(case.rotary_interleaved),
        )  # fmt: skip
    got = reference(case, inputs)
    # the CUDA tests' reference rounds rotated queries and keys to the storage type
    assert relative_error(got[0], want[0]) < (1e-3 if case.rotary_dim else 1e-12)
    for bits, present in zip(got[1:], want[1:], strict=True):
        np.testing.assert_allclose(from_bits(bits, case.dtype), present, atol=2e-3)
