"""Files that are written whole or not at all, and folders that one process at a time writes to."""

import fcntl
import os
import platform
from contextlib import contextmanager
from pathlib import Path

from utils.config import UserError

LOCK = ".lock"                    # in a folder that a process has claimed: who it is


@contextmanager
def replacing(path, mode="wb", **options):
    """Open a temporary file beside ``path``, which takes its place at the end, and only then.

    A run killed at any moment leaves the earlier file whole, and no reader sees half a file.  mode, options:
    of ``open``.  Raises UserError when it cannot be written.
    """
    temporary = Path(f"{path}.tmp")
    try:
        with open(temporary, mode, **options) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:
        # torch's zip writer turns a failed write into a RuntimeError that names its source file.
        if not isinstance(error, OSError) and "inline_container" not in str(error):
            raise
        reason = getattr(error, "strerror", None) or "the disk may be full"
        raise UserError(f"{path}: cannot be written ({reason}); free space or use another folder") from error
    finally:
        if temporary.is_file():
            temporary.unlink()


def claim(folder, remedy):
    """Make the folder where it is missing, and have it for this process until it ends, however it ends.

    Raises UserError when it cannot be written to, or when another process has it; ``remedy`` says what to do
    then.  Where the file system knows no locks nobody can be kept out, and that is said.
    """
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT, 0o666)           # for ever: closing it gives up
    except OSError as error:
        raise UserError(f"{folder}: cannot be written to ({error.strerror}); use another folder") from error
    try:
        # Unlike flock's, this lock is not handed on to data-loading processes, which may live on for a while.
        fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError) as error:
        holder = os.pread(lock, 200, 0).decode(errors="replace").strip() or "another process"
        raise UserError(f"{folder}: {holder} writes there; {remedy}") from error
    except OSError as error:
        print(f"{folder}: cannot be locked ({error.strerror}); let nothing else write there")
        return
    os.pwrite(lock, f"{f'process {os.getpid()} on {platform.node()}':80}\n".encode(), 0)


def is_taken(folder):
    """Whether anything is in the folder but what a process leaves that is killed at once, or it is none."""
    folder = Path(folder)
    return folder.exists() and (not folder.is_dir() or any(
        path.name != LOCK and path.suffix != ".tmp" for path in folder.iterdir()))
