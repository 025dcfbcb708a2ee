"""The journal of one dataset: every relocation is written before it begins and after it has ended."""

import json
import os
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import Self

from sortd.core.guard import GuardState
from sortd.errors import JournalError
from sortd.events import Stamp
from sortd.journaling.history import GUARD_FACT, History
from sortd.journaling.records import (
    UNDONE,
    Grounds,
    Record,
    Selection,
    label_column,
    member_rows,
    plain,
)
from sortd.journaling.store import committing, open_beside, open_for_writing
from sortd.moving.relocation import Progress, Relocation

__all__ = ["UNDONE", "Grounds", "History", "Journal", "Record", "Selection"]

_MOVE = """INSERT INTO moves (token, run, outcome, progress, source, destination, label, score, margin, second_label,
mode, reason, generation, encoder_id, content, intended_at, undoes) VALUES (?,?,?,?,?,?,?,?,?,?,?,?,?,?,?,?,?)"""
_FACT = "INSERT INTO facts VALUES (?, ?) ON CONFLICT (key) DO UPDATE SET value = excluded.value"
_MEMBER = "INSERT INTO members VALUES (?,?,?,?,?,?,?,?,?,?,?,?,?,?,?,?,?)"


class Journal:
    """What sortd did to one dataset and is about to do; one process writes it."""

    def __init__(self, path: Path, *, clock: Callable[[], float] = time.time, run: str = "") -> None:
        """Open the journal, or make it.

        Args:
            path: the file; its folder is made where it is missing.
            clock: seconds since the epoch.
            run: a word for this run of sortd, kept in each record.

        Raises:
            JournalError: it cannot be opened, is damaged, or is one of a newer sortd.
        """
        self.path = path
        self.run = run
        self.clock = clock
        self._connection = open_for_writing(path)
        self._identity = _identity(path)
        self.history = History(self._connection, path)

    def beside(self) -> "Journal":
        """Return the same journal for the thread that calls, which closes it.

        Raises:
            JournalError: it cannot be opened.
        """
        other = object.__new__(Journal)
        other.path, other.run, other.clock = self.path, self.run, self.clock
        other._connection = open_beside(self.path)
        other.history = History(other._connection, self.path)
        return other

    def __enter__(self) -> Self:
        """Return itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close the journal."""
        self.close()

    def close(self) -> None:
        """Close the journal; doing it twice is no mistake."""
        self._connection.close()

    def require_in_place(self) -> None:
        """See that the file that is open is the one that stands there: what is written to another one is lost.

        Raises:
            JournalError: it was removed or replaced.
        """
        if _identity(self.path) != self._identity:
            raise JournalError(f"{self.path}: the journal was removed or replaced while it was open; it is opened anew")

    def intend(self, orders: Sequence[tuple[Relocation, Grounds]]) -> None:
        """Write, in one durable commit, what is about to be done.

        Raises:
            JournalError: it could not be made durable; nothing of it may be begun.
        """
        now = self.clock()
        with committing(self._connection, self.path):
            for relocation, grounds in orders:
                self._insert(relocation, grounds, now)

    def advance(self, relocation: Relocation) -> None:
        """Write durably how far a relocation has come.

        Raises:
            JournalError: it could not be made durable; the next step may not be begun.
        """
        with committing(self._connection, self.path):
            self._update(relocation, None)

    def settle(self, relocations: Iterable[Relocation]) -> None:
        """Write, in one durable commit, how relocations ended; those that are still under way are left open.

        A relocation that was taken back leaves no record: nothing happened. One that undid another holds what it put
        back, or it would be filed again at once.

        Raises:
            JournalError: it could not be made durable.
        """
        now = self.clock()
        with committing(self._connection, self.path):
            for relocation in relocations:
                match relocation.progress:
                    case Progress.FAILED:
                        self._connection.execute("DELETE FROM moves WHERE token = ?", (relocation.token,))
                    case Progress.DONE:
                        self._update(relocation, now)
                        self._unhold(relocation)
                        self._finish_undo(relocation, now)
                    case _:  # its progress stands in the journal already
                        continue

    def hold(self, path: str, stamp: Stamp, reason: str) -> None:
        """Note that this version is not to be moved.

        Args:
            path: relative to the dataset.
            stamp: the version; another one under the same name is not held.
            reason: one word for whoever asks.

        Raises:
            JournalError: it could not be made durable.
        """
        self.hold_all([(path, stamp)], reason)

    def hold_all(self, versions: Iterable[tuple[str, Stamp]], reason: str) -> None:
        """Note in one commit that these versions are not to be moved.

        Raises:
            JournalError: it could not be made durable.
        """
        now = self.clock()
        with committing(self._connection, self.path):
            for path, stamp in versions:
                self._hold(path, stamp, reason, now)

    def release(self, path: str | None = None) -> int:
        """Let one held path go, or every one; return how many there were.

        Raises:
            JournalError: it could not be made durable.
        """
        with committing(self._connection, self.path):
            if path is None:
                return self._connection.execute("DELETE FROM holds").rowcount
            return self._connection.execute("DELETE FROM holds WHERE path = ?", (os.fsencode(path),)).rowcount

    def record_corrections(self, found: Sequence[tuple[Record, str, str]]) -> list[bool]:
        """Note in one commit that the user moved filed images to other classes; back to the first takes the note away.

        Args:
            found: the move that filed each, the class in which it was found, and where, relative to the dataset.

        Returns:
            Whether each was news.

        Raises:
            JournalError: it could not be made durable.
        """
        with committing(self._connection, self.path):
            return [self._record_correction(record, corrected, path) for record, corrected, path in found]

    def follow(self, record: Record, stamp: Stamp) -> None:
        """Note that another version of a record's image, of bytes not known, stands where it was put.

        Raises:
            JournalError: it could not be made durable.
        """
        with committing(self._connection, self.path):
            self._connection.execute(
                "UPDATE members SET moved_device = ?, moved_inode = ?, moved_size = ?, moved_mtime_ns = ?, "
                "content = '' WHERE move = ? AND position = 0",
                (*stamp.columns, record.id),
            )

    def note(self, key: str, value: str) -> None:
        """Keep a fact under a key, in the place of what stood there.

        Raises:
            JournalError: it could not be made durable.
        """
        with committing(self._connection, self.path):
            self._connection.execute(_FACT, (key, value))

    def note_all(self, facts: Mapping[str, str]) -> None:
        """Keep facts under their keys, in one commit.

        Raises:
            JournalError: they could not be made durable.
        """
        with committing(self._connection, self.path):
            self._connection.executemany(_FACT, facts.items())

    def note_guard(self, state: GuardState) -> None:
        """Write down how the guard stands.

        Raises:
            JournalError: it could not be made durable; nothing may move meanwhile.
        """
        self.note(GUARD_FACT, json.dumps(asdict(state)))

    def _record_correction(self, record: Record, corrected: str, path: str) -> bool:
        label = record.grounds.label or ""
        if corrected == label:
            return self._connection.execute("DELETE FROM corrections WHERE move = ?", (record.id,)).rowcount > 0
        done = self._connection.execute(
            "INSERT INTO corrections VALUES (?,?,?,?,?,?) ON CONFLICT (move) DO UPDATE SET "
            "corrected = excluded.corrected, path = excluded.path, at = excluded.at "
            "WHERE corrected != excluded.corrected",
            (
                record.id,
                os.fsencode(label),
                os.fsencode(corrected),
                os.fsencode(path),
                record.grounds.content,
                self.clock(),
            ),
        )
        return done.rowcount > 0

    def _insert(self, relocation: Relocation, grounds: Grounds, now: float) -> None:
        cursor = self._connection.execute(
            _MOVE,
            (
                relocation.token,
                self.run,
                grounds.outcome,
                relocation.progress.value,
                os.fsencode(relocation.source),
                os.fsencode(relocation.destination),
                label_column(grounds.label),
                grounds.score,
                grounds.margin,
                label_column(grounds.second_label),
                grounds.mode,
                plain(grounds.reason),
                grounds.generation,
                grounds.encoder_id,
                grounds.content,
                now,
                grounds.undoes,
            ),
        )
        move = cursor.lastrowid or 0
        self._connection.executemany(_MEMBER, member_rows(move, relocation))

    def _update(self, relocation: Relocation, ended_at: float | None) -> None:
        (move,) = self._connection.execute("SELECT id FROM moves WHERE token = ?", (relocation.token,)).fetchone()
        self._connection.execute(
            "UPDATE moves SET progress = ?, lost = ?, message = ?, ended_at = ? WHERE id = ?",
            (relocation.progress.value, plain("\n".join(relocation.lost)), plain(relocation.message), ended_at, move),
        )
        self._connection.execute("DELETE FROM members WHERE move = ?", (move,))
        self._connection.executemany(_MEMBER, member_rows(move, relocation))

    def _finish_undo(self, relocation: Relocation, now: float) -> None:
        move, outcome, undoes = self._connection.execute(
            "SELECT id, outcome, undoes FROM moves WHERE token = ?", (relocation.token,)
        ).fetchone()
        image = relocation.image
        if outcome != UNDONE or image.moved_stamp is None:
            return
        self._connection.execute("UPDATE moves SET undone_by = ? WHERE id = ?", (move, undoes))
        self._hold(f"{relocation.destination}/{image.final}", image.moved_stamp, UNDONE, now)

    def _unhold(self, relocation: Relocation) -> None:
        path = os.fsencode(f"{relocation.source}/{relocation.image.name}")
        self._connection.execute("DELETE FROM holds WHERE path = ?", (path,))

    def _hold(self, path: str, stamp: Stamp, reason: str, now: float) -> None:
        self._connection.execute(
            "INSERT OR REPLACE INTO holds VALUES (?,?,?,?,?,?,?)",
            (os.fsencode(path), *stamp.columns, now, reason),
        )


def _identity(path: Path) -> tuple[int, int] | None:
    try:
        found = os.stat(path)
    except OSError:
        return None
    return found.st_dev, found.st_ino
