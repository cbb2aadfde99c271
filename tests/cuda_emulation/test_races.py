"""Data races in shared memory: the kernels have none, and seeded ones are found (races.h)."""

from __future__ import annotations

import re
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
from relay_cuda import SMALL, Case
from relay_emulation import KERNELS, Emulation, check

if TYPE_CHECKING:
    from conftest import RaceBuild

HERE = Path(__file__).resolve().parent
CUDA = HERE.parent.parent / "plugins" / "cuda"

# Of cuda_on_host::Order.
SYNC_THREADS, SYNC_WARP, ARRIVAL, LANDING, PRODUCT_WAIT, COPY_WAIT, NAMED_BARRIER = (1 << i for i in range(7))

# What compute-sanitizer's racecheck runs on a GPU, at sizes that the race build has.
CASES = {name: case for name, case in SMALL.items() if name != "group of 16"} | {
    "decode": replace(SMALL["decode"], kv_num_heads=2),
    "interleaved, not in place": replace(SMALL["interleaved, not in place"], head_dim=64),
    "wide prefix, narrow contexts": Case(
        context_lens=tuple(range(0, 200, 10)), max_context=220, prefix_length=640, rotary_dim=64
    ),
}

RACE_KERNELS = [
    "block", "write after read", "warp", "shuffle is no barrier", "warp is not block",
    "one lane arrives for its warp", "no wait", "arrival before the write", "phase before",
    "barrier not known yet", "named barrier", "another named barrier", "halves of a word", "struct",
    "sixteen bytes", "equal writes", "own copy", "others' copies", "tensor copy",
    "tensor copy over what is read", "product",
]  # fmt: skip


@pytest.fixture(scope="module")
def program(race_build: RaceBuild) -> Path:
    return race_build.program(HERE / "race_kernels.cpp")


