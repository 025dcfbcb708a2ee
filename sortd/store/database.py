"""The journal's file: its tables, opened durably for the one that writes or read-only for the others."""

import os
import sqlite3
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path

from sortd import errors
from sortd.errors import JournalError
from sortd.files import sync_folder_at
from sortd.store.records import MoveProgress, Role

APPLICATION = 0x736F7274  # "sort", in the header of the file
VERSION = 1

BUSY_SECONDS = 5.0
"""How long a commit waits for the lock of another connection: a copy's own commit waits for a slow disk, too."""

OPENING_SECONDS = 0.5  # how long opening waits for such a lock: the daemon opens in its loop, and tries again soon

SCHEMA = """
CREATE TABLE moves (
    id INTEGER PRIMARY KEY,
    token TEXT NOT NULL UNIQUE,
    run TEXT NOT NULL,
    outcome TEXT NOT NULL,
    progress TEXT NOT NULL,
    source BLOB NOT NULL,
    destination BLOB NOT NULL,
    label BLOB,
    score REAL,
    margin REAL,
    second_label BLOB,
    mode TEXT,
    reason TEXT NOT NULL,
    generation INTEGER NOT NULL,
    encoder_id TEXT NOT NULL,
    content TEXT NOT NULL,
    intended_at REAL NOT NULL,
    ended_at REAL,
    lost TEXT NOT NULL DEFAULT '',
    message TEXT NOT NULL DEFAULT '',
    undoes INTEGER,
    undone_by INTEGER
) STRICT;
CREATE INDEX moves_by_progress ON moves (progress) WHERE progress NOT IN ('done');
CREATE INDEX moves_by_time ON moves (ended_at);
CREATE INDEX moves_by_content ON moves (content) WHERE content != '';
CREATE INDEX moves_by_label ON moves (label, outcome);
CREATE INDEX moves_by_outcome ON moves (progress, outcome);
CREATE TABLE members (
    move INTEGER NOT NULL REFERENCES moves (id) ON DELETE CASCADE,
    position INTEGER NOT NULL,
    role TEXT NOT NULL,
    name BLOB NOT NULL,
    wanted BLOB NOT NULL,
    content TEXT NOT NULL,
    body BLOB NOT NULL,
    copy_inode INTEGER NOT NULL,
    final BLOB NOT NULL,
    device INTEGER NOT NULL, inode INTEGER NOT NULL, size INTEGER NOT NULL, mtime_ns INTEGER NOT NULL,
    moved_device INTEGER, moved_inode INTEGER, moved_size INTEGER, moved_mtime_ns INTEGER,
    PRIMARY KEY (move, position)
) STRICT, WITHOUT ROWID;
CREATE INDEX members_by_inode ON members (moved_inode, position);
CREATE TABLE holds (
    path BLOB PRIMARY KEY,
    device INTEGER NOT NULL, inode INTEGER NOT NULL, size INTEGER NOT NULL, mtime_ns INTEGER NOT NULL,
    since REAL NOT NULL,
    reason TEXT NOT NULL
) STRICT;
CREATE TABLE corrections (
    move INTEGER PRIMARY KEY REFERENCES moves (id) ON DELETE CASCADE,
    label BLOB NOT NULL,
    corrected BLOB NOT NULL,
    path BLOB NOT NULL,
    content TEXT NOT NULL,
    at REAL NOT NULL
) STRICT;
CREATE TABLE facts (key TEXT PRIMARY KEY, value TEXT NOT NULL) STRICT;
"""

LATER_INDICES = (
    "CREATE INDEX IF NOT EXISTS members_by_name ON members (name) WHERE position = 0",
    "CREATE INDEX IF NOT EXISTS members_by_final ON members (final) WHERE position = 0",
    "CREATE INDEX IF NOT EXISTS followed_by_reason ON moves (reason) WHERE outcome = 'followed'",
)
"""Indices that the first journals of this version lack; whoever reads that version can live with them."""

