"""Which request runs in which cache slot, and what the next steps of the backend are.

Slots stay dense: decoding requests occupy rows 0..n-1, so that a decode step runs on exactly n rows. A
request that ends is replaced by the last row. Prompts are prefilled in calls of bounded size between decode
steps: as many whole prompts as fit go together, ragged, into the rows after n. A prompt that is longer than a
call goes alone, in chunks, through the last slot, where nothing moves it, and joins the others when it is
complete.
"""

from __future__ import annotations

import threading
from collections import deque

import numpy as np
import numpy.typing as npt

from relay_attention.errors import BackendError
from relay_attention.runtime.backend import Backend, ReadsTop
from relay_attention.runtime.request import GenerationEvent, Request

IDLE_FACTOR = 8  # with no request decoding, nobody waits for a prefill call: it may be so many times larger


class Scheduler:
    """The waiting queue and the slots. `add` and `abort` may be called from any thread, the rest from one."""

    def __init__(self, backend: Backend, max_batch: int, prefill_chunk: int):
        """prefill_chunk: tokens (rows times padded length) of a prefill call while other requests decode."""
        self._backend = backend
        self._max_batch = max_batch
        self._prefill_chunk = prefill_chunk
        self._waiting: deque[Request] = deque()
        self._running: list[Request] = []  # row by row
        self._chunked: Request | None = None  # in the last slot, its prompt incomplete
        self._lock = threading.Lock()  # of the queue and the next flag
        self._any_aborted = False

    @property
    def busy(self) -> bool:
        """Whether any request is waiting or running."""
        return bool(self._waiting or self._running or self._chunked)

    def add(self, request: Request) -> None:
        """Puts a request at the end of the queue."""
        with self._lock:
            self._waiting.append(request)

    def abort(self, request: Request) -> None:
        """Ends a request in the next step, with an event; no effect on one that has ended."""
        with self._lock:
            request.aborted = self._any_aborted = True

    def clear(self) -> None:
        """Forgets every request, whatever state it is in."""
        with self._lock:
            self._waiting.clear()
            self._running, self._chunked = [], None

    def step(self) -> list[GenerationEvent]:
        """Runs at most one prefill call, then one decode call; complete prompts join it at once.

        Where the backend fails in a call, the requests of that call end with "error", and the others go on.
        """
        return [*self._drop_aborted(), *self._prefill(), *self._run(0)]

    def _drop_aborted(self) -> list[GenerationEvent]:
        with self._lock:
            if not self._any_aborted:
                return []
            self._any_aborted = False
            dropped = [request for request in self._waiting if request.aborted]
            for request in dropped:
                self._waiting.remove(request)
        for row in reversed(range(len(self._running))):
            if self._running[row].aborted:
                dropped.append(self._running[row])
                self._release(row)
        if self._chunked and self._chunked.aborted:
            dropped.append(self._chunked)
            self._chunked = None
        return [request.finish("aborted") for request in dropped]

    def _prefill(self) -> list[GenerationEvent]:
        budget = self._prefill_chunk * (1 if self._running else IDLE_FACTOR)
        first_row = len(self._running)
        room = self._waiting and first_row < self._max_batch
        if not self._chunked and room and self._waiting[0].prompt_left > budget:
            self._chunked = self._waiting.popleft()
        if self._chunked:
            return self._prefill_chunked(self._chunked, budget)
        longest = 0
        while self._waiting and len(self._running) < self._max_batch:
            longest = max(longest, self._waiting[0].prompt_left)
            if (len(self._running) - first_row + 1) * longest > budget:
                break
            self._running.append(self._waiting.popleft())
        return self._run(first_row)

    def _prefill_chunked(self, request: Request, budget: int) -> list[GenerationEvent]:
        row, last_row = len(self._running), self._max_batch - 1
        try:
            self._call(last_row, [request], budget)
            if request.prompt_left:
                return []
            chosen = self._choose([request])
        except BackendError as error:
            self._chunked = None
            return [request.finish("error", error=str(error))]
        if row != last_row:
            self._backend.move(last_row, row, request.cached)
        self._chunked = None
        self._running.append(request)
        return self._accept(row, chosen)

    def _run(self, first_row: int) -> list[GenerationEvent]:
        """Advances all requests from a row on: whole prompts, or one token of each that decodes."""
        requests = self._running[first_row:]
        if not requests:
            return []
        try:
            self._call(first_row, requests, max(request.prompt_left for request in requests) or 1)
            chosen = self._choose(requests)
        except BackendError as error:
            del self._running[first_row:]
            return [request.finish("error", error=str(error)) for request in requests]
        return self._accept(first_row, chosen)

    def _call(self, first_row: int, requests: list[Request], limit: int) -> None:
        """One backend step: of each request at most `limit` prompt tokens, or the last generated one."""
        tokens = [request.next_tokens(limit) for request in requests]
        query_lens = np.array([len(row) for row in tokens], np.int32)
        input_ids = np.zeros((len(tokens), query_lens.max()), np.int32)
        for row, row_tokens in enumerate(tokens):
            input_ids[row, : len(row_tokens)] = row_tokens
        context_lens = np.array([request.cached for request in requests], np.int32)
        self._backend.step(first_row, input_ids, context_lens, query_lens)
        for request, query_len in zip(requests, query_lens.tolist(), strict=True):
            request.cached += query_len

    def _choose(self, requests: list[Request]) -> list[int | npt.NDArray[np.float32]]:
        """After a step: of each request its next token, or the logits [vocab] to choose it from.

        The logits are read only if a request's parameters, or equal logits, ask for all of them.
        """
        counts = [request.top_needed for request in requests]
        needed = [count for count in counts if count is not None]
        if not isinstance(self._backend, ReadsTop) or len(needed) < len(counts):
            return list(self._backend.read_logits())
        rows = zip(requests, *self._backend.read_top(max(needed)), strict=True)
        tokens = [request.choose(values, token_ids) for request, values, token_ids in rows]
        unsettled = self._backend.read_logits() if None in tokens else ()
        return [unsettled[row] if token is None else token for row, token in enumerate(tokens)]

    def _accept(self, first_row: int, chosen: list[int | npt.NDArray[np.float32]]) -> list[GenerationEvent]:
        """Lets the requests from a row on go on with what `_choose` gave; frees those that end."""
        events = [
            request.take(choice) if isinstance(choice, int) else request.accept(choice)
            for request, choice in zip(self._running[first_row:], chosen, strict=True)
        ]
        for row in reversed(range(first_row, first_row + len(events))):  # the last first: it needs no move
            if events[row - first_row].result:
                self._release(row)
        return events

    def _release(self, row: int) -> None:
        """Frees a slot and fills it with the last one."""
        last = len(self._running) - 1
        if row != last:
            self._backend.move(last, row, self._running[last].cached)
            self._running[row] = self._running[last]
        self._running.pop()
