"""What becomes of a move that did not end: one way for errors and crashes, by looking at what stands where.

Nothing is removed here unless the same bytes are known to stand elsewhere; doing it all again is no mistake.
"""

import hashlib
import os
import re
from dataclasses import dataclass, replace
from itertools import chain

from sortd.companions import split_name
from sortd.errors import ChangedError
from sortd.files import sync_folder
from sortd.moving.copy import Advance, mark_published, publish_under_free_name, remove_sources, restore_name, with_final
from sortd.moving.fs import Folders, is_version, lstat_at, names_by_inode, rename_new
from sortd.moving.parts import content_of, make_part, remove_obsolete, remove_part
from sortd.moving.plan import MOST_ATTEMPTS, final_names, names_of_one
from sortd.store.records import MoveFile, MoveProgress, MoveRecord, Role

_NUMBERED = re.compile(r" \((\d+)\)$")


@dataclass(frozen=True, slots=True)
class _Places:
    """The two folders of a move as they are now; a folder that is gone is -1."""

    source: int
    destination: int


def recover(folders: Folders, move: MoveRecord, advance: Advance) -> MoveRecord:
    """Bring a move that did not end to its end, or back to its beginning.

    Returns:
        It, with progress DONE, FAILED (every file is in the source folder), or unchanged where a folder that must
        be looked at is not there: a disk that is not mounted keeps its moves open.

    Raises:
        OSError, JournalError: a disk refused; it stays open.
    """
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


# ---------------------------------------------------------------- intended: renames, or copies that count for nothing


def _recover_intended(folders: Folders, places: _Places, move: MoveRecord) -> MoveRecord:
    _restore_tombstones(places, move)
    moved = _moved_files(places, move)
    leaving = [position for position, file in enumerate(move.files) if file.leaves]
    waiting = [one for one in leaving if one not in moved and _stands(places, move, one)]
    if 0 in moved and not waiting:
        return _complete(folders, places, move, moved)
    if len(moved) + len(waiting) < len(leaving) and -1 in {places.source, places.destination}:
        return move
    if moved:
        return _bring_back(places, move, moved)
    return _drop_copies(places, move)


def _restore_tombstones(places: _Places, move: MoveRecord) -> None:
    """End a bringing back that was itself cut short."""
    for position in range(len(move.files)):
        taken = move.tombstone(position)
        if places.source != -1 and lstat_at(places.source, taken) is not None:
            restore_name(places.source, taken, move, position)


def _moved_files(places: _Places, move: MoveRecord) -> dict[int, str]:
    """Return the names in the destination of the files that were renamed, by position."""
    if places.destination == -1:
        return {}
    sought = {
        position: file
        for position, file in enumerate(move.files)
        if file.leaves and not _stands(places, move, position)
    }
    names = names_by_inode(places.destination, [file.stamp.inode for file in sought.values()])
    moved = {}
    for position, file in sought.items():
        status = lstat_at(places.destination, names.get(file.stamp.inode, "."))
        if status is not None and is_version(status, file.stamp):
            moved[position] = names[file.stamp.inode]
    return moved


def _complete(folders: Folders, places: _Places, move: MoveRecord, moved: dict[int, str]) -> MoveRecord:
    """Every file has been renamed: make what belongs beside them and let it all be durable."""
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
    """Return the names that go with the one that the image got."""
    numbered = _NUMBERED.search(split_name(image_name)[0])
    attempt = int(numbered[1]) if numbered else 1
    names = final_names(move, attempt if 0 < attempt < MOST_ATTEMPTS else 1)
    return names if names[0] == image_name else final_names(move, 1)


def _made(places: _Places, move: MoveRecord, position: int, name: str) -> str:
    """Return the name under which a copy or a reason stands, after making it where it is missing; else nothing."""
    file, part = move.files[position], move.part_name(position)
    if file.role is Role.REASON:
        expected = hashlib.sha256(file.body).hexdigest()
    else:
        expected = "" if places.source == -1 else content_of(places.source, file.name)
    if expected and content_of(places.destination, name) == expected:
        remove_part(places.destination, part)
        return name
    try:
        make_part(places.source, places.destination, move, position)
    except (FileNotFoundError, ChangedError):
        # The user has taken or rewritten the shared file: it is no longer the one that belongs to this image.
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
            # Its name was taken meanwhile: by way of a name that nobody else has to the next free one.
            taken = move.tombstone(position)
            rename_new(places.destination, final, places.source, taken)
            restore_name(places.source, taken, move, position)
    for position, file in enumerate(move.files):
        if not file.leaves:
            remove_part(places.destination, move.part_name(position))
    sync_folder(places.source)
    sync_folder(places.destination)
    return move.failed("taken back: not every file of the image could be moved")


