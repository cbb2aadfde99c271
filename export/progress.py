"""Progress of steps that cannot say how far they are: a line with the time they have taken so far."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

from tqdm import tqdm

INTERVAL = 1.0  # seconds between two looks at the clock


@contextmanager
def stage(name: str, progress: bool) -> Iterator[None]:
    """Shows `name: elapsed` on stderr for as long as the block runs, and leaves the line there.

    progress: False shows nothing; so does a stderr that is no terminal, as for the bars. The stream is taken
    when the block begins: what the block does to sys.stderr matters not.
    """
    with tqdm(
        desc=name, bar_format="{desc}: {elapsed}", disable=None if progress else True, leave=True
    ) as bar:
        if bar.disable:
            yield
            return
        ended = threading.Event()

        def beat() -> None:
            while not ended.wait(INTERVAL):
                bar.refresh()

        thread = threading.Thread(target=beat, daemon=True)
        thread.start()
        try:
            yield
        finally:
            ended.set()
            thread.join()
