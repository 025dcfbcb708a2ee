"""Queries of a journal, by sortd or by another process, and the checks of a journal that is opened."""

import json
import os
import sqlite3
from array import array
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Self, TypeVar

from sortd.core.guard import GuardState
from sortd.errors import JournalError
from sortd.events import NO_CLASS, Stamp
from sortd.store import checks
from sortd.store.checks import SAME_CONTENT, CheckedImage, FiledImages
from sortd.store.damage import translated
from sortd.store.records import (
    EXAMPLE_OF_NO_CLASS,
    OF_STAYING_IMAGE,
    MoveProgress,
    Record,
    Role,
    Selection,
    conditions_of,
    label_column,
    label_from,
    plain,
    record_from,
    stamp_from,
)

APPLICATION = 0x736F7274  # "sort", in the header of the file
VERSION = 2
READABLE = range(1, VERSION + 1)  # opening a journal for writing makes the last version of it

BUSY_SECONDS = 5.0  # for which a commit waits for another connection's lock, for example that of a copy's commit

_KNOWN_WORDS = (
    # The first condition selects the index ``moves_by_progress``, which is small.
    ("SELECT id, progress FROM moves WHERE progress NOT IN ('done') AND progress NOT IN ({})", [*MoveProgress]),
    ("SELECT move, role FROM members WHERE role NOT IN ({})", [*Role]),
)
# This small index contains only unfinished moves.
_UNFINISHED = "SELECT id FROM moves INDEXED BY moves_by_progress WHERE progress NOT IN ('done')"
_FILES = "SELECT * FROM members WHERE move IN ({}) ORDER BY move, position"
_CHUNK = 500
LONGEST_END_SECONDS = 60.0  # between the removal of a file from its folder and the end of its group of moves
_MOST_ROWS = 2**63 - 1  # SQLite's largest integer
_T = TypeVar("_T")
# The plus keeps the planner from using the index of progress, because nearly all moves are done:
# https://www.sqlite.org/optoverview.html#disqualifying_where_clause_terms_using_unary_
_STANDING = "+progress = 'done' AND undone_by IS NULL AND outcome NOT IN ('undone', 'followed')"
_NAMED = "moves.id IN (SELECT move FROM members WHERE {} = ? AND position = 0) ORDER BY moves.id DESC LIMIT 1"
_OF_STAMP = """moves.id IN (SELECT move FROM members WHERE moved_inode = ? AND position = 0
AND moved_size = ? AND moved_mtime_ns = ?) ORDER BY moves.id DESC LIMIT ?"""
_ELSEWHERE = f"""moves.id IN (SELECT moves.id FROM moves WHERE {_STANDING} AND {_OF_STAMP}) AND NOT EXISTS
(SELECT 1 FROM members WHERE move = moves.id AND position = 0 AND final = ? AND destination = ?)
ORDER BY moves.id DESC LIMIT 1"""  # noqa: S608 - our own words only
_OF_CONTENT = f"moves.id IN (SELECT id FROM moves WHERE {SAME_CONTENT}) ORDER BY moves.id DESC LIMIT 1"  # noqa: S608 - our own words only

_FILED_IN_PLACE = f"""SELECT 1 FROM members JOIN moves ON moves.id = members.move
WHERE {OF_STAYING_IMAGE} AND inode = ? AND size = ? AND mtime_ns = ? AND {_STANDING}
AND (role IN ('copy', 'hardlink') OR (source = ? AND name = ?)) LIMIT 1"""  # noqa: S608 - our own words only
_LINKED_OR_TAGGED = f"SELECT move FROM members WHERE {OF_STAYING_IMAGE} AND role IN ('symlink', 'keywords')"  # noqa: S608 - our own words only

GENERATION_FACT = "generation"  # the last generation used: numbers are never reused, even if the cache is lost
GUARD_FACT = "guard"  # the state of the guard as JSON, see GuardState