_KNOWN_WORDS = (
    # The first condition is that of the index ``moves_by_progress``, which holds few.
    ("SELECT id, progress FROM moves WHERE progress NOT IN ('done') AND progress NOT IN ({})", [*MoveProgress]),
    ("SELECT move, role FROM members WHERE role NOT IN ({})", [*Role]),
)
_RESTORE = (
    "restore it, or move it aside with its -wal and -shm; the images are all in their folders, only history, holds and "
    "undo begin anew"
)
_DISK = "see whether its disk is mounted and well"
_MENDS = {
    sqlite3.SQLITE_FULL: "make room on its disk",
    sqlite3.SQLITE_READONLY: "give sortd the right to write it, its folder and its disk",
    sqlite3.SQLITE_PERM: "give sortd the right to write it, its folder and its disk",
    sqlite3.SQLITE_CANTOPEN: "see its folder and its disk",
    sqlite3.SQLITE_IOERR: _DISK,
    sqlite3.SQLITE_NOLFS: _DISK,
    sqlite3.SQLITE_PROTOCOL: _DISK,
    sqlite3.SQLITE_NOMEM: "free some memory",
}
"""By the primary result code, see https://www.sqlite.org/rescode.html; what is not among them is damage."""


def open_for_writing(path: Path) -> sqlite3.Connection:
    """Open the journal, or make it, so that a commit survives a power cut.

    Raises:
        JournalError: it cannot be opened, is locked, is damaged, is no journal, or is one of a newer sortd.
    """
    with translated(path):
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        fresh = not path.exists()

        def prepare(connection: sqlite3.Connection) -> None:
            _prepare(connection, path)
            if fresh:
                for folder in (path.parent, path.parent.parent):
                    sync_folder_at(folder)
            connection.execute(f"PRAGMA busy_timeout = {BUSY_SECONDS * 1e3:.0f}")

        # Python's own transactions are off: each begins and ends in ``committing``.
        return _opened(sqlite3.connect(path, timeout=OPENING_SECONDS, isolation_level=None), prepare)


def open_beside(path: Path) -> sqlite3.Connection:
    """Open a journal that this process has open already, for another thread; checkpoints are left to the first.

    Raises:
        JournalError: it cannot be opened.
    """

    def prepare(connection: sqlite3.Connection) -> None:
        _make_durable(connection)
        connection.execute("PRAGMA wal_autocheckpoint = 0")

    with translated(path):
        return _opened(sqlite3.connect(path, timeout=BUSY_SECONDS, isolation_level=None), prepare)


def open_for_reading(path: Path) -> sqlite3.Connection:
    """Open a journal that another process may be writing.

    Raises:
        JournalError: there is none, or it cannot be read.
    """
    if not path.is_file():
        raise JournalError(f"{path}: there is no journal yet; it is made when sortd runs for the first time")
    with translated(path):
        uri = path.absolute().as_uri()
        try:
            reader = sqlite3.connect(f"{uri}?mode=ro", timeout=BUSY_SECONDS, uri=True)
            return _opened(reader, lambda connection: _check_version(connection, path))
        except sqlite3.OperationalError:
            # Nobody writes (no log beside it), and we may not make the shared memory that reading one takes.
            if Path(f"{path}-wal").exists():
                raise
            reader = sqlite3.connect(f"{uri}?immutable=1", uri=True)
            return _opened(reader, lambda connection: _check_version(connection, path))


def _opened(connection: sqlite3.Connection, prepare: Callable[[sqlite3.Connection], object]) -> sqlite3.Connection:
    """Return a connection that was prepared; close it where that fails."""
    try:
        prepare(connection)
    except BaseException:
        connection.close()
        raise
    return connection


def copy_journal(path: Path, copy: Path) -> None:
    """Copy a journal that another process may be writing, as it is at this moment.

    Raises:
        JournalError: it cannot be read, or the copy cannot be written.
    """
    with closing(open_for_reading(path)) as reader, translated(copy), closing(sqlite3.connect(copy)) as writer:
        reader.backup(writer)


