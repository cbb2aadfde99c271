"""Slots, queue, streaming and errors, on a backend that only remembers tokens: they decide the logits."""

import threading

import numpy as np
import pytest

from relay_attention.errors import BackendError, PromptError, RelayError
from relay_attention.runtime import GenerationInterrupted, RelayDecoder, SamplingParams
from relay_attention.runtime.decoder import GenerationEvent


@pytest.fixture
def vocab_size(artifact) -> int:
    return artifact.manifest.geometry.vocab_size


@pytest.fixture
def make(artifact, FakeBackend, vocab_size):
    """A decoder with a fake backend, which is its `.backend`."""

    def make_decoder(chain=lambda tokens: None, **options) -> RelayDecoder:
        backend = FakeBackend(vocab_size, chain)
        decoder = RelayDecoder(artifact, backend, **({"max_batch": 4} | options))
        decoder.backend = backend
        return decoder

    return make_decoder


def alone(decoder: RelayDecoder, prompt: list[int], count: int) -> list[int]:
    """What a request must give, whatever else runs: greedy tokens from the fake backend's logits."""
    tokens, end = list(prompt), decoder.manifest.tokens.eos
    for _ in range(count):
        token_id = int(decoder.backend.logits(tokens).argmax())
        if token_id in end:
            break
        tokens.append(token_id)
    return tokens[len(prompt) :]


def random_prompts(count: int, longest: int, vocab_size: int, seed: int = 0) -> list[list[int]]:
    generator = np.random.default_rng(seed)
    return [
        generator.integers(0, vocab_size, generator.integers(1, longest + 1)).tolist() for _ in range(count)
    ]


@pytest.mark.parametrize("max_batch", [1, 2, 3, 7, 64])
@pytest.mark.parametrize("prefill_chunk", [1, 5, 16, 1000])
def test_more_requests_than_slots(make, vocab_size, max_batch, prefill_chunk):
    """Every request gives what it gives alone, ragged, in any number of slots and chunks of any size."""
    decoder = make(max_batch=max_batch, prefill_chunk=prefill_chunk)
    prompts = random_prompts(25, 40, vocab_size)
    lengths = np.random.default_rng(1).integers(1, 25, len(prompts)).tolist()
    results = decoder.generate(prompts, [SamplingParams(max_new_tokens=length) for length in lengths])
    assert [result.token_ids for result in results] == [
        alone(decoder, prompt, length) for prompt, length in zip(prompts, lengths, strict=True)
    ]
    assert [result.prompt_tokens for result in results] == [len(prompt) for prompt in prompts]
    for result, length in zip(results, lengths, strict=True):
        assert result.finish_reason == ("length" if len(result.token_ids) == length else "stop")
        assert result.text == decoder.tokenizer.decode(result.token_ids)
    assert not decoder.busy
    decode_rows = [
        rows for first_row, rows, sequence in decoder.backend.calls if first_row == 0 and sequence == 1
    ]
    assert max(decode_rows) <= max_batch


def test_a_freed_slot_is_used_at_once(make, vocab_size):
    decoder = make(max_batch=2)
    params = [SamplingParams(max_new_tokens=count, ignore_eos=True) for count in (20, 2, 2, 2, 2)]
    decoder.generate([[5]] * 5, params)
    decode_rows = [rows for first_row, rows, sequence in decoder.backend.calls if first_row == 0]
    # the long one needs 19 decode steps after its prefill, and the four short ones go through the other slot
    assert len(decode_rows) == 20
    assert len(decoder.backend.calls) == 20 + 3


def test_idle_prefill_is_one_ragged_call(make):
    """32 suffixes of up to 64 tokens, nothing decoding: one call."""
    decoder = make(max_batch=32, max_context=80)
    params = SamplingParams(max_new_tokens=2, ignore_eos=True)
    decoder.generate([[1] * (33 + n) for n in range(32)], params)
    assert decoder.backend.calls[0] == (0, 32, 64)
    assert decoder.backend.calls[1] == (0, 32, 1)


