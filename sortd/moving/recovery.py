"""Recovery of a move that did not end, after errors and crashes, and undo of one that did, from the files that exist.

Nothing is removed unless the same bytes are known to exist elsewhere. Recovery is idempotent. An undo is planned here
and carried out as a move; only the files that are still where their move put them go back.
"""

import hashlib
import os
import re
import stat
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path

from sortd.companions import owners_of, split_name
from sortd.errors import ChangedError
from sortd.events import Outcome, Stamp
from sortd.files import stamp_of, sync_folder
from sortd.moving.actions import plan_reversal, recover_action
from sortd.moving.copy import (
    Advance,
    make_part,
    mark_published,
    publish_under_free_name,
    remove_obsolete,
    remove_part,
    remove_sources,
    restore_name,
    sha256_at,
    with_final,
)
from sortd.moving.fs import Folders, is_version, lstat_at, names_by_inode, rename_new
from sortd.moving.plan import MOST_ATTEMPTS, final_names, names_of_one, new_token
from sortd.store.records import UNDONE, MoveFile, MoveProgress, MoveReason, MoveRecord, Record, Role

_NUMBERED = re.compile(r" \((\d+)\)$")


@dataclass(frozen=True, slots=True)
class _Places:
    """Descriptors of the two folders of a move; -1 for a missing folder."""

    source: int
    destination: int


def recover(folders: Folders, move: MoveRecord, advance: Advance) -> MoveRecord:
    """Complete or reverse a move that did not end.

    Returns:
        The move with progress DONE or FAILED (the files that still exist are in the source folder, or named in
        ``message``), or unchanged if a folder that must be read is missing: moves of a disk that is not mounted stay
        open.

    Raises:
        OSError, JournalError: a disk returned an error; the move stays open.
    """
    if move.stays and move.image.role is not Role.COPY:
        return recover_action(folders, move)
    places = _Places(_open_or_absent(folders, move.source), _open_or_absent(folders, move.destination))
    match move.progress:
        case MoveProgress.INTENDED:
            return _recover_intended(folders, places, move)
        case MoveProgress.PUBLISHING:
            return _recover_publishing(folders, places, move, advance)
        case MoveProgress.PUBLISHED:
            return _recover_published(folders, places, move, advance)
        case _:
            return move


# ---------------------------------------------------------------- intended: renames, or copies that do not count yet


def _recover_intended(folders: Folders, places: _Places, move: MoveRecord) -> MoveRecord:
    _restore_tombstones(places, move)
    moved = _moved_files(places, move)
    leaving = [position for position, file in enumerate(move.files) if file.may_be_last]
    waiting = [one for one in leaving if one not in moved and _is_in_source(places, move, one)]
    if 0 in moved and not waiting:
        return _complete(folders, places, move, moved)
    if len(moved) + len(waiting) < len(leaving) and -1 in {places.source, places.destination}:
        return move
    if moved:
        return _bring_back(places, move, moved)
    return _remove_copies(places, move)


def _restore_tombstones(places: _Places, move: MoveRecord) -> None:
    """Complete an interrupted ``_bring_back``."""
    for position in range(len(move.files)):
        tombstone = move.tombstone(position)
        if places.source != -1 and lstat_at(places.source, tombstone) is not None:
            restore_name(places.source, tombstone, move, position)


def _moved_files(places: _Places, move: MoveRecord) -> dict[int, str]:
    """Return the names in the destination of the files that were renamed, by position."""
    if places.destination == -1:
        return {}
    missing = {
        position: file
        for position, file in enumerate(move.files)
        if file.leaves and not _is_in_source(places, move, position)
    }
    names = names_by_inode(places.destination, [file.stamp.inode for file in missing.values()])
    moved = {}
    for position, file in missing.items():
        status = lstat_at(places.destination, names.get(file.stamp.inode, "."))
        if status is not None and is_version(status, file.stamp):
            moved[position] = names[file.stamp.inode]
    return moved


def _complete(folders: Folders, places: _Places, move: MoveRecord, moved: dict[int, str]) -> MoveRecord:
    """After all renames: make the missing copies and the reason, then sync."""
    names = _names_beside(move, moved[0])
    files: list[MoveFile] = []
    for position, file in enumerate(move.files):
        if position in moved:
            files.append(with_final(places.destination, file, moved[position]))
        elif not file.leaves and (final := _made(places, move, position, names[position])):
            files.append(with_final(places.destination, file, final))
    sync_folder(places.destination)
    if places.source != -1:
        remove_obsolete(folders, move)
        sync_folder(places.source)
    return replace(move, files=tuple(files), progress=MoveProgress.DONE)


