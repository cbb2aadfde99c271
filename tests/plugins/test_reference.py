"""The reference itself: against a plain softmax over all keys at once, and the laws of the fusion."""

import numpy as np
import pytest
from op_harness import Case

from relay_attention.plugins.reference import attention, merge, relay_attention, rotate


@pytest.mark.parametrize("window", [-1, 1, 6, 40])
@pytest.mark.parametrize("softcap", [0.0, 2.0])
def test_equals_one_softmax_over_prefix_and_context(window: int, softcap: float) -> None:
    case = Case(
        prefix_length=11,
        sequence=4,
        query_lens=[4, 2, 0],
        attributes={"local_window_size": window, "softcap": softcap},
    )
    inputs = {name: np.nan_to_num(array.astype(np.float64)) for name, array in case.make_inputs().items()}
    inputs["context_lens"], inputs["query_lens"] = np.array(case.context_lens), np.array(case.query_lens)
    output, present_key, present_value = case.reference(inputs)
    for b, (context, count) in enumerate(zip(case.context_lens, case.query_lens, strict=True)):
        for s in range(count):
            position = 11 + context + s
            first = 0 if window < 0 else max(0, position - window + 1)
            for head in range(4):
                keys = np.concatenate([inputs["prefix_key"][head // 2], present_key[b, head // 2]])
                values = np.concatenate([inputs["prefix_value"][head // 2], present_value[b, head // 2]])
                query = inputs["query"][b, s].reshape(4, 32)[head]
                scores = keys[first : position + 1] @ query / np.sqrt(32)
                if softcap:
                    scores = softcap * np.tanh(scores / softcap)
                weights = np.exp(scores) / np.exp(scores).sum()
                want = weights @ values[first : position + 1]
                np.testing.assert_allclose(output[b, s].reshape(4, 32)[head], want, atol=1e-12)
        assert not output[b, count:].any()


def test_merge_equals_attention_over_both_and_takes_empty_sides() -> None:
    rng = np.random.default_rng()
    query, key, value = (
        rng.standard_normal((5, 8)),
        rng.standard_normal((30, 8)),
        rng.standard_normal((30, 8)),
    )
    everything = np.ones((5, 30), bool)
    both = attention(query, key, value, everything)
    one = attention(query, key[:13], value[:13], everything[:, :13])
    other = attention(query, key[13:], value[13:], everything[:, 13:])
    none = attention(query, key[:0], value[:0], everything[:, :0])
    assert np.isneginf(none[1]).all()
    for got in (merge(*one, *other), merge(*other, *one), merge(*both, *none), merge(*none, *both)):
        np.testing.assert_allclose(got[0], both[0], atol=1e-12)
        np.testing.assert_allclose(got[1], both[1], atol=1e-12)
    nothing = merge(*none, *none)
    assert not nothing[0].any()
    assert np.isneginf(nothing[1]).all()


@pytest.mark.parametrize("interleaved", [False, True])
def test_rotation_depends_on_distance_only(interleaved: bool) -> None:
    rng = np.random.default_rng()
    query, key = rng.standard_normal((2, 1, 12))
    angles = np.arange(50)[:, None] * 0.7 ** np.arange(4)[None, :]

    def score(i: int, j: int) -> float:
        rotated = [
            rotate(x, np.cos(angles[p : p + 1]), np.sin(angles[p : p + 1]), interleaved)
            for x, p in ((query, i), (key, j))
        ]
        return float((rotated[0] * rotated[1]).sum())

    assert score(40, 31) == pytest.approx(score(9, 0))
    assert score(40, 31) != pytest.approx(score(40, 30))


def test_inputs_are_left_alone() -> None:
    case = Case(sequence=2, rotary_dim=16)
    inputs = case.make_inputs()
    before = {name: array.copy() for name, array in inputs.items()}
    relay_attention(**inputs, num_heads=4, kv_num_heads=2, do_rotary=1)
    for name, array in inputs.items():
        np.testing.assert_array_equal(array, before[name])
