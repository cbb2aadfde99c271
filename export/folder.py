"""Folders that appear whole or not at all."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import glob
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from relay_attention.errors import ExportError
from relay_attention.runtime.artifact import MANIFEST_NAME

_AT_FDCWD = -100
_RENAME_EXCHANGE = 2
_DISK_FULL = {errno.ENOSPC, errno.EDQUOT}


@contextmanager
def replace_folder(output: Path) -> Iterator[Path]:
    """Yields an empty folder beside `output` that takes its place when the block ends without an error.

    Until then `output` stays as it is; a process that is killed leaves it so, and what it left beside is
    cleared by the next export to the same place.
    Raises: ExportError if output is a file or a folder that is no artifact, if another export is writing to
    it, or
        if the disk is full.
    """
    output = output.resolve()
    if output.exists() and not output.is_dir():
        raise ExportError(f"{output}: is a file; an artifact is a folder")
    if output.is_dir() and any(output.iterdir()) and not (output / MANIFEST_NAME).is_file():
        raise ExportError(
            f"{output}: holds other files and no artifact; it is not replaced: give another folder"
        )
    lock = -1
    temporary: Path | None = None
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        _clear_abandoned(output)
        temporary = Path(tempfile.mkdtemp(prefix=_prefix(output), dir=output.parent))
        lock = os.open(temporary, os.O_RDONLY)
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield temporary
        _sync(temporary)
        temporary.chmod(0o777 & ~_umask())
        _swap(temporary, output)
    except OSError as error:
        if error.errno in _DISK_FULL:
            free = shutil.disk_usage(output.parent).free
            raise ExportError(
                f"{output.parent}: disk full while writing the artifact ({free / 1e6:.0f} MB are free); "
                "nothing was changed"
            ) from error
        raise ExportError(f"{error.filename or output}: {error.strerror or error}") from error
    finally:
        if temporary is not None:
            # after the swap this is the old folder
            shutil.rmtree(temporary, ignore_errors=True)
        if lock >= 0:
            os.close(lock)


def _prefix(output: Path) -> str:
    return f".{output.name}.relay-export-"


def _clear_abandoned(output: Path) -> None:
    """Removes what killed exports to the same place left: folders whose lock nobody holds.

    Raises: ExportError if one is held: another export is running.
    """
    for folder in output.parent.glob(f"{glob.escape(_prefix(output))}*"):
        try:
            descriptor = os.open(folder, os.O_RDONLY)
        except FileNotFoundError:  # it has just ended
            continue
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(folder, ignore_errors=True)
        except BlockingIOError:
            raise ExportError(f"{output}: another export is writing to it (in {folder.name})") from None
        finally:
            os.close(descriptor)


def _sync(folder: Path) -> None:
    for path in (*folder.iterdir(), folder):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _swap(new: Path, output: Path) -> None:
    """Puts `new` at `output`; an old folder ends up at the place of `new`."""
    if not output.exists():
        new.rename(output)
    elif not _exchange(new, output):
        # no atomic exchange on this system: for an instant there is no folder at all
        old = new.with_name(f"{new.name}.old")
        output.rename(old)
        new.rename(output)
        old.rename(new)
    with suppress(OSError):
        descriptor = os.open(output.parent, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _exchange(first: Path, second: Path) -> bool:
    """Exchanges two folders in one step; False where the system or its file system cannot."""
    try:
        renameat2 = ctypes.CDLL(None, use_errno=True).renameat2
    except AttributeError:
        return False
    paths = (os.fsencode(first), os.fsencode(second))
    return bool(renameat2(_AT_FDCWD, paths[0], _AT_FDCWD, paths[1], _RENAME_EXCHANGE) == 0)
