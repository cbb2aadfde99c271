"""The CPU kernel in ONNX Runtime against the float64 reference."""

from __future__ import annotations

import itertools
import threading
from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from op_harness import Case, cpu_targets, make_model, make_session, run

from relay_attention.plugins import schema

TARGETS = cpu_targets()
DTYPES = ["float32", "float16"]

# What decides which path a call takes: pooled or whole tiles, narrow or wide rows, split keys, masks.
SITUATIONS: dict[str, dict[str, Any]] = {
    "decode": {},
    "decode_one_request": {"context_lens": [7], "query_lens": [1]},
    "decode_33_requests": {"context_lens": [i % 40 for i in range(33)], "query_lens": [1] * 33},
    "idle_rows": {"context_lens": [3, 20, 0, 9], "query_lens": [1, 0, 0, 1]},
    "all_idle": {"context_lens": [3, 0], "query_lens": [0, 0]},
    "empty_prefix": {"prefix_length": 0},
    "empty_prefix_long_context": {"prefix_length": 0, "max_context": 1300, "context_lens": [1200, 0, 577]},
    "one_key_prefix": {"prefix_length": 1},
    "split_prefix": {"prefix_length": 1000},
    "split_prefix_and_context": {"prefix_length": 400, "max_context": 900, "context_lens": [890, 3, 600]},
    "ragged_prefill": {
        "sequence": 23,
        "max_context": 64,
        "context_lens": [0, 40, 5],
        "query_lens": [23, 1, 11],
    },
    # from 64 tiles on, full tiles of one request go whole; below, keys are split
    "whole_tiles": {
        "num_heads": 24,
        "kv_num_heads": 12,
        "sequence": 70,
        "max_context": 130,
        "prefix_length": 150,
        "context_lens": [60, 0, 31, 0],
        "query_lens": [70, 64, 0, 33],
    },
    "whole_tiles_without_prefix": {
        "num_heads": 32,
        "kv_num_heads": 8,
        "prefix_length": 0,
        "sequence": 40,
        "max_context": 640,
        "context_lens": [600, 0, 31, 570, 0],
        "query_lens": [40, 40, 39, 16, 3],
    },
    "full_cache": {"sequence": 4, "context_lens": [44, 47, 48], "query_lens": [4, 1, 0]},
}
VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "scale_and_softcap": {"attributes": {"scale": 0.4, "softcap": 3.0}},
    "window_inside_context": {"attributes": {"local_window_size": 4}},
    "window_into_prefix": {"attributes": {"local_window_size": 60}},
    "rotary": {"rotary_dim": 32},
    "partial_interleaved_rotary": {"rotary_dim": 20, "attributes": {"rotary_interleaved": 1}},
}
HEADS = [(4, 4), (8, 2), (6, 1), (7, 1)]


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("situation", SITUATIONS)
def test_every_situation(situation: str, variant: str) -> None:
    seed = np.random.SeedSequence().entropy % 2**32
    for i, (target, dtype) in enumerate(itertools.product(TARGETS, DTYPES)):
        case = Case(dtype=dtype, seed=seed + i, **SITUATIONS[situation], **VARIANTS[variant])
        case.check(threads=1 + i % 2, target=target, in_place=i % 2 == 1)


@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("head_dim", [8, 16, 24, 40, 64, 72, 80, 96, 128, 160, 192, 256])
def test_every_head_dim(head_dim: int, heads: tuple[int, int]) -> None:
    shapes = ({}, {"sequence": 9, "context_lens": [0, 3, 30], "query_lens": [9, 2, 9]})
    for i, (shape, target, dtype) in enumerate(itertools.product(shapes, TARGETS, DTYPES)):
        case = Case(
            num_heads=heads[0], kv_num_heads=heads[1], head_dim=head_dim, dtype=dtype, seed=i, **shape
        )
        case.check(threads=1, target=target, in_place=i % 2 == 0)


