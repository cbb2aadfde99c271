"""Decoding batches of requests that share one prefix: artifacts, engines, slots, sampling, streaming."""

from relay_attention.runtime.artifact import Artifact, Manifest
from relay_attention.runtime.decoder import GenerationInterrupted, RelayDecoder
from relay_attention.runtime.request import GenerationEvent, GenerationResult
from relay_attention.runtime.sampling import SamplingParams, TokenLogprobs

__all__ = [
    "Artifact",
    "GenerationEvent",
    "GenerationInterrupted",
    "GenerationResult",
    "Manifest",
    "RelayDecoder",
    "SamplingParams",
    "TokenLogprobs",
]