def _names_beside(move: MoveRecord, image_name: str) -> tuple[str, ...]:
    """Return the names of all files that belong to the image's final name."""
    numbered = _NUMBERED.search(split_name(image_name)[0])
    attempt = int(numbered[1]) if numbered else 1
    names = final_names(move, attempt if 0 < attempt < MOST_ATTEMPTS else 1)
    return names if names[0] == image_name else final_names(move, 1)


def _made(places: _Places, move: MoveRecord, position: int, name: str) -> str:
    """Return the name of a copy or a reason, made here if it is missing; empty if it cannot be made any more."""
    file, part = move.files[position], move.part_name(position)
    if file.role is Role.REASON:
        expected = hashlib.sha256(file.body).hexdigest()
    else:
        expected = "" if places.source == -1 else sha256_at(places.source, file.name)
    if expected and sha256_at(places.destination, name) == expected:
        remove_part(places.destination, part)
        return name
    try:
        make_part(places.source, places.destination, move, position)
    except (FileNotFoundError, ChangedError):
        # The user moved or changed the shared file: it is no longer the one that belongs to this image.
        remove_part(places.destination, part)
        return ""
    return publish_under_free_name(places.destination, part, chain((name,), names_of_one(move, position)))


def _bring_back(places: _Places, move: MoveRecord, moved: dict[int, str]) -> MoveRecord:
    if places.source == -1:
        return move
    for position, final in moved.items():
        try:
            rename_new(places.destination, final, places.source, move.files[position].name)
        except FileExistsError:
            # The original name is taken: rename to the tombstone, which is always free, then to the next free name.
            tombstone = move.tombstone(position)
            rename_new(places.destination, final, places.source, tombstone)
            restore_name(places.source, tombstone, move, position)
    for position, file in enumerate(move.files):
        if not file.leaves:
            remove_part(places.destination, move.part_name(position))
    sync_folder(places.source)
    sync_folder(places.destination)
    return move.failed("moved back, because not every file of the image could be moved")


def _remove_copies(places: _Places, move: MoveRecord) -> MoveRecord:
    """After no rename: remove the copies whose sources exist, and publish or keep the others."""
    nothing = move.failed("nothing was moved")
    if places.destination == -1:
        return nothing
    unproven, saved = [], []
    for position, file in enumerate(move.files):
        part = move.part_name(position)
        if lstat_at(places.destination, part) is None:
            continue
        if not file.may_be_last or lstat_at(places.source, file.name) is not None:
            remove_part(places.destination, part)
        elif file.content and sha256_at(places.destination, part) == file.content:
            names = chain((file.wanted,), names_of_one(move, position))
            saved.append(with_final(places.destination, file, publish_under_free_name(places.destination, part, names)))
        else:
            unproven.append(part)
    sync_folder(places.destination)
    if saved:
        message = "the source is gone; its copy was complete and was used"
        return replace(move, files=tuple(saved), progress=MoveProgress.DONE, message=message)
    if unproven:
        return move.failed(f"the source is gone and its copy may be incomplete: kept as {', '.join(unproven)}")
    return nothing


# ---------------------------------------------------------------- publishing: complete copies, known by inode and hash


def _recover_publishing(folders: Folders, places: _Places, move: MoveRecord, advance: Advance) -> MoveRecord:
    if -1 in {places.source, places.destination}:
        return move
    destination = places.destination
    finals = _published(destination, move)
    _remove_placeholders(destination, move, finals)
    if len(finals) < len(move.files):
        if _all_in_source(places, move):
            return _unpublish(destination, move, finals)
        finals |= _publish_rest(destination, move, finals)
    if 0 not in finals:
        return move.failed(f"{move.source}/{move.image.name}: its copy is gone")
    for position in finals:
        remove_part(destination, move.part_name(position))
    files = tuple(replace(move.files[position], final=finals[position]) for position in sorted(finals))
    return remove_sources(folders, mark_published(destination, replace(move, files=files), advance))


def _recover_published(folders: Folders, places: _Places, move: MoveRecord, advance: Advance) -> MoveRecord:
    if -1 in {places.source, places.destination}:
        return move
    try:
        return remove_sources(folders, move)
    except PermissionError:
        if not _all_in_source(places, move):
            raise
    # The sources cannot be removed (immutable, or another owner's in a sticky folder): remove the copies, or each scan
    # would add one. Record PUBLISHING first, so that a crash in between is recovered from there.
    sealed = replace(move, progress=MoveProgress.PUBLISHING)
    advance(sealed)
    return _unpublish(places.destination, sealed, _published(places.destination, sealed))


