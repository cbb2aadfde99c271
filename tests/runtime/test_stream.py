import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as FastTokenizer
from tokenizers import decoders, models

from relay_attention.runtime.stream import REPLACEMENT, Detokenizer, StopStrings
from relay_attention.runtime.text import Tokenizer

TEXT = "hello the stop\n\nné 中文字 🙂🙃 👩‍👩‍👧‍👦 e\u0301 a"


def fallback_tokenizer() -> Tokenizer:
    """SentencePiece style: pieces with ▁, and <0xNN> tokens for what is in no piece."""
    pieces = [
        "<unk>",
        *(f"<0x{byte:02X}>" for byte in range(256)),
        "▁",
        "▁hello",
        "▁the",
        "hell",
        "é",
        "中",
        "a",
    ]
    fast = FastTokenizer(models.BPE(vocab={p: i for i, p in enumerate(pieces)}, merges=[], unk_token="<unk>"))
    fast.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return Tokenizer(fast)


def stream(tokenizer: Tokenizer, token_ids: list[int]) -> list[str]:
    detokenizer = Detokenizer(tokenizer)
    return [*(detokenizer.push(token_id) for token_id in token_ids), detokenizer.flush()]


def test_byte_level(byte_tokenizer):
    tokenizer = Tokenizer(byte_tokenizer)
    token_ids = tokenizer.encode(TEXT)
    pieces = stream(tokenizer, token_ids)
    assert "".join(pieces) == TEXT
    assert REPLACEMENT not in "".join(pieces)
    assert pieces[0] == "hello", "nothing is held back that is complete"
    assert pieces[-1] == ""


def test_single_bytes(byte_tokenizer):
    """Every character split into its bytes, the worst a model can do."""
    tokenizer = Tokenizer(byte_tokenizer)
    alphabet = byte_tokenizer.pre_tokenizer.pre_tokenize_str(TEXT)
    token_ids = [byte_tokenizer.token_to_id(character) for piece, _ in alphabet for character in piece]
    pieces = stream(tokenizer, token_ids)
    assert "".join(pieces) == TEXT
    assert not any(REPLACEMENT in piece for piece in pieces)


def test_byte_fallback():
    tokenizer = fallback_tokenizer()
    ids = tokenizer.backend.token_to_id
    bytes_of = [ids(f"<0x{byte:02X}>") for byte in "文🙂".encode()]
    token_ids = [ids("▁hello"), ids("▁the"), ids("中"), *bytes_of, ids("▁"), ids("é"), ids("▁hello")]
    pieces = stream(tokenizer, token_ids)
    assert pieces[:2] == ["hello", " the"], "only the first space is the tokenizer's own"
    assert "".join(pieces) == tokenizer.decode(token_ids) == "hello the中文🙂 é hello"
    assert not any(REPLACEMENT in piece for piece in pieces)


def test_incomplete_character_at_the_end(byte_tokenizer):
    tokenizer = Tokenizer(byte_tokenizer)
    token_ids = tokenizer.encode("a🙂")
    pieces = stream(tokenizer, token_ids[:-1])
    assert pieces == ["a", "", "", "", REPLACEMENT]


def test_broken_character_in_the_middle(byte_tokenizer):
    """Two of the four bytes, then other text: shown as soon as it is clear that they stay broken."""
    tokenizer = Tokenizer(byte_tokenizer)
    smile = tokenizer.encode("🙂")
    token_ids = [*smile[:2], *tokenizer.encode("b"), *smile]
    assert stream(tokenizer, token_ids) == ["", "", REPLACEMENT + "b", "", "", "", "🙂", ""]


def test_special_tokens_show_no_text(byte_tokenizer):
    tokenizer = Tokenizer(byte_tokenizer)
    end = byte_tokenizer.token_to_id("</s>")
    assert stream(tokenizer, [*tokenizer.encode("a"), end, end, *tokenizer.encode("b")]) == [
        "a",
        "",
        "",
        "b",
        "",
    ]


@settings(max_examples=100, deadline=None)
@given(token_ids=st.lists(st.integers(0, 268), max_size=40))
def test_any_tokens_give_the_decoded_text(token_ids):
    """Random bytes too: the pieces together are what the tokenizer makes of all tokens at once."""
    tokenizer = Tokenizer(any_tokens_tokenizer())
    assert "".join(stream(tokenizer, token_ids)) == tokenizer.decode(token_ids)


_CACHE: list[FastTokenizer] = []


@pytest.fixture(autouse=True)
def _share_tokenizer(byte_tokenizer):
    _CACHE[:] = [byte_tokenizer]


def any_tokens_tokenizer() -> FastTokenizer:
    return _CACHE[0]


def test_stop_over_pieces():
    stops = StopStrings(["stop!"])
    assert stops.push("a st") == ("a ", None)
    assert stops.push("op") == ("", None)
    assert stops.push("s") == ("stop", None)
    assert stops.push("stop") == ("s", None)
    assert stops.push("! more") == ("", "stop!")


def test_stop_first_and_longest():
    assert StopStrings(["b", "ab", "abc"]).push("xabc") == ("x", "abc")
    assert StopStrings(["c", "b"]).push("abc") == ("a", "b")
    assert StopStrings([]).push("abc") == ("abc", None)


def test_stop_held_back_is_given_out_at_the_end():
    stops = StopStrings(["\n\n"])
    assert stops.push("a\n") == ("a", None)
    assert stops.flush() == "\n"


def test_stop_that_overlaps_itself():
    stops = StopStrings(["aab"])
    assert [stops.push(piece) for piece in "aaab"] == [("", None), ("", None), ("a", None), ("", "aab")]


@pytest.mark.parametrize("seed", range(50))
def test_stop_is_found_however_the_text_is_cut(seed):
    generator = random.Random(seed)
    text = "".join(generator.choices("ab", k=30))
    stops = ["".join(generator.choices("ab", k=generator.randint(2, 6))) for _ in range(2)]
    found = [text.find(stop) for stop in stops if stop in text]
    finder, given, stopped = StopStrings(stops), "", None
    rest = text
    while rest and stopped is None:
        cut = generator.randint(1, 4)
        certain, stopped = finder.push(rest[:cut])
        given, rest = given + certain, rest[cut:]
        if stopped is None and not found:
            assert text.startswith(given)
    if stopped is None:
        given += finder.flush()
    # a longer stop string that starts earlier may be cut off by the piece in which a shorter one ends
    first_end = min((text.find(stop) + len(stop) for stop in stops if stop in text), default=None)
    assert (stopped is not None) == (first_end is not None)
    assert text.startswith(given)
    assert given == text if stopped is None else text[len(given) :].startswith(stopped)
