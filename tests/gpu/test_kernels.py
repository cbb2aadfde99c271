"""The CUDA kernels on a GPU, against float64. tests/cuda_emulation runs the same source without one."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import pytest
from relay_cuda import BFLOAT16, FLOAT16, SMALL, TOLERANCE, Case, Tuning, from_bits, reference, relative_error

if TYPE_CHECKING:
    from cuda_library import CudaLibrary

pytestmark = pytest.mark.gpu


def check(
    library: CudaLibrary, case: Case, seed: int = 0, own_barrier: bool = False, **tuning: int
) -> np.ndarray:
    from cuda_library import reference_on_device

    inputs = case.inputs(seed)
    call = library.call(case, inputs)
    call.launch(Tuning(**tuning), own_barrier)
    output, _, _ = call.results()
    error = relative_error(from_bits(output, case.dtype), reference_on_device(case, inputs))
    assert error < TOLERANCE[case.dtype], f"relative error {error} of {case}"
    return output


@pytest.mark.parametrize("name", SMALL)
def test_small(library: CudaLibrary, name: str) -> None:
    """What compute-sanitizer runs too (scripts/test_gpu.sh): values and caches."""
    case = SMALL[name]
    inputs = case.inputs(1)
    want, want_key, want_value = reference(case, inputs)
    call = library.call(case, inputs)
    call.launch()
    output, key, value = call.results()
    assert relative_error(from_bits(output, case.dtype), want) < TOLERANCE[case.dtype]
    assert np.array_equal(value, want_value)
    np.testing.assert_allclose(
        from_bits(key, case.dtype),
        from_bits(want_key, case.dtype),
        rtol=2**-7 if case.dtype else 2**-10,
        atol=1e-3,
    )


@pytest.mark.parametrize("name", SMALL)
def test_reference_kernel(library: CudaLibrary, name: str) -> None:
    check(library, SMALL[name], seed=2, algorithm=1)


@pytest.mark.parametrize("dtype", [FLOAT16, BFLOAT16], ids=["fp16", "bf16"])
@pytest.mark.parametrize("head_dim", [32, 64, 96, 128, 192, 256])
@pytest.mark.parametrize("group", [1, 4, 7, 8, 16])
def test_every_dtype_head_dim_and_group(library: CudaLibrary, dtype: int, head_dim: int, group: int) -> None:
    """Grouped queries with split KV among them: the log-sum-exp layout that others got wrong."""
    rng = np.random.default_rng(head_dim + group)
    for batch, prefix, context in ((1, 8192, 100), (9, 2048, 700), (64, 500, 40)):
        case = Case(
            head_dim=head_dim, dtype=dtype, group=group, kv_num_heads=2, prefix_length=prefix,
            max_context=context + 1, context_lens=tuple(rng.integers(0, context + 1, batch).tolist()),
            rotary_dim=head_dim // 32 * 32,
        )  # fmt: skip
        check(library, case, seed=group)


@pytest.mark.parametrize("seed", range(60))
def test_random_calls(library: CudaLibrary, seed: int) -> None:
    rng = np.random.default_rng(7000 + seed)
    batch, sequence = int(rng.choice([1, 3, 16, 40])), int(rng.choice([1, 1, 2, 5, 17, 130, 512]))
    max_context = int(rng.integers(sequence, sequence + 900))
    prefix = int(rng.choice([0, 1, 63, 64, 65, 777, 3000]))
    head_dim = int(rng.choice([32, 64, 96, 128, 192, 256]))
    case = Case(
        head_dim=head_dim, dtype=int(rng.integers(2)), kv_num_heads=int(rng.choice([1, 2, 5])),
        group=int(rng.choice([1, 4, 7, 8, 16])), prefix_length=prefix,
        max_context=max_context, sequence=sequence,
        context_lens=tuple(rng.integers(0, max_context - sequence + 1, batch).tolist()),
        query_lens=tuple(rng.integers(0, sequence + 1, batch).tolist()),
        local_window_size=int(rng.choice([-1, -1, 3, 60, 1000])), softcap=float(rng.choice([0.0, 15.0])),
        rotary_dim=min(int(rng.choice([0, 16, 64])), head_dim), rotary_interleaved=bool(rng.integers(2)),
        in_place=bool(rng.integers(2)),
    )  # fmt: skip
    check(library, case, seed=seed)


LARGE = Case(
    head_dim=128, kv_num_heads=8, prefix_length=4096, max_context=300, rotary_dim=128,
    context_lens=tuple(np.random.default_rng(0).integers(0, 299, 32).tolist()),
)  # fmt: skip


@pytest.mark.parametrize("case", [LARGE, SMALL["prefill, ragged"]], ids=["decode", "prefill"])
def test_two_runs_are_bit_identical(library: CudaLibrary, case: Case) -> None:
    inputs = case.inputs(3)
    first = None
    for _ in range(20):
        call = library.call(case, inputs)
        call.launch()
        results = call.results()
        if first is None:
            first = results
        for got, want in zip(results, first, strict=True):
            assert np.array_equal(got, want)


@pytest.mark.parametrize("rows", [(16, 16), (64, 16), (128, 16), (64, 64), (128, 64)])
@pytest.mark.parametrize("depth", [2, 3, 4, 6])
@pytest.mark.parametrize("blocks", [1, 2])
def test_every_tuning_computes_the_same(
    library: CudaLibrary, rows: tuple[int, int], depth: int, blocks: int
) -> None:
    case = replace(LARGE, context_lens=LARGE.context_lens[:9])
    check(
        library, case, prefix_rows=rows[0], context_rows=rows[1], pipeline_depth=depth, blocks_per_sm=blocks
    )
    check(
        library,
        case,
        prefix_rows=rows[0],
        context_rows=rows[1],
        prefix_cost=3,
        context_cost=2,
        l2_prefetch_mb=-1,
    )


def test_the_barrier_may_be_the_librarys_own(library: CudaLibrary) -> None:
    for _ in range(3):
        check(library, SMALL["decode"], own_barrier=True)


@pytest.mark.parametrize("own_barrier", [False, True])
def test_graph_replay_follows_the_lengths(library: CudaLibrary, own_barrier: bool) -> None:
    """One captured graph serves every step: the lengths are read on the device, the barrier is ready."""
    import torch

    case = replace(LARGE, context_lens=(5,) * 8)
    inputs = case.inputs(4)
    call = library.call(case, inputs)
    start = {name: call.tensors[name].clone() for name in ("past_key", "past_value")}
    call.launch(own_barrier=own_barrier)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call.launch(own_barrier=own_barrier)
    for context in (5, 0, 3, 2):
        step = replace(case, context_lens=(context,) * 8)
        for name, tensor in start.items():
            call.tensors[name].copy_(tensor)
        call.tensors["context_lens"].fill_(context)
        call.tensors["output"].fill_(0x7FFF)
        graph.replay()
        output, _, _ = call.results()
        want, _, _ = reference(step, inputs)
        assert relative_error(from_bits(output, case.dtype), want) < TOLERANCE[case.dtype]


def test_neighbours_are_not_written(library: CudaLibrary) -> None:
    """Rows of the caches beyond the new tokens keep their poison, in place and not."""
    for in_place in (True, False):
        case = replace(SMALL["prefill, ragged"], in_place=in_place)
        inputs = case.inputs(5)
        _, want_key, want_value = reference(case, inputs)
        call = library.call(case, inputs)
        call.launch()
        _, key, value = call.results()
        context, query = case.lengths()
        for b in range(case.batch):
            end = int(context[b] + query[b])
            assert np.array_equal(key[b, :, end:], want_key[b, :, end:])
            assert np.array_equal(value[b, :, end:], want_value[b, :, end:])


def test_refusal_has_a_reason(library: CudaLibrary) -> None:
    call = library.call(SMALL["decode"], SMALL["decode"].inputs())
    call.params.head_dim = 80
    with pytest.raises(RuntimeError, match="head_dim 32, 64, 96, 128, 192 and 256, not 80"):
        call.launch()
    call.params.head_dim = 128
    call.workspace = call.workspace[:1024]
    with pytest.raises(RuntimeError, match="the workspace has 1024 bytes"):
        call.launch()


# Last: the float64 references of the largest take most of the time of all these tests.
@pytest.mark.parametrize("batch", [1, 2, 17, 32, 128, 256])
@pytest.mark.parametrize("prefix", [0, 1, 63, 512, 4097, 32768])
@pytest.mark.parametrize("context", [0, 1, 128, 4096])
def test_sizes(library: CudaLibrary, batch: int, prefix: int, context: int) -> None:
    rng = np.random.default_rng(batch + prefix + context)
    lens = rng.integers(0, context + 1, batch).tolist()
    case = Case(
        head_dim=128, kv_num_heads=2, prefix_length=prefix, max_context=context + 1, context_lens=tuple(lens)
    )
    check(library, case, seed=batch)