@pytest.mark.parametrize("name", RACE_KERNELS)
def test_seeded_races_are_found(program: Path, name: str) -> None:
    done = subprocess.run([program, name, "racy"], capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 1, done.stderr
    if name == "product":
        assert "products raced" in done.stdout
    else:
        assert "data races in shared memory" in done.stdout
        assert "race_kernels.cpp:" in done.stdout


@pytest.mark.parametrize("name", RACE_KERNELS)
def test_proper_synchronisation_is_no_race(program: Path, name: str) -> None:
    done = subprocess.run([program, name, "proper"], capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr


class Races:
    """Looks for races in calls of an emulation."""

    def __init__(self, library: Path) -> None:
        self.emulation = Emulation(library)
        self.watch = self.emulation.library.relay_emulate_races

    def check(
        self, case: Case, disregarded: int = 0, equal_writes: bool = False, seed: int = 0, **options: int
    ) -> None:
        """Fails when a race is found, and when what products read in a race reaches the results."""
        tensors = case.inputs(seed)
        self.watch(1, disregarded, int(equal_writes))
        try:
            output = check(self.emulation, case, seed=seed, **options)
            if self.watch(2, 0, 0) > 0:
                spoiled = self.emulation.run(case, tensors, **options)[0]
                assert np.array_equal(spoiled, output), "products race for what reaches the results"
        finally:
            self.watch(0, 0, 0)


@pytest.fixture(scope="module")
def races(race_build: RaceBuild) -> Races:
    return Races(race_build.library)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("name", CASES)
def test_no_races(races: Races, name: str, kernel: str) -> None:
    races.check(CASES[name], seed=list(CASES).index(name), **KERNELS[kernel])


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("copies", [0, 1])
def test_no_races_with_late_or_early_copies_and_short_rings(races: Races, copies: int, kernel: str) -> None:
    case = Case(prefix_length=400, rotary_dim=64, context_lens=(5, 70, 0, 66))
    for depth in (4, 5):
        races.check(case, copies=copies, pipeline_depth=depth, seed=depth, **KERNELS[kernel])


def test_only_equal_values_are_written_by_both_warpgroups(races: Races) -> None:
    """The new token, and zeros beyond the last key, into a buffer that both read."""
    with pytest.raises(AssertionError) as caught:
        races.check(CASES["group of 70"], equal_writes=True, **KERNELS["hopper"])
    text = str(caught.value)
    assert text.count("times)") == 3, text
    assert text.count("store_shared_16") == 0
    assert all("hopper.cuh" in line for line in text.splitlines() if "write" in line or "wrote" in line)


# Few rows, so that warps share the partial results of one.
FEW_ROWS = Case(context_lens=(33,), prefix_length=500)
GROUP_OF_7 = CASES["group of 7"]

# What each kind of synchronisation alone orders: a detector that disregards it must report that. Texts of
# hopper.cuh and merge.cuh stand for their lines.
DISREGARDED: dict[str, tuple[str, int, Case, list[str]]] = {
    "portable, __syncthreads": ("portable", SYNC_THREADS, GROUP_OF_7, ["attention.cuh:"]),
    "portable, asynchronous copies": ("portable", COPY_WAIT, GROUP_OF_7, ["a copy by warp"]),
    "hopper, __syncthreads": ("hopper", SYNC_THREADS, GROUP_OF_7, ["hopper_schedule.cuh:"]),
    "hopper, __syncwarp": ("hopper", SYNC_WARP, GROUP_OF_7, ["query_row(warpgroup)[first_row + row] ="]),
    "hopper, arrivals": (
        "hopper",
        ARRIVAL,
        GROUP_OF_7,
        ["return merge_rows()[number];", "if (lane == 0) segment(kSegments * warpgroup"],
    ),
    "hopper, barrier of a warpgroup": (
        "hopper",
        NAMED_BARRIER << 1,
        CASES["prefill, ragged"],
        ["products race"],
    ),
    "hopper, barrier of the consumers": (
        "hopper",
        NAMED_BARRIER << 3,
        FEW_ROWS,
        ["products race"],
    ),
    "hopper, the copy engine": ("hopper", LANDING, GROUP_OF_7, ["a tensor copy for the barrier"]),
    "hopper, products": ("hopper", PRODUCT_WAIT, GROUP_OF_7, ["products race"]),
}


def place(text: str) -> str:
    """file:line of a text that is in hopper.cuh or merge.cuh once; any other as it is."""
    for file in ("hopper.cuh", "merge.cuh"):
        source = (CUDA / file).read_text()
        if source.count(text) == 1:
            return f"{file}:{source[: source.index(text)].count(chr(10)) + 1}"
    return text


@pytest.mark.parametrize("name", DISREGARDED)
def test_disregarded_synchronisation_is_missed(races: Races, name: str) -> None:
    kernel, disregarded, case, texts = DISREGARDED[name]
    with pytest.raises(AssertionError) as caught:
        races.check(case, disregarded=disregarded, **KERNELS[kernel])
    for text in texts:
        assert re.search(re.escape(place(text)) + r"\b", str(caught.value)), f"{place(text)} is missing"


# Faults in copies of the sources: (file, text, replacement, what is found).
FAULTS = {
    "merge rows": (
        "hopper.cuh",
        "    barrier_arrive(merge_barrier(), 1);",
        "    if (lane == 0) barrier_arrive(merge_barrier(), 32);",
        "data races",
    ),
    "new token": (
        "hopper.cuh",
        "    barrier_arrive(segment_barrier(slot, 0), 1);",
        "    if (lane == 0) barrier_arrive(segment_barrier(slot, 0), 32);",
        "data races",
    ),
    "scratch of the merge": (
        "merge.cuh",
        "      worker.exchange(turn);\n      const int first_warp",
        "      const int first_warp",
        "data races",
    ),
    "keys given back too early": (
        "hopper.cuh",
        "      product_wait<1>();  // for the scores\n      product_pin(score);\n"
        "      if (lane == 0) barrier_arrive(free_barrier(keys_stage), arrivals);\n",
        "      __syncwarp();\n      if (lane == 0) barrier_arrive(free_barrier(keys_stage), arrivals);\n"
        "      product_wait<1>();\n      product_pin(score);\n",
        "products race",
    ),
}


@pytest.mark.parametrize("name", FAULTS)
def test_faults_in_the_kernel_are_found(race_build: RaceBuild, name: str) -> None:
    file, before, after, text = FAULTS[name]
    library = race_build.with_fault(name.replace(" ", "_"), "hopper_64", file, before, after)
    case = FEW_ROWS if file == "merge.cuh" else replace(GROUP_OF_7, prefix_length=500, rotary_dim=64)
    with pytest.raises(AssertionError, match=text):
        Races(library).check(case, **KERNELS["hopper"])
