"""The records of the journal: moves, their reasons, and their conversion to and from rows.

A journal may be damaged: its paths are validated like any other input before a file is renamed or removed.
"""

import os
import re
from dataclasses import asdict, dataclass, fields, replace
from enum import StrEnum
from typing import TYPE_CHECKING, Any, Self

from sortd.events import Abstained, Assigned, Decision, Stamp, signed

if TYPE_CHECKING:
    import sqlite3

UNDONE = "undone"  # outcome of a move that undoes another one
EXAMPLE_OF_NO_CLASS = "assigned to no class by a person, as an example"
"""The reason of a move of an image that is an example of no class from then on."""
OBSOLETE_FROM = 1_000_000  # the positions of MoveRecord.obsolete start here

SAME_CONTENT = "="
"""The content of a file in the table of files, if it is that of its move."""

TOPS = frozenset({"Images", "Dataset", "Review", "Rejected"})
"""The only folders of a dataset between which sortd moves files."""

PLACES_FACT = "places:"
"""Followed by a record's number: a JSON list of where its image was last seen and where companions may remain."""

_CONTROL = re.compile(r"[\x00-\x1f\x7f]")

LONGEST_NAME = 255  # bytes, not characters, in a name on every tested file system


class Role(StrEnum):
    """The relation of a file to the image of its move."""

    IMAGE = "image"
    COMPANION = "companion"  # moves with the image
    SHARED = "shared"  # a companion of another image as well: copied
    REASON = "reason"  # written by sortd beside a rejected image
    # The files of an image that stays in Images/, and of its companions, have the action as their role:
    COPY = "copy"
    HARDLINK = "hardlink"
    SYMLINK = "symlink"
    KEYWORDS = "keywords"
    SIDECAR = "sidecar"  # written with the keywords of an image that stays
    FORMER = "former"  # the sidecar that was there before
    REMOVED = "removed"  # a copy or link that an undo removes; its original is in the destination


_STAYING = ", ".join(f"'{role.value}'" for role in (Role.COPY, Role.HARDLINK, Role.SYMLINK, Role.KEYWORDS))
OF_STAYING_IMAGE = f"position = 0 AND role IN ({_STAYING})"
"""The condition of the rows of ``members`` of images that stayed where they were; their partial index has it."""


class MoveProgress(StrEnum):
    """The progress of a move; each value is durable before the next step begins."""

    INTENDED = "intended"  # any file may have been renamed; copies do not count
    PUBLISHING = "publishing"  # complete copies are in the destination, known by inode and hash
    PUBLISHED = "published"  # the copies have durable final names; the sources may be removed
    DONE = "done"
    FAILED = "failed"  # the files that still exist are in the source folder, or named in ``message``


@dataclass(frozen=True, slots=True)
class MoveFile:
    """One file of a move."""

    role: Role
    name: str  # base name in the source folder; for a reason, the image's
    wanted: str  # base name to use in the destination folder if it is free
    stamp: Stamp  # the decided version; for a reason and a new sidecar, zeros
    content: str = ""  # hexadecimal sha256, if known
    body: bytes = b""  # the bytes of a reason or a sidecar; the target of a symbolic link
    copy_inode: int = 0  # of the copy, from PUBLISHING on
    final: str = ""  # base name in the destination folder
    moved_stamp: Stamp | None = None

    @property
    def leaves(self) -> bool:
        """Whether this file leaves the source folder; other files are made in the destination."""
        return self.role in {Role.IMAGE, Role.COMPANION}

    @property
    def may_be_last(self) -> bool:
        """Whether a copy of this file may be the last one, if its source is gone."""
        return self.leaves or self.role is Role.COPY


@dataclass(frozen=True, slots=True)
class MoveRecord:
    """The move of an image (always the first file) and its companions: all of them or none."""

    token: str  # 16 hexadecimal digits, never used twice
    source: str  # folder, relative to the dataset
    destination: str
    files: tuple[MoveFile, ...]
    progress: MoveProgress = MoveProgress.INTENDED
    lost: tuple[str, ...] = ()  # metadata that could not be kept
    message: str = ""
    obsolete: tuple[MoveFile, ...] = ()  # files of sortd in the source folder, removed when the image leaves
    joins: bool = False  # a companion moves to its image, whose files do not make its name count as taken

    @property
    def image(self) -> MoveFile:
        """The image."""
        return self.files[0]

    @property
    def stays(self) -> bool:
        """Whether the image stays: a copy or link of it is made or removed, or its sidecar is changed."""
        return not self.image.leaves

    @property
    def action(self) -> str:
        """What was done with the image: a value of ``events.Action``, or ``removed`` by an undo of a copy or link."""
        return "move" if self.image.leaves else self.image.role.value

    def with_file(self, file: MoveFile) -> Self:
        """Return the move with one more file."""
        return replace(self, files=(*self.files, file))

    def part_name(self, position: int) -> str:
        """Return the hidden name, in the destination folder, of an unpublished copy."""
        return f".sortd-{self.token}.{position}.part"

    def tombstone(self, position: int) -> str:
        """Return the hidden name, in the source folder, of a copied source that is about to be removed."""
        return f".sortd-{self.token}.{position}.del"

    def failed(self, message: str) -> Self:
        """Return the move with progress FAILED and a message."""
        return replace(self, progress=MoveProgress.FAILED, message=message)