def test_long_prompt_does_not_stall_others(make):
    """While others decode, every step has a decode call, and no prefill call above the chunk."""
    decoder = make(max_batch=4, prefill_chunk=8)
    first = decoder.add_request([1, 2, 3], SamplingParams(max_new_tokens=30, ignore_eos=True))
    decoder.step()
    long = decoder.add_request([7] * 60, SamplingParams(max_new_tokens=3, ignore_eos=True))
    short = decoder.add_request([8] * 4, SamplingParams(max_new_tokens=3, ignore_eos=True))
    started = {}
    for step in range(100):
        decoder.backend.calls.clear()
        events = decoder.step()
        if first in {event.index for event in events} and step < 20:
            assert sum(event.index == first for event in events) == 1
        for event in events:
            started.setdefault(event.index, step)
        assert all(rows * sequence <= 8 for first_row, rows, sequence in decoder.backend.calls if first_row)
        if not decoder.busy:
            break
    assert started[long] == 7, "60 tokens in chunks of 8"
    assert started[short] == started[long] + 1, "first come, first served"


def test_chunked_prompt_waits_in_the_last_slot(make):
    """It does not move while rows end below it, and moves once when it is complete."""
    decoder = make(max_batch=4, prefill_chunk=4)
    for count in (2, 3, 20):
        decoder.add_request([count], SamplingParams(max_new_tokens=count, ignore_eos=True))
    decoder.step()
    decoder.add_request([9] * 40, SamplingParams(max_new_tokens=1))
    while decoder.busy:
        decoder.step()
    assert {first_row for first_row, _, _ in decoder.backend.calls} == {0, 3}
    assert [move for move in decoder.backend.moves if move[0] == 3] == [(3, 1, 40)]


def test_text_and_chat_prompts(make):
    decoder = make()
    chat = [{"role": "user", "content": "hello"}]
    one, two, three = decoder.generate(
        ["hello", chat, decoder.encode("hello")], SamplingParams(max_new_tokens=5)
    )
    assert one == two == three
    assert decoder.generate("hello", SamplingParams(max_new_tokens=5)) == [one]
    assert decoder.generate([]) == []


def test_stop_token(make):
    decoder = make(lambda tokens: tokens[-1] + 1)
    eos = decoder.manifest.tokens.eos[0]
    (result,) = decoder.generate([[eos - 4]])
    assert (result.token_ids, result.finish_reason, result.stop) == ([eos - 3, eos - 2, eos - 1], "stop", eos)
    params = SamplingParams(stop_token_ids=[eos - 2])
    (result,) = decoder.generate([[eos - 4]], params)
    assert (result.token_ids, result.finish_reason, result.stop) == ([eos - 3], "stop", eos - 2)
    decoder = make(lambda tokens: eos)
    (result,) = decoder.generate([[1]], SamplingParams(max_new_tokens=3))
    assert (result.token_ids, result.text, result.finish_reason) == ([], "", "stop")
    (result,) = decoder.generate([[1]], SamplingParams(max_new_tokens=3, ignore_eos=True))
    assert (result.token_ids, result.finish_reason, result.stop) == ([eos] * 3, "length", None)
    (result,) = decoder.generate([[1]], SamplingParams(max_new_tokens=9, min_new_tokens=4))
    assert len(result.token_ids) == 4
    assert eos not in result.token_ids


def saying(decoder_tokens):
    """A chain that answers every prompt of one token with the given tokens."""
    return lambda tokens: decoder_tokens[len(tokens) - 1] if len(tokens) <= len(decoder_tokens) else None


