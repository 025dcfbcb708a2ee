"""Removal of old moves from a journal, in small transactions, and of the pages that they leave free.

A move that ended before a time is removed unless something may still need it:

- an undo or a correction: there is a file where the move put one, or so for the last move of the same content;
- a scan: the image stayed in Images/ when it was copied, linked or given keywords, and would get them again;
- figures and references: a person assigned, corrected or checked it, or it was undone, or it is an undo, or it put
  an image into Review/ that a person assigned from there;
- recovery: it has not ended, or its undo has not.

The number of removed moves by outcome and class is kept, with how many count as checked, for totals and precision.
"""

import os
from collections.abc import Sequence
from pathlib import Path

from sortd.events import Outcome
from sortd.store import checks
from sortd.store.damage import translated
from sortd.store.journal import Journal, committing
from sortd.store.records import PLACES_FACT, Record, label_column

SLICE = 200  # moves that are examined in one step, in some ten milliseconds
FREED_PAGES = 256  # returned to the disk in one step: one megabyte
INCREMENTAL = 2  # PRAGMA auto_vacuum

_NEXT = """SELECT id, ended_at < ?2 AND progress = 'done' AND undone_by IS NULL
    AND outcome NOT IN ('undone', 'assigned')
    AND NOT EXISTS (SELECT 1 FROM corrections WHERE move = moves.id)
    AND NOT EXISTS (SELECT 1 FROM checks WHERE move = moves.id)
    AND id NOT IN (SELECT undoes FROM moves WHERE progress NOT IN ('done') AND undoes IS NOT NULL)
    AND NOT (outcome = 'sent_to_review' AND EXISTS (SELECT 1 FROM members AS put
        JOIN members ON members.name = put.final AND members.position = 0 AND members.inode = put.moved_inode
        JOIN moves AS assigned ON assigned.id = members.move AND assigned.outcome = 'assigned'
        WHERE put.move = moves.id AND put.position = 0)) AS is_spare
FROM moves WHERE id > ?1 AND id <= ?3 ORDER BY id LIMIT ?4"""
# The newest move that ended stays: a number must not be used again, and an open move that fails leaves no record.
_LAST = """SELECT min((SELECT id FROM moves WHERE ended_at < ? ORDER BY ended_at DESC LIMIT 1),
    (SELECT id FROM moves WHERE +progress = 'done' ORDER BY id DESC LIMIT 1) - 1)"""


class Pruning:
    """One pass over the old moves of a journal."""

    def __init__(self, journal: Journal, root: Path, before: float, *, removes: bool) -> None:
        """Prepare; nothing is read yet.

        The folder of the dataset must be mounted. Moves that ended ``before`` it, in seconds since the epoch, are old;
        they are only counted unless ``removes``.
        """
        self._journal, self._root, self._before, self._removes = journal, root, before, removes
        self._examined = 0  # the number of the last move that was
        self._last: int | None = None
        self._looked: dict[bytes, float] | None = None  # by class, when a person last looked at it
        self.removed = 0
        self.kept = 0

    def step(self) -> bool:
        """Examine the next moves, and remove those that nothing needs; return whether there may be more.

        Raises JournalError.
        """
        connection = self._journal.connection
        with translated(self._journal.path):
            if self._last is None:
                (self._last,) = connection.execute(_LAST, (self._before,)).fetchone()
            values = (self._examined, self._before, self._last or 0, SLICE)
            rows = connection.execute(_NEXT, values).fetchall()
        if not rows:
            return False
        self._examined = rows[-1]["id"]
        records = self._journal.history.finished([row["id"] for row in rows if row["is_spare"]])
        spare = [record for record in records if not self._is_needed(record)]
        self.removed += len(spare)
        self.kept += len(rows) - len(spare)
        if spare and self._removes:
            self._remove(spare)
        return True

    def _is_needed(self, record: Record) -> bool:
        if record.move.stays or self._has_files(record):
            return True
        content = record.move_reason.content
        last = self._journal.history.last_known(content=content) if content else None
        return last is not None and last.id != record.id and self._has_files(last)

    def _has_files(self, record: Record) -> bool:
        """Return whether any file of a move is, or may be, where the move put it."""
        folder = self._root / record.move.destination
        return any(_is_there(folder / file.final) for file in record.move.files if file.leaves and file.final)

    def _remove(self, records: Sequence[Record]) -> None:
        connection, moves = self._journal.connection, [record.id for record in records]
        marks = ",".join("?" * len(moves))
        with committing(connection, self._journal.path):
            if self._looked is None:
                self._looked = {row["label"]: row["at"] for row in connection.execute(checks.LOOKED)}
            for record in records:
                connection.execute(checks.ADD_PRUNED, self._counted(record))
            connection.execute(
                f"DELETE FROM facts WHERE key IN ({marks})",  # noqa: S608 - marks only
                tuple(f"{PLACES_FACT}{move}" for move in moves),
            )
            connection.execute(f"DELETE FROM moves WHERE id IN ({marks})", tuple(moves))  # noqa: S608 - marks only

    def _counted(self, record: Record) -> tuple[str, bytes, bool, bool]:
        """Return outcome, class, whether it counts as a filed image, and whether as a checked one."""
        reason, label = record.move_reason, label_column(record.move_reason.label) or b""
        is_filed = (
            reason.outcome in {Outcome.FILED, Outcome.REFILED}
            and not self._journal.connection.execute(
                checks.IS_REPLACED, (reason.content, reason.content, record.id)
            ).fetchone()
        )
        looked_at = (self._looked or {}).get(label, 0.0)
        return reason.outcome, label, is_filed, is_filed and (record.ended_at or 0.0) <= looked_at


def _is_there(path: Path) -> bool:
    try:
        os.lstat(path)
    except OSError as error:
        return not isinstance(error, (FileNotFoundError, NotADirectoryError))  # a disk that does not say keeps it
    return True


def free_pages(journal: Journal) -> bool:
    """Return some free pages of a journal to the disk; return whether there are more to return.

    A journal that an older sortd created returns none until ``rewrite``; new moves use its free pages.

    Raises:
        JournalError: the journal cannot be written.
    """
    with translated(journal.path):
        (kind,) = journal.connection.execute("PRAGMA auto_vacuum").fetchone()
        (free,) = journal.connection.execute("PRAGMA freelist_count").fetchone()
        if kind != INCREMENTAL or free < FREED_PAGES:
            return False
        journal.connection.executescript(f"PRAGMA incremental_vacuum({FREED_PAGES})")  # ``execute`` frees one
        return bool(free >= 2 * FREED_PAGES)


def rewrite(journal: Journal) -> None:
    """Write a journal that an older sortd created anew, so that it can return free pages; else only return them.

    This needs as much free space as the journal has bytes, on its disk and where temporary files are (see
    https://www.sqlite.org/tempfiles.html), and takes a second for each 100 MB.

    Raises:
        JournalError: the journal cannot be written.
    """
    with translated(journal.path):
        (kind,) = journal.connection.execute("PRAGMA auto_vacuum").fetchone()
        if kind == INCREMENTAL:
            journal.connection.executescript("PRAGMA incremental_vacuum")
        else:
            journal.connection.execute("PRAGMA auto_vacuum = INCREMENTAL")
            journal.connection.execute("VACUUM")
        journal.connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()
