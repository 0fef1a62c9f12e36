"""A lock on a folder: one run, one conversion at a time."""

from __future__ import annotations

import fcntl
import os
import socket
import weakref
from pathlib import Path

from pss_composer.errors import InputError

OWNER_FILE = ".used_by"


class FolderLock:
    """Keeps other processes out of a folder until this object is gone or its process ends, however it ends.

    Args:
        folder: The folder; it is made if it is not there.
        key: The argument that names it, for the message.

    Attributes:
        release: Gives the folder up before that.

    Raises:
        InputError: Another process holds the lock, or the folder cannot be written.
    """

    def __init__(self, folder: Path, *, key: str) -> None:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            file = os.open(folder / OWNER_FILE, os.O_RDWR | os.O_CREAT, 0o666)
        except OSError as error:
            raise InputError(
                f"must be a folder that can be written, got {str(folder)!r}: {error.strerror}", key=key
            ) from error
        self.release = weakref.finalize(self, os.close, file)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            owner = os.read(file, 1000).decode() or "another process"
            self.release()
            raise InputError(f"must be a folder that nobody else writes to, {str(folder)!r} is used by {owner}",
                             key=key) from None
        except OSError:  # a file system without locks, such as some NFS
            return
        os.truncate(file, 0)
        os.write(file, f"process {os.getpid()} on {socket.gethostname()}".encode())