def test_stop_string_over_token_boundaries(make):
    probe = make()
    said = [
        token
        for text in ("hello", " the st", "op", "!\n", "\n", "more")
        for token in probe.tokenizer.encode(text)
    ]
    decoder = make(saying(said))
    events = list(decoder.stream_generate([[1]], SamplingParams(stop=["\n\n", "stop!"], logprobs=0)))
    result = events[-1].result
    assert (result.text, result.finish_reason, result.stop) == ("hello the ", "stop", "stop!")
    assert "".join(event.text for event in events) == result.text
    assert probe.tokenizer.decode(result.token_ids) == "hello the stop!", (
        "the tokens are as they were generated"
    )
    assert len(result.logprobs) == len(result.token_ids)
    (result,) = decoder.generate([[1]], SamplingParams(stop=["\n\n"]))
    assert result.text == "hello the stop!"
    (result,) = decoder.generate(
        [[1]], SamplingParams(stop="stop!", min_new_tokens=len(said), max_new_tokens=len(said))
    )
    assert (result.text, result.finish_reason) == ("hello the stop!\n\nmore", "length")


def test_held_back_text_is_given_out_at_the_end(make):
    probe = make()
    said = probe.tokenizer.encode("hello st")
    for reason, chain in (("length", said), ("stop", [*said, probe.manifest.tokens.eos[0]])):
        decoder = make(saying(chain))
        (result,) = decoder.generate(
            [[1]], SamplingParams(stop=["stop"], max_new_tokens=len(said) + (reason == "stop"))
        )
        assert (result.text, result.finish_reason) == ("hello st", reason)


def test_streaming_at_utf8_boundaries(make):
    probe = make()
    said = probe.tokenizer.encode("né 中🙂")
    decoder = make(saying(said))
    events = list(decoder.stream_generate([[1]], SamplingParams(max_new_tokens=len(said))))
    assert "".join(event.text for event in events) == "né 中🙂"
    assert not any("\ufffd" in event.text for event in events)
    assert [token for event in events for token in event.token_ids] == said
    (result,) = decoder.generate([[1]], SamplingParams(max_new_tokens=len(said) - 1))
    assert result.text == "né 中\ufffd"


def test_stream_callback_and_iterator_agree_with_results(make, vocab_size):
    decoder = make(max_batch=3)
    prompts = random_prompts(8, 20, vocab_size)
    params = SamplingParams(max_new_tokens=12, stop=["a", "the"])
    seen: list[GenerationEvent] = []
    results = decoder.generate(prompts, params, stream=seen.append)
    assert list(decoder.stream_generate(prompts, params)) == seen
    for index, result in enumerate(results):
        events = [event for event in seen if event.index == index]
        assert "".join(event.text for event in events) == result.text
        assert [token for event in events for token in event.token_ids] == result.token_ids
        assert [event.finish_reason for event in events] == [None] * (len(events) - 1) + [
            result.finish_reason
        ]
        assert events[-1].result == result


def test_leaving_the_iterator_frees_the_slots(make):
    decoder = make()
    for event in decoder.stream_generate([[1], [2]], SamplingParams(ignore_eos=True)):
        assert event.index in (0, 1)
        break
    del event
    decoder.generate([[3]], SamplingParams(max_new_tokens=2))
    assert not decoder.busy


def test_iterators_cannot_be_mixed(make):
    decoder = make()
    first = decoder.stream_generate([[1]], SamplingParams(ignore_eos=True))
    next(first)
    with pytest.raises(RelayError, match="other requests are in flight"):
        next(decoder.stream_generate([[2]]))
    with pytest.raises(RelayError, match="other requests are in flight"):
        decoder.generate([[2]])
    with pytest.raises(RelayError, match="use one or the other"):
        decoder.add_request([2])
    first.close()
    decoder.add_request([2])
    with pytest.raises(RelayError, match="other requests are in flight"):
        decoder.generate([[2]])


