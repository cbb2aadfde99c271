from __future__ import annotations

import fcntl
import os
import pty
import struct
import subprocess
import sys
import termios
from collections.abc import Callable
from pathlib import Path

import pytest

_STAGE = """
import contextlib, io, time
from relay_attention.export.progress import stage
with stage("trace", {progress}), contextlib.redirect_stderr(io.StringIO()):
    time.sleep(2.5)
"""


def _on_a_terminal(command: list[str]) -> str:
    """What a command shows on a terminal of 80 columns as its stderr."""
    mine, its = pty.openpty()
    fcntl.ioctl(its, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
    with subprocess.Popen(command, stderr=its, stdout=subprocess.DEVNULL) as process:
        os.close(its)
        shown = b""
        while True:
            try:
                part = os.read(mine, 4096)
            except OSError:  # how Linux says that the other end is closed
                break
            if not part:
                break
            shown += part
    os.close(mine)
    assert process.returncode == 0, shown
    return shown.decode()


def _piped(command: list[str]) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stderr


@pytest.mark.parametrize(
    ("progress", "run", "beats"),
    [(True, _on_a_terminal, True), (False, _on_a_terminal, False), (True, _piped, False)],
)
def test_time_passes_on_a_terminal_only(progress: bool, run: Callable[[list[str]], str], beats: bool) -> None:
    """Though the block redirects stderr, as torch's exporter is silenced."""
    shown = run([sys.executable, "-c", _STAGE.format(progress=progress)])
    assert ("trace: 00:01" in shown and "trace: 00:02" in shown) if beats else shown == ""


def test_every_step_of_an_export_is_shown(llama: Path, tmp_path: Path) -> None:
    (tmp_path / "prompt.txt").write_text("Be kind.")
    command = [sys.executable, "-m", "relay_attention.cli", "export", str(llama), "-o", str(tmp_path / "out")]
    shown = _on_a_terminal([*command, "--system-prompt", str(tmp_path / "prompt.txt"), "--threads", "1"])
    places = [
        shown.find(f"\r{step}")
        for step in ("run: 0", "run with attention as described: 0", "trace: 0", "rewrite: 0", "weights:",
                     "hashes:", "check: 0", "prefix:")
    ]  # fmt: skip
    assert -1 not in places, shown
    assert places == sorted(places)