class History:
    """Read-only queries of one dataset's journal; each raises JournalError if it cannot be read."""

    def __init__(self, connection: sqlite3.Connection, path: Path) -> None:
        """Use an open connection."""
        self._connection, self._path = connection, path
        connection.row_factory = sqlite3.Row

    @classmethod
    def open(cls, path: Path) -> Self:
        """Open a journal read-only; see ``open_for_reading``."""
        return cls(open_for_reading(path), path)

    def __enter__(self) -> Self:
        """Return itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close the connection."""
        self.close()

    def close(self) -> None:
        """Close the connection; idempotent."""
        self._connection.close()

    def moves(self, selection: Selection) -> list[Record]:
        """Return the selected finished moves, newest first."""
        where, values = _selected(selection)
        return self._records(f"{where} ORDER BY moves.id DESC LIMIT ?", values)

    def numbers(self, selection: Selection) -> "array[int]":
        """Return the numbers of the selected finished moves, the one that ended last first, in 8 bytes each."""
        where, values = _selected(selection)
        statement = f"SELECT id FROM moves WHERE {where} ORDER BY ended_at DESC, id DESC LIMIT ?"  # noqa: S608 - as above
        with translated(self._path):
            return array("q", (row["id"] for row in self._connection.execute(statement, values)))

    def unfinished(self) -> list[Record]:
        """Return the moves that have not ended, oldest first."""
        return self._records(f"moves.id IN ({_UNFINISHED}) ORDER BY moves.id", ())

    def open_tokens(self) -> set[str]:
        """Return the tokens of the moves that have not ended."""
        return {row["token"] for row in self._rows(f"SELECT token FROM moves WHERE id IN ({_UNFINISHED})")}  # noqa: S608

    def last_known(self, stamp: Stamp | None = None, content: str = "") -> Record | None:
        """Return the last move of this file version, or else of this content, that was not undone.

        The device is not compared, because its number changes when a disk is mounted again.
        """
        if stamp is not None and (found := self._first(_OF_STAMP, (*stamp.columns[1:], 1))):
            return found
        return self._first(_OF_CONTENT, (content, content)) if content else None

    def known_before(self, record: Record) -> Record | None:
        """Return the last move, before this one, of the file version that it moved, if not undone."""
        return self._first(f"+moves.id < ? AND {_OF_STAMP}", (record.id, *record.move.image.stamp.columns[1:], 1))

    def moved_elsewhere(self, stamp: Stamp, folder: str, name: str) -> Record | None:
        """Return the newer of the last two moves of this file version that put it anywhere but here, if not undone."""
        return self._first(_ELSEWHERE, (*stamp.columns[1:], 2, os.fsencode(name), os.fsencode(folder)))

    def last_moved(self, folder: str, name: str) -> Record | None:
        """Return the last move of an image with this name out of a folder, if not undone."""
        return self._first(f"source = ? AND {_NAMED.format('name')}", (os.fsencode(folder), os.fsencode(name)))

    def moved_between(self, folder: str, first: str, beyond: str, *, since: float) -> list[Record]:
        """Return the moves out of a folder of images with first <= name < beyond, newest first, without undone ones.

        Moves that ended before ``since``, in seconds since the epoch, do not count.
        """
        named = "moves.id IN (SELECT move FROM members WHERE name >= ? AND name < ? AND position = 0)"
        values = (os.fsencode(folder), since, os.fsencode(first), os.fsencode(beyond))
        return self._records(f"{_STANDING} AND source = ? AND ended_at >= ? AND {named} ORDER BY moves.id DESC", values)

    def has_move_out_of(self, folder: str, at: float) -> bool:
        """Return whether a move out of a folder was under way at a time; a file system is 10 ms late at most."""
        begun = f"""SELECT 1 FROM moves WHERE ended_at >= ? AND ended_at < ? AND +source = ? AND intended_at <= ?
            AND NOT EXISTS (SELECT 1 FROM members WHERE move = moves.id AND {OF_STAYING_IMAGE}) LIMIT 1"""  # noqa: S608
        late = 0.02
        return bool(self._rows(begun, (at - late, at + LONGEST_END_SECONDS, os.fsencode(folder), at + late)))

    def is_filed_in_place(self, stamp: Stamp, folder: str, name: str) -> bool:
        """Return whether this version was filed and stayed where it was, and that was not undone.

        A symbolic link and keywords belong to one path only; after a copy or a hard link, the image may be renamed.
        """
        rows = self._rows(_FILED_IN_PLACE, (*stamp.columns[1:], os.fsencode(folder), os.fsencode(name)))
        return bool(rows)

    def filed_in_place(self) -> list[Record]:
        """Return the moves of images that have a class by a symbolic link or by keywords only, oldest first."""
        return self._records(f"{_STANDING} AND moves.id IN ({_LINKED_OR_TAGGED}) ORDER BY moves.id", ())

    def last_put(self, folder: str, name: str) -> Record | None:
        """Return the last move of an image to this folder and name, if not undone."""
        return self._first(f"destination = ? AND {_NAMED.format('final')}", (os.fsencode(folder), os.fsencode(name)))

    def last_named(self, name: str, size: int) -> Record | None:
        """Return the last move that gave an image of this size this name in any folder, if not undone."""
        put = "SELECT move FROM members WHERE final = ? AND moved_size = ? AND position = 0"
        return self._first(f"moves.id IN ({put}) ORDER BY moves.id DESC LIMIT 1", (os.fsencode(name), size))

    def finished(self, identifiers: Sequence[int]) -> list[Record]:
        """Return the finished moves with these numbers, newest first; unknown numbers are skipped."""
        return self._among("+progress = 'done' AND moves.id IN ({})", identifiers)

    def missing(self, identifiers: Sequence[int]) -> list[int]:
        """Return those of these numbers that no finished move has."""
        there: set[int] = set()
        for chunk in _chunks([one for one in identifiers if isinstance(one, int) and 0 < one <= _MOST_ROWS]):
            rows = self._rows(
                f"SELECT id FROM moves WHERE +progress = 'done' AND id IN ({_marks(chunk)})",  # noqa: S608 - marks only
                tuple(chunk),
            )
            there.update(row["id"] for row in rows)
        return [identifier for identifier in identifiers if identifier not in there]

    def followers(self, reasons: Sequence[str]) -> list[Record]:
        """Return the moves of late companions with these reasons, newest first."""
        where = "+progress = 'done' AND outcome = 'followed' AND undone_by IS NULL AND reason IN ({})"
        return self._among(where, [plain(reason) for reason in reasons])

    def held(self) -> dict[str, Stamp]:
        """Return the held versions by path relative to the dataset."""
        rows = self._rows("SELECT * FROM holds ORDER BY since")
        with translated(self._path):
            return {_relative_path(row["path"]): _held_stamp(row) for row in rows}

    def held_version(self, path: str) -> Stamp | None:
        """Return the held version of a path relative to the dataset, if any."""
        rows = self._rows("SELECT * FROM holds WHERE path = ?", (os.fsencode(path),))
        with translated(self._path):
            return _held_stamp(rows[0]) if rows else None

    def counts(self) -> dict[str, int]:
        """Return the number of moves with each outcome, including undone ones."""
        rows = self._rows(checks.COUNTS)
        return {row["outcome"]: row["n"] for row in rows}

    def counts_by_day(self, since: float) -> list[tuple[str, str, int]]:
        """Return local day (``2026-03-01``), outcome and number of moves that ended since, without undone ones."""
        return [(row["day"], row["outcome"], row["n"]) for row in self._rows(checks.BY_DAY, (since,))]

    def accuracy(self) -> dict[str, FiledImages]:
        """Return for each class how many of its filed images a person has checked, and what was wrong with them."""
        rows = self._rows(checks.ACCURACY)
        counts = ({name: int(row[name]) for name in row.keys()[1:]} for row in rows)
        return {label_from(row["label"]) or "": FiledImages(**one) for row, one in zip(rows, counts, strict=True)}

    def newest_checked(self, mode: str, most: int) -> list[CheckedImage]:
        """Return the newest filed images that a mode decided and a person has checked."""
        rows = self._rows(checks.NEWEST_CHECKED, (mode, most))
        return [CheckedImage(row["score"], *(bool(value) for value in tuple(row)[1:])) for row in rows]

    def audited_right(self) -> frozenset[int]:
        """Return the moves of filed images that an audit found right."""
        return frozenset(row["move"] for row in self._rows("SELECT move FROM checks WHERE is_right"))

    def to_audit(self) -> list[int]:
        """Return the filed images of which nobody has said whether they are right."""
        return [row["id"] for row in self._rows(checks.TO_AUDIT)]

    def guesses(self) -> tuple[int, int]:
        """Return how many guesses of images in Review/ a person confirmed, and of how many the right class is known."""
        (row,) = self._rows(checks.GUESSES, (label_column(NO_CLASS),))
        return int(row["confirmed"]), row["judged"]

    def given_since(self, since: float) -> dict[str, int]:
        """Return how many images a person assigned, corrected and confirmed since a time (Unix seconds)."""
        return {row["how"]: row["images"] for row in self._rows(checks.GIVEN_SINCE, (since,))}

    def corrections(self) -> list[tuple[str, str, str, float]]:
        """Return each correction as label, corrected label, path relative to the dataset, seconds since the epoch.

        The two labels of an image from Review/ that was moved to the class of its best guess are equal.
        """
        rows = self._rows("SELECT * FROM corrections ORDER BY at")
        with translated(self._path):
            return [
                (os.fsdecode(row["label"]), os.fsdecode(row["corrected"]), _relative_path(row["path"]), row["at"])
                for row in rows
            ]

    def corrected(self, selection: Selection) -> Iterator[tuple[Record, str, str, float]]:
        """Yield the moves whose images a person gave a class, with that class, the path and the time, newest first.

        Run and path of the selection are not compared; the outcome may be ``corrected`` or ``confirmed``.
        """
        conditions: dict[str, Any] = {
            "move = ?": selection.id,
            "corrected = ?": label_column(selection.label),
            "at >= ?": selection.since,
            "at < ?": selection.until,
            "(corrected = label) = ?": None if selection.outcome is None else selection.outcome == "confirmed",
        }
        chosen = {condition: value for condition, value in conditions.items() if value is not None}
        limit = -1 if selection.limit is None else min(selection.limit, _MOST_ROWS)
        where = f"{' AND '.join(['TRUE', *chosen])} ORDER BY at DESC LIMIT ?"
        rows = self._rows(f"SELECT * FROM corrections WHERE {where}", (*chosen.values(), limit))  # noqa: S608 - our own words only
        for chunk in _chunks(rows):
            records = {one.id: one for one in self.finished([row["move"] for row in chunk])}
            for row in chunk:
                with translated(self._path):
                    found = records[row["move"]], os.fsdecode(row["corrected"]), _relative_path(row["path"]), row["at"]
                yield found

    def is_corrected(self, identifier: int) -> bool:
        """Return whether a person gave the image of a move a class."""
        return bool(self._rows("SELECT 1 FROM corrections WHERE move = ?", (identifier,)))

    def assigned(self) -> list[tuple[str | None, str, float]]:
        """Return class, path relative to the dataset, and time of each image that a person assigned and left there.

        An image that the person moved to another class afterwards is a correction instead. The class is None for an
        image of no class that is no example of it.
        """
        uncorrected = "NOT EXISTS (SELECT 1 FROM corrections WHERE move = moves.id)"
        where = f"progress = 'done' AND outcome = 'assigned' AND undone_by IS NULL AND {uncorrected}"
        return [
            (_assigned_label(one), one.destination_path, one.ended_at or 0.0)
            for one in self._records(f"{where} ORDER BY id", ())
        ]

    def filed_at(self, paths: Sequence[str]) -> dict[str, float]:
        """Return when sortd last filed an image at these paths, relative to the dataset, without undone moves."""
        found: dict[str, float] = {}
        for chunk in _chunks(sorted({os.fsencode(path.rpartition("/")[2]) for path in paths})):
            rows = self._rows(checks.FILED_AT.format(_marks(chunk)), tuple(chunk))
            with translated(self._path):
                found |= {os.fsdecode(row["destination"] + b"/" + row["final"]): row["ended_at"] for row in rows}
        return found

    def fact(self, key: str) -> str | None:
        """Return a fact, or None."""
        rows = self._rows("SELECT value FROM facts WHERE key = ?", (key,))
        return rows[0]["value"] if rows else None

    def number(self, key: str) -> int:
        """Return a fact that is an integer; 0 if it was not set."""
        noted = self.fact(key)
        if noted is None:
            return 0
        with translated(self._path):
            try:
                number = int(noted)
            except ValueError:
                number = 2**63
            if abs(number) >= 2**63 - 1:
                raise ValueError(f"the fact {key} is {noted[:40]!r}, not a 64-bit integer")
            return number

    def verify(self) -> None:
        """Check the whole journal; see ``check_journal``."""
        check_journal(self._connection, self._path)

    def last_generation(self) -> int:
        """Return the last generation used; 0: none."""
        return self.number(GENERATION_FACT)

    def guard(self) -> GuardState:
        """Return the last state of the guard; by default, it trusts the last generation."""
        noted = self.fact(GUARD_FACT)
        if noted is None:
            return GuardState(self.last_generation())
        with translated(self._path):
            try:
                match json.loads(noted):
                    case {"trusted": int(trusted), "held": int(held), "reason": str(reason)}:
                        return GuardState(trusted, held, reason)
            except RecursionError:
                pass
            raise ValueError(f"the fact {GUARD_FACT} is {noted[:100]!r}, not a state of the guard")

    def facts_like(self, start: str, part: str = "") -> dict[str, str]:
        """Return the facts whose key starts with ``start`` and whose value contains ``part``."""
        statement = "SELECT key, value FROM facts WHERE key >= ? AND key < ? AND instr(value, ?)"
        rows = self._rows(statement, (start, f"{start}\U0010ffff", part))
        return {row["key"]: row["value"] for row in rows}

    def _first(self, where: str, values: tuple[Any, ...]) -> Record | None:
        """Return the newest move that meets a condition and was not undone."""
        found = self._records(f"{_STANDING} AND {where}", values)
        return found[0] if found else None

    def _among(self, where: str, values: Sequence[Any]) -> list[Record]:
        """Return the records that meet a condition on one of many values, newest first."""
        chunks = list(_chunks(values))
        found = [record for chunk in chunks for record in self._records(where.format(_marks(chunk)), tuple(chunk))]
        return sorted(found, key=lambda record: record.id, reverse=True)

    def _records(self, where: str, values: tuple[Any, ...]) -> list[Record]:
        with translated(self._path):
            rows = self._rows(f"SELECT moves.* FROM moves WHERE {where}", values)  # noqa: S608 - our own words only
            files = self._files([row["id"] for row in rows])
            return [record_from(row, files[row["id"]]) for row in rows]

    def _files(self, moves: list[int]) -> defaultdict[int, list[sqlite3.Row]]:
        found: defaultdict[int, list[sqlite3.Row]] = defaultdict(list)
        for chunk in _chunks(moves):
            for row in self._rows(_FILES.format(_marks(chunk)), tuple(chunk)):
                found[row["move"]].append(row)
        return found

    def _rows(self, statement: str, values: tuple[Any, ...] = ()) -> list[sqlite3.Row]:
        with translated(self._path):
            return self._connection.execute(statement, values).fetchall()