class FolderNameError(ValueError):
    """A path is not one between which sortd moves files."""


def checked_folder(folder: str) -> str:
    """Return ``folder`` if it is a plain path below one of the dataset's four folders.

    Raises:
        FolderNameError: it is absolute, contains ``..``, is hidden, or starts with another folder.
    """
    components = folder.split("/")
    if components[0] not in TOPS or any(part in {"", ".", ".."} or "\0" in part for part in components):
        raise FolderNameError(f"{folder!r} is not below one of {', '.join(sorted(TOPS))}")
    if components[0] != "Images" and any(part.startswith(".") or _CONTROL.search(part) for part in components):
        raise FolderNameError(f"{folder!r} contains a class name with an initial dot or a control character")
    return folder


def checked_name(name: str) -> str:
    """Return ``name`` if it is the base name of a file.

    Raises:
        FolderNameError: it is empty or refers to another folder.
    """
    if name in {"", ".", ".."} or "/" in name or "\0" in name:
        raise FolderNameError(f"{name!r} is not the name of a file")
    return name


@dataclass(frozen=True, slots=True)
class MoveReason:
    """The reason of a move, recorded before it begins."""

    outcome: str  # a value of ``events.Outcome``, or "undone"
    label: str | None = None  # the class that it was filed into, or the best guess
    score: float | None = None
    margin: float | None = None
    second_label: str | None = None
    mode: str | None = None
    reason: str = ""
    generation: int = 0
    encoder_id: str = ""
    content: str = ""  # hexadecimal sha256 of the image, if known
    undoes: int | None = None  # id of the record that this move undoes

    @classmethod
    def of(cls, decision: Decision | None, outcome: str) -> "MoveReason":
        """Return the reason for a decision; None: the file was refused."""
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
        """The values by column; a class as its folder's bytes, which may not be UTF-8."""
        labels = {"label": label_column(self.label), "second_label": label_column(self.second_label)}
        return {**asdict(self), **labels, "reason": plain(self.reason)}


@dataclass(frozen=True, slots=True)
class Record:
    """One move in the journal; folders are relative to the dataset."""

    id: int
    run: str
    move_reason: MoveReason
    move: MoveRecord
    intended_at: float  # seconds since the epoch
    ended_at: float | None  # None: it has not ended
    undone_by: int | None

    @property
    def source_path(self) -> str:
        """The former path of the image, relative to the dataset."""
        return f"{self.move.source}/{self.move.image.name}"

    @property
    def destination_path(self) -> str:
        """The path to which the image was moved, relative to the dataset."""
        return f"{self.move.destination}/{self.move.image.final}"


@dataclass(frozen=True, slots=True)
class Selection:
    """A query for records, newest first; a record must meet every given condition."""

    label: str | None = None
    outcome: str | None = None
    since: float | None = None  # seconds since the epoch, inclusive
    until: float | None = None  # exclusive
    run: str | None = None
    path: str | None = None  # before or after the move, relative to the dataset
    id: int | None = None
    undoable: bool = False  # neither undone nor an undo
    limit: int | None = None


def stamp_from(columns: tuple[int, int, int, int]) -> Stamp:
    """Return the stamp with these ``columns``."""
    return Stamp(columns[0] % 2**64, columns[1] % 2**64, columns[2], columns[3])


