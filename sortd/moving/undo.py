"""Undoing: what goes back where, from what still stands where a record put it; never over another file."""

import os
import stat
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from sortd.companions import owners_of
from sortd.events import Outcome, Stamp
from sortd.files import stamp_of
from sortd.moving.fs import Folders, is_version, lstat_at
from sortd.moving.parts import content_of
from sortd.moving.plan import new_token
from sortd.store.records import UNDONE, MoveFile, MoveReason, MoveRecord, Record, Role


@dataclass(frozen=True, slots=True)
class UndoResult:
    """What became of the undoing of one record."""

    record: Record
    restored: str | None  # absolute path where the image stands now, or would; None: it was not put back
    message: str = ""  # why not, or what could not be put back with it


@dataclass(frozen=True, slots=True)
class UndoPlan:
    """The move that takes a record back."""

    record: Record
    move: MoveRecord
    message: str  # what could not be put back with it

    @property
    def move_reason(self) -> MoveReason:
        """Why the image moves."""
        return replace(self.record.move_reason, outcome=UNDONE, undoes=self.record.id)

    def result(self, root: Path, name: str) -> UndoResult:
        """Return what to say once the image stands under a name in its former folder."""
        return UndoResult(self.record, f"{os.fspath(root)}/{self.move.destination}/{name}", self.message)


def plan_undos(root: Path, records: Sequence[Record]) -> list[UndoPlan | UndoResult]:
    """Return how these records are taken back, or why one is not, newest first."""
    newest_first = sorted(records, key=lambda record: record.id, reverse=True)
    try:
        folders = Folders(root)
    except OSError as error:
        return [UndoResult(record, None, f"{root}: {error.strerror}") for record in newest_first]
    with folders:
        return [_plan(folders, record) for record in newest_first]


def preview_undos(root: Path, records: Sequence[Record], back: set[str]) -> list[UndoResult]:
    """Say what undoing these records would do.

    Args:
        root: the dataset.
        records: of the moves to be undone.
        back: where images would stand again, relative to the dataset; those of these records are added.
    """
    foretold: list[UndoResult] = []
    for plan in plan_undos(root, records):
        record = plan.record
        if isinstance(plan, UndoPlan):
            foretold.append(plan.result(root, plan.move.image.wanted))
        elif record.destination_path in back:
            foretold.append(UndoResult(record, f"{os.fspath(root)}/{record.source_path}"))
        else:
            foretold.append(plan)
            continue
        back.add(record.source_path)
    return foretold


def _plan(folders: Folders, record: Record) -> UndoPlan | UndoResult:
    """Look at what still stands where the record put it; decide what goes back."""
    there = record.move
    if record.move_reason.outcome == UNDONE:
        said = "it was put back there by an undo; `sortd release` lets it be filed again"
        return UndoResult(record, None, f"{record.destination_path}: {said}")
    if record.undone_by is not None:
        return UndoResult(record, None, f"{record.destination_path}: undone already")
    try:
        folders.open(there.source.partition("/")[0])  # never made anew: without it, its disk is not mounted
        if (stranger := _stranger(folders, record)) is not None:
            said = f"{there.source}/{stranger} is another image, which it would stand beside; left where it is"
            return UndoResult(record, None, f"{record.destination_path}: {said}")
        return _plan_in(folders, folders.open(there.destination), record)
    except OSError as error:
        return UndoResult(record, None, f"{record.destination_path}: {error.strerror}")


def _stranger(folders: Folders, record: Record) -> str | None:
    """Return the image to which a companion that followed its own would seem to belong where it came from."""
    there = record.move
    if record.move_reason.outcome != Outcome.FOLLOWED or there.source.partition("/")[0] == "Images":
        return None
    try:
        owners = owners_of(there.image.name, folders.names(there.source).near(there.image.name))
    except FileNotFoundError:
        return None  # it is made anew
    return owners[0] if owners else None


def _plan_in(folders: Folders, folder: int, record: Record) -> UndoPlan | UndoResult:
    """Look at the files of a move in its destination folder, which is open."""
    there = record.move
    found = _find(folder, there.image)
    if isinstance(found, str):
        return UndoResult(record, None, f"{record.destination_path}: {found}")
    back, obsolete, left = [_reversed(there.image, Role.IMAGE, found)], [], []
    for file in there.files[1:]:
        if isinstance(stamp := _find(folder, file), str):
            left.append(file.final)
        elif file.role is Role.COMPANION:
            back.append(_reversed(file, Role.COMPANION, stamp))
        elif file.role is Role.REASON or _is_needless(folders, there, file):
            obsolete.append(_reversed(file, file.role, stamp))
        elif not _content(folders, there.source, file.name):
            back.append(_reversed(file, Role.COMPANION, stamp))
        else:
            left.append(file.final)
    move = MoveRecord(
        new_token(),
        there.destination,
        there.source,
        tuple(back),
        obsolete=tuple(obsolete),
        joins=record.move_reason.outcome == Outcome.FOLLOWED,  # what was left behind with it may stand there again
    )
    return UndoPlan(record, move, f"left where they are, changed or gone: {', '.join(left)}" if left else "")


def _is_needless(folders: Folders, there: MoveRecord, file: MoveFile) -> bool:
    """Whether the original of a shared companion still says what our copy of it says."""
    copy = _content(folders, there.destination, file.final)
    return copy != "" and copy == _content(folders, there.source, file.name)


def _content(folders: Folders, folder: str, name: str) -> str:
    try:
        return content_of(folders.open(folder), name)
    except OSError:
        return ""


def _find(folder: int, file: MoveFile) -> Stamp | str:
    """Return the version of a file that stands where it was put, or why it cannot be put back.

    Raises:
        OSError: the disk, or its rights, do not let us look.
    """
    status = lstat_at(folder, file.final) if file.final else None
    if status is None or file.moved_stamp is None:
        return "no longer there: moved or removed since"
    if is_version(status, file.moved_stamp):
        return file.moved_stamp
    # The undoing of a later move may have copied it here: another inode with the same bytes is the same image.
    if stat.S_ISREG(status.st_mode) and file.content and content_of(folder, file.final) == file.content:
        return stamp_of(status)
    return "changed since it was put there; left where it is"


def _reversed(file: MoveFile, role: Role, stamp: Stamp) -> MoveFile:
    return MoveFile(role, file.final, file.name, stamp, content=file.content if role is Role.IMAGE else "")
