from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from relay_attention.errors import ExportError
from relay_attention.export import folder as folder_module
from relay_attention.export.folder import replace_folder

WRITER = """
import sys, time
from pathlib import Path
from relay_attention.export.folder import replace_folder
with replace_folder(Path(sys.argv[1])) as folder:
    (folder / "relay.json").write_text("new")
    print("half way", flush=True)
    time.sleep(60)
"""


def _artifact(path: Path, text: str = "old") -> Path:
    path.mkdir()
    (path / "relay.json").write_text(text)
    return path


def _write(output: Path, error: BaseException) -> None:
    """Writes half an artifact, then fails."""
    with replace_folder(output) as folder:
        (folder / "relay.json").write_text("new")
        raise error


def _left_beside(path: Path) -> list[str]:
    return sorted(entry.name for entry in path.parent.iterdir() if entry != path)


@pytest.mark.parametrize("exchange", [True, False])
def test_the_new_folder_takes_the_place_of_the_old(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, exchange: bool
) -> None:
    if not exchange:  # a file system without an atomic exchange
        monkeypatch.setattr(folder_module, "_exchange", lambda first, second: False)
    output = _artifact(tmp_path / "out")
    (output / "weights.bin").write_text("old")
    with replace_folder(output) as new:
        (new / "relay.json").write_text("new")
        assert (output / "relay.json").read_text() == "old"
    assert [entry.name for entry in output.iterdir()] == ["relay.json"]
    assert (output / "relay.json").read_text() == "new"
    assert _left_beside(output) == []


def test_parents_are_made(tmp_path: Path) -> None:
    output = tmp_path / "a" / "b" / "out"
    with replace_folder(output) as new:
        (new / "relay.json").write_text("new")
    assert (output / "relay.json").read_text() == "new"
    assert output.stat().st_mode & 0o777 == 0o777 & ~_umask()


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


@pytest.mark.parametrize("error", [ValueError("bug"), KeyboardInterrupt(), ExportError("refused")])
def test_an_error_leaves_all_as_it_was(tmp_path: Path, error: BaseException) -> None:
    output = _artifact(tmp_path / "out")
    with pytest.raises(type(error)):
        _write(output, error)
    assert (output / "relay.json").read_text() == "old"
    assert _left_beside(output) == []


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_is_said_so_and_cleared(tmp_path: Path, code: int) -> None:
    output = _artifact(tmp_path / "out")
    with pytest.raises(ExportError, match=r"disk full.*nothing was changed"):
        _write(output, OSError(code, os.strerror(code)))
    assert (output / "relay.json").read_text() == "old"
    assert _left_beside(output) == []


def test_other_errors_of_the_system_name_the_file(tmp_path: Path) -> None:
    with (
        pytest.raises(ExportError, match=r"weights\.bin: Permission denied"),
        replace_folder(tmp_path / "out"),
    ):
        raise PermissionError(errno.EACCES, "Permission denied", "weights.bin")


@pytest.mark.parametrize("old", [True, False])
def test_a_killed_process_leaves_the_old_folder_or_none(tmp_path: Path, old: bool) -> None:
    output = tmp_path / "out"
    if old:
        _artifact(output)
    process = subprocess.Popen([sys.executable, "-c", WRITER, str(output)], stdout=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stdout.readline() == b"half way\n"
    # while it runs, another export to the same place does not take its folder away
    with pytest.raises(ExportError, match="another export"), replace_folder(output):
        pass
    assert len(_left_beside(output)) == 1
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    assert output.exists() == old
    if old:
        assert (output / "relay.json").read_text() == "old"
    with replace_folder(output) as new:
        (new / "relay.json").write_text("newer")
    assert (output / "relay.json").read_text() == "newer"
    assert _left_beside(output) == []


def test_a_folder_with_other_files_is_not_replaced(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(ExportError, match="holds other files"), replace_folder(tmp_path):
        pass
    assert (tmp_path / "thesis.tex").read_text() == "years of work"


def test_an_empty_folder_is_replaced_and_a_file_is_not(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with replace_folder(tmp_path / "empty") as new:
        (new / "relay.json").write_text("new")
    (tmp_path / "file").write_text("x")
    with pytest.raises(ExportError, match="is a file"), replace_folder(tmp_path / "file"):
        pass


def test_a_link_to_a_folder_stays_a_link(tmp_path: Path) -> None:
    _artifact(tmp_path / "real")
    (tmp_path / "link").symlink_to(tmp_path / "real")
    with replace_folder(tmp_path / "link") as new:
        (new / "relay.json").write_text("new")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "real" / "relay.json").read_text() == "new"
