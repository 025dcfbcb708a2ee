"""The records of the journal: moves, why each was ordered, which are asked for; with their way into and out of rows.

A journal is a file too: what it names is checked like any other input before something is renamed or removed.
"""

import os
from dataclasses import asdict, dataclass, fields, replace
from enum import StrEnum
from typing import TYPE_CHECKING, Any, Self

from sortd.classify.types import Abstained, Assigned, Decision
from sortd.events import Stamp, signed

if TYPE_CHECKING:
    import sqlite3

UNDONE = "undone"  # outcome of a move that takes another one back
OBSOLETE_FROM = 1_000_000  # positions from here on are of MoveRecord.obsolete

TOPS = frozenset({"Images", "Dataset", "Review", "Rejected"})
"""The only folders of a dataset between which sortd moves anything."""

LONGEST_NAME = 255  # bytes in one name, not characters, on every file system that sortd was tried on


class Role(StrEnum):
    """What a file of a move is to its image."""

    IMAGE = "image"
    COMPANION = "companion"  # travels with the image
    SHARED = "shared"  # belongs to another image too: copied, the original stays
    REASON = "reason"  # made by sortd, beside an image that it set aside


class MoveProgress(StrEnum):
    """How far a move has come; each word is durable before the next step begins."""

    INTENDED = "intended"  # any of its files may have been renamed; no copy counts for anything
    PUBLISHING = "publishing"  # whole copies stand in the destination, known by inode and hash
    PUBLISHED = "published"  # the copies stand durably under their final names; the sources may go
    DONE = "done"
    FAILED = "failed"  # every file is where it was


@dataclass(frozen=True, slots=True)
class MoveFile:
    """One file of a move."""

    role: Role
    name: str  # base name in the source folder; of a reason, its own wanted name
    wanted: str  # base name in the destination folder, where it is free
    stamp: Stamp  # the version that is meant; of a reason, zeros
    content: str = ""  # hexadecimal sha256, where it is known
    body: bytes = b""  # of a reason: all its bytes
    copy_inode: int = 0  # of the copy, from PUBLISHING on
    final: str = ""  # base name that it got
    moved_stamp: Stamp | None = None

    @property
    def leaves(self) -> bool:
        """Whether this file leaves the source folder; the others are made in the destination."""
        return self.role in {Role.IMAGE, Role.COMPANION}


@dataclass(frozen=True, slots=True)
class MoveRecord:
    """An image (always the first file) and its companions: all of them go, or none."""

    token: str  # 16 hexadecimal digits, never used twice
    source: str  # folder, relative to the dataset
    destination: str
    files: tuple[MoveFile, ...]
    progress: MoveProgress = MoveProgress.INTENDED
    lost: tuple[str, ...] = ()  # metadata that could not be kept
    message: str = ""
    obsolete: tuple[MoveFile, ...] = ()  # made by sortd in the source folder, of no use once the image is away
    joins: bool = False  # its only file comes to its image: what of that image stands there is not in its way

    @property
    def image(self) -> MoveFile:
        """The file that was decided on."""
        return self.files[0]

    def with_file(self, file: MoveFile) -> Self:
        """Return the same move with one more file."""
        return replace(self, files=(*self.files, file))

    def part_name(self, position: int) -> str:
        """Return the name, in the destination folder, of a copy that is not published yet."""
        return f".sortd-{self.token}.{position}.part"

    def tombstone(self, position: int) -> str:
        """Return the name, in the source folder, of a source that was copied and is to go."""
        return f".sortd-{self.token}.{position}.del"

    def failed(self, message: str) -> Self:
        """Return the same move, taken back."""
        return replace(self, progress=MoveProgress.FAILED, message=message)


class FolderNameError(ValueError):
    """A folder that sortd must not touch was named."""


def checked_folder(folder: str) -> str:
    """Return ``folder`` if it is a plain path below one of the dataset's four folders.

    Raises:
        FolderNameError: it is absolute, climbs, hides, or begins elsewhere.
    """
    components = folder.split("/")
    if components[0] not in TOPS or any(part in {"", ".", ".."} or "\0" in part for part in components):
        raise FolderNameError(f"{folder!r} is no folder that sortd moves files between ({', '.join(sorted(TOPS))})")
    if components[0] != "Images" and any(_is_unfit_for_a_class(part) for part in components):
        raise FolderNameError(f"{folder!r} holds a class name that begins with a dot or has control characters")
    return folder


def checked_name(name: str) -> str:
    """Return ``name`` if it is the base name of a file.

    Raises:
        FolderNameError: it is empty or leads to another folder.
    """
    if name in {"", ".", ".."} or "/" in name or "\0" in name:
        raise FolderNameError(f"{name!r} is no name of a file")
    return name


def _is_unfit_for_a_class(part: str) -> bool:
    return part.startswith(".") or any(ord(character) < ord(" ") or character == "\x7f" for character in part)


