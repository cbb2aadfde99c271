"""One request: what was asked, what has been generated so far, and why it ended."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from relay_attention.runtime.sampling import Sampler, SamplingParams, TokenLogprobs
from relay_attention.runtime.stream import Detokenizer, StopStrings
from relay_attention.runtime.text import Tokenizer


@dataclass(frozen=True)
class GenerationResult:
    """What one request gave.

    text: the generated text, cut before a stop string; special tokens are left out of it.
    token_ids: the generated tokens without the stop token; those of a stop string stay as they were.
    finish_reason: "stop" (see `stop`), "length" (max_new_tokens, or the request's cache is full), "aborted"
        (by the caller or Ctrl-C: text and tokens are what there was), or "error" (see `error`).
    stop: the token id or the string that ended it; None for the other reasons.
    logprobs: one entry for each of token_ids, if the parameters asked for them.
    prompt_tokens: tokens of the request's own prompt, without the prefix.
    """

    text: str
    token_ids: list[int]
    finish_reason: str
    stop: int | str | None = None
    logprobs: list[TokenLogprobs] | None = None
    prompt_tokens: int = 0
    error: str | None = None


@dataclass(frozen=True)
class GenerationEvent:
    """News of one request, in the order in which they happened.

    index: the request's number: its place among the prompts, or what `add_request` returned.
    text: what the text has grown by; all of a request's together are the result's text.
    token_ids: tokens generated since the last event; the text may lag behind them, never lead.
    result: the whole result in the request's last event, None before.
    """

    index: int
    text: str
    token_ids: tuple[int, ...]
    result: GenerationResult | None = None

    @property
    def finish_reason(self) -> str | None:
        """Why the request ended; None while it runs."""
        return self.result.finish_reason if self.result else None


class Request:
    """A request in flight: prompt tokens on their way into a cache slot, then tokens on their way out."""

    def __init__(
        self,
        index: int,
        prompt_ids: npt.NDArray[np.int32],
        params: SamplingParams,
        tokenizer: Tokenizer,
        sampler: Sampler,
        capacity: int,
    ):
        """capacity: tokens that its cache slot holds; the last generated token is never cached."""
        self.index = index
        self.prompt_ids = prompt_ids
        self.params = params
        self.cached = 0  # tokens in its cache slot
        self.aborted = False
        self.result: GenerationResult | None = None
        self.token_ids: list[int] = []
        self._limit = min(params.max_new_tokens, capacity - len(prompt_ids) + 1)
        self._sampler = sampler
        self._detokenizer = Detokenizer(tokenizer)
        self._stop_strings = StopStrings(params.stop)
        self._text: list[str] = []
        self._logprobs: list[TokenLogprobs] = []

    @property
    def prompt_left(self) -> int:
        """Prompt tokens that are not in the cache yet."""
        return max(len(self.prompt_ids) - self.cached, 0)

    def next_tokens(self, limit: int) -> npt.NDArray[np.int32]:
        """What goes into the cache next: at most `limit` tokens of the prompt, or the last generated one."""
        if self.prompt_left:
            return self.prompt_ids[self.cached : self.cached + limit]
        return np.array(self.token_ids[-1:], np.int32)

    @property
    def top_needed(self) -> int | None:
        """See `Sampler.top_needed`."""
        return self._sampler.top_needed(len(self.token_ids))

    def choose(self, values: npt.NDArray[np.float32], token_ids: npt.NDArray[np.int64]) -> int | None:
        """The next token, for `take`, from the largest logits; None if it takes them all (`accept`)."""
        return self._sampler.sample_top(values, token_ids)

    def accept(self, logits: npt.NDArray[np.float32]) -> GenerationEvent:
        """Chooses the next token from its logits [vocab]; an event with a `result` ends the request."""
        try:
            token_id = self._sampler.sample(logits, len(self.token_ids))
        except FloatingPointError as error:
            return self.finish("error", error=f"{error} after {len(self.token_ids)} tokens")
        return self.take(token_id, self._sampler.logprobs(logits, token_id))

    def take(self, token_id: int, logprobs: TokenLogprobs | None = None) -> GenerationEvent:
        """Goes on with a token that has been chosen; an event with a `result` ends the request."""
        if self._sampler.is_stop(token_id):
            return self.finish("stop", stop=token_id)
        if logprobs is not None:
            self._logprobs.append(logprobs)
        self.token_ids.append(token_id)
        text, stop = self._detokenizer.push(token_id), None
        if len(self.token_ids) >= self.params.min_new_tokens:
            text, stop = self._stop_strings.push(text)
        self._text.append(text)
        if stop is not None:
            return self._end("stop", text, (token_id,), stop=stop)
        if len(self.token_ids) >= self._limit:
            return self.finish("length", text, (token_id,))
        return GenerationEvent(self.index, text, (token_id,))

    def finish(
        self,
        reason: str,
        text: str = "",
        token_ids: tuple[int, ...] = (),
        *,
        stop: int | None = None,
        error: str | None = None,
    ) -> GenerationEvent:
        """Ends the request and gives out the text held back; `text` and `token_ids` are the event's own."""
        rest, found = self._stop_strings.push(self._detokenizer.flush())
        rest += self._stop_strings.flush()
        self._text.append(rest)
        if found is not None:  # completed by what was held back
            return self._end("stop", text + rest, token_ids, stop=found)
        return self._end(reason, text + rest, token_ids, stop=stop, error=error)

    def give_up(self) -> GenerationResult:
        """The result as it is, "aborted" unless the request has ended."""
        if self.result is None:
            self.finish("aborted")
        assert self.result is not None
        return self.result

    def _end(
        self,
        reason: str,
        text: str,
        token_ids: tuple[int, ...],
        *,
        stop: int | str | None = None,
        error: str | None = None,
    ) -> GenerationEvent:
        self.result = GenerationResult(
            text="".join(self._text),
            token_ids=self.token_ids,
            finish_reason=reason,
            stop=stop,
            logprobs=self._logprobs if self.params.logprobs is not None else None,
            prompt_tokens=len(self.prompt_ids),
            error=error,
        )
        return GenerationEvent(self.index, text, token_ids, self.result)