@st.composite
def cases(draw: st.DrawFn) -> Case:
    kv_num_heads = draw(st.integers(1, 3))
    head_dim = 8 * draw(st.integers(1, 17))
    sequence = draw(st.sampled_from([1, 1, 2, 5, 17, 66]))
    max_context = sequence + draw(st.sampled_from([0, 3, 50, 700]))
    rows = draw(
        st.lists(st.tuples(st.integers(0, sequence), st.integers(0, max_context)), min_size=1, max_size=9)
    )
    window = draw(st.sampled_from([-1, -1, 1, 2, 30, 100, 2000]))
    return Case(
        num_heads=kv_num_heads * draw(st.integers(1, 5)),
        kv_num_heads=kv_num_heads,
        head_dim=head_dim,
        prefix_length=draw(st.sampled_from([0, 1, 5, 95, 96, 97, 300, 777])),
        max_context=max_context,
        sequence=sequence,
        query_lens=[query for query, _ in rows],
        context_lens=[min(context, max_context - query) for query, context in rows],
        rotary_dim=draw(st.sampled_from([0, 0, 2, head_dim // 2, head_dim])),
        attributes={
            "scale": draw(st.sampled_from([0.0, 0.05, 1.0])),
            "softcap": draw(st.sampled_from([0.0, 0.0, 1.5, 50.0])),
            "local_window_size": window,
            "rotary_interleaved": draw(st.integers(0, 1)),
        },
        dtype=draw(st.sampled_from(DTYPES)),
        seed=draw(st.integers(0, 2**32 - 1)),
    )


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(case=cases(), target=st.sampled_from(TARGETS), threads=st.integers(1, 2), in_place=st.booleans())
def test_any_case(case: Case, target: str, threads: int, in_place: bool) -> None:
    case.check(threads, target, in_place)


@pytest.mark.parametrize("target", TARGETS)
def test_same_bits_whatever_the_threads(target: str) -> None:
    case = Case(
        num_heads=8,
        prefix_length=900,
        max_context=700,
        sequence=20,
        context_lens=[600, 0, 3, 650],
        query_lens=[20, 20, 1, 0],
    )
    inputs = case.make_inputs()
    first = run(case.session(1, target), inputs)
    for threads, in_place in ((1, False), (2, False), (2, True), (3, False)):
        again = run(case.session(threads, target), inputs, in_place)
        for one, other in zip(first, again, strict=True):
            np.testing.assert_array_equal(one.view(np.uint32), other.view(np.uint32))


def test_in_place_writes_only_the_new_tokens() -> None:
    case = Case(sequence=3, context_lens=[5, 0, 40], query_lens=[2, 0, 3])
    inputs = case.make_inputs()
    inputs["past_key"] = np.full_like(inputs["past_key"], 7.0)
    _, present_key, _ = run(case.session(), inputs, in_place=True)
    changed = (present_key != 7.0).any(axis=(1, 3))
    expected = np.zeros_like(changed)
    expected[0, 5:7] = True
    expected[2, 40:43] = True
    np.testing.assert_array_equal(changed, expected)


def test_long_prefix_in_one_tile_of_large_scores() -> None:
    # scores of some hundreds: only a running maximum keeps the exponentials finite
    case = Case(prefix_length=5000, attributes={"scale": 30.0})
    for target in TARGETS:
        case.check(target=target)


def test_nan_reaches_the_output_of_its_own_request_only() -> None:
    case = Case(num_heads=4, kv_num_heads=4, context_lens=[5, 6, 40], query_lens=[1, 1, 1])
    for payload in (0x7FC00000, 0x7FFFFFFF, 0xFFC00001):  # the last bits of a NaN differ between machines
        inputs = case.make_inputs()
        nan = np.array([payload], np.uint32).view(np.float32)[0]
        inputs["past_key"][1, 2, 3] = nan
        output = run(case.session(), inputs)[0].reshape(3, 4, case.head_dim)
        assert np.isnan(output[1, 2]).all()
        output[1, 2] = 0.0
        assert np.isfinite(output).all()


def test_two_runs_of_one_session_at_once() -> None:
    case = Case(num_heads=8, prefix_length=600, context_lens=[5] * 16, query_lens=[1] * 16)
    session = case.session(2)
    inputs = case.make_inputs()
    expected = run(session, inputs)[0]
    failures: list[str] = []

    def work() -> None:
        for _ in range(30):
            if not np.array_equal(run(session, inputs)[0], expected):
                failures.append("another result")

    workers = [threading.Thread(target=work) for _ in range(3)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not failures


@pytest.mark.parametrize("dtype", DTYPES)
def test_inside_a_graph_whose_shapes_are_unknown(dtype: str) -> None:
    """Types and shapes pass through the op at load time; caches that no one binds are made by the engine."""
    case = Case(dtype=dtype, rotary_dim=16)
    model = onnx.load_model_from_string(make_model(case.all_attributes(), dtype, schema.input_names(True)))
    kind = model.graph.input[0].type.tensor_type.elem_type
    node = model.graph.node[0]
    node.input[0] = "reshaped"
    node.output[0], node.output[1] = "attended", "present"
    model.graph.node.insert(0, onnx.helper.make_node("Reshape", ["query", "query_shape"], ["reshaped"]))
    model.graph.node.append(onnx.helper.make_node("Add", ["attended", "attended"], ["output"]))
    model.graph.node.append(onnx.helper.make_node("Neg", ["present"], ["present_key"]))
    model.graph.input.append(
        onnx.helper.make_tensor_value_info("query_shape", onnx.TensorProto.INT64, [None])
    )
    session = make_session(model.SerializeToString())
    inputs = case.make_inputs()
    expected = case.reference(inputs)
    flat = {**inputs, "query": inputs["query"].reshape(-1, 1, 1), "query_shape": np.array([3, 1, -1])}
    output, present_key, present_value = session.run(None, flat)
    assert [info.type for info in session.get_outputs()] == [
        "tensor(float16)" if kind == onnx.TensorProto.FLOAT16 else "tensor(float)"
    ] * 3
    atol = 1e-2 if dtype == "float16" else 1e-5
    np.testing.assert_allclose(output, 2 * expected[0], atol=atol)
    np.testing.assert_allclose(present_key, -expected[1], atol=atol)
    np.testing.assert_allclose(present_value, expected[2], atol=atol)


@pytest.mark.parametrize("used_twice", [False, True])
def test_past_that_another_node_made(used_twice: bool) -> None:
    """The engine may let present take over past's buffer, unless another node still needs past."""
    case = Case()
    model = onnx.load_model_from_string(
        make_model(case.all_attributes(), "float32", schema.input_names(False))
    )
    node = model.graph.node[0]
    node.input[3] = "negated"
    model.graph.node.insert(0, onnx.helper.make_node("Neg", ["past_key"], ["negated"]))
    names = [*schema.OUTPUT_NAMES]
    if used_twice:
        model.graph.node.append(onnx.helper.make_node("Abs", ["negated"], ["absolute"]))
        info = onnx.helper.make_tensor_value_info("absolute", onnx.TensorProto.FLOAT, [None] * 4)
        model.graph.output.append(info)
        names.append("absolute")
    inputs = case.make_inputs()
    expected = case.reference({**inputs, "past_key": -inputs["past_key"]})
    got = dict(zip(names, make_session(model.SerializeToString()).run(names, inputs), strict=True))
    for name, want in zip(schema.OUTPUT_NAMES, expected, strict=True):
        np.testing.assert_allclose(got[name], want, rtol=2e-5, atol=5e-6)
    if used_twice:
        np.testing.assert_array_equal(got["absolute"], np.abs(inputs["past_key"]))


def test_empty_batch_and_empty_sequence() -> None:
    for shape in ({"context_lens": [], "query_lens": []}, {"sequence": 0, "query_lens": [0, 0, 0]}):
        case = Case(**shape)
        output, present_key, _ = run(case.session(), case.make_inputs())
        assert output.shape == (len(case.context_lens), case.sequence, 4 * 32)
        assert present_key.shape[0] == len(case.context_lens)
