"""Text as it is generated: whole characters only, and nothing that may turn out to be a stop string."""

from __future__ import annotations

from collections.abc import Sequence

from relay_attention.runtime.text import Tokenizer

REPLACEMENT = "\ufffd"


class Detokenizer:
    """Turns tokens into text piece by piece.

    A token may end inside a character (byte-level and byte-fallback tokens do), and may be decoded
    differently after another than alone (a leading space). So the last piece is decoded again with the new
    tokens, and what they add is given out once it no longer ends in U+FFFD. The pieces together are the
    decoded text of all tokens. Bytes that never become UTF-8 show as U+FFFD; how many of those a run of them
    makes, the tokenizer's decoder decides.
    """

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        self._window: list[int] = []  # tokens of the last piece, and those not given out yet
        self._given = 0  # so many of them are given out
        self._shown = ""  # their text

    def push(self, token_id: int) -> str:
        """The text that this token completes; "" while a character is incomplete."""
        self._window.append(token_id)
        text = self._tokenizer.decode(self._window)
        if len(text) <= len(self._shown) or text.endswith(REPLACEMENT):
            return ""
        piece = text[len(self._shown) :]
        self._window = self._window[self._given :]
        self._given = len(self._window)
        self._shown = self._tokenizer.decode(self._window)
        return piece

    def flush(self) -> str:
        """The rest, incomplete characters as U+FFFD; no token follows."""
        piece = self._tokenizer.decode(self._window)[len(self._shown) :]
        self._window, self._given, self._shown = [], 0, ""
        return piece


class StopStrings:
    """Holds text back as long as it may be the beginning of a stop string."""

    def __init__(self, stops: Sequence[str]):
        self._stops = tuple(stops)
        self._held = ""

    def push(self, text: str) -> tuple[str, str | None]:
        """(text that is certain, stop string found): from the stop string on, text is dropped."""
        self._held += text
        found = [(place, stop) for stop in self._stops if (place := self._held.find(stop)) >= 0]
        if found:
            place, stop = min(found, key=lambda item: (item[0], -len(item[1])))
            certain, self._held = self._held[:place], ""
            return certain, stop
        keep = max((_overlap(self._held, stop) for stop in self._stops), default=0)
        certain, self._held = self._held[: len(self._held) - keep], self._held[len(self._held) - keep :]
        return certain, None

    def flush(self) -> str:
        """What was held back; no text follows."""
        held, self._held = self._held, ""
        return held


def _overlap(text: str, stop: str) -> int:
    """Length of the longest beginning of `stop` that `text` ends with."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)
