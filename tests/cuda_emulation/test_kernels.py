"""The CUDA kernels' logic on a CPU: their very source, thread by thread (cuda_on_host.h). NOT a GPU run."""

from __future__ import annotations

import ctypes
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from relay_cuda import BFLOAT16, FLOAT16, Case, Tuning, from_bits
from relay_emulation import HOPPER, KERNELS, SM_86, SM_90, Emulation, check


@pytest.fixture(scope="session")
def emulation(emulation_library: Path) -> Emulation:
    return Emulation(emulation_library)


CASES = {
    "decode": Case(),
    "decode, bfloat16": Case(dtype=BFLOAT16),
    "head_dim 32": Case(head_dim=32, rotary_dim=32),
    "head_dim 32, many rows": Case(head_dim=32, group=8, kv_num_heads=1, context_lens=(7, 60) * 17,
                                   rotary_dim=32),
    "prefill, head_dim 32": Case(sequence=20, context_lens=(5, 60, 7), query_lens=(20, 19, 1), head_dim=32,
                                 rotary_dim=16),
    "head_dim 96": Case(head_dim=96, rotary_dim=96),
    "head_dim 128": Case(head_dim=128, group=8, rotary_dim=128),
    "head_dim 192": Case(head_dim=192, group=2, rotary_dim=64),
    "head_dim 256": Case(head_dim=256, group=2, kv_num_heads=1, rotary_dim=256, dtype=BFLOAT16),
    "multi-head": Case(group=1, kv_num_heads=5),
    "group of 7": Case(group=7, context_lens=(5, 70, 0, 64, 63)),
    "group of 16": Case(group=16, kv_num_heads=1),
    "group of 24": Case(group=24, kv_num_heads=1),
    "multi-query, many rows": Case(group=8, kv_num_heads=1, context_lens=tuple(range(0, 78, 7))),
    "one request": Case(context_lens=(33,), prefix_length=700),
    "no prefix": Case(prefix_length=0, rotary_dim=32),
    "no prefix, one token": Case(prefix_length=0, context_lens=(0,), max_context=1),
    "prefix of one block": Case(prefix_length=64),
    "prefix of one token": Case(prefix_length=1, context_lens=(0, 0)),
    "empty contexts": Case(context_lens=(0, 0, 0, 0), prefix_length=300),
    "idle rows": Case(context_lens=(5, 9, 70, 3), query_lens=(1, 0, 1, 0)),
    "all idle": Case(query_lens=(0, 0, 0)),
    "softcap": Case(softcap=5.0, scale=0.5),
    "window inside the context": Case(local_window_size=7, context_lens=(5, 70, 0, 20)),
    "window across the prefix": Case(local_window_size=50, context_lens=(5, 70, 0, 20), prefix_length=300),
    "window of one": Case(local_window_size=1),
    "window beyond all": Case(local_window_size=1000, rotary_dim=64),
    "rotary, interleaved": Case(rotary_dim=64, rotary_interleaved=True),
    "rotary, partial": Case(rotary_dim=16, head_dim=96),
    "rotary, partial, interleaved": Case(rotary_dim=48, rotary_interleaved=True, dtype=BFLOAT16),
    "not in place": Case(in_place=False, rotary_dim=64),
    "several tokens": Case(sequence=4, query_lens=(4, 1, 3), rotary_dim=64),
    "prefill, ragged": Case(sequence=40, context_lens=(5, 0, 40, 7), query_lens=(40, 33, 0, 1),
                            rotary_dim=64),
    "prefill without prefix": Case(sequence=70, context_lens=(0, 10), prefix_length=0, query_lens=(70, 65)),
    "prefill, window": Case(sequence=40, context_lens=(5, 30), query_lens=(40, 39), local_window_size=20),
    "prefill, head_dim 128": Case(sequence=20, context_lens=(5, 60, 7), query_lens=(20, 19, 1), head_dim=128,
                                  dtype=BFLOAT16, rotary_dim=128, kv_num_heads=1),
    "wide tiles, bfloat16": Case(head_dim=128, group=8, kv_num_heads=1, context_lens=(7,) * 34,
                                 dtype=BFLOAT16),
    "prefill, head_dim 256": Case(sequence=20, context_lens=(5, 60), query_lens=(20, 19), head_dim=256,
                                  group=1),
    "prefill, head_dim 192 and 7 heads": Case(sequence=11, context_lens=(5, 60), head_dim=192, group=7,
                                              kv_num_heads=1, in_place=False, softcap=20.0),
    "full cache": Case(context_lens=(79, 79), prefix_length=10),
    "lengths out of range": Case(context_lens=(5, -1, 80, 9, 9, 2), query_lens=(1, 1, 1, -1, 2, 1)),
    "beyond the rotary caches": Case(context_lens=(5, 60, 8), max_positions=130, rotary_dim=64),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_matches_float64(emulation: Emulation, name: str) -> None:
    check(emulation, CASES[name], seed=3)


@pytest.mark.parametrize("name", CASES)
def test_reference_kernel_matches_float64(emulation: Emulation, name: str) -> None:
    check(emulation, CASES[name], seed=4, algorithm=1)


HOPPER_CASES = {name: case for name, case in CASES.items() if case.head_dim <= 128} | {
    "group of 40": Case(group=40, kv_num_heads=1, context_lens=(63, 64, 0), rotary_dim=64),
    "group of 70, wide contexts": Case(group=70, kv_num_heads=2, context_lens=(63, 64, 0), rotary_dim=64),
    "prefill, head_dim 96": Case(sequence=20, context_lens=(5, 60, 7), query_lens=(20, 19, 1), head_dim=96,
                                 rotary_dim=96, rotary_interleaved=True, softcap=9.0),
    "long prompt": Case(sequence=200, max_context=260, context_lens=(60,), prefix_length=10, group=3,
                        kv_num_heads=1),
    "as many requests as lanes": Case(context_lens=(*range(31), 90), query_lens=(1, 1, 0, 1) * 8,
                                      local_window_size=40, rotary_dim=64, kv_num_heads=1, group=2),
    "one request more than lanes": Case(context_lens=tuple(range(33)), query_lens=(1, 1, 0) * 11,
                                        local_window_size=40, rotary_dim=64, kv_num_heads=1, group=2),
    "more requests than lanes": Case(context_lens=tuple(range(70)), query_lens=(1, 0) * 35, kv_num_heads=1,
                                     group=2, prefix_length=300),
    "wide prefix, narrow contexts": Case(context_lens=tuple(range(0, 200, 10)), max_context=220,
                                         prefix_length=640, rotary_dim=64),
}  # fmt: skip


@pytest.mark.parametrize("name", HOPPER_CASES)
def test_hopper_matches_float64(emulation: Emulation, name: str) -> None:
    check(emulation, HOPPER_CASES[name], seed=5, **HOPPER)


@pytest.mark.parametrize("copies", [0, 1, 2])
@pytest.mark.parametrize("in_flight", [1, 2, 3, 5, 24])
@pytest.mark.parametrize("depth", [4, 5, 6, 7, 13])
def test_hopper_rings_and_late_or_early_copies(
    emulation: Emulation, depth: int, in_flight: int, copies: int
) -> None:
    case = Case(prefix_length=400, rotary_dim=64, context_lens=(5, 70, 0, 66))
    wide = replace(case, context_lens=(5, 70, 0, 66) * 5)
    for c, keys in (case, 64), (wide, 64), (wide, 128):
        check(emulation, c, copies=copies, pipeline_depth=depth, copies_in_flight=in_flight, seed=depth,
              sm_count=2, wide_keys=keys, **HOPPER)  # fmt: skip


@pytest.mark.parametrize("sm_count", [1, 2, 3, 5, 9, 14])
@pytest.mark.parametrize("costs", [(1, 1), (3, 1), (1, 4), (0, 0)])
def test_hopper_any_split_of_the_work(emulation: Emulation, sm_count: int, costs: tuple[int, int]) -> None:
    narrow = Case(prefix_length=520, context_lens=(5, 70, 0, 66, 12), group=7, kv_num_heads=2)
    mixed = Case(prefix_length=520, context_lens=(5, 70, 0, 66, 12) * 3, max_context=150, group=7,
                 head_dim=32, rotary_dim=32)  # fmt: skip
    wide = Case(sequence=30, context_lens=(5, 90, 0), query_lens=(30, 7, 22), max_context=150, rotary_dim=16)
    for case, keys in (narrow, 64), (mixed, 64), (mixed, 128), (wide, 64), (wide, 128):
        check(emulation, case, sm_count=sm_count, prefix_cost=costs[0], context_cost=costs[1],
              wide_keys=keys, **HOPPER)  # fmt: skip


@pytest.mark.parametrize(("rows", "keys"), [(64, 64), (128, 64), (128, 128)])
def test_hopper_tile_sizes(emulation: Emulation, rows: int, keys: int) -> None:
    many = Case(group=8, kv_num_heads=1, context_lens=tuple(range(0, 78, 3)), head_dim=96, prefix_length=200)
    window = replace(CASES["prefill, ragged"], local_window_size=33, prefix_length=150, softcap=9.0)
    for case in (CASES["group of 7"], CASES["prefill, ragged"], CASES["group of 24"], many, window):
        check(emulation, case, prefix_rows=rows, wide_keys=keys, **HOPPER)


@pytest.mark.parametrize("copies", [0, 1, 2])
@pytest.mark.parametrize("depth", [2, 3, 4, 5, 6])
def test_pipeline_depths_and_late_or_early_copies(emulation: Emulation, depth: int, copies: int) -> None:
    case = Case(prefix_length=400, rotary_dim=64, context_lens=(5, 70, 0, 66))
    check(emulation, case, copies=copies, pipeline_depth=depth, seed=depth)


@pytest.mark.parametrize("sm_count", [1, 2, 5, 9])
@pytest.mark.parametrize("costs", [(1, 1), (3, 1), (1, 4)])
def test_any_split_of_the_work(emulation: Emulation, sm_count: int, costs: tuple[int, int]) -> None:
    case = Case(prefix_length=520, context_lens=(5, 70, 0, 66, 12), group=7, kv_num_heads=2)
    check(emulation, case, sm_count=sm_count, prefix_cost=costs[0], context_cost=costs[1])


@pytest.mark.parametrize("rows", [(16, 16), (64, 16), (128, 16), (64, 64), (128, 64)])
def test_every_tile_size_serves_every_call(emulation: Emulation, rows: tuple[int, int]) -> None:
    many = Case(group=8, kv_num_heads=1, context_lens=tuple(range(0, 78, 3)), head_dim=96, prefix_length=200)
    window = replace(CASES["prefill, ragged"], local_window_size=33, prefix_length=150, softcap=9.0)
    for case in (CASES["group of 7"], CASES["prefill, ragged"], CASES["group of 24"], many, window):
        check(emulation, case, prefix_rows=rows[0], context_rows=rows[1])


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("tokens", [1, 3, 7, 32])
def test_a_call_cut_into_launches(emulation: Emulation, tokens: int, kernel: str) -> None:
    case = Case(
        sequence=20, context_lens=(5, 0, 40, 7), query_lens=(20, 13, 0, 1), rotary_dim=64, kv_num_heads=1
    )
    check(emulation, case, tokens_per_launch=tokens, **KERNELS[kernel])
    check(emulation, replace(case, local_window_size=9), tokens_per_launch=tokens, **KERNELS[kernel])


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("name", ["decode", "prefill, ragged", "group of 7", "no prefix"])
def test_bit_identical_in_any_order_of_blocks(emulation: Emulation, name: str, kernel: str) -> None:
    tensors, options = CASES[name].inputs(8), KERNELS[kernel] | {"sm_count": 4}
    runs = [emulation.run(CASES[name], tensors, shuffle=False, **options)]
    runs += [emulation.run(CASES[name], tensors, seed=s, copies=s % 3, **options) for s in range(6)]
    for run in runs[1:]:
        for got, first in zip(run, runs[0], strict=True):
            assert np.array_equal(got, first)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("guard_at_end", [True, False])
def test_nothing_outside_the_tensors_is_touched(
    emulation: Emulation, guard_at_end: bool, kernel: str
) -> None:
    for name in ("decode", "prefill, ragged", "head_dim 96", "lengths out of range", "full cache"):
        check(emulation, CASES[name], guard_at_end=guard_at_end, copies=1, **KERNELS[kernel])


@pytest.mark.parametrize("head_dim", [32, 64, 96, 128, 192, 256])
@pytest.mark.parametrize("dtype", [FLOAT16, BFLOAT16])
def test_small_shared_memory(emulation: Emulation, head_dim: int, dtype: int) -> None:
    """What an sm_86 or sm_89 gives a block."""
    case = Case(head_dim=head_dim, dtype=dtype, rotary_dim=head_dim, kv_num_heads=1, softcap=30.0)
    check(emulation, case, shared=SM_86)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("seed", range(40))
def test_random_calls(emulation: Emulation, seed: int, kernel: str) -> None:
    rng = np.random.default_rng(1000 + seed)
    head_dim = int(rng.choice([32, 64, 64, 96, 128]))
    batch, sequence = int(rng.integers(1, 7)), int(rng.choice([1, 1, 2, 5, 17]))
    max_context = int(rng.integers(sequence, 150))
    case = Case(
        head_dim=head_dim,
        dtype=int(rng.integers(2)),
        kv_num_heads=int(rng.integers(1, 4)),
        group=int(rng.choice([1, 2, 3, 4, 7, 8])),
        prefix_length=int(rng.choice([0, 1, 63, 64, 65, 200, 500])),
        max_context=max_context,
        sequence=sequence,
        context_lens=tuple(int(x) for x in rng.integers(0, max_context - sequence + 1, batch)),
        query_lens=tuple(int(x) for x in rng.integers(0, sequence + 1, batch)),
        local_window_size=int(rng.choice([-1, -1, 3, 60, 130])),
        softcap=float(rng.choice([0.0, 15.0])),
        rotary_dim=min(int(rng.choice([0, 16, 32, 64])), head_dim),
        rotary_interleaved=bool(rng.integers(2)),
        in_place=bool(rng.integers(2)),
    )
    sm_count, copies = int(rng.integers(1, 7)), int(rng.integers(3))
    check(emulation, case, seed=seed, sm_count=sm_count, copies=copies, wide_keys=int(rng.choice([64, 128])),
          **KERNELS[kernel])  # fmt: skip


@pytest.mark.parametrize("kernel", KERNELS)
def test_nan_in_one_request_stays_there(emulation: Emulation, kernel: str) -> None:
    case = Case(query_lens=(1, 1, 1))
    tensors = case.inputs(5)
    clean = emulation.run(case, tensors, **KERNELS[kernel])[0]
    tensors["key"][1] = 0x7E00
    got = from_bits(emulation.run(case, tensors, **KERNELS[kernel])[0], case.dtype)
    assert np.isnan(got[1]).all()
    assert np.array_equal(got[[0, 2]], from_bits(clean, case.dtype)[[0, 2]])


REFUSED = {
    "head_dim 32, 64, 96, 128, 192 and 256, not 80": {"head_dim": 80},
    "must be a positive multiple": {"num_heads": 5},
    "multiples of 16 dimensions": {"rotary_dim": 24},
    "must be even": {"rotary_dim": 66},
    "batch of at most": {"batch": 5000},
    "float16 and bfloat16 only": {"dtype": 7},
    "softcap must be": {"softcap": -1.0},
    "scale must be": {"scale": float("nan")},
    "local_window_size must be": {"local_window_size": 0},
    "negative size": {"prefix_length": -1},
    "query is null": {},
}


@pytest.mark.parametrize("reason", REFUSED)
def test_refusals_say_why(emulation: Emulation, reason: str) -> None:
    params = Case(rotary_dim=32).params()
    for name, value in REFUSED[reason].items():
        setattr(params, name, value)
    status, message, _ = emulation.call(params, Tuning())
    assert status != 0
    assert reason in message


@pytest.mark.parametrize("head_dim", [32, 64, 96, 128, 192, 256])
@pytest.mark.parametrize("batch", [1, 8, 32, 256, 1024])
@pytest.mark.parametrize("shared", [SM_90, 163 << 10, SM_86])
def test_every_gpu_gets_a_plan(emulation: Emulation, head_dim: int, batch: int, shared: int) -> None:
    case = Case(
        head_dim=head_dim, context_lens=(1,) * batch, kv_num_heads=8, prefix_length=32768, max_context=4096
    )
    for sequence in (1, 4, 512):
        params = replace(case, sequence=sequence).params()
        status, message, plan = emulation.call(params, Tuning(), sm_count=132, shared=shared, dry_run=True)
        assert status == 0, message
        assert plan[3] % 132 == 0
        assert 2 <= plan[2] <= 6


@pytest.mark.parametrize("head_dim", [32, 64, 96, 128])
@pytest.mark.parametrize("batch", [1, 8, 32, 256, 1024])
def test_every_call_gets_a_hopper_plan(emulation: Emulation, head_dim: int, batch: int) -> None:
    """Its shared memory is tested by the largest batch below."""
    case = Case(
        head_dim=head_dim, context_lens=(1,) * batch, kv_num_heads=8, prefix_length=32768, max_context=4096
    )
    for sequence in (1, 4, 512):
        params = replace(case, sequence=sequence).params()
        status, message, plan = emulation.call(params, Tuning(), major=9, sm_count=132, dry_run=True)
        assert status == 0, message
        assert plan[5] == 1
        assert plan[3] == 132
        assert 4 <= plan[2] <= 24
        assert plan[6] <= SM_90


def test_hopper_serves_the_largest_batch(emulation: Emulation) -> None:
    """1024 requests, whose tokens fill one launch."""
    case = Case(head_dim=128, group=1, kv_num_heads=1, context_lens=(1, 5) * 512, max_context=6,
                prefix_length=64)  # fmt: skip
    check(emulation, case, **HOPPER)
    check(emulation, replace(case, sequence=2, context_lens=(1, 4) * 512, query_lens=(2, 1) * 512), **HOPPER)


@pytest.mark.parametrize(("major", "head_dim"), [(8, 128), (10, 128), (9, 192)])
def test_hopper_kernel_refuses_other_gpus_and_heads(emulation: Emulation, major: int, head_dim: int) -> None:
    params = Case(head_dim=head_dim).params()
    status, message, _ = emulation.call(params, Tuning(algorithm=3), major=major, dry_run=True)
    assert status == 2
    assert "the Hopper kernel needs compute capability 9.x" in message
    status, message, plan = emulation.call(params, Tuning(), major=major, dry_run=True)
    assert status == 0, message
    assert plan[5] == 0


def test_workspace_never_shrinks(emulation: Emulation) -> None:
    def size(batch: int, sequence: int) -> int:
        params = Case(head_dim=128, kv_num_heads=8, context_lens=(0,) * batch, sequence=sequence).params()
        return int(emulation.library.relay_emulate_workspace_bytes(ctypes.byref(params), 132))

    sizes = [[size(b, s) for s in (1, 2, 5, 64, 4096)] for b in (1, 2, 31, 256, 1024)]
    assert (np.diff(np.array(sizes), axis=0) >= 0).all()
    assert (np.diff(np.array(sizes), axis=1) >= 0).all()
