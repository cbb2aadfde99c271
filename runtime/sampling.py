"""Choosing the next token of one request from its row of logits."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import numpy.typing as npt

from relay_attention.errors import PromptError

Floats = npt.NDArray[np.float32]
TIES = 8  # logits asked for beyond those needed: equal ones are common in half precision


@dataclass(frozen=True)
class SamplingParams:
    """How one request is decoded. The default is greedy.

    max_new_tokens: at most so many tokens are generated; fewer where the request's cache is full before.
    min_new_tokens: no stop token is chosen and no stop string looked for before so many.
    temperature: 0 is greedy (the lowest id among equal logits); others divide the logits.
    top_k: only the k likeliest tokens; 0 keeps all. Tokens that tie with the k-th stay.
    top_p: only the fewest likeliest tokens whose probabilities reach p.
    min_p: only tokens at least min_p times as probable as the likeliest.
    repetition_penalty: logits of all tokens seen (prefix, prompt, generated) are divided by it where positive
    and multiplied where negative, as transformers does.
    seed: of this request's own random numbers; None draws one. The same seed gives the same tokens whatever
    else is in the batch, as far as the logits are the same: an engine's matrix products may differ in the
    last bits with the number of rows, which moves a draw only if it falls within those bits of a boundary.
    stop: strings that end the request; the text is cut before them. They may span tokens.
    stop_token_ids: tokens that end the request besides the model's own; left out of the result.
    ignore_eos: the model's end tokens are tokens like others.
    logprobs: None for none, n >= 0 for the log-probability of each chosen token and of the n likeliest, by
    the model's own distribution (before penalty, temperature and filters).
    Raises: PromptError naming the field that makes no sense.
    """

    max_new_tokens: int = 256
    min_new_tokens: int = 0
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int | None = None
    stop: Sequence[str] = ()
    stop_token_ids: Sequence[int] = ()
    ignore_eos: bool = False
    logprobs: int | None = None

    def __post_init__(self) -> None:
        object.__setattr__(
            self, "stop", (self.stop,) if isinstance(self.stop, str) else self._items("stop", str)
        )
        object.__setattr__(self, "stop_token_ids", self._items("stop_token_ids", int))
        self._check_number("max_new_tokens", int, 1)
        self._check_number("min_new_tokens", int, 0)
        self._check_number("temperature", float, 0.0)
        self._check_number("top_k", int, 0)
        self._check_number("top_p", float, 0.0, 1.0)
        self._check_number("min_p", float, 0.0, 1.0)
        self._check_number("repetition_penalty", float, 0.0)
        if self.seed is not None:
            self._check_number("seed", int, 0)
        if self.logprobs is not None:
            self._check_number("logprobs", int, 0)
        if self.top_p == 0 or self.repetition_penalty == 0:
            raise PromptError("top_p and repetition_penalty must be above 0")
        if self.min_new_tokens > self.max_new_tokens:
            raise PromptError(
                f"min_new_tokens {self.min_new_tokens} is above max_new_tokens {self.max_new_tokens}"
            )
        if not isinstance(self.ignore_eos, bool):
            raise PromptError(f"ignore_eos is {self.ignore_eos!r}, not true or false")
        if "" in self.stop:
            raise PromptError("stop holds an empty string")

    @classmethod
    def from_mapping(cls, mapping: dict[str, Any], base: SamplingParams | None = None) -> SamplingParams:
        """`base` with some fields replaced, as a JSON object gives them."""
        known = {field.name for field in fields(cls)}
        if unknown := sorted(set(mapping) - known):
            raise PromptError(
                f"{', '.join(unknown)}: unknown; sampling parameters are {', '.join(sorted(known))}"
            )
        return cls(**{name: getattr(base or cls(), name) for name in known} | mapping)

    def _items(self, name: str, kind: type) -> tuple[Any, ...]:
        value = getattr(self, name)
        if not isinstance(value, Sequence) or not all(type(item) is kind for item in value):
            raise PromptError(f"{name} is {value!r:.60}, not a list of {kind.__name__}")
        return tuple(value)

    def _check_number(self, name: str, kind: type, least: float, most: float = math.inf) -> None:
        value = getattr(self, name)
        if isinstance(value, bool) or not isinstance(
            value, (int, np.integer) if kind is int else (int, float)
        ):
            raise PromptError(f"{name} is {value!r:.60}, not {'an integer' if kind is int else 'a number'}")
        if not least <= value <= most or not math.isfinite(value):
            bounds = f"at least {least}" if most == math.inf else f"from {least} to {most}"
            raise PromptError(f"{name} is {value}, must be {bounds}")


@dataclass(frozen=True)
class TokenLogprobs:
    """Natural log-probability of one generated token, and (token id, log-probability) of the likeliest."""

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


class Sampler:
    """One request's choice of tokens: its parameters, its random numbers, and the tokens it has seen.

    One random number is drawn a token, so the sequence of draws depends on the seed alone; it is looked up in
    the cumulated probabilities in the order of token ids, so that two nearly equal tokens never trade places.
    """

    def __init__(
        self, params: SamplingParams, stop_token_ids: Sequence[int], seen: Sequence[npt.NDArray[np.int32]]
    ):
        """seen: arrays of the tokens before the first generated one, for the repetition penalty."""
        self.params = params
        self._stop_token_ids = frozenset(stop_token_ids)
        self._generator = np.random.default_rng(params.seed) if params.temperature > 0 else None
        self._before = seen
        self._seen: npt.NDArray[np.int32] | None = None

    def is_stop(self, token_id: int) -> bool:
        """Whether this token ends the request."""
        return token_id in self._stop_token_ids

    def sample(self, logits: Floats, generated: int) -> int:
        """Chooses a token from logits [vocab], which stay as they are; `generated` tokens came before it.

        Raises: FloatingPointError if the logits are NaN, or infinite at the top.
        """
        params = self.params
        if not np.isfinite(logits[logits.argmax()]):  # argmax finds a NaN if there is one
            raise FloatingPointError("the model's logits are not finite")
        if params.repetition_penalty != 1.0:
            logits = self._penalize(logits)
        if generated < params.min_new_tokens and self._stop_token_ids:
            logits = logits.copy()
            logits[list(self._stop_token_ids)] = -np.inf
        token_id = int(logits.argmax()) if self._generator is None else self._draw(logits, self._generator)
        if self._seen is not None:
            self._seen = np.append(self._seen, np.int32(token_id))
        return token_id

    def top_needed(self, generated: int) -> int | None:
        """How many of the largest logits `sample_top` is to be given; None if the choice takes them all."""
        params = self.params
        if params.repetition_penalty != 1.0 or params.logprobs is not None:
            return None
        if generated < params.min_new_tokens and self._stop_token_ids:
            return None
        if self._generator is None:
            return 1 + TIES
        return params.top_k + TIES if params.top_k else None

    def sample_top(self, values: Floats, token_ids: npt.NDArray[np.int64]) -> int | None:
        """The token that `sample` would choose, from the largest logits only, at least `top_needed` of them.

        values [n], descending; token_ids [n]. None, and no random number is drawn, where these do not settle
        it: not finite, or so many equal logits at the end that others may be missing.
        """
        wanted = self.params.top_k if self._generator else 1
        if not np.isfinite(values).all() or len(values) <= wanted:
            return None
        scaled = self._scale(values, values[0]) if self._generator else values
        if not scaled[-1] < scaled[wanted - 1]:
            return None
        kept = np.flatnonzero(scaled >= scaled[wanted - 1])
        kept = kept[np.argsort(token_ids[kept])]
        if self._generator is None:
            return int(token_ids[kept[0]])
        return self._draw_from(token_ids[kept], scaled[kept], self._generator)

    def logprobs(self, logits: Floats, token_id: int) -> TokenLogprobs | None:
        """Log-probabilities of the chosen token and the likeliest by logits [vocab], if asked for."""
        count = self.params.logprobs
        if count is None:
            return None
        shifted = logits - logits.max()
        values = shifted - np.log(np.exp(shifted).sum(dtype=np.float64))
        count = min(count, len(values))
        likeliest = np.argpartition(-values, count - 1)[:count] if count else np.zeros(0, np.int64)
        likeliest = likeliest[np.lexsort((likeliest, -values[likeliest]))]
        top = tuple((int(index), float(values[index])) for index in likeliest)
        return TokenLogprobs(token_id, float(values[token_id]), top)

    def _penalize(self, logits: Floats) -> Floats:
        if self._seen is None:  # made here, as a waiting request needs none
            self._seen = np.unique(np.concatenate(self._before))
        penalty = np.float32(self.params.repetition_penalty)
        seen = logits[self._seen]
        logits = logits.copy()
        logits[self._seen] = np.where(seen < 0, seen * penalty, seen / penalty)
        return logits

    def _draw(self, logits: Floats, generator: np.random.Generator) -> int:
        scaled, top_k = self._scale(logits, logits.max()), self.params.top_k
        if not 0 < top_k < len(scaled):
            return self._draw_from(np.arange(len(scaled)), scaled, generator)
        candidates = np.flatnonzero(scaled >= np.partition(scaled, -top_k)[-top_k])
        return self._draw_from(candidates, scaled[candidates], generator)

    def _scale(self, logits: Floats, maximum: np.float32) -> Floats:
        # the maximum goes first: logits / temperature overflows where the temperature is tiny
        scaled: Floats = (logits - maximum) / np.float32(max(self.params.temperature, 1e-20))
        return scaled

    def _draw_from(
        self, candidates: npt.NDArray[np.int64], scaled: Floats, generator: np.random.Generator
    ) -> int:
        """Draws one of the candidates, in the order of their ids, after top_p and min_p."""
        params = self.params
        weights = np.exp(scaled).astype(np.float64)
        weights /= weights.sum()
        if params.top_p < 1:
            kept = _nucleus(weights, params.top_p)
            candidates, weights = candidates[kept], weights[kept]
        if params.min_p > 0:
            kept = weights >= params.min_p * weights.max()
            candidates, weights = candidates[kept], weights[kept]
        bounds = np.cumsum(weights)
        place = np.searchsorted(bounds, generator.random() * bounds[-1], side="right")
        return int(candidates[min(int(place), len(candidates) - 1)])


def _nucleus(weights: npt.NDArray[np.float64], top_p: float) -> npt.NDArray[np.int64]:
    """Indices, ascending, of the fewest largest weights whose sum reaches top_p; weights [n] sum to 1."""
    count = 256  # sorting a whole vocabulary takes longer than a small model's step
    while True:
        least = np.partition(weights, -count)[-count] if count < len(weights) else 0
        index = np.flatnonzero(weights >= least)
        if count >= len(weights) or weights[index].sum() >= top_p:
            break
        count *= 8
    order = index[np.argsort(-weights[index], kind="stable")]
    before = np.cumsum(weights[order]) - weights[order]
    return np.sort(order[before < top_p])
