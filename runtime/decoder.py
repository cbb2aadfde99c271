"""The runtime's one entry point: an artifact in an engine, decoding requests that share its prefix."""

from __future__ import annotations

import itertools
import os
import sys
from collections.abc import Callable, Generator, Sequence
from contextlib import closing
from types import TracebackType
from typing import Any

import numpy as np
from tqdm import tqdm

from relay_attention.errors import ArtifactError, BackendError, PromptError, RelayError
from relay_attention.runtime.artifact import Artifact, Manifest
from relay_attention.runtime.backend import Backend, load_backend
from relay_attention.runtime.request import GenerationEvent, GenerationResult, Request
from relay_attention.runtime.sampling import Sampler, SamplingParams
from relay_attention.runtime.scheduler import Scheduler
from relay_attention.runtime.text import Prompt, SystemPrompt, Tokenizer

Stream = Callable[[GenerationEvent], object]


class GenerationInterrupted(KeyboardInterrupt):
    """Ctrl-C during `generate`. `results` holds every prompt's result in order, unfinished ones "aborted"."""

    def __init__(self, results: list[GenerationResult]):
        super().__init__("interrupted")
        self.results = results


class RelayDecoder:
    """Decodes requests that follow one shared prefix.

    Either `generate` / `stream_generate` for a batch, or `add_request` / `abort` / `step` for a service that
    takes requests as they come. Threads: `add_request`, `abort` and `encode` may be called from any thread;
    everything else from one thread at a time, which is the one that steps. Close it, or use it as a context
    manager.
    """

    def __init__(
        self,
        artifact: Artifact,
        backend: Backend,
        *,
        max_batch: int = 32,
        max_context: int | None = None,
        prefill_chunk: int = 256,
    ):
        """Takes a loaded backend; see `load` for the parameters."""
        manifest = artifact.manifest
        max_context = manifest.max_context if max_context is None else max_context
        sizes = {"max_batch": max_batch, "max_context": max_context, "prefill_chunk": prefill_chunk}
        if small := [f"{name} is {value}" for name, value in sizes.items() if value < 1]:
            raise BackendError(f"{', '.join(small)}, at least 1 is needed")
        self.artifact = artifact
        self.max_batch, self.max_context = max_batch, max_context
        self._check_positions(artifact)
        self.tokenizer = Tokenizer.open(artifact.path)
        self._use(SystemPrompt.open(artifact, self.tokenizer))
        self._backend = backend
        self._backend.allocate(max_batch, max_context)
        self._scheduler = Scheduler(backend, max_batch, prefill_chunk)
        self._requests: dict[int, Request] = {}  # in flight, by index
        self._indices = itertools.count()
        self._in_batch = False
        self._closed = False

    @classmethod
    def load(
        cls,
        path: str | os.PathLike[str],
        backend: str = "onnxruntime",
        *,
        max_batch: int = 32,
        threads: int | None = None,
        max_context: int | None = None,
        prefill_chunk: int = 256,
        **options: Any,
    ) -> RelayDecoder:
        """Opens an artifact folder in an engine.

        max_batch: requests that run at the same time, one cache slot each; any number may wait.
        threads: of the engine; None for its own choice.
        max_context: tokens of one request, prompt and answer, prefix excluded; None for the artifact's.
        prefill_chunk: tokens (padding included) of a prefill call while other requests decode: smaller lets
            them wait less, larger gets prompts in sooner.
        options: more of the engine's own.
        Raises: ArtifactError for a folder that is not right, BackendError for an engine that is not, or too
        little memory for the caches.
        """
        artifact = Artifact.open(path)
        loaded = load_backend(backend, artifact, threads=threads, **options)
        try:
            return cls(
                artifact, loaded, max_batch=max_batch, max_context=max_context, prefill_chunk=prefill_chunk
            )
        except BaseException:
            loaded.close()
            raise

    @property
    def manifest(self) -> Manifest:
        """What the artifact holds."""
        return self.artifact.manifest

    @property
    def cache_bytes(self) -> int:
        """Bytes of the requests' caches, all slots together."""
        return self._backend.cache_bytes

    @property
    def prefix_bytes(self) -> int:
        """Bytes of the prefix's keys and values, once for all requests."""
        return self._backend.prefix_bytes

    @property
    def busy(self) -> bool:
        """Whether any request is waiting or running."""
        return self._scheduler.busy

    def encode(self, prompt: Prompt) -> list[int]:
        """A request's own tokens, prefix excluded, checked.

        Raises: PromptError if it is empty, has token ids outside the vocabulary, is longer than max_context,
        or does not follow this artifact's prefix.
        """
        token_ids = self.system_prompt.encode(prompt)
        if not token_ids:
            raise PromptError("the prompt is empty: it has no tokens")
        self._check_ids("the prompt", token_ids)
        if len(token_ids) > self.max_context:
            raise PromptError(
                f"the prompt has {len(token_ids)} tokens, max_context is {self.max_context}: shorten it, "
                "or load the artifact with a larger max_context"
            )
        return token_ids

    def add_request(self, prompt: Prompt, params: SamplingParams | None = None) -> int:
        """Puts a request into the queue and returns its index, by which `step` reports on it.

        Raises: PromptError, and nothing is queued; RelayError while `generate` or `stream_generate` runs.
        """
        if self._in_batch:
            raise RelayError("add_request while generate or stream_generate runs: use one or the other")
        request = self._request(next(self._indices), prompt, params or SamplingParams())
        self._requests[request.index] = request
        self._scheduler.add(request)
        return request.index

    def abort(self, index: int) -> None:
        """Ends a request: the next step frees its slot and gives its event. One that has ended stays so."""
        if request := self._requests.get(index):
            self._scheduler.abort(request)

    def step(self) -> list[GenerationEvent]:
        """Runs the model once for all (one prefill call and one decode call at most); returns what is new."""
        events = self._scheduler.step()
        for event in events:
            if event.result:
                del self._requests[event.index]
        return events

    def generate(
        self,
        prompts: Sequence[Prompt] | str,
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        stream: Stream | None = None,
        progress: bool | None = None,
    ) -> list[GenerationResult]:
        """Decodes a batch of any size and returns the results in the order of the prompts.

        prompts: strings, lists of token ids, or lists of messages; see `SystemPrompt.encode`.
        sampling_params: for all, or one for each.
        stream: called with every `GenerationEvent` as it happens, `index` being the place among the prompts.
        progress: shows a progress bar; None for batches at a terminal that are not streamed.
        Raises: PromptError, with the number of the prompt, before anything runs; GenerationInterrupted (a
            KeyboardInterrupt) on Ctrl-C, with the results there are. A request that the engine fails on ends
            with the finish_reason "error", and the others go on.
        """
        requests = self._prepare(prompts, sampling_params)
        results: dict[int, GenerationResult] = {}
        if progress is None:
            progress = stream is None and len(requests) > 1 and sys.stderr.isatty()
        try:
            with (
                tqdm(total=len(requests), unit="request", disable=not progress) as bar,
                closing(self._events(requests)) as events,
            ):
                for event in events:
                    if event.result:
                        results[event.index] = event.result
                        bar.update()
                    if stream:
                        stream(event)
        except KeyboardInterrupt as interrupt:
            for index, request in requests.items():
                if index not in results:
                    results[index] = request.give_up()
            raise GenerationInterrupted([results[index] for index in sorted(results)]) from interrupt
        return [results[index] for index in sorted(results)]

    def stream_generate(
        self,
        prompts: Sequence[Prompt] | str,
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
    ) -> Generator[GenerationEvent, None, None]:
        """`generate` as iterator of events; prompts are checked at once, leaving the loop ends the rest."""
        return self._events(self._prepare(prompts, sampling_params))

    def set_prefix(self, path: str | os.PathLike[str]) -> None:
        """Replaces the prefix while no request is in flight; for artifacts exported with `--prefix input`.

        path: the artifact folder of the other prefix, same model; only its prefix.bin, relay.json and
            system_prompt.txt are read.
        Raises: ArtifactError if another model computed it or it leaves too few positions; BackendError if the
            artifact's prefix is static; RelayError while requests are in flight.
        """
        if self.busy or self._in_batch:
            raise RelayError("the prefix cannot be replaced while requests are in flight")
        other = Artifact.open(path, prefix_only=True)
        other.prefix.check_model(self.manifest)
        self._check_positions(other)
        system_prompt = SystemPrompt.open(other, self.tokenizer)
        self._backend.set_prefix(other.prefix)
        self._use(system_prompt)

    def close(self) -> None:
        """Frees the model and the caches. Requests in flight are dropped."""
        if not self._closed:
            self._closed = True
            self._scheduler.clear()
            self._requests.clear()
            self._backend.close()

    def __enter__(self) -> RelayDecoder:
        return self

    def __exit__(
        self, kind: type | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _use(self, system_prompt: SystemPrompt) -> None:
        self.system_prompt = system_prompt
        self._prefix_ids = np.asarray(system_prompt.token_ids, np.int32)

    def _check_positions(self, artifact: Artifact) -> None:
        length, positions = artifact.manifest.prefix.length, self.manifest.geometry.max_positions
        if length + self.max_context > positions:
            raise ArtifactError(
                f"{artifact.path}: prefix of {length} tokens + max_context {self.max_context} exceed the "
                f"model's {positions} positions: set max_context to at most {max(positions - length, 0)}"
            )

    def _check_ids(self, what: str, token_ids: Sequence[int]) -> None:
        vocab_size = self.manifest.geometry.vocab_size
        if wrong := [token_id for token_id in token_ids if not 0 <= token_id < vocab_size]:
            raise PromptError(f"{what}: token id {wrong[0]} is not in the vocabulary, 0 to {vocab_size - 1}")

    def _request(self, index: int, prompt: Prompt, params: SamplingParams) -> Request:
        if self._closed:
            raise RelayError("the decoder is closed")
        prompt_ids = np.asarray(self.encode(prompt), np.int32)
        self._check_ids("stop_token_ids", params.stop_token_ids)
        stop_token_ids = (*params.stop_token_ids, *(() if params.ignore_eos else self.manifest.tokens.eos))
        sampler = Sampler(params, stop_token_ids, (self._prefix_ids, prompt_ids))
        return Request(index, prompt_ids, params, self.tokenizer, sampler, self.max_context)

    def _prepare(
        self,
        prompts: Sequence[Prompt] | str,
        sampling_params: SamplingParams | Sequence[SamplingParams] | None,
    ) -> dict[int, Request]:
        prompts = [prompts] if isinstance(prompts, str) else list(prompts)
        if sampling_params is None or isinstance(sampling_params, SamplingParams):
            sampling_params = [sampling_params or SamplingParams()] * len(prompts)
        if len(sampling_params) != len(prompts):
            raise PromptError(f"{len(sampling_params)} sampling parameters for {len(prompts)} prompts")
        requests = {}
        for index, (prompt, params) in enumerate(zip(prompts, sampling_params, strict=True)):
            try:
                requests[index] = self._request(index, prompt, params)
            except PromptError as error:
                raise PromptError(f"request {index}: {error}") from error
        return requests

    def _events(self, requests: dict[int, Request]) -> Generator[GenerationEvent, None, None]:
        if self.busy or self._in_batch:
            raise RelayError("other requests are in flight: a batch needs the decoder for itself")
        self._in_batch, self._requests = True, requests
        try:
            for request in requests.values():
                self._scheduler.add(request)
            while self._scheduler.busy:
                for event in self._scheduler.step():
                    yield event
                    if event.result:
                        del requests[event.index]
        finally:
            self._scheduler.clear()
            self._in_batch, self._requests = False, {}