def file_rows(move_id: int, move: MoveRecord, content: str) -> list[tuple[Any, ...]]:
    """Return the rows of a move's files, the obsolete ones last, for the table ``members``.

    What most rows would repeat is left out: ``wanted`` if it is the name, and the sha256 if it is ``content``.
    """
    places = [*enumerate(move.files), *enumerate(move.obsolete, OBSOLETE_FROM)]
    return [
        (
            move_id,
            position,
            file.role.value,
            os.fsencode(file.name),
            b"" if file.wanted == file.name else os.fsencode(file.wanted),
            SAME_CONTENT if file.content and file.content == content else file.content,
            file.body,
            signed(file.copy_inode),
            os.fsencode(file.final),
            *file.stamp.columns,
            *((None,) * 4 if file.moved_stamp is None else file.moved_stamp.columns),
        )
        for position, file in places
    ]


def _file_from(row: "sqlite3.Row", content: str) -> MoveFile:
    """Reverse ``file_rows``; see ``record_from`` for the errors."""
    moved = (row["moved_device"], row["moved_inode"], row["moved_size"], row["moved_mtime_ns"])
    if 0 < moved.count(None) < len(moved):
        raise ValueError("incomplete stamp")
    final = os.fsdecode(row["final"])
    return MoveFile(
        role=Role(row["role"]),
        name=checked_name(os.fsdecode(row["name"])),
        wanted=checked_name(os.fsdecode(row["wanted"] or row["name"])),
        stamp=stamp_from((row["device"], row["inode"], row["size"], row["mtime_ns"])),
        content=content if row["content"] == SAME_CONTENT else row["content"],
        body=row["body"],
        copy_inode=row["copy_inode"] % 2**64,
        final=checked_name(final) if final else "",
        moved_stamp=None if None in moved else stamp_from(moved),
    )


def record_from(row: "sqlite3.Row", files: "list[sqlite3.Row]") -> Record:
    """Return the record of a row of ``moves`` and the rows of its files.

    Raises:
        ValueError: a value is one that sortd does not write.
    """
    try:
        return _record_from(row, files)
    except (ValueError, TypeError) as error:
        raise ValueError(f"record {row['id']}: {error}") from error


def _record_from(row: "sqlite3.Row", files: "list[sqlite3.Row]") -> Record:
    if not any(one["position"] == 0 for one in files):
        raise ValueError("it has no image")
    if row["progress"] == MoveProgress.DONE and row["ended_at"] is None:
        raise ValueError("it has no time of its end")
    move = MoveRecord(
        token=row["token"],
        source=checked_folder(os.fsdecode(row["source"])),
        destination=checked_folder(os.fsdecode(row["destination"])),
        files=tuple(_file_from(one, row["content"]) for one in files if one["position"] < OBSOLETE_FROM),
        progress=MoveProgress(row["progress"]),
        lost=tuple(row["lost"].split("\n")) if row["lost"] else (),
        message=row["message"],
        obsolete=tuple(_file_from(one, row["content"]) for one in files if one["position"] >= OBSOLETE_FROM),
    )
    columns = {field.name: row[field.name] for field in fields(MoveReason)}
    labels = {"label": label_from(row["label"]), "second_label": label_from(row["second_label"])}
    move_reason = MoveReason(**{**columns, **labels})
    return Record(row["id"], row["run"], move_reason, move, row["intended_at"], row["ended_at"], row["undone_by"])


def conditions_of(selection: Selection) -> list[tuple[str, list[Any]]]:
    """Return the conditions of a selection, as SQL on the table of moves, with their values."""
    found: list[tuple[str, list[Any]]] = []
    simple = {
        "moves.label = ?": label_column(selection.label),
        "outcome = ?": selection.outcome,
        "ended_at >= ?": selection.since,
        "ended_at < ?": selection.until,
        "run = ?": selection.run,
        "moves.id = ?": selection.id,
    }
    found += [(condition, [value]) for condition, value in simple.items() if value is not None]
    if selection.undoable:
        found.append(("undone_by IS NULL AND outcome != 'undone'", []))
    if selection.path is not None:
        folder, _, name = selection.path.rpartition("/")
        at = [os.fsencode(folder), os.fsencode(name)]
        place = "({} = ? AND moves.id IN (SELECT move FROM members WHERE {} = ? AND position = 0))"
        found.append((f"({place.format('source', 'name')} OR {place.format('destination', 'final')})", at + at))
    return found


def label_column(label: str | None) -> bytes | None:
    """Return a class as its folder's bytes, because its name may not be UTF-8."""
    return None if label is None else os.fsencode(label)


def label_from(column: bytes | None) -> str | None:
    """Reverse ``label_column``."""
    return None if column is None else os.fsdecode(column)


def plain(text: str) -> str:
    """Return a text that SQLite accepts: bytes that are not UTF-8 are escaped."""
    return text.encode("utf-8", "backslashreplace").decode("utf-8")
