"""What the journal keeps and tells: grounds, records and selections, with their way into and out of its rows."""

import os
import sqlite3
from dataclasses import dataclass, replace
from typing import Any

from sortd.events import Stamp, signed
from sortd.moving.relocation import Member, Progress, Relocation, Role, checked_folder, checked_name
from sortd.prototypes import Abstained, Assigned, Decision

UNDONE = "undone"
"""Outcome of a relocation that takes another one back."""


@dataclass(frozen=True, slots=True)
class Grounds:
    """Why a relocation was ordered; written before it begins."""

    outcome: str  # a value of ``messages.Outcome``, or "undone"
    label: str | None = None  # the class it was filed into, or the best guess
    score: float | None = None
    margin: float | None = None
    second_label: str | None = None
    mode: str | None = None
    reason: str = ""
    generation: int = 0
    encoder_id: str = ""
    content: str = ""  # hexadecimal sha256 of the image, where it is known
    undoes: int | None = None  # id of the record that is taken back

    @classmethod
    def of(cls, decision: Decision | None, outcome: str) -> "Grounds":
        """Return the grounds that a decision gives; without one, the file was refused."""
        match decision:
            case Assigned():
                label: str | None = decision.label
            case Abstained():
                label = decision.best_label
            case None:
                return cls(outcome)
        return cls(
            outcome,
            label,
            float(decision.score),
            float(decision.margin),
            decision.second_label,
            str(decision.mode),
            decision.reason if isinstance(decision, Abstained) else "",
        )


@dataclass(frozen=True, slots=True)
class Record:
    """One finished relocation, as the journal tells it; folders are relative to the dataset."""

    id: int
    run: str
    grounds: Grounds
    relocation: Relocation
    intended_at: float  # seconds since the epoch
    ended_at: float | None  # None while it is open
    undone_by: int | None

    @property
    def source_path(self) -> str:
        """Where the image was, relative to the dataset."""
        return f"{self.relocation.source}/{self.relocation.image.name}"

    @property
    def destination_path(self) -> str:
        """Where the image went, relative to the dataset."""
        return f"{self.relocation.destination}/{self.relocation.image.final}"


@dataclass(frozen=True, slots=True)
class FiledImages:
    """What became of the images that were filed into one class, as far as a person has looked at them.

    Whoever corrects or undoes an image of a class has looked at that class: what was filed into it until then counts as
    checked, and as right unless it was corrected or undone.
    """

    filed: int
    checked: int
    corrected: int
    """Moved to another class by hand."""
    undone: int
    """Taken back by ``sortd undo``."""

    @property
    def right(self) -> int:
        """How many of those checked were neither corrected nor undone."""
        return self.checked - self.corrected - self.undone


@dataclass(frozen=True, slots=True)
class Selection:
    """Which records are asked for; every condition that is given must hold, newest first."""

    label: str | None = None
    outcome: str | None = None
    since: float | None = None  # seconds since the epoch, inclusive
    until: float | None = None  # exclusive
    run: str | None = None
    path: str | None = None  # relative to the dataset; where the image was or went
    id: int | None = None
    undoable: bool = False  # neither undone nor an undo itself
    limit: int | None = None


def stamp_from(columns: tuple[int, int, int, int]) -> Stamp:
    """Return the stamp whose ``columns`` were written."""
    return Stamp(columns[0] % 2**64, columns[1] % 2**64, columns[2], columns[3])


SPENT_FROM = 1_000_000
"""Positions from here on are of ``Relocation.spent``."""


def member_rows(move: int, relocation: Relocation) -> list[tuple[Any, ...]]:
    """Return all members of a relocation, spent ones behind them, as rows of their table."""
    members = [member_row(move, position, member) for position, member in enumerate(relocation.members)]
    return members + [
        member_row(move, SPENT_FROM + position, member) for position, member in enumerate(relocation.spent)
    ]