def _drop_copies(places: _Places, move: MoveRecord) -> MoveRecord:
    """Nothing was renamed: remove the copies whose sources stand, and save those whose sources do not."""
    nothing = move.failed("nothing had been moved")
    if places.destination == -1:
        return nothing
    unproven, saved = [], []
    for position, file in enumerate(move.files):
        part = move.part_name(position)
        if lstat_at(places.destination, part) is None:
            continue
        if not file.leaves or lstat_at(places.source, file.name) is not None:
            remove_part(places.destination, part)
        elif file.content and content_of(places.destination, part) == file.content:
            names = chain((file.wanted,), names_of_one(move, position))
            final = publish_under_free_name(places.destination, part, names)
            saved.append(with_final(places.destination, file, final))
        else:
            unproven.append(part)
    sync_folder(places.destination)
    if saved:
        message = "the source was gone, its copy was whole"
        return replace(move, files=tuple(saved), progress=MoveProgress.DONE, message=message)
    if unproven:
        return move.failed(f"the source is gone, its copy cannot be proven whole: kept as {', '.join(unproven)}")
    return nothing


# ---------------------------------------------------------------- publishing: whole copies, known by inode and hash


def _recover_publishing(folders: Folders, places: _Places, move: MoveRecord, advance: Advance) -> MoveRecord:
    if -1 in {places.source, places.destination}:
        return move
    destination = places.destination
    finals = _published(destination, move)
    _remove_placeholders(destination, move, finals)
    if len(finals) < len(move.files):
        if _all_stand(places, move):
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
        if not _all_stand(places, move):
            raise
    # The sources may not be removed (immutable, another owner's in a sticky folder): the copies go instead, or the
    # images would be copied again and again. Step back first, so that a crash in between is one of that step.
    sealed = replace(move, progress=MoveProgress.PUBLISHING)
    advance(sealed)
    return _unpublish(places.destination, sealed, _published(places.destination, sealed))


def _all_stand(places: _Places, move: MoveRecord) -> bool:
    return all(_stands(places, move, position) for position, file in enumerate(move.files) if file.leaves)


def _published(destination: int, move: MoveRecord) -> dict[int, str]:
    """Return the names under which sealed copies are visible.

    An equal file of the user's is none of ours: only the inode tells, or a name that the journal holds because the
    file system's inode numbers need not last.
    """
    by_inode = names_by_inode(destination, [file.copy_inode for file in move.files])
    finals = {}
    for position, file in enumerate(move.files):
        for name in (by_inode.get(file.copy_inode, ""), file.final):
            if name and not name.startswith(".sortd-") and content_of(destination, name) == file.content:
                finals[position] = name
                break
    return finals


def _remove_placeholders(destination: int, move: MoveRecord, finals: dict[int, str]) -> None:
    for position, file in enumerate(move.files):
        status = lstat_at(destination, file.final) if file.final and position not in finals else None
        if status is not None and status.st_size == 0 and lstat_at(destination, move.part_name(position)):
            os.unlink(file.final, dir_fd=destination)


def _unpublish(destination: int, move: MoveRecord, finals: dict[int, str]) -> MoveRecord:
    """Every source stands: remove the copies, which are ours."""
    for position, name in finals.items():
        os.unlink(name, dir_fd=destination)
        remove_part(destination, move.part_name(position))
    for position in range(len(move.files)):
        remove_part(destination, move.part_name(position))
    sync_folder(destination)
    return move.failed("its copies were removed, the files are where they were")


def _publish_rest(destination: int, move: MoveRecord, finals: dict[int, str]) -> dict[int, str]:
    """A source is gone: what copies are whole become visible."""
    beside = _names_beside(move, finals[0]) if 0 in finals else final_names(move, 1)
    published = {}
    for position, file in enumerate(move.files):
        part = move.part_name(position)
        if position not in finals and content_of(destination, part) == file.content:
            names = chain((beside[position],), names_of_one(move, position))
            published[position] = publish_under_free_name(destination, part, names)
    return published


def _stands(places: _Places, move: MoveRecord, position: int) -> bool:
    file = move.files[position]
    status = None if places.source == -1 else lstat_at(places.source, file.name)
    return status is not None and is_version(status, file.stamp)


def _open_or_absent(folders: Folders, folder: str) -> int:
    try:
        return folders.open(folder)
    except FileNotFoundError:
        return -1
