"""Locked files in a folder that only this user can read: how processes of one machine agree who has what.

Input: names. Output: open files; whoever holds a file's lock has what the file stands for. The lock is free again when
the file is closed, or when its process ends in whatever way, so nothing has to be cleaned up. Executor side; a retried
task opens the files again.
"""

import contextlib
import fcntl
import os
import stat
import tempfile
from pathlib import Path
from typing import IO

from miniplm_udf.errors import ScoringError


def private_folder(folder: Path) -> Path:
    """Returns the folder, made where it is missing.

    Args:
        folder: a path whose parent exists.

    Raises:
        ScoringError: another user owns or can read it.
    """
    folder.mkdir(mode=0o700, exist_ok=True)
    status = folder.lstat()
    if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.getuid() or status.st_mode & 0o077:
        raise ScoringError(
            f"{folder}: expected a folder that only this user can read, found mode {status.st_mode:o} of user "
            f"{status.st_uid}; remove it, or set TMPDIR to a folder of your own"
        )
    return folder


def node_folder() -> Path:
    """The folder of this user on this machine.

    Raises:
        ScoringError: another user owns or can read it.
    """
    return private_folder(Path(tempfile.gettempdir()) / f"miniplm-{os.getuid()}")


def locked(path: Path) -> IO[str] | None:
    """The file, opened and locked; None where another process holds the lock.

    Args:
        path: the file; made where it is missing.
    """
    file = path.open("a+")
    with contextlib.suppress(BlockingIOError):
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return file
    file.close()
    return None
