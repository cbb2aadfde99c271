import math

import numpy as np
import pytest

from relay_attention.errors import PromptError
from relay_attention.runtime.sampling import Sampler, SamplingParams

VOCAB = 50


def sampler(stop=(), seen=(), **params) -> Sampler:
    return Sampler(SamplingParams(**params), stop, [np.asarray(seen, np.int32)])


def random_logits(seed: int = 0, size: int = VOCAB) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(size).astype(np.float32) * 3


def probabilities(logits: np.ndarray, temperature: float = 1.0) -> np.ndarray:
    weights = np.exp((logits.astype(np.float64) - logits.max()) / temperature)
    return weights / weights.sum()


def drawn(logits: np.ndarray, count: int = 4000, **params) -> np.ndarray:
    """Frequencies of the tokens drawn."""
    chooser = sampler(**({"temperature": 1.0, "seed": 1} | params))
    return np.bincount([chooser.sample(logits, 0) for _ in range(count)], minlength=len(logits)) / count


def assert_distributed(frequencies: np.ndarray, expected: np.ndarray, count: int = 4000) -> None:
    """Within five standard deviations each, and nothing where nothing may be."""
    assert not frequencies[expected == 0].any()
    assert (np.abs(frequencies - expected) <= 5 * np.sqrt(expected * (1 - expected) / count) + 1e-12).all()


def keep(weights: np.ndarray, kept: np.ndarray) -> np.ndarray:
    weights = np.where(kept, weights, 0)
    return weights / weights.sum()


@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.5])
def test_temperature(temperature):
    logits = random_logits()
    assert_distributed(drawn(logits, temperature=temperature), probabilities(logits, temperature))


def test_greedy_takes_the_lowest_of_equal_tokens():
    logits = np.zeros(VOCAB, np.float32)
    logits[[7, 3, 30]] = 2
    assert sampler().sample(logits, 0) == 3


@pytest.mark.parametrize("temperature", [1e-4, 1e-30, 5e-324])
def test_low_temperature_is_greedy(temperature):
    logits = random_logits()
    with np.errstate(all="raise", under="ignore"):
        assert {sampler(temperature=temperature).sample(logits, 0) for _ in range(20)} == {logits.argmax()}


def test_top_k():
    logits = random_logits()
    weights = probabilities(logits)
    assert_distributed(drawn(logits, top_k=4), keep(weights, weights >= np.sort(weights)[-4]))
    assert_distributed(drawn(logits, top_k=1), keep(weights, weights == weights.max()))
    np.testing.assert_array_equal(drawn(logits, top_k=VOCAB + 9), drawn(logits))


@pytest.mark.parametrize("top_p", [0.01, 0.5, 0.9, 0.999])
def test_top_p(top_p):
    logits = random_logits(3)
    weights = probabilities(logits)
    order = np.argsort(-weights)
    count = int(np.searchsorted(np.cumsum(weights[order]), top_p)) + 1
    kept = np.isin(np.arange(VOCAB), order[:count])
    assert_distributed(drawn(logits, top_p=top_p), keep(weights, kept))


def test_top_p_of_equal_tokens():
    assert np.count_nonzero(drawn(np.zeros(VOCAB, np.float32), top_p=0.5)) == VOCAB // 2


def test_top_p_of_a_flat_large_vocabulary():
    """The nucleus is searched among growing numbers of tokens; here it is most of them."""
    logits = random_logits(1, 5000) / 30
    chooser = sampler(temperature=1.0, top_p=0.9, seed=0)
    weights = probabilities(logits)
    order = np.argsort(-weights)
    kept = set(order[: int(np.searchsorted(np.cumsum(weights[order]), 0.9)) + 1].tolist())
    drawn_tokens = {chooser.sample(logits, 0) for _ in range(3000)}
    assert drawn_tokens <= kept
    assert len(drawn_tokens) > 1500


def test_min_p():
    logits = random_logits()
    weights = probabilities(logits)
    assert_distributed(drawn(logits, min_p=0.2), keep(weights, weights >= 0.2 * weights.max()))


def test_filters_together_follow_transformers():
    torch = pytest.importorskip("torch")
    process = pytest.importorskip("transformers.generation.logits_process")
    logits, seen = random_logits(5), [1, 4, 4, 30]
    scores = torch.tensor(logits)[None]
    for processor in (
        process.RepetitionPenaltyLogitsProcessor(1.7),
        process.TemperatureLogitsWarper(1.3),
        process.TopKLogitsWarper(20),
        process.TopPLogitsWarper(0.9),
        process.MinPLogitsWarper(0.05),
    ):
        scores = processor(torch.tensor([seen]), scores)
    expected = torch.softmax(scores.double(), -1)[0].numpy()
    params = {"temperature": 1.3, "top_k": 20, "top_p": 0.9, "min_p": 0.05, "repetition_penalty": 1.7}
    count = 4000
    frequencies = np.zeros(VOCAB)
    for seed in range(count):  # a sampler each: what it draws would count as seen
        frequencies[sampler(seen=seen, seed=seed, **params).sample(logits, 0)] += 1 / count
    assert 1 < np.count_nonzero(expected) < 20
    assert_distributed(frequencies, expected)