def _all_in_source(places: _Places, move: MoveRecord) -> bool:
    return all(_is_in_source(places, move, position) for position, file in enumerate(move.files) if file.may_be_last)


def _published(destination: int, move: MoveRecord) -> dict[int, str]:
    """Return the visible names of the copies, by position.

    A user's file may have the same content: only the inode identifies a copy, or a name in the journal, because a file
    system's inode numbers may change.
    """
    by_inode = names_by_inode(destination, [file.copy_inode for file in move.files])
    finals = {}
    for position, file in enumerate(move.files):
        for name in (by_inode.get(file.copy_inode, ""), file.final):
            if name and not name.startswith(".sortd-") and sha256_at(destination, name) == file.content:
                finals[position] = name
                break
    return finals


def _remove_placeholders(destination: int, move: MoveRecord, finals: dict[int, str]) -> None:
    for position, file in enumerate(move.files):
        status = lstat_at(destination, file.final) if file.final and position not in finals else None
        if status is not None and status.st_size == 0 and lstat_at(destination, move.part_name(position)):
            os.unlink(file.final, dir_fd=destination)


def _unpublish(destination: int, move: MoveRecord, finals: dict[int, str]) -> MoveRecord:
    """Remove the copies, which sortd made; every source exists."""
    for name in finals.values():
        os.unlink(name, dir_fd=destination)
    for position in range(len(move.files)):
        remove_part(destination, move.part_name(position))
    sync_folder(destination)
    return move.failed("the copies were removed; the files are where they were")


def _publish_rest(destination: int, move: MoveRecord, finals: dict[int, str]) -> dict[int, str]:
    """Publish every other complete copy, because a source is gone."""
    beside = _names_beside(move, finals[0]) if 0 in finals else final_names(move, 1)
    published = {}
    for position, file in enumerate(move.files):
        part = move.part_name(position)
        if position not in finals and sha256_at(destination, part) == file.content:
            names = chain((beside[position],), names_of_one(move, position))
            published[position] = publish_under_free_name(destination, part, names)
    return published


def _is_in_source(places: _Places, move: MoveRecord, position: int) -> bool:
    file = move.files[position]
    status = None if places.source == -1 else lstat_at(places.source, file.name)
    return status is not None and is_version(status, file.stamp)


def _open_or_absent(folders: Folders, folder: str) -> int:
    try:
        return folders.open(folder)
    except FileNotFoundError:
        return -1


# ---------------------------------------------------------------- undo


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
        if move.stays:
            return _planned(record, plan_reversal(folders, record))
        return _plan_in(folders, folders.open(move.destination), record)
    except OSError as error:
        return UndoResult(record, None, f"{path}: {error.strerror}")


def _planned(record: Record, planned: tuple[MoveRecord, list[str]] | str) -> UndoPlan | UndoResult:
    """Return the undo of an image that stayed, from its move and the files that remain, or from why it is refused."""
    if isinstance(planned, str):
        return UndoResult(record, None, f"{record.destination_path}: {planned}")
    move, left = planned
    return UndoPlan(record, move, _left_message(left))


def _left_message(left: Sequence[str]) -> str:
    return f"left where they are, changed or gone: {', '.join(left)}" if left else ""


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
    return UndoPlan(record, undo, _left_message(left))


def _content(folders: Folders, folder: str, name: str) -> str:
    try:
        return sha256_at(folders.open(folder), name)
    except OSError:
        return ""


def _find(folder: int, file: MoveFile) -> Stamp | str:
    """Return the version of a file where its move put it, or why it cannot be moved back. Raises OSError."""
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


LAST_RECORD = (1 << 63) - 1  # the largest rowid of SQLite


def wanted_records(name: str, wanted: object) -> tuple[str, list[int]]:
    """Return the root and the distinct records of a requested undo in one dataset; raise ValueError if invalid."""
    match wanted:
        case {"root": str(root), "records": list(records)}:
            if odd := [one for one in records if type(one) is not int or not 0 < one <= LAST_RECORD]:
                raise ValueError(f"{odd[0]!r:.100} is not a record of {name}")
            return root, list(dict.fromkeys(records))
    raise ValueError(f"an undo in {name} requires root and records")
