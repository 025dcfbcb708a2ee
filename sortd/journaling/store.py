"""The journal's file: its tables, opened durably for the one that writes or read-only for the others."""

import os
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from sortd.errors import JournalError
from sortd.moving.relocation import FolderNameError

APPLICATION = 0x736F7274  # "sort", in the header of the file
VERSION = 1
BUSY_SECONDS = 30.0

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


def open_for_writing(path: Path) -> sqlite3.Connection:
    """Open the journal, or make it, so that a commit survives a power cut.

    Raises:
        JournalError: it cannot be opened, is damaged, is no journal, or is one of a newer sortd.
    """
    with translated(path):
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        fresh = not path.exists()
        # Python's own transactions are off: each begins and ends in ``committing``.
        connection = sqlite3.connect(path, timeout=BUSY_SECONDS, isolation_level=None)
    try:
        with translated(path):
            _prepare(connection, path)
            if fresh:
                _sync_parents(path)
    except BaseException:
        connection.close()
        raise
    return connection


def open_beside(path: Path) -> sqlite3.Connection:
    """Open a journal that this process has open already, for another thread; checkpoints are left to the first.

    Raises:
        JournalError: it cannot be opened.
    """
    with translated(path):
        connection = sqlite3.connect(path, timeout=BUSY_SECONDS, isolation_level=None)
        _make_durable(connection)
        connection.execute("PRAGMA wal_autocheckpoint = 0")
        return connection


def open_for_reading(path: Path) -> sqlite3.Connection:
    """Open a journal that another process may be writing.

    Raises:
        JournalError: there is none, or it cannot be read.
    """
    if not path.is_file():
        raise JournalError(f"{path}: there is no journal yet; it is made when sortd runs for the first time")
    with translated(path):
        connection = sqlite3.connect(f"{path.absolute().as_uri()}?mode=ro", timeout=BUSY_SECONDS, uri=True)
        try:
            _check_version(connection, path)
        except sqlite3.OperationalError:
            connection.close()
            # Nobody writes (no log beside it), and we may not make the shared memory that reading one takes.
            if Path(f"{path}-wal").exists():
                raise
            connection = sqlite3.connect(f"{path.absolute().as_uri()}?immutable=1", uri=True)
            _check_version(connection, path)
        return connection


@contextmanager
def translated(path: Path) -> Iterator[None]:
    """Say what SQLite or the disk refused as a ``JournalError`` that names the journal.

    Raises:
        JournalError: in the place of every sqlite3.Error, OSError and FolderNameError.
    """
    try:
        yield
    except (sqlite3.Error, OSError, FolderNameError) as error:
        raise JournalError(
            f"{path}: the journal cannot be used: {error}; nothing is moved without it: see that its disk has room "
            "and can be written, then start sortd again"
        ) from error


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
    with committing(connection, path):
        for index in LATER_INDICES:
            connection.execute(index)
    (verdict,) = connection.execute("PRAGMA quick_check(1)").fetchone()
    if verdict != "ok":
        raise JournalError(
            f"{path}: the journal is damaged ({verdict}); move it and its -wal aside and start sortd again: the images "
            "are all in their folders, only history and undo begin anew"
        )


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


def _sync_parents(path: Path) -> None:
    for folder in (path.parent, path.parent.parent):
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