def test_repetition_penalty_counts_what_was_generated():
    logits = np.zeros(VOCAB, np.float32)
    logits[[2, 3, 4]] = [4.0, 3.0, 2.9]
    chooser = sampler(seen=[4], repetition_penalty=2.0)
    assert [chooser.sample(logits, n) for n in range(3)] == [2, 3, 2]
    negative = -1 - np.arange(VOCAB, dtype=np.float32)
    assert sampler(seen=[0], repetition_penalty=3.0).sample(negative, 0) == 1


def test_min_new_tokens_masks_stop_tokens():
    logits = random_logits()
    best, second = np.argsort(-logits)[:2]
    chooser = sampler(stop=[best], min_new_tokens=2)
    assert [chooser.sample(logits, n) for n in range(4)] == [second, second, best, best]


def test_logits_are_left_alone():
    logits = random_logits()
    before = logits.copy()
    chooser = sampler(
        stop=[1],
        seen=[2],
        temperature=1,
        top_k=9,
        top_p=0.9,
        repetition_penalty=2.0,
        min_new_tokens=1,
        logprobs=2,
    )
    chooser.logprobs(logits, chooser.sample(logits, 0))
    np.testing.assert_array_equal(logits, before)


def test_seed():
    logits = random_logits(size=1000) / 10
    runs = [[sampler(temperature=1, seed=seed).sample(logits, 0) for seed in range(30)] for _ in range(2)]
    assert runs[0] == runs[1]
    assert len(set(runs[0])) > 10
    assert len({sampler(temperature=1).sample(logits, 0) for _ in range(30)}) > 10, (
        "no seed, another each time"
    )


def test_last_bits_of_the_logits_rarely_matter():
    """What another batch size may change: draws from logits that differ by 1e-6 nearly always agree."""
    generator = np.random.default_rng(0)
    differing = 0
    for seed in range(300):
        logits = random_logits(seed, 500)
        noisy = logits + generator.uniform(-1e-6, 1e-6, 500).astype(np.float32)
        options = {"temperature": 1.0, "top_k": 100, "top_p": 0.95, "seed": seed}
        differing += sampler(**options).sample(logits, 0) != sampler(**options).sample(noisy, 0)
    assert differing <= 1


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_logits_that_are_not_finite(value):
    logits = random_logits()
    logits[:] = value if value == -np.inf else logits
    logits[17] = value
    for temperature in (0, 1):
        with pytest.raises(FloatingPointError, match="not finite"):
            sampler(temperature=temperature).sample(logits, 0)


def test_masked_tokens_are_fine():
    logits = random_logits()
    logits[10:] = -np.inf
    assert np.flatnonzero(drawn(logits, 500)).max() < 10


def test_logprobs():
    logits = random_logits()
    expected = np.log(probabilities(logits))
    chosen = sampler(logprobs=3).logprobs(logits, 11)
    assert chosen.token_id == 11
    assert chosen.logprob == pytest.approx(expected[11], abs=1e-5)
    order = np.argsort(-logits)[:3]
    assert [token_id for token_id, _ in chosen.top] == order.tolist()
    np.testing.assert_allclose([value for _, value in chosen.top], expected[order], atol=1e-5)
    assert sampler(logprobs=0).logprobs(logits, 11).top == ()
    assert len(sampler(logprobs=VOCAB + 5).logprobs(logits, 11).top) == VOCAB
    assert sampler().logprobs(logits, 11) is None


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens is 0, must be at least 1"),
        ({"max_new_tokens": 2.5}, "max_new_tokens is 2.5, not an integer"),
        ({"max_new_tokens": True}, "not an integer"),
        ({"min_new_tokens": 300}, "min_new_tokens 300 is above max_new_tokens 256"),
        ({"temperature": -1}, "temperature is -1, must be at least 0"),
        ({"temperature": math.nan}, "temperature is nan"),
        ({"temperature": math.inf}, "temperature is inf"),
        ({"temperature": "hot"}, "temperature is 'hot', not a number"),
        ({"top_k": -1}, "top_k is -1"),
        ({"top_p": 0}, "must be above 0"),
        ({"top_p": 1.1}, "top_p is 1.1, must be from 0.0 to 1.0"),
        ({"min_p": 2}, "min_p is 2"),
        ({"repetition_penalty": 0}, "must be above 0"),
        ({"seed": -1}, "seed is -1"),
        ({"seed": "x"}, "seed is 'x', not an integer"),
        ({"logprobs": -1}, "logprobs is -1"),
        ({"stop": [""]}, "empty string"),
        ({"stop": [1]}, r"stop is \[1\], not a list of str"),
        ({"stop": None}, "stop is None"),
        ({"stop_token_ids": ["a"]}, "stop_token_ids is"),
        ({"stop_token_ids": 7}, "stop_token_ids is 7"),
        ({"ignore_eos": "no"}, "ignore_eos is 'no'"),
    ],
)
def test_params_that_make_no_sense(params, message):
    with pytest.raises(PromptError, match=message):
        SamplingParams(**params)


def test_params_from_mapping():
    base = SamplingParams(top_k=5, stop="a")
    assert base.stop == ("a",)
    assert SamplingParams.from_mapping({"seed": 3, "stop": ["b"]}, base) == SamplingParams(
        top_k=5, seed=3, stop=("b",)
    )
    with pytest.raises(PromptError, match=r"heat, topk: unknown; sampling parameters are .*top_k"):
        SamplingParams.from_mapping({"topk": 3, "heat": 1})
