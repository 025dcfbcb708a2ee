"""The journal of one dataset: every move is recorded before it begins and after it has ended.

Methods that write raise JournalError if the commit is not durable; the caller must not continue with the move then.
"""

import json
import os
import sqlite3
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Self

from sortd.core.guard import GuardState
from sortd.errors import JournalError
from sortd.events import Stamp
from sortd.files import identity_of, sync_folder_at
from sortd.store.checks import PRUNED_TABLE, TABLE
from sortd.store.damage import translated
from sortd.store.history import (
    APPLICATION,
    BUSY_SECONDS,
    GUARD_FACT,
    VERSION,
    History,
    check_journal,
    check_version,
    opened,
)
from sortd.store.records import OF_STAYING_IMAGE, UNDONE, MoveProgress, MoveReason, MoveRecord, Record, file_rows, plain

OPENING_SECONDS = 0.5  # for which opening waits for a lock: the daemon opens in its loop, and retries soon

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
CREATE INDEX moves_by_content ON moves (substr(content, 1, 16)) WHERE content != '';
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

MIGRATIONS: Mapping[int, tuple[str, ...]] = {
    2: (  # files may leave out their name and content; see ``file_rows``
        "DROP INDEX moves_by_content",
        "CREATE INDEX moves_by_content ON moves (substr(content, 1, 16)) WHERE content != ''",
    ),
}
"""What makes each version out of the one before, in one transaction; a new journal has the last one."""

LATER = (
    f"CREATE TABLE IF NOT EXISTS {TABLE}",
    f"CREATE TABLE IF NOT EXISTS {PRUNED_TABLE}",
    "CREATE INDEX IF NOT EXISTS members_by_name ON members (name) WHERE position = 0",
    "CREATE INDEX IF NOT EXISTS members_by_final ON members (final) WHERE position = 0",
    "CREATE INDEX IF NOT EXISTS followed_by_reason ON moves (reason) WHERE outcome = 'followed'",
    f"CREATE INDEX IF NOT EXISTS members_that_stay ON members (inode) WHERE {OF_STAYING_IMAGE}",
)
"""Tables and indices that the first journals of this version lack."""

_FACT = "INSERT INTO facts VALUES (?, ?) ON CONFLICT (key) DO UPDATE SET value = excluded.value"
_WRITE_FILE = "REPLACE INTO members VALUES (?,?,?,?,?,?,?,?,?,?,?,?,?,?,?,?,?)"
_UPDATE = """UPDATE moves SET progress = ?, lost = ?, message = ?, ended_at = ? WHERE token = ?
RETURNING id, outcome, undoes, content, (SELECT count(*) FROM members WHERE move = moves.id) AS files,
EXISTS (SELECT 1 FROM holds WHERE path = ?) AS held"""