def _selected(selection: Selection) -> tuple[str, tuple[Any, ...]]:
    """Return the condition of the selected finished moves, and its values with the limit."""
    # The plus: read the newest fifty of a million instead of sorting them all; the index of an outcome is sorted.
    is_by_outcome = selection == Selection(outcome=selection.outcome, undoable=True, limit=selection.limit)
    chosen = list(conditions_of(selection))
    done = "progress = 'done'" if selection.outcome and is_by_outcome else "+progress = 'done'"
    conditions, values = [done, *(one for one, _ in chosen)], [value for _, some in chosen for value in some]
    limit = -1 if selection.limit is None else min(selection.limit, _MOST_ROWS)
    return " AND ".join(conditions), (*values, limit)


def _assigned_label(record: Record) -> str | None:
    reason = record.move_reason
    return None if reason.label == NO_CLASS and reason.reason != EXAMPLE_OF_NO_CLASS else reason.label or ""


def _relative_path(column: bytes) -> str:
    """Return a validated path of a file below the dataset."""
    path = os.fsdecode(column)
    if "\0" in path or not {"", ".", ".."}.isdisjoint(path.split("/")):
        raise ValueError(f"{path!r} is not a path below the dataset")
    return path


def _chunks(values: Sequence[_T]) -> Iterator[Sequence[_T]]:
    """Split values into chunks for one statement each."""
    return (values[start : start + _CHUNK] for start in range(0, len(values), _CHUNK))