@contextmanager
def translated(path: Path) -> Iterator[None]:
    """Say what SQLite, the disk or the content refused as a ``JournalError`` that names the journal.

    Raises:
        JournalError: in place of these errors, also of those that rows raise which sortd did not write.
    """
    try:
        yield
    except (sqlite3.Error, OSError, ValueError, TypeError, LookupError, OverflowError) as error:
        what, mend = _problem_and_advice(error, path)
        raise JournalError(f"{path}: {what}; nothing is moved without it: {mend}") from error


def verify(connection: sqlite3.Connection, path: Path) -> None:
    """See that the journal is whole, and that it says nothing about moves that this sortd cannot understand."""
    with translated(path):
        (verdict,) = connection.execute("PRAGMA quick_check(1)").fetchone()
        if verdict != "ok":
            raise ValueError(verdict)
        for question, words in _KNOWN_WORDS:
            marks = ",".join("?" * len(words))
            found = connection.execute(question.format(marks), words).fetchone()
            if found is not None:
                raise ValueError(f"record {found[0]} says {found[1]!r}")


def _problem_and_advice(error: Exception, path: Path) -> tuple[str, str]:
    """Return what is wrong with the journal, and what to do about it."""
    if isinstance(error, OSError):
        return _refused(error)
    number = getattr(error, "sqlite_errorcode", 0)
    if number == sqlite3.SQLITE_READONLY_DBMOVED:
        return "the journal was removed or replaced while it was open", "leave it to sortd while it runs"
    if number & 0xFF in {sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED}:
        return "another program keeps the journal locked", f"end that program (`fuser -v {path}` names it)"
    if number & 0xFF == sqlite3.SQLITE_CANTOPEN and (refusal := _refusal_to_open(path)) is not None:
        return _refused(refusal)
    if number & 0xFF in _MENDS:
        return f"the journal cannot be used: {error}", _MENDS[number & 0xFF]
    return f"the journal is damaged ({error})", _RESTORE


def _refused(error: OSError) -> tuple[str, str]:
    return f"the journal cannot be opened: {error.strerror or error}", errors.advice_for_write(error) or "see its disk"


def _refusal_to_open(path: Path) -> OSError | None:
    """Ask the system what SQLite keeps to itself: why a journal, or what SQLite opens beside it, cannot be opened."""
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


@contextmanager
def committing(connection: sqlite3.Connection, path: Path) -> Iterator[None]:
    """Run the statements inside as one durable transaction, or none of them.

    Raises:
        JournalError: the transaction could not be made durable.
    """
    with translated(path):
        connection.execute("BEGIN IMMEDIATE")
        try:
            yield
            connection.execute("COMMIT")
        except BaseException:
            if connection.in_transaction:
                connection.execute("ROLLBACK")
            raise


def _prepare(connection: sqlite3.Connection, path: Path) -> None:
    _make_durable(connection)
    version = _check_version(connection, path)
    if version == 0:
        with committing(connection, path):
            for statement in SCHEMA.split(";\n"):
                connection.execute(statement)
            connection.execute(f"PRAGMA application_id = {APPLICATION}")
            connection.execute(f"PRAGMA user_version = {VERSION}")
    verify(connection, path)
    with committing(connection, path):
        for index in LATER_INDICES:
            connection.execute(index)


def _make_durable(connection: sqlite3.Connection) -> None:
    connection.execute("PRAGMA journal_mode = WAL").fetchone()
    connection.execute("PRAGMA synchronous = FULL")  # in WAL mode the default NORMAL does not sync a commit
    connection.execute("PRAGMA foreign_keys = ON")


def _check_version(connection: sqlite3.Connection, path: Path) -> int:
    (application,) = connection.execute("PRAGMA application_id").fetchone()
    (version,) = connection.execute("PRAGMA user_version").fetchone()
    (tables,) = connection.execute("SELECT count(*) FROM sqlite_master").fetchone()
    if (application, version, tables) == (0, 0, 0):
        return 0
    if application != APPLICATION:
        raise JournalError(f"{path}: this is no journal of sortd; name another state_dir or move the file away")
    if version != VERSION:
        raise JournalError(
            f"{path}: the journal has version {version}, this sortd writes version {VERSION}: install the version "
            "of sortd-images that made it, or move it aside; the images are not touched"
        )
    return int(version)