class Journal:
    """The moves of one dataset, with holds, corrections and facts; one process writes it."""

    def __init__(self, path: Path, *, clock: Callable[[], float] = time.time, run: str = "") -> None:
        """Open the journal, or create it and its folder.

        ``clock`` returns seconds since the epoch, ``run`` identifies this run of sortd in each record.

        Raises:
            JournalError: it cannot be opened, is damaged, or was written by a newer sortd.
        """
        self.path = path
        self.run = run
        self.clock = clock
        self.connection = open_for_writing(path)
        self._identity = identity_of(path)
        self.history = History(self.connection, path)
        self.open_tokens = self.history.open_tokens()  # of moves that may not have ended; see ``unfinished``

    def unfinished(self) -> list[MoveRecord]:
        """Return the moves that have not ended, oldest first; ``open_tokens`` are then those of these."""
        moves = [record.move for record in self.history.unfinished()]
        self.open_tokens = {move.token for move in moves}
        return moves

    def second_connection(self) -> "Journal":
        """Return the same journal for the calling thread, which must close it."""
        other = object.__new__(Journal)
        other.path, other.run, other.clock = self.path, self.run, self.clock
        other.connection = open_beside(self.path)
        other.open_tokens = set()  # only the first connection keeps track of open moves
        other.history = History(other.connection, self.path)
        return other

    def __enter__(self) -> Self:
        """Return itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close the journal."""
        self.close()

    def close(self) -> None:
        """Close the journal; idempotent."""
        self.connection.close()

    def require_in_place(self) -> None:
        """Check that the open file is still the one at the path: records in a removed file are lost.

        Raises:
            JournalError: it was removed or replaced.
        """
        if identity_of(self.path) != self._identity:
            raise JournalError(f"{self.path}: the journal was removed or replaced while open; sortd opens it again")

    def intend(self, orders: Sequence[tuple[MoveRecord, MoveReason]]) -> None:
        """Record moves before they begin, in one durable commit."""
        now = self.clock()
        self.open_tokens |= {move.token for move, _ in orders}
        with committing(self.connection, self.path):
            for move, reason in orders:
                self._insert(move, reason, now)

    def advance(self, move: MoveRecord) -> None:
        """Record the progress of a move durably."""
        with committing(self.connection, self.path):
            self._update(move, None)

    def settle(self, moves: Iterable[MoveRecord]) -> None:
        """Record the ends of moves in one durable commit; moves that have not ended stay open.

        A failed move leaves no record. An undo holds the image, which would be filed again otherwise.
        """
        now = self.clock()
        ended = set()
        with committing(self.connection, self.path):
            for move in moves:
                match move.progress:
                    case MoveProgress.FAILED:
                        self.connection.execute("DELETE FROM moves WHERE token = ?", (move.token,))
                    case MoveProgress.DONE:
                        row = self._update(move, now)
                        if row["held"]:
                            self.connection.execute("DELETE FROM holds WHERE path = ?", (_source(move),))
                        if row["outcome"] == UNDONE:
                            self._finish_undo(move, row["id"], row["undoes"], now)
                    case _:  # its progress is in the journal already
                        continue
                ended.add(move.token)
        self.open_tokens -= ended

    def hold(self, path: str, stamp: Stamp, reason: str) -> None:
        """Hold this version of a file (a path relative to the dataset): it is not moved until it is released."""
        with committing(self.connection, self.path):
            self._hold(path, stamp, reason, self.clock())

    def release(self, path: str | None = None) -> int:
        """Release one held path, or all; return their number."""
        with committing(self.connection, self.path):
            if path is None:
                return self.connection.execute("DELETE FROM holds").rowcount
            return self.connection.execute("DELETE FROM holds WHERE path = ?", (os.fsencode(path),)).rowcount

    def record_corrections(self, found: Sequence[tuple[Record, str | None, str]]) -> list[bool]:
        """Record in one commit that a person gave images a class; return whether each was new.

        An item is a record, the class (None: it has no correction any more), and the path now, below the dataset.
        """
        with committing(self.connection, self.path):
            return [self._record_correction(record, corrected, path) for record, corrected, path in found]

    def record_checks(self, answers: Sequence[tuple[int, bool]]) -> int:
        """Record in one commit whether a person found filed images right; return how many of them the journal knows."""
        filed = "SELECT id, ?, ? FROM moves WHERE id = ? AND progress = 'done' AND outcome IN ('filed', 'refiled')"
        with committing(self.connection, self.path):
            return sum(
                self.connection.execute(f"REPLACE INTO checks {filed}", (is_right, self.clock(), move)).rowcount
                for move, is_right in answers
            )

    def follow(self, record: Record, stamp: Stamp) -> None:
        """Record that a record's image was replaced by another version, of unknown content."""
        with committing(self.connection, self.path):
            self.connection.execute(
                "UPDATE members SET moved_device = ?, moved_inode = ?, moved_size = ?, moved_mtime_ns = ?, "
                "content = '' WHERE move = ? AND position = 0",
                (*stamp.columns, record.id),
            )

    def note(self, key: str, value: str) -> None:
        """Set a fact."""
        self.note_all({key: value})

    def note_all(self, facts: Mapping[str, str]) -> None:
        """Set facts in one commit."""
        with committing(self.connection, self.path):
            self.connection.executemany(_FACT, facts.items())

    def note_guard(self, state: GuardState) -> None:
        """Record the state of the guard."""
        self.note(GUARD_FACT, json.dumps(asdict(state)))

    def _record_correction(self, record: Record, corrected: str | None, path: str) -> bool:
        label = record.move_reason.label or ""
        if corrected is None:
            return self.connection.execute("DELETE FROM corrections WHERE move = ?", (record.id,)).rowcount > 0
        done = self.connection.execute(
            "INSERT INTO corrections VALUES (?,?,?,?,?,?) ON CONFLICT (move) DO UPDATE SET "
            "corrected = excluded.corrected, path = excluded.path, at = excluded.at "
            "WHERE corrected != excluded.corrected",
            (record.id, *map(os.fsencode, (label, corrected, path)), record.move_reason.content, self.clock()),
        )
        if not done.rowcount:  # it may have another name
            self.connection.execute("UPDATE corrections SET path = ? WHERE move = ?", (os.fsencode(path), record.id))
        return done.rowcount > 0

    def _insert(self, move: MoveRecord, reason: MoveReason, now: float) -> None:
        columns = {
            "token": move.token,
            "run": self.run,
            "progress": move.progress.value,
            "source": os.fsencode(move.source),
            "destination": os.fsencode(move.destination),
            "intended_at": now,
            **reason.columns,
        }
        marks = ",".join("?" * len(columns))
        insert = f"INSERT INTO moves ({', '.join(columns)}) VALUES ({marks})"  # noqa: S608 - names of columns only
        move_id = self.connection.execute(insert, tuple(columns.values())).lastrowid or 0
        self.connection.executemany(_WRITE_FILE, file_rows(move_id, move, reason.content))

    def _update(self, move: MoveRecord, ended_at: float | None) -> sqlite3.Row:
        """Write the progress and the files of a move; return what ``_UPDATE`` returns."""
        lost, message = plain("\n".join(move.lost)), plain(move.message)
        values = (move.progress.value, lost, message, ended_at, move.token, _source(move))
        row: sqlite3.Row
        (row,) = self.connection.execute(_UPDATE, values).fetchall()
        files = file_rows(row["id"], move, row["content"])
        if row["files"] > len(files):  # recovery drops files that no longer exist, and never adds one
            self.connection.execute("DELETE FROM members WHERE move = ?", (row["id"],))
        self.connection.executemany(_WRITE_FILE, files)
        return row

    def _finish_undo(self, move: MoveRecord, move_id: int, undoes: int | None, now: float) -> None:
        image = move.image
        if image.moved_stamp is None:
            return
        self.connection.execute("UPDATE moves SET undone_by = ? WHERE id = ?", (move_id, undoes))
        if not move.destination.startswith("Dataset/"):  # what is in a class is not filed again
            self._hold(f"{move.destination}/{image.final}", image.moved_stamp, UNDONE, now)

    def _hold(self, path: str, stamp: Stamp, reason: str, now: float) -> None:
        self.connection.execute(
            "INSERT OR REPLACE INTO holds VALUES (?,?,?,?,?,?,?)", (os.fsencode(path), *stamp.columns, now, reason)
        )