def _marks(values: Sequence[object]) -> str:
    """Return a question mark for each value."""
    return ",".join("?" * len(values))


def _held_stamp(row: sqlite3.Row) -> Stamp:
    return stamp_from((row["device"], row["inode"], row["size"], row["mtime_ns"]))


def open_for_reading(path: Path) -> sqlite3.Connection:
    """Open a journal read-only; another process may write it. Raises JournalError."""
    if not path.is_file():
        raise JournalError(f"{path}: there is no journal yet; sortd creates it at its first run")

    def prepare(connection: sqlite3.Connection) -> None:
        if check_version(connection, path):
            checks.let_read_without_checks(connection)

    def connect(options: str) -> sqlite3.Connection:
        reader = sqlite3.connect(f"{path.absolute().as_uri()}?{options}", timeout=BUSY_SECONDS, uri=True)
        return opened(reader, prepare)

    with translated(path):
        try:
            return connect("mode=ro")
        except sqlite3.OperationalError:
            # Nobody writes it (there is no -wal), but reading in WAL mode needs a file that sortd may not create.
            if Path(f"{path}-wal").exists():
                raise
            return connect("immutable=1")


def opened(connection: sqlite3.Connection, prepare: Callable[[sqlite3.Connection], object]) -> sqlite3.Connection:
    """Return a connection after ``prepare``; close it on an error."""
    try:
        prepare(connection)
    except BaseException:
        connection.close()
        raise
    return connection