@dataclass(frozen=True, slots=True)
class MoveReason:
    """Why a move was ordered; written before it begins."""

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
    def of(cls, decision: Decision | None, outcome: str) -> "MoveReason":
        """Return the reason that a decision gives; without one, the file was refused."""
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

    @property
    def columns(self) -> dict[str, Any]:
        """What the journal keeps of it, by column; a class as its folder's bytes, which need not be UTF-8."""
        labels = {"label": label_column(self.label), "second_label": label_column(self.second_label)}
        return {**asdict(self), **labels, "reason": plain(self.reason)}


@dataclass(frozen=True, slots=True)
class Record:
    """One move as the journal tells it; folders are relative to the dataset."""

    id: int
    run: str
    move_reason: MoveReason
    move: MoveRecord
    intended_at: float  # seconds since the epoch
    ended_at: float | None  # None while it is open
    undone_by: int | None

    @property
    def source_path(self) -> str:
        """Where the image was, relative to the dataset."""
        return f"{self.move.source}/{self.move.image.name}"

    @property
    def destination_path(self) -> str:
        """Where the image went, relative to the dataset."""
        return f"{self.move.destination}/{self.move.image.final}"


@dataclass(frozen=True, slots=True)
class FiledImages:
    """What became of the images that were filed into one class, as far as a person has looked at them.

    Whoever corrects or undoes an image of a class has looked at that class: what was filed into it until then counts as
    checked, and as right unless it was corrected or undone.
    """

    filed: int
    checked: int
    corrected: int  # moved to another class by hand
    undone: int  # taken back by sortd undo

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


def file_rows(move_id: int, move: MoveRecord) -> list[tuple[Any, ...]]:
    """Return all files of a move, obsolete ones behind them, as rows of their table."""
    places = [*enumerate(move.files), *enumerate(move.obsolete, OBSOLETE_FROM)]
    return [
        (
            move_id,
            position,
            file.role.value,
            os.fsencode(file.name),
            os.fsencode(file.wanted),
            file.content,
            file.body,
            signed(file.copy_inode),
            os.fsencode(file.final),
            *file.stamp.columns,
            *((None,) * 4 if file.moved_stamp is None else file.moved_stamp.columns),
        )
        for position, file in places
    ]


def _file_from(row: "sqlite3.Row") -> MoveFile:
    """Return what ``file_rows`` wrote; see ``record_from`` for what it raises."""
    moved = (row["moved_device"], row["moved_inode"], row["moved_size"], row["moved_mtime_ns"])
    if 0 < moved.count(None) < len(moved):
        raise ValueError("half a stamp")
    final = os.fsdecode(row["final"])
    return MoveFile(
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


def record_from(row: "sqlite3.Row", files: "list[sqlite3.Row]") -> Record:
    """Return the record of a row of ``moves`` and the rows of its files.

    Raises:
        ValueError: it says something that no sortd writes, or names a folder that sortd moves no files between.
    """
    try:
        return _record_from(row, files)
    except (ValueError, TypeError) as error:
        raise ValueError(f"record {row['id']}: {error}") from error


def _record_from(row: "sqlite3.Row", files: "list[sqlite3.Row]") -> Record:
    if not any(one["position"] == 0 for one in files):
        raise ValueError("it names no image")
    if row["progress"] == MoveProgress.DONE and row["ended_at"] is None:
        raise ValueError("it ended at no time")
    move = MoveRecord(
        token=row["token"],
        source=checked_folder(os.fsdecode(row["source"])),
        destination=checked_folder(os.fsdecode(row["destination"])),
        files=tuple(_file_from(one) for one in files if one["position"] < OBSOLETE_FROM),
        progress=MoveProgress(row["progress"]),
        lost=tuple(row["lost"].split("\n")) if row["lost"] else (),
        message=row["message"],
        obsolete=tuple(_file_from(one) for one in files if one["position"] >= OBSOLETE_FROM),
    )
    columns = {field.name: row[field.name] for field in fields(MoveReason)}
    labels = {"label": label_from(row["label"]), "second_label": label_from(row["second_label"])}
    move_reason = MoveReason(**{**columns, **labels})
    return Record(row["id"], row["run"], move_reason, move, row["intended_at"], row["ended_at"], row["undone_by"])


def label_column(label: str | None) -> bytes | None:
    """Return a class as its folder's bytes: its name need not be UTF-8."""
    return None if label is None else os.fsencode(label)


def label_from(column: bytes | None) -> str | None:
    """Return what ``label_column`` wrote."""
    return None if column is None else os.fsdecode(column)


def plain(text: str) -> str:
    """Return a text that SQLite takes: bytes of names that are not UTF-8 are spelled out."""
    return text.encode("utf-8", "backslashreplace").decode("utf-8")
