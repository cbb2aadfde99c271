"""Whether a decoding graph gives the same logits when the same tokens come in other pieces.

A model that keeps a state which the rewrite does not know of (a convolution, a recurrence, positions counted
from the start of each call) would decode nonsense. This is found out before an artifact exists.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import onnxruntime

from relay_attention.errors import ExportError
from relay_attention.export.prefix import bind_empty_prefix, run_bound
from relay_attention.runtime.artifact import Manifest

TOKENS = 6
# norm of the difference relative to that of the logits. Rounding gives 1e-6 in float32 and up to a few
# percent where activations are quantised to int8; a state that is lost gives tens of percent.
TOLERANCE = 0.1


def check_pieces(session: onnxruntime.InferenceSession, manifest: Manifest) -> None:
    """Runs six tokens at once, and as two rows cut in different places, with padding.

    Raises: ExportError if the logits after the last token differ.
    """
    # adjacent tokens differ, so that their order matters
    tokens = (np.arange(TOKENS, dtype=np.int32) * 7 + 3) % manifest.geometry.vocab_size
    if manifest.geometry.max_positions < TOKENS:
        return
    whole = _Rows(session, manifest, 1).step([tokens])[0]
    pieces = _Rows(session, manifest, 2)
    pieces.step([tokens[:4], tokens[:3]])
    for logits in pieces.step([tokens[4:], tokens[3:]]):
        off = float(np.linalg.norm(logits - whole) / max(np.linalg.norm(whole), 1e-30))
        if off > TOLERANCE:  # NaN in the weights is for the prefix to find
            raise ExportError(
                f"the rewritten graph gives other logits when the same tokens come in two pieces (off by "
                f"{off:.0%}): "
                "the model keeps a state, or counts positions, in a way that the rewrite does not know"
            )


class _Rows:
    """Some rows of a decoding graph with caches of their own."""

    def __init__(self, session: onnxruntime.InferenceSession, manifest: Manifest, rows: int):
        self.session, self.manifest = session, manifest
        self.context = np.zeros(rows, np.int32)
        self.binding = session.io_binding()
        io, self.caches = manifest.io, []
        for layer, (heads, head_dim) in enumerate(manifest.geometry.layers):
            for past, present in ((io.past_key, io.present_key), (io.past_value, io.present_value)):
                cache = np.zeros((rows, heads, TOKENS, head_dim), manifest.dtype)
                place = ("cpu", 0, cache.dtype, list(cache.shape), cache.ctypes.data)
                self.binding.bind_input(past.format(layer=layer), *place)
                self.binding.bind_output(present.format(layer=layer), *place)
                self.caches.append(cache)
        bind_empty_prefix(self.binding, manifest)

    def step(self, parts: list[npt.NDArray[np.int32]]) -> list[npt.NDArray[np.float32]]:
        """Appends tokens to every row; the logits [vocab] after the last of each."""
        io = self.manifest.io
        counts = np.array([len(part) for part in parts], np.int32)
        input_ids = np.zeros((len(parts), counts.max()), np.int32)
        for row, part in enumerate(parts):
            input_ids[row, : len(part)] = part
        self.binding.bind_cpu_input(io.input_ids, input_ids)
        self.binding.bind_cpu_input(io.context_lens, self.context)
        self.binding.bind_cpu_input(io.query_lens, counts)
        self.binding.bind_output(io.logits, "cpu")
        run_bound(self.session, self.binding)
        self.context = self.context + counts
        logits = self.binding.get_outputs()[-1].numpy()
        if self.manifest.logits == "all":
            return [logits[row, count - 1] for row, count in enumerate(counts)]
        return list(logits)
