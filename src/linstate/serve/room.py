"""A disk that is full: what says so, and a little room that is kept so that something can be deleted then."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import sqlite3
from pathlib import Path

from linstate.files import write_atomically

_BYTES = 4 * 2**20


def no_room(error: BaseException) -> bool:
    """Whether an error, or what caused it, says that a disk or a quota of the system is full."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, OSError) and cause.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            return True
        if isinstance(cause, sqlite3.Error) and getattr(cause, "sqlite_errorcode", None) in (
            sqlite3.SQLITE_FULL,
            sqlite3.SQLITE_IOERR_WRITE,
        ):
            return True
        cause = cause.__cause__ or cause.__context__
    return False


class Reserve:
    """A file that takes some room and is given up when there is none: a database needs some to delete, too."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.refill()

    def release(self) -> None:
        """Give the room up."""
        self.path.unlink(missing_ok=True)

    def refill(self) -> None:
        """Take the room again, where there is plenty."""
        if self.path.exists() or shutil.disk_usage(self.path.parent).free < 4 * _BYTES:
            return
        with contextlib.suppress(OSError):
            write_atomically(self.path, os.urandom(_BYTES))  # no file system makes it smaller than it is
