"""What is wrong with a journal that cannot be read or written, and what to do."""

import os
import sqlite3
from pathlib import Path

from sortd import errors

_RESTORE = (
    "restore it, or move it aside with its -wal and -shm; all images stay in their folders, and history, holds and "
    "undo start empty"
)
_DISK = "check that its disk is mounted and works"
_WRITE = "give sortd write permission for it and its folder, and mount its disk writable"
_ADVICE = {
    sqlite3.SQLITE_FULL: "free space on its disk",
    sqlite3.SQLITE_READONLY: _WRITE,
    sqlite3.SQLITE_PERM: _WRITE,
    sqlite3.SQLITE_CANTOPEN: "check its folder and its disk",
    sqlite3.SQLITE_IOERR: _DISK,
    sqlite3.SQLITE_NOLFS: _DISK,
    sqlite3.SQLITE_PROTOCOL: _DISK,
    sqlite3.SQLITE_NOMEM: "free memory",
}
"""By primary result code (https://www.sqlite.org/rescode.html); any other code means damage."""


def problem_and_advice(error: Exception, path: Path) -> tuple[str, str]:
    """Return what is wrong with the journal, and what to do."""
    if isinstance(error, OSError):
        return _refused(error)
    number = getattr(error, "sqlite_errorcode", 0)
    if number == sqlite3.SQLITE_READONLY_DBMOVED:
        return "the journal was removed or replaced while it was open", "do not change it while sortd runs"
    if number & 0xFF in {sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED}:
        return "another program has locked the journal", f"end that program (`fuser -v {path}` shows it)"
    if number & 0xFF == sqlite3.SQLITE_CANTOPEN and (refusal := _refusal_to_open(path)) is not None:
        return _refused(refusal)
    if number & 0xFF in _ADVICE:
        return f"the journal cannot be used: {error}", _ADVICE[number & 0xFF]
    return f"the journal is damaged ({error})", _RESTORE


def _refused(error: OSError) -> tuple[str, str]:
    said = error.strerror or error
    return f"the journal cannot be opened: {said}", errors.advice_for_write(error) or "check its disk"


def _refusal_to_open(path: Path) -> OSError | None:
    """Return the system's error if the journal, or a file that SQLite opens beside it, cannot be opened."""
    opened: list[int] = []
    try:
        opened.append(os.open(path, os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC))
        opened.extend(os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC) for _ in range(2))
    except OSError as error:
        return error
    finally:
        for descriptor in opened:
            os.close(descriptor)
    return None