def test_same_seed_same_tokens_whatever_else_is_in_the_batch(make, vocab_size):
    params = SamplingParams(
        temperature=1.5, top_k=200, top_p=0.99, seed=7, max_new_tokens=15, repetition_penalty=1.1
    )
    prompt = [1, 2, 3]
    (expected,) = make(max_batch=1).generate([prompt], params)
    others = random_prompts(9, 30, vocab_size)
    noise = [SamplingParams(temperature=1.0, max_new_tokens=1 + n) for n in range(len(others))]
    for place in (0, 4, 9):
        decoder = make(max_batch=3)
        results = decoder.generate(
            [*others[:place], prompt, *others[place:]], [*noise[:place], params, *noise[place:]]
        )
        assert results[place].token_ids == expected.token_ids
    (other,) = make().generate([prompt], SamplingParams.from_mapping({"seed": 8}, params))
    assert other.token_ids != expected.token_ids


def test_logprobs(make):
    decoder = make()
    (result,) = decoder.generate([[4, 5]], SamplingParams(max_new_tokens=4, logprobs=2, ignore_eos=True))
    tokens = [4, 5]
    for token_id, entry in zip(result.token_ids, result.logprobs, strict=True):
        logits = decoder.backend.logits(tokens).astype(np.float64)
        expected = logits - np.log(np.exp(logits).sum())
        assert entry.token_id == token_id == entry.top[0][0]
        assert entry.logprob == pytest.approx(expected[token_id], abs=1e-5)
        tokens.append(token_id)
    (result,) = decoder.generate([[4, 5]], SamplingParams(max_new_tokens=1))
    assert result.logprobs is None


def test_repetition_penalty_counts_prefix_and_prompt(make):
    """Every token is in the prefix or the prompt but one, which wins although its logit is lower."""
    decoder = make()
    prefix = set(decoder.manifest.prefix.token_ids)
    vocab_size = decoder.manifest.geometry.vocab_size
    unseen = min(set(range(vocab_size)) - prefix - set(decoder.manifest.tokens.eos))
    prompt = [token for token in range(vocab_size) if token not in prefix and token != unseen][:60]
    logits = np.full(vocab_size, -50, np.float32)
    logits[[*prefix, *prompt]] = 5.0
    logits[unseen] = 4.0
    decoder.backend.logits = lambda tokens: logits
    (result,) = decoder.generate([prompt], SamplingParams(max_new_tokens=1, repetition_penalty=1.5))
    assert result.token_ids == [unseen]
    (result,) = decoder.generate([prompt], SamplingParams(max_new_tokens=1))
    assert result.token_ids != [unseen]


def test_capacity(make):
    """A request whose cache is full ends; the last token needs no place in the cache."""
    decoder = make(max_context=10)
    results = decoder.generate([[1] * 7, [2] * 10], SamplingParams(max_new_tokens=100, ignore_eos=True))
    assert [len(result.token_ids) for result in results] == [4, 1]
    assert {result.finish_reason for result in results} == {"length"}


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ("", "request 2: the prompt is empty"),
        ([], "request 2: the prompt is empty"),
        ([1, 10**6], r"request 2: the prompt: token id 1000000 is not in the vocabulary, 0 to \d+"),
        ([-1], "request 2: the prompt: token id -1 is not in the vocabulary"),
        ([1] * 65, "request 2: the prompt has 65 tokens, max_context is 64"),
        (5, "request 2: the prompt is int 5"),
        ({"role": "user"}, "request 2: the prompt is dict"),
    ],
)
def test_bad_prompts_are_refused_before_anything_runs(make, prompt, message):
    decoder = make()
    with pytest.raises(PromptError, match=message):
        decoder.generate([[1], "hello", prompt])
    with pytest.raises(PromptError, match=message):
        decoder.stream_generate([[1], "hello", prompt])
    with pytest.raises(PromptError, match=message.removeprefix("request 2: ")):
        decoder.add_request(prompt)
    assert decoder.backend.calls == []
    assert not decoder.busy