def member_row(move: int, position: int, member: Member) -> tuple[Any, ...]:
    """Return a member as a row of its table."""
    moved = (None,) * 4 if member.moved_stamp is None else member.moved_stamp.columns
    return (
        move,
        position,
        member.role.value,
        os.fsencode(member.name),
        os.fsencode(member.wanted),
        member.content,
        member.body,
        signed(member.copy_inode),
        os.fsencode(member.final),
        *member.stamp.columns,
        *moved,
    )


def member_from(row: sqlite3.Row) -> Member:
    """Return what ``member_row`` wrote.

    Raises:
        FolderNameError: a name in it would lead to another folder.
        ValueError: it says something else that no sortd writes.
    """
    moved = (row["moved_device"], row["moved_inode"], row["moved_size"], row["moved_mtime_ns"])
    if 0 < moved.count(None) < len(moved):
        raise ValueError("half a stamp")
    final = os.fsdecode(row["final"])
    return Member(
        role=Role(row["role"]),
        name=checked_name(os.fsdecode(row["name"])),
        wanted=checked_name(os.fsdecode(row["wanted"])),
        stamp=stamp_from((row["device"], row["inode"], row["size"], row["mtime_ns"])),
        content=row["content"],
        body=row["body"],
        copy_inode=row["copy_inode"] % 2**64,
        final=checked_name(final) if final else "",
        moved_stamp=None if None in moved else stamp_from(moved),
    )


def relocation_from(row: sqlite3.Row, members: tuple[Member, ...], spent: tuple[Member, ...]) -> Relocation:
    """Return the relocation of a row of ``moves``.

    Raises:
        FolderNameError: a folder in it is none that sortd moves files between.
    """
    return Relocation(
        token=row["token"],
        source=checked_folder(os.fsdecode(row["source"])),
        destination=checked_folder(os.fsdecode(row["destination"])),
        members=members,
        progress=Progress(row["progress"]),
        lost=tuple(row["lost"].split("\n")) if row["lost"] else (),
        message=row["message"],
        spent=spent,
    )


def record_from(row: sqlite3.Row, member_rows_of_it: list[sqlite3.Row]) -> Record:
    """Return the record of a row of ``moves`` and the rows of its members.

    Raises:
        FolderNameError: a name or a folder in it is none that sortd moves files between.
        ValueError, TypeError: it says something else that no sortd writes.
    """
    if not any(one["position"] == 0 for one in member_rows_of_it):
        raise ValueError("it names no image")
    if row["progress"] == Progress.DONE and row["ended_at"] is None:
        raise ValueError("it ended at no time")
    members = tuple(member_from(one) for one in member_rows_of_it if one["position"] < SPENT_FROM)
    spent = tuple(member_from(one) for one in member_rows_of_it if one["position"] >= SPENT_FROM)
    grounds = Grounds(
        outcome=row["outcome"],
        label=label_from(row["label"]),
        score=row["score"],
        margin=row["margin"],
        second_label=label_from(row["second_label"]),
        mode=row["mode"],
        reason=row["reason"],
        generation=row["generation"],
        encoder_id=row["encoder_id"],
        content=row["content"],
        undoes=row["undoes"],
    )
    return Record(
        id=row["id"],
        run=row["run"],
        grounds=grounds,
        relocation=relocation_from(row, members, spent),
        intended_at=row["intended_at"],
        ended_at=row["ended_at"],
        undone_by=row["undone_by"],
    )


def with_reason(grounds: Grounds, *, reason: str, generation: int, encoder_id: str, content: str) -> Grounds:
    """Return grounds with what the order itself said."""
    return replace(
        grounds,
        reason=reason or grounds.reason,
        generation=generation,
        encoder_id=encoder_id,
        content=content,
    )


def label_column(label: str | None) -> bytes | None:
    """Return a class as its folder's bytes: its name need not be UTF-8."""
    return None if label is None else os.fsencode(label)


def label_from(column: bytes | None) -> str | None:
    """Return what ``label_column`` wrote."""
    return None if column is None else os.fsdecode(column)


def plain(text: str) -> str:
    """Return a text that SQLite takes: bytes of names that are not UTF-8 are spelled out."""
    return text.encode("utf-8", "backslashreplace").decode("utf-8")
