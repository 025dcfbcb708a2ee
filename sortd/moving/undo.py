"""Undo: which files of a record go back, from the files that are still where it put them."""

import os
import stat
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from sortd.companions import owners_of
from sortd.events import Outcome, Stamp
from sortd.files import stamp_of
from sortd.moving.copy import sha256_at
from sortd.moving.fs import Folders, is_version, lstat_at
from sortd.moving.plan import new_token
from sortd.store.records import UNDONE, MoveFile, MoveReason, MoveRecord, Record, Role


@dataclass(frozen=True, slots=True)
class UndoResult:
    """The result of undoing one record."""

    record: Record
    restored: str | None  # absolute path of the image after the undo; None: it was not moved back
    message: str = ""  # why not, or which other files were not moved back


@dataclass(frozen=True, slots=True)
class UndoPlan:
    """The move that undoes a record."""

    record: Record
    move: MoveRecord
    message: str  # which other files cannot be moved back

    @property
    def move_reason(self) -> MoveReason:
        """The reason of the move, for the journal."""
        return replace(self.record.move_reason, outcome=UNDONE, undoes=self.record.id)

    def result(self, root: Path, name: str) -> UndoResult:
        """Return the result for an image that has this name in its former folder."""
        return UndoResult(self.record, f"{os.fspath(root)}/{self.move.destination}/{name}", self.message)


def plan_undos(root: Path, records: Sequence[Record]) -> list[UndoPlan | UndoResult]:
    """Return for each record, newest first, the move that undoes it, or the result if it cannot be undone."""
    newest_first = sorted(records, key=lambda record: record.id, reverse=True)
    try:
        folders = Folders(root)
    except OSError as error:
        return [UndoResult(record, None, f"{root}: {error.strerror}") for record in newest_first]
    with folders:
        return [_plan(folders, record) for record in newest_first]


def preview_undos(root: Path, records: Sequence[Record], back: set[str]) -> list[UndoResult]:
    """Return what undoing these records would do.

    ``back`` contains the paths, relative to the dataset, of images that earlier undos would restore; those of these
    records are added.
    """
    results: list[UndoResult] = []
    for plan in plan_undos(root, records):
        record = plan.record
        if isinstance(plan, UndoPlan):
            results.append(plan.result(root, plan.move.image.wanted))
        elif record.destination_path in back:
            results.append(UndoResult(record, f"{os.fspath(root)}/{record.source_path}"))
        else:
            results.append(plan)
            continue
        back.add(record.source_path)
    return results


def _plan(folders: Folders, record: Record) -> UndoPlan | UndoResult:
    move, path = record.move, record.destination_path
    if record.move_reason.outcome == UNDONE:
        said = "an undo put it there; `sortd release` lets it be filed again"
        return UndoResult(record, None, f"{path}: {said}")
    if record.undone_by is not None:
        return UndoResult(record, None, f"{path}: already undone")
    try:
        folders.open(move.source.partition("/")[0])  # never created: without this folder, its disk is not mounted
        if (stranger := _stranger(folders, record)) is not None:
            said = f"it would seem to belong to another image, {move.source}/{stranger}; left where it is"
            return UndoResult(record, None, f"{path}: {said}")
        return _plan_in(folders, folders.open(move.destination), record)
    except OSError as error:
        return UndoResult(record, None, f"{path}: {error.strerror}")


def _stranger(folders: Folders, record: Record) -> str | None:
    """Return the image to which a companion that followed its own would seem to belong in its former folder."""
    move = record.move
    if record.move_reason.outcome != Outcome.FOLLOWED or move.source.partition("/")[0] == "Images":
        return None
    try:
        owners = owners_of(move.image.name, folders.names(move.source).near(move.image.name))
    except FileNotFoundError:
        return None  # the undo creates the folder
    return owners[0] if owners else None


def _plan_in(folders: Folders, folder: int, record: Record) -> UndoPlan | UndoResult:
    """Plan the undo from the files in the destination folder of a move, which is open."""
    move = record.move
    found = _find(folder, move.image)
    if isinstance(found, str):
        return UndoResult(record, None, f"{record.destination_path}: {found}")
    back, obsolete, left = [_reversed(move.image, Role.IMAGE, found)], [], []
    for file in move.files[1:]:
        if isinstance(stamp := _find(folder, file), str):
            left.append(file.final)
            continue
        original = "" if file.role is not Role.SHARED else _content(folders, move.source, file.name)
        if file.role is Role.REASON or (original and original == _content(folders, move.destination, file.final)):
            obsolete.append(_reversed(file, file.role, stamp))
        elif original:  # it differs from the copy, and both are kept
            left.append(file.final)
        else:
            back.append(_reversed(file, Role.COMPANION, stamp))
    undo = MoveRecord(
        new_token(),
        move.destination,
        move.source,
        tuple(back),
        obsolete=tuple(obsolete),
        joins=record.move_reason.outcome == Outcome.FOLLOWED,  # files that it belongs to may be in the folder
    )
    return UndoPlan(record, undo, f"left where they are, changed or gone: {', '.join(left)}" if left else "")


def _content(folders: Folders, folder: str, name: str) -> str:
    try:
        return sha256_at(folders.open(folder), name)
    except OSError:
        return ""


def _find(folder: int, file: MoveFile) -> Stamp | str:
    """Return the version of a file where its move put it, or why it cannot be moved back.

    Raises:
        OSError: the folder cannot be read.
    """
    status = lstat_at(folder, file.final) if file.final else None
    if status is None or file.moved_stamp is None:
        return "no longer there: moved or removed since"
    if is_version(status, file.moved_stamp):
        return file.moved_stamp
    # Undoing a later move may have copied the file here: another inode with the same bytes is the same image.
    if stat.S_ISREG(status.st_mode) and file.content and sha256_at(folder, file.final) == file.content:
        return stamp_of(status)
    return "changed since it was put there; left where it is"


def _reversed(file: MoveFile, role: Role, stamp: Stamp) -> MoveFile:
    return MoveFile(role, file.final, file.name, stamp, content=file.content if role is Role.IMAGE else "")