def test_bad_params(make):
    decoder = make()
    with pytest.raises(PromptError, match="1 sampling parameters for 2 prompts"):
        decoder.generate([[1], [2]], [SamplingParams()])
    with pytest.raises(
        PromptError, match="request 0: stop_token_ids: token id 100000 is not in the vocabulary"
    ):
        decoder.generate([[1]], SamplingParams(stop_token_ids=[100000]))


@pytest.mark.parametrize("options", [{"max_batch": 0}, {"max_context": 0}, {"prefill_chunk": -1}])
def test_bad_sizes(make, options):
    with pytest.raises(BackendError, match="at least 1 is needed"):
        make(**options)


def test_max_context_beyond_the_positions(make):
    with pytest.raises(RelayError, match=r"exceed the model's 512 positions: set max_context to at most \d+"):
        make(max_context=512)


def test_service(make, vocab_size):
    """Requests come from other threads while one thread steps; some are aborted, waiting or running."""
    decoder = make(max_batch=3, prefill_chunk=8)
    prompts = random_prompts(40, 30, vocab_size)
    params = SamplingParams(max_new_tokens=20, ignore_eos=True)
    indices: dict[int, list[int]] = {}

    def client(part):
        for prompt in part:
            indices[decoder.add_request(prompt, params)] = prompt

    threads = [threading.Thread(target=client, args=(prompts[n::4],)) for n in range(4)]
    for thread in threads:
        thread.start()
    results, aborted, texts = {}, set(), {}
    while any(thread.is_alive() for thread in threads) or decoder.busy:
        for event in decoder.step():
            texts[event.index] = texts.get(event.index, "") + event.text
            if event.result:
                assert event.index not in results
                results[event.index] = event.result
            elif len(aborted) < 5 and event.index % 3 == 0 and event.index not in aborted:
                aborted.add(event.index)
                decoder.abort(event.index)
                decoder.abort(event.index)
    assert sorted(results) == sorted(indices) == list(range(40))
    for index, result in results.items():
        expected = decoder.backend
        assert texts[index] == result.text
        if index in aborted:
            assert result.finish_reason == "aborted"
            assert len(result.token_ids) < 20
        else:
            tokens = list(indices[index])
            for token_id in result.token_ids:
                assert token_id == expected.logits(tokens).argmax()
                tokens.append(token_id)
    decoder.abort(0)  # has ended: nothing happens
    decoder.abort(999)
    assert decoder.step() == []


def test_abort_in_every_state(make):
    decoder = make(max_batch=2, prefill_chunk=4)
    running = decoder.add_request([1], SamplingParams(ignore_eos=True))
    decoder.step()
    chunked = decoder.add_request([2] * 30, SamplingParams(ignore_eos=True))
    waiting = decoder.add_request([3], SamplingParams(ignore_eos=True))
    decoder.step()
    for index in (running, chunked, waiting):
        decoder.abort(index)
    events = {event.index: event for event in decoder.step()}
    assert {events[index].finish_reason for index in (running, chunked, waiting)} == {"aborted"}
    assert [len(events[index].result.token_ids) > 0 for index in (running, chunked, waiting)] == [
        True,
        False,
        False,
    ]
    assert not decoder.busy
    assert len(decoder.generate([[1], [2]], SamplingParams(max_new_tokens=3, ignore_eos=True))) == 2


def test_abort_from_the_callback(make):
    decoder = make()

    def stop_second(event):
        if event.index == 1 and not event.result:
            decoder.abort(1)

    params = SamplingParams(max_new_tokens=10, ignore_eos=True)
    results = decoder.generate([[1], [2], [3]], params, stream=stop_second)
    assert [result.finish_reason for result in results] == ["length", "aborted", "length"]