def _source(move: MoveRecord) -> bytes:
    return os.fsencode(f"{move.source}/{move.image.name}")


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
        return opened(sqlite3.connect(path, timeout=OPENING_SECONDS, isolation_level=None), prepare)


def open_beside(path: Path) -> sqlite3.Connection:
    """Open a journal that this process has already opened, for another thread; the first connection checkpoints.

    Raises JournalError.
    """

    def prepare(connection: sqlite3.Connection) -> None:
        _make_durable(connection)
        connection.execute("PRAGMA wal_autocheckpoint = 0")

    with translated(path):
        return opened(sqlite3.connect(path, timeout=BUSY_SECONDS, isolation_level=None), prepare)


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
    if connection.execute("PRAGMA page_count").fetchone() == (0,):
        connection.execute("PRAGMA auto_vacuum = INCREMENTAL")  # takes effect only before the first table
    _make_durable(connection)
    version = check_version(connection, path)
    if version == 0:
        with committing(connection, path):
            for statement in SCHEMA.split(";\n"):
                connection.execute(statement)
            connection.execute(f"PRAGMA application_id = {APPLICATION}")
            connection.execute(f"PRAGMA user_version = {VERSION}")
    elif version < VERSION:
        check_journal(connection, path)
        with committing(connection, path):
            for one in range(version + 1, VERSION + 1):
                for statement in MIGRATIONS[one]:
                    connection.execute(statement)
            connection.execute(f"PRAGMA user_version = {VERSION}")
    check_journal(connection, path)
    with committing(connection, path):
        for statement in LATER:
            connection.execute(statement)


def _make_durable(connection: sqlite3.Connection) -> None:
    connection.execute("PRAGMA journal_mode = WAL").fetchone()
    connection.execute("PRAGMA synchronous = FULL")  # in WAL mode the default NORMAL does not sync a commit
    connection.execute("PRAGMA foreign_keys = ON")
