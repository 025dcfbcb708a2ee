"""The SQLite file of the journal: its tables, opened durably by one writer, or read-only."""

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

BUSY_SECONDS = 5.0  # for which a commit waits for another connection's lock, for example that of a copy's commit
OPENING_SECONDS = 0.5  # the same for opening, which the daemon does in its loop and retries soon

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
"""Indices that the first journals of this version lack."""

_KNOWN_WORDS = (
    # The first condition selects the index ``moves_by_progress``, which is small.
    ("SELECT id, progress FROM moves WHERE progress NOT IN ('done') AND progress NOT IN ({})", [*MoveProgress]),
    ("SELECT move, role FROM members WHERE role NOT IN ({})", [*Role]),
)
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


def open_for_writing(path: Path) -> sqlite3.Connection:
    """Open or create the journal, with durable commits.

    Raises:
        JournalError: it cannot be opened, is locked, is damaged, or is not a journal of this version.
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

        # Without Python's implicit transactions: ``committing`` begins and ends each.
        return _opened(sqlite3.connect(path, timeout=OPENING_SECONDS, isolation_level=None), prepare)


def open_beside(path: Path) -> sqlite3.Connection:
    """Open a journal that this process has already opened, for another thread; the first connection checkpoints.

    Raises:
        JournalError: it cannot be opened.
    """

    def prepare(connection: sqlite3.Connection) -> None:
        _make_durable(connection)
        connection.execute("PRAGMA wal_autocheckpoint = 0")

    with translated(path):
        return _opened(sqlite3.connect(path, timeout=BUSY_SECONDS, isolation_level=None), prepare)


def open_for_reading(path: Path) -> sqlite3.Connection:
    """Open a journal read-only; another process may write it.

    Raises:
        JournalError: it does not exist or cannot be read.
    """
    if not path.is_file():
        raise JournalError(f"{path}: there is no journal yet; sortd creates it at its first run")

    def opened(options: str) -> sqlite3.Connection:
        reader = sqlite3.connect(f"{path.absolute().as_uri()}?{options}", timeout=BUSY_SECONDS, uri=True)
        return _opened(reader, lambda connection: _check_version(connection, path))

    with translated(path):
        try:
            return opened("mode=ro")
        except sqlite3.OperationalError:
            # Nobody writes it (there is no -wal), but reading in WAL mode needs a file that sortd may not create.
            if Path(f"{path}-wal").exists():
                raise
            return opened("immutable=1")


def _opened(connection: sqlite3.Connection, prepare: Callable[[sqlite3.Connection], object]) -> sqlite3.Connection:
    """Return a connection after ``prepare``; close it on an error."""
    try:
        prepare(connection)
    except BaseException:
        connection.close()
        raise
    return connection


def copy_journal(path: Path, copy: Path) -> None:
    """Copy the current state of a journal that another process may write.

    Raises:
        JournalError: it cannot be read, or the copy cannot be written.
    """
    with closing(open_for_reading(path)) as reader, translated(copy), closing(sqlite3.connect(copy)) as writer:
        reader.backup(writer)


@contextmanager
def translated(path: Path) -> Iterator[None]:
    """Convert errors of SQLite, the disk and invalid rows to a JournalError with the journal's path."""
    try:
        yield
    except (sqlite3.Error, OSError, ValueError, TypeError, LookupError, OverflowError) as error:
        problem, advice = _problem_and_advice(error, path)
        raise JournalError(f"{path}: {problem}; nothing is moved without it: {advice}") from error


def check_journal(connection: sqlite3.Connection, path: Path) -> None:
    """Check the journal's integrity, and that this version knows its values of progress and role."""
    with translated(path):
        (verdict,) = connection.execute("PRAGMA quick_check(1)").fetchone()
        if verdict != "ok":
            raise ValueError(verdict)
        for question, words in _KNOWN_WORDS:
            marks = ",".join("?" * len(words))
            found = connection.execute(question.format(marks), words).fetchone()
            if found is not None:
                raise ValueError(f"record {found[0]} has the unknown value {found[1]!r}")


def _problem_and_advice(error: Exception, path: Path) -> tuple[str, str]:
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


@contextmanager
def committing(connection: sqlite3.Connection, path: Path) -> Iterator[None]:
    """Run the statements of the block as one durable transaction.

    Raises:
        JournalError: the commit is not durable; nothing was changed.
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
    check_journal(connection, path)
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
        raise JournalError(f"{path}: not a journal of sortd; set another state_dir or move the file away")
    if version != VERSION:
        raise JournalError(
            f"{path}: the journal has version {version}, this sortd needs version {VERSION}: install the version of "
            "sortd-images that wrote it, or move the journal aside; the images are not affected"
        )
    return int(version)