@pytest.mark.parametrize("where", ["step", "callback"])
def test_ctrl_c_keeps_finished_results(make, where):
    decoder = make(max_batch=2)
    params = [SamplingParams(max_new_tokens=count, ignore_eos=True) for count in (2, 30, 30, 30)]
    step, steps = decoder.backend.step, []

    def interrupted(*arguments):
        steps.append(1)
        if len(steps) == 8:
            raise KeyboardInterrupt
        step(*arguments)

    def callback(event):
        if where == "callback" and len(steps) == 7:
            raise KeyboardInterrupt

    decoder.backend.step = interrupted
    with pytest.raises(KeyboardInterrupt) as caught:
        decoder.generate([[1], [2], [3], [4]], params, stream=callback)
    assert isinstance(caught.value, GenerationInterrupted)
    results = caught.value.results
    assert [result.finish_reason for result in results] == ["length", "aborted", "aborted", "aborted"]
    assert len(results[0].token_ids) == 2
    assert len(results[1].token_ids) > 2
    assert results[3].token_ids == []
    assert results[1].text == decoder.tokenizer.decode(results[1].token_ids)
    assert not decoder.busy
    decoder.backend.step = step
    (result,) = decoder.generate([[2]], params[1])
    assert result.token_ids[: len(results[1].token_ids)] == results[1].token_ids


def test_engine_failure_ends_the_requests_of_that_call(make):
    """A prefill call that fails, whole or chunked, does not take the running requests with it."""
    for poison in ([13] * 3, [13] * 40):
        decoder = make(max_batch=4, prefill_chunk=4)
        decoder.backend.fail_on = lambda input_ids: bool((input_ids == 13).any())
        decoder.backend.chain = lambda tokens: tokens[0] + 20
        prompts = [[1], [2], poison, [3]]
        good = decoder.add_request([1], SamplingParams(max_new_tokens=30))
        decoder.step()
        bad = decoder.add_request(poison)
        results = {}
        while decoder.busy:
            results |= {event.index: event.result for event in decoder.step() if event.result}
        assert (results[bad].finish_reason, results[bad].error) == ("error", "the engine gave up")
        assert results[good].token_ids == [21] * 30
        assert len(decoder.generate(prompts[:2], SamplingParams(max_new_tokens=2))) == 2


def test_logits_that_are_not_finite_end_one_request(make):
    decoder = make()
    logits = decoder.backend.logits
    decoder.backend.logits = lambda tokens: (
        logits(tokens) * (np.nan if tokens[0] == 2 and len(tokens) > 3 else 1)
    )
    params = SamplingParams(max_new_tokens=6, ignore_eos=True)
    results = decoder.generate([[1], [2], [3]], params)
    assert [result.finish_reason for result in results] == ["length", "error", "length"]
    assert results[1].error == "the model's logits are not finite after 3 tokens"
    assert len(results[1].token_ids) == 3


def test_context_manager_closes(make):
    with make() as decoder:
        decoder.generate([[1]], SamplingParams(max_new_tokens=1))
    assert decoder.backend.closed
    decoder.close()
    with pytest.raises(RelayError, match="the decoder is closed"):
        decoder.generate([[1]])


def test_unknown_backend(artifact):
    with pytest.raises(BackendError, match="there is no backend 'tpu'; there is onnxruntime"):
        RelayDecoder.load(artifact.path, "tpu")


def test_progress_bar(make, capsys, monkeypatch):
    """At a terminal, for batches that are not streamed; or when asked for."""
    decoder, params = make(), SamplingParams(max_new_tokens=2)
    decoder.generate([[1], [2]], params)
    assert capsys.readouterr().err == ""
    decoder.generate([[1], [2]], params, progress=True)
    assert "2/2" in capsys.readouterr().err
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    decoder.generate([[1], [2]], params)
    assert "2/2" in capsys.readouterr().err
    decoder.generate([[1], [2]], params, stream=lambda event: None)
    decoder.generate([[1]], params)
    decoder.generate([[1], [2]], params, progress=False)
    assert capsys.readouterr().err == ""