def check_journal(connection: sqlite3.Connection, path: Path) -> None:
    """Check the journal's integrity, and that this version knows its values of progress and role."""
    with translated(path):
        (verdict,) = connection.execute("PRAGMA quick_check(1)").fetchone()
        if verdict != "ok":
            raise ValueError(verdict)
        for question, words in _KNOWN_WORDS:
            found = connection.execute(question.format(_marks(words)), words).fetchone()
            if found is not None:
                raise ValueError(f"record {found[0]} has the unknown value {found[1]!r}")


def check_version(connection: sqlite3.Connection, path: Path) -> int:
    """Return the version of a journal, 0 for an empty file, after checking that this sortd can use it."""
    (application,) = connection.execute("PRAGMA application_id").fetchone()
    (version,) = connection.execute("PRAGMA user_version").fetchone()
    (tables,) = connection.execute("SELECT count(*) FROM sqlite_master").fetchone()
    if (application, version, tables) == (0, 0, 0):
        return 0
    if application != APPLICATION:
        raise JournalError(f"{path}: not a journal of sortd; set another state_dir or move the file away")
    if version not in READABLE:
        raise JournalError(
            f"{path}: the journal has version {version}, this sortd needs version {VERSION}: install the version of "
            "sortd-images that wrote it, or move the journal aside; the images are not affected"
        )
    return int(version)
